//! Keys without effect.

use super::*;

/// Every key that something makes idle is told, with its place; and none that has an effect.
#[test]
fn a_key_without_effect_is_refused_or_warned_of() {
    // A switch that was forgotten: refused.
    for (lines, expected) in [
        (
            "[train]\nlr_num_cycles = 3",
            "dog.toml:8:1: `train.lr_num_cycles` has no effect: it is for train.lr_scheduler",
        ),
        ("[train]\nlr_power = 2.0", "`train.lr_power` has no effect: it is for train.lr_scheduler = \"polynomial\""),
        ("[train]\ntext_encoder_lr = 1e-6", "`train.text_encoder_lr` has no effect: the text encoder is not trained"),
        ("[train]\nstop_text_encoder_training = 9", "`train.stop_text_encoder_training` has no effect: the text"),
        ("[train]\nema_decay = 0.99", "`train.ema_decay` has no effect: no moving average"),
        (
            "[train.autoencoder]\nkl_weight = 1\ncrop = 64\ngradient_weight = 1.0\nscales = 2",
            "`train.autoencoder.kl_weight`, `train.autoencoder.crop`, `train.autoencoder.gradient_weight`, \
             `train.autoencoder.scales` have no",
        ),
        ("[distill]\nlambda_kd_feat = 0.5", "`distill.lambda_kd_feat` has no effect: the float model does not teach"),
        ("[palettize]\ngroup_size = 8", "`palettize.group_size` has no effect: it is for palettize.granularity"),
        (
            "[export]\ncomponents = [\"text_encoder\"]\nchunk_unet = true\nunet_batch_one = true",
            "`export.unet_batch_one`, `export.chunk_unet` have no effect: export.components leaves the UNet out",
        ),
        (
            "[export]\ncomponents = [\"text_encoder\"]\nlatent_h = 8",
            "`export.latent_h` has no effect: export.components names text encoders only",
        ),
        ("[export]\nquantize_nbits = 4", "`export.quantize_nbits` has no effect: the UNet has the palettes of the run"),
        (
            "[data.dreambooth]\ninstance_data_dir = \"x\"",
            "`data.dreambooth.instance_data_dir` has no effect: [data.dreamb",
        ),
    ] {
        let found = problems(&format!("{SMALL}{lines}\n"), &[]);
        assert!(found.len() == 1 && found[0].contains(expected), "{found:?}");
    }
    // A switch that is written, and what short trials and shared configs have: warned of.
    for (lines, overrides, expected) in [
        (
            "[palettize]\nn_bits = 2\ngroup_size = 8",
            vec!["palettize.enabled=false"],
            "`palettize.n_bits`, `palettize.group_size` have no effect: there are no palettes",
        ),
        ("[distill]\nenabled = false\nlambda_sd = 2.0", vec![], "`distill.lambda_sd` has no effect"),
        ("[train]\nuse_ema = false\nema_decay = 0.99", vec![], "`train.ema_decay` has no effect"),
        ("[export]\ncoreml = false\nlatent_h = 8", vec![], "`export.latent_h` has no effect: no Core ML package"),
        ("[train]\nlr_scheduler = \"cosine\"\nlr_power = 2", vec![], "`train.lr_power` has no effect"),
        // The default, written out.
        ("[palettize]\ngroup_size = 16", vec![], "`palettize.group_size` has no effect"),
        (
            "[train]\nlr_warmup_steps = 800",
            vec![],
            "`train.lr_warmup_steps` is 800, and train.max_train_steps is 800: the run ends within",
        ),
        (
            "[train]\nlr_scheduler = \"constant_with_warmup\"",
            vec![],
            "`train.lr_scheduler` is \"constant_with_warmup\", but train.lr_warmup_steps is 0",
        ),
        (
            "[train]\ntrain_text_encoder = true\nstop_text_encoder_training = 400",
            vec!["train.max_train_steps=20"],
            "`train.stop_text_encoder_training` has no effect: the run ends before",
        ),
        ("[distill]\nenabled = true\nlambda_kd_output = 0", vec![], "`distill.enabled` is true, but"),
        (
            "[sample]\nsample_steps = 9",
            vec![],
            "`sample.sample_steps` has no effect: no pictures are drawn (sample.prompts is empty)",
        ),
        (
            "[sample]\nprompts = [\"a --s 9\"]\nsample_steps = 9",
            vec![],
            "`sample.sample_steps` has no effect: every prompt",
        ),
        (
            "[sample]\nprompts = [\"a\"]\nsample_every_n_steps = 0",
            vec![],
            "`sample.prompts` has no effect: no pictures are drawn",
        ),
        ("[validation]\nseed = 3", vec![], "`validation.seed` has no effect: there is nothing to measure on"),
        ("[logging]\nreport_to = []\nlog_every = 3", vec![], "`logging.log_every` has no effect: nothing is logged"),
        (
            "[palettize]\nn_bits = 2\noverrides = [{match = \"*\", n_bits = 4}]",
            vec![],
            "`palettize.n_bits` has no effect: an override",
        ),
        (
            "[palettize]\noverrides = [{match = \"a*\", n_bits = 4}, {match = \"*\", n_bits = 2}]",
            vec![],
            "`palettize.overrides` match = \"a*\" has no effect",
        ),
        (
            "[palettize]\nkmeans_max_iter = 5\nfreeze_fraction = 1.0",
            vec![],
            "`palettize.kmeans_max_iter` has no effect: assignments are fixed",
        ),
        (
            "[palettize]\npalettes = \"p\"\nn_bits = 2\ngroup_size = 8\nkmeans_max_iter = 5\npalette_learning_rate = 1e-3",
            vec![],
            "`palettize.n_bits`, `palettize.group_size`, `palettize.kmeans_max_iter` have no effect: palettize.palettes says",
        ),
        (
            "[palettize]\npalette_learning_rate = 1e-3\nfreeze_fraction = 0",
            vec![],
            "`palettize.palette_learning_rate` has no effect",
        ),
        // Rates at their ends.
        ("caption_dropout_rate = 1", vec![], "`data.caption_dropout_rate` is 1: every caption is replaced"),
        (
            "[train]\ntrain_text_encoder = true\ntext_encoder_lr = 0",
            vec![],
            "`train.text_encoder_lr` is 0: the text encoder costs",
        ),
        (
            "[palettize]\nenabled = false\n[train]\nuse_ema = true\nema_decay = 0",
            vec![],
            "`train.ema_decay` is 0: the average is the last weights",
        ),
        (
            "[checkpoint]\ncheckpointing_steps = 900",
            vec![],
            "`checkpoint.checkpointing_steps` has no effect: the run ends before, after train.max_train_steps = 800",
        ),
        (
            "[checkpoint]\ncheckpointing_steps = 0\ncheckpoint_every_n_minutes = 0",
            vec![],
            "`checkpoint.checkpointing_steps`, `checkpoint.checkpoint_every_n_minutes` are both 0: nothing is saved",
        ),
        (
            "[export]\ncomponents = [\"text_encoder\"]",
            vec![],
            "`export.components` leaves out the UNet, which this run trains",
        ),
        ("[palettize]\npalette_learning_rate = 0", vec![], "`palettize.palette_learning_rate` is 0: palettes stay"),
    ] {
        let (_, found) = loaded(&format!("{SMALL}{lines}\n"), &overrides);
        assert!(found.len() == 1 && found[0].contains(expected), "{lines}: {found:?}");
        assert!(found[0].starts_with("dog.toml:"), "{found:?}");
    }
    // What has an effect is not spoken of.
    for lines in [
        "[train]\nlr_warmup_steps = 100",
        "[train]\nlr_scheduler = \"polynomial\"\nlr_power = 2.0",
        "[train]\nlr_scheduler = \"cosine_with_restarts\"\nlr_num_cycles = 2",
        "[train]\ntrain_text_encoder = true\ntext_encoder_lr = 1e-7\nstop_text_encoder_training = 300",
        "[palettize]\ngranularity = \"per_grouped_channel\"\ngroup_size = 8\ngroup_axis = 1",
        "[palettize]\ncluster_dim = 2\ngroup_axis = 1",
        "[sample]\nprompts = [\"a\"]\nsample_steps = 9\nguidance_scale = 3\nseed = 1\nsampler = \"euler\"",
        "[sample]\nsample_every_n_steps = 0",
        "[palettize]\nenabled = false\n[train]\nuse_ema = true\nema_decay = 0.9",
        "[export]\nlatent_h = 8",
        "[export]\ncomponents = [\"text_encoder\"]\nattention_implementation = \"SPLIT_EINSUM\"\n\
         bundle_resources_for_swift_cli = true",
        "[export]\ncomponents = [\"unet\", \"vae_decoder\"]\nquantize_nbits = 6\nchunk_unet = true",
    ] {
        let (_, found) = loaded(&format!("{SMALL}{lines}\n"), &[]);
        assert_eq!(found, Vec::<String>::new(), "{lines}");
    }
}

