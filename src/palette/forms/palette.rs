//! A weight as indices into a short table of values.

use std::borrow::Cow;

use anyhow::{Result, anyhow, bail, ensure};
use half::f16;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::form::{Form, LutDtype};

/// A weight that is looked up: an index for each of its elements, or each few neighbours, into a table of 2^bits entries.
///
/// The simple one has one table of numbers ([`Palette::new`]); [`Form`] says what else there is. C channels along
/// `form.axis`, G groups of them with a table each, d = `form.cluster_dim` weights an entry. An element is
/// `entries[group, index, place in the entry]`, or where there are scales that times the scale of its group or channel:
/// the exact product, rounded once to f16, as Core ML's `constexpr_blockwise_shift_scale` computes it in fp16.
#[derive(Clone, Debug, PartialEq)]
pub struct Palette {
    pub form: Form,
    /// The weight's shape.
    pub shape: Vec<i64>,
    /// Which entry each element is, of `shape` with C / d in place of C, row-major, one a byte.
    pub indices: Vec<u8>,
    /// `[G, 2^bits, d]`; integers from -128 to 127 where they are stored as such.
    pub entries: Vec<f16>,
    /// None, or `[G]` or `[C]` as [`Form::scales`] says.
    pub scales: Vec<f16>,
}

impl Palette {
    /// A palette of one table of 2^`bits` numbers.
    ///
    /// # Errors
    /// As [`Palette::with_form`].
    pub fn new(bits: u32, shape: Vec<i64>, indices: Vec<u8>, entries: Vec<f16>) -> Result<Self> {
        Self::with_form(Form::per_tensor(bits), shape, indices, entries, Vec::new())
    }

    /// A palette of which every part fits the others.
    ///
    /// # Errors
    /// When the form is none, or not one for `shape`; there are not as many indices, entries or scales as it needs; an
    /// index points past the entries; an entry, a scale or their product is not finite.
    pub fn with_form(
        form: Form,
        shape: Vec<i64>,
        indices: Vec<u8>,
        entries: Vec<f16>,
        scales: Vec<f16>,
    ) -> Result<Self> {
        check_form(&form, &shape)?;
        let (count, table, groups) = (elements(&shape)?, form.table(), form.groups(&shape));
        ensure!(
            groups.checked_mul(table) == Some(entries.len()),
            "a palette of {} bits for a weight of shape {shape:?} has {groups} × {table} entries, not {}",
            form.bits,
            entries.len()
        );
        ensure!(
            indices.len() == count / form.cluster_dim,
            "shape {shape:?} has {count} elements, and there are {} indices for {} of them each",
            indices.len(),
            form.cluster_dim
        );
        ensure!(
            scales.len() == form.scales(&shape),
            "a weight of shape {shape:?} has {} scales, not {}",
            form.scales(&shape),
            scales.len()
        );
        if let Some(value) = entries.iter().find(|e| !e.is_finite()) {
            return Err(anyhow!("a palette entry is {value}"));
        }
        let is_byte = |e: &&f16| e.to_f32().fract() == 0.0 && (-128.0..128.0).contains(&e.to_f32());
        if form.lut_dtype == LutDtype::I8
            && let Some(value) = entries.iter().find(|e| !is_byte(e))
        {
            return Err(anyhow!("a palette entry is {value}, which is not an 8-bit integer"));
        }
        // The largest of all is found many at a time; the first that is too large would be looked for one by one.
        let largest = indices.iter().fold(0, |largest, &index| index.max(largest));
        if usize::from(largest) >= 1 << form.bits {
            return Err(anyhow!("index {largest} points past the {} entries of its palette", 1 << form.bits));
        }
        let palette = Self { form, shape, indices, entries, scales };
        if let Some(value) = palette.tables().1.iter().find(|e| !e.is_finite()) {
            return Err(anyhow!("a palette entry times its scale is {value}"));
        }
        Ok(palette)
    }

    /// How many blocks of channels there are with values of their own (G, or C with a scale a channel), and the values
    /// of each, `[blocks, 2^bits, d]`: entries, times scales where there are any.
    pub fn tables(&self) -> (usize, Cow<'_, [f16]>) {
        let groups = self.form.groups(&self.shape);
        if self.scales.is_empty() {
            return (groups, Cow::Borrowed(&self.entries));
        }
        let (blocks, table) = (self.scales.len(), self.form.table());
        let of_block = |(block, scale): (usize, &f16)| {
            let group = block * groups / blocks;
            let scale = scale.to_f32();
            // f32 holds the product of two f16 exactly.
            self.entries[group * table..][..table].iter().map(move |e| f16::from_f32(e.to_f32() * scale))
        };
        (blocks, self.scales.iter().enumerate().flat_map(of_block).collect())
    }

    /// The weight, row-major.
    pub fn dense(&self) -> Vec<f16> {
        let (blocks, tables) = self.tables();
        if blocks == 1 && self.form.cluster_dim == 1 {
            return self.indices.iter().map(|&index| tables[index as usize]).collect();
        }
        let Self { form: Form { axis, bits, cluster_dim: dim, .. }, indices, .. } = self;
        let channels = self.shape[*axis] as usize;
        let inner: usize = self.shape[axis + 1..].iter().product::<i64>() as usize;
        let mut dense = vec![f16::ZERO; indices.len() * dim];
        if dense.is_empty() {
            return dense;
        }
        let (in_block, table) = (channels / blocks, dim << bits);
        // Channels that one piece of `indices` stands for: those of an entry, or with scalars all of a block.
        let span = if *dim > 1 { *dim } else { in_block };
        let places = span * inner / dim;
        dense.par_chunks_mut(places * dim).zip(indices.par_chunks(places)).enumerate().with_min_len(64).for_each(
            |(piece, (dense, indices))| {
                let block = piece * span % channels / in_block;
                let table = &tables[block * table..][..table];
                for (place, values) in dense.chunks_mut(places).enumerate() {
                    for (value, &index) in values.iter_mut().zip(indices) {
                        *value = table[index as usize * dim + place];
                    }
                }
            },
        );
        dense
    }

    /// The weight as a tensor of its shape.
    ///
    /// # Errors
    /// libtorch's (no memory, no such device).
    pub fn tensor(&self, kind: Kind, device: Device) -> Result<Tensor> {
        let halves = Tensor::f_from_slice(&self.dense())?.f_view(self.shape.as_slice())?;
        Ok(halves.f_to_device(device)?.f_to_kind(kind)?)
    }

    /// Bits that it takes ([`Form::stored_bits`]).
    pub fn stored_bits(&self) -> u64 {
        self.form.stored_bits(&self.shape)
    }
}

/// Refuses a form that no weight has, or none of this shape.
pub fn check_form(form: &Form, shape: &[i64]) -> Result<()> {
    if let Some((field, message)) = form.problem() {
        bail!("{field} {message}");
    }
    match form.misfit(shape) {
        Some(message) => bail!("{message}"),
        None => Ok(()),
    }
}

/// How many elements `shape` has.
///
/// # Errors
/// For a negative size, or more elements than can be addressed.
pub fn elements(shape: &[i64]) -> Result<usize> {
    shape
        .iter()
        .try_fold(1usize, |n, &size| n.checked_mul(usize::try_from(size).ok()?))
        .filter(|&n| n <= isize::MAX as usize)
        .ok_or_else(|| anyhow!("{shape:?} is not the shape of a tensor"))
}
