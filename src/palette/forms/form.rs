//! How a weight is palettized: everything about its palette but the numbers.
//!
//! C is the number of channels along `axis`: 0 counts output channels, 1 input channels. They are cut into groups, each
//! with a table of 2^bits entries; an entry holds `cluster_dim` weights that are neighbours along that axis; a scale may
//! multiply what is looked up. Terms and limits are those of coremltools 9 (`palettize_weights`,
//! `PostTrainingPalettizer`).

use serde::{Deserialize, Serialize};

/// How many bits an index may have. All but 3 fit the form of iOS 16.
pub const BITS: [u32; 6] = [1, 2, 3, 4, 6, 8];

/// How many weights an entry may hold.
pub const CLUSTER_DIMS: [usize; 3] = [1, 2, 4];

/// What an entry is stored as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LutDtype {
    #[default]
    F16,
    /// An integer of 8 bits, to be multiplied by its table's scale.
    I8,
}

/// How a weight is palettized. [`Form::per_tensor`] is the plain one: a table of fp16 numbers for the whole weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Form {
    /// Of an index; one of [`BITS`].
    pub bits: u32,
    /// How many channels share a table; `None`: all of them.
    pub group_size: Option<usize>,
    /// 0 or 1: which channels are grouped, and along which the weights of an entry lie.
    pub axis: usize,
    /// How many weights an entry holds; one of [`CLUSTER_DIMS`].
    pub cluster_dim: usize,
    /// Multiplies what is looked up by a number of the output channel's own.
    pub per_channel_scale: bool,
    pub lut_dtype: LutDtype,
}

impl Form {
    /// Channels of a group where nothing else is asked for: coremltools' documentation calls 8 to 16 typical.
    pub const GROUP_SIZE: usize = 16;

    /// One table of fp16 numbers for the whole weight.
    pub const fn per_tensor(bits: u32) -> Self {
        let (group_size, lut_dtype) = (None, LutDtype::F16);
        Self { bits, group_size, axis: 0, cluster_dim: 1, per_channel_scale: false, lut_dtype }
    }

    /// Whether it is [`Form::per_tensor`].
    pub fn is_per_tensor(&self) -> bool {
        *self == Self::per_tensor(self.bits)
    }

    /// What is wrong with it for every weight, as (field, what is wrong), if anything is.
    pub fn problem(&self) -> Option<(&'static str, String)> {
        let Self { bits, group_size, axis, cluster_dim, per_channel_scale, .. } = *self;
        if !BITS.contains(&bits) {
            return Some(("bits", format!("is {bits}, but a palette has 1, 2, 3, 4, 6 or 8 bits")));
        }
        if !CLUSTER_DIMS.contains(&cluster_dim) {
            return Some(("cluster_dim", format!("is {cluster_dim}, but an entry holds 1, 2 or 4 weights")));
        }
        if axis > 1 {
            return Some(("axis", format!("is {axis}, but must be 0 (output channels) or 1 (input channels)")));
        }
        if axis == 1 && group_size.is_none() && cluster_dim == 1 {
            return Some(("axis", "is 1, but there are no groups and no vectors along it".to_string()));
        }
        if let Some(size) = group_size
            && (size == 0 || size % cluster_dim != 0)
        {
            let multiple = format!("is {size}, but must be a multiple of the {cluster_dim} weights of an entry");
            let message = if size == 0 { "is 0, but a group has at least one channel".to_string() } else { multiple };
            return Some(("group_size", message));
        }
        if per_channel_scale && (cluster_dim > 1 || axis == 1) {
            let message = "goes only with cluster_dim 1 and groups of output channels";
            return Some(("per_channel_scale", message.to_string()));
        }
        None
    }

    /// Why a weight of `shape` can't have this form, if it can't: its channels do not divide. Such a weight stays dense,
    /// as coremltools leaves it.
    pub fn misfit(&self, shape: &[i64]) -> Option<String> {
        if self.group_size.is_none() && self.cluster_dim == 1 && !self.per_channel_scale {
            return None;
        }
        let Some(&channels) = shape.get(self.axis) else {
            return Some(format!("it has no axis {}", self.axis));
        };
        let unit = self.group_size.unwrap_or(self.cluster_dim);
        if channels > 0 && i64::try_from(unit).is_ok_and(|unit| channels % unit == 0) {
            return None;
        }
        let side = if self.axis == 0 { "output" } else { "input" };
        let what = if self.group_size.is_some() { "groups" } else { "vectors" };
        Some(format!("its {channels} {side} channels do not divide into {what} of {unit}"))
    }

