//! A prompt of `sample.prompts` with the flags that kohya's sd-scripts reads in its lines of sample prompts:
//! `a cat --n blurry --w 512 --h 768 --d 1 --l 7.5 --s 28 --ss euler`.

use std::fmt;

use crate::diffusion::{Noise, SamplerKind};
use crate::pipeline::Request;

/// What to draw. What the prompt does not say is `None`: then the keys of `[sample]` hold, and `data.resolution`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplePrompt {
    /// The words before the first flag.
    pub prompt: String,
    /// `--n`: the words up to the next flag.
    pub negative_prompt: Option<String>,
    /// `--w`, px.
    pub width: Option<i64>,
    /// `--h`, px.
    pub height: Option<i64>,
    /// `--d`
    pub seed: Option<u64>,
    /// `--l`
    pub guidance_scale: Option<f64>,
    /// `--s`
    pub steps: Option<usize>,
    /// `--ss`
    pub sampler: Option<SamplerKind>,
}

/// A flag and what stands in its place here, of those that sd-scripts has besides.
const OTHERS: [(&str, &str); 3] = [
    ("g", "the guidance of FLUX models"),
    ("cn", "a picture for a ControlNet"),
    ("am", "a multiplier of additional networks"),
];

impl SamplePrompt {
    /// Reads one line. A flag is two dashes and letters, after a space; all other dashes are words.
    ///
    /// # Errors
    /// What is wrong with which flag.
    pub fn parse(line: &str) -> Result<Self, String> {
        let mut read = Self::default();
        let (words, flags) = split(line);
        read.prompt = words.to_owned();
        let mut given: Vec<String> = Vec::new();
        for (flag, value) in flags {
            let name = flag.to_lowercase();
            if given.contains(&name) {
                return Err(format!("`--{flag}` is given twice"));
            }
            read.set(&name, value).map_err(|message| format!("`--{flag}` {message}"))?;
            given.push(name);
        }
        Ok(read)
    }

    /// What to draw: what the prompt says, and what it leaves out as `defaults` have it.
    pub fn request(self, defaults: Request) -> Request {
        let size = match (self.height, self.width, defaults.size) {
            (None, None, size) => size,
            (height, width, size) => {
                let (own_height, own_width) = size.unwrap_or_default();
                Some((height.unwrap_or(own_height), width.unwrap_or(own_width)))
            }
        };
        Request {
            prompt: self.prompt,
            negative_prompt: self.negative_prompt.unwrap_or(defaults.negative_prompt),
            steps: self.steps.unwrap_or(defaults.steps),
            guidance_scale: self.guidance_scale.unwrap_or(defaults.guidance_scale),
            sampler: self.sampler.or(defaults.sampler),
            noise: self.seed.map_or(defaults.noise, Noise::Seed),
            size,
            ..defaults
        }
    }

    fn set(&mut self, flag: &str, value: &str) -> Result<(), String> {
        let number = |what: &str| format!("takes {what}, and has {}", if value.is_empty() { "nothing" } else { value });
        let side = || -> Result<Option<i64>, String> {
            let side = value.parse().ok().filter(|side| (8..=8192).contains(side) && side % 8 == 0);
            side.map(Some).ok_or_else(|| number("a multiple of 8 in pixels, up to 8192"))
        };
        match flag {
            "n" if value.is_empty() => return Err(number("words")),
            "n" => self.negative_prompt = Some(value.to_owned()),
            "w" => self.width = side()?,
            "h" => self.height = side()?,
            "d" => self.seed = Some(value.parse().map_err(|_| number("a seed, a whole number of at least 0"))?),
            "s" => {
                let steps = value.parse().ok().filter(|steps| (1..=1000).contains(steps));
                self.steps = Some(steps.ok_or_else(|| number("a number of steps from 1 to 1000"))?);
            }
            "l" => {
                let scale = value.parse().ok().filter(|scale: &f64| scale.is_finite() && *scale >= 0.0);
                self.guidance_scale = Some(scale.ok_or_else(|| number("a guidance scale, a number of at least 0"))?);
            }
            "ss" => self.sampler = Some(sampler(value)?),
            _ => {
                const KNOWN: &str = "there are --n, --w, --h, --d, --l, --s and --ss";
                return Err(match OTHERS.iter().find(|(other, _)| *other == flag) {
                    Some((_, what)) => format!("(in kohya's sd-scripts {what}) is not in this version; {KNOWN}"),
                    None => format!("is not a flag of a prompt; {KNOWN}"),
                });
            }
        }
        Ok(())
    }
}

