//! How the weights of many layers lie before the kernels: segments, tiles, bins, and the tables on the device.

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};

use super::kernels::{Layer, Pass, Passes, Plain, Plan, Segment, Step, Tile, bytes};
use super::member::{Identity, Member};
use crate::palette::Code;

/// Weights that a block takes at a time.
const TILE: u64 = 1 << 15;
/// Numbers of scratch that a block has for each bin.
const SCRATCH: i64 = 5;
/// As many steps a weight is at most: `MOST_STEPS` of the kernels.
const MOST_STEPS: f64 = 32_766.0;
/// Steps from zero to where bins begin are a multiple of it: `LANES` of the kernels.
const LANES: f64 = 256.0;

/// Everything that stays from step to step.
pub struct Layout {
    device: Device,
    iterations: usize,
    /// Of all that wanted to be in.
    identities: Vec<Identity>,
    /// Whether each of them is in; the others have weights so far out that only f16 sees them all.
    pub taken: Vec<bool>,
    segments: Vec<Segment>,
    /// Of each segment the step that its layer asked for.
    wanted: Vec<f32>,
    tiles: Vec<Tile>,
    /// Of each layer that is in, its first segment and the one after its last.
    pub of_layers: Vec<(usize, usize)>,
    next_bin: u64,
    on_device: Tables,
    /// Whether the counts are those of the weights.
    pub counted: bool,
}

struct Tables {
    segments: Tensor,
    layers: Tensor,
    tiles: Tensor,
    counts: Tensor,
    cells: Tensor,
    entries: Tensor,
    trail: Tensor,
    scratch: Tensor,
    temperatures: Tensor,
    gradients: Tensor,
    steps: Tensor,
    extents: Tensor,
    gradient_extents: Tensor,
    escaped: Tensor,
    /// `[2, segments]`: squares, then errors.
    status: Tensor,
}

/// What a layer asks a group's weights to be seen through, as multiples of what.
fn wanted_step(member: &Member, group: usize, rho: f64) -> f32 {
    match member.layer.code(group, rho) {
        Code::Fixed { step } => step,
        // Not asked for by those that may be members: `DkmLayer::is_for_batches`.
        Code::F16 => f32::INFINITY,
    }
}

/// The step that holds weights as large as `most`; none if that would be too coarse.
fn step_holding(wanted: f32, most: f32) -> Option<f32> {
    match (Code::Fixed { step: wanted }).holding(most) {
        Code::Fixed { step } if step.is_finite() => Some(step),
        _ => None,
    }
}

/// The first bin's multiple of `step`, and how many bins there are, for weights as large as `reach`.
fn bins_within(reach: f64, step: f32) -> (i32, u32) {
    let steps = ((reach / f64::from(step) + 1.0) / LANES).ceil() * LANES;
    (-(steps as i32), 2 * steps as u32)
}

/// As far weights may go until bins are laid out anew, where now they are as large as `most`.
fn reach_for(most: f32, step: f32) -> f64 {
    let (most, step) = (f64::from(most), f64::from(step));
    (most + (most / 8.0).max(32.0 * step)).min((MOST_STEPS + 1.0) * step)
}

/// So many bits have integers of which `count` are less than 2⁶² together.
fn bits_for(count: u64) -> i32 {
    62 - (64 - count.saturating_sub(1).leading_zeros() as i32)
}

fn empty(count: usize, kind: Kind, device: Device) -> Result<Tensor> {
    Ok(Tensor::f_zeros([count.max(1) as i64], (kind, device))?)
}

fn upload<T: Plain>(values: &[T], device: Device) -> Result<Tensor> {
    Ok(Tensor::f_from_slice(bytes(values))?.f_to_device(device)?)
}

/// Puts `values` where others of as many were.
fn replace<T: Plain>(values: &[T], at: &mut Tensor) -> Result<()> {
    let bytes = Tensor::f_from_slice(bytes(values))?;
    Ok(at.f_view_dtype(Kind::Uint8)?.f_copy_(&bytes)?)
}

fn address(tensor: &Tensor) -> u64 {
    tensor.data_ptr() as u64
}

