//! What packages are called in an app.

/// Last parts of packages' names, and what Swift looks for in `Resources/`. It takes chunks before the whole.
pub const COMPILED: [(&str, &str); 10] = [
    ("text_encoder", "TextEncoder"),
    ("text_encoder_2", "TextEncoder2"),
    ("vae_decoder", "VAEDecoder"),
    ("vae_encoder", "VAEEncoder"),
    ("unet", "Unet"),
    ("unet_chunk1", "UnetChunk1"),
    ("unet_chunk2", "UnetChunk2"),
    ("control-unet", "ControlledUnet"),
    ("control-unet_chunk1", "ControlledUnetChunk1"),
    ("control-unet_chunk2", "ControlledUnetChunk2"),
];

/// And the safety checker, which programs do without where it is not there.
pub const SAFETY_CHECKER: (&str, &str) = ("safety_checker", "SafetyChecker");
