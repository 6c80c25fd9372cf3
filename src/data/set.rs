//! The data set of a config: what its folders hold, and everything that is wrong with them. `check`, `train` and all other
//! commands ask here, so that none of them knows what another one does not.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::captions::one_line;
use super::drawn::{Record, record_of};
use super::kohya::kohya_folder;
use super::listing::{Listing, few, listed};
use super::look::{Look, Looked, animated, look_at, shared, small, twice};
use super::place::Place;
use super::{CaptionOptions, Contents, Missing, Problems, Sample, near_miss, read_folder, sidecars};
use crate::config::{Config, Dreambooth, Mode, TrainedComponent};
use crate::files::check_writable;

/// What a run learns from.
#[derive(Clone, Debug, Default)]
pub struct DataSet {
    /// Pictures with captions; DreamBooth's of the subject.
    pub training: Vec<Sample>,
    /// DreamBooth's pictures of the class, with prior preservation.
    pub class: Option<Class>,
    /// Where the config has a validation split.
    pub validation: Option<Vec<Sample>>,
    /// What may be a mistake, or is worth knowing: lines that begin with `warning: ` or `note: `.
    pub remarks: Vec<String>,
}

/// DreamBooth's pictures of the class.
#[derive(Clone, Debug, Default)]
pub struct Class {
    pub folder: PathBuf,
    /// At most `num_class_images`: the user's own, then those drawn from what would be drawn today.
    pub samples: Vec<Sample>,
    /// How many of them the user put there.
    pub own: usize,
    /// How many more are to be drawn.
    pub missing: usize,
    /// Drawn from something else, and not used.
    pub outdated: Vec<Outdated>,
    /// What may be a mistake, or is worth knowing.
    pub remarks: Vec<String>,
}

/// A picture that was drawn from something else than what would be drawn today.
#[derive(Clone, Debug)]
pub struct Outdated {
    pub sample: Sample,
    pub record: Record,
}

impl DataSet {
    /// Reads the folders of `config`. With `drawing`, what class pictures would be drawn from today, those that were
    /// drawn from something else do not count. No picture is decoded, see [`DataSet::examine`].
    ///
    /// # Errors
    /// Every problem with any of the folders; that the class folder is empty or not there is none.
    pub fn read(config: &Config, drawing: Option<&Record>) -> Result<Self, Problems> {
        let mut problems = overlaps(config);
        let mut set = Self::default();
        let mut take = |read: Result<Contents, Problems>, remarks: &mut Vec<String>| match read {
            Ok(contents) => {
                remarks.extend(contents.remarks);
                contents.samples
            }
            Err(Problems(more)) => {
                problems.extend(more);
                Vec::new()
            }
        };
        set.training = take(training(config), &mut set.remarks);
        set.validation = validation(config).map(|read| take(read, &mut set.remarks));
        set.remarks.extend(config.data.prior().and_then(same_prompt));
        if let Some((settings, folder)) = config.class_folder() {
            match Class::read(settings, folder, drawing) {
                Ok(class) => {
                    if class.missing > 0 {
                        problems.extend(
                            check_writable(folder)
                                .err()
                                .map(|error| format!("data.dreambooth.class_data_dir: {error:#}")),
                        );
                    }
                    set.class = Some(class);
                }
                Err(Problems(more)) => problems.extend(more),
            }
        }
        // Folders that overlap are told of by name; this finds links within folders.
        if problems.is_empty() {
            problems.extend(set.same_files());
        }
        if problems.is_empty() { Ok(set) } else { Err(Problems(problems)) }
    }

    /// Pictures that are one file, through links, in two sets that must not share any.
    fn same_files(&self) -> Vec<String> {
        let class = self.class.as_ref().map(|class| class.samples.as_slice());
        let sets = [("class", class), ("validation", self.validation.as_deref())];
        if sets.iter().all(|(_, set)| set.is_none()) {
            return Vec::new();
        }
        let mut seen: HashMap<PathBuf, (&Sample, &str)> = HashMap::new();
        let mut found = Vec::new();
        for (kind, set) in std::iter::once(("training", Some(self.training.as_slice()))).chain(sets) {
            for sample in set.into_iter().flatten() {
                let Ok(file) = sample.path.canonicalize() else { continue };
                match seen.get(&file) {
                    Some((other, other_kind)) if *other_kind != kind => found.push(format!(
                        "{} is also the {other_kind} picture {}: a {kind} picture must be another one",
                        sample.path.display(),
                        other.path.display()
                    )),
                    _ => drop(seen.insert(file, (sample, kind))),
                }
            }
        }
        few(found)
    }

