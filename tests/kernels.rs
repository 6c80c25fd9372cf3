//! The kernels for palettes on CUDA (src/palette/batch): their own source, on the stand-in for a device (tests/stand_in),
//! against the definition, against the passes of the CPU, and against themselves with other numbers of blocks; and NVRTC,
//! where a Python has it, compiles them for every card.

mod common;

use std::path::Path;
use std::process::Command;

use common::stand_in::{again, is_inside, is_on_stand_in};
use palettist::cuda::compiler::Compiler;
use palettist::networks::unet::UnetConfig;
use palettist::palette::batch::{Batch, Found, Member, source, tested};
use palettist::palette::{AdamWStep, DkmLayer, Form, Gradient, Histogram, reference};
use palettist::torch::random::{Purpose, generator, normal};
use tch::{Device, Kind, Tensor};

const CARD: Device = Device::Cuda(0);
/// A step that moves nothing and leaves the gradient in the mean of gradients.
const STILL: AdamWStep =
    AdamWStep { factor: 1.0, rate_of_mean: 1.0, beta2: 0.0, rate_of_square: 1.0, size: 0.0, ..AdamWStep::NONE };
/// A step of a size as in the tests of runs.
const STEP: AdamWStep = AdamWStep {
    factor: 0.5,
    decay: 0.9999,
    rate_of_mean: 0.1,
    beta2: 0.99,
    rate_of_square: 0.01,
    size: 1e-3,
    root: 10.0,
    eps: 1e-8,
};

fn plain(bits: u32) -> Form {
    Form::per_tensor(bits)
}

fn grouped(bits: u32, group_size: usize) -> Form {
    Form { group_size: Some(group_size), ..plain(bits) }
}

/// A layer with its weight, what the network sees, and AdamW's two moments, on one device.
struct Side {
    layer: DkmLayer,
    tensors: [Tensor; 4],
}

impl Side {
    fn new(name: &str, form: Form, weight: &Tensor, device: Device) -> Self {
        let weight = weight.to_device(device).copy();
        let zeros = || weight.zeros_like();
        Self { layer: DkmLayer::new(name, form, &weight).unwrap(), tensors: [weight.copy(), zeros(), zeros(), zeros()] }
    }

    fn member(&mut self) -> Member<'_> {
        let [weight, soft, exp_avg, exp_avg_sq] = &self.tensors;
        Member { layer: &mut self.layer, weight, soft, moments: [exp_avg, exp_avg_sq] }
    }

    /// Bits of all, on the host.
    fn bits(&self) -> Vec<Tensor> {
        let entries = Tensor::from_slice(&self.layer.entries().unwrap());
        let host = self.tensors.iter().map(|tensor| tensor.to_device(Device::Cpu).to_kind(Kind::Double));
        host.chain([entries]).collect()
    }
}

fn step(batch: &mut Batch, sides: &mut [Side], gradients: &[Tensor], rho: f64, step: &AdamWStep) -> Vec<Found> {
    let upstream = gradients.iter().map(|gradient| Some(gradient.to_device(CARD))).collect();
    let taken = batch.begin(&mut sides.iter_mut().map(Side::member).collect::<Vec<_>>(), rho, 3).unwrap();
    assert!(taken.iter().all(|&taken| taken));
    let found = batch.gradient(upstream).unwrap();
    batch.step(&(0..sides.len()).map(|place| (*step, 77 + 5 * place as u32)).collect::<Vec<_>>()).unwrap();
    found
}

/// The same on the CPU; gives the square of the gradient.
fn step_on_cpu(side: &mut Side, gradient: &Tensor, rho: f64, step: &AdamWStep) -> f64 {
    let [weight, soft, exp_avg, exp_avg_sq] = &mut side.tensors;
    let softened = side.layer.soften(weight, rho, 3, None, soft).unwrap();
    let Gradient::Own { square } = side.layer.gradient(softened, gradient.copy()).unwrap() else { panic!("whole") };
    side.layer.step(weight, [exp_avg, exp_avg_sq], step).unwrap();
    square
}

fn draw(index: u64, shape: &[i64]) -> Tensor {
    normal(&mut generator(3, Purpose::Initial, index), shape)
}

/// ‖found − expected‖ / ‖expected‖
fn distance(found: &Tensor, expected: &Tensor) -> f64 {
    let [found, expected] = [found, expected].map(|one| one.to_device(Device::Cpu).to_kind(Kind::Double).view(-1));
    (found - &expected).norm().double_value(&[]) / expected.norm().double_value(&[]).max(1e-300)
}

