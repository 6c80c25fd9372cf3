//! Indices of 1 to 8 bits as one stream of bits, least significant bit first: index `i` takes bits `i·n .. i·n + n`
//! of the stream, bit `k` of the stream is bit `k % 8` of byte `k / 8` (so 3- and 6-bit indices straddle bytes), and
//! what pads the last byte is zero. Core ML's own order, in both of its forms of palettized weights.

use anyhow::{Result, ensure};

/// Bytes that `count` indices of `bits` take; `None` where that is more than memory could hold.
pub fn packed_len(count: usize, bits: u32) -> Option<usize> {
    count.checked_mul(bits as usize).map(|n| n.div_ceil(8))
}

/// Packs `indices`, each below 2^`bits`; higher bits would be cut off.
///
/// # Panics
/// When `bits` is not in 1..=8.
pub fn pack(indices: &[u8], bits: u32) -> Vec<u8> {
    match bits {
        1 => pack_blocks::<1>(indices),
        2 => pack_blocks::<2>(indices),
        3 => pack_blocks::<3>(indices),
        4 => pack_blocks::<4>(indices),
        5 => pack_blocks::<5>(indices),
        6 => pack_blocks::<6>(indices),
        7 => pack_blocks::<7>(indices),
        8 => indices.to_vec(),
        _ => panic!("indices have 1 to 8 bits, not {bits}"),
    }
}

/// Eight indices fill N bytes exactly, so every block of them starts on a byte.
fn pack_blocks<const N: usize>(indices: &[u8]) -> Vec<u8> {
    let (blocks, rest) = indices.as_chunks::<8>();
    let mut packed = vec![0; (indices.len() * N).div_ceil(8)];
    let (whole, last) = packed.split_at_mut(blocks.len() * N);
    for (to, block) in whole.as_chunks_mut::<N>().0.iter_mut().zip(blocks) {
        to.copy_from_slice(&join::<N>(*block)[..N]);
    }
    let mut block = [0; 8];
    block[..rest.len()].copy_from_slice(rest);
    last.copy_from_slice(&join::<N>(block)[..last.len()]);
    packed
}

/// The low N bits of eight bytes, one behind the other: of bytes two and two, then of those pairs, then of those.
fn join<const N: usize>(bytes: [u8; 8]) -> [u8; 8] {
    const PAIRS: u64 = 0x00FF_00FF_00FF_00FF;
    const FOURS: u64 = 0x0000_FFFF_0000_FFFF;
    const EIGHT: u64 = 0x0000_0000_FFFF_FFFF;
    let x = u64::from_le_bytes(bytes) & (((1 << N) - 1) * 0x0101_0101_0101_0101);
    let x = x & PAIRS | (x & !PAIRS) >> (8 - N);
    let x = x & FOURS | (x & !FOURS) >> (16 - 2 * N);
    (x & EIGHT | (x & !EIGHT) >> (32 - 4 * N)).to_le_bytes()
}

/// The `count` indices in `packed`.
///
/// # Errors
/// When `bits` is not in 1..=8, when `packed` has not just the bytes that `count` indices take, or when the bits that
/// pad its last byte are not zero.
pub fn unpack(packed: &[u8], bits: u32, count: usize) -> Result<Vec<u8>> {
    ensure!((1..=8).contains(&bits), "indices have 1 to 8 bits, not {bits}");
    ensure!(
        packed_len(count, bits) == Some(packed.len()),
        "{count} indices of {bits} bits do not take {} bytes",
        packed.len()
    );
    let used = count * bits as usize % 8;
    ensure!(
        used == 0 || packed.last().is_none_or(|last| last >> used == 0),
        "the bits after the last of {count} indices of {bits} bits are not zero"
    );
    let mask = (1u64 << bits) - 1;
    let mut indices = Vec::with_capacity(count);
    for block in packed.chunks(bits as usize) {
        let mut bytes = [0; 8];
        bytes[..block.len()].copy_from_slice(block);
        let stream = u64::from_le_bytes(bytes);
        let here = (count - indices.len()).min(8);
        indices.extend((0..here as u32).map(|i| (stream >> (i * bits) & mask) as u8));
    }
    Ok(indices)
}
