use std::path::Path;

use super::*;
use crate::config::parse;
use crate::ops::Weights;
use crate::pipeline::condition::{TextEncoder, encode_texts};
use crate::source::Model;
use crate::train::plan::Before;
use crate::train::setup;
use crate::train::trained::Trained;

/// A run on the small model and the mascot, as far as its first step: palettes, min-SNR weights, a text encoder that learns.
fn begun(folder: &Path, changes: &[&str]) -> (Denoise, Networks, Model, Trained) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let class = folder.join("class");
    std::fs::create_dir_all(&class).unwrap();
    for name in ["0001.png", "0002.png"] {
        std::fs::copy(root.join("datasets/sketchbook/train").join(name), class.join(name)).unwrap();
    }
    let text = format!(
        r#"
output_dir = "{0}/run"
model.pretrained_model_name_or_path = "{1}/tests/fixtures/pipeline/model"
data.resolution = 32
train = {{ mode = "dreambooth", train_text_encoder = true, train_batch_size = 3, min_snr_gamma = 2.0, device = "cpu" }}
palettize = {{ n_bits = 2, weight_threshold = 100 }}
[data.dreambooth]
instance_data_dir = "{1}/datasets/mascot"
instance_prompt = "a sks cat"
class_data_dir = "{0}/class"
class_prompt = "a cat"
num_class_images = 2
prior_loss_weight = 0.3
"#,
        folder.display(),
        root.display()
    );
    let changes: Vec<String> = changes.iter().map(|change| (*change).to_owned()).collect();
    let config = parse(&text, "small.toml", &changes).unwrap().config;
    let model = setup::open_model(&config).unwrap();
    let before = Before { learned_from: None, folder: &config.output_dir, resumes: false };
    let opened = setup::unet(&config, model, Device::Cpu, Kind::Float, before).unwrap();
    let (denoise, mut trained, model, _) = opened;
    let mut networks = trained.begin(1.0, |_| false).unwrap().networks;
    // As if it had learnt: what a teacher is told must not follow.
    for weight in networks.get_mut(&Component::TextEncoder).unwrap().values_mut() {
        *weight = &*weight * 1.1;
    }
    (denoise, networks, model, trained)
}

/// What a UNet predicts of one row of a batch, and what its blocks give, each as a flat list of numbers.
fn predicted(
    (unet_config, weights): (&UnetConfig, &Weights),
    batch: &Batch,
    row: usize,
    context: &Tensor,
) -> (Vec<f64>, Vec<Vec<f64>>) {
    let flat = |tensor: &Tensor| Vec::<f64>::try_from(tensor.to_kind(Kind::Double).reshape([-1])).unwrap();
    let features = RefCell::new(Vec::new());
    let mut ops = Tensors::new(weights).keeping_features(&features);
    let one = |tensor: &Tensor| tensor.narrow(0, row as i64, 1);
    let condition = crate::networks::unet::Condition { context, added: None, residuals: &[] };
    let output = tch::no_grad(|| unet(&mut ops, unet_config, &one(&batch.noised), &one(&batch.timesteps), condition));
    (flat(&output), features.into_inner().iter().map(flat).collect())
}

fn mean_square(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / a.len() as f64
}