/// Soft weights, entries and gradients are those of differentiable k-means by the book.
#[test]
fn kernels_do_what_the_definition_says() {
    if !is_on_stand_in("kernels_do_what_the_definition_says") {
        return;
    }
    let mut batch = Batch::with_blocks(0, Some(5)).unwrap();
    let cases = [
        (plain(1), [40, 30]),
        (plain(2), [64, 70]),
        (grouped(2, 8), [32, 40]),
        (plain(3), [50, 70]),
        (grouped(4, 16), [64, 60]),
        (plain(6), [60, 90]),
        (plain(8), [90, 100]),
    ];
    for rho in [1.0, 0.1, 0.01] {
        let weights: Vec<Tensor> =
            cases.iter().zip(0..).map(|((_, shape), place)| draw(place, shape) * 0.03 / (place + 1) as f64).collect();
        let gradients: Vec<Tensor> = cases.iter().zip(50..).map(|((_, shape), place)| draw(place, shape)).collect();
        let mut sides: Vec<Side> =
            cases.iter().zip(&weights).map(|((form, _), weight)| Side::new("w", *form, weight, CARD)).collect();
        let starts: Vec<Vec<f64>> = sides.iter().map(|side| side.layer.centroids.clone()).collect();
        step(&mut batch, &mut sides, &gradients, rho, &STILL);
        for ((((form, _), side), (weight, gradient)), start) in
            cases.iter().zip(&sides).zip(weights.iter().zip(&gradients)).zip(starts)
        {
            let groups = side.layer.groups();
            let rows = |tensor: &Tensor| tensor.to_device(Device::Cpu).view([groups as i64, -1]);
            let [soft, found] = [&side.tensors[1], &side.tensors[2]].map(rows);
            let (weight, gradient, now) = (rows(weight), rows(gradient), side.layer.entries().unwrap());
            for group in 0..groups {
                let row = |tensor: &Tensor| tensor.get(group as i64);
                // Weights as the code sees them.
                let seen = Histogram::of(&row(&weight), side.layer.code(group, rho), false).unwrap();
                let palettist::palette::Code::Fixed { step } = seen.code else { panic!("{form:?} through f16") };
                let seen = (row(&weight) / f64::from(step)).round() * f64::from(step);
                let seen = seen.to_kind(Kind::Double).view([-1, 1]).set_requires_grad(true);
                let table = form.table();
                let entries = Tensor::from_slice(&start[group * table..][..table]).view([-1, 1]);
                let (expected, new) = reference::dkm(&seen, &entries, side.layer.temperature(group, rho), 3).unwrap();
                let loss = (&expected * row(&gradient).view([-1, 1])).sum(Kind::Double);
                loss.backward();
                let off = [
                    distance(&row(&soft), &expected.detach()),
                    distance(&Tensor::from_slice(&now[group * table..][..table]), &new.detach()),
                    distance(&row(&found), &seen.grad()),
                ];
                eprintln!(
                    "{} bits, {groups} groups, ρ {rho}: soft {:.1e}, entries {:.1e}, gradient {:.1e}",
                    form.bits, off[0], off[1], off[2]
                );
                assert!(off[0] < 1e-6 && off[1] < 1e-9 && off[2] < 1e-5, "{form:?} at {rho}: {off:?}");
            }
        }
    }
}

/// Entries that hardly any weight looks at have their place, and their gradient.
#[test]
fn entries_far_from_all_weights_are_as_on_the_cpu() {
    if !is_on_stand_in("entries_far_from_all_weights_are_as_on_the_cpu") {
        return;
    }
    let mut batch = Batch::with_blocks(0, Some(3)).unwrap();
    let (weight, gradient) = (draw(1, &[64, 50]) * 0.03, draw(2, &[64, 50]));
    for entries in [[-0.5, -0.02, 0.02, 3.0], [-0.03, 0.0, 0.0, 0.4], [5.0, 6.0, 7.0, 8.0]] {
        let mut sides = vec![Side::new("w", plain(2), &weight, CARD)];
        let mut cpu = Side::new("w", plain(2), &weight, Device::Cpu);
        (sides[0].layer.centroids, cpu.layer.centroids) = (entries.to_vec(), entries.to_vec());
        let square = step_on_cpu(&mut cpu, &gradient, 0.2, &STILL);
        let found = step(&mut batch, &mut sides, std::slice::from_ref(&gradient), 0.2, &STILL);
        assert!((found[0].square / square - 1.0).abs() < 1e-5, "{entries:?}: {} {square}", found[0].square);
        for (found, expected) in sides[0].bits().iter().zip(cpu.bits()).skip(1) {
            assert!(distance(found, &expected) < 1e-5, "{entries:?}: {:e}", distance(found, &expected));
        }
    }
}

