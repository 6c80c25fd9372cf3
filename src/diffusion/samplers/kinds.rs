//! The samplers by name: those of the command line and of configs, those that other programs use, and the classes of
//! diffusers that write `scheduler_config.json`.

use std::fmt;
use std::str::FromStr;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Which sampler. Its name in configs is that of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum SamplerKind {
    /// Song et al. 2020, with η = 0; diffusers' `DDIMScheduler`.
    Ddim,
    /// Ho et al. 2020; diffusers' `DDPMScheduler`.
    Ddpm,
    /// Liu et al. 2022; diffusers' `PNDMScheduler`.
    Pndm,
    /// Linear multistep, the Adams–Bashforth method in σ; diffusers' `LMSDiscreteScheduler`.
    Lms,
    /// Karras et al. 2022, algorithm 2 without churn; diffusers' `EulerDiscreteScheduler`.
    Euler,
    /// k-diffusion's Euler with fresh noise at each step; diffusers' `EulerAncestralDiscreteScheduler`.
    EulerAncestral,
    /// Karras et al. 2022, algorithm 1; diffusers' `HeunDiscreteScheduler`.
    Heun,
    /// k-diffusion's DPM-Solver-2; diffusers' `KDPM2DiscreteScheduler`.
    DpmTwo,
    /// DPM-Solver-2 with fresh noise at each step; diffusers' `KDPM2AncestralDiscreteScheduler`.
    DpmTwoAncestral,
    /// Lu et al. 2022b, DPM-Solver++(2M); diffusers' `DPMSolverMultistepScheduler`.
    DpmppTwoM,
    /// The same over the noise levels of Karras et al. 2022.
    DpmppTwoMKarras,
    /// Its stochastic form, `algorithm_type = "sde-dpmsolver++"`.
    DpmppTwoMSde,
    /// The same over the noise levels of Karras et al. 2022.
    DpmppTwoMSdeKarras,
    /// Lu et al. 2022b, DPM-Solver++(2S); diffusers' `DPMSolverSinglestepScheduler`.
    DpmppTwoS,
    /// k-diffusion's stochastic DPM-Solver++; diffusers' `DPMSolverSDEScheduler`.
    DpmppSde,
    /// The same over the noise levels of Karras et al. 2022.
    DpmppSdeKarras,
    /// Zhao et al. 2023; diffusers' `UniPCMultistepScheduler`.
    UniPc,
    /// Luo et al. 2023, for models that are distilled to few steps; diffusers' `LCMScheduler`.
    Lcm,
}

/// One of [`SamplerKind`], its name, what others call it, and the scheduler class that it is unless the file says more.
struct Entry {
    kind: SamplerKind,
    name: &'static str,
    also: &'static [&'static str],
    class: Option<&'static str>,
}

const fn entry(
    kind: SamplerKind,
    name: &'static str,
    also: &'static [&'static str],
    class: Option<&'static str>,
) -> Entry {
    Entry { kind, name, also, class }
}

use SamplerKind as S;

#[rustfmt::skip]
const TABLE: [Entry; 18] = [
    entry(S::Ddim, "ddim", &[], Some("DDIMScheduler")),
    entry(S::Ddpm, "ddpm", &[], Some("DDPMScheduler")),
    entry(S::Pndm, "pndm", &["plms"], Some("PNDMScheduler")),
    entry(S::Lms, "lms", &[], Some("LMSDiscreteScheduler")),
    entry(S::Euler, "euler", &[], Some("EulerDiscreteScheduler")),
    entry(S::EulerAncestral, "euler_a", &["euler_ancestral"], Some("EulerAncestralDiscreteScheduler")),
    entry(S::Heun, "heun", &[], Some("HeunDiscreteScheduler")),
    entry(S::DpmTwo, "dpm_2", &["dpm2"], Some("KDPM2DiscreteScheduler")),
    entry(S::DpmTwoAncestral, "dpm_2_a", &["dpm2_a", "dpm_2_ancestral"], Some("KDPM2AncestralDiscreteScheduler")),
    entry(S::DpmppTwoM, "dpmpp_2m", &["dpmsolverpp"], Some("DPMSolverMultistepScheduler")),
    entry(S::DpmppTwoMKarras, "dpmpp_2m_karras", &[], None),
    entry(S::DpmppTwoMSde, "dpmpp_2m_sde", &[], None),
    entry(S::DpmppTwoMSdeKarras, "dpmpp_2m_sde_karras", &[], None),
    entry(S::DpmppTwoS, "dpmpp_2s", &["dpmsingle"], Some("DPMSolverSinglestepScheduler")),
    entry(S::DpmppSde, "dpmpp_sde", &[], Some("DPMSolverSDEScheduler")),
    entry(S::DpmppSdeKarras, "dpmpp_sde_karras", &[], None),
    entry(S::UniPc, "unipc", &["uni_pc"], Some("UniPCMultistepScheduler")),
    entry(S::Lcm, "lcm", &[], Some("LCMScheduler")),
];

