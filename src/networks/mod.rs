//! The networks, each a function over the vocabulary of [`crate::ops`].
