//! Scores of pictures, gathered by prompt.

use std::collections::BTreeMap;

use image::RgbImage;

use super::{Interval, interval};

/// What is measured.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Metric {
    /// 100 times the cosine of picture and prompt: `CLIPScore` of torchmetrics 1.x, which is that of Hessel et al. 2021
    /// (arXiv:2104.08718, 3) with 100 in place of 2.5; negative ones are kept.
    Clip,
    /// 100 where the judge finds the value of this label that was asked for, else 0.
    Right(String),
    /// 100 where all labels are right.
    AllRight,
    /// Peak signal-to-noise ratio beside the other model's picture from the same noise, dB: see [`psnr`].
    Psnr,
}

impl Metric {
    /// Its key in JSON, below `right` for those of labels.
    pub fn key(&self) -> &str {
        match self {
            Metric::Clip => "clip_score",
            Metric::Right(label) => label,
            Metric::AllRight => "all",
            Metric::Psnr => "psnr_db",
        }
    }

    /// What a table calls it.
    pub fn title(&self) -> String {
        match self {
            Metric::Clip => "CLIP score".to_owned(),
            Metric::Right(label) => format!("right {label}, %"),
            Metric::AllRight => "all right, %".to_owned(),
            Metric::Psnr => "PSNR, dB".to_owned(),
        }
    }
}

/// Scores of one model's pictures: one number of each prompt, the mean over its pictures.
#[derive(Clone, Debug, Default)]
pub struct Scores(BTreeMap<Metric, Vec<f64>>);

impl Scores {
    /// Adds a prompt's pictures, at least one, each with its scores; all of one prompt have the same metrics.
    pub fn push(&mut self, pictures: &[BTreeMap<Metric, f64>]) {
        let mut sums: BTreeMap<&Metric, f64> = BTreeMap::new();
        for (metric, value) in pictures.iter().flatten() {
            *sums.entry(metric).or_default() += value;
        }
        for (metric, sum) in sums {
            self.0.entry(metric.clone()).or_default().push(sum / pictures.len() as f64);
        }
    }

    /// The metrics that there are.
    pub fn metrics(&self) -> impl Iterator<Item = &Metric> {
        self.0.keys()
    }

    /// The mean of a metric over the prompts that have it.
    pub fn mean(&self, metric: &Metric, seed: u64) -> Option<Interval> {
        interval(self.0.get(metric)?, seed)
    }

    /// How much larger it is than that of `other`, prompt by prompt.
    pub fn over(&self, other: &Self, metric: &Metric, seed: u64) -> Option<Interval> {
        let (own, other) = (self.0.get(metric)?, other.0.get(metric)?);
        let differences: Vec<f64> = own.iter().zip(other).map(|(own, other)| own - other).collect();
        interval(&differences, seed)
    }
}

/// What one picture's labels score: `shown` is what the judge found, `asked` what was asked for.
pub fn right(shown: &BTreeMap<&str, &str>, asked: &BTreeMap<String, String>) -> BTreeMap<Metric, f64> {
    let is_right = |label: &String, value: &String| shown.get(label.as_str()) == Some(&value.as_str());
    let score = |right: bool| if right { 100.0 } else { 0.0 };
    let mut scores: BTreeMap<Metric, f64> =
        asked.iter().map(|(label, value)| (Metric::Right(label.clone()), score(is_right(label, value)))).collect();
    if !asked.is_empty() {
        scores.insert(Metric::AllRight, score(asked.iter().all(|(label, value)| is_right(label, value))));
    }
    scores
}

/// The mean squared error that rounding to 8 bits leaves, in steps.
const ROUNDING: f64 = 1.0 / 12.0;

/// Peak signal-to-noise ratio of two 8-bit pictures of one size, dB. At most 58.9 dB, of which rounding to 8 bits alone is
/// the noise: equal pictures would be infinite, and so would a mean with one of them.
pub fn psnr(reference: &RgbImage, picture: &RgbImage) -> f64 {
    let differences = reference.as_raw().iter().zip(picture.as_raw()).map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2));
    let error = differences.sum::<f64>() / reference.as_raw().len().max(1) as f64;
    10.0 * (255.0 * 255.0 / error.max(ROUNDING)).log10()
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::*;

    #[test]
    fn psnr_is_that_of_the_mean_squared_error() {
        let gray = |value: u8| RgbImage::from_pixel(3, 2, Rgb([value; 3]));
        assert!((psnr(&gray(100), &gray(110)) - 20.0 * 25.5f64.log10()).abs() < 1e-9);
        assert!((psnr(&gray(0), &gray(255))).abs() < 1e-9);
        assert!((psnr(&gray(7), &gray(7)) - 58.92).abs() < 0.01);
    }

    #[test]
    fn scores_are_means_of_prompts_and_differences_are_of_the_same_prompts() {
        let asked: BTreeMap<String, String> =
            [("thing", "cat"), ("place", "at sea")].map(|(label, value)| (label.into(), value.into())).into();
        let both = right(&BTreeMap::from([("thing", "cat"), ("place", "at sea")]), &asked);
        let half = right(&BTreeMap::from([("thing", "cat"), ("place", "at night")]), &asked);
        assert_eq!(half[&Metric::Right("thing".into())], 100.0);
        assert_eq!(half[&Metric::AllRight], 0.0);
        assert!(right(&BTreeMap::new(), &BTreeMap::new()).is_empty());
        let (mut all, mut some) = (Scores::default(), Scores::default());
        for _ in 0..4 {
            all.push(&[both.clone(), both.clone()]);
            some.push(&[both.clone(), half.clone()]);
        }
        assert_eq!(some.mean(&Metric::AllRight, 0).unwrap().mean, 50.0);
        let over = some.over(&all, &Metric::AllRight, 0).unwrap();
        assert_eq!((over.mean, over.low, over.high), (-50.0, -50.0, -50.0));
        assert_eq!(some.over(&all, &Metric::Psnr, 0), None);
    }
}
