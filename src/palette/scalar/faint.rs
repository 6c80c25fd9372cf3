//! Entries of a palette of which hardly any weight takes notice: their place in differentiable k-means, exactly.
//!
//! An entry far from all weights has a_ij of e⁻³⁸ and less everywhere, nothing beside the other terms of its rows, and yet
//! c_j = Σ_i a_ij w_i / Σ_i a_ij is a mean like any other: the factor that makes all a_ij small drops out. It lies amid the
//! weights that are least far beyond their own entries, which is where exact differentiable k-means takes such an entry at
//! once. So its terms are summed relative to the largest of them, whatever floats can hold.

use super::attention::FLOOR;

/// The terms of one entry.
#[derive(Debug)]
pub struct Faint {
    pub entry: usize,
    /// Bins of the histogram, one at least, and a_bj / s_j, a weight's share in the mean.
    pub bins: Vec<(usize, f64)>,
}

impl Faint {
    /// c_j
    pub fn mean(&self, values: &[f64], counts: &[u32]) -> f64 {
        // From amid them: the entry itself may be so far away that nothing of their differences is left.
        let (first, _) = self.bins[0];
        let from = values[first];
        from + self.bins.iter().map(|&(bin, share)| f64::from(counts[bin]) * share * (values[bin] - from)).sum::<f64>()
    }
}

/// The bins that matter to entry `j` of `entries` (ascending) at the temperature `tau`, among those with `values`
/// (ascending) and `counts`. `None` without weights.
pub fn find_faint(values: &[f64], counts: &[u32], entries: &[f64], j: usize, tau: f64) -> Option<Faint> {
    let middle = values.partition_point(|&u| u < entries[j]);
    // ln a_bj is at most −((u − c_j)² − (u − c_near)²)/τ, which falls on both sides of the entry, and ln K less at least.
    let total: f64 = counts.iter().map(|&n| f64::from(n)).sum();
    let reach = FLOOR + total.max(1.0).ln() + (entries.len() as f64).ln();
    let (mut terms, mut most) = (Vec::new(), f64::NEG_INFINITY);
    let mut walk = |bins: &mut dyn Iterator<Item = usize>| {
        for bin in bins.filter(|&bin| counts[bin] > 0) {
            let (logit, norm) = attention(values[bin], entries, j, tau);
            if logit < most - reach {
                break;
            }
            most = f64::max(most, logit - norm.ln());
            terms.push((bin, logit - norm.ln()));
        }
    };
    walk(&mut (middle..values.len()));
    walk(&mut (0..middle).rev());
    terms.sort_unstable_by_key(|term| term.0);
    let terms = terms.into_iter().map(|(bin, logarithm)| (bin, (logarithm - most).exp()));
    let mut bins: Vec<(usize, f64)> = terms.filter(|(_, part)| *part > 0.0).collect();
    let sum: f64 = bins.iter().map(|&(bin, part)| f64::from(counts[bin]) * part).sum();
    bins.iter_mut().for_each(|(_, part)| *part /= sum);
    (sum > 0.0).then_some(Faint { entry: j, bins })
}

/// The logit of entry `j` for the value `u`, from that of the nearest; and the sum of all powers from there.
fn attention(u: f64, entries: &[f64], j: usize, tau: f64) -> (f64, f64) {
    let above = entries.partition_point(|&entry| entry < u).min(entries.len() - 1);
    let below = above.saturating_sub(1);
    let near = if (u - entries[below]).abs() < (entries[above] - u).abs() { below } else { above };
    // (u − c_near)² − (u − c_k)² without cancellation.
    let logit = |k: usize| (entries[near] + entries[k] - 2.0 * u) * (entries[near] - entries[k]) / tau;
    let side = |entries: &mut dyn Iterator<Item = usize>| -> f64 {
        entries.map(logit).take_while(|&logit| logit > -FLOOR).map(f64::exp).sum()
    };
    (logit(j), side(&mut (near..entries.len())) + side(&mut (0..near).rev()))
}
