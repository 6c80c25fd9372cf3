//! Exact k-means of numbers in ascending order: the best cut into intervals.
//!
//! Sorted values fall into clusters that are intervals, so the best clustering is a shortest path: with D_k(j) the
//! least squared error of the first j values in k clusters, D_k(j) = min_i D_{k-1}(i) + cost(i, j), and the best i
//! grows with j (Wang & Song 2011; Grønlund et al. 2017, arXiv 1701.07204), so each row takes O(B log B) by dividing
//! and conquering. B is the number of distinct f16 values, at most 63,487 however large the tensor.
//!
//! For many clusters there is a faster way to the same optimum (section 4 of Grønlund et al.): charge λ for each cluster
//! instead of counting them, which leaves one row, F(j) = λ + min_i F(i) + cost(i, j), and seek the λ whose solution
//! has as many clusters as wanted. What is best at its λ is best among all with as many clusters.

/// From so many clusters on a charge a cluster is faster than a row a cluster.
const CHARGED: usize = 8;
/// Charges tried at most: some five are enough unless solutions tie.
const CHARGES: usize = 40;

/// The means of the best `clusters` clusters of `values` (ascending) with `weights` (positive): ascending, and fewer
/// where there are fewer distinct values.
pub fn means(values: &[f64], weights: &[f64], clusters: usize) -> Vec<f64> {
    let (values, weights) = distinct(values, weights);
    let count = values.len();
    if count <= clusters {
        return values;
    }
    let sums = Sums::new(&values, &weights);
    let charged = if clusters >= CHARGED { charged(&values, &weights, &sums, clusters) } else { None };
    let starts = charged.unwrap_or_else(|| row_by_row(&sums, clusters));
    let ends = starts.iter().skip(1).copied().chain([count]);
    starts.iter().zip(ends).map(|(&start, end)| mean(&values[start..end], &weights[start..end])).collect()
}

/// Where the best `clusters` clusters start, by one row a cluster.
fn row_by_row(sums: &Sums, clusters: usize) -> Vec<usize> {
    let count = sums.count();
    // best[j]: least error of the first j values in the clusters so far.
    let mut best: Vec<f64> = (0..=count).map(|j| if j == 0 { 0.0 } else { sums.cost(0, j) }).collect();
    let mut splits: Vec<Vec<u32>> = Vec::with_capacity(clusters);
    for k in 2..=clusters {
        let mut row = vec![f64::INFINITY; count + 1];
        let mut split = vec![0u32; count + 1];
        // The last row is wanted at its end only; no row is wanted where later clusters would stay empty.
        let from = if k == clusters { count } else { k };
        let to = count - (clusters - k);
        fill(sums, &best, &mut row, &mut split, (from, to), (k - 1, to - 1));
        best = row;
        splits.push(split);
    }
    let mut starts = vec![count];
    for split in splits.iter().rev() {
        starts.push(split[starts[starts.len() - 1]] as usize);
    }
    starts.push(0);
    starts.reverse();
    starts.pop();
    starts
}

/// Where the best `clusters` clusters start, by a charge a cluster; `None` where no charge has just as many (several
/// clusterings of other numbers are equally good).
fn charged(values: &[f64], weights: &[f64], sums: &Sums, clusters: usize) -> Option<Vec<usize>> {
    let wanted = clusters as f64;
    // What the last cluster saves of a smooth density p: its k-means leaves (∫ p^⅓)³ / 12k² (Panter & Dite 1951).
    let widths = values.windows(2).map(|pair| pair[1] - pair[0]);
    let cube_root: f64 = widths.zip(weights).map(|(width, weight)| (weight * width * width).cbrt()).sum();
    let mut charge = (cube_root / wanted).powi(3) / 6.0;
    // Charges with too many clusters and with too few.
    let (mut low, mut high) = (0.0, f64::INFINITY);
    for _ in 0..CHARGES {
        if !(charge > low && charge < high && charge.is_finite()) {
            return None;
        }
        let starts = cut(sums, charge);
        match starts.len() {
            found if found == clusters => return Some(starts),
            found if found > clusters => low = charge,
            _ => high = charge,
        }
        // The charge falls as the cube of the number; where that leads out of what is known, halve that.
        let guess = charge * (starts.len() as f64 / wanted).powi(3);
        charge = match guess > low && guess < high {
            true => guess,
            false if low == 0.0 => high / 8.0,
            false if high.is_infinite() => low * 8.0,
            false => (low * high).sqrt(),
        };
    }
    None
}

