//! Training by maximum likelihood: recipe, data, optimiser, checkpoints and the loop.

pub mod checkpoint;
pub mod clock;
pub mod config;
pub mod dataset;
pub mod distill;
pub mod evaluate;
pub mod front;
pub mod given;
pub mod guard;
pub mod log;
pub mod memory;
pub mod optimiser;
pub mod run;
mod session;
pub mod tensorboard;
pub mod warm;

pub use config::Recipe;
pub use distill::distill;
pub use given::GivenMels;
pub use run::{Options, Summary, train};
