//! How many bits each layer gets: the least damage that fits into a budget, exactly.
//!
//! A multiple-choice knapsack (Kellerer, Pferschy & Pisinger 2004, chapter 11): of each layer's choices (bytes, damage)
//! take one, so that the bytes fit and the damages add up to the least. Layers are settled one after another, largest
//! first. Of all ways to settle the first ones only those are kept that no other beats in both bytes and damage, and
//! that can still lead to less than the best solution known: what the rest can do at best is its linear relaxation, in
//! which a layer may lie between two choices on its lower convex hull. That bound is so close with hundreds of layers
//! that a handful of ways is left of 6^282.

use anyhow::{Result, ensure};

/// One way to store a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    pub bytes: u64,
    /// Finite; it may be negative.
    pub damage: f64,
}

/// The best choice for each layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Allocation {
    /// Into each layer's choices.
    pub choices: Vec<usize>,
    pub bytes: u64,
    pub damage: f64,
}

/// The choices with the least sum of damages among those of no more than `budget` bytes; of equal damages the fewest
/// bytes it met. `None` when not even the smallest choices fit.
///
/// # Errors
/// A layer without choices, a damage that is not finite, or sizes beyond what can be added.
pub fn allocate(layers: &[Vec<Choice>], budget: u64) -> Result<Option<Allocation>> {
    let mut most = 0u64;
    for choices in layers {
        ensure!(!choices.is_empty(), "a layer has no choices");
        ensure!(choices.iter().all(|choice| choice.damage.is_finite()), "a damage is not a number");
        let largest = choices.iter().map(|choice| choice.bytes).max().unwrap_or(0);
        most = most.checked_add(largest).ok_or_else(|| anyhow::anyhow!("the layers have too many bytes"))?;
    }
    let frontiers: Vec<Vec<Indexed>> = layers.iter().map(|choices| frontier(choices)).collect();
    // The bound is loosest for layers of large steps, so these come first; small ones then fill what is left.
    let mut order: Vec<usize> = (0..layers.len()).collect();
    let span =
        |layer: usize| frontiers[layer].last().map_or(0, |last| last.choice.bytes - frontiers[layer][0].choice.bytes);
    order.sort_by_key(|&layer| (std::cmp::Reverse(span(layer)), layer));
    let ordered: Vec<&[Indexed]> = order.iter().map(|&layer| frontiers[layer].as_slice()).collect();
    let Some(picked) = Search::new(&ordered).run(budget) else { return Ok(None) };
    let mut choices = vec![0; layers.len()];
    for (place, &layer) in order.iter().enumerate() {
        choices[layer] = picked[place];
    }
    let chosen = || choices.iter().zip(layers).map(|(&choice, layer)| layer[choice]);
    let (bytes, damage) = (chosen().map(|c| c.bytes).sum(), chosen().map(|c| c.damage).sum());
    Ok(Some(Allocation { choices, bytes, damage }))
}

/// A choice and where it stood among its layer's.
#[derive(Clone, Copy)]
struct Indexed {
    choice: Choice,
    index: usize,
}

/// The choices that no other beats in both respects: bytes ascending, damage falling.
fn frontier(choices: &[Choice]) -> Vec<Indexed> {
    let mut all: Vec<Indexed> = choices.iter().enumerate().map(|(index, &choice)| Indexed { choice, index }).collect();
    all.sort_by(|a, b| a.choice.bytes.cmp(&b.choice.bytes).then(a.choice.damage.total_cmp(&b.choice.damage)));
    let mut kept: Vec<Indexed> = Vec::with_capacity(all.len());
    for one in all {
        if kept.last().is_none_or(|last| one.choice.damage < last.choice.damage) {
            kept.push(one);
        }
    }
    kept
}

/// A step up the lower convex hull of one layer.
#[derive(Clone, Copy)]
struct Increment {
    layer: usize,
    /// Into the layer's frontier: where the step leads.
    to: usize,
    bytes: u64,
    /// By which the damage falls, above 0.
    relief: f64,
}