/// Where the clusters start that are best when each costs `charge` more than its error.
fn cut(sums: &Sums, charge: f64) -> Vec<usize> {
    let count = sums.count();
    // least[j]: least error and charges of the first j values; from[j]: where the last of their clusters starts.
    let (mut least, mut from) = (vec![0f64; count + 1], vec![0u32; count + 1]);
    // Which start is best from which j on, of the starts so far; both ascend, and what lies before `head` is done with.
    let mut queue: Vec<(u32, u32)> = vec![(0, 1)];
    let mut head = 0;
    for j in 1..=count {
        while queue.get(head + 1).is_some_and(|next| next.1 as usize <= j) {
            head += 1;
        }
        let start = queue[head].0 as usize;
        least[j] = least[start] + sums.cost(start, j) + charge;
        from[j] = start as u32;
        let better = |other: u32, to: usize| {
            least[j] + sums.cost(j, to) <= least[other as usize] + sums.cost(other as usize, to)
        };
        let mut first = j + 1;
        while let Some(&(other, since)) = queue.get(head..).and_then(<[_]>::last) {
            let since = (since as usize).max(j + 1);
            if since > count || !better(other, since) {
                // It stays better up to somewhere behind `since`: double the step, then halve it.
                let (mut worse, mut step) = (since, 1);
                while worse + step <= count && !better(other, worse + step) {
                    worse += step;
                    step *= 2;
                }
                first = (worse + step).min(count + 1);
                while first - worse > 1 {
                    let middle = worse + (first - worse) / 2;
                    if better(other, middle) { first = middle } else { worse = middle }
                }
                break;
            }
            queue.pop();
        }
        if first <= count {
            queue.push((j as u32, first as u32));
        }
    }
    let mut starts = Vec::new();
    let mut end = count;
    while end > 0 {
        end = from[end] as usize;
        starts.push(end);
    }
    starts.reverse();
    starts
}

/// Equal values (−0 and 0 are) made one.
fn distinct(values: &[f64], weights: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let mut merged: (Vec<f64>, Vec<f64>) = Default::default();
    for (&value, &weight) in values.iter().zip(weights) {
        match merged.0.last() {
            Some(&last) if last == value => *merged.1.last_mut().expect("as many weights as values") += weight,
            _ => {
                merged.0.push(value);
                merged.1.push(weight);
            }
        }
    }
    merged
}

/// Fills `row[j]` and `split[j]` for j in `columns` (both ends included), whose best split is known to lie in `range`.
fn fill(sums: &Sums, best: &[f64], row: &mut [f64], split: &mut [u32], columns: (usize, usize), range: (usize, usize)) {
    let (from, to) = columns;
    if from > to {
        return;
    }
    let middle = from + (to - from) / 2;
    let (mut least, mut at) = (f64::INFINITY, range.0);
    for (i, &before) in best.iter().enumerate().take(range.1.min(middle - 1) + 1).skip(range.0) {
        let error = before + sums.cost(i, middle);
        if error < least {
            (least, at) = (error, i);
        }
    }
    (row[middle], split[middle]) = (least, at as u32);
    fill(sums, best, row, split, (from, middle - 1), (range.0, at));
    fill(sums, best, row, split, (middle + 1, to), (at, range.1));
}

/// Prefix sums of weight, weight × value and weight × value², from which the error of any interval follows.
///
/// Values are taken relative to their weighted median, and sums run outward from it: a few far outliers then do not
/// drown the small errors of the bulk in rounding.
struct Sums {
    /// weight, weight × value, weight × value²
    prefix: Vec<[f64; 3]>,
}

impl Sums {
    fn new(values: &[f64], weights: &[f64]) -> Self {
        let half = weights.iter().sum::<f64>() / 2.0;
        let mut so_far = 0.0;
        let median = weights.iter().position(|w| {
            so_far += w;
            so_far >= half
        });
        let median = median.unwrap_or(0);
        let centre = values[median];
        let part = |i: usize| {
            let (value, weight) = (values[i] - centre, weights[i]);
            [weight, weight * value, weight * value * value]
        };
        let mut prefix = vec![[0.0; 3]; values.len() + 1];
        for i in median..values.len() {
            prefix[i + 1] = std::array::from_fn(|m| prefix[i][m] + part(i)[m]);
        }
        for i in (0..median).rev() {
            prefix[i] = std::array::from_fn(|m| prefix[i + 1][m] - part(i)[m]);
        }
        Self { prefix }
    }

    fn count(&self) -> usize {
        self.prefix.len() - 1
    }

    /// Squared error of the values `from..to` about their mean.
    #[inline]
    fn cost(&self, from: usize, to: usize) -> f64 {
        let ([w0, s0, q0], [w1, s1, q1]) = (self.prefix[from], self.prefix[to]);
        let sum = s1 - s0;
        // One value has no error, and for one far from the centre the difference below would be rounding.
        if to - from == 1 {
            return 0.0;
        }
        ((q1 - q0) - sum * sum / (w1 - w0)).max(0.0)
    }
}

/// The weighted mean of values, taken relative to the first, so that one value is its own mean exactly.
fn mean(values: &[f64], weights: &[f64]) -> f64 {
    let first = values[0];
    let sum: f64 = values.iter().zip(weights).map(|(value, weight)| (value - first) * weight).sum();
    first + sum / weights.iter().sum::<f64>()
}
