use toml::Table;

use super::*;

/// The config of a text, and nothing to warn of.
fn quiet(text: &str, overrides: &[&str]) -> Config {
    let (config, warnings) = loaded(text, overrides);
    assert_eq!(warnings, Vec::<String>::new());
    config
}

/// The config of a text, and what is warned of.
fn loaded(text: &str, overrides: &[&str]) -> (Config, Vec<String>) {
    let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
    let Loaded { config, warnings } = parse(text, "dog.toml", &overrides).unwrap_or_else(|error| panic!("{error}"));
    (config, warnings.iter().map(ToString::to_string).collect())
}

const SMALL: &str = r#"
name = "dog"
[model]
pretrained_model_name_or_path = "models/sd15"
[data]
train_data_dir = "data/dog"
"#;

fn problems(text: &str, overrides: &[&str]) -> Vec<String> {
    let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
    let error = parse(text, "dog.toml", &overrides).expect_err("the config is wrong");
    error.problems.iter().map(|p| format!("{}: {}", p.place, p.message)).collect()
}

#[test]
fn the_smallest_config_gets_every_default() {
    let config = quiet(SMALL, &[]);
    assert_eq!(config.output_dir, Path::new("runs/dog"));
    assert_eq!(config.data.cache_dir, Path::new("runs/cache"));
    assert_eq!(config.train.learning_rate, 5e-6);
    assert_eq!(config.train.text_encoder_lr, 2.5e-6);
    assert_eq!((config.export.latent_h, config.export.latent_w), (64, 64));
}

#[test]
fn defaults_follow_the_keys_they_depend_on() {
    let config = quiet(SMALL, &["train.learning_rate=1e-4", "data.resolution=256"]);
    assert_eq!(config.train.text_encoder_lr, 5e-5);
    assert_eq!(config.palettize.palette_learning_rate, 1e-4);
    assert_eq!(config.export.latent_h, 32);
    let dreambooth = r#"
        train.mode = "dreambooth"
        model.pretrained_model_name_or_path = "m"
        [data.dreambooth]
        instance_data_dir = "a"
        class_data_dir = "b"
        instance_prompt = "a photo of sks dog"
        class_prompt = "a photo of dog"
    "#;
    let config = quiet(dreambooth, &[]);
    assert_eq!((config.train.learning_rate, config.data.caption_dropout_rate), (1e-6, 0.0));
}

#[test]
fn the_resolved_config_reads_back_to_itself() {
    for text in
        [SMALL.to_string(), SMALL.replace("[model]", "train.min_snr_gamma = 5\ntrain.timestep_beta = [3, 1]\n[model]")]
    {
        let config = quiet(&text, &[]);
        assert_eq!(quiet(&config.resolved_toml(), &[]), config);
    }
}

#[test]
fn a_recipe_says_the_bits_and_overrides_say_otherwise() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = folder.path().join("mixed.toml");
    std::fs::write(&recipe, "recipe_version = 1\n[layers]\nconv_in.weight = 8\na.weight = 2\nb.weight = 16\n").unwrap();
    let text = format!(
        "{SMALL}\n[palettize]\nrecipe = '{}'\n[[palettize.overrides]]\nmatch = \"a.*\"\nn_bits = 6\n",
        recipe.display()
    );
    let config = quiet(&text, &[]);
    let bits = |name: &str| config.palettize.bits_of(name, 1 << 20);
    let names = ["conv_in.weight", "a.weight", "b.weight", "not.named.weight"];
    assert_eq!(names.map(bits), [Some(8), Some(6), None, None]);
    // A run's resolved config says the same without the file.
    std::fs::remove_file(&recipe).unwrap();
    let resolved = quiet(&config.resolved_toml(), &[]);
    assert_eq!((resolved.palettize.recipe, resolved.palettize.overrides), (None, config.palettize.overrides));
    let gone = problems(&text, &[]);
    assert!(gone[0].contains("mixed.toml: the recipe can't be read"), "{gone:?}");
    std::fs::write(&recipe, "recipe_version = 1\n[layers]\n\na.weight = 7\n").unwrap();
    assert!(problems(&text, &[])[0].contains("mixed.toml:4:3: `a.weight` has 7 bits"));
}