#[test]
fn dreambooth_takes_no_captions_and_its_class_only_with_the_prior() {
    let text = r#"
        train.mode = "dreambooth"
        model.pretrained_model_name_or_path = "m"
        [data]
        caption_extension = [".cap"]
        train_data_dir = "t"
        [data.dreambooth]
        instance_data_dir = "a"
        instance_prompt = "a photo of sks dog"
        class_prompt = "a photo of dog"
        num_class_images = 20
    "#;
    assert_eq!(
        problems(text, &["data.dreambooth.with_prior_preservation=false"]),
        [
            "dog.toml:6:9: `data.train_data_dir` has no effect: train.mode = \"dreambooth\" takes its pictures from \
             data.dreambooth.instance_data_dir",
            "dog.toml:5:9: `data.caption_extension` has no effect: train.mode = \"dreambooth\" reads no captions: every \
             picture has the instance_prompt or the class_prompt",
        ]
    );
    let text = text.replace("train_data_dir", "validation_data_dir");
    let (_, found) = loaded(&text, &["data.dreambooth.with_prior_preservation=false"]);
    assert_eq!(
        found,
        [
            "dog.toml:10:9: `data.dreambooth.class_prompt`, `data.dreambooth.num_class_images` have no effect: there is no \
          prior preservation (with_prior_preservation = false)"
        ]
    );
}

