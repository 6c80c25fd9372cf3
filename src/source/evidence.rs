//! What a single-file checkpoint predicts, and whether its noise schedule ends in noise alone: shapes do not tell, and each
//! tool marks it in its own way.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use tch::Kind;

use super::inferred::{Noise, Prediction, Version};
use super::options::{ModelOptions, PredictionType};
use crate::files::TensorFile;
use crate::terminal::{note, note_once};

/// A mark, as messages name it, and what it stands for.
type Mark = (String, Prediction);

/// What `options` say, else what the file's marks say: metadata, tensors that are there for their names alone, a `.yaml`
/// beside the file. Without any it is the noise, but for Stable Diffusion 2: there, as diffusers' `from_single_file`
/// decides, the noise after the 875,000 steps of 2-base and the velocity otherwise, which is said on standard error.
///
/// # Errors
/// A mark that is not supported; two that contradict each other.
pub fn noise(file: &TensorFile, version: Version, options: &ModelOptions) -> Result<Noise> {
    yamls(file).iter().filter_map(|path| unread(path, version)).for_each(note_once);
    let zero_snr = match options.rescale_betas_zero_snr {
        Some(said) => said,
        None => file.shape("ztsnr").is_some() || says(file, "ss_zero_terminal_snr", "True"),
    };
    let prediction = match options.prediction_type {
        PredictionType::Epsilon => Prediction::Epsilon,
        PredictionType::VPrediction => Prediction::Velocity,
        PredictionType::Auto => marked(file)?.map_or_else(|| assumed(file, version), Ok)?,
    };
    Ok(Noise { prediction, zero_snr })
}

fn says(file: &TensorFile, key: &str, value: &str) -> bool {
    file.metadata().get(key).is_some_and(|text| text == value)
}

/// What the file's marks say, where it has any.
fn marked(file: &TensorFile) -> Result<Option<Prediction>> {
    let mut marks: Vec<Mark> = Vec::new();
    // modelspec, which kohya's scripts and others write; the second is ComfyUI's.
    for key in ["modelspec.prediction_type", "modelspec.predict_key"] {
        if let Some(text) = file.metadata().get(key) {
            let mark = format!("`{key}`: \"{text}\" of its metadata");
            let prediction = prediction(text)
                .with_context(|| format!("{}: {mark} is not supported (epsilon and v are)", file.path().display()))?;
            marks.push((mark, prediction));
        }
    }
    if says(file, "ss_v_parameterization", "True") {
        marks.push(("`ss_v_parameterization` of its metadata".into(), Prediction::Velocity));
    }
    marks.extend(
        ["v_pred", "ztsnr"]
            .into_iter()
            .filter(|name| file.shape(name).is_some())
            .map(|name| (format!("the tensor `{name}`"), Prediction::Velocity)),
    );
    for path in yamls(file) {
        marks.extend(of_yaml(&path)?);
    }
    let Some((first, prediction)) = marks.first() else { return Ok(None) };
    if let Some((other, _)) = marks.iter().find(|(_, other)| other != prediction) {
        let word = |prediction: &Prediction| if *prediction == Prediction::Velocity { "velocity" } else { "noise" };
        bail!(
            "{}: {first} says that the UNet predicts the {}, and {other} that it does not: say which with \
             --prediction-type or model.prediction_type",
            file.path().display(),
            word(prediction)
        );
    }
    Ok(Some(*prediction))
}

fn prediction(word: &str) -> Option<Prediction> {
    match word.trim().to_ascii_lowercase().as_str() {
        "epsilon" | "eps" | "noise" => Some(Prediction::Epsilon),
        "v" | "v_prediction" | "v-prediction" | "v_pred" | "velocity" => Some(Prediction::Velocity),
        _ => None,
    }
}

/// Where a configuration beside the file may be.
fn yamls(file: &TensorFile) -> [PathBuf; 2] {
    ["yaml", "yml"].map(|extension| file.path().with_extension(extension))
}

/// What of a configuration beside the file says otherwise than is taken of all models of its kind, and is not read.
fn unread(path: &Path, version: Version) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let scale = if version == Version::Xl { 0.13025 } else { 0.18215 };
    let taken = [("scale_factor", scale), ("linear_start", 0.00085), ("linear_end", 0.012), ("timesteps", 1000.0)];
    let others = taken.into_iter().filter_map(|(key, taken)| {
        let value = yaml_value(&text, key)?;
        let same = value.parse::<f64>().is_ok_and(|value| (value - taken).abs() <= 1e-6 * taken);
        (!same).then(|| format!("`{key}: {value}` ({taken} is taken)"))
    });
    let others: Vec<String> = others.collect();
    let shown = path.display();
    match others.is_empty() {
        false => Some(format!(
            "{shown}: {} not read; have diffusers convert the model, and give the folder",
            others.join(" and ") + if others.len() == 1 { " is" } else { " are" }
        )),
        true if of_yaml(path).is_ok_and(|mark| mark.is_none()) => Some(format!(
            "{shown} says nothing that is read: no parameterization, nor a class of latent-diffusion or sgm"
        )),
        true => None,
    }
}

