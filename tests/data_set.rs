//! The data set of a config: folders that must not meet, class pictures and what drew them, what is remarked before the
//! work.

mod common;

use std::fs;
use std::path::Path;

use image::{ImageFormat, RgbImage};
use palettist::config::{self, Config};
use palettist::data::drawn::{Record, record_of, with_record};
use palettist::data::{DataSet, Problems, Sample, set};

fn png(seed: u8, width: u32, height: u32) -> Vec<u8> {
    let picture = RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8, y as u8, seed]));
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut bytes, ImageFormat::Png).unwrap();
    bytes.into_inner()
}

/// Makes pictures of these names below `folder`, each with bytes of its own.
fn pictures(folder: &Path, names: &[&str]) {
    for name in names {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let seed = name.bytes().fold(0u8, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte));
        fs::write(path, png(seed, 40, 40)).unwrap();
    }
}

/// A DreamBooth config on folders below `root`, with changes.
fn dreambooth(root: &Path, changes: &[&str]) -> Config {
    let text = format!(
        "name = \"dog\"\noutput_dir = \"{0}/run\"\n[model]\npretrained_model_name_or_path = \"model\"\n[data]\n\
         resolution = 32\ncache_dir = \"{0}/cache\"\n[data.dreambooth]\ninstance_data_dir = \"{0}/instance\"\n\
         instance_prompt = \"a photo of sks dog\"\nclass_data_dir = \"{0}/class\"\nclass_prompt = \"a photo of dog\"\n\
         with_prior_preservation = true\nnum_class_images = 3\n[train]\nmode = \"dreambooth\"\nmax_train_steps = 1\n",
        root.display()
    );
    let changes: Vec<String> =
        changes.iter().map(|change| change.replace("ROOT", &root.display().to_string())).collect();
    config::parse(&text, "dog.toml", &changes).unwrap().config
}

fn full(root: &Path, changes: &[&str]) -> Config {
    let text = format!(
        "name = \"all\"\noutput_dir = \"{0}/run\"\n[model]\npretrained_model_name_or_path = \"model\"\n[data]\n\
         resolution = 32\ntrain_data_dir = \"{0}/train\"\nvalidation_data_dir = \"{0}/validation\"\n\
         missing_caption = \"empty\"\ncache_dir = \"{0}/cache\"\n[train]\nmax_train_steps = 1\n",
        root.display()
    );
    let changes: Vec<String> =
        changes.iter().map(|change| change.replace("ROOT", &root.display().to_string())).collect();
    config::parse(&text, "all.toml", &changes).unwrap().config
}

fn problems(root: &Path, config: &Config) -> Vec<String> {
    let Problems(lines) = DataSet::read(config, None).expect_err("nothing is wrong");
    lines.into_iter().map(|line| line.replace(&root.display().to_string(), "ROOT")).collect()
}

fn remarks(root: &Path, config: &Config) -> Vec<String> {
    let read = DataSet::read(config, None).unwrap();
    let looked = read.examine(config.data.resolution, &mut |_, _| Ok(())).unwrap();
    let class = read.class.iter().flat_map(|class| class.remarks.clone()).collect();
    let all = [read.remarks.clone(), class, looked].concat();
    all.into_iter().map(|line| line.replace(&root.display().to_string(), "ROOT")).collect()
}

