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
    assert!((1..=8).contains(&bits), "indices have 1 to 8 bits, not {bits}");
    let mask = ((1u32 << bits) - 1) as u8;
    // Eight indices fill `bits` bytes exactly, so every block starts on a byte.
    let mut packed = Vec::with_capacity(packed_len(indices.len(), bits).unwrap_or(0));
    for block in indices.chunks(8) {
        let stream = block.iter().enumerate().fold(0u64, |s, (i, &v)| s | ((v & mask) as u64) << (i as u32 * bits));
        packed.extend_from_slice(&stream.to_le_bytes()[..(block.len() * bits as usize).div_ceil(8)]);
    }
    packed
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