impl Layout {
    /// Lays `members` out. The entries of those that are in move to the device: the layers find them there.
    ///
    /// # Errors
    /// A weight is not finite; names the layer. The device is out of memory.
    pub fn new(members: &mut [Member], rho: f64, iterations: usize, passes: &Passes) -> Result<Self> {
        let device = members.first().context("there are no layers")?.weight.device();
        let largest = largest_magnitudes(members, device, passes)?;
        let wanted = |member: &Member, of_groups: &[f32]| -> Vec<(f32, f32)> {
            of_groups.iter().enumerate().map(|(group, &most)| (wanted_step(member, group, rho), most)).collect()
        };
        let wanted: Vec<_> = members.iter().zip(&largest).map(|(member, most)| wanted(member, most)).collect();
        let fits = |of_layer: &Vec<(f32, f32)>| of_layer.iter().all(|&(step, most)| step_holding(step, most).is_some());
        let taken: Vec<bool> = wanted.iter().map(fits).collect();
        let identities = members.iter().map(Member::identity).collect();

        let (mut segments, mut entries) = (Vec::new(), Vec::new());
        let (mut of_layers, mut layers, mut kept) = (Vec::new(), Vec::new(), Vec::new());
        for ((member, wanted), _) in members.iter_mut().zip(wanted).zip(&taken).filter(|(_, taken)| **taken) {
            let from = segments.len();
            let table = member.layer.form.table();
            let count = member.weight.numel() as u64 / wanted.len() as u64;
            let ascending = member.layer.ascending_entries()?;
            for (group, &(step, most)) in wanted.iter().enumerate() {
                let step = step_holding(step, most).unwrap_or(step);
                let (low, bins) = bins_within(reach_for(most, step), step);
                let (entry, entries, layer) =
                    ((entries.len() + group * table) as u32, table as u32, layers.len() as u32);
                let (bits, per_step) = (bits_for(count), 1.0 / step);
                segments.push(Segment { count, bin: 0, entry, entries, layer, low, bins, step, per_step, bits });
            }
            kept.extend(wanted.into_iter().map(|(step, _)| step));
            entries.extend(ascending);
            of_layers.push((from, segments.len()));
            layers.push(member.addresses());
        }
        let tiles = tiles_of(&segments, &of_layers);
        let (count, entry_count) = (segments.len(), entries.len());
        let on_device = Tables {
            layers: upload(&layers, device)?,
            tiles: upload(&tiles, device)?,
            segments: empty(count * size_of::<Segment>(), Kind::Uint8, device)?,
            counts: empty(0, Kind::Int, device)?,
            cells: empty(0, Kind::Int64, device)?,
            entries: Tensor::f_from_slice(&entries)?.f_to_device(device)?,
            trail: empty(entry_count * (3 * iterations + 1), Kind::Double, device)?,
            scratch: empty(0, Kind::Double, device)?,
            temperatures: empty(count, Kind::Double, device)?,
            gradients: empty(layers.len(), Kind::Int64, device)?,
            steps: empty(layers.len() * size_of::<Step>(), Kind::Uint8, device)?,
            extents: empty(0, Kind::Int, device)?,
            gradient_extents: empty(count, Kind::Int, device)?,
            escaped: empty(count, Kind::Int, device)?,
            status: empty(2 * count, Kind::Double, device)?,
        };
        let mut layout = Self {
            device,
            iterations,
            identities,
            taken,
            segments,
            wanted: kept,
            tiles,
            of_layers,
            next_bin: 0,
            on_device,
            counted: false,
        };
        let mut at = 0;
        for (member, _) in members.iter_mut().zip(&layout.taken).filter(|(_, taken)| **taken) {
            let length = (member.layer.form.table() * member.layer.groups()) as i64;
            member.layer.moved_to(layout.on_device.entries.f_narrow(0, at, length)?);
            at += length;
        }
        layout.place_all(passes)?;
        Ok(layout)
    }

    /// Whether it is still that of `members`.
    pub fn is_of(&self, members: &[Member], iterations: usize) -> bool {
        self.iterations == iterations
            && self.identities.len() == members.len()
            && self.identities.iter().zip(members).all(|(identity, member)| *identity == member.identity())
            && members.iter().zip(&self.taken).all(|(member, &taken)| member.layer.has_moved() == taken)
    }