#[test]
fn folders_that_meet_are_refused_however_they_are_written() {
    let root = tempfile::tempdir().unwrap();
    let root = &root.path().canonicalize().unwrap();
    pictures(root, &["instance/1.png", "instance/2.png", "instance/3.png", "instance/in/4.png", "validation/v.png"]);
    #[cfg(unix)]
    for (to, from) in [("instance", "link"), ("instance/later", "dangling"), ("instance/in", "inner")] {
        std::os::unix::fs::symlink(root.join(to), root.join(from)).unwrap();
    }
    DataSet::read(&dreambooth(root, &[]), None).unwrap();
    let (same, below) = ("are the same folder", "lies in");
    let mut cases = vec![
        ("ROOT/instance/", same),
        ("ROOT/./instance", same),
        ("ROOT/class/../instance", same),
        ("ROOT/validation/../instance/in", below),
        ("ROOT/instance/class/not/there", below),
        ("ROOT", below),
    ];
    if cfg!(unix) {
        cases.extend([("ROOT/link", same), ("ROOT/dangling", below), ("ROOT/inner", below), ("ROOT/inner/..", same)]);
    }
    for (folder, how) in cases {
        for key in ["data.dreambooth.class_data_dir", "data.validation_data_dir"] {
            let lines = problems(root, &dreambooth(root, &[&format!("{key}={folder}")]));
            let names = |line: &&String| {
                line.contains(key)
                    && line.contains("data.dreambooth.instance_data_dir (ROOT/instance)")
                    && line.contains(how)
            };
            assert!(lines.iter().any(|line| names(&line)), "{key} = {folder}: {lines:#?}");
        }
    }
    // What a run writes must not be read as data either.
    for (key, folder) in
        [("output_dir", "ROOT/instance/run"), ("data.cache_dir", "ROOT/instance"), ("output_dir", "ROOT/class/x")]
    {
        let lines = problems(root, &dreambooth(root, &[&format!("{key}={folder}")]));
        assert!(lines[0].starts_with(&format!("{key} ({folder}) is in data.dreambooth.")), "{lines:#?}");
    }
    // A class folder that is not used may be anything.
    let unused = ["data.dreambooth.class_data_dir=ROOT/instance/in", "data.dreambooth.with_prior_preservation=false"];
    DataSet::read(&dreambooth(root, &unused), None).unwrap();

    fs::rename(root.join("instance"), root.join("train")).unwrap();
    let lines = problems(root, &full(root, &["data.validation_data_dir=ROOT/train/in"]));
    assert!(
        lines[0].starts_with("data.validation_data_dir (ROOT/train/in) lies in data.train_data_dir (ROOT/train)"),
        "{lines:#?}"
    );
    // A link within a folder: the file is the same.
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(root.join("train/1.png"), root.join("validation/w.png")).unwrap();
        let lines = problems(root, &full(root, &[]));
        let expected = "ROOT/validation/w.png is also the training picture ROOT/train/1.png: a validation picture must be \
                        another one";
        assert_eq!(lines, [expected]);
    }
}

#[test]
fn a_class_folder_without_pictures_is_filled_whatever_else_is_in_it() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    pictures(root, &["instance/1.png", "instance/2.png", "instance/3.png"]);
    let class = root.join("class");
    let config = dreambooth(root, &[]);
    let missing = || DataSet::read(&config, None).unwrap().class.unwrap().missing;
    assert_eq!(missing(), 3);
    fs::create_dir(&class).unwrap();
    assert_eq!(missing(), 3);
    for name in [".DS_Store", "Thumbs.db", "desktop.ini", "._a.png", "readme.txt"] {
        fs::write(class.join(name), "x").unwrap();
        assert_eq!(missing(), 3, "{name}");
    }
    // The instance folder is another matter.
    fs::remove_dir_all(root.join("instance")).unwrap();
    fs::create_dir(root.join("instance")).unwrap();
    fs::write(root.join("instance/.DS_Store"), "x").unwrap();
    assert!(problems(root, &config)[0].contains("ROOT/instance holds no pictures"));
    pictures(root, &["instance/1.png"]);
    // What cannot be used is told before anything is drawn.
    fs::write(class.join("dog.heic"), "x").unwrap();
    assert!(problems(root, &config)[0].contains("dog.heic: pictures of this kind are not read"));
    fs::remove_dir_all(&class).unwrap();
    fs::write(&class, "x").unwrap();
    assert_eq!(problems(root, &config), ["the folder of pictures ROOT/class is not a folder"]);
    let lines = problems(root, &dreambooth(root, &["data.dreambooth.class_data_dir=ROOT/class/below"]));
    assert!(lines[0].starts_with("data.dreambooth.class_data_dir: ROOT/class/below cannot be written"), "{lines:?}");
}

fn record(prompt: &str) -> Record {
    Record {
        prompt: prompt.into(),
        model: "m".into(),
        sampler: "ddim".into(),
        steps: 25,
        guidance_scale: "7.5".into(),
        size: [32, 32],
        seed: 42,
    }
}