/// Whole steps are those of the CPU, as the temperature falls and weights leave the bins that were laid out for them; and
/// they are the same to the bit with any number of blocks.
#[test]
fn steps_are_the_cpus_and_the_same_with_any_number_of_blocks() {
    if !is_on_stand_in("steps_are_the_cpus_and_the_same_with_any_number_of_blocks") {
        return;
    }
    let cases = [(plain(2), [300, 140]), (grouped(4, 16), [64, 64]), (plain(4), [64, 600]), (plain(8), [80, 90])];
    for kind in [Kind::Float, Kind::BFloat16] {
        let weight = |place: u64, shape: &[i64]| (draw(place, shape) * 0.05).to_kind(kind);
        // The last one is told nothing of the step before, as a resumed run.
        let mut with_blocks: Vec<(Batch, Vec<Side>)> = [1, 7, 132, 4]
            .into_iter()
            .map(|blocks| {
                let sides = cases
                    .iter()
                    .zip(0..)
                    .map(|((form, shape), place)| Side::new("w", *form, &weight(place, shape), CARD));
                (Batch::with_blocks(0, Some(blocks)).unwrap(), sides.collect())
            })
            .collect();
        let mut on_cpu: Vec<Side> = cases
            .iter()
            .zip(0..)
            .map(|((form, shape), place)| Side::new("w", *form, &weight(place, shape), Device::Cpu))
            .collect();
        for (number, rho) in [1.0, 0.9, 0.4, 0.2, 0.2, 0.1].into_iter().enumerate() {
            let gradients: Vec<Tensor> = cases
                .iter()
                .zip(10 * (number as u64 + 1)..)
                .map(|((_, shape), place)| (draw(place, shape) * 0.01).to_kind(kind))
                .collect();
            // Steps of a tenth of the weights: the fourth moves some out of their bins.
            let large = AdamWStep { size: if number == 3 { 0.4 } else { 1e-3 }, ..STEP };
            let found: Vec<Vec<Found>> =
                with_blocks.iter_mut().map(|(batch, sides)| step(batch, sides, &gradients, rho, &large)).collect();
            with_blocks[3].0.forget();
            for (_, sides) in &with_blocks[1..] {
                for (side, first) in sides.iter().zip(&with_blocks[0].1) {
                    let same = side.bits().iter().zip(first.bits()).all(|(one, other)| one.equal(&other));
                    assert!(same, "step {number} in {kind:?}: the number of blocks matters, or what was before");
                }
            }
            for other in &found[1..] {
                for (one, other) in found[0].iter().zip(other) {
                    assert_eq!((one.square, one.hard_error), (other.square, other.hard_error));
                }
            }
            if kind == Kind::BFloat16 {
                continue; // Its gradients are rounded on the CPU before they are used: lower precisions are compared by runs.
            }
            for ((cpu, gradient), (side, found)) in
                on_cpu.iter_mut().zip(&gradients).zip(with_blocks[0].1.iter().zip(&found[0]))
            {
                let square = step_on_cpu(cpu, gradient, rho, &large);
                let form = cpu.layer.form;
                assert!((found.square / square - 1.0).abs() < 1e-5, "{form:?}: {} {square}", found.square);
                // After that large step some weights are in a neighbouring bin.
                let most = if number > 3 { 1e-4 } else { 1e-5 };
                for (found, expected) in side.bits().iter().zip(cpu.bits()) {
                    let off = distance(found, &expected);
                    assert!(off < most, "step {number}, {form:?}: {off:e}");
                }
            }
        }
    }
}

