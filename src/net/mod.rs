//! Conditioner networks, and the named parameters they are made of.

pub mod params;

pub use params::Params;
