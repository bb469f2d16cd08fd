//! melglow turns mel spectrograms into speech with a WaveGlow-style normalizing flow.
//!
//! ```text
//! synth:  mel ─ conditioning ─┐
//!         noise z ── flow inverse ── residual e ── synthesis filter ── refinement ── samples
//! train:  samples + dequantisation noise ── whitening ── flow forward ── z, log-determinant ── bits
//! ```
//!
//! | symbol | meaning | shape |
//! |---|---|---|
//! | `x` | data: audio, or what the steps before made of it | `[batch, channels, steps]` |
//! | `z` | latent, standard normal under the model | `[batch, group, steps]` |
//! | `log_det` | log\|det ∂z/∂x\|, nats | `[batch]` |
//! | frame | a mel column, every `hop_length` samples | |
//! | step | a group of `group` samples | |
//!
//! Modules, each importing only from those before it: [`error`], `below`, [`atomic`], [`mod@array`], [`torch`], [`kernels`],
//! [`audio`], [`mel`], [`net`], [`flow`], [`voice`], [`import`], [`vocoder`], [`statistics`], [`train`], [`zoo`],
//! [`plot`], [`eval`], [`cli`].

pub mod array;
pub mod atomic;
pub mod audio;
mod below;
pub mod cli;
pub mod error;
pub mod eval;
pub mod flow;
mod heap;
pub mod import;
pub mod kernels;
pub mod mel;
pub mod net;
pub mod plot;
pub mod statistics;
pub mod torch;
pub mod train;
pub mod vocoder;
pub mod voice;
pub mod zoo;

pub use error::{Error, Result};

/// The README's programs, compiled.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
