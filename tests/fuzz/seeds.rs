//! The first inputs of every target, from the fixtures and from small files made here.

use std::collections::BTreeMap;
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use image::{DynamicImage, ImageFormat, RgbImage, RgbaImage};
use palettist::config;
use palettist::files::write_safetensors;
use palettist::palette::post_training::palettize;
use palettist::palette::{Form, LutDtype};
use tch::{Device, Kind, Tensor};

use crate::inputs::join_package;

type Error = Box<dyn std::error::Error>;

/// One input of a target.
pub struct Seed {
    pub target: &'static str,
    pub name: String,
    pub bytes: Vec<u8>,
}

/// Of all targets.
///
/// # Errors
/// When a fixture cannot be read.
pub fn all() -> Result<Vec<Seed>, Error> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut seeds = Vec::new();
    let mut put = |target, name: &str, bytes: &[u8]| {
        seeds.push(Seed { target, name: name.to_owned(), bytes: bytes.to_vec() });
        Ok(())
    };
    safetensors(root, &mut put)?;
    configs(root, &mut put)?;
    packages(root, &mut put)?;
    captions(&mut put)?;
    pictures(root, &mut put)?;
    loras(root, &mut put)?;
    palettes(&mut put)?;
    Ok(seeds)
}

type Put<'a> = &'a mut dyn FnMut(&'static str, &str, &[u8]) -> Result<(), Error>;

fn safetensors(root: &Path, put: Put) -> Result<(), Error> {
    let zeros = |shape: &[i64], kind| Tensor::zeros(shape, (kind, Device::Cpu));
    let kinds = [Kind::Float, Kind::Half, Kind::BFloat16, Kind::Int64, Kind::Uint8, Kind::Bool, Kind::Double];
    let mixed: Vec<_> = kinds.iter().map(|&kind| (format!("{kind:?}"), zeros(&[2, 3], kind))).collect();
    // The names by which a single file is known, each of few numbers.
    let names: [(&str, &[i64]); 14] = [
        ("model.diffusion_model.input_blocks.0.0.weight", &[8, 4, 3, 3]),
        ("model.diffusion_model.input_blocks.0.0.bias", &[8]),
        ("model.diffusion_model.input_blocks.1.0.in_layers.0.weight", &[8]),
        ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", &[8, 16]),
        ("model.diffusion_model.time_embed.0.weight", &[16, 8]),
        ("model.diffusion_model.out.2.weight", &[4, 8, 3, 3]),
        ("first_stage_model.encoder.conv_in.weight", &[8, 3, 3, 3]),
        ("first_stage_model.decoder.conv_out.weight", &[3, 8, 3, 3]),
        ("first_stage_model.quant_conv.weight", &[8, 8, 1, 1]),
        ("cond_stage_model.transformer.text_model.embeddings.token_embedding.weight", &[20, 16]),
        ("cond_stage_model.transformer.text_model.embeddings.position_embedding.weight", &[7, 16]),
        ("conditioner.embedders.1.model.token_embedding.weight", &[20, 16]),
        ("alphas_cumprod", &[3]),
        ("v_pred", &[0]),
    ];
    let single: Vec<_> = names.iter().map(|(name, shape)| ((*name).to_owned(), zeros(shape, Kind::Half))).collect();
    let metadata = BTreeMap::from([("modelspec.architecture".to_owned(), "stable-diffusion-v1".to_owned())]);
    let folder = tempfile::tempdir()?;
    for (name, tensors) in [("mixed", mixed), ("single", single), ("none", Vec::new())] {
        let path = folder.path().join(name);
        write_safetensors(&path, tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)), None, &metadata)?;
        put("safetensors", name, &fs::read(&path)?)?;
    }
    // Numbers of fp8 with a scale for the whole tensor and one for each row.
    let header = r#"{"a.weight":{"dtype":"F8_E4M3","shape":[2,2],"data_offsets":[0,4]},"a.scale_weight":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},"b.weight":{"dtype":"F8_E5M2","shape":[2,2],"data_offsets":[8,12]},"b.weight_scale":{"dtype":"F32","shape":[2,1],"data_offsets":[12,20]}}"#;
    let numbers: Vec<u8> = [0x38, 0x7e, 0x81, 0xff]
        .into_iter()
        .chain(2_f32.to_le_bytes())
        .chain([0x3c, 0x7b, 0x7c, 0xfe])
        .chain([0.5_f32, f32::INFINITY].into_iter().flat_map(f32::to_le_bytes))
        .collect();
    put("safetensors", "fp8", &[&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &numbers].concat())?;
    let whole = root.join("tests/fixtures/pipeline/model/text_encoder/model.safetensors");
    put("safetensors", "text_encoder", &fs::read(whole)?)
}

