use super::*;
use crate::coreml::components::Part;
use crate::ops::{Initial, Parameter};
use crate::source::lora::LoraChoice;

mod effects;
mod mistakes;

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
            "dog.toml:7:1: `data.resolution` is 100, but must be a multiple of 8 up to 8192",
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
        (":11:1", "`train.mode`: is \"lora\", expected \"full\" or \"dreambooth\""),
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
            "dog.toml:7:1: `data.resolution` is 100, but must be a multiple of 8 up to 8192",
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
    let weight = |name: &str, shape: &[i64]| {
        let (name, shape) = (name.to_owned(), shape.to_vec());
        Parameter { name, shape, initial: Initial::Uniform { fan_in: 1 }, palettizable: true }
    };
    let parameters = [
        weight("conv_in.weight", &[320, 4, 3, 3]),
        weight("conv_out.weight", &[4, 320, 3, 3]),
        weight("small.weight", &[16, 16]),
        Parameter { palettizable: false, ..weight("norm.weight", &[320, 320]) },
    ];
    let chosen = palettize.chosen(&parameters);
    let found: Vec<_> = chosen.forms.iter().map(|(name, form)| (name.as_str(), form.bits, form.group_size)).collect();
    assert_eq!(found, [("conv_in.weight", 8, Some(16))]);
    assert_eq!(chosen.misfits.len(), 1, "{:?}", chosen.misfits);
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
fn the_sampler_is_the_models_own_unless_named() {
    let prompts = "sample.prompts=[\"a dog\"]".to_string();
    let config = parse(SMALL, "dog.toml", std::slice::from_ref(&prompts)).unwrap().config;
    assert_eq!(config.sample.sampler.0, None);
    assert!(config.resolved_toml().contains("sampler = \"auto\""));
    let named = [prompts, "sample.sampler=\"DPM++ 2M Karras\"".to_string()];
    let config = parse(SMALL, "dog.toml", &named).unwrap().config;
    assert!(config.resolved_toml().contains("sampler = \"dpmpp_2m_karras\""));
    let problems = problems(SMALL, &["sample.sampler=deis"]);
    assert!(problems[0].contains("`deis` is not a sampler; the samplers are ddim, "), "{problems:?}");
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

/// The table of keys has every key of the schema once, and no other.
#[test]
fn the_table_of_keys_is_that_of_the_schema() {
    let mut schema = known::everything();
    schema.retain(|key| !key.ends_with('.'));
    let mut listed: Vec<String> = keys::KEYS.iter().map(|key| key.name.to_owned()).collect();
    schema.sort();
    listed.sort();
    assert_eq!(schema, listed);
}

/// `[export]` says what `export` would be told.
#[test]
fn packages_are_asked_for_as_export_asks() {
    let with = |lines: &str| format!("{SMALL}[export]\n{lines}\n");
    let config = quiet(&with("components = [\"vae_decoder\", \"unet\"]\nquantize_nbits = \"vae_decoder=3\""), &[]);
    assert_eq!(config.export.parts(), [Part::Unet, Part::VaeDecoder]);
    assert_eq!(config.export.min_deployment_target, DeploymentTarget::Ios18, "palettes of 3 bits");
    let resolved = config.resolved_toml();
    assert_eq!(parse(&resolved, "resolved", &[]).unwrap().config.export, config.export, "{resolved}");
    // Where nothing is said, what is trained.
    assert_eq!(quiet(SMALL, &[]).export.components, [Part::Unet]);
    let both = quiet(SMALL, &["train.train_text_encoder=true"]);
    assert_eq!(both.export.components, [Part::Unet, Part::TextEncoder]);
    for (lines, expected) in [
        ("components = []", "`export.components` is empty"),
        ("components = [\"unets\"]", "is `unets`, expected one of `unet`, `text_encoder`"),
        ("quantize_nbits = 5", "is 5"),
        ("quantize_nbits = \"unet=4\"", "`export.quantize_nbits` names the UNet, which has the palettes of the run"),
        ("quantize_nbits = \"vae_decoder=4\"", "names vae_decoder, which export.components leaves out"),
        ("attention_implementation = \"SPLIT\"", "SPLIT_EINSUM"),
        (
            "components = [\"vae_decoder\"]\nquantize_nbits = 3\nmin_deployment_target = \"iOS16\"",
            "does not hold palettes of 3 bits, as of vae_decoder: set \"iOS18\"",
        ),
    ] {
        let found = problems(&with(lines), &[]);
        assert!(found.iter().any(|problem| problem.contains(expected)), "{lines}: {found:?}");
    }
}

#[test]
fn loras_are_tables_of_a_path_and_weights() {
    let table =
        "[[model.loras]]\npath = \"a.safetensors\"\n[[model.loras]]\npath = \"b\"\nweight = -1\nte_weight = 0.5\n";
    let config = quiet(&format!("{SMALL}{table}"), &[]);
    let lora = |path: &str, weight, te_weight| LoraChoice { path: path.into(), weight, te_weight };
    assert_eq!(config.model.loras, [lora("a.safetensors", 1.0, None), lora("b", -1.0, Some(0.5))]);
    assert_eq!(config.model.options().loras, config.model.loras);
    // Written out and read again, among the other keys of its section.
    let read = parse(&config.resolved_toml(), "resolved", &[]).unwrap();
    assert_eq!((read.config, read.warnings), (config, Vec::new()));
    let inline = quiet(SMALL, &["model.loras=[{ path = \"b\", weight = 2 }]"]);
    assert_eq!(inline.model.loras, [lora("b", 2.0, None)]);

    let said = |text: &str| problems(&format!("{SMALL}[[model.loras]]\n{text}\n"), &[]).join("\n");
    for (text, expected) in [
        ("wieght = 1", "unknown key `wieght` in [[model.loras]]; did you mean `weight`?"),
        ("weight = 1", "a table of the list lacks `path`"),
        ("path = \"\"", "names no file (entry 1)"),
        ("path = \"a\"\nweight = inf", "a finite number is expected"),
        ("path = \"a\"\nweight = \"much\"", "expected a number"),
    ] {
        assert!(said(text).contains(expected), "{text}: {}", said(text));
    }
    let scratch = problems(&format!("{SMALL}{table}"), &["model.train_from_scratch=true"]).join("\n");
    assert!(scratch.contains("`model.loras` can't be merged with model.train_from_scratch"), "{scratch}");
    let kohya = problems(SMALL, &["model.base_weights=[]"]).join("\n");
    assert!(kohya.contains("[[model.loras]]"), "{kohya}");
}
