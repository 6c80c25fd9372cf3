//! The arithmetic of compressed constants: blocks of a tensor that share a table or a scale, and table look-ups.

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;

use super::constant::Elements;
use super::types::TensorType;

/// Length of a block along each axis, when `shape` is cut into `blocks` equal parts an axis.
pub fn block_sizes(shape: &[i64], blocks: &[i64]) -> Result<Vec<i64>> {
    ensure!(shape.len() == blocks.len(), "blocks of {blocks:?} for a shape {shape:?}");
    let sizes = shape.iter().zip(blocks);
    sizes
        .map(|(size, count)| {
            ensure!(size % count == 0, "a shape {shape:?} cannot be cut into blocks of {blocks:?}");
            Ok(size / count)
        })
        .collect()
}

/// The number of the block that each element lies in, all row-major; `None` where there is one block.
pub fn block_numbers(shape: &[i64], blocks: &[i64]) -> Result<Option<Vec<u32>>> {
    let sizes = block_sizes(shape, blocks)?;
    if blocks.iter().all(|&count| count == 1) {
        return Ok(None);
    }
    u32::try_from(blocks.iter().product::<i64>()).context("too many blocks")?;
    let mut numbers = vec![0u32];
    for ((&size, &count), length) in shape.iter().zip(blocks).zip(sizes) {
        let along: Vec<u32> = (0..size).map(|at| (at / length) as u32).collect();
        numbers = numbers.iter().flat_map(|&number| along.iter().map(move |at| number * count as u32 + at)).collect();
    }
    Ok(Some(numbers))
}

/// Splits the shape of a table `[blocks…, entries, vector]` for indices of rank K.
pub fn table<'a>(indices: &TensorType, lut: &'a TensorType) -> Result<(&'a [i64], i64, i64)> {
    match &lut.shape[..] {
        [groups @ .., entries, vector] if groups.len() == indices.rank() && !groups.is_empty() => {
            Ok((groups, *entries, *vector))
        }
        _ => bail!("lut is {lut}; for indices of {indices} its rank must be {}", indices.rank() + 2),
    }
}

/// Elements after `axis`.
pub fn inner_size(shape: &[i64], axis: usize) -> usize {
    shape[axis + 1..].iter().product::<i64>() as usize
}

/// Elements of one table; every number must be that of an entry.
pub fn look_up(table: &Elements, numbers: &[u8]) -> Result<Elements> {
    fn of<T: Copy + Send + Sync>(table: &[T], numbers: &[u8]) -> Vec<T> {
        numbers.par_iter().with_min_len(1 << 16).map(|&number| table[usize::from(number)]).collect()
    }
    Ok(match table {
        Elements::Floats(table) => Elements::Floats(of(table, numbers)),
        Elements::Small(table) => Elements::Small(of(table, numbers)),
        Elements::Ints(table) => Elements::Ints(of(table, numbers)),
        Elements::Bools(_) | Elements::Strings(_) => bail!("a table holds no numbers"),
    })
}

/// Elements of a table at positions; none gives 0. Positions must lie inside.
pub fn pick(table: &Elements, positions: impl Iterator<Item = Option<usize>>) -> Result<Elements> {
    fn of<T: Copy + Default>(table: &[T], positions: impl Iterator<Item = Option<usize>>) -> Vec<T> {
        positions.map(|at| at.map_or(T::default(), |at| table[at])).collect()
    }
    Ok(match table {
        Elements::Floats(table) => Elements::Floats(of(table, positions)),
        Elements::Small(table) => Elements::Small(of(table, positions)),
        Elements::Ints(table) => Elements::Ints(of(table, positions)),
        Elements::Bools(_) | Elements::Strings(_) => bail!("a table holds no numbers"),
    })
}

/// `dense[…, p·v + c, …] = lut[block(i), index(i), c]`, where position i of the indices is p on `axis`, and v the
/// length of the vectors.
pub fn by_tables(
    indices: &TensorType,
    numbers: &[u8],
    lut: &TensorType,
    entries_of_all: &Elements,
    axis: usize,
) -> Result<Elements> {
    let (groups, entries, vector) = table(indices, lut)?;
    let blocks = block_numbers(&indices.shape, groups)?;
    if vector == 1 && blocks.is_none() {
        return look_up(entries_of_all, numbers);
    }
    let (entries, vector, inner) = (entries as usize, vector as usize, inner_size(&indices.shape, axis));
    let entry = |position: usize| {
        blocks.as_ref().map_or(0, |blocks| blocks[position] as usize) * entries + usize::from(numbers[position])
    };
    if vector == 1 {
        return pick(entries_of_all, (0..numbers.len()).map(|position| Some(entry(position))));
    }
    let dense = (0..numbers.len() * vector).map(|at| {
        let (outer, component, inside) = (at / inner / vector, at / inner % vector, at % inner);
        Some(entry(outer * inner + inside) * vector + component)
    });
    pick(entries_of_all, dense)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coreml::reading::types::DataType;

    #[test]
    fn blocks_are_numbered_row_major() {
        assert_eq!(block_numbers(&[4, 2], &[2, 1]).unwrap().unwrap(), [0, 0, 0, 0, 1, 1, 1, 1]);
        assert_eq!(block_numbers(&[2, 4], &[2, 2]).unwrap().unwrap(), [0, 0, 1, 1, 2, 2, 3, 3]);
        assert_eq!(block_numbers(&[2, 4], &[1, 1]).unwrap(), None);
        assert!(block_numbers(&[3], &[2]).is_err());
    }

    #[test]
    fn vectors_unfold_along_their_axis() {
        // 2 rows of 2 indices, one table of 2 vectors of 2.
        let indices = TensorType::new(DataType::Uint1, vec![2, 2]).unwrap();
        let lut = TensorType::new(DataType::Float32, vec![1, 1, 2, 2]).unwrap();
        let entries = Elements::Floats(vec![1., 2., 3., 4.]);
        let dense = by_tables(&indices, &[0, 1, 1, 0], &lut, &entries, 0).unwrap();
        assert_eq!(dense, Elements::Floats(vec![1., 3., 2., 4., 3., 1., 4., 2.]));
        let dense = by_tables(&indices, &[0, 1, 1, 0], &lut, &entries, 1).unwrap();
        assert_eq!(dense, Elements::Floats(vec![1., 2., 3., 4., 3., 4., 1., 2.]));
    }
}