impl Increment {
    fn per_byte(&self) -> f64 {
        self.relief / self.bytes as f64
    }
}

/// The steps between neighbours on the lower convex hull of a frontier: each gives less relief a byte than the one
/// before.
fn hull(layer: usize, frontier: &[Indexed]) -> Vec<Increment> {
    let mut corners: Vec<usize> = vec![0];
    let step = |from: usize, to: usize| {
        let (a, b) = (frontier[from].choice, frontier[to].choice);
        Increment { layer, to, bytes: b.bytes - a.bytes, relief: a.damage - b.damage }
    };
    for to in 1..frontier.len() {
        while let [.., before, last] = corners[..] {
            if step(before, last).per_byte() > step(last, to).per_byte() {
                break;
            }
            corners.pop();
        }
        corners.push(to);
    }
    corners.windows(2).map(|pair| step(pair[0], pair[1])).collect()
}

/// The layers from some place in the order on, relaxed: the best they can do with so many bytes.
struct Rest {
    /// Of the smallest choices.
    bytes: u64,
    damage: f64,
    /// By relief a byte, falling; sums of bytes and relief up to and including each.
    increments: Vec<Increment>,
    sums: Vec<(u64, f64)>,
}

impl Rest {
    fn new(from: usize, layers: &[&[Indexed]], sorted: &[Increment]) -> Self {
        let smallest = || layers[from..].iter().map(|frontier| frontier[0].choice);
        let increments: Vec<Increment> = sorted.iter().filter(|step| step.layer >= from).copied().collect();
        let sums = increments.iter().scan((0u64, 0.0), |sum, step| {
            *sum = (sum.0 + step.bytes, sum.1 + step.relief);
            Some(*sum)
        });
        let sums = sums.collect();
        Self { bytes: smallest().map(|c| c.bytes).sum(), damage: smallest().map(|c| c.damage).sum(), increments, sums }
    }

    /// The least damage of the relaxation with `bytes`, which are no fewer than the smallest choices take.
    fn bound(&self, bytes: u64) -> f64 {
        let spare = bytes - self.bytes;
        let whole = self.sums.partition_point(|sum| sum.0 <= spare);
        let (used, relief) = if whole == 0 { (0, 0.0) } else { self.sums[whole - 1] };
        let part = self.increments.get(whole).map_or(0.0, |next| next.per_byte() * (spare - used) as f64);
        self.damage - relief - part
    }

    /// A solution near the relaxation's: steps in their order, those that do not fit left out, with all that follow on
    /// the same layer. Its damage, and where each layer from `from` on stands in its frontier.
    fn greedy(&self, bytes: u64, from: usize, layers: usize) -> (f64, Vec<usize>) {
        let mut spare = bytes - self.bytes;
        let mut places = vec![0; layers - from];
        let mut stuck = vec![false; layers - from];
        let mut damage = self.damage;
        for step in &self.increments {
            let layer = step.layer - from;
            if stuck[layer] || step.bytes > spare {
                stuck[layer] = true;
                continue;
            }
            (spare, damage, places[layer]) = (spare - step.bytes, damage - step.relief, step.to);
        }
        (damage, places)
    }
}

/// A way to settle the first layers.
#[derive(Clone, Copy)]
struct Way {
    bytes: u64,
    damage: f64,
    /// Into the ways of one layer fewer.
    before: u32,
    /// Into the frontier of the last layer settled.
    place: u32,
}

struct Search<'a> {
    layers: &'a [&'a [Indexed]],
    rests: Vec<Rest>,
}

