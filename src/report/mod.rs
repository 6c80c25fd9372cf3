//! Progress, event files, pictures.