/// A sampler by its name here or in sd-scripts.
fn sampler(name: &str) -> Result<SamplerKind, String> {
    name.parse().map_err(|_| {
        format!("names the sampler `{name}`, which is not in this version; there are {}", SamplerKind::names())
    })
}

/// The words before the first flag, and each flag with the text up to the next.
fn split(line: &str) -> (&str, Vec<(&str, &str)>) {
    let starts_flag = |at: usize| {
        let alone = at == 0 || line[..at].ends_with(char::is_whitespace);
        alone && line[at + 2..].starts_with(|c: char| c.is_ascii_alphabetic())
    };
    let starts: Vec<usize> = line.match_indices("--").map(|(at, _)| at).filter(|&at| starts_flag(at)).collect();
    let ends = starts.iter().skip(1).copied().chain([line.len()]);
    let flag = |(start, end): (usize, usize)| {
        let text = &line[start + 2..end];
        let (name, value) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        (name, value.trim())
    };
    let words = line[..starts.first().copied().unwrap_or(line.len())].trim_end();
    (words, starts.iter().copied().zip(ends).map(flag).collect())
}

impl fmt::Display for SamplePrompt {
    /// As in `"a cat", without "blurry", 512×768 px, seed 1, guidance 7.5, 28 steps, euler`.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "\"{}\"", self.prompt)?;
        if let Some(negative) = &self.negative_prompt {
            write!(f, ", without \"{negative}\"")?;
        }
        match (self.width, self.height) {
            (Some(width), Some(height)) => write!(f, ", {width}×{height} px")?,
            (Some(width), None) => write!(f, ", {width} px wide")?,
            (None, Some(height)) => write!(f, ", {height} px high")?,
            (None, None) => {}
        }
        if let Some(seed) = self.seed {
            write!(f, ", seed {seed}")?;
        }
        if let Some(scale) = self.guidance_scale {
            write!(f, ", guidance {scale}")?;
        }
        if let Some(steps) = self.steps {
            write!(f, ", {steps} steps")?;
        }
        if let Some(sampler) = self.sampler {
            write!(f, ", {sampler}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_read_as_sd_scripts_reads_them() {
        let line =
            "a red-haired girl -- smiling, 1-2 --N blurry, low-res --w 512 --h 768 --d 7 --l 5.5 --s 28 --ss k_euler";
        let read = SamplePrompt::parse(line).unwrap();
        let expected = SamplePrompt {
            prompt: "a red-haired girl -- smiling, 1-2".into(),
            negative_prompt: Some("blurry, low-res".into()),
            width: Some(512),
            height: Some(768),
            seed: Some(7),
            guidance_scale: Some(5.5),
            steps: Some(28),
            sampler: Some(SamplerKind::Euler),
        };
        assert_eq!(read, expected);
        assert_eq!(
            read.to_string(),
            "\"a red-haired girl -- smiling, 1-2\", without \"blurry, low-res\", 512×768 px, seed 7, guidance 5.5, 28 \
             steps, euler"
        );
    }

    #[test]
    fn dashes_in_words_are_words() {
        for line in
            ["a well--known dog", "a dog --", "a dog --- asleep", "a dog -n x", "x-ray --5", "", "  two  spaces"]
        {
            assert_eq!(SamplePrompt::parse(line).unwrap(), SamplePrompt { prompt: line.into(), ..Default::default() });
        }
    }

    #[test]
    fn what_is_wrong_with_a_flag_is_told() {
        for (line, expected) in [
            ("a cat --x 3", "`--x` is not a flag of a prompt; there are --n, --w"),
            ("a cat --steps 3", "`--steps` is not a flag"),
            ("a cat --g 3", "`--g` (in kohya's sd-scripts the guidance of FLUX models) is not in this version"),
            ("a cat --w", "`--w` takes a multiple of 8 in pixels, up to 8192, and has nothing"),
            ("a cat --w 500", "and has 500"),
            ("a cat --h 512 on a mat", "and has 512 on a mat"),
            ("a cat --d -1", "`--d` takes a seed"),
            ("a cat --s 0", "`--s` takes a number of steps from 1 to 1000"),
            ("a cat --l nan", "`--l` takes a guidance scale"),
            ("a cat --n --w 512", "`--n` takes words"),
            ("a cat --w 512 --w 512", "`--w` is given twice"),
            ("a cat --ss er_sde", "`--ss` names the sampler `er_sde`, which is not in this version; there are ddim, "),
        ] {
            let error = SamplePrompt::parse(line).unwrap_err();
            assert!(error.contains(expected), "{line}: {error}");
        }
        assert_eq!(SamplePrompt::parse("a --ss dpmsolver++").unwrap().sampler, Some(SamplerKind::DpmppTwoM));
    }
}
