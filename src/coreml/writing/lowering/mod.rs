//! The vocabulary of networks ([`crate::ops`]) as operations of a Core ML program.
//!
//! | file | what |
//! |---|---|
//! | [`interpreter`] | the interpreter: values, weights, and each operation of the vocabulary |
//! | `operations` | single operations of MIL: casts, convolutions, reshapes, resizes |
//! | `attention` | attention for the GPU and for the Neural Engine |
//! | `norms` | group norm |
//! | `timestep` | the sinusoids of a timestep |
//! | `text` | what only text encoders use: embeddings, the causal mask, the end of a text |
//! | `safety` | what only the safety checker uses: cosines, thresholds |
//! | [`velocity`] | networks that predict v, as networks that predict ε |

mod attention;
pub mod interpreter;
mod norms;
mod operations;
mod safety;
mod text;
mod timestep;
pub mod velocity;