    /// All samples, those of the class and of validation after the others.
    fn all(&self) -> impl Iterator<Item = &Sample> {
        let class = self.class.iter().flat_map(|class| &class.samples);
        self.training.iter().chain(class).chain(self.validation.iter().flatten())
    }

    /// Decodes every picture; what may be a mistake. `tell` hears how many are done, of how many.
    ///
    /// # Errors
    /// [`Problems`] with a line for each picture that cannot be used; an error of `tell`.
    pub fn examine(&self, resolution: i64, tell: &mut dyn FnMut(usize, usize) -> Result<()>) -> Result<Vec<String>> {
        let all: Vec<&Sample> = self.all().collect();
        let mut looks: HashMap<&Path, Look> = HashMap::new();
        let (mut problems, mut done) = (Vec::new(), 0);
        for some in all.chunks(64) {
            tell(done, all.len())?;
            for (sample, look) in some.iter().zip(look_at(some)) {
                match look {
                    Ok(look) => drop(looks.insert(&sample.path, look)),
                    Err(error) => problems.push(format!("{error:#}")),
                }
            }
            done += some.len();
        }
        tell(done, all.len())?;
        if !problems.is_empty() {
            return Err(Problems(problems).into());
        }
        fn looked<'s>(samples: &'s [Sample], looks: &HashMap<&Path, Look>) -> Looked<'s> {
            samples.iter().filter_map(|sample| Some((sample, *looks.get(sample.path.as_path())?))).collect()
        }
        let training = looked(&self.training, &looks);
        let class = self.class.as_ref().map_or_else(Vec::new, |class| looked(&class.samples, &looks));
        let validation = self.validation.as_deref().map_or_else(Vec::new, |samples| looked(samples, &looks));
        let trained = "validation pictures are trained on too";
        let remarks = [
            twice(&training, &format!("{} pictures", training.len())),
            shared(&class, &training, "pictures of the class show the subject", "which they should hold back"),
            shared(&validation, &training, trained, "and the validation loss looks better than it is"),
            shared(&validation, &class, trained, "and the validation loss looks better than it is"),
            small(&training, resolution, "pictures"),
            small(&class, resolution, "class pictures"),
            animated(&training),
            animated(&class),
        ];
        Ok(remarks.into_iter().flatten().collect())
    }
}

/// The pictures that `config` trains on; DreamBooth's of the subject.
///
/// # Errors
/// Every problem with their folder.
pub fn training(config: &Config) -> Result<Contents, Problems> {
    match (&config.data.dreambooth, &config.data.train_data_dir) {
        (Some(settings), _) if config.train.mode == Mode::Dreambooth => instance(settings),
        (_, Some(folder)) => read_folder(folder, &captions(config)),
        (_, None) => Err(Problems(vec!["data.train_data_dir is not set".into()])),
    }
}

/// The pictures that are never trained on, where the config has them. DreamBooth's have the instance prompt where they have
/// no caption of their own.
pub fn validation(config: &Config) -> Option<Result<Contents, Problems>> {
    let folder = config.data.validation_data_dir.as_ref()?;
    let mut options = captions(config);
    if let Some(settings) = config.data.dreambooth.as_ref().filter(|_| config.train.mode == Mode::Dreambooth) {
        options.missing = Missing::Fill(settings.instance_prompt.clone());
    }
    Some(read_folder(folder, &options))
}

/// Where captions are. An autoencoder learns none.
fn captions(config: &Config) -> CaptionOptions {
    let options = CaptionOptions::from(&config.data);
    match config.train.component {
        TrainedComponent::Autoencoder => CaptionOptions { missing: Missing::Unneeded, ..options },
        TrainedComponent::Unet => options,
    }
}