#[test]
fn drawn_pictures_count_only_when_they_would_be_drawn_so_today() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    pictures(root, &["instance/1.png", "instance/2.png", "instance/3.png", "class/own.png"]);
    let class = root.join("class");
    fs::write(class.join("drawn-00000.png"), with_record(&png(1, 32, 32), &record("a dog"))).unwrap();
    fs::write(class.join("kept.png"), with_record(&png(2, 32, 32), &record("a cat"))).unwrap();
    let read = |drawing: Option<&Record>, most: usize| {
        let config = dreambooth(root, &[&format!("data.dreambooth.num_class_images={most}")]);
        DataSet::read(&config, drawing).unwrap().class.unwrap()
    };
    let names = |samples: &[Sample]| samples.iter().map(|sample| sample.name.clone()).collect::<Vec<_>>();
    let dogs = read(Some(&record("a dog")), 3);
    assert_eq!(names(&dogs.samples), ["drawn-00000.png", "own.png"]);
    assert_eq!((dogs.own, dogs.missing, dogs.outdated.len()), (1, 1, 1));
    assert!(
        dogs.remarks[0].contains("1 picture drawn from something else (prompt \"a cat\", now \"a dog\")"),
        "{:?}",
        dogs.remarks
    );
    // Under any name: it is known by what it is.
    assert_eq!(names(&read(Some(&record("a cat")), 3).samples), ["kept.png", "own.png"]);
    for other in [
        Record { model: "n".into(), ..record("a dog") },
        Record { sampler: "euler".into(), ..record("a dog") },
        Record { steps: 24, ..record("a dog") },
        Record { guidance_scale: "7.0".into(), ..record("a dog") },
        Record { size: [64, 64], ..record("a dog") },
        Record { seed: 1, ..record("a dog") },
    ] {
        let class = read(Some(&other), 3);
        assert_eq!((names(&class.samples), class.missing), (vec!["own.png".into()], 2), "{other:?}");
    }
    // Without a model to compare with all are taken as they are.
    assert_eq!(read(None, 3).missing, 0);
    // One that was changed is the user's own, and one of a version without records too.
    let mut painted = image::open(class.join("drawn-00000.png")).unwrap().into_rgb8();
    painted.put_pixel(0, 0, image::Rgb([255, 0, 0]));
    painted.save(class.join("drawn-00000.png")).unwrap();
    assert_eq!(record_of(&class.join("drawn-00000.png")), None);
    let cats = read(Some(&record("a cat")), 3);
    assert_eq!((cats.own, cats.missing), (2, 0));
    assert!(cats.remarks.iter().any(|line| line.contains("drawn-00000.png without a record")), "{:?}", cats.remarks);
    fs::write(class.join("more.png"), with_record(&png(3, 32, 32), &record("a cat"))).unwrap();
    let left = read(Some(&record("a cat")), 3);
    assert!(
        left.remarks.iter().any(|line| line.contains("1 of the 2 pictures that the model drew are not used")),
        "{:?}",
        left.remarks
    );
    fs::remove_file(class.join("more.png")).unwrap();
    // diffusers takes at most num_class_images; the user's own come first, and what is left out is told.
    assert_eq!(names(&read(Some(&record("a cat")), 2).samples), ["drawn-00000.png", "own.png"]);
    let one = read(Some(&record("a cat")), 1);
    assert_eq!((one.samples.len(), one.missing), (1, 0));
    assert!(
        one.remarks[0].contains("has 2 pictures of the class, and num_class_images = 1 of them are used"),
        "{:?}",
        one.remarks
    );
}

/// A picture is known by its pixels: saved again in another format, with an opaque channel more, or with a text in it, it
/// is the same.
#[test]
fn a_picture_that_was_saved_again_is_the_same_picture() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    pictures(root, &["train/1.png", "train/2.png", "train/3.png", "train/4.png"]);
    fs::create_dir(root.join("validation")).unwrap();
    let open = |name: &str| image::open(root.join("train").join(name)).unwrap();
    open("1.png").into_rgb8().save(root.join("validation/a.bmp")).unwrap();
    open("2.png").into_rgba8().save(root.join("validation/b.png")).unwrap();
    let with_text = with_record(&fs::read(root.join("train/3.png")).unwrap(), &record("a dog"));
    fs::write(root.join("validation/c.png"), with_text).unwrap();
    // Another by one value of one pixel.
    let mut other = open("4.png").into_rgb8();
    other.get_pixel_mut(3, 5).0[1] ^= 1;
    other.save(root.join("validation/d.png")).unwrap();
    let told = remarks(root, &full(root, &[]));
    let expected = "warning: 3 of the 4 validation pictures are trained on too, and the validation loss looks better than \
                    it is: a.bmp is 1.png, b.png is 2.png, c.png is 3.png";
    assert!(told.iter().any(|line| line == expected), "{told:#?}");
}

