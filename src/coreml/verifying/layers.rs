//! Where the error of a package grows: each layer's value in the package beside the same layer's in the network.
//!
//! Layers are those with parameters: convolutions, linear layers, norms. Of each, at most [`SAMPLES`] values are kept,
//! spread over the whole, so that a UNet of full size needs little memory besides its own.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;

use anyhow::Result;
use tch::{Kind, Tensor};

use crate::coreml::reading::{Precision, psnr};

/// Most values of a layer that are compared.
pub const SAMPLES: i64 = 1 << 15;

/// How many of the largest losses are marked in the table.
const MARKED: usize = 5;

/// What the layers of a network gave, while it runs: [`Recording::watch`] is for
/// [`Tensors::watched`](crate::ops::Tensors::watched).
#[derive(Default)]
pub struct Recording {
    layers: RefCell<Vec<Layer>>,
}

/// One layer of the network.
struct Layer {
    name: String,
    shape: Vec<i64>,
    values: Tensor,
}

impl Recording {
    /// Keeps the value of a layer.
    pub fn watch(&self, name: &str, value: &Tensor) {
        let values = sample(value);
        self.layers.borrow_mut().push(Layer { name: name.to_owned(), shape: value.size(), values });
    }

    /// Forgets all, before the network runs again.
    pub fn clear(&self) {
        self.layers.borrow_mut().clear();
    }

    /// Runs the package in 32 and in 16 bits with `run`, which hands on its last argument to
    /// [`Chain::evaluate`](crate::coreml::reading::Chain::evaluate). What it returned, and how the layers agree.
    ///
    /// # Errors
    /// What `run` returns.
    pub fn compare<T>(
        &self,
        mut run: impl FnMut(Precision, &mut dyn FnMut(&str, &Tensor) -> Result<()>) -> Result<T>,
    ) -> Result<([T; 2], Layers)> {
        let layers = self.layers.borrow();
        // As names are written in packages.
        let places: HashMap<String, usize> =
            layers.iter().enumerate().map(|(place, layer)| (layer.name.replace('.', "_"), place)).collect();
        let mut in_precision = |precision| -> Result<(T, HashMap<usize, f64>)> {
            let mut found = HashMap::new();
            let result = run(precision, &mut |name, value| {
                if let Some(&place) = places.get(name)
                    && let Some(value) = as_in_network(value, &layers[place].shape)?
                {
                    found.insert(place, psnr(&layers[place].values, &sample(&value)));
                }
                Ok(())
            })?;
            Ok((result, found))
        };
        let ((single, found32), (half, found16)) =
            (in_precision(Precision::Float32)?, in_precision(Precision::Float16)?);
        let rows = layers.iter().enumerate().filter_map(|(place, layer)| {
            let (float32, float16) = (*found32.get(&place)?, *found16.get(&place)?);
            Some(LayerRow { name: layer.name.clone(), float32, float16 })
        });
        Ok(([single, half], Layers { rows: rows.collect(), layers: layers.len() }))
    }
}

/// Agreement of one layer, in dB.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerRow {
    pub name: String,
    pub float32: f64,
    pub float16: f64,
}

/// Agreement of every layer that network and package share, in the network's order; prints as a table.
#[derive(Clone, Debug, PartialEq)]
pub struct Layers {
    pub rows: Vec<LayerRow>,
    /// How many the network has.
    pub layers: usize,
}

impl Layers {
    /// What each layer has lost since the one before it, in dB with 16 bits: high where much error is added.
    pub fn losses(&self) -> Vec<f64> {
        let before = std::iter::once(f64::INFINITY).chain(self.rows.iter().map(|row| row.float16));
        before
            .zip(&self.rows)
            .map(|(before, row)| if before.is_finite() { before - row.float16 } else { 0.0 })
            .collect()
    }
}

impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let losses = self.losses();
        let mut order: Vec<usize> = (0..losses.len()).filter(|&at| losses[at] > 0.0).collect();
        order.sort_by(|&a, &b| losses[b].total_cmp(&losses[a]));
        order.truncate(MARKED);
        let width = self.rows.iter().map(|row| row.name.len()).max().unwrap_or(0).max("layer".len());
        writeln!(f, "{:width$}   PSNR, 32 bits   PSNR, 16 bits   lost since the last", "layer")?;
        for (at, row) in self.rows.iter().enumerate() {
            let mark = if order.contains(&at) { "  ◀" } else { "" };
            let LayerRow { name, float32, float16 } = row;
            writeln!(f, "{name:width$} {float32:12.2} dB {float16:12.2} dB {:17.2} dB{mark}", losses[at])?;
        }
        write!(f, "{} of {} layers compared", self.rows.len(), self.layers)?;
        if !order.is_empty() {
            write!(f, "; ◀ where most is lost with 16 bits")?;
        }
        writeln!(f)
    }
}

/// A value of the package in the layout of the network's (`shape`): images as they are, `[B, C, 1, T]` as tokens
/// `[B, T, C]`, `[B, C, 1, 1]` as vectors. `None` where it is none of these.
fn as_in_network(value: &Tensor, shape: &[i64]) -> Result<Option<Tensor>> {
    let size = value.size();
    Ok(match (&size[..], shape) {
        (size, shape) if size == shape => Some(value.shallow_clone()),
        ([b, c, 1, t], [batch, tokens, channels]) if [b, t, c] == [batch, tokens, channels] => {
            Some(value.f_squeeze_dim(2)?.f_transpose(1, 2)?)
        }
        ([b, c, 1, 1], [batch, channels]) if [b, c] == [batch, channels] => Some(value.f_view([*b, *c])?),
        _ => None,
    })
}

/// Some of a tensor's values, the same ones of every tensor of this size, spread over it evenly: multiples of the
/// golden ratio fall into no pattern of rows or channels.
fn sample(x: &Tensor) -> Tensor {
    let flat = x.detach().reshape([-1]).to_kind(Kind::Float);
    let count = flat.numel() as i64;
    if count <= SAMPLES {
        return flat.copy();
    }
    let golden = (5f64.sqrt() - 1.0) / 2.0;
    let places: Vec<i64> = (1..=SAMPLES).map(|i| ((i as f64 * golden).fract() * count as f64) as i64).collect();
    flat.index_select(0, &Tensor::from_slice(&places).to_device(flat.device()))
}