fn configs(root: &Path, put: Put) -> Result<(), Error> {
    for entry in fs::read_dir(root.join("configs"))? {
        let path = entry?.path();
        if path.is_file() {
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            put("configs", &name, &fs::read(&path)?)?;
        }
    }
    let every =
        config::parse("", "seed", &[]).map_or_else(|error| error.to_string(), |read| read.config.resolved_toml());
    put("configs", "every_key", every.as_bytes())?;
    let recipe = fs::read_to_string(root.join("configs/recipes/study-mixed.toml"))?;
    let small = "[model]\nname = \"m\"\n[data]\ntrain_data_dir = \"d\"\n[palettize]\nmode = \"dkm\"\n";
    put("configs", "recipe", format!("{small}\0{recipe}\0train.seed=3\0palettize.n_bits=2").as_bytes())?;
    let over = "[[palettize.overrides]]\nlayers = \"*attn*\"\nn_bits = 4\n";
    put(
        "configs",
        "overrides",
        format!("{over}\0\0data.caption_extension=[\".txt\"]\0train.mode=dreambooth").as_bytes(),
    )
}

fn packages(root: &Path, put: Put) -> Result<(), Error> {
    let mut found =
        vec![root.join("tests/fixtures/counted/iOS16.mlpackage"), root.join("tests/fixtures/counted/iOS17.mlpackage")];
    // Larger ones, where this checkout has them.
    let shared = root.join("../shared/data/coreml_packages");
    found.extend(["clip_pal4_ios16", "unet_pal4_cd2_ios18"].map(|name| shared.join(name).with_extension("mlpackage")));
    for path in found.iter().filter(|path| path.is_dir()) {
        let data = path.join("Data/com.apple.CoreML");
        let joined = join_package(&fs::read(data.join("model.mlmodel"))?, &fs::read(data.join("weights/weight.bin"))?);
        put("packages", &path.file_stem().unwrap_or_default().to_string_lossy(), &joined)?;
    }
    Ok(())
}

fn captions(put: Put) -> Result<(), Error> {
    let seeds: [(&str, &str); 7] = [
        ("sidecars", "\0a.png\0\0a.txt\0a cat\0b/c.jpg\0\0b/c.caption\0\u{feff}a dog \r\n with a hat"),
        (
            "jsonl",
            "{\"file_name\": \"a.png\", \"text\": \"a cat\"}\n{\"file_name\": \"b/c.jpg\", \"text\": \"a dog\"}\n\0a.png\0\0b/c.jpg\0",
        ),
        ("columns", "{\"image\": \"a.png\", \"prompt\": 3}\n[1]\nnull\n{}\0a.png\0"),
        (
            "kohya",
            "\x0010_sks dog/a.png\0\x0010_sks dog/a.txt\0a\0metadata.csv\0file_name,text\na.png,\"a, \"\"cat\"\"\"",
        ),
        (
            "csv",
            "\0metadata.csv\0\u{feff}text;file_name\r\n\"a \"\"cat\"\"\r\nat night\";b/a.png\r\n\0b/a.png\0\0a.png\0",
        ),
        ("unicode", "{\"file_name\": \"./e\u{301}\\\\b.png\", \"text\": \"\u{e9}\"}\0\u{e9}/b.png\0\0A.PNG\0\0a.gif\0"),
        ("odd", "\0.hidden/a.png\0\0._a.png\0x\0a.b.c.webp\0\0a.b.txt\0y\0README.txt\0z\0metadata1000.jsonl\0{}"),
    ];
    seeds.iter().try_for_each(|(name, text)| put("captions", name, text.as_bytes()))
}