impl SamplerKind {
    /// All, in the order in which they are listed.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|entry| entry.kind)
    }

    /// Its name on the command line and in configs.
    pub fn name(self) -> &'static str {
        TABLE.iter().find(|entry| entry.kind == self).map_or("?", |entry| entry.name)
    }

    /// All names, as a sentence lists them.
    pub fn names() -> String {
        TABLE.iter().map(|entry| entry.name).collect::<Vec<_>>().join(", ")
    }

    /// Whether it adds noise of its own at each step, or may, by an option of the model's scheduler.
    pub fn adds_noise(self) -> bool {
        use SamplerKind::{Ddpm, DpmTwoAncestral, DpmppSde, DpmppSdeKarras, DpmppTwoMSde, DpmppTwoMSdeKarras};
        use SamplerKind::{DpmppTwoS, EulerAncestral, Lcm};
        matches!(
            self,
            Ddpm | EulerAncestral
                | DpmTwoAncestral
                | DpmppTwoMSde
                | DpmppTwoMSdeKarras
                | DpmppTwoS
                | DpmppSde
                | DpmppSdeKarras
                | Lcm
        )
    }

    /// The sampler of the class that wrote `scheduler_config.json`, if it is one of these. The forms for JAX and for
    /// several pictures at once compute the same.
    pub fn of_class(class: &str) -> Option<Self> {
        let class = class.strip_prefix("Flax").unwrap_or(class).replace("ParallelScheduler", "Scheduler");
        TABLE.iter().find(|entry| entry.class == Some(class.as_str())).map(|entry| entry.kind)
    }

    /// The configuration with the keys that make a named sampler what its name says; the other keys stay the model's.
    pub(super) fn applied_to(self, config: &Value) -> Value {
        let mut config = config.clone();
        if !config.is_object() {
            return config;
        }
        let algorithm = match self {
            Self::DpmppTwoM | Self::DpmppTwoMKarras => Some("dpmsolver++"),
            Self::DpmppTwoMSde | Self::DpmppTwoMSdeKarras => Some("sde-dpmsolver++"),
            _ => None,
        };
        if let Some(algorithm) = algorithm {
            config["algorithm_type"] = json!(algorithm);
        }
        if matches!(self, Self::DpmppTwoMKarras | Self::DpmppTwoMSdeKarras | Self::DpmppSdeKarras) {
            config["use_karras_sigmas"] = json!(true);
            for other in ["use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"] {
                config[other] = json!(false);
            }
        }
        config
    }

    /// The most exact name for a scheduler of this kind with the options of its file.
    pub(super) fn with_options(self, config: &Value) -> Self {
        let karras = config.get("use_karras_sigmas") == Some(&json!(true));
        let sde = config.get("algorithm_type") == Some(&json!("sde-dpmsolver++"));
        match (self, sde, karras) {
            (Self::DpmppTwoM, true, true) => Self::DpmppTwoMSdeKarras,
            (Self::DpmppTwoM, true, false) => Self::DpmppTwoMSde,
            (Self::DpmppTwoM, false, true) => Self::DpmppTwoMKarras,
            (Self::DpmppSde, _, true) => Self::DpmppSdeKarras,
            _ => self,
        }
    }
}

