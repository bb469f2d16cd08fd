//! Sound as samples: reading, writing, resampling.

pub mod decode;
#[cfg(feature = "play")]
pub mod playback;
pub mod resample;
pub mod wav;

/// Mono samples in ±1 at a sample rate.
#[derive(Clone, Debug, PartialEq)]
pub struct Waveform {
    /// Samples, nominally within ±1.
    pub samples: Vec<f32>,
    /// Samples per second.
    pub sample_rate: u32,
}