#[test]
fn a_misspelt_key_names_the_nearest_with_line_and_column() {
    let text = format!("{SMALL}\n[train]\nlearning_rte = 1e-6\n  max_train_step = 3\n");
    assert_eq!(
        problems(&text, &[]),
        [
            "dog.toml:9:1: unknown key `learning_rte` in [train]; did you mean `learning_rate`?",
            "dog.toml:10:3: unknown key `max_train_step` in [train]; did you mean `max_train_steps`?",
        ]
    );
    assert_eq!(
        problems(&format!("{SMALL}\n[trian]\nx = 1"), &[]),
        ["dog.toml:8:2: unknown key `trian`; did you mean `train`?", "dog.toml:9:1: unknown key `x` in [train]"]
    );
}

/// A misspelt key and a wrong type hide no other mistakes, and make none up of what they leave missing.
#[test]
fn what_is_written_is_checked_beside_what_cannot_be_read() {
    let text = SMALL.replace("train_data_dir", "train_data_dri") + "resolution = 100\n[palettize]\nn_bits = 5\n";
    assert_eq!(
        problems(&(text + "weight_threshold = \"many\"\n"), &["train.max_train_steps=0"]),
        [
            "dog.toml:6:1: unknown key `train_data_dri` in [data]; did you mean `train_data_dir`?",
            "dog.toml:10:1: `palettize.weight_threshold`: is string \"many\", expected a whole number of at least 0",
            "dog.toml:7:1: `data.resolution` is 100, but must be a multiple of 8",
            "`train.max_train_steps=0` on the command line: `train.max_train_steps` must be at least 1",
            "dog.toml:9:1: `palettize.n_bits` is 5, but Core ML has palettes of 1, 2, 3, 4, 6 or 8 bits",
        ]
    );
}

#[test]
fn weights_in_bf16_need_networks_that_compute_in_it() {
    let text = format!("{SMALL}[train]\nfull_bf16 = true\n");
    let found = problems(&text, &[]);
    assert!(found[0].starts_with("dog.toml:8:1: `train.full_bf16` needs train.mixed_precision"), "{found:?}");
    let config = quiet(&text, &["train.mixed_precision=bf16"]);
    assert!(config.train.is_bf16(&[4, 4]) && !config.train.is_bf16(&[4]));
}

#[test]
fn a_key_in_the_wrong_table_or_with_another_tools_name_is_sent_home() {
    assert_eq!(
        problems(&format!("{SMALL}learning_rate = 1e-6\nsnr_gamma = 5.0\nseed = 1"), &[]),
        [
            "dog.toml:7:1: unknown key `learning_rate` in [data]; it belongs in [train]",
            "dog.toml:8:1: unknown key `snr_gamma` in [data]; here it is `train.min_snr_gamma`",
            "dog.toml:9:1: unknown key `seed` in [data]; it belongs at the top, before the first [table]",
        ]
    );
}

#[test]
fn every_ill_typed_value_is_named() {
    let text = format!(
        "{SMALL}resolution = \"512\"\nflip_aug = 1\n[train]\ntrain_batch_size = -1\nmode = \"lora\"\n\
         learning_rate = \"1e-6\"\nmax_train_steps = 1.5\noptimizer = 3\n"
    );
    let found = problems(&text, &[]);
    for (i, (line, what)) in [
        (":14:1", "`train.optimizer` is a table; write its keys under [train.optimizer]"),
        (":7:1", "`data.resolution`: is string \"512\", expected a whole number"),
        (":8:1", "`data.flip_aug`: is integer `1`, expected true or false"),
        (":10:1", "`train.train_batch_size`: is integer `-1`, expected a whole number of at least 0"),
        (":11:1", "`train.mode`: is `lora`, expected `full` or `dreambooth`"),
        (":12:1", "`train.learning_rate`: is string \"1e-6\", expected a number"),
        (":13:1", "`train.max_train_steps`: is floating point `1.5`, expected a whole number of at least 0"),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(found[i], format!("dog.toml{line}: {what}"));
    }
    assert_eq!(found.len(), 7);
}

