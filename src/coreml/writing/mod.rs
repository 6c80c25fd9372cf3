//! Writing a network as a package.
//!
//! | file | what |
//! |---|---|
//! | [`program`] | a MIL program, built operation by operation |
//! | `palettes` | palettes as constants of a program |
//! | [`weights`] | where the weights of a program come from: tensors, palettes, palettes made on the way |
//! | [`lowering`] | the vocabulary of networks as operations of a program |
//! | [`interface`] | inputs and outputs of a network, and writing it |
//! | [`chunk`] | cutting a package in two |

pub mod chunk;
pub mod interface;
pub mod lowering;
mod palettes;
pub mod program;
pub mod weights;
