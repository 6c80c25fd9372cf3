//! Noise schedules and samplers against diffusers' own numbers, which `tests/oracle/schedulers.py` makes.

use std::collections::BTreeMap;

use palettist::diffusion::{NoiseSchedule, Sampler, SamplerKind};
use serde_json::Value;
use tch::{Kind, Tensor};

fn fixture(name: &str) -> Value {
    let path = format!("{}/tests/fixtures/schedulers/{name}.json", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(|number| number.as_f64().expect("a number")).collect()
}

fn floats(value: &Value) -> Tensor {
    Tensor::from_slice(&numbers(value)).to_kind(Kind::Float)
}

/// |a − b| / |b|, in the Euclidean norm.
fn relative_error(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    ((a - &b).norm() / b.norm()).double_value(&[])
}

#[test]
fn schedules_noise_and_targets_are_those_of_diffusers() {
    for case in fixture("tables").as_array().expect("cases") {
        let name = &case["name"];
        let schedule = NoiseSchedule::from_config(&case["config"]).expect("a supported schedule");
        let timesteps = Tensor::from_slice(&numbers(&case["timesteps"])).to_kind(Kind::Int64);
        let table = Tensor::from_slice(&schedule.alphas_cumprod).index_select(0, &timesteps);
        let (x0, noise) = (floats(&case["x0"]).view([6, 2]), floats(&case["noise"]).view([6, 2]));
        for (what, got) in [
            ("alphas_cumprod", table),
            ("noised", schedule.add_noise(&x0, &noise, &timesteps)),
            ("target", schedule.target(&x0, &noise, &timesteps)),
        ] {
            let error = relative_error(&got.flatten(0, -1), &floats(&case[what]));
            assert!(error < 1e-6, "{name} {what}: relative error {error:e}");
        }
    }
}

/// The network of the oracle.
fn network(x: &Tensor, t: f64) -> Tensor {
    let t = t / 1000.0;
    x * 0.3 + (x * 2.0 + 5.0 * t).sin() * 0.1 - 0.2 * t
}

/// The fresh noise of the oracle.
fn fresh(draw: usize) -> Tensor {
    let values: Vec<f64> = (0..6).map(|j| 1.3 * (17.0 * draw as f64 + 3.0 * f64::from(j) + 1.0).sin()).collect();
    Tensor::from_slice(&values).to_kind(Kind::Float)
}

/// The case's configuration: what it adds to one of the bases.
fn config(fixture: &Value, case: &Value) -> Value {
    let mut config = fixture["bases"][case["base"].as_str().expect("a name")].clone();
    for (key, value) in case["added"].as_object().expect("keys") {
        config[key] = value.clone();
    }
    config
}

#[test]
fn samplers_end_where_those_of_diffusers_do() {
    let fixture = fixture("samples");
    let noise = floats(&fixture["noise"]);
    let mut failures = Vec::new();
    let mut worst = BTreeMap::<String, f64>::new();
    let cases = fixture["cases"].as_array().expect("cases");
    for case in cases {
        let kind: SamplerKind = case["sampler"].as_str().expect("a name").parse().expect("a sampler");
        let steps = case["steps"].as_u64().expect("a number") as usize;
        let label = format!("{kind}, {steps} steps, {} + {}", case["base"], case["added"]);
        let config = config(&fixture, case);
        let sampler = Sampler::new(kind, &config, steps).unwrap_or_else(|error| panic!("{label}: {error}"));
        let timesteps = numbers(&case["timesteps"]);
        let (mut asked, mut drawn) = (Vec::new(), Vec::new());
        let mut model = |x: &Tensor, t: f64| {
            asked.push(t);
            Ok(network(x, t))
        };
        let mut draws = |draw: usize| {
            drawn.push(draw);
            Ok(fresh(draw))
        };
        let latents = sampler.run(&noise, &mut model, &mut draws).unwrap_or_else(|error| panic!("{label}: {error}"));
        assert_eq!(asked, sampler.timesteps(), "{label}");
        assert!(drawn.windows(2).all(|pair| pair[0] < pair[1]), "{label}: noise {drawn:?}");
        // The middle of a step of `dpm_2_a` is the next level, of which diffusers' rounding leaves a little.
        let off = if kind == SamplerKind::DpmTwoAncestral { 0.02 } else { 1e-3 };
        let close = |(a, b): (&f64, &f64)| (a - b).abs() < off;
        if asked.len() != timesteps.len() || !asked.iter().zip(&timesteps).all(close) {
            failures.push(format!("{label}: timesteps {asked:?} instead of {timesteps:?}"));
        }
        let error = relative_error(&latents, &floats(&case["latents"]));
        let largest = worst.entry(kind.to_string()).or_default();
        *largest = largest.max(error);
        if error.is_nan() || error > bound(kind, &case["base"]) {
            failures.push(format!("{label}: relative error {error:e}"));
        }
    }
    println!("{} cases, largest relative errors {worst:?}", cases.len());
    assert!(failures.is_empty(), "{} of {} cases:\n{}", failures.len(), cases.len(), failures.join("\n"));
}

/// How far a sampler may be off by rounding: diffusers' and ours are fp32. diffusers subtracts numbers as large as σ,
/// which is 4096 with zero terminal SNR and 20000 with the cosine schedule, and squares of levels in `dpm_2_a`.
fn bound(kind: SamplerKind, base: &Value) -> f64 {
    match kind {
        SamplerKind::Heun | SamplerKind::DpmTwo if base == "cosine" => 5e-3,
        SamplerKind::Lms | SamplerKind::Heun | SamplerKind::DpmppSde if base == "cosine" => 1e-4,
        SamplerKind::Euler | SamplerKind::EulerAncestral | SamplerKind::DpmTwoAncestral => 1e-4,
        _ => 1e-5,
    }
}

#[test]
fn samplers_refuse_what_they_cannot_do() {
    let refused = |kind: &str, config: Value, steps: usize, part: &str| {
        let kind: SamplerKind = kind.parse().expect("a sampler");
        let error = Sampler::new(kind, &config, steps).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains(part), "`{error}` should speak of {part}");
    };
    let json = |text: &str| serde_json::from_str(text).expect("JSON");
    refused("ddim", json("{}"), 0, "0 steps");
    refused("ddim", json("{}"), 1001, "1001 steps");
    refused("ddim", json(r#"{"steps_offset": 1}"#), 1000, "timestep 1000");
    refused("ddim", json(r#"{"thresholding": true}"#), 10, "thresholding");
    refused("pndm", json("{}"), 3, "at least 4");
    refused("dpmpp_2m", json(r#"{"use_flow_sigmas": true}"#), 10, "use_flow_sigmas");
    refused("euler", json(r#"{"use_karras_sigmas": true, "use_exponential_sigmas": true}"#), 10, "both true");
    refused("dpmpp_2m", json(r#"{"algorithm_type": "other"}"#), 10, "other");
    refused("dpmpp_2m", json(r#"{"algorithm_type": "dpmsolver"}"#), 10, "final_sigmas_type");
    refused("unipc", json(r#"{"predict_x0": false}"#), 10, "predict_x0");
    refused("unipc", json(r#"{"solver_p": {}}"#), 10, "solver_p");
    refused("lcm", json("{}"), 51, "original_inference_steps");
    refused("lcm", json(r#"{"original_inference_steps": 2000}"#), 5, "2000");
    refused("ddpm", json(r#"{"variance_type": "learned"}"#), 10, "variance_type");
    refused("heun", json(r#"{"use_karras_sigmas": true, "use_beta_sigmas": true}"#), 10, "both true");
    refused("dpmpp_2m", json(r#"{"solver_order": 4}"#), 10, "solver_order");
    refused("euler", json(r#"{"_class_name": "FlowMatchEulerDiscreteScheduler"}"#), 10, "FlowMatch");
    assert!("deis".parse::<SamplerKind>().unwrap_err().to_string().contains("dpmpp_2m"));
}

#[test]
fn names_set_the_options_that_they_name() {
    let noise = Tensor::from_slice(&[-1.0f32, 0.3, 0.8, 2.0, -0.4, 1.1]);
    let config: Value =
        serde_json::from_str(r#"{"beta_schedule": "scaled_linear", "use_beta_sigmas": true}"#).expect("JSON");
    let run = |sampler: Sampler| {
        sampler.run(&noise, &mut |x, t| Ok(network(x, t)), &mut |draw| Ok(fresh(draw))).expect("latents")
    };
    let with = |keys: &[(&str, Value)]| {
        let mut config = config.clone();
        config["use_beta_sigmas"] = Value::Bool(false);
        keys.iter().for_each(|(key, value)| config[*key] = value.clone());
        run(Sampler::new(SamplerKind::DpmppTwoM, &config, 8).expect("a sampler"))
    };
    let (karras, sde) = (("use_karras_sigmas", Value::Bool(true)), ("algorithm_type", Value::from("sde-dpmsolver++")));
    for (kind, wanted) in [
        (SamplerKind::DpmppTwoMKarras, with(std::slice::from_ref(&karras))),
        (SamplerKind::DpmppTwoMSdeKarras, with(&[karras, sde.clone()])),
    ] {
        let got = run(Sampler::named(kind, &config, 8).expect("a sampler"));
        assert!(got.equal(&wanted), "{kind}");
    }
    // The model's own levels stay where the name says nothing of them.
    let own = run(Sampler::named(SamplerKind::DpmppTwoMSde, &config, 8).expect("a sampler"));
    assert!(!own.equal(&with(&[sde])));
}
