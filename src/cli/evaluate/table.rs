//! Scores of final pictures, as a table and as JSON.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::judge::{Interval, Metric, Scores};

/// The scores of one model, or of two, the float one first.
pub struct Table<'s> {
    /// Names and scores.
    pub sides: Vec<(&'static str, &'s Scores)>,
    /// How many were drawn, and how many pictures of each.
    pub prompts: usize,
    pub images: usize,
    /// Each label, and among how many values the judge chose.
    pub choices: Vec<(&'s str, usize)>,
    /// Seed of the intervals' resamples.
    pub seed: u64,
}

/// A name, and what it has of a metric.
type Column<'t> = (&'static str, Box<dyn Fn(&Metric) -> Option<Interval> + 't>);

impl Table<'_> {
    fn columns(&self) -> Vec<Column<'_>> {
        let seed = self.seed;
        let mut columns: Vec<Column> = Vec::new();
        for &(name, scores) in &self.sides {
            columns.push((name, Box::new(move |metric: &Metric| scores.mean(metric, seed))));
        }
        if let [(_, float), (_, model)] = self.sides[..] {
            columns.push(("difference", Box::new(move |metric: &Metric| model.over(float, metric, seed))));
        }
        columns
    }

    /// What there is of the last model, which has all that float has.
    fn metrics(&self) -> Vec<&Metric> {
        let all: Vec<&Metric> = self.sides.last().map(|(_, scores)| scores.metrics().collect()).unwrap_or_default();
        // With one label, all are right where it is.
        let labels = all.iter().filter(|metric| matches!(metric, Metric::Right(_))).count();
        all.into_iter().filter(|metric| labels != 1 || **metric != Metric::AllRight).collect()
    }

    /// For people.
    pub fn text(&self) -> String {
        let prompts = if self.prompts == 1 { "prompt" } else { "prompts" };
        let each = match self.images {
            1 => "one picture".to_owned(),
            images => format!("{images} pictures"),
        };
        let same = if self.sides.len() > 1 { ", the same noise for both models" } else { "" };
        let mut text = format!(
            "{} {prompts}, {each} of each{same}; means, and in brackets their 95 % intervals over prompts",
            self.prompts
        );
        let columns = self.columns();
        let mut line = |title: &str, cells: &dyn Fn(&Column) -> String| {
            let cells: String = columns.iter().map(|column| format!("  {:<24}", cells(column))).collect();
            // Writing to a text does not fail.
            let _ = write!(text, "\n  {title:<20}{}", cells.trim_end());
        };
        line("", &|(name, _)| (*name).to_owned());
        for metric in self.metrics() {
            line(&metric.title(), &|(_, of)| of(metric).map_or_else(String::new, |found| cell(metric, found)));
        }
        let choices: Vec<String> = self.choices.iter().map(|(label, values)| format!("{label} of {values}")).collect();
        if !choices.is_empty() {
            let _ = write!(text, "\nthe judge chooses each {}", choices.join(", "));
        }
        text
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let mut object = json!({ "prompts": self.prompts, "pictures_of_each": self.images });
        for (name, of) in self.columns() {
            let mut scores = json!({});
            for metric in self.metrics() {
                let Some(found) = of(metric) else { continue };
                match metric {
                    Metric::Right(_) | Metric::AllRight => scores["right"][metric.key()] = json!(found),
                    Metric::Clip | Metric::Psnr => scores[metric.key()] = json!(found),
                }
            }
            object[name] = scores;
        }
        object
    }
}

/// `93.8 (85.4 … 100.0)`
fn cell(metric: &Metric, Interval { mean, low, high }: Interval) -> String {
    let digits = if matches!(metric, Metric::Clip | Metric::Psnr) { 2 } else { 1 };
    format!("{mean:.digits$} ({low:.digits$} … {high:.digits$})")
}
