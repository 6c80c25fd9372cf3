//! `coremldata.bin` of a compiled ML Program.
//!
//! ```text
//! u32 502 | u32 form | 20 bytes | u64 7, "generic" | u32 specification version | 28 bytes | u64 length, description
//! then for each function  u32 502 | 12 bytes
//! ```

use anyhow::{Context, Result, bail, ensure};

/// What the file says.
#[derive(Debug)]
pub struct About<'a> {
    pub specification_version: i32,
    /// The message `ModelDescription`.
    pub description: &'a [u8],
}

pub fn parse(bytes: &[u8]) -> Result<About<'_>> {
    let mut rest = bytes;
    let kind = number(&mut rest, 4)?;
    match kind {
        502 => {}
        202 => bail!("it is a pipeline of several models, which is not read"),
        other => bail!("it is a model of the kind {other}; ML Programs are of 502"),
    }
    take(&mut rest, 24)?;
    let name = text(&mut rest)?;
    ensure!(name == b"generic", "it is not a generic model");
    let version = number(&mut rest, 4)?;
    take(&mut rest, 28)?;
    let description = text(&mut rest)?;
    let functions = rest.chunks(16);
    let sound = |part: &[u8]| part.len() == 16 && part[..4] == 502u32.to_le_bytes();
    ensure!(functions.len() > 0 && functions.into_iter().all(sound), "what follows its description is damaged");
    let specification_version = i32::try_from(version).ok().context("its specification version is damaged")?;
    Ok(About { specification_version, description })
}

/// The next bytes.
fn take<'a>(rest: &mut &'a [u8], count: u64) -> Result<&'a [u8]> {
    let parts = usize::try_from(count).ok().and_then(|count| rest.split_at_checked(count));
    let (taken, left) = parts.context("it is cut off")?;
    *rest = left;
    Ok(taken)
}

fn number(rest: &mut &[u8], bytes: u64) -> Result<u64> {
    Ok(take(rest, bytes)?.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
}

/// Bytes with their number before them.
fn text<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8]> {
    let length = number(rest, 8)?;
    take(rest, length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_cut_or_longer_is_refused() {
        let mut file = [&[0xf6, 1, 0, 0, 5, 0, 0, 0][..], &[0; 20], &[7, 0, 0, 0, 0, 0, 0, 0], b"generic"].concat();
        file.extend(
            [&[7, 0, 0, 0][..], &[0; 28], &[2, 0, 0, 0, 0, 0, 0, 0], &[9, 9], &[0xf6, 1, 0, 0], &[0; 12]].concat(),
        );
        let about = parse(&file).unwrap();
        assert_eq!((about.specification_version, about.description), (7, &[9, 9][..]));
        for cut in 0..file.len() {
            assert!(parse(&file[..cut]).is_err(), "{cut}");
        }
        assert!(parse(&[&file[..], &[0]].concat()).is_err());
        file[75..83].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(format!("{:#}", parse(&file).unwrap_err()).contains("cut off"));
    }
}
