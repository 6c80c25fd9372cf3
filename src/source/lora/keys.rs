//! The names of tensors in files of LoRAs, as everybody writes them: which layer, and which part of its change.

/// A part of the change of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The factor next to the input, `[rank, in, …]`: kohya's `lora_down`, PEFT's `lora_A`.
    Down,
    /// The factor next to the output, `[out, rank]`: `lora_up`, `lora_B`.
    Up,
    /// What LoCon has between the two: `lora_mid`, `[rank, rank, kh, kw]`.
    Mid,
    /// PEFT's `lora_bias`: the change of the bias.
    UpBias,
    /// The factors of an embedding of tokens (PEFT), the other way round.
    EmbeddingDown,
    EmbeddingUp,
    /// The factors of LoHa's two products.
    Hada1A,
    Hada1B,
    Hada1T,
    Hada2A,
    Hada2B,
    Hada2T,
    /// The two sides of LoKr's Kronecker product, whole or in factors.
    Kron1,
    Kron1A,
    Kron1B,
    Kron2,
    Kron2A,
    Kron2B,
    Kron2T,
    /// The whole change of the weight.
    Difference,
    /// The whole change of the bias.
    BiasDifference,
    /// What the change is multiplied by, times its rank.
    Alpha,
    /// A further factor of LyCORIS.
    Scalar,
    /// DoRA's magnitudes as LyCORIS has them.
    DoraScale,
    /// DoRA's magnitudes as PEFT has them.
    Magnitude,
}

/// Who writes names in this way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Layout {
    Kohya,
    Peft,
    Diffusers,
    /// Older diffusers: attention processors.
    Processors,
    Cloneofsimo,
}

impl Layout {
    /// What messages call it.
    pub fn title(self) -> &'static str {
        match self {
            Layout::Kohya => "kohya's layout",
            Layout::Peft => "PEFT's layout",
            Layout::Diffusers => "diffusers' layout",
            Layout::Processors => "the layout of diffusers' old attention processors",
            Layout::Cloneofsimo => "cloneofsimo's layout",
        }
    }
}

/// What the name of a tensor says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// The layer as the file calls it: `lora_unet_…`, `unet.down_blocks.…`, `unet:12`.
    pub module: String,
    pub part: Part,
    pub layout: Layout,
}

/// Endings that stand for one part each.
const ENDINGS: &[(&str, Part, Layout)] = &[
    (".lora_down.weight", Part::Down, Layout::Kohya),
    (".lora_up.weight", Part::Up, Layout::Kohya),
    (".lora_mid.weight", Part::Mid, Layout::Kohya),
    (".lora_linear_layer.down.weight", Part::Down, Layout::Diffusers),
    (".lora_linear_layer.up.weight", Part::Up, Layout::Diffusers),
    (".lora.down.weight", Part::Down, Layout::Diffusers),
    (".lora.up.weight", Part::Up, Layout::Diffusers),
    (".lora_linear_layer.alpha", Part::Alpha, Layout::Diffusers),
    (".lora.alpha", Part::Alpha, Layout::Diffusers),
    (".network_alpha", Part::Alpha, Layout::Diffusers),
    (".alpha", Part::Alpha, Layout::Kohya),
    (".scalar", Part::Scalar, Layout::Kohya),
    (".dora_scale", Part::DoraScale, Layout::Kohya),
    (".hada_w1_a", Part::Hada1A, Layout::Kohya),
    (".hada_w1_b", Part::Hada1B, Layout::Kohya),
    (".hada_t1", Part::Hada1T, Layout::Kohya),
    (".hada_w2_a", Part::Hada2A, Layout::Kohya),
    (".hada_w2_b", Part::Hada2B, Layout::Kohya),
    (".hada_t2", Part::Hada2T, Layout::Kohya),
    (".lokr_w1", Part::Kron1, Layout::Kohya),
    (".lokr_w1_a", Part::Kron1A, Layout::Kohya),
    (".lokr_w1_b", Part::Kron1B, Layout::Kohya),
    (".lokr_w2", Part::Kron2, Layout::Kohya),
    (".lokr_w2_a", Part::Kron2A, Layout::Kohya),
    (".lokr_w2_b", Part::Kron2B, Layout::Kohya),
    (".lokr_t2", Part::Kron2T, Layout::Kohya),
    (".diff", Part::Difference, Layout::Kohya),
    (".diff_b", Part::BiasDifference, Layout::Kohya),
    (".w_norm", Part::Difference, Layout::Kohya),
    (".b_norm", Part::BiasDifference, Layout::Kohya),
];

