fn main() -> std::process::ExitCode {
    palettist::torch::load_cuda();
    palettist::cli::run()
}