    /// Follows the temperature: where another step is asked for, the weights of a segment are counted anew. `false` where all
    /// is to be laid out anew, since the largest weights may need a coarser one.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn follow(&mut self, members: &[Member], rho: f64, passes: &Passes) -> Result<bool> {
        let mut changed = vec![false; self.segments.len()];
        let inside = members.iter().zip(&self.taken).filter(|(_, taken)| **taken).map(|(member, _)| member);
        for (member, &(from, to)) in inside.zip(&self.of_layers) {
            let of_layer =
                self.segments[from..to].iter_mut().zip(&mut self.wanted[from..to]).zip(&mut changed[from..to]);
            for (group, ((one, wanted), changed)) in of_layer.enumerate() {
                let step = wanted_step(member, group, rho);
                if step == *wanted {
                    continue;
                }
                // Where there are bins now.
                let reach = f64::from(-one.low) * f64::from(one.step);
                if reach > MOST_STEPS * f64::from(step) {
                    return Ok(false);
                }
                let (low, bins) = bins_within(reach, step);
                (one.low, one.bins, one.step, one.per_step) = (low, bins, step, 1.0 / step);
                // In bins that nobody has used, of which the counts are zero.
                one.bin = self.next_bin;
                self.next_bin += u64::from(bins);
                (*wanted, *changed) = (step, true);
            }
        }
        if !self.counted || self.next_bin > self.on_device.counts.numel() as u64 {
            self.place_all(passes)?;
        } else if changed.contains(&true) {
            self.replace_segments(passes)?;
            let tiles = self.tiles.iter().copied().filter(|tile| changed[tile.segment as usize]);
            let tiles: Vec<Tile> = tiles.collect();
            let on_device = upload(&tiles, self.device)?;
            let plan = Plan { tiles: address(&on_device), tile_count: tiles.len() as u32, ..self.plan() };
            // SAFETY: `plan` is of tables that live; these tiles too, until the kernel is queued.
            unsafe { passes.launch(Pass::Count, &plan)? };
        }
        Ok(true)
    }

    /// Gives each segment its bins, with room for others after them, and counts all weights.
    fn place_all(&mut self, passes: &Passes) -> Result<()> {
        self.next_bin = 0;
        for segment in &mut self.segments {
            segment.bin = self.next_bin;
            self.next_bin += u64::from(segment.bins);
        }
        let room = (self.next_bin + self.next_bin / 2) as usize;
        // The old ones go first.
        self.on_device.counts = Tensor::new();
        self.on_device.cells = Tensor::new();
        self.on_device.counts = empty(room, Kind::Int, self.device)?;
        self.on_device.cells = empty(2 * room, Kind::Int64, self.device)?;
        let _ = self.on_device.escaped.f_zero_()?;
        self.replace_segments(passes)?;
        // SAFETY: `plan` is of tables that live.
        unsafe { passes.launch(Pass::Count, &self.plan())? };
        self.counted = true;
        Ok(())
    }

    fn replace_segments(&mut self, passes: &Passes) -> Result<()> {
        replace(&self.segments, &mut self.on_device.segments)?;
        let most = self.segments.iter().map(|segment| i64::from(segment.bins)).max().unwrap_or(1);
        let blocks = i64::from(passes.segment_blocks()).min(self.segments.len().max(1) as i64);
        if self.on_device.scratch.numel() < (SCRATCH * blocks * most) as usize {
            self.on_device.scratch = Tensor::new();
            self.on_device.scratch = empty((SCRATCH * blocks * most) as usize, Kind::Double, self.device)?;
        }
        Ok(())
    }

    /// Whether the largest weights must be looked at again: the last counts found some that are in no bin, or some are seen
    /// through a coarser step than asked for. Waits for the device.
    ///
    /// # Errors
    /// An error of the device.
    pub fn is_outgrown(&self) -> Result<bool> {
        if self.segments.iter().zip(&self.wanted).any(|(segment, wanted)| segment.step != *wanted) {
            return Ok(true);
        }
        let escaped = self.on_device.escaped.f_to_device(Device::Cpu)?;
        Ok(Vec::<i32>::try_from(escaped)?.iter().any(|&number| number != 0))
    }

    /// Puts the temperature of each segment on the device.
    ///
    /// # Errors
    /// An error of the device.
    pub fn set_temperatures(&mut self, members: &[Member], rho: f64) -> Result<()> {
        let inside = members.iter().zip(&self.taken).filter(|(_, taken)| **taken).map(|(member, _)| member);
        let temperatures: Vec<f64> = inside
            .flat_map(|member| (0..member.layer.groups()).map(|group| member.layer.temperature(group, rho)))
            .collect();
        replace(&temperatures, &mut self.on_device.temperatures)
    }

    /// Puts the address of each layer's gradient on the device, 0 where there is none.
    ///
    /// # Errors
    /// One does not fit its layer.
    pub fn set_gradients(&mut self, gradients: &[Option<Tensor>]) -> Result<()> {
        ensure!(
            gradients.len() == self.of_layers.len(),
            "{} gradients for {} layers",
            gradients.len(),
            self.of_layers.len()
        );
        let addresses: Vec<u64> = gradients.iter().map(|one| one.as_ref().map_or(0, address)).collect();
        replace(&addresses, &mut self.on_device.gradients)
    }

    /// Puts the numbers of each layer's step on the device.
    ///
    /// # Errors
    /// There are not as many as layers.
    pub fn set_steps(&mut self, steps: &[Step]) -> Result<()> {
        ensure!(steps.len() == self.of_layers.len(), "{} steps for {} layers", steps.len(), self.of_layers.len());
        replace(steps, &mut self.on_device.steps)
    }

    /// Σ (∂L/∂w)² of each segment, and its mean squared distance to the nearest entry. Waits for the device.
    ///
    /// # Errors
    /// An error of the device.
    pub fn status(&self) -> Result<(Vec<f64>, Vec<f64>)> {
        let mut squares = Vec::<f64>::try_from(self.on_device.status.f_to_device(Device::Cpu)?)?;
        let errors = squares.split_off(self.segments.len());
        Ok((squares, errors))
    }

    /// What kernels are given.
    pub fn plan(&self) -> Plan {
        let tables = &self.on_device;
        Plan {
            segments: address(&tables.segments),
            layers: address(&tables.layers),
            tiles: address(&tables.tiles),
            counts: address(&tables.counts),
            cells: address(&tables.cells),
            entries: address(&tables.entries),
            trail: address(&tables.trail),
            scratch: address(&tables.scratch),
            temperatures: address(&tables.temperatures),
            gradients: address(&tables.gradients),
            steps: address(&tables.steps),
            extents: address(&tables.extents),
            gradient_extents: address(&tables.gradient_extents),
            escaped: address(&tables.escaped),
            squares: address(&tables.status),
            errors: address(&tables.status) + 8 * self.segments.len() as u64,
            cell_count: self.next_bin,
            scratch_bins: self.segments.iter().map(|segment| u64::from(segment.bins)).max().unwrap_or(0),
            tile_count: self.tiles.len() as u32,
            segment_count: self.segments.len() as u32,
            iterations: self.iterations as u32,
            unused: 0,
        }
    }
}

