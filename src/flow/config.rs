//! The design of a flow, as it stands in `config.json` and in recipes.

use crate::mel::MelConfig;
pub use crate::net::separable::SeparableConfig;
pub use crate::net::wavenet::WaveNetConfig;
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
    /// Frames after its own that the net sees, if not `context`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lookahead: Option<usize>,
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
        /// Frames after its own that a row sees; where it isn't said, as many as before.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lookahead: Option<usize>,
    },
    /// SqueezeWave: the frames as they are; what couplings take from one is held for its steps.
    Mel,
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
    /// The same coupling with SqueezeWave's conditioner (mel conditioning only).
    SeparableCoupling {
        /// The conditioner.
        net: SeparableConfig,
        /// Bound of `log_s`, as in `coupling`.
        bound: Option<f64>,
    },
    /// Exchanges the halves of the channels: around a coupling, the second half moves the first.
    Swap,
    /// The first `channels` channels are done: they become latents.
    Early {
        /// How many.
        channels: usize,
    },
}

impl WhiteningConfig {
    /// Mel frames after its own that the net sees.
    pub fn lookahead(&self) -> usize {
        self.lookahead.unwrap_or(self.context)
    }

    /// Mel frames that the net sees.
    pub fn window(&self) -> usize {
        self.context + 1 + self.lookahead()
    }
}

impl FlowConfig {
    /// Checks ranges and relations once, on reading.
    ///
    /// # Errors
    /// Names what is out of range.
    pub fn validate(&self, mel: &MelConfig) -> Result<()> {
        let wrong = |problem: String| Err(Error::invalid(format!("flow config: {problem}")));
        let hop = mel.hop_length;
        if self.group < 2 || self.group > 256 || !hop.is_multiple_of(self.group) {
            return wrong(format!("group is {}, expected 2 to 256 and a divisor of the hop {hop}", self.group));
        }
        if let Some(w) = &self.whitening {
            if !(1..=mel.n_fft / 2).contains(&w.order)
                || w.hidden == 0
                || w.hidden > 4096
                || w.context.max(w.lookahead()) > 16
            {
                return wrong("whitening: order, hidden, context or lookahead is out of range".to_string());
            }
            if w.filters_per_hop == 0 || !hop.is_multiple_of(w.filters_per_hop) {
                return wrong(format!(
                    "whitening: filters_per_hop is {}, expected a divisor of the hop {hop}",
                    w.filters_per_hop
                ));
            }
        }
        match self.conditioning {
            ConditioningConfig::Upsample { kernel }
                if kernel == 0 || kernel > 64 * hop || !kernel.is_multiple_of(hop) =>
            {
                return wrong(format!("conditioning: kernel is {kernel}, expected a multiple of the hop {hop}"));
            }
            ConditioningConfig::Frame { channels, residual_layers, lookahead }
                if !(1..=4096).contains(&channels)
                    || residual_layers > 32
                    || lookahead.is_some_and(|frames| frames > 4 + 2 * residual_layers)
                    || hop == self.group =>
            {
                return wrong(
                    "conditioning: channels, residual_layers or lookahead is out of range, or a frame is one step"
                        .to_string(),
                );
            }
            _ => {}
        }
        let mut channels = self.group;
        if self.blocks.iter().map(|b| b.repeat.saturating_mul(b.steps.len())).sum::<usize>() > 1024 {
            return wrong("more than 1024 steps".to_string());
        }
        for step in self.blocks.iter().flat_map(|b| std::iter::repeat_n(&b.steps, b.repeat).flatten()) {
            match step {
                StepConfig::Early { channels: done } => {
                    if *done == 0 || done + 2 > channels {
                        return wrong(format!("early takes {done} of {channels} channels, at least 2 must remain"));
                    }
                    channels -= done;
                }
                StepConfig::Asinh { scale } if !(1e-3..=1e3).contains(scale) => {
                    return wrong(format!("asinh: scale is {scale}, expected 0.001 to 1000"));
                }
                StepConfig::Gain if !matches!(self.conditioning, ConditioningConfig::Frame { .. }) => {
                    return wrong("gain wants frame conditioning".to_string());
                }
                StepConfig::Swap if !channels.is_multiple_of(2) => {
                    return wrong(format!("swap has no halves in {channels} channels"));
                }
                StepConfig::Coupling { .. } if matches!(self.conditioning, ConditioningConfig::Mel) => {
                    return wrong("coupling wants upsample or frame conditioning; see separable_coupling".to_string());
                }
                StepConfig::SeparableCoupling { .. } if !matches!(self.conditioning, ConditioningConfig::Mel) => {
                    return wrong("separable_coupling wants mel conditioning".to_string());
                }
                StepConfig::Coupling { bound, .. } | StepConfig::SeparableCoupling { bound, .. }
                    if bound.is_some_and(|b| !(0.01..=100.0).contains(&b)) =>
                {
                    return wrong("coupling: bound is out of range, expected 0.01 to 100".to_string());
                }
                StepConfig::Coupling { net, .. } => net.validate()?,
                StepConfig::SeparableCoupling { net, .. } => net.validate()?,
                _ => {}
            }
        }
        Ok(())
    }
}