impl<'a> Search<'a> {
    fn new(layers: &'a [&'a [Indexed]]) -> Self {
        let mut sorted: Vec<Increment> =
            layers.iter().enumerate().flat_map(|(i, frontier)| hull(i, frontier)).collect();
        // Stable: the steps of one layer stay in their order.
        sorted.sort_by(|a, b| b.per_byte().total_cmp(&a.per_byte()));
        let rests = (0..=layers.len()).map(|from| Rest::new(from, layers, &sorted)).collect();
        Self { layers, rests }
    }

    /// Where each layer's best choice stood among its choices.
    fn run(&self, budget: u64) -> Option<Vec<usize>> {
        if self.rests[0].bytes > budget {
            return None;
        }
        let count = self.layers.len();
        let (mut least, mut best) = self.rests[0].greedy(budget, 0, count);
        let mut history: Vec<Vec<Way>> = vec![vec![Way { bytes: 0, damage: 0.0, before: 0, place: 0 }]];
        for (layer, frontier) in self.layers.iter().enumerate() {
            let rest = &self.rests[layer + 1];
            let ways = &history[layer];
            let mut next: Vec<Way> = Vec::with_capacity(ways.len() * frontier.len());
            for (place, one) in frontier.iter().enumerate() {
                for (before, way) in ways.iter().enumerate() {
                    let bytes = way.bytes + one.choice.bytes;
                    if bytes + rest.bytes > budget {
                        // Ways ascend in bytes.
                        break;
                    }
                    let damage = way.damage + one.choice.damage;
                    next.push(Way { bytes, damage, before: before as u32, place: place as u32 });
                }
            }
            next.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(a.damage.total_cmp(&b.damage)));
            let mut kept: Vec<Way> = Vec::new();
            // The most promising way, finished greedily, is often better than the best solution so far.
            let (mut promise, mut promising) = (f64::INFINITY, None);
            for way in next {
                if kept.last().is_some_and(|last| way.damage >= last.damage) {
                    continue;
                }
                let bound = way.damage + rest.bound(budget - way.bytes);
                if bound < least {
                    if bound < promise {
                        (promise, promising) = (bound, Some(kept.len()));
                    }
                    kept.push(way);
                }
            }
            history.push(kept);
            let Some(promising) = promising else { break };
            let way = history[layer + 1][promising];
            let (damage, places) = rest.greedy(budget - way.bytes, layer + 1, count);
            if way.damage + damage < least {
                least = way.damage + damage;
                best = trace(&history, layer + 1, promising);
                best.extend(places);
            }
        }
        Some(best.iter().zip(self.layers).map(|(&place, frontier)| frontier[place].index).collect())
    }
}