/// Each part of the loss, by the formula in plain numbers, one row at a time.
#[test]
fn each_loss_is_its_formula() {
    let weights = ["distill.lambda_sd=0.8", "distill.lambda_kd_output=0.5", "distill.lambda_kd_feat=0.01"];
    let base = "data.dreambooth.prior_source=base";
    for (enabled, on, prior_is_base) in [
        (true, "all", false),
        (true, "class", false),
        (true, "all", true),
        (true, "class", true),
        (false, "class", true),
        (false, "class", false),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let (enabled_key, on_key) = (format!("distill.enabled={enabled}"), format!("distill.on={on}"));
        let mut changes = vec![enabled_key.as_str()];
        if enabled {
            changes.extend(weights);
            changes.push(&on_key);
        }
        if prior_is_base {
            changes.push(base);
        }
        let (mut denoise, networks, model, _) = begun(folder.path(), &changes);
        let part = Part::whole(7, 3);
        let batch = denoise.batch(&part).unwrap();
        let rows = batch.captions.len();
        assert_eq!(rows, 6);
        assert_eq!(batch.captions, ["a sks cat", "a sks cat", "a sks cat", "a cat", "a cat", "a cat"]);
        let halves = batch.noised.chunk(2, 0);
        assert_eq!(halves[0].equal(&halves[1]), prior_is_base);
        if prior_is_base {
            let halves = batch.timesteps.chunk(2, 0);
            assert!(halves[0].equal(&halves[1]));
        }
        // The text encoders, each its own.
        let place = (Device::Cpu, Kind::Float);
        let mut encoders = TextEncoder::all(&model, Kind::Float, Device::Cpu).unwrap();
        let embed = |encoders: &[TextEncoder], row: usize| {
            encode_texts(encoders, &[batch.captions[row].as_str()], place).unwrap().context
        };
        let told_base: Vec<Tensor> = (0..rows).map(|row| embed(&encoders, row)).collect();
        encoders[0].weights =
            networks[&Component::TextEncoder].iter().map(|(name, t)| (name.clone(), t.shallow_clone())).collect();
        let told_own: Vec<Tensor> = (0..rows).map(|row| embed(&encoders, row)).collect();
        // As the teacher is kept: in two bytes a weight.
        let halved = model.weights(Component::Unet, Kind::Half, Device::Cpu).unwrap();
        let float: Weights = halved.iter().map(|(name, t)| (name.clone(), t.to_kind(Kind::Float))).collect();
        let config = model.unet_config().unwrap();
        let (mut data, mut output, mut features) = (vec![0.0; rows], vec![0.0; rows], vec![0.0; rows]);
        for row in 0..rows {
            let own = predicted((&config, &networks[&Component::Unet]), &batch, row, &told_own[row]);
            let of_base = predicted((&config, &float), &batch, row, &told_base[row]);
            let target = batch.target.narrow(0, row as i64, 1).to_kind(Kind::Double).reshape([-1]);
            let truth = if prior_is_base && row >= 3 { of_base.0.clone() } else { Vec::try_from(target).unwrap() };
            let alpha = denoise.schedule.alphas_cumprod[batch.timesteps.int64_value(&[row as i64]) as usize];
            let snr = alpha / (1.0 - alpha);
            let weight = snr.min(2.0) / snr;
            data[row] = weight * mean_square(&own.0, &truth);
            output[row] = weight * mean_square(&own.0, &of_base.0);
            features[row] = weight * own.1.iter().zip(&of_base.1).map(|(a, b)| mean_square(a, b)).sum::<f64>();
        }
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let asked = |values: &[f64]| match on {
            "all" => mean(&values[..3]) + 0.3 * mean(&values[3..]),
            _ => mean(&values[3..]),
        };
        let lambda = if enabled { 0.8 } else { 1.0 };
        let mut expected =
            vec![("loss/denoise", lambda * mean(&data[..3])), ("loss/prior", lambda * 0.3 * mean(&data[3..]))];
        if enabled {
            expected.push(("loss/distill", 0.5 * asked(&output)));
            expected.push(("loss/features", 0.01 * asked(&features)));
        }
        let loss = denoise.loss(&networks, &part).unwrap();
        assert_eq!(loss.parts.len(), expected.len());
        let mut sum = 0.0;
        for ((name, part), (expected_name, value)) in loss.parts.iter().zip(&expected) {
            let found = part.double_value(&[]);
            assert_eq!(name, expected_name);
            assert!((found / value - 1.0).abs() < 1e-4, "{enabled} {on} {prior_is_base} {name}: {found}, not {value}");
            assert!(*value > 1e-6, "{name}: {value}");
            sum += value;
        }
        let total = loss.total.double_value(&[]);
        assert!((total / sum - 1.0).abs() < 1e-4, "{total}, not {sum}");
        // What is said of the losses is said of these.
        let told = crate::train::losses::told(&denoise.config, &model).unwrap();
        let names: Vec<&str> = told.iter().map(|line| line.split(' ').next().unwrap()).collect();
        assert_eq!(names, expected.iter().map(|(name, _)| *name).collect::<Vec<_>>());
        assert_eq!(Loaded::of(&denoise), Loaded { teacher: enabled, base: prior_is_base });
    }
}