#[test]
fn what_does_not_fit_together_is_told_all_at_once() {
    let text = format!("{SMALL}resolution = 100\n[palettize]\nn_bits = 5\n[checkpoint]\ncheckpoints_total_limit = 1");
    assert_eq!(
        problems(&text, &["train.component=autoencoder", "train.max_train_steps=0"]),
        [
            "dog.toml:7:1: `data.resolution` is 100, but must be a multiple of 8",
            "`train.max_train_steps=0` on the command line: `train.max_train_steps` must be at least 1",
            "dog.toml: `palettize.enabled` is only for the UNet; with train.component = \"autoencoder\" set it to false",
            "dog.toml: `export.coreml` is only for the UNet; with train.component = \"autoencoder\" set it to false",
            "dog.toml:9:1: `palettize.n_bits` is 5, but Core ML has palettes of 1, 2, 3, 4, 6 or 8 bits",
            "dog.toml:11:1: `checkpoint.checkpoints_total_limit` must be at least 2, so that a good checkpoint is \
             there while the next is written",
        ]
    );
}

/// Forms are checked, and what they need of the system that the package is for, before anything is trained.
#[test]
fn palettes_know_what_they_need() {
    let with = |lines: &str| format!("{SMALL}[palettize]\n{lines}\n");
    // Palettes of 3 bits are trained, and the package is for the first system that has them.
    let config = quiet(&with("n_bits = 3"), &[]);
    assert_eq!(config.export.min_deployment_target, DeploymentTarget::Ios18);
    let config = quiet(&with("n_bits = 4"), &[]);
    assert_eq!(config.export.min_deployment_target, DeploymentTarget::Ios16);
    let config = quiet(SMALL, &["palettize.overrides=[{match=\"conv_in.*\", n_bits=3}]"]);
    assert_eq!(config.export.min_deployment_target, DeploymentTarget::Ios18);
    assert_eq!(
        problems(&with("n_bits = 3"), &["export.min_deployment_target=macOS14"]),
        ["`export.min_deployment_target=macOS14` on the command line: `export.min_deployment_target` does not hold \
          palettes of 3 bits: set \"iOS18\" (macOS15)"]
    );
    assert!(
        parse(
            &with("n_bits = 3"),
            "dog.toml",
            &["export.coreml=false".into(), "export.min_deployment_target=iOS16".into()]
        )
        .is_ok()
    );
    // What no weight can have.
    for (lines, expected) in [
        ("group_axis = 2", "`palettize.group_axis` is 2, but must be 0"),
        ("cluster_dim = 3", "`palettize.cluster_dim` is 3, but an entry holds 1, 2 or 4 weights"),
        ("granularity = \"per_grouped_channel\"\ngroup_size = 0", "`palettize.group_size` is 0"),
        ("enable_per_channel_scale = true\ncluster_dim = 2", "`palettize.enable_per_channel_scale` goes only with"),
    ] {
        let found = problems(&with(lines), &[]);
        assert!(found.iter().any(|problem| problem.contains(expected)), "{found:?}");
        assert!(parse(&with(&format!("enabled = false\n{lines}")), "dog.toml", &[]).is_ok());
    }
    for lines in [
        "granularity = \"per_grouped_channel\"",
        "enable_per_channel_scale = true",
        "lut_dtype = \"i8\"",
        "cluster_dim = 2",
    ] {
        let config = quiet(&with(lines), &[]);
        assert_eq!(config.export.min_deployment_target, DeploymentTarget::Ios18, "{lines}");
    }
}

#[test]
fn a_weight_has_the_form_of_its_bits_where_it_fits() {
    let mut palettize = Palettize { granularity: Granularity::PerGroupedChannel, ..Palettize::default() };
    palettize.overrides = vec![PaletteOverride { pattern: "conv_in.weight".into(), n_bits: Some(8), skip: false }];
    let form = palettize.form_of("conv_in.weight", &[320, 4, 3, 3]).unwrap();
    assert_eq!((form.bits, form.group_size), (8, Some(16)));
    assert_eq!(palettize.form_of("conv_out.weight", &[4, 320, 3, 3]), None);
    assert_eq!(palettize.form_of("small.weight", &[16, 16]), None);
}