const SUBJECT: &str = r#"
train.mode = "dreambooth"
model.pretrained_model_name_or_path = "m"
[data.dreambooth]
instance_data_dir = "a"
instance_prompt = "a photo of sks dog"
class_prompt = "a photo of dog"
"#;
const CLASS: &str = "data.dreambooth.class_data_dir=c";
const TAUGHT: &str = "distill.enabled=true";

/// A base that has never seen the subject answers for the class, unless told otherwise; one that has, for all.
#[test]
fn a_teacher_is_asked_about_what_it_knows() {
    for (overrides, expected) in [
        (vec![CLASS, TAUGHT], DistillOn::Class),
        (vec![CLASS, TAUGHT, "distill.teacher=personalized"], DistillOn::All),
        (vec![CLASS, TAUGHT, "distill.teacher=models/sks"], DistillOn::All),
        (vec![CLASS, TAUGHT, "distill.teacher=models/sks", "distill.on=class"], DistillOn::Class),
        (vec!["data.dreambooth.prior_source=base", TAUGHT, "distill.lambda_kd_feat=0.1"], DistillOn::Class),
    ] {
        assert_eq!(quiet(SUBJECT, &overrides).distill.on, expected, "{overrides:?}");
    }
    assert_eq!(quiet(SMALL, &[TAUGHT]).distill.on, DistillOn::All);
    let warned = |overrides: &[&str], expected: &str| {
        let (_, found) = loaded(SUBJECT, overrides);
        assert!(found.len() == 1 && found[0].contains(expected), "{found:?}");
    };
    let all = "distill.on=all";
    warned(
        &[CLASS, TAUGHT, all],
        "`distill.on` is \"all\", and the teacher is the base, which has never seen the subject",
    );
    warned(
        &["data.dreambooth.prior_source=base", TAUGHT],
        "`distill.enabled` asks what prior_source = \"base\" asks already",
    );
    warned(
        &["data.dreambooth.prior_source=base", CLASS],
        "`data.dreambooth.class_data_dir` has no effect: there are no pictures of the class",
    );
    warned(
        &[CLASS, "data.dreambooth.prior_loss_weight=0"],
        "`data.dreambooth.class_data_dir`, `data.dreambooth.class_prompt` have no effect: prior_loss_weight is 0",
    );
    // The teacher's answers have a weight of their own.
    quiet(SUBJECT, &[CLASS, TAUGHT, "data.dreambooth.prior_loss_weight=0"]);
    let refused = |text: &str, overrides: &[&str], expected: &str| {
        let found = problems(text, overrides);
        assert!(found.len() == 1 && found[0].contains(expected), "{found:?}");
    };
    let alone = "data.dreambooth.with_prior_preservation=false";
    let text = SUBJECT.replace("class_prompt = \"a photo of dog\"", "");
    refused(&text, &[alone, TAUGHT], "`distill.enabled` asks the teacher about the class alone");
    let none = "`distill.on` has no effect: train.mode = \"full\" has no pictures of a class";
    refused(SMALL, &[TAUGHT, "distill.on=class"], none);
    let one = "`distill.personalize_steps` has no effect: it is for distill.teacher = \"personalized\"";
    refused(SMALL, &[TAUGHT, "distill.personalize_steps=9"], one);
    let teacher = "`distill.teacher` has no effect: the float model does not teach";
    refused(SMALL, &["distill.teacher=personalized"], teacher);
    refused(SMALL, &[TAUGHT, "distill.teacher=\"\""], "`distill.teacher` is empty");
}

