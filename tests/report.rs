//! Event files, decoded here from their bytes and by the real TensorBoard where there is one.

use std::path::{Path, PathBuf};

use image::{Rgb, RgbImage};
use palettist::report::TensorBoard;

/// CRC-32C (Castagnoli), bit by bit, masked as TFRecord files have it.
fn masked_crc32c(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    (!crc).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The records of an event file; panics on a wrong length or checksum.
fn records(path: &Path) -> Vec<Vec<u8>> {
    let bytes = std::fs::read(path).unwrap();
    let mut rest = &bytes[..];
    let mut records = Vec::new();
    while !rest.is_empty() {
        let (length, crc) = (&rest[..8], &rest[8..12]);
        assert_eq!(masked_crc32c(length).to_le_bytes(), crc, "checksum of a length");
        let end = 12 + u64::from_le_bytes(length.try_into().unwrap()) as usize;
        let record = rest[12..end].to_vec();
        assert_eq!(masked_crc32c(&record).to_le_bytes(), rest[end..end + 4], "checksum of a record");
        records.push(record);
        rest = &rest[end + 4..];
    }
    records
}

fn event_files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

fn holds(record: &[u8], part: &[u8]) -> bool {
    record.windows(part.len()).any(|window| window == part)
}

fn write_and_resume(folder: &Path) {
    let mut board = TensorBoard::open(folder, 0).unwrap();
    for step in 1..=30u32 {
        board.scalar("loss", f64::from(step) / 100.0, step.into());
    }
    board.picture("samples", &RgbImage::from_pixel(16, 8, Rgb([9, 8, 7])), 30);
    drop(board);
    let mut board = TensorBoard::open(folder, 20).unwrap();
    for step in 21..=25 {
        board.scalar("loss", 1.0, step);
    }
    board.flush();
}

#[test]
fn event_files_are_well_formed_and_images_have_their_own_width() {
    let folder = tempfile::tempdir().unwrap();
    write_and_resume(folder.path());
    let files = event_files(folder.path());
    assert_eq!(files.len(), 3, "{files:?}");
    let counts: Vec<usize> = files.iter().map(|file| records(file).len()).collect();
    assert_eq!(counts, [1 + 30 + 1, 2, 1 + 5]);
    let first = records(&files[0]);
    assert!(holds(&first[0], b"brain.Event:2"));
    // Summary.Value: 2 simple_value (fixed32), after 1 tag.
    assert!(holds(&first[5], &[b"loss\x15".as_slice(), &0.05f32.to_le_bytes()].concat()));
    // Summary.Image: 1 height, 2 width, 3 colorspace.
    assert!(holds(first.last().unwrap(), &[0x08, 8, 0x10, 16, 0x18, 3]));
}

#[test]
fn writers_of_one_second_do_not_truncate_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let mut boards: Vec<TensorBoard> = (0..4).map(|_| TensorBoard::open(folder.path(), 0).unwrap()).collect();
    for (i, board) in boards.iter_mut().enumerate() {
        board.scalar("loss", i as f64, 1);
    }
    let mut paths: Vec<PathBuf> = boards.iter().map(|board| board.path().to_path_buf()).collect();
    drop(boards);
    paths.dedup();
    assert_eq!(paths.len(), 4);
    assert!(paths.iter().all(|file| records(file).len() == 2));
}

/// What TensorBoard itself shows: the killed run's steps 21 to 30 are gone, the picture is 16 × 8.
#[test]
fn tensorboard_reads_what_a_resumed_run_wrote() {
    let Ok(python) = std::env::var("PALETTIST_PYTHON") else {
        eprintln!("skipped: PALETTIST_PYTHON names no Python that has TensorBoard");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    write_and_resume(folder.path());
    let script = "
import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1], size_guidance={'scalars': 0, 'images': 0})
events.Reload()
print([(e.step, round(e.value, 4)) for e in events.Scalars('loss')])
print(events.Tags()['images'], [(e.step, e.width, e.height) for e in events.Images('samples')] if events.Tags()['images'] else [])
";
    let read = |folder: &Path| {
        let output = std::process::Command::new(&python).args(["-c", script]).arg(folder).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let mut expected: Vec<String> = (1..=20).map(|step| format!("({step}, {})", f64::from(step) / 100.0)).collect();
    expected.extend((21..=25).map(|step| format!("({step}, 1.0)")));
    let text = read(folder.path());
    assert_eq!(text.lines().next().unwrap(), format!("[{}]", expected.join(", ")));
    // Before the resumption the picture of step 30 is there.
    for file in &event_files(folder.path())[1..] {
        std::fs::remove_file(file).unwrap();
    }
    assert_eq!(read(folder.path()).lines().nth(1).unwrap(), "['samples'] [(30, 16, 8)]");
}