/// Batches of 1, of 3 and parts of batches learn from the same noised pictures, captions and timesteps.
#[test]
fn an_example_does_not_depend_on_the_batch_that_it_is_in() {
    let random = [
        "data.flip_aug=true",
        "data.caption_dropout_rate=0.4",
        "train.noise_offset=0.1",
        "train.timestep_beta=[2.0, 1.5]",
    ];
    for base in [false, true] {
        let source = format!("data.dreambooth.prior_source={}", if base { "base" } else { "pictures" });
        let folder = tempfile::tempdir().unwrap();
        let (mut denoise, networks, _, _) = begun(folder.path(), &[&random[..], &[source.as_str()]].concat());
        let whole = denoise.batch(&Part::whole(7, 3)).unwrap();
        let dropped = whole.captions.iter().filter(|caption| caption.is_empty()).count();
        assert!((1..6).contains(&dropped), "{:?}", whole.captions);
        let loss = denoise.loss(&networks, &Part::whole(7, 3)).unwrap().total.double_value(&[]);
        let mut each = Vec::new();
        for row in 0..3u64 {
            let mut see = |denoise: &mut Denoise, part: &Part| {
                let one = denoise.batch(part).unwrap();
                for (place, of_whole) in [row as usize, row as usize + 3].into_iter().enumerate() {
                    let same = |a: &Tensor, b: &Tensor| a.get(place as i64).equal(&b.get(of_whole as i64));
                    assert!(
                        same(&one.noised, &whole.noised) && same(&one.target, &whole.target),
                        "{base} {row} {place}"
                    );
                    assert!(same(&one.timesteps, &whole.timesteps), "{base} {row} {place}");
                    assert_eq!(one.captions[place], whole.captions[of_whole]);
                }
                each.push(denoise.loss(&networks, part).unwrap().total.double_value(&[]));
            };
            see(&mut denoise, &Part { batch: 7, rows: row..row + 1 });
            denoise.config.train.train_batch_size = 1;
            see(&mut denoise, &Part::whole(21 + row, 1));
            denoise.config.train.train_batch_size = 3;
        }
        let mean = each.iter().sum::<f64>() / each.len() as f64;
        assert!((mean / loss - 1.0).abs() < 1e-5, "{base}: {mean}, not {loss}");
        // Another batch has other noise.
        assert!(!denoise.batch(&Part::whole(8, 3)).unwrap().noised.equal(&whole.noised));
    }
}

/// Which frozen models a run holds.
#[derive(Debug, PartialEq)]
struct Loaded {
    teacher: bool,
    base: bool,
}

impl Loaded {
    fn of(denoise: &Denoise) -> Self {
        let class = denoise.class.as_ref().map(|class| &class.source);
        Self { teacher: denoise.teacher.is_some(), base: matches!(class, Some(ClassSource::Base { .. })) }
    }
}

#[test]
fn the_prior_is_added_as_diffusers_adds_it() {
    // train_dreambooth.py: model_pred, model_pred_prior = torch.chunk(model_pred, 2, dim=0); likewise the target;
    // loss = F.mse_loss(model_pred, target); prior_loss = F.mse_loss(model_pred_prior, target_prior);
    // loss = loss + args.prior_loss_weight * prior_loss
    let mut random = generator(3, Purpose::Noise, 0);
    let (output, target) = (normal(&mut random, &[6, 4, 5, 3]), normal(&mut random, &[6, 4, 5, 3]));
    let mse = |from: i64, count| {
        output.narrow(0, from, count).mse_loss(&target.narrow(0, from, count), tch::Reduction::Mean).double_value(&[])
    };
    let each = squares(&output - &target);
    let close = |tensor: &Tensor, expected: f64| {
        let found = tensor.double_value(&[]);
        assert!((found / expected - 1.0).abs() < 1e-5, "{found}, expected {expected}");
    };
    let Means { pictures, class } = means(&each, None, Some(0.7));
    close(&pictures, mse(0, 3));
    close(&class.unwrap(), 0.7 * mse(3, 3));
    let Means { pictures, class } = means(&each, None, None);
    close(&pictures, mse(0, 6));
    assert!(class.is_none());
    // min-SNR's weights, on each example: (loss.mean(dim=...) * mse_loss_weights).mean()
    let weights = Tensor::from_slice(&[0.5f32, 1.0, 2.0, 0.0, 3.0, 1.0]);
    let Means { pictures, class } = means(&each, Some(&weights), Some(1.0));
    close(&pictures, (0.5 * mse(0, 1) + mse(1, 1) + 2.0 * mse(2, 1)) / 3.0);
    close(&class.unwrap(), (3.0 * mse(4, 1) + mse(5, 1)) / 3.0);
}

#[test]
fn timesteps_have_the_mean_of_their_distribution_and_stay_on_the_schedule() {
    // Evenly the mean is a half; of Beta(a, b) it is a/(a + b).
    for (beta, mean) in [(None, 0.5), (Some([3.0, 1.0]), 0.75), (Some([1.0, 1.0]), 0.5), (Some([0.2, 0.6]), 0.25)] {
        let draw = |position| draw_timestep(&mut generator(1, Purpose::Timesteps, position), 1000, beta).unwrap();
        let drawn: Vec<i64> = (0..20_000).map(draw).collect();
        assert!(drawn.iter().all(|t| (0..1000).contains(t)));
        let found = drawn.iter().sum::<i64>() as f64 / 20_000.0 / 1000.0;
        assert!((found - mean).abs() < 0.01, "{beta:?}: {found}");
    }
}
