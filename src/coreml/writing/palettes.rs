//! Palettes as `constexpr_lut_to_dense`, in the form of the target.
//!
//! Up to iOS 17 one table of numbers is all there is, written as attributes. From iOS 18 on tables are inputs of shape
//! `[.., blocks, .., 2^bits, d]`: a table for each block of channels, entries of d weights along the same axis.
//!
//! A scale a channel could be a `constexpr_blockwise_shift_scale` over what is looked up. It is not: coremltools writes
//! that for iOS 26 only, and for iOS 18 puts the scale before the look-up, with a table for each channel (its pass
//! `canonicalize_quantized_lut_pattern`); and over floats the operation is reported not to load on the Neural Engine of
//! macOS 26 (coremltools pull request 2688). So channels get tables of their own here too, scales multiplied in: the
//! same numbers. 8-bit entries are scaled before they are looked up, as coremltools does for iOS 18.

use std::collections::BTreeMap;
use std::io::{Seek, Write};

use anyhow::{Result, ensure};
use half::f16;

use super::program::{ProgramBuilder, Var, attributes, bound, by_name, immediate};
use crate::coreml::DeploymentTarget;
use crate::coreml::format::proto::{self, TensorElements, data_type};
use crate::palette::packing::pack;
use crate::palette::{LutDtype, Palette};

impl<W: Write + Seek> ProgramBuilder<W> {
    /// A weight that is a palette. `shape` is how it lies in the program: the palette's, with ones behind.
    ///
    /// # Errors
    /// When the shape is another, the target does not hold this form of palette, or weight.bin cannot be written.
    pub fn palette(&mut self, hint: &str, palette: &Palette, shape: &[i64]) -> Result<Var> {
        ensure!(
            shape.starts_with(&palette.shape) && shape[palette.shape.len()..].iter().all(|&size| size == 1),
            "its palette is of shape {:?}, and its shape is {shape:?}",
            palette.shape
        );
        if self.target() == DeploymentTarget::Ios18 {
            return self.tables(hint, palette, shape);
        }
        if let Some(what) = palette.form.needs_ios18() {
            anyhow::bail!("{what} need iOS18 (macOS15), and this package is for {}", self.target());
        }
        let packed = pack(&palette.indices, palette.form.bits);
        let indices = self.stored(data_type::UINT8, &[packed.len() as i64], &packed)?;
        let lut = self.stored(data_type::FLOAT16, &[palette.entries.len() as i64], &half_bytes(&palette.entries))?;
        let dimensions: Vec<u8> = shape.iter().flat_map(|&n| (n as u32).to_le_bytes()).collect();
        let dimensions = TensorElements::Bytes(proto::RepeatedBytes { values: dimensions });
        let dimensions = immediate(data_type::UINT32, &[shape.len() as i64], dimensions);
        let var = self.var(hint, data_type::FLOAT16, shape);
        let attributes = attributes(&var.name, [("indices", indices), ("lut", lut), ("shape", dimensions)]);
        self.push("constexpr_lut_to_dense", BTreeMap::new(), attributes, std::slice::from_ref(&var));
        Ok(var)
    }

    /// The form of iOS 18.
    fn tables(&mut self, hint: &str, palette: &Palette, shape: &[i64]) -> Result<Var> {
        let form = palette.form;
        let index = match form.bits {
            1 => data_type::UINT1,
            2 => data_type::UINT2,
            3 => data_type::UINT3,
            4 => data_type::UINT4,
            6 => data_type::UINT6,
            _ => data_type::UINT8,
        };
        let dim = form.cluster_dim as i64;
        let mut index_shape = shape.to_vec();
        if dim > 1 {
            index_shape[form.axis] /= dim;
        }
        let packed = pack(&palette.indices, form.bits);
        let indices = self.stored(index, &index_shape, &packed)?;
        let table_shape = |blocks: usize, entries: i64, dim: i64| {
            let mut table = vec![1; shape.len()];
            if blocks > 1 {
                table[form.axis] = blocks as i64;
            }
            table.extend([entries, dim]);
            table
        };
        let lut = match form.lut_dtype {
            LutDtype::F16 => {
                let (blocks, values) = palette.tables();
                let shape = table_shape(blocks, 1 << form.bits, dim);
                bound([self.stored(data_type::FLOAT16, &shape, &half_bytes(&values))?])
            }
            LutDtype::I8 => {
                // As many tables as there are scales: with a scale a channel each group's table is repeated.
                let (blocks, table) = (palette.scales.len(), (dim as usize) << form.bits);
                let repeats = blocks * table / palette.entries.len();
                let entries = palette.entries.chunks(table).flat_map(|table| std::iter::repeat_n(table, repeats));
                let bytes: Vec<u8> = entries.flatten().map(|entry| entry.to_f32() as i8 as u8).collect();
                let whole = table_shape(blocks, 1 << form.bits, dim);
                let scales =
                    self.stored(data_type::FLOAT16, &table_shape(blocks, 1, 1), &half_bytes(&palette.scales))?;
                let inputs = [
                    ("data".to_owned(), bound([self.stored(data_type::INT8, &whole, &bytes)?])),
                    ("scale".to_owned(), bound([scales])),
                ];
                let lut = self.var(&format!("{hint}_lut"), data_type::FLOAT16, &whole);
                let attributes = attributes(&lut.name, []);
                let kind = "constexpr_blockwise_shift_scale";
                self.push(kind, inputs.into(), attributes, std::slice::from_ref(&lut));
                by_name([&lut])
            }
        };
        let mut inputs = BTreeMap::from([("indices".to_owned(), bound([indices])), ("lut".to_owned(), lut)]);
        if dim > 1 {
            let axis = TensorElements::Ints(proto::RepeatedInts { values: vec![form.axis as i32] });
            inputs.insert("vector_axis".to_owned(), bound([immediate(data_type::INT32, &[], axis)]));
        }
        let var = self.var(hint, data_type::FLOAT16, shape);
        let attributes = attributes(&var.name, []);
        self.push("constexpr_lut_to_dense", inputs, attributes, std::slice::from_ref(&var));
        Ok(var)
    }
}

fn half_bytes(values: &[f16]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
