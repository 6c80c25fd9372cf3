//! Pictures, captions, caches and batches.