#[test]
fn overrides_win_over_the_file_and_need_no_second_quotes() {
    let overrides = [
        "name=cat",
        "train.max_train_steps=20",
        "sample.prompts=[\"a cat\", \"a = b\"]",
        "model.pretrained_model_name_or_path=/models/sd 1.5",
        "palettize.overrides=[{match=\"conv_in.*\", skip=true}]",
    ];
    let (config, _) = loaded(SMALL, &overrides);
    assert_eq!(config.output_dir, Path::new("runs/cat"));
    assert_eq!(config.train.max_train_steps, 20);
    assert_eq!(config.sample.prompts, ["a cat", "a = b"]);
    assert_eq!(config.model.pretrained_model_name_or_path, "/models/sd 1.5");
    assert!(config.palettize.overrides[0].skip);
    assert_eq!(
        problems(SMALL, &["train.max_train_stps=20", "seed", "train=1", "seed=x"]),
        [
            "`train.max_train_stps=20` on the command line: unknown key `max_train_stps` in [train]; did you mean \
             `max_train_steps`?",
            "`seed` on the command line: is not of the form key=value",
            "`train=1` on the command line: `train` is a table; give one of its keys, train.…=value",
            "`seed=x` on the command line: `seed`: is string \"x\", expected a whole number of at least 0",
        ]
    );
}

#[test]
fn broken_toml_says_where() {
    let found = problems("name = \"dog\"\n[model\n", &[]);
    assert!(found[0].starts_with("dog.toml:2:"), "{found:?}");
    let found = problems("seed = 1\nseed = 2\n", &[]);
    assert!(found[0].starts_with("dog.toml:2:1") && found[0].contains("duplicate key"), "{found:?}");
}

#[test]
fn a_misspelt_key_in_an_array_of_tables_is_found() {
    let text = format!("{SMALL}[[palettize.overrides]]\nmatch = \"*\"\nnbits = 2\n");
    let found = problems(&text, &[]);
    assert_eq!(found[0], "dog.toml:9:1: unknown key `nbits` in [[palettize.overrides]]; did you mean `n_bits`?");
}

/// Keys that are absent by default must be in `every_key`, or they would be called unknown.
#[test]
fn every_key_of_the_schema_can_be_written() {
    let every = toml::to_string(&defaults::every_key()).unwrap();
    let read: Config = toml::from_str(&every).unwrap();
    assert_eq!(read, defaults::every_key());
    let source = include_str!("schema.rs");
    for line in source.lines().filter(|line| line.trim().starts_with("pub ") && line.contains(": Option<")) {
        let name = line.trim().trim_start_matches("pub ").split(':').next().unwrap();
        assert!(every.contains(&format!("\n{name} = ")) || every.contains(&format!(".{name}]")), "{name}");
    }
}

/// The table of keys has every key of the schema once, and no other.
#[test]
fn the_table_of_keys_is_that_of_the_schema() {
    let every = Table::try_from(defaults::every_key()).unwrap();
    let mut schema: Vec<String> = read::leaves(&every, "").into_iter().map(|(key, _)| key).collect();
    let mut listed: Vec<String> = keys::KEYS.iter().map(|key| key.name.to_owned()).collect();
    schema.sort();
    listed.sort();
    assert_eq!(schema, listed);
}

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
            "[train.autoencoder]\nkl_weight = 1\ncrop = 64",
            "`train.autoencoder.kl_weight`, `train.autoencoder.crop` have no",
        ),
        ("[distill]\nlambda_kd_feat = 0.5", "`distill.lambda_kd_feat` has no effect: the float model does not teach"),
        ("[palettize]\ngroup_size = 8", "`palettize.group_size` has no effect: it is for palettize.granularity"),
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
            "[palettize]\npalette_learning_rate = 1e-3\nfreeze_fraction = 0",
            vec![],
            "`palettize.palette_learning_rate` has no effect",
        ),
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