/// What a configuration of latent-diffusion or sgm beside the file says, as A1111 and ComfyUI read it: `parameterization`,
/// or the class of sgm's `scaling_config`. latent-diffusion's default is the noise.
fn of_yaml(path: &Path) -> Result<Option<Mark>> {
    /// No such file is longer.
    const LONGEST: u64 = 1 << 20;
    let Ok(found) = path.metadata() else { return Ok(None) };
    if !found.is_file() || found.len() > LONGEST {
        return Ok(None);
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mark = |what: &str| format!("{what} of {}", path.display());
    if let Some(word) = yaml_value(&text, "parameterization") {
        let mark = mark(&format!("`parameterization: {word}`"));
        let prediction = prediction(&word).with_context(|| format!("{mark} is not supported (eps and v are)"))?;
        return Ok(Some((mark, prediction)));
    }
    let uses = |class: &str| text.lines().any(|line| without_comment(line).trim_end().ends_with(class));
    for (class, prediction) in [
        ("denoiser_scaling.VScaling", Prediction::Velocity),
        ("denoiser_scaling.EpsScaling", Prediction::Epsilon),
        ("ddpm.LatentDiffusion", Prediction::Epsilon),
        ("ddpm.LatentInpaintDiffusion", Prediction::Epsilon),
    ] {
        if uses(class) {
            return Ok(Some((mark(&format!("`{class}`")), prediction)));
        }
    }
    Ok(None)
}

/// The value of the first `key: value` of a YAML text, at any depth, in block style or within `{}`.
fn yaml_value(text: &str, key: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let line = without_comment(line);
        let mut rest = line;
        while let Some(at) = rest.find(key) {
            let before = rest[..at].trim_end_matches(['"', '\'']);
            let whole = before.chars().next_back().is_none_or(|c| c.is_whitespace() || "{,".contains(c));
            let after = rest[at + key.len()..].trim_start_matches(['"', '\'']).trim_start();
            if let Some(value) = after.strip_prefix(':').filter(|_| whole) {
                let value = value.split([',', '}']).next().unwrap_or_default().trim().trim_matches(['"', '\'']);
                return Some(value.to_owned());
            }
            rest = &rest[at + key.len()..];
        }
        None
    })
}

fn without_comment(line: &str) -> &str {
    let comment = line.char_indices().find(|&(at, c)| c == '#' && (at == 0 || line[..at].ends_with([' ', '\t'])));
    comment.map_or(line, |(at, _)| &line[..at])
}

/// What is assumed of a file without marks.
fn assumed(file: &TensorFile, version: Version) -> Result<Prediction> {
    if version != Version::Two {
        return Ok(Prediction::Epsilon);
    }
    let steps = match file.shape("global_step") {
        Some(shape) if shape.iter().product::<i64>() == 1 => {
            Some(file.tensor("global_step")?.f_to_kind(Kind::Int64)?.f_view([1])?.f_int64_value(&[0])?)
        }
        _ => None,
    };
    let (prediction, assumed, other, size) = match steps {
        Some(875_000) => (Prediction::Epsilon, "epsilon", "v_prediction", 512),
        _ => (Prediction::Velocity, "v_prediction", "epsilon", 768),
    };
    note(format_args!(
        "{} is a Stable Diffusion 2 and does not say what it predicts; {assumed} at {size} pixels is assumed \
         (`global_step` is {}), as diffusers does; where that is wrong: --prediction-type {other}, or model.prediction_type \
         = \"{other}\" in a config",
        file.path().display(),
        steps.map_or("not there".to_owned(), |steps| steps.to_string())
    ));
    Ok(prediction)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yaml_is_read_as_people_write_it() {
        for text in [
            "model:\n  params:\n    parameterization: \"v\"\n",
            "model:\r\n  params:\r\n    parameterization: 'v' # velocity\r\n",
            "    parameterization:   v",
            "{model: {params: {parameterization: v, timesteps: 1000}}}",
            "# parameterization: eps\n\"parameterization\": v",
        ] {
            assert_eq!(yaml_value(text, "parameterization").as_deref(), Some("v"), "{text}");
        }
        for text in ["# parameterization: v", "my_parameterization: v", "parameterization_of: v", ""] {
            assert_eq!(yaml_value(text, "parameterization"), None, "{text}");
        }
    }

    #[test]
    fn a_yaml_of_either_library_says_what_is_predicted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.yaml");
        let of = |text: &str| {
            std::fs::write(&path, text).unwrap();
            of_yaml(&path).map(|mark| mark.map(|(_, prediction)| prediction))
        };
        assert_eq!(
            of("model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n").unwrap(),
            Some(Prediction::Epsilon)
        );
        let v = "model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    parameterization: \"v\"\n";
        assert_eq!(of(v).unwrap(), Some(Prediction::Velocity));
        let sgm = "scaling_config:\n  target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling\n";
        assert_eq!(of(sgm).unwrap(), Some(Prediction::Velocity));
        assert_eq!(of("unrelated: true\n").unwrap(), None);
        let error = format!("{:#}", of("parameterization: x0\n").unwrap_err());
        assert!(error.contains("x0") && error.contains("a.yaml"), "{error}");
        assert_eq!(of_yaml(&folder.path().join("none.yaml")).unwrap(), None);
    }
}
