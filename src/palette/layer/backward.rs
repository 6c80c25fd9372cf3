//! The way back of one step of a layer: from ∂L/∂ŵ, which autograd gives, to ∂L/∂w, or straight to the next w.
//!
//! ∂L/∂w = D_b · ∂L/∂ŵ + Ψ_b for a weight in bin b ([`crate::palette::clustering`]). Its square, summed over the weights, follows
//! from sums of ∂L/∂ŵ and its square over each bin. So it need not be written down to be clipped, and can go into
//! AdamW's step as it is computed: 16 bytes a weight less to move, of 64 that one step costs.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::rows::Rows;
use crate::palette::clustering::Lines;
use crate::palette::scalar::combine_and_step;
use crate::palette::vector::SoftenVectors;
use crate::palette::{AdamWStep, Histogram, Soften};

/// What the backward pass of one step of a layer needs: that of each of its groups.
pub struct SoftenRows {
    pub(super) rows: Rows,
    /// Of the rows: the master weight's own, f32 where vectors or scales are computed with.
    pub(super) kind: Kind,
    pub(super) groups: Vec<Group>,
}

/// One table's, of entries that hold 1, 2 or 4 weights.
pub(super) enum Group {
    /// There are few points for each entry: the gradient stays what it is.
    Straight {
        hard_error: f64,
    },
    One(Soften),
    Two(SoftenVectors<2>),
    Four(SoftenVectors<4>),
}

impl Group {
    fn backward(&self, gradient: &mut Tensor) -> Result<()> {
        match self {
            Group::Straight { .. } => Ok(()),
            Group::One(state) => state.backward(gradient),
            Group::Two(state) => state.backward(gradient),
            Group::Four(state) => state.backward(gradient),
        }
    }

    fn hard_error(&self) -> f64 {
        match self {
            Group::Straight { hard_error } => *hard_error,
            Group::One(state) => state.hard_error(),
            Group::Two(state) => state.hard_error(),
            Group::Four(state) => state.hard_error(),
        }
    }
}

impl SoftenRows {
    /// [`Soften::backward`] of the whole layer.
    ///
    /// # Errors
    /// When `gradient` has another shape or kind, or is on another device.
    pub fn backward(&self, gradient: &mut Tensor) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let rows = self.rows.of_gradient(gradient)?.f_to_kind(self.kind)?;
        for (group, state) in self.groups.iter().enumerate() {
            state.backward(&mut rows.f_get(group as i64)?)?;
        }
        // Plain rows share the gradient's memory.
        if rows.data_ptr() != gradient.data_ptr() {
            gradient.f_copy_(&self.rows.gradient(&rows)?)?;
        }
        Ok(())
    }

    /// Mean squared error of the rows if palettes were made of the new centroids now.
    pub fn hard_error(&self) -> f64 {
        let sum: f64 = self.groups.iter().map(Group::hard_error).sum();
        sum / self.groups.len().max(1) as f64
    }
}

/// ∂L/∂w of a layer.
pub enum Gradient {
    /// A step with it is the caller's.
    Whole(Tensor),
    /// The layer computes it as it takes its own step ([`DkmLayer::step`](super::DkmLayer::step)).
    Own {
        /// The sum of its squares.
        square: f64,
    },
}

/// What a layer takes its own step with: ∂L/∂w, computed on the way.
#[derive(Debug)]
pub(super) struct OwnStep {
    /// ∂L/∂ŵ, `[G, elements / G]`.
    upstream: Tensor,
    /// The bins of each group, and what makes its gradient.
    groups: Vec<(Histogram, Lines)>,
}

impl Clone for OwnStep {
    fn clone(&self) -> Self {
        Self { upstream: self.upstream.shallow_clone(), groups: self.groups.clone() }
    }
}

impl SoftenRows {
    /// From `upstream`, ∂L/∂ŵ, which is used up, to ∂L/∂w; and the layer's own step with it, where tables of numbers see
    /// f32 in the master weight's own memory, on the CPU.
    ///
    /// # Errors
    /// When `upstream` has another shape or type, or is on another device.
    pub(super) fn gradient(self, upstream: Tensor) -> Result<(Gradient, Option<OwnStep>)> {
        let _guard = tch::no_grad_guard();
        let mut upstream = upstream.f_contiguous()?;
        let (kind, device) = (upstream.f_kind()?, upstream.device());
        let of_numbers = self.groups.iter().all(|group| matches!(group, Group::One(_)));
        if !(of_numbers && self.rows.are_plain() && kind == Kind::Float && device == Device::Cpu) {
            self.backward(&mut upstream)?;
            return Ok((Gradient::Whole(upstream), None));
        }
        let upstream = self.rows.of_gradient(&upstream)?;
        let (mut groups, mut total) = (Vec::with_capacity(self.groups.len()), 0.0);
        for (group, state) in self.groups.into_iter().enumerate() {
            let Group::One(state) = state else { continue };
            let (lines, sums) = state.lines::<2>(&upstream.f_get(group as i64)?)?;
            let histogram = state.into_histogram();
            for (([sum, square], (slope, offset)), &count) in sums.iter().zip(&lines).zip(&histogram.counts) {
                total += slope * slope * square + offset * (2.0 * slope * sum + offset * f64::from(count));
            }
            groups.push((histogram, lines));
        }
        // What rounding leaves of nothing; what is no number stays none.
        let square = if total < 0.0 { 0.0 } else { total };
        Ok((Gradient::Own { square }, Some(OwnStep { upstream, groups })))
    }
}

impl OwnStep {
    /// [`DkmLayer::step`](super::DkmLayer::step); returns each group's bins as they are then, none where a weight has left
    /// the range of its code.
    pub(super) fn take(
        self,
        weight: &Tensor,
        moments: [&Tensor; 2],
        step: &AdamWStep,
    ) -> Result<Vec<Option<Histogram>>> {
        let _guard = tch::no_grad_guard();
        let shape = self.upstream.size();
        let rows = |tensor: &Tensor| tensor.f_detach()?.f_view(shape.as_slice());
        let (weight, [exp_avg, exp_avg_sq]) = (rows(weight)?, moments.map(rows));
        let (exp_avg, exp_avg_sq) = (exp_avg?, exp_avg_sq?);
        let groups = self.groups.iter().enumerate().map(|(group, (histogram, lines))| {
            let row = |tensor: &Tensor| tensor.f_get(group as i64);
            let moments = [&mut row(&exp_avg)?, &mut row(&exp_avg_sq)?];
            combine_and_step(&mut row(&weight)?, histogram, lines, &row(&self.upstream)?, moments, step)
        });
        groups.collect()
    }
}