/// What is missing is told beside what is misspelt, unless that is what was meant.
#[test]
fn an_unknown_key_hides_nothing() {
    let text =
        "name = \"a b\"\n[modle]\ntrain_from_scratch = 1\n[data]\ncolour = 3\nresolution = 100\n[train]\nlr = \"x\"\n";
    assert_eq!(
        problems(text, &["train.max_train_stps=0"]),
        [
            "dog.toml:2:2: unknown key `modle`; did you mean `model`?",
            "dog.toml:5:1: unknown key `colour` in [data]",
            "dog.toml:8:1: unknown key `lr` in [train]; here it is `train.learning_rate`",
            "`train.max_train_stps=0` on the command line: unknown key `max_train_stps` in [train]; did you mean \
             `max_train_steps`?",
            "dog.toml:3:1: `model.train_from_scratch`: is integer `1`, expected true or false",
            "dog.toml:8:1: `train.learning_rate`: is string \"x\", expected a number",
            "dog.toml:1:1: `name` is \"a b\"; use letters, digits, `-`, `_` and `.`, because files are named after it",
            "dog.toml: `model.pretrained_model_name_or_path` is missing: the model to start from, a diffusers folder or a \
             single-file checkpoint (.safetensors)",
            "dog.toml:6:1: `data.resolution` is 100, but must be a multiple of 8",
            "dog.toml: `data.train_data_dir` is missing: the folder of pictures and captions",
            "`train.max_train_stps=0` on the command line: `train.max_train_steps` must be at least 1",
        ]
    );
    let recipe = problems(&format!("{SMALL}resolution = 100\n[palettize]\nrecipe = \"no.toml\"\n"), &[]);
    assert!(recipe.len() == 2 && recipe[0].contains("no.toml: the recipe can't be read"), "{recipe:?}");
}

#[test]
fn values_of_another_type_are_told_in_plain_words() {
    for (lines, expected) in [
        ("[train]\nmixed_precision = 1", "`train.mixed_precision`: is 1, expected `no` or `bf16`, in quotes"),
        ("[train]\nmixed_precision = true", "is true, expected `no` or `bf16`, in quotes"),
        ("[train]\nmixed_precision = \"fp16\"", "is `fp16`, expected `no` or `bf16`"),
        (
            "[train]\nlr_scheduler = \"cosin\"",
            "is `cosin`, expected `constant`, `constant_with_warmup`, `linear`, `cosine`, `cosine_with_restarts`, `polynomial`; did you mean `cosine`?",
        ),
        ("[logging]\nreport_to = [\"wandb\"]", "is `wandb`, expected `jsonl` or `tensorboard`"),
        ("[logging]\nreport_to = \"jsonl\"", "is string \"jsonl\", expected a list, as in [\"…\"]"),
        ("[train.optimizer]\nbetas = [0.9]", "has the length 1, expected a list of two numbers"),
        ("[sample]\nprompts = \"a cat\"", "is string \"a cat\", expected a list"),
        (
            "[palettize.overrides]\nmatch = \"a\"",
            "`palettize.overrides` is a list of tables; write [[palettize.overrides]]",
        ),
        ("[[palettize.overrides]]\nn_bits = 4", "a table of the list lacks `match`"),
        ("[train]\nlearning_rate = { a = 1 }", "`train.learning_rate` is a table, expected a value"),
    ] {
        let found = problems(&format!("{SMALL}{lines}\n"), &[]);
        assert!(found.len() == 1 && found[0].contains(expected), "{found:?}");
    }
}