    /// What of it needs iOS 18 (macOS 15), in the plural; `None` where the form of iOS 16 (macOS 13) holds it.
    /// coremltools' `palettize_weights` and the definitions of `constexpr_lut_to_dense` agree on this.
    pub fn needs_ios18(&self) -> Option<&'static str> {
        match self {
            Self { group_size: Some(_), .. } => Some("palettes for groups of channels"),
            Self { cluster_dim: 2.., .. } => Some("palettes of vectors"),
            Self { per_channel_scale: true, .. } => Some("scales of channels"),
            Self { lut_dtype: LutDtype::I8, .. } => Some("palettes of 8-bit entries"),
            Self { bits: 3, .. } => Some("palettes of 3 bits"),
            _ => None,
        }
    }

    /// How many numbers a table holds.
    pub fn table(&self) -> usize {
        self.cluster_dim << self.bits
    }

    /// How many tables a weight of `shape` has, if it fits ([`Self::misfit`]).
    pub fn groups(&self, shape: &[i64]) -> usize {
        self.group_size.map_or(1, |size| shape[self.axis] as usize / size)
    }

    /// How many scales go with a weight of `shape` that fits: none, one a table, or one an output channel.
    pub fn scales(&self, shape: &[i64]) -> usize {
        match self {
            Self { per_channel_scale: true, .. } => shape[0] as usize,
            Self { lut_dtype: LutDtype::I8, .. } => self.groups(shape),
            _ => 0,
        }
    }

    /// Bits that the palette of a weight of `shape` takes, if it fits: indices packed into whole bytes, entries, scales.
    pub fn stored_bits(&self, shape: &[i64]) -> u64 {
        let elements = shape.iter().product::<i64>() as u64;
        let indices = (elements / self.cluster_dim as u64 * u64::from(self.bits)).next_multiple_of(8);
        let entries = (self.groups(shape) * self.table()) as u64;
        let entry = if self.lut_dtype == LutDtype::I8 { 8 } else { 16 };
        indices + entries * entry + self.scales(shape) as u64 * 16
    }

    /// Bits that it takes in a Core ML package, if it fits. Where channels have scales each has a table of its own there,
    /// its scale multiplied in; only that of 8-bit entries stays beside its table.
    pub fn package_bits(&self, shape: &[i64]) -> u64 {
        if !self.per_channel_scale {
            return self.stored_bits(shape);
        }
        let channels = Self { group_size: Some(1), per_channel_scale: false, ..*self };
        channels.stored_bits(shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_that_do_not_divide_are_no_fit() {
        let grouped = Form { group_size: Some(16), ..Form::per_tensor(4) };
        assert_eq!(grouped.misfit(&[320, 4, 3, 3]), None);
        assert_eq!(grouped.misfit(&[4, 320]).unwrap(), "its 4 output channels do not divide into groups of 16");
        let inputs = Form { axis: 1, ..grouped };
        assert_eq!(inputs.misfit(&[320, 4, 3, 3]).unwrap(), "its 4 input channels do not divide into groups of 16");
        assert_eq!(inputs.misfit(&[320]).unwrap(), "it has no axis 1");
        let vectors = Form { cluster_dim: 4, ..Form::per_tensor(4) };
        assert_eq!((vectors.misfit(&[4, 3]), vectors.misfit(&[0, 3]).is_some()), (None, true));
        assert_eq!(vectors.misfit(&[6, 4]).unwrap(), "its 6 output channels do not divide into vectors of 4");
        assert_eq!(Form::per_tensor(4).misfit(&[]), None);
    }

    #[test]
    fn forms_that_no_weight_can_have_are_named() {
        let field = |form: Form| form.problem().map(|(field, _)| field);
        let plain = Form::per_tensor(4);
        assert_eq!(field(plain), None);
        assert_eq!(field(Form::per_tensor(5)), Some("bits"));
        assert_eq!(field(Form { cluster_dim: 3, ..plain }), Some("cluster_dim"));
        assert_eq!(field(Form { axis: 2, ..plain }), Some("axis"));
        assert_eq!(field(Form { axis: 1, ..plain }), Some("axis"));
        assert_eq!(field(Form { group_size: Some(0), ..plain }), Some("group_size"));
        assert_eq!(field(Form { group_size: Some(6), cluster_dim: 4, ..plain }), Some("group_size"));
        assert_eq!(field(Form { per_channel_scale: true, cluster_dim: 2, ..plain }), Some("per_channel_scale"));
        assert_eq!(field(Form { per_channel_scale: true, group_size: Some(2), ..plain }), None);
    }

    #[test]
    fn only_plain_palettes_go_back_to_ios_16() {
        let old: Vec<u32> = BITS.into_iter().filter(|&b| Form::per_tensor(b).needs_ios18().is_none()).collect();
        assert_eq!(old, [1, 2, 4, 6, 8]);
        let plain = Form::per_tensor(4);
        for form in [
            Form { group_size: Some(8), ..plain },
            Form { cluster_dim: 2, ..plain },
            Form { per_channel_scale: true, ..plain },
            Form { lut_dtype: LutDtype::I8, ..plain },
        ] {
            assert!(form.needs_ios18().is_some(), "{form:?}");
        }
    }
}