/// What is no number is found: in gradients by the norm, in weights by name. Layers without a gradient stay as they are.
#[test]
fn what_is_no_number_is_found() {
    if !is_on_stand_in("what_is_no_number_is_found") {
        return;
    }
    let mut batch = Batch::with_blocks(0, None).unwrap();
    let weights = [draw(1, &[40, 40]), draw(2, &[50, 40])];
    let mut sides: Vec<Side> =
        weights.iter().zip(["first", "second"]).map(|(w, name)| Side::new(name, plain(2), w, CARD)).collect();
    let gradient = draw(3, &[50, 40]);
    for bad in [f64::NAN, f64::INFINITY] {
        let broken = gradient.copy();
        let _ = broken.view(-1).get(7).fill_(bad);
        batch.begin(&mut sides.iter_mut().map(Side::member).collect::<Vec<_>>(), 0.5, 3).unwrap();
        let found = batch.gradient(vec![None, Some(broken.to_device(CARD))]).unwrap();
        assert_eq!(found[0].square, 0.0);
        assert!(!found[1].square.is_finite());
    }
    let before = sides.iter().map(|side| side.tensors[0].to_device(Device::Cpu)).collect::<Vec<_>>();
    batch.begin(&mut sides.iter_mut().map(Side::member).collect::<Vec<_>>(), 0.5, 3).unwrap();
    batch.gradient(vec![None, Some(gradient.to_device(CARD))]).unwrap();
    batch.step(&[(AdamWStep::NONE, 0), (STEP, 0)]).unwrap();
    assert!(sides[0].tensors[0].to_device(Device::Cpu).equal(&before[0]));
    assert!(!sides[1].tensors[0].to_device(Device::Cpu).equal(&before[1]));
    // And after that it steps as ever.
    step(&mut batch, &mut sides, &[draw(4, &[40, 40]), gradient.copy()], 0.5, &STEP);
    assert!(!sides[0].tensors[0].to_device(Device::Cpu).equal(&before[0]));

    let _ = sides[1].tensors[0].view(-1).get(9).fill_(f64::NAN);
    batch.forget();
    let told = batch.begin(&mut sides.iter_mut().map(Side::member).collect::<Vec<_>>(), 0.5, 3).unwrap_err();
    assert_eq!(told.to_string(), "parameter second: 1 of its values are infinite or not numbers");
}

/// Weights too far apart for fixed point stay out; forms that are not for batches do not fit.
#[test]
fn layers_that_are_not_for_batches_stay_out() {
    if !is_on_stand_in("layers_that_are_not_for_batches_stay_out") {
        return;
    }
    let mut batch = tested(0).unwrap();
    let far = draw(1, &[400, 400]) * 1e-3;
    let _ = far.view(-1).get(3).fill_(1e4);
    let mut sides = [Side::new("far", plain(2), &far, CARD), Side::new("near", plain(2), &draw(2, &[40, 40]), CARD)];
    let taken = batch.begin(&mut sides.iter_mut().map(Side::member).collect::<Vec<_>>(), 1e-3, 3).unwrap();
    assert_eq!(taken, [false, true]);
    for form in [
        Form { cluster_dim: 2, ..plain(4) },
        Form { per_channel_scale: true, ..plain(2) },
        Form { group_size: Some(1), ..plain(4) },
        Form { axis: 1, group_size: Some(8), ..plain(2) },
    ] {
        assert!(!Side::new("w", form, &draw(3, &[64, 64]), CARD).member().fits(), "{form:?}");
    }
    assert!(!Side::new("w", plain(2), &draw(3, &[64, 64]), Device::Cpu).member().fits());
}

