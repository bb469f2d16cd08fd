//! Conditioner networks, and the named parameters they are made of.

pub mod params;
pub mod wavenet;

pub use params::Params;
pub use wavenet::WaveNet;