/// PEFT's parts; the name of an adapter may follow, and `.weight` or `.bias` after it.
const PEFT: &[(&str, Part)] = &[
    (".lora_A", Part::Down),
    (".lora_B", Part::Up),
    (".lora_embedding_A", Part::EmbeddingDown),
    (".lora_embedding_B", Part::EmbeddingUp),
    (".lora_magnitude_vector", Part::Magnitude),
];

/// The linear layers that diffusers' old attention processors hold, in the UNet's names and the text encoders'.
const PROCESSED: &[(&str, &str, &str)] = &[
    (".to_q_lora", ".to_q", ".q_proj"),
    (".to_k_lora", ".to_k", ".k_proj"),
    (".to_v_lora", ".to_v", ".v_proj"),
    (".to_out_lora", ".to_out.0", ".out_proj"),
];

/// What the tensor `name` is; `None` where no LoRA that can be merged has such a name.
pub fn key(name: &str) -> Option<Key> {
    cloneofsimo(name).or_else(|| processor(name)).or_else(|| peft(name)).or_else(|| {
        // Of endings that end alike the longest comes first in the table.
        ENDINGS.iter().find_map(|&(ending, part, layout)| {
            let module = name.strip_suffix(ending).filter(|module| !module.is_empty())?;
            // LyCORIS' parts within PEFT's names are PEFT's own LoHa and LoKr.
            let layout = if module.starts_with("base_model.") { Layout::Peft } else { layout };
            Some(Key { module: module.to_owned(), part, layout })
        })
    })
}

/// `unet:12:down`, where the number counts the layers.
fn cloneofsimo(name: &str) -> Option<Key> {
    let (module, part) = name.rsplit_once(':')?;
    let (network, number) = module.split_once(':')?;
    number.parse::<usize>().ok()?;
    let part = match (network, part) {
        ("unet" | "text_encoder" | "text_encoder_2", "up") => Part::Up,
        ("unet" | "text_encoder" | "text_encoder_2", "down") => Part::Down,
        _ => return None,
    };
    Some(Key { module: module.to_owned(), part, layout: Layout::Cloneofsimo })
}

/// `….attn1.processor.to_q_lora.down.weight`, `….self_attn.to_q_lora.up.weight`.
fn processor(name: &str) -> Option<Key> {
    let ends = [
        (".down.weight", Part::Down),
        (".up.weight", Part::Up),
        (".network_alpha", Part::Alpha),
        (".alpha", Part::Alpha),
    ];
    let (rest, part) = ends.into_iter().find_map(|(end, part)| Some((name.strip_suffix(end)?, part)))?;
    let (module, of_unet, of_text) =
        PROCESSED.iter().find_map(|&(end, unet, text)| Some((rest.strip_suffix(end)?, unet, text)))?;
    let module = match module.strip_suffix(".processor") {
        Some(module) => format!("{module}{of_unet}"),
        None if module.ends_with("self_attn") => format!("{module}{of_text}"),
        None => format!("{module}{of_unet}"),
    };
    Some(Key { module, part, layout: Layout::Processors })
}

/// `….lora_A.weight`, `….lora_A.default.weight`, `….lora_embedding_A`, `….lora_magnitude_vector`.
fn peft(name: &str) -> Option<Key> {
    let (module, part, rest) = PEFT.iter().find_map(|&(word, part)| {
        let at = name.find(word).filter(|at| *at > 0)?;
        Some((&name[..at], part, &name[at + word.len()..]))
    })?;
    let rest: Vec<&str> = match rest {
        "" => Vec::new(),
        rest => rest.strip_prefix('.')?.split('.').collect(),
    };
    let part = match (part, rest[..].split_last()) {
        (Part::Up, Some((&"bias", adapter))) if adapter.len() < 2 => Part::UpBias,
        (Part::Down | Part::Up, Some((&"weight", adapter))) if adapter.len() < 2 => part,
        // Parameters of their own, at times saved with the name of the adapter alone.
        (Part::EmbeddingDown | Part::EmbeddingUp | Part::Magnitude, _) if rest.len() < 3 => part,
        _ => return None,
    };
    // Where the names of the networks come first, and PEFT's own prefix does not, diffusers wrote the file.
    let layout = if module.contains("base_model.") { Layout::Peft } else { Layout::Diffusers };
    Some(Key { module: module.to_owned(), part, layout })
}

