//! `output_dir/`: who owns it, and what is written there when a run ends.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use tch::Kind;

use super::objective::Objective;
use super::reporter::Reporter;
use super::trained::{Networks, Trained};
use super::{Resume, state};
use crate::config::{Config, DeploymentTarget, TrainedComponent};
use crate::coreml::export::{PackageMetadata, UnetOptions, export_unet};
use crate::coreml::program::Target;
use crate::coreml::prompt::prompt_tokens;
use crate::coreml::velocity::Velocity;
use crate::diffusion::text_to_image;
use crate::ops::Weights;
use crate::palette::PalettizedCheckpoint;
use crate::palette::checkpoint::{RECIPE, SOURCE_MODEL};
use crate::report::{Progress, write_report};
use crate::source::{Component, Model, copy_model, files, write_component};

/// The file in the folder that a run holds locked while it writes there.
const LOCK: &str = "train.lock";

/// The folder of a run.
pub struct OutputDir {
    pub folder: PathBuf,
    resumed: Option<PathBuf>,
    /// The system unlocks it however the run ends.
    _lock: File,
}

/// Whether `folder` holds anything but the lock of a run that wrote nothing.
pub fn is_occupied(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|entries| entries.flatten().any(|entry| entry.file_name() != LOCK))
}

/// Keeps other runs out of `folder`, which is made where needed.
///
/// # Errors
/// Another run holds it; it can't be written.
fn lock(folder: &Path) -> Result<File> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create the output folder {}", folder.display()))?;
    let path = folder.join(LOCK);
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let mut file = file.with_context(|| format!("cannot write {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => {
            // Who it is, for the other's message; without it that is only less clear.
            let _ = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
        }
        Err(TryLockError::WouldBlock) => {
            let process = fs::read_to_string(&path).unwrap_or_default();
            bail!(
                "another run (process {process}) is writing to the output folder {}; wait for its end, or set another \
                 `output_dir`",
                folder.display()
            );
        }
        // Some network file systems have no locks: that is no reason not to train.
        Err(TryLockError::Error(_)) => {}
    }
    Ok(file)
}

impl OutputDir {
    /// Creates the folder, or takes up the run that is in it.
    ///
    /// # Errors
    /// It holds something else, a run that must not be resumed, or one that is still going on.
    pub fn claim(config: &Config, resume: &Resume) -> Result<Self> {
        let folder = config.output_dir.clone();
        let resolved = folder.join("config.resolved.toml");
        let shown = folder.display();
        if folder.exists() && !folder.is_dir() {
            bail!("the output folder {shown} is a file; set another `output_dir`");
        }
        if is_occupied(&folder) && !resolved.is_file() {
            bail!("the output folder {shown} exists and is not a run of this program; set another `output_dir`");
        }
        let lock = lock(&folder)?;
        let occupied = is_occupied(&folder);
        let resumed = match resume {
            Resume::From(path) => Some(path.clone()),
            Resume::Never if occupied => {
                bail!("the output folder {shown} holds a run already; set another `output_dir`, or resume it")
            }
            Resume::Never => None,
            Resume::Auto => state::list(&folder.join("checkpoints")).pop().map(|(_, path)| path),
        };
        if let Some(checkpoint) = &resumed {
            state::check_same_run(&state::facts(checkpoint)?.config, config)
                .with_context(|| format!("the output folder {shown}"))?;
        } else if occupied {
            // Ended before its first checkpoint: nothing is lost by beginning again, if it was this run.
            let before =
                fs::read_to_string(&resolved).with_context(|| format!("cannot read {}", resolved.display()))?;
            let before = crate::config::parse_resolved(&before, "config.resolved.toml")?;
            if before.name != config.name {
                bail!("the output folder {shown} is that of the run `{}`; set another `output_dir`", before.name);
            }
        }
        files::write_bytes(&resolved, config.resolved_toml().as_bytes())?;
        Ok(Self { folder, resumed, _lock: lock })
    }

    /// The checkpoint to resume from.
    pub fn resumed(&self) -> Option<&Path> {
        self.resumed.as_deref()
    }

    pub fn checkpoints(&self) -> PathBuf {
        self.folder.join("checkpoints")
    }
}

