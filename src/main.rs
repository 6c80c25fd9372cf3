fn main() -> std::process::ExitCode {
    palettist::torch::load_cuda();
    std::process::ExitCode::SUCCESS
}