/// One spelling for `DPM++ 2M Karras`, `dpm++_2m_karras`, `k_euler_a` and `sample_dpmpp_2m`.
fn plain(name: &str) -> String {
    let name = name.trim().to_lowercase().replace([' ', '-'], "_").replace("++", "pp");
    let bare = name.strip_prefix("sample_").or_else(|| name.strip_prefix("k_"));
    bare.map(str::to_owned).unwrap_or(name)
}

impl FromStr for SamplerKind {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        if let Some(kind) = Self::of_class(name.trim()) {
            return Ok(kind);
        }
        let wanted = plain(name);
        let fits = |entry: &&Entry| entry.name == wanted || entry.also.contains(&wanted.as_str());
        match TABLE.iter().find(fits) {
            Some(entry) => Ok(entry.kind),
            None => bail!("`{name}` is not a sampler; the samplers are {}", Self::names()),
        }
    }
}

impl fmt::Display for SamplerKind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl TryFrom<String> for SamplerKind {
    type Error = anyhow::Error;

    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

impl From<SamplerKind> for String {
    fn from(kind: SamplerKind) -> Self {
        kind.name().to_owned()
    }
}

/// A sampler by name, or `auto`, the model's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SamplerChoice(pub Option<SamplerKind>);

impl SamplerChoice {
    const OWN: &'static str = "auto";
}

impl FromStr for SamplerChoice {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        if name == Self::OWN {
            return Ok(Self(None));
        }
        match name.parse() {
            Ok(kind) => Ok(Self(Some(kind))),
            Err(error) => bail!("{error}; `{}` is the model's own", Self::OWN),
        }
    }
}

impl TryFrom<String> for SamplerChoice {
    type Error = anyhow::Error;

    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

impl From<SamplerChoice> for String {
    fn from(choice: SamplerChoice) -> Self {
        choice.0.map_or(SamplerChoice::OWN, SamplerKind::name).to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_other_programs_are_known() {
        for (name, kind) in [
            ("DPM++ 2M Karras", S::DpmppTwoMKarras),
            ("dpm++_2m_sde", S::DpmppTwoMSde),
            ("dpmsolver++", S::DpmppTwoM),
            ("k_euler_a", S::EulerAncestral),
            ("Euler a", S::EulerAncestral),
            ("sample_dpmpp_sde", S::DpmppSde),
            ("k_dpm_2_a", S::DpmTwoAncestral),
            ("DPM2", S::DpmTwo),
            ("PLMS", S::Pndm),
            ("uni_pc", S::UniPc),
            ("UniPCMultistepScheduler", S::UniPc),
            ("FlaxPNDMScheduler", S::Pndm),
        ] {
            assert_eq!(name.parse::<SamplerKind>().unwrap(), kind, "{name}");
        }
        let error = "deis".parse::<SamplerChoice>().unwrap_err().to_string();
        assert!(error.contains("`deis`") && error.contains("dpmpp_2m_karras") && error.contains("`auto`"), "{error}");
    }

    #[test]
    fn every_sampler_is_listed_once_and_reads_its_own_name() {
        for kind in SamplerKind::all() {
            assert_eq!(kind.name().parse::<SamplerKind>().unwrap(), kind);
            let choice = SamplerChoice(Some(kind));
            assert_eq!(String::from(choice).parse::<SamplerChoice>().unwrap(), choice);
        }
        assert_eq!("auto".parse::<SamplerChoice>().unwrap(), SamplerChoice(None));
    }

    #[test]
    fn options_of_the_file_are_part_of_the_name() {
        let config = json!({"use_karras_sigmas": true, "algorithm_type": "sde-dpmsolver++", "use_beta_sigmas": true});
        assert_eq!(S::DpmppTwoM.with_options(&config), S::DpmppTwoMSdeKarras);
        let named = S::DpmppTwoMKarras.applied_to(&config);
        assert_eq!((&named["algorithm_type"], &named["use_beta_sigmas"]), (&json!("dpmsolver++"), &json!(false)));
    }
}
