//! Where models come from and go to: diffusers folders and single-file checkpoints, and their tokenizers.
//!
//! | file | what |
//! |---|---|
//! | `model` | a model on the disk: configurations, and weights under today's names |
//! | `options` | what is said of a model besides where it is |
//! | `hub` | ids of models in the local Hugging Face cache |
//! | `folder`, `parts` | diffusers folders: what lies where, and what is copied as it is |
//! | `single_file` | checkpoints in one file: `ldm` (their names), `alone` (one network by itself), `inferred` and `evidence` (configurations that such files lack) |
//! | `vae` | another autoencoder in place of a model's own |
//! | [`lora`] | LoRAs that are merged into a model |
//! | `misused` | what is said of a model that does not go with it |
//! | `stored`, `names` | where parameters lie in files, under which versions' names |
//! | `identity` | which model it is, by content |
//! | `tokenizer`, `clip` | CLIP's tokenizer, and its own vocabulary |
//! | `write` | writing diffusers folders |

mod alone;
pub(crate) mod clip;
mod clip_folder;
mod evidence;
mod folder;
mod hub;
mod identity;
mod inferred;
mod ldm;
pub mod lora;
mod misused;
mod model;
mod names;
mod options;
mod parts;
mod single_file;
mod stored;
mod tokenizer;
mod vae;
mod write;

pub use clip_folder::ClipFolder;
pub use identity::{PREDICTION, TEXT_ENCODERS, autoencoder_id, described, goes_with, identity, model_id};
pub use misused::Misused;
pub use model::Model;
pub use options::{ModelOptions, PredictionType};
pub use stored::Stored;
pub use tokenizer::{SwiftTokenizer, Tokenizer};
pub use write::{copy_model, fill_model, write_component};

/// One network of a Stable Diffusion model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Component {
    Unet,
    TextEncoder,
    /// The second one of Stable Diffusion XL.
    TextEncoder2,
    Autoencoder,
    SafetyChecker,
}

impl Component {
    /// Those that draw; [`Model::components`] tells those of a model.
    pub const ALL: [Component; 4] =
        [Component::Unet, Component::TextEncoder, Component::TextEncoder2, Component::Autoencoder];

    /// Its folder in a diffusers model.
    pub fn folder(self) -> &'static str {
        match self {
            Component::Unet => "unet",
            Component::TextEncoder => "text_encoder",
            Component::TextEncoder2 => "text_encoder_2",
            Component::Autoencoder => "vae",
            Component::SafetyChecker => "safety_checker",
        }
    }

    /// What messages call it.
    pub fn title(self) -> &'static str {
        match self {
            Component::Unet => "UNet",
            Component::TextEncoder => "text encoder",
            Component::TextEncoder2 => "second text encoder",
            Component::Autoencoder => "autoencoder",
            Component::SafetyChecker => "safety checker",
        }
    }

    /// What is said of its parameter `name` where that holds values that are no numbers.
    pub fn not_finite(self, name: &str) -> String {
        let advice = "the model is damaged; fetch it again, or take another";
        format!("the {}'s `{name}` holds values that are not finite (NaN or infinite): {advice}", self.title())
    }

    /// The weight file that diffusers and transformers expect in its folder.
    pub fn weight_file(self) -> &'static str {
        match self {
            Component::TextEncoder | Component::TextEncoder2 | Component::SafetyChecker => "model.safetensors",
            _ => "diffusion_pytorch_model.safetensors",
        }
    }
}

/// What the tensors of files make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Network {
    /// A network of a Stable Diffusion model.
    Of(Component),
    /// A whole CLIP, of texts and of pictures.
    Clip,
}

impl From<Component> for Network {
    fn from(component: Component) -> Self {
        Network::Of(component)
    }
}

impl Network {
    /// What messages call it.
    fn title(self) -> &'static str {
        match self {
            Network::Of(component) => component.title(),
            Network::Clip => "CLIP",
        }
    }

    /// The weight file that diffusers and transformers expect.
    fn weight_file(self) -> &'static str {
        match self {
            Network::Of(component) => component.weight_file(),
            Network::Clip => "model.safetensors",
        }
    }
}