/// DreamBooth's pictures of the subject: every one has the prompt, caption files are not read.
fn instance(settings: &Dreambooth) -> Result<Contents, Problems> {
    let folder = &settings.instance_data_dir;
    let mut problems = Vec::new();
    let listing = Listing::read(folder, &mut problems)?.not_empty(&mut problems)?;
    if !problems.is_empty() {
        return Err(Problems(problems));
    }
    let (count, shown) = (listing.pictures.len(), folder.display());
    let mut remarks = Vec::new();
    if count < 3 {
        let pictures = if count == 1 { "a single picture" } else { "only 2 pictures" };
        remarks.push(format!("warning: {shown} has {pictures} of the subject; DreamBooth takes 3 to 10"));
    }
    let folders = listing.top_folders();
    if let Some(name) = folders.iter().find(|name| kohya_folder(name).is_some()) {
        remarks.push(format!(
            "warning: {shown} has folders named like kohya's ({name}): with mode = \"dreambooth\" their repeats and words \
             are not used, every picture has the instance prompt, once an epoch"
        ));
    } else if folders.len() > 1 {
        remarks.push(format!(
            "warning: the pictures in {shown} lie in {} folders ({}), and all are trained as one subject; give the folder \
             of a single subject as instance_data_dir",
            folders.len(),
            listed(&folders)
        ));
    }
    if let Some(file) = near_miss::captions(&listing) {
        remarks.push(format!(
            "note: captions like {file} in {shown} are not read with mode = \"dreambooth\": every picture has the instance \
             prompt"
        ));
    }
    let stems: HashSet<&str> = listing.pictures.iter().map(|picture| picture.stem()).collect();
    let is_stray = |name: &&str| name.strip_suffix(".txt").is_some_and(|stem| !stems.contains(stem));
    let stray: Vec<&str> = listing.others.iter().map(|file| file.name.as_str()).filter(is_stray).collect();
    if !stray.is_empty() {
        remarks.push(sidecars::stray(&listing, &stray));
    }
    let sample = |file: &super::listing::File| Sample {
        caption: settings.instance_prompt.clone(),
        ..Sample::new(folder, &file.path)
    };
    Ok(Contents { samples: listing.pictures.iter().map(sample).collect(), remarks })
}

impl Class {
    /// Reads the folder of class pictures, which may be empty or not there. With `drawing`, what would be drawn today,
    /// pictures that were drawn from something else do not count.
    ///
    /// # Errors
    /// Every problem: it is not a folder, or holds pictures of a kind that is not read.
    pub fn read(settings: &Dreambooth, folder: &Path, drawing: Option<&Record>) -> Result<Self, Problems> {
        let wanted = settings.num_class_images;
        let mut class = Self { folder: folder.to_owned(), missing: wanted, ..Self::default() };
        if !folder.exists() {
            return Ok(class);
        }
        let mut problems = Vec::new();
        let listing = Listing::read(folder, &mut problems)?;
        if !problems.is_empty() {
            return Err(Problems(problems));
        }
        let (mut own, mut drawn, mut without_record) = (Vec::new(), Vec::new(), Vec::new());
        for file in &listing.pictures {
            let sample =
                Sample { caption: settings.class_prompt.clone(), is_class: true, ..Sample::new(folder, &file.path) };
            match record_of(&sample.path) {
                Some(record) if drawing.is_none_or(|now| *now == record) => drawn.push(sample),
                Some(record) => class.outdated.push(Outdated { sample, record }),
                None => {
                    if is_drawn_name(&sample.name) {
                        without_record.push(sample.name.clone());
                    }
                    own.push(sample);
                }
            }
        }
        let shown = folder.display();
        if own.len() > wanted {
            class.remarks.push(format!(
                "warning: {shown} has {} pictures of the class, and num_class_images = {wanted} of them are used; raise it \
                 to use all",
                own.len()
            ));
        }
        if !without_record.is_empty() {
            class.remarks.push(format!(
                "note: {shown}: {} without a record of what drew them, from an older version or edited since, count as your \
                 own; delete them to have them drawn again",
                listed(&without_record)
            ));
        }
        if let (Some(first), Some(now)) = (class.outdated.first(), drawing) {
            class.remarks.push(format!(
                "note: {shown}: {} drawn from something else ({}) are not used; {} drawn again",
                match class.outdated.len() {
                    1 => "1 picture".to_owned(),
                    count => format!("{count} pictures"),
                },
                first.record.differences(now).join("; "),
                if own.len() >= wanted { "none are" } else { "what is missing is" }
            ));
        }
        own.truncate(wanted);
        let used = drawn.len().min(wanted - own.len());
        if used < drawn.len() {
            class.remarks.push(format!(
                "note: {shown}: {} of the {} pictures that the model drew are not used, because num_class_images is {wanted}",
                drawn.len() - used,
                drawn.len()
            ));
        }
        drawn.truncate(used);
        class.own = own.len();
        class.missing = wanted - own.len() - drawn.len();
        class.samples = own.into_iter().chain(drawn).collect();
        class.samples.sort_by_cached_key(|sample| sample.name.replace('/', "\0"));
        Ok(class)
    }
}