fn pictures(root: &Path, put: Put) -> Result<(), Error> {
    let rgb = RgbImage::from_fn(19, 11, |x, y| image::Rgb([(x * 13) as u8, (y * 20) as u8, (x * y) as u8]));
    let rgba = RgbaImage::from_fn(9, 17, |x, y| image::Rgba([(x * 20) as u8, 7, (y * 9) as u8, (x * y) as u8]));
    let (rgb, rgba) = (DynamicImage::from(rgb), DynamicImage::from(rgba));
    let made = [
        ("rgb", ImageFormat::Png, rgb.clone()),
        ("rgba", ImageFormat::Png, rgba.clone()),
        ("gray16", ImageFormat::Png, DynamicImage::from(rgb.to_luma16())),
        ("jpeg", ImageFormat::Jpeg, rgb.clone()),
        ("gray", ImageFormat::Jpeg, DynamicImage::from(rgb.to_luma8())),
        ("lossless", ImageFormat::WebP, rgba.clone()),
        ("bitmap", ImageFormat::Bmp, rgb),
        ("bitmap_rgba", ImageFormat::Bmp, rgba),
    ];
    for (name, format, picture) in made {
        let mut bytes = Cursor::new(Vec::new());
        picture.write_to(&mut bytes, format)?;
        put("pictures", name, bytes.get_ref())?;
    }
    // EXIF, progressive, CMYK, lossy: files of others, where this checkout has them and they are small.
    let mut folders = vec![root.join("tests/fixtures/pictures"), root.join("../shared/data/loader_edge_cases")];
    folders.retain(|folder| folder.is_dir());
    for folder in folders {
        for path in fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<PathBuf>, Error>>()? {
            if fs::metadata(&path)?.len() < 40_000 {
                put("pictures", &path.file_name().unwrap_or_default().to_string_lossy(), &fs::read(&path)?)?;
            }
        }
    }
    Ok(())
}

fn loras(root: &Path, put: Put) -> Result<(), Error> {
    for entry in fs::read_dir(root.join("tests/fixtures/lora"))? {
        let path = entry?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        // What is expected of the others is large, and no LoRA.
        if path.extension() == Some("safetensors".as_ref()) && name != "expected" {
            put("loras", &name, &fs::read(&path)?)?;
        }
    }
    Ok(())
}

fn palettes(put: Put) -> Result<(), Error> {
    let plain = Form::per_tensor(2);
    let forms = [
        plain,
        Form { bits: 4, group_size: Some(4), ..plain },
        Form { bits: 6, per_channel_scale: true, ..plain },
        Form { bits: 8, lut_dtype: LutDtype::I8, ..plain },
        Form { bits: 4, cluster_dim: 2, axis: 1, ..plain },
    ];
    let folder = tempfile::tempdir()?;
    for (place, form) in forms.into_iter().enumerate() {
        let weight = Tensor::linspace(-1.0, 1.0, 8 * 4 * 9, (Kind::Float, Device::Cpu)).view([8, 4, 3, 3]);
        let bias = Tensor::zeros([3], (Kind::Float, Device::Cpu));
        let weights = [("weight", weight), ("bias", bias)].map(|(name, tensor)| Ok((name.to_owned(), tensor)));
        let chosen = BTreeMap::from([("weight".to_owned(), form)]);
        let checkpoint = palettize(weights.into_iter(), &chosen, Default::default(), BTreeMap::new(), &|_| ())
            .map_err(|e| e.to_string())?;
        let path = folder.path().join(place.to_string());
        checkpoint.write(&path)?;
        put("palettes", &format!("form{place}"), &fs::read(&path)?)?;
    }
    Ok(())
}