/// Each slip has one line with its place, and words of its own; the rest of the file is read.
#[test]
fn slips_of_toml_are_explained() {
    for (line, expected) in [
        (
            r#"name = "C:\Users\me""#,
            r#"dog.toml:8:13: is not TOML here: in "…" a backslash begins an escape; write the text in '…', as in 'C:\Users\me'"#,
        ),
        (r#"name = "C:\data""#, "write the text in '…'"),
        ("name = data/dog", "dog.toml:8:8: is not TOML here: text needs quotes: 'data/dog'"),
        ("name = dog", "text needs quotes: 'dog'"),
        ("flag = True", "write true, in small letters"),
        ("flag = FALSE", "write false, in small letters"),
        ("flag = None", "`None` is not a value; to leave a key out, put `#` before it"),
        ("flag = null", "to leave a key out"),
        ("flag = no", "`no` is not a value; text needs quotes: \"no\""),
        ("name = \"dog", "a text lacks its closing quote"),
        ("name = dog\"", "a text lacks its opening quote"),
        ("seed: 1", "a key and its value have `=` between them: seed = 1"),
        ("model:", "a table is written [model]"),
        ("seed 1", "there is no `=`"),
        ("name = “dog”", "it has typographic quotes"),
        ("rate = 1e−6", "it has a typographic minus or dash"),
        ("seed = 1;", "a line does not end in `;`: write 1"),
        ("seed = 1,", "a line does not end in `,`"),
        ("seed = 1,000", "a number has no commas"),
        ("seed = 1 // one", "comments begin with `#`: write 1 # …"),
        ("// one", "comments begin with `#`"),
        ("rate = .5", "as in 0.5"),
        ("seed = 007", "a number does not begin with 0"),
        ("seed = ", "there is no value after `=`"),
        ("name = 'it's'", "text in '…' can't hold a `'`"),
        ("seed = 1\nseed = 2", "dog.toml:9:1: is not TOML here: duplicate key `seed`: it is written twice"),
        ("[train", "a [table] lacks its closing `]`"),
        ("betas = [0.9 0.99]", "needs commas between its numbers"),
    ] {
        let found = problems(&format!("{SMALL}[train.optimizer]\n{line}\n"), &[]);
        let syntax: Vec<&String> = found.iter().filter(|problem| problem.contains("is not TOML here")).collect();
        assert!(syntax.len() == 1 && syntax[0].contains(expected), "{line}: {found:?}");
    }
    // Two slips, and a mistake of another kind.
    let found = problems("name = dog\nseed = \"x\"\n[data]\nflip_aug = True\n", &[]);
    assert_eq!(found.len(), 3, "{found:?}");
    // These are no slips.
    for text in [
        SMALL.replace('\n', "\r\n"),
        SMALL.replace("\nname", "\n\tname"),
        format!("{SMALL}[train]\nlearning_rate = 1e-6\nmax_train_steps = 1_000\n"),
    ] {
        quiet(&text, &[]);
    }
    // Escapes that there are: a tab and a line break in a path.
    let found = problems(&SMALL.replace("data/dog", "C:\\temp\\new"), &[]);
    assert!(
        found.len() == 1 && found[0].contains("`data.train_data_dir` is \"C:\\temp\\new\", with control characters"),
        "{found:?}"
    );
}

#[test]
fn files_that_are_no_utf8_text_are_named_for_what_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dog.toml");
    let utf16: Vec<u8> = [0xff, 0xfe].into_iter().chain(SMALL.encode_utf16().flat_map(u16::to_le_bytes)).collect();
    for (bytes, expected) in [
        (utf16, "is text in UTF-16"),
        (b"name = \"d\xf6g\"".to_vec(), "is not text in UTF-8 (line 1)"),
        (b"\x08\0\0\0\0\0\0\0{}".to_vec(), "is not a text file"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let error = load(&path, &[]).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    assert!(load(folder.path(), &[]).unwrap_err().to_string().contains("is a folder"));
    std::fs::write(&path, format!("\u{feff}{SMALL}")).unwrap();
    assert!(load(&path, &[]).is_ok());
}

#[test]
fn flags_in_prompts_are_checked() {
    let found = problems(&format!("{SMALL}[sample]\nprompts = [\"a cat\", \"a cat --x 3\"]\n"), &[]);
    assert_eq!(found.len(), 1);
    assert!(found[0].starts_with("dog.toml:8:1: `sample.prompts` (\"a cat --x 3\"): `--x` is not a flag"), "{found:?}");
}
