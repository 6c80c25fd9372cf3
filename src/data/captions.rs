//! What a caption is: where to look for it, what stands for one that is missing, and what a source answers.

/// What a picture without a caption is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missing {
    /// A mistake in the data.
    Error,
    /// Trained on with this caption: the empty one, or class words.
    Fill(String),
    /// As it should be: nothing learns captions.
    Unneeded,
}

/// Where captions are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaptionOptions {
    /// Extensions of sidecar files with their dot, tried in this order, in any case.
    pub extensions: Vec<String>,
    pub missing: Missing,
    /// Keys of `metadata.jsonl`, columns of `metadata.csv`.
    pub image_column: String,
    pub caption_column: String,
}

impl Default for CaptionOptions {
    fn default() -> Self {
        Self {
            extensions: vec![".txt".into(), ".caption".into()],
            missing: Missing::Error,
            image_column: "file_name".into(),
            caption_column: "text".into(),
        }
    }
}

impl From<&crate::config::Data> for CaptionOptions {
    fn from(data: &crate::config::Data) -> Self {
        let missing = match data.missing_caption {
            crate::config::MissingCaption::Error => Missing::Error,
            crate::config::MissingCaption::Empty => Missing::Fill(String::new()),
        };
        // With its dot or without, as other trainers have it.
        let extensions = data.caption_extension.iter().map(|own| format!(".{}", own.trim_start_matches('.')));
        Self { extensions: extensions.collect(), missing, ..Self::default() }
    }
}

/// A caption as a source has it.
pub(super) enum Caption {
    /// Not empty.
    Text(String),
    /// Missing or empty: what the message says of the picture.
    None(String),
    /// Told of already.
    Unreadable,
}

/// Captions of all pictures of a listing, in its order, from one source.
pub(super) struct Captions {
    pub captions: Vec<Caption>,
    /// Whether a source for captions was found at all; without one, a single line says so for all pictures.
    pub found: bool,
}

/// The words of a text, one space between them.
pub(super) fn one_line(text: &str) -> String {
    text.trim_start_matches('\u{feff}').split_whitespace().collect::<Vec<_>>().join(" ")
}