/// The name of the class picture of this number.
pub fn drawn_name(index: usize) -> String {
    format!("drawn-{index:05}.png")
}

fn is_drawn_name(name: &str) -> bool {
    let number = name.strip_prefix("drawn-").and_then(|rest| rest.strip_suffix(".png"));
    number.is_some_and(|number| number.len() >= 5 && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// A remark on a class that is called as the subject is, so that its pictures teach the subject's words.
fn same_prompt(settings: &Dreambooth) -> Option<String> {
    let [instance, class] = [&settings.instance_prompt, &settings.class_prompt].map(|prompt| one_line(prompt));
    class.contains(&instance).then(|| {
        format!(
            "warning: data.dreambooth.class_prompt (\"{class}\") says what instance_prompt says: pictures of the class would \
             be taught as the subject; leave the rare word out of it, as in \"a photo of dog\" beside \"a photo of sks dog\""
        )
    })
}

/// Whether the folders of `config` lie apart from each other, for those who read only one of them.
///
/// # Errors
/// Every two that are one folder or lie in each other, though they must not.
pub fn apart(config: &Config) -> Result<(), Problems> {
    let found = overlaps(config);
    if found.is_empty() { Ok(()) } else { Err(Problems(found)) }
}

/// Folders of a config that are one or lie in each other, though they must not.
fn overlaps(config: &Config) -> Vec<String> {
    let data = &config.data;
    let folders: Vec<(&str, &Path, Place)> = config
        .picture_folders()
        .into_iter()
        .filter_map(|(key, folder)| Some((key, folder, Place::of(folder).ok()?)))
        .collect();
    let mut found = Vec::new();
    for (index, (key, folder, place)) in folders.iter().enumerate() {
        for (other_key, other, other_place) in &folders[..index] {
            if place.is(other_place) {
                found.push(format!(
                    "{key} ({}) and {other_key} ({}) are the same folder; each needs one of its own",
                    folder.display(),
                    other.display()
                ));
            } else if place.is_within(other_place) {
                found.push(within(key, folder, other_key, other));
            } else if other_place.is_within(place) {
                found.push(within(other_key, other, key, folder));
            }
        }
    }
    // What a run writes must not be read as data by the next one: samples are pictures.
    for (key, path) in [("output_dir", &config.output_dir), ("data.cache_dir", &data.cache_dir)] {
        let Ok(place) = Place::of(path) else { continue };
        for (other_key, other, other_place) in &folders {
            if place.is_within(other_place) {
                found.push(format!(
                    "{key} ({}) is in {other_key} ({}), and what a run writes would be taken for data; set another {key}",
                    path.display(),
                    other.display()
                ));
            }
        }
    }
    found
}

fn within(key: &str, folder: &Path, other_key: &str, other: &Path) -> String {
    format!(
        "{key} ({}) lies in {other_key} ({}), whose subfolders are read too: its pictures would be taken for both; each \
         needs a folder of its own",
        folder.display(),
        other.display()
    )
}
