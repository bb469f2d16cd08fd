//! Training by maximum likelihood: recipe, data, optimiser, checkpoints and the loop.

pub mod checkpoint;
pub mod config;
pub mod dataset;
pub mod evaluate;
pub mod guard;
pub mod log;
pub mod memory;
pub mod optimiser;
pub mod run;
mod session;
pub mod spectral;
pub mod tensorboard;
pub mod warm;

pub use config::Recipe;
pub use run::{Options, Summary, train};
