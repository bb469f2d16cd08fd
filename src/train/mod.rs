//! Training by maximum likelihood: recipe, data, optimiser, checkpoints and the loop.

pub mod checkpoint;
pub mod config;
pub mod dataset;
pub mod evaluate;
pub mod log;
pub mod optimiser;
pub mod run;

pub use config::Recipe;
pub use run::{Options, Summary, train};