/// The first of two stages is the same run in float; the text encoder's steps are counted over both.
#[test]
fn the_first_of_two_stages_is_a_run_of_its_own() {
    let two = [CLASS, TAUGHT, "distill.teacher=personalized", "distill.personalize_steps=300"];
    let config = quiet(SUBJECT, &[&two[..], &["train.learning_rate=1e-5"]].concat());
    let first = config.first_stage().unwrap();
    assert_eq!((first.train.max_train_steps, first.train.learning_rate), (300, 1e-5));
    assert_eq!(first.output_dir, config.output_dir.join("personalized"));
    assert!(!first.palettize.enabled && !first.distill.enabled && first.first_stage().is_none());
    let apart = quiet(SUBJECT, &[&two[..], &["distill.personalize_learning_rate=2e-6"]].concat());
    assert_eq!(apart.first_stage().unwrap().train.learning_rate, 2e-6);
    assert_eq!((apart.train.learning_rate, apart.data.cache_dir.clone()), (1e-6, first.data.cache_dir));
    // It is a config as any other.
    let (again, warnings) = loaded(&config.first_stage().unwrap().resolved_toml(), &[]);
    assert_eq!((again.differences(&config.first_stage().unwrap()), warnings), (vec![], vec![]));
    let stop = |steps: u64| {
        let stop = format!("train.stop_text_encoder_training={steps}");
        loaded(SUBJECT, &[&two[..], &["train.train_text_encoder=true", &stop]].concat()).1
    };
    assert_eq!(stop(1099), Vec::<String>::new());
    assert!(
        stop(1100)[0].contains("the run ends before, after 1100 steps (distill.personalize_steps"),
        "{:?}",
        stop(1100)
    );
}

/// A run of an earlier version, whose resolved config has no such key, asked its teacher about all: it is not resumed as one
/// that asks about the class.
#[test]
fn a_run_that_asked_about_all_is_known() {
    let config = quiet(SUBJECT, &[CLASS, TAUGHT]);
    let resolved = config.resolved_toml();
    assert!(resolved.contains("on = \"class\""), "{resolved}");
    let earlier = parse_resolved(&resolved.replace("on = \"class\"\n", ""), "resolved.toml").unwrap();
    let found = earlier.differences(&config);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].to_string(), "`distill.on` was \"all\" and is now \"class\"");
    assert_eq!(found[0].change, Change::Refused);
    assert_eq!(parse_resolved(&resolved, "resolved.toml").unwrap().differences(&config), vec![]);
}

/// Whatever is on or off: the resolved config has neither mistakes nor keys without effect, but for those that a short run
/// does not come to, and means the same.
#[test]
fn a_resolved_config_has_nothing_to_warn_of() {
    let autoencoder = ["train.component=autoencoder", "palettize.enabled=false", "export.coreml=false"];
    for overrides in [
        vec![],
        vec!["palettize.enabled=false", "palettize.n_bits=2"],
        vec!["palettize.enabled=false", "export.coreml=false", "train.use_ema=true"],
        vec!["distill.enabled=true", "train.train_text_encoder=true", "train.max_train_steps=2"],
        vec!["train.max_train_steps=1", "sample.prompts=[\"a\"]", "palettize.freeze_fraction=1.0"],
        vec!["palettize.overrides=[{match=\"a*\", n_bits=4}, {match=\"*\", n_bits=2}]", "palettize.n_bits=3"],
        vec!["palettize.palettes=p", "palettize.n_bits=3"],
        vec!["distill.enabled=true", "distill.teacher=personalized", "distill.personalize_steps=9"],
        autoencoder.to_vec(),
    ] {
        let (config, _) = loaded(SMALL, &overrides);
        let (again, warnings) = loaded(&config.resolved_toml(), &[]);
        assert!(warnings.iter().all(|warning| warning.contains("train.max_train_steps")), "{warnings:?}");
        assert_eq!(config.differences(&again), [], "{overrides:?}");
        assert_eq!(again.resolved_toml(), config.resolved_toml());
    }
}

/// Resolved configs of earlier versions hold all keys, and runs resume from them.
#[test]
fn a_resolved_config_of_an_earlier_version_is_read() {
    let config = quiet(SMALL, &["palettize.enabled=false"]);
    let all = toml::to_string(&config).unwrap();
    assert!(all.contains("lr_power") && all.contains("group_size"));
    assert_eq!(parse_resolved(&all, "resolved.toml").unwrap(), config);
    let (_, warnings) = loaded(&all, &[]);
    assert!(!warnings.is_empty());
}
