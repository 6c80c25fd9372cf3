//! What is told of files that are wrong.

use super::*;

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
            "dog.toml:6:1: `data.resolution` is 100, but must be a multiple of 8 up to 8192",
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
        ("[train]\nmixed_precision = 1", "`train.mixed_precision`: is 1, expected \"no\" or \"bf16\""),
        ("[train]\ndevice = \"gpu\"", "is \"gpu\", expected \"auto\", \"cpu\", \"cuda\""),
        ("[train]\nmixed_precision = true", "is true, expected \"no\" or \"bf16\""),
        ("[train]\nmixed_precision = \"fp16\"", "is \"fp16\", expected \"no\" or \"bf16\""),
        (
            "[train]\nlr_scheduler = \"cosin\"",
            "is \"cosin\", expected \"constant\", \"constant_with_warmup\", \"linear\", \"cosine\", \
             \"cosine_with_restarts\", \"polynomial\"; did you mean `cosine`?",
        ),
        ("[logging]\nreport_to = [\"wandb\"]", "is `wandb`, expected `jsonl` or `tensorboard`"),
        ("[logging]\nreport_to = \"jsonl\"", "is string \"jsonl\", expected a list, as in [\"…\"]"),
        ("[train.optimizer]\nbetas = [0.9, 0.99, 0.999]", "expected two numbers"),
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
        ("betas = [0.9,\n0.99\n[train]\nlr_power = 2", "a list above lacks its closing `]`"),
        ("[model]", "the table [model] is there twice"),
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

/// A prompt with an escape code, and a recipe whose path has a line break, are told on a line each.
#[test]
fn a_mistake_has_one_line() {
    let text =
        format!("{SMALL}[sample]\nprompts = [\"a\\u001b[2J\\nb --x\"]\n[palettize]\nrecipe = \"C:\\new.toml\"\n");
    let error = parse(&text, "dog.toml", &[]).unwrap_err().to_string();
    assert_eq!(error.lines().count(), 2, "{error}");
    assert!(!error.contains('\u{1b}') && error.contains("\\u{1b}[2J\\nb --x"), "{error}");
}

#[test]
fn flags_in_prompts_are_checked() {
    let found = problems(&format!("{SMALL}[sample]\nprompts = [\"a cat\", \"a cat --x 3\"]\n"), &[]);
    assert_eq!(found.len(), 1);
    assert!(found[0].starts_with("dog.toml:8:1: `sample.prompts` (\"a cat --x 3\"): `--x` is not a flag"), "{found:?}");
    let found = problems(&format!("{SMALL}[sample]\nprompts = [\"a --n b --l 1\", \"a --n b\"]\n"), &[]);
    assert!(
        found.len() == 1 && found[0].contains("(\"a --n b --l 1\"): `--n` has no effect: guidance of 1"),
        "{found:?}"
    );
}

/// A scale of one pixel has no neighbours.
#[test]
fn the_scales_of_the_autoencoders_loss_fit_its_crops() {
    for (lines, expected) in [
        ("scales = 0", "`train.autoencoder.scales` is 0, but must be 1 to 4"),
        ("scales = 5", "`train.autoencoder.scales` is 5, but must be 1 to 4"),
        ("crop = 8\nscales = 4", "the last at least 2 px (of 8)"),
        ("gradient_weight = -1.0", "`train.autoencoder.gradient_weight` is -1"),
    ] {
        let text = format!("{SMALL}[train.autoencoder]\n{lines}\n");
        let overrides = ["train.component=autoencoder", "palettize.enabled=false", "export.coreml=false"];
        let found = problems(&text, &overrides);
        assert!(found.len() == 1 && found[0].contains(expected), "{found:?}");
    }
}
