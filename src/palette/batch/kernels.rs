//! The kernels of `kernels.cu`, and what they are given: structures that are laid out as the source has them.

use anyhow::Result;

use crate::cuda::{Kernel, Kernels};
use crate::palette::AdamWStep;

const SOURCE: &str = include_str!("kernels.cu");
/// Threads of a block.
const LANES: u32 = 256;

/// Weights that share a palette.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Segment {
    /// Weights.
    pub count: u64,
    /// Its first bin.
    pub bin: u64,
    /// Its first entry.
    pub entry: u32,
    /// Entries of its palette.
    pub entries: u32,
    pub layer: u32,
    /// The first bin stands for this multiple of the step.
    pub low: i32,
    pub bins: u32,
    pub step: f32,
    pub per_step: f32,
    /// Of integers that as many can be added as there are weights, and stay below 2⁶².
    pub bits: i32,
}

/// Addresses of one layer's tensors on the device, of f32, or of bf16 where `brain` is 1.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Layer {
    pub weight: u64,
    pub soft: u64,
    pub exp_avg: u64,
    pub exp_avg_sq: u64,
    pub brain: u64,
}

/// Elements of a layer that one block takes at a time, all of one segment.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Tile {
    pub from: u64,
    pub to: u64,
    pub segment: u32,
    pub unused: u32,
}

/// [`AdamWStep`], with the key of random bits by which bf16 is rounded.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Step {
    constants: [f32; 8],
    key: u32,
    unused: u32,
}

impl Step {
    pub fn new(step: &AdamWStep, key: u32) -> Self {
        let AdamWStep { factor, decay, rate_of_mean, beta2, rate_of_square, size, root, eps } = *step;
        Self { constants: [factor, decay, rate_of_mean, beta2, rate_of_square, size, root, eps], key, unused: 0 }
    }
}

/// What every kernel takes: addresses on the device, and how much lies there.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Plan {
    pub segments: u64,
    pub layers: u64,
    pub tiles: u64,
    pub counts: u64,
    pub cells: u64,
    pub entries: u64,
    pub trail: u64,
    pub scratch: u64,
    pub temperatures: u64,
    pub gradients: u64,
    pub steps: u64,
    pub extents: u64,
    pub gradient_extents: u64,
    pub escaped: u64,
    pub squares: u64,
    pub errors: u64,
    pub cell_count: u64,
    pub scratch_bins: u64,
    pub tile_count: u32,
    pub segment_count: u32,
    pub iterations: u32,
    pub unused: u32,
}

const _: () = assert!(size_of::<Segment>() == 48 && size_of::<Layer>() == 40 && size_of::<Tile>() == 24);
const _: () = assert!(size_of::<Step>() == 40 && size_of::<Plan>() == 160);

/// Structures that go to the device byte by byte.
///
/// # Safety
/// `repr(C)`, without padding.
pub unsafe trait Plain: Copy {}
// SAFETY: fields fill them: 2·8 + 8·4, 5·8, 2·8 + 2·4, 10·4 and 8 bytes.
unsafe impl Plain for Segment {}
// SAFETY: as above.
unsafe impl Plain for Layer {}
// SAFETY: as above.
unsafe impl Plain for Tile {}
// SAFETY: as above.
unsafe impl Plain for Step {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: as above.
unsafe impl Plain for f64 {}

/// The bytes of some structures.
pub fn bytes<T: Plain>(of: &[T]) -> &[u8] {
    // SAFETY: initialized memory without padding, which a slice of bytes may share.
    unsafe { std::slice::from_raw_parts(of.as_ptr().cast(), size_of_val(of)) }
}

/// Which kernel: `kernels.cu` says what each does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    Extent,
    Count,
    Cluster,
    LookUp,
    GradientExtent,
    AddUp,
    WayBack,
    CombineAndStep,
}

impl Pass {
    const ALL: [(Self, &str); 8] = [
        (Self::Extent, "extent"),
        (Self::Count, "count"),
        (Self::Cluster, "cluster"),
        (Self::LookUp, "look_up"),
        (Self::GradientExtent, "gradient_extent"),
        (Self::AddUp, "add_up"),
        (Self::WayBack, "way_back"),
        (Self::CombineAndStep, "combine_and_step"),
    ];

    /// Whether its blocks take segments, rather than tiles.
    fn is_of_segments(self) -> bool {
        matches!(self, Self::Cluster | Self::WayBack)
    }
}

/// The kernels on one device.
pub struct Passes {
    kernels: Kernels,
    /// In the order of [`Pass::ALL`].
    loaded: Vec<Kernel>,
    blocks: Option<u32>,
}

impl Passes {
    /// On CUDA device `index`. Without `blocks` a launch has a few for each unit of the device.
    ///
    /// # Errors
    /// The kernels cannot be compiled or loaded.
    pub fn load(index: usize, blocks: Option<u32>) -> Result<Self> {
        let kernels = Kernels::load("kernels.cu", SOURCE, index)?;
        let loaded = Pass::ALL.iter().map(|(_, name)| kernels.get(name)).collect::<Result<_>>()?;
        Ok(Self { kernels, loaded, blocks })
    }

    /// The most blocks that take segments at once: each has scratch of its own.
    pub fn segment_blocks(&self) -> u32 {
        self.blocks.unwrap_or(2 * self.kernels.multiprocessors)
    }

    /// Queues a pass.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// `plan` is of this device, and all that it names lives there, as large as it says, until libtorch gives the memory to
    /// others in the order of its stream.
    pub unsafe fn launch(&self, pass: Pass, plan: &Plan) -> Result<()> {
        let (work, most) = match pass.is_of_segments() {
            true => (plan.segment_count, self.segment_blocks()),
            // Enough that memory is never waited for.
            false => (plan.tile_count, self.blocks.unwrap_or(8 * self.kernels.multiprocessors)),
        };
        let place = Pass::ALL.iter().position(|(one, _)| *one == pass).unwrap_or_default();
        // SAFETY: `Plan` is the kernels' own, field by field; the rest by the caller's promise.
        unsafe { self.kernels.launch(&self.loaded[place], work.min(most), LANES, plan) }
    }
}

/// The source, and the names of its kernels, for whoever compiles it elsewhere.
pub fn source() -> (&'static str, impl Iterator<Item = &'static str>) {
    (SOURCE, Pass::ALL.iter().map(|(_, name)| *name))
}