/// What a tensor that is no [`key`] is known to be, for messages.
pub fn stranger(name: &str) -> &'static str {
    let has = |words: &[&str]| words.iter().any(|word| name.contains(word));
    if has(&[".oft_", ".oft_R", ".oft_diag", ".boft_", ".oft_blocks"]) {
        ", which is OFT's: only LoRA, LoCon, LoHa, LoKr, DoRA and full differences are merged"
    } else if name.ends_with(".on_input") || has(&[".ia3_"]) {
        ", which is (IA)³'s: only LoRA, LoCon, LoHa, LoKr, DoRA and full differences are merged"
    } else if ["a1", "a2", "b1", "b2"].iter().any(|part| name.ends_with(&format!(".{part}.weight"))) {
        ", which is GLoRA's: only LoRA, LoCon, LoHa, LoKr, DoRA and full differences are merged"
    } else if name.starts_with('<') || has(&["emb_params", "string_to_param", "bundle_emb"]) {
        ", which is of a textual inversion, and these are not supported"
    } else if has(&[".lokr_t1", ".lora_E", ".vera_lambda"]) {
        ", of a kind that is not supported"
    } else {
        ", which no LoRA has"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_every_tool_are_taken_apart() {
        use Layout::*;
        use Part::*;
        for (name, module, part, layout) in [
            ("lora_unet_mid.lora_down.weight", "lora_unet_mid", Down, Kohya),
            ("lora_te_x.alpha", "lora_te_x", Alpha, Kohya),
            ("lora_unet_x.hada_w1_b", "lora_unet_x", Hada1B, Kohya),
            ("lora_unet_x.lokr_w1", "lora_unet_x", Kron1, Kohya),
            ("lora_unet_x.diff_b", "lora_unet_x", BiasDifference, Kohya),
            ("lora_unet_x.w_norm", "lora_unet_x", Difference, Kohya),
            ("unet.a.to_q.lora_A.weight", "unet.a.to_q", Down, Diffusers),
            ("unet.a.to_q.lora_B.default_0.weight", "unet.a.to_q", Up, Diffusers),
            ("unet.a.to_q.lora.up.weight", "unet.a.to_q", Up, Diffusers),
            ("base_model.model.a.lora_B.bias", "base_model.model.a", UpBias, Peft),
            ("base_model.model.a.lora_magnitude_vector", "base_model.model.a", Magnitude, Peft),
            ("base_model.model.a.lora_magnitude_vector.default.weight", "base_model.model.a", Magnitude, Peft),
            ("base_model.model.a.lora_embedding_A", "base_model.model.a", EmbeddingDown, Peft),
            ("base_model.model.a.hada_w2_a", "base_model.model.a", Hada2A, Peft),
            ("down.0.attn1.processor.to_out_lora.up.weight", "down.0.attn1.to_out.0", Up, Processors),
            ("text_encoder.0.self_attn.to_out_lora.down.weight", "text_encoder.0.self_attn.out_proj", Down, Processors),
            ("text_encoder.0.q_proj.lora_linear_layer.up.weight", "text_encoder.0.q_proj", Up, Diffusers),
            ("unet:12:down", "unet:12", Down, Cloneofsimo),
        ] {
            assert_eq!(key(name), Some(Key { module: module.into(), part, layout }), "{name}");
        }
        for name in [
            "conv_in.weight",
            ".alpha",
            "unet:x:down",
            "vae:1:up",
            "unet.lora_A.a.b.weight",
            "lora_unet_x.oft_blocks",
            "<s1>",
        ] {
            assert_eq!(key(name), None, "{name}");
        }
        assert!(stranger("lora_unet_x.oft_blocks").contains("OFT"));
        assert!(stranger("<s1>").contains("textual inversion"));
    }
}
