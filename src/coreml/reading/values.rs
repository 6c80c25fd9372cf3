//! Whether what a package computes with are numbers: no value that is stored is NaN or infinite, weights and palettes
//! alike. Only a mask may be −∞, which softmax makes a zero.

use std::collections::{HashMap, HashSet};

use anyhow::{Context, Result, ensure};

use super::constant::{Constant, NotFinite};
use super::package::Package;
use super::program::{Argument, Operation};

/// Operations that put a mask on scores.
const MASKING: [&str; 2] = ["add", "select"];

impl Package {
    /// Looks at every float that the package stores, once and a part at a time.
    ///
    /// # Errors
    /// The first constant with values that are not finite, and how many; when a file cannot be read.
    pub fn check_values(&self) -> Result<()> {
        self.all_finite().with_context(|| format!("{} is not a sound Core ML package", self.path().display()))
    }

    fn all_finite(&self) -> Result<()> {
        // What is used by something else than to mask.
        let mut weights: HashSet<&str> = HashSet::new();
        for operation in self.program.operations.iter().filter(|operation| !masks(operation)) {
            weights.extend(operation.inputs.values().flatten().filter_map(|argument| match argument {
                Argument::Name(name) => Some(name.as_str()),
                Argument::Value(_) => None,
            }));
        }
        // However many constants share a blob, it is read once.
        let mut known: HashMap<(&str, u64), NotFinite> = HashMap::new();
        for operation in &self.program.operations {
            let mask = match operation.is_const() {
                true => operation.outputs.iter().all(|output| !weights.contains(output.name.as_str())),
                false => masks(operation),
            };
            for (name, constant) in stored(operation).filter(|(_, constant)| constant.kind.data_type.is_float()) {
                let place = || format!("{}: {name}", operation.place());
                let found = match constant.blob().and_then(|place| known.get(&place)) {
                    Some(found) => *found,
                    None => constant.not_finite(&self.blobs).with_context(place)?,
                };
                known.extend(constant.blob().map(|place| (place, found)));
                let wrong = found.nan + found.above + if mask { 0 } else { found.below };
                let of = constant.kind.elements();
                ensure!(wrong == 0, "{}: {wrong} of {of} values are NaN or infinite", place());
            }
        }
        Ok(())
    }
}

/// Whether constants that an operation takes may be masks.
fn masks(operation: &Operation) -> bool {
    MASKING.contains(&operation.kind.as_str())
}

/// The constants that an operation holds itself, with the names of its attributes and inputs.
fn stored(operation: &Operation) -> impl Iterator<Item = (&str, &Constant)> {
    let attributes = operation.attributes.iter().map(|(name, constant)| (name.as_str(), constant));
    let in_place = operation.inputs.iter().flat_map(|(name, bound)| {
        bound.iter().filter_map(move |argument| match argument {
            Argument::Value(constant) => Some((name.as_str(), constant)),
            Argument::Name(_) => None,
        })
    });
    attributes.chain(in_place)
}
