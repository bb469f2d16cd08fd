//! The design of a flow, as it stands in `config.json` and in recipes.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// A whole flow design.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlowConfig {
    /// The mel-driven whitening filter in front, if any.
    pub whitening: Option<WhiteningConfig>,
    /// How the mel becomes the couplings' conditioning.
    pub conditioning: ConditioningConfig,
    /// Samples per step: the channels after the squeeze.
    pub group: usize,
    /// The steps after the squeeze, in the direction data → latent.
    pub blocks: Vec<Block>,
}

/// The whitening front: an autoregressive filter whose coefficients come from the mel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WhiteningConfig {
    /// Order of the filter, samples.
    pub order: usize,
    /// Filters per hop.
    pub filters_per_hop: usize,
    /// Hidden units of the two layers of the net that corrects the spectrum.
    pub hidden: usize,
    /// Mel frames on each side that the net sees.
    pub context: usize,
    /// Training steps of the fit.
    pub fit_steps: usize,
}

/// How the mel becomes conditioning.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum ConditioningConfig {
    /// WaveGlow: a transposed convolution to samples, squeezed to `n_mels · group` channels a step.
    Upsample {
        /// Kernel of the transposed convolution, samples; its stride is the hop.
        kernel: usize,
    },
    /// A small convolutional net at the frame rate; what couplings take from it is interpolated to steps.
    Frame {
        /// Channels of the net.
        channels: usize,
        /// Residual convolutions of width 3 after the first of width 5.
        residual_layers: usize,
    },
}

/// Steps, repeated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Block {
    /// How often.
    pub repeat: usize,
    /// The steps of one round.
    pub steps: Vec<StepConfig>,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case", deny_unknown_fields)]
pub enum StepConfig {
    /// `asinh(scale · x) / scale`: tames heavy tails.
    Asinh {
        /// How strongly.
        scale: f64,
    },
    /// A gain per channel that follows the mel (frame-rate conditioning only).
    Gain,
    /// Per-channel scale and shift, initialised from data to zero mean and unit variance.
    Actnorm,
    /// Invertible 1×1 convolution.
    Mix,
    /// Affine coupling: the first half of the channels moves the second.
    Coupling {
        /// The conditioner.
        net: WaveNetConfig,
        /// Bound of `log_s` by `bound · tanh(o / bound)`; none for WaveGlow.
        bound: Option<f64>,
    },
    /// The first `channels` channels are done: they become latents.
    Early {
        /// How many.
        channels: usize,
    },
}

/// A WaveNet conditioner.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WaveNetConfig {
    /// Residual channels.
    pub channels: usize,
    /// Width of the dilated convolutions, odd.
    pub kernel: usize,
    /// Dilation of each layer, steps.
    pub dilations: Vec<usize>,
    /// Weight norm on every convolution but the last, as in WaveGlow.
    pub weight_norm: bool,
    /// Sum of skip connections to the output (WaveGlow), or the last residual alone.
    pub skip: bool,
}

impl FlowConfig {
    /// Checks ranges and relations once, on reading.
    ///
    /// # Errors
    /// Names what is out of range.
    pub fn validate(&self) -> Result<()> {
        Err(Error::invalid("todo"))
    }
}
