//! Noise schedules and samplers against diffusers' own numbers, which `tests/oracle/schedulers.py` makes.

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

#[test]
fn samplers_end_where_those_of_diffusers_do() {
    let fixture = fixture("samples");
    let noise = floats(&fixture["noise"]);
    let mut failures = Vec::new();
    let mut worst: f64 = 0.0;
    let cases = fixture["cases"].as_array().expect("cases");
    for case in cases {
        let kind: SamplerKind = case["sampler"].as_str().expect("a name").parse().expect("a sampler");
        let steps = case["steps"].as_u64().expect("a number") as usize;
        let label = format!("{kind}, {steps} steps, {}", case["config"]);
        let sampler = Sampler::new(kind, &case["config"], steps).unwrap_or_else(|error| panic!("{label}: {error}"));
        let timesteps = numbers(&case["timesteps"]);
        let mut asked = Vec::new();
        let latents = sampler
            .run(&noise, &mut |x, t| {
                asked.push(t);
                Ok(network(x, t))
            })
            .unwrap_or_else(|error| panic!("{label}: {error}"));
        assert_eq!(asked, sampler.timesteps(), "{label}");
        let close = |(a, b): (&f64, &f64)| (a - b).abs() < 1e-3;
        if asked.len() != timesteps.len() || !asked.iter().zip(&timesteps).all(close) {
            failures.push(format!("{label}: timesteps {asked:?} instead of {timesteps:?}"));
        }
        let error = relative_error(&latents, &floats(&case["latents"]));
        worst = worst.max(error);
        // diffusers' Euler subtracts fp32 numbers as large as σ, which rounds; with zero terminal SNR σ is 4096.
        let bound = if kind == SamplerKind::Euler { 1e-4 } else { 1e-5 };
        if error.is_nan() || error > bound {
            failures.push(format!("{label}: relative error {error:e}"));
        }
    }
    println!("{} cases, largest relative error {worst:e}", cases.len());
    assert!(failures.is_empty(), "{} of {} cases:\n{}", failures.len(), cases.len(), failures.join("\n"));
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
    refused("euler", json(r#"{"use_beta_sigmas": true}"#), 10, "use_beta_sigmas");
    refused("euler", json(r#"{"use_karras_sigmas": true, "use_exponential_sigmas": true}"#), 10, "both true");
    refused("dpmpp_2m", json(r#"{"algorithm_type": "sde-dpmsolver++"}"#), 10, "sde-dpmsolver++");
    refused("dpmpp_2m", json(r#"{"solver_order": 4}"#), 10, "solver_order");
    refused("euler", json(r#"{"_class_name": "FlowMatchEulerDiscreteScheduler"}"#), 10, "FlowMatch");
    assert!("heun".parse::<SamplerKind>().unwrap_err().to_string().contains("dpmpp_2m"));
}
