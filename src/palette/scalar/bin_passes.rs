//! What [`super::clustering`] does with each block of bins: sums for each entry, the soft value, and the way back of both.

use super::attention::{Block, LANES, Lanes, sum};

/// Bins that one task takes.
pub const RUN: usize = 4096;

/// Per entry.
pub type Sums = Vec<f64>;

/// What is done with each block of bins.
pub trait Pass: Sync {
    /// What is added up over a run of bins.
    type Sums: Send;
    fn start(&self) -> Self::Sums;
    fn block(&self, sums: &mut Self::Sums, block: &Block);
}

/// Mass and first moment of each entry.
pub struct Update<'a> {
    pub old: &'a [f64],
}

impl Pass for Update<'_> {
    type Sums = Vec<[f64; 2]>;

    fn start(&self) -> Self::Sums {
        vec![[0.0; 2]; self.old.len()]
    }

    #[inline(always)]
    fn block(&self, sums: &mut Self::Sums, block: &Block) {
        for (j, attention) in block.seen() {
            let old = self.old[j];
            let weights: Lanes = std::array::from_fn(|lane| block.counts[lane] * attention[lane]);
            sums[j][0] += sum(&weights);
            sums[j][1] += sum(&std::array::from_fn(|lane| weights[lane] * (block.values[lane] - old)));
        }
    }
}

/// f_b.
pub struct Read<'a> {
    pub entries: &'a [f64],
}

impl Pass for Read<'_> {
    type Sums = Vec<f64>;

    fn start(&self) -> Self::Sums {
        Vec::with_capacity(RUN)
    }

    #[inline(always)]
    fn block(&self, soft: &mut Self::Sums, block: &Block) {
        soft.extend_from_slice(&block.mean(|j, _| self.entries[j])[..block.len]);
    }
}

/// The backward pass of [`Read`]: f_b depends on c^T directly and on c^{T−1} through the attention.
pub struct ReadBack<'a> {
    pub upstream: &'a [f64],
    /// c^T
    pub entries: &'a [f64],
    /// c^{T−1}
    pub previous: &'a [f64],
    /// 2/τ
    pub scale: f64,
}

pub struct ReadBackSums {
    /// D_b
    pub direct: Vec<f64>,
    /// ∂L/∂c^T
    pub to_last: Sums,
    /// ∂L/∂c^{T−1}
    pub to_previous: Sums,
}

impl Pass for ReadBack<'_> {
    type Sums = ReadBackSums;

    fn start(&self) -> Self::Sums {
        let zeros = vec![0.0; self.entries.len()];
        ReadBackSums { direct: Vec::with_capacity(RUN), to_last: zeros.clone(), to_previous: zeros }
    }

    #[inline(always)]
    fn block(&self, sums: &mut Self::Sums, block: &Block) {
        let upstream = block.pick(self.upstream);
        let soft = block.mean(|j, _| self.entries[j]);
        let mut direct = [0.0; LANES];
        for (j, attention) in block.seen() {
            let (entry, previous) = (self.entries[j], self.previous[j]);
            // ∂f/∂logit_j · ∂logit_j/∂c_j; ∂logit_j/∂u is its opposite.
            let mut slope = [0.0; LANES];
            for lane in 0..LANES {
                slope[lane] = attention[lane] * (entry - soft[lane]) * self.scale * (block.values[lane] - previous);
                direct[lane] -= slope[lane];
            }
            sums.to_last[j] += sum(&std::array::from_fn(|lane| upstream[lane] * attention[lane]));
            sums.to_previous[j] += sum(&std::array::from_fn(|lane| upstream[lane] * slope[lane]));
        }
        sums.direct.extend_from_slice(&direct[..block.len]);
    }
}

/// The backward pass of [`Update`] number t: from γ^t to this update's part of Ψ_b, and to γ^{t−1}.
pub struct UpdateBack<'a> {
    /// γ^t_j / s^t_j; 0 for faint entries.
    pub share: &'a [f64],
    /// What these add to the mean of each bin; empty without any.
    pub beside: &'a [f64],
    /// c^{t−1}
    pub old: &'a [f64],
    /// c^t
    pub new: &'a [f64],
    /// 2/τ
    pub scale: f64,
}

impl Pass for UpdateBack<'_> {
    type Sums = (Vec<f64>, Sums);

    fn start(&self) -> Self::Sums {
        (Vec::with_capacity(RUN), vec![0.0; self.old.len()])
    }

    #[inline(always)]
    fn block(&self, (psi, to_previous): &mut Self::Sums, block: &Block) {
        let mut mean = block.mean(|j, u| self.share[j] * (u - self.new[j]));
        if !self.beside.is_empty() {
            let beside = block.pick(self.beside);
            (0..LANES).for_each(|lane| mean[lane] += beside[lane]);
        }
        let mut through = [0.0; LANES];
        for (j, attention) in block.seen() {
            let (share, old, new) = (self.share[j], self.old[j], self.new[j]);
            let mut slope = [0.0; LANES];
            for lane in 0..LANES {
                let u = block.values[lane];
                slope[lane] = attention[lane] * (share * (u - new) - mean[lane]) * self.scale * (u - old);
                through[lane] += attention[lane] * share - slope[lane];
            }
            to_previous[j] += sum(&std::array::from_fn(|lane| block.counts[lane] * slope[lane]));
        }
        psi.extend_from_slice(&through[..block.len]);
    }
}