fn tiles_of(segments: &[Segment], of_layers: &[(usize, usize)]) -> Vec<Tile> {
    let mut tiles = Vec::new();
    for (segment, one) in segments.iter().enumerate() {
        let first = (segment - of_layers[one.layer as usize].0) as u64 * one.count;
        let end = first + one.count;
        let starts = (first..end).step_by(TILE as usize);
        tiles.extend(starts.map(|from| Tile { from, to: end.min(from + TILE), segment: segment as u32, unused: 0 }));
    }
    tiles
}

/// Of each group of each member. Waits for the device.
fn largest_magnitudes(members: &[Member], device: Device, passes: &Passes) -> Result<Vec<Vec<f32>>> {
    let (mut segments, mut of_layers) = (Vec::new(), Vec::new());
    for (layer, member) in members.iter().enumerate() {
        let (from, groups) = (segments.len(), member.layer.groups());
        let count = member.weight.numel() as u64 / groups as u64;
        let (layer, step) = (layer as u32, 1.0);
        let one =
            Segment { count, bin: 0, entry: 0, entries: 0, layer, low: 0, bins: 0, step, per_step: step, bits: 0 };
        segments.extend(vec![one; groups]);
        of_layers.push((from, segments.len()));
    }
    let tiles = tiles_of(&segments, &of_layers);
    let layers: Vec<Layer> = members.iter().map(Member::addresses).collect();
    let (on_device, layers, extents) =
        (upload(&segments, device)?, upload(&layers, device)?, empty(2 * segments.len(), Kind::Int, device)?);
    let tiles_on_device = upload(&tiles, device)?;
    let plan = Plan {
        segments: address(&on_device),
        layers: address(&layers),
        tiles: address(&tiles_on_device),
        extents: address(&extents),
        tile_count: tiles.len() as u32,
        segment_count: segments.len() as u32,
        ..Plan::default()
    };
    // SAFETY: `plan` names tensors that live until the kernel is queued, all that this kernel uses.
    unsafe { passes.launch(Pass::Extent, &plan)? };
    let extents = Vec::<i32>::try_from(extents.f_to_device(Device::Cpu)?)?;
    for (member, &(from, to)) in members.iter().zip(&of_layers) {
        let bad = extents[2 * from..2 * to].chunks(2).map(|extent| i64::from(extent[1])).find(|&bad| bad != 0);
        let name = &member.layer.name;
        ensure!(
            bad.is_none(),
            "parameter {name}: {} of its values are infinite or not numbers",
            bad.unwrap_or_default()
        );
    }
    let largest = |&(from, to): &(usize, usize)| {
        extents[2 * from..2 * to].chunks(2).map(|extent| f32::from_bits(extent[0] as u32)).collect()
    };
    Ok(of_layers.iter().map(largest).collect())
}