#[test]
fn what_may_be_a_mistake_is_remarked_before_the_work() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    pictures(root, &["instance/1.png", "instance/2.png", "class/a.png", "class/b.png", "class/c.png"]);
    fs::write(root.join("instance/0.png"), fs::read(root.join("instance/2.png")).unwrap()).unwrap();
    fs::copy(root.join("instance/1.png"), root.join("class/a.png")).unwrap();
    fs::create_dir(root.join("validation")).unwrap();
    fs::copy(root.join("instance/1.png"), root.join("validation/v.png")).unwrap();
    fs::write(root.join("instance/small.png"), png(9, 10, 30)).unwrap();
    let config = dreambooth(root, &["data.validation_data_dir=ROOT/validation"]);
    assert_eq!(
        remarks(root, &config),
        [
            "note: none of the 1 pictures in ROOT/validation has a caption: all have \"a photo of sks dog\"",
            "warning: 1 of the 4 pictures is a copy of another: 2.png is 0.png",
            "warning: 1 of the 3 pictures of the class show the subject, which they should hold back: a.png is 1.png",
            "warning: 1 of the 1 validation pictures are trained on too, and the validation loss looks better than it is: \
             v.png is 1.png",
            "warning: 1 of the 1 validation pictures are trained on too, and the validation loss looks better than it is: \
             v.png is a.png",
            "warning: 1 of the 4 pictures is enlarged more than twice to data.resolution = 32, and blurred: small.png has \
             10 × 30 px",
        ]
    );
    // DreamBooth's validation pictures have the instance prompt, for every command that asks.
    let samples = set::validation(&config).unwrap().unwrap().samples;
    assert_eq!(samples[0].caption, "a photo of sks dog");
    fs::write(root.join("validation/v.txt"), "sks dog on a beach").unwrap();
    assert_eq!(set::validation(&config).unwrap().unwrap().samples[0].caption, "sks dog on a beach");
    assert!(set::training(&config).unwrap().samples.iter().all(|sample| sample.caption == "a photo of sks dog"));

    // A single picture; several subjects; kohya's folders.
    let told = |names: &[&str]| {
        fs::remove_dir_all(root.join("instance")).unwrap();
        pictures(&root.join("instance"), names);
        remarks(root, &dreambooth(root, &[])).swap_remove(0)
    };
    assert_eq!(
        told(&["7.png"]),
        "warning: ROOT/instance has a single picture of the subject; DreamBooth takes 3 to 10"
    );
    let subjects = told(&["dog/1.png", "dog/2.png", "cat/1.png"]);
    assert!(subjects.starts_with("warning: the pictures in ROOT/instance lie in 2 folders (cat, dog)"), "{subjects}");
    let captions = |file: &str| {
        fs::remove_dir_all(root.join("instance")).unwrap();
        pictures(&root.join("instance"), &["dog/1.png", "dog/2.png", "dog/3.png"]);
        fs::write(root.join("instance").join(file), "x").unwrap();
        remarks(root, &dreambooth(root, &[])).swap_remove(0)
    };
    for file in ["dog/1.txt", "metadata.jsonl"] {
        let line = captions(file);
        assert!(line.starts_with(&format!("note: captions like {file} in ROOT/instance are not read")), "{line}");
    }
    let kohya = told(&["10_sks dog/1.png", "10_sks dog/2.png", "10_sks dog/3.png"]);
    assert!(kohya.starts_with("warning: ROOT/instance has folders named like kohya's (10_sks dog)"), "{kohya}");
    // What cannot be decoded is a problem, in whichever set it is; each is told.
    fs::write(root.join("class/b.png"), "<html>").unwrap();
    fs::write(root.join("class/c.png"), png(1, 2000, 2)).unwrap();
    let config = dreambooth(root, &[]);
    let read = DataSet::read(&config, None).unwrap();
    let Problems(lines) = read.examine(32, &mut |_, _| Ok(())).unwrap_err().downcast().unwrap();
    assert!(
        lines.len() == 2 && lines[0].contains("a web page (HTML)") && lines[1].contains("2000 x 2 px"),
        "{lines:?}"
    );
    // Whoever waits may stop it.
    assert_eq!(read.examine(32, &mut |_, _| anyhow::bail!("enough")).unwrap_err().to_string(), "enough");
}