/// Writes what the run was for: the autoencoder; or the palettized checkpoint, the model and its package.
///
/// # Errors
/// The disk is full.
pub fn finish(
    config: &Config,
    output: &OutputDir,
    model: &Model,
    objective: &mut dyn Objective,
    trained: &Trained,
    reporter: &Reporter,
) -> Result<()> {
    let networks = trained.shipped()?;
    if config.train.component == TrainedComponent::Autoencoder {
        return autoencoder(output, model, objective, &networks, reporter);
    }
    let mut checkpoint = None;
    if config.palettize.enabled {
        let palettes = trained.palettes()?;
        let dense: BTreeMap<String, tch::Tensor> = networks[&Component::Unet]
            .iter()
            .filter(|(name, _)| !palettes.contains_key(*name))
            .map(|(name, tensor)| (name.clone(), tensor.to_kind(Kind::Half).to_device(tch::Device::Cpu)))
            .collect();
        let metadata = BTreeMap::from([
            (SOURCE_MODEL.to_owned(), config.model.pretrained_model_name_or_path.clone()),
            (RECIPE.to_owned(), config.resolved_toml()),
        ]);
        let made = PalettizedCheckpoint { palettes, dense, metadata };
        let path = output.folder.join(format!("{}.palettes.safetensors", config.name));
        made.write(&path)?;
        reporter.wrote("the palettized checkpoint", &path);
        checkpoint = Some(made);
    }

    let folder = output.folder.join("model");
    if folder.exists() {
        // This run's own, from an end that was cut off or has been repeated.
        fs::remove_dir_all(&folder).with_context(|| format!("cannot replace {}", folder.display()))?;
    }
    let replaced: Vec<(Component, &Weights)> =
        networks.iter().map(|(component, weights)| (*component, weights)).collect();
    copy_model(model, &folder, &replaced, Kind::Half)?;
    reporter.wrote("the model, a diffusers folder", &folder);

    if config.export.coreml {
        let unet = model.unet_config()?;
        let options = UnetOptions {
            height: config.export.latent_h,
            width: config.export.latent_w,
            tokens: prompt_tokens(model)?,
            target: target(config.export.min_deployment_target),
            velocity: Velocity::of(&text_to_image::schedule(model)?),
            overwrite: true,
            ..UnetOptions::new(&unet)
        };
        let metadata = PackageMetadata::of_folder(&config.name, model.path());
        let coreml = output.folder.join("coreml");
        let mut bar = Progress::new("exporting", 0, unet.parameters().len() as u64).counting("tensor");
        let mut told = |done: usize, _: usize| bar.update(done as u64, &[]);
        let path = match &checkpoint {
            Some(checkpoint) => export_unet(&unet, checkpoint, &options, &metadata, &coreml, &mut told)?,
            None => export_unet(&unet, &networks[&Component::Unet], &options, &metadata, &coreml, &mut told)?,
        };
        bar.finish();
        reporter.wrote("the Core ML package", &path);
    }
    let mut facts = vec![("model", config.model.pretrained_model_name_or_path.clone())];
    if let Some(checkpoint) = &checkpoint {
        facts.push(("palettized weights", checkpoint.palettes.len().to_string()));
        let (bits, weights) = checkpoint.palettes.values().fold((0, 0), |(bits, weights), palette| {
            (bits + palette.stored_bits(), weights + palette.shape.iter().product::<i64>())
        });
        facts.push((
            "bits a palettized weight, palettes counted",
            format!("{:.3}", bits as f64 / weights.max(1) as f64),
        ));
        facts.push(("palettes' mean relative squared error", format!("{:.5}", trained.palette_error())));
    }
    write_report(&output.folder, &config.name, &facts)?;
    reporter.wrote("the report", &output.folder.join("report.html"));
    Ok(())
}

fn autoencoder(
    output: &OutputDir,
    model: &Model,
    objective: &mut dyn Objective,
    networks: &Networks,
    reporter: &Reporter,
) -> Result<()> {
    let mut json = model.config_json(Component::Autoencoder)?;
    if let Some(deviation) = objective.latent_deviation(networks)? {
        // So that the UNet meets latents of about unit variance (Rombach et al. 2022, appendix G).
        json["scaling_factor"] = serde_json::json!((1e5 / deviation).round() / 1e5);
    }
    let folder = output.folder.join("model").join(Component::Autoencoder.folder());
    write_component(&folder, Component::Autoencoder, &json, &networks[&Component::Autoencoder], Kind::Half)?;
    reporter.wrote("the autoencoder", &folder);
    Ok(())
}

/// The config's word for a deployment target, as the package writer's.
pub fn target(target: DeploymentTarget) -> Target {
    match target {
        DeploymentTarget::Ios16 => Target::Ios16,
        DeploymentTarget::Ios17 => Target::Ios17,
        DeploymentTarget::Ios18 => Target::Ios18,
    }
}