/// All palettes of SD 1.5 in a step: launches and copies are few, whatever the form, and the memory beside weights, gradients
/// and moments is bounded. Counted on a device of the real shapes that computes nothing.
#[test]
fn sd15_costs_a_few_launches() {
    const NAME: &str = "sd15_costs_a_few_launches";
    const STEPS: &str = "TEST_STEPS";
    const GROUPS: &str = "TEST_GROUPS";
    let number = |variable: &str| std::env::var(variable).ok().and_then(|text| text.parse::<usize>().ok());
    if is_inside() {
        let form = number(GROUPS).map_or(plain(2), |size| grouped(4, size));
        let unet = UnetConfig::sd15();
        let parameters = unet.unwrap().parameters().into_iter().filter(|parameter| {
            let groups = form.group_size.map_or(0, |size| parameter.shape[0] % size as i64);
            parameter.shape.len() > 1 && groups == 0
        });
        let mut sides: Vec<Side> = parameters
            .map(|parameter| {
                let weight = Tensor::zeros(parameter.shape.as_slice(), (Kind::Float, CARD));
                let zeros = || weight.zeros_like();
                let layer = DkmLayer::new(&parameter.name, form, &weight).unwrap();
                Side { layer, tensors: [zeros(), zeros(), zeros(), weight] }
            })
            .collect();
        let gradients: Vec<Tensor> = sides.iter().map(|side| side.tensors[0].zeros_like()).collect();
        let mut batch = Batch::with_blocks(0, None).unwrap();
        for _ in 0..number(STEPS).unwrap() {
            step(&mut batch, &mut sides, &gradients, 0.5, &STEP);
        }
        return;
    }
    for groups in [None, Some("16")] {
        let counts = [2, 3].map(|steps: usize| {
            let folder = tempfile::tempdir().unwrap();
            let (report, steps) = (folder.path().join("report.json"), steps.to_string());
            let variables = [("STAND_IN_SHAPES", "1"), (STEPS, &steps), ("STAND_IN_REPORT", report.to_str().unwrap())];
            let variables = variables.into_iter().chain(groups.map(|size| (GROUPS, size))).collect::<Vec<_>>();
            again(NAME, &variables);
            let text = std::fs::read_to_string(report).unwrap();
            serde_json::from_str::<serde_json::Value>(&text).unwrap()
        });
        let of_step = |part: &str, what: &str| {
            let [before, after] = &counts;
            after[part][what].as_i64().unwrap() - before[part][what].as_i64().unwrap()
        };
        let [operators, up, down] = ["operators", "up", "down"].map(|part| of_step(part, "number"));
        let bytes = of_step("up", "bytes") + of_step("down", "bytes");
        let peak = counts[1]["peak"].as_f64().unwrap() / 1e9;
        eprintln!(
            "groups {groups:?}: {operators} operators and launches, {up} copies up, {down} down, of {bytes} bytes; peak {peak:.2} GB"
        );
        assert!(operators <= 10, "{:?}", counts[1]["by_name"]);
        assert!(up <= 4 && down <= 4 && bytes < 1_000_000, "{up} up, {down} down, {bytes} bytes");
        assert_eq!(of_step("within", "number"), 0);
    }
}

/// NVRTC takes the kernels for each card of the last eight years; says what they need of it.
#[test]
fn nvrtc_compiles_the_kernels_for_every_card() {
    let Some(folder) = nvrtc() else {
        eprintln!("skipped: needs PALETTIST_PYTHON, a Python with nvidia-cuda-nvrtc");
        return;
    };
    let compiler = Compiler::in_folder(Path::new(&folder)).unwrap();
    let (text, names) = source();
    let names: Vec<&str> = names.collect();
    for architecture in [75, 80, 86, 89, 90, 100, 120] {
        let target = compiler.target(architecture).unwrap();
        let compiled = compiler.compile("kernels.cu", text, &target).unwrap();
        let log = compiled.log;
        assert!(!log.contains("warning"), "{log}");
        let mut name = "";
        let mut seen = Vec::new();
        for line in log.lines() {
            if let Some(found) = names.iter().find(|name| line.contains(&format!("'{name}'"))) {
                name = found;
            }
            if line.contains("Used") && line.contains("registers") {
                eprintln!("sm_{architecture} {name}: {}", line.split("Used ").nth(1).unwrap());
                seen.push(name);
                let registers: u32 = line.split("Used ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
                // Two blocks of 256 fit on a multiprocessor, of 65,536 registers.
                assert!(registers <= 128, "{name}: {line}");
            }
        }
        seen.sort_unstable();
        let mut all = names.clone();
        all.sort_unstable();
        assert_eq!(seen, all, "{log}");
    }
    // A card that is newer than the compiler gets what its driver can compile on.
    let newest = *compiler.architectures.last().unwrap();
    let newer = compiler.target(newest + 1).unwrap();
    assert!(compiler.file_name(text, &newer).ends_with(".ptx"));
    let image = compiler.compile("kernels.cu", text, &newer).unwrap().image;
    assert!(String::from_utf8_lossy(&image).contains(".version"));
    assert!(compiler.target(50).is_err());
    let Err(mistake) = compiler.compile("broken.cu", "int f() { return }", &newer) else { panic!("it is compiled") };
    assert!(format!("{mistake:#}").contains("broken.cu(1): error"), "{mistake:#}");
}

/// The folder of NVRTC's libraries in the Python that tests may use.
fn nvrtc() -> Option<String> {
    let python = std::env::var_os("PALETTIST_PYTHON")?;
    let search = "import glob, sys; \
                  print(next(p for d in sys.path for p in glob.glob(d + '/nvidia/cu13/lib') if glob.glob(p + '/libnvrtc.so*')))";
    let output = Command::new(python).args(["-c", search]).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}
