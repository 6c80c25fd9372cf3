//! TensorBoard event files, through tensorboard-rs.
//!
//! That crate's shortcomings, and what is done about them here:
//! * Width and height of an image are swapped in its metadata: both are set anew.
//! * The file's name has the time in seconds, so two writers in one folder truncate each other: each starts in a folder
//!   of its own, and its file is then moved to a name that nobody has.
//! * It panics when a write fails: panics end logging with one line, not the run.
//! * It has no way to say that a run went on from an earlier step: that event is written beside, in a file of its own,
//!   so that TensorBoard drops what a killed run had logged beyond its checkpoint.

use std::fs::{self, File};
use std::io::Write;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow, bail};
use image::RgbImage;
use tensorboard_rs::record_writer::RecordWriter;
use tensorboard_rs::summary;
use tensorboard_rs::summary_writer::FileWriter;

use super::pictures::png;

/// An open event file. Logging is not worth a run: what goes wrong after [`TensorBoard::open`] is said once on standard
/// error, and no more is logged.
pub struct TensorBoard {
    // Dropping the crate's writer panics if its thread has.
    writer: ManuallyDrop<FileWriter>,
    path: PathBuf,
    broken: bool,
}

impl TensorBoard {
    /// A new event file in `folder` for a run that has done `step` steps: 0 for a new one.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn open(folder: &Path, step: u64) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot create the folder {}", folder.display()))?;
        remove_half_made(folder);
        // Also at step 0: a run may have been killed before its first checkpoint.
        if step > 0 || newest(folder)?.is_some() {
            let (path, file) = new_file(folder)?;
            write_session_start(file, step + 1).with_context(|| format!("cannot write {}", path.display()))?;
        }
        let (path, reserved) = new_file(folder)?;
        drop(reserved);
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let start = folder.join(format!(".{name}.start"));
        fs::create_dir(&start).with_context(|| format!("cannot create the folder {}", start.display()))?;
        let writer = catch_unwind(|| FileWriter::new(&start));
        let moved = match &writer {
            Ok(_) => first_file(&start).and_then(|file| Ok(fs::rename(file, &path)?)),
            Err(_) => Err(anyhow!("tensorboard-rs could not start")),
        };
        let _ = fs::remove_dir_all(&start);
        moved.with_context(|| format!("cannot write {}", path.display()))?;
        let writer = writer.map_err(|_| anyhow!("tensorboard-rs could not start"))?;
        Ok(Self { writer: ManuallyDrop::new(writer), path, broken: false })
    }

    /// The event file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Logs one number.
    pub fn scalar(&mut self, tag: &str, value: f64, step: u64) {
        self.guarded(|writer| writer.add_summary(summary::scalar(tag, value as f32), step as usize));
    }

    /// Logs a picture.
    pub fn picture(&mut self, tag: &str, picture: &RgbImage, step: u64) {
        let Ok(png) = png(picture) else { return };
        let mut summary = summary::image(tag, &[0; 3], &[3, 1, 1]);
        if let Some(value) = summary.mut_value().first_mut() {
            let image = value.mut_image();
            image.set_width(picture.width() as i32);
            image.set_height(picture.height() as i32);
            image.set_encoded_image_string(png);
        }
        self.guarded(|writer| writer.add_summary(summary, step as usize));
    }

    /// Hands what was logged to the system.
    pub fn flush(&mut self) {
        self.guarded(FileWriter::flush);
    }

    fn guarded(&mut self, work: impl FnOnce(&mut FileWriter)) {
        if self.broken {
            return;
        }
        if catch_unwind(AssertUnwindSafe(|| work(&mut self.writer))).is_err() {
            self.broken = true;
            let path = self.path.display();
            let _ = writeln!(std::io::stderr(), "warning: cannot write {path}; the run goes on without TensorBoard");
        }
    }
}

impl Drop for TensorBoard {
    fn drop(&mut self) {
        // SAFETY: the writer is taken once, here, and never used again.
        let writer = unsafe { ManuallyDrop::take(&mut self.writer) };
        let _ = catch_unwind(AssertUnwindSafe(|| drop(writer)));
    }
}

/// Whether a panic at this place of the source is one that [`TensorBoard`] catches: nothing to tell users about.
pub fn is_caught(file: &str) -> bool {
    file.contains("tensorboard-rs")
}

/// Removes what a run left that was killed as it opened its event file: the writer's own folder, and a name that was only
/// reserved. A run that lives has its folder to itself.
fn remove_half_made(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let empty = entry.metadata().is_ok_and(|data| data.is_file() && data.len() == 0);
        if name.starts_with(".events.out.tfevents.") && name.ends_with(".start") {
            let _ = fs::remove_dir_all(entry.path());
        } else if empty && name.starts_with("events.out.tfevents.") && name.contains(".palettist.") {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// The time in the name of the newest event file in `folder`.
fn newest(folder: &Path) -> Result<Option<u64>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read the folder {}", folder.display()))?;
    let time = |name: &str| name.strip_prefix("events.out.tfevents.")?.split('.').next()?.parse::<u64>().ok();
    Ok(entries.flatten().filter_map(|entry| time(entry.file_name().to_str()?)).max())
}

/// Creates the event file that TensorBoard reads after all that are in `folder`: it goes by names.
fn new_file(folder: &Path) -> Result<(PathBuf, File)> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let first = newest(folder)?.map_or(now, |newest| now.max(newest.saturating_add(1)));
    for time in first..first.saturating_add(1000) {
        let path = folder.join(format!("events.out.tfevents.{time:010}.palettist.{}", std::process::id()));
        match File::create_new(&path) {
            Ok(file) => return Ok((path, file)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(|| format!("cannot write {}", path.display())),
        }
    }
    bail!("{} holds too many event files", folder.display())
}

/// The file that the crate's thread creates in an empty folder, once it has.
fn first_file(folder: &Path) -> Result<PathBuf> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(entry) = fs::read_dir(folder)?.next() {
            return Ok(entry?.path());
        }
        if Instant::now() > deadline {
            bail!("no event file was created (is the disk full?)");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// `Event { wall_time, step, session_log: SessionLog { status: START } }` of TensorFlow's event.proto, after the version
/// that every event file begins with. TensorBoard then forgets events of `step` and later in files before this one.
fn write_session_start(file: File, step: u64) -> std::io::Result<()> {
    let wall_time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
    // Protobuf keys: 1 double wall_time; 2 varint step; 3 string file_version; 7 message session_log, in which 1 is
    // the status and START is 1.
    let mut event = vec![0x09];
    event.extend(wall_time.to_le_bytes());
    let mut version = event.clone();
    version.extend([0x1a, 13]);
    version.extend(b"brain.Event:2");
    event.push(0x10);
    let mut rest = step;
    while rest >= 0x80 {
        event.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    event.push(rest as u8);
    event.extend([0x3a, 2, 0x08, 1]);
    let mut writer = RecordWriter::new(file);
    writer.write(&version)?;
    writer.write(&event)?;
    writer.flush()
}