/// The places of the first `settled` layers on the way that stands at `at` among `history[settled]`.
fn trace(history: &[Vec<Way>], settled: usize, mut at: usize) -> Vec<usize> {
    let mut places = vec![0; settled];
    for layer in (0..settled).rev() {
        let way = history[layer + 1][at];
        (places[layer], at) = (way.place as usize, way.before as usize);
    }
    places
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    /// A whole number below `end`.
    fn below(random: &mut ChaCha8Rng, end: u64) -> u64 {
        random.next_u64() % end
    }

    fn unit(random: &mut ChaCha8Rng) -> f64 {
        random.next_u64() as f64 / u64::MAX as f64
    }

    /// The least damage of all combinations that fit.
    fn brute_force(layers: &[Vec<Choice>], budget: u64) -> Option<f64> {
        let Some((first, rest)) = layers.split_first() else { return Some(0.0) };
        let fit = first.iter().filter(|choice| choice.bytes <= budget);
        fit.filter_map(|choice| Some(choice.damage + brute_force(rest, budget - choice.bytes)?)).reduce(f64::min)
    }

    fn sums(layers: &[Vec<Choice>], allocation: &Allocation) -> (u64, f64) {
        let chosen = || allocation.choices.iter().zip(layers).map(|(&choice, layer)| layer[choice]);
        (chosen().map(|c| c.bytes).sum(), chosen().map(|c| c.damage).sum())
    }

    #[test]
    fn nothing_beats_it_and_the_budget_holds() {
        let mut random = ChaCha8Rng::seed_from_u64(7);
        let (mut solved, mut impossible) = (0, 0);
        for case in 0..2000 {
            let layers: Vec<Vec<Choice>> = (0..below(&mut random, 7))
                .map(|_| {
                    let choices = 1 + below(&mut random, 5);
                    let choice = |random: &mut ChaCha8Rng| {
                        // Some cases with many ties, some with damages below zero.
                        let damage = match case % 3 {
                            0 => below(random, 6) as f64,
                            1 => unit(random) - 0.3,
                            _ => unit(random).powi(6) * 1e-3,
                        };
                        Choice { bytes: below(random, 30), damage }
                    };
                    (0..choices).map(|_| choice(&mut random)).collect()
                })
                .collect();
            let budget = below(&mut random, 90);
            let found = allocate(&layers, budget).unwrap();
            let best = brute_force(&layers, budget);
            match (&found, best) {
                (None, None) => impossible += 1,
                (Some(found), Some(best)) => {
                    solved += 1;
                    assert_eq!(sums(&layers, found), (found.bytes, found.damage));
                    assert!(found.bytes <= budget, "{found:?} in {budget}");
                    assert!(
                        (found.damage - best).abs() < 1e-12,
                        "{} is not {best}: {layers:?} in {budget}",
                        found.damage
                    );
                }
                _ => panic!("{found:?}, but the best is {best:?}: {layers:?} in {budget}"),
            }
        }
        assert!(solved > 1000 && impossible > 50, "{solved} {impossible}");
    }

    /// Layers as Stable Diffusion 1.5 has them (282 in a few dozen sizes), errors that fall fourfold a bit, up to chance.
    #[test]
    fn a_network_takes_no_time() {
        let mut random = ChaCha8Rng::seed_from_u64(3);
        let elements = [2880u64, 11_520, 102_400, 409_600, 921_600, 1_638_400, 3_686_400, 6_553_600, 14_745_600];
        let layers: Vec<Vec<Choice>> = (0..282)
            .map(|i| {
                let n = elements[i % 9] + 320 * below(&mut random, 40);
                let size = (unit(&mut random) * 8.0 - 10.0).exp();
                let choice = |bits: u32| {
                    let chance = 1.0 + 0.3 * unit(&mut random);
                    let bytes = n * u64::from(bits) / 8 + (2 << bits);
                    Choice { bytes, damage: size * chance * 0.25f64.powi(bits as i32) }
                };
                [1, 2, 3, 4, 6, 8].map(choice).to_vec()
            })
            .collect();
        let largest: u64 = layers.iter().map(|choices| choices[5].bytes).sum();
        for share in [0.15, 0.2, 0.3, 0.31, 0.5, 0.7, 0.9] {
            let budget = (largest as f64 * share) as u64;
            let start = std::time::Instant::now();
            let found = allocate(&layers, budget).unwrap().expect("1 bit takes an eighth");
            assert!(found.bytes <= budget);
            assert!(budget - found.bytes < budget / 1000, "{} bytes of {budget} are left", budget - found.bytes);
            assert!(start.elapsed().as_secs() < 20, "{:?} for {share}", start.elapsed());
            // No single change that fits is for the better.
            for (choices, &chosen) in layers.iter().zip(&found.choices) {
                let chosen = choices[chosen];
                let better = |c: &&Choice| c.damage < chosen.damage && found.bytes - chosen.bytes + c.bytes <= budget;
                assert_eq!(choices.iter().find(better), None);
            }
        }
    }

    #[test]
    fn what_is_no_table_is_refused() {
        let choice = |bytes, damage| Choice { bytes, damage };
        assert!(allocate(&[vec![]], 5).is_err());
        assert!(allocate(&[vec![choice(1, f64::NAN)]], 5).is_err());
        assert!(allocate(&[vec![choice(u64::MAX, 0.0)], vec![choice(1, 0.0)]], 5).is_err());
        assert_eq!(allocate(&[vec![choice(6, 0.0)]], 5).unwrap(), None);
        let nothing = Allocation { choices: vec![], bytes: 0, damage: 0.0 };
        assert_eq!(allocate(&[], 0).unwrap(), Some(nothing));
    }
}
