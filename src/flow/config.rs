//! The design of a flow, as it stands in `config.json` and in recipes.

pub use super::mix::MixForm;
pub use super::scalar::MapConfig;
pub use super::split::Split;
use crate::mel::MelConfig;
pub use crate::net::lipschitz::LipschitzConfig;
pub use crate::net::rowwise::RowwiseConfig;
pub use crate::net::separable::SeparableConfig;
pub use crate::net::transformer::TransformerConfig;
pub use crate::net::wavenet::WaveNetConfig;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// Steps that a flow may have, repeats written out.
const MAX_STEPS: usize = 1024;

/// A whole flow design.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlowConfig {
    /// The mel-driven whitening filter in front, if any.
    pub whitening: Option<WhiteningConfig>,
    /// How the mel becomes the couplings' conditioning.
    pub conditioning: ConditioningConfig,
    /// A latent variable beside the mel, if any: the likelihood becomes a bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latent: Option<LatentConfig>,
    /// Learned noise below one 16-bit step in place of uniform, if any: the likelihood becomes a bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dequantisation: Option<DequantisationConfig>,
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

/// A latent variable of each frame, found by a small encoder, drawn to speak.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LatentConfig {
    /// Values of a frame's latent.
    pub width: usize,
    /// Hidden units of the encoder.
    pub hidden: usize,
}

/// A flow for the noise below one 16-bit step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DequantisationConfig {
    /// Couplings.
    pub couplings: usize,
    /// The conditioner of each.
    pub net: WaveNetConfig,
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
        /// Every activation takes its input at unit root mean square over the channels: no frame, of
        /// whatever speaker, gets features far above the usual.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        norm: bool,
    },
    /// SqueezeWave: the frames as they are; what couplings take from one is held for its steps.
    Mel {},
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
    Gain {},
    /// Per-channel scale and shift, initialised from data to zero mean and unit variance.
    Actnorm {},
    /// Invertible 1×1 convolution.
    Mix {
        /// How its matrix is held.
        #[serde(default, skip_serializing_if = "is_default")]
        form: MixForm,
    },
    /// A gain per channel.
    Scale {},
    /// Coupling: a part of the channels moves the rest.
    Coupling {
        /// The conditioner.
        net: WaveNetConfig,
        /// Bound of `log_s` by `bound · tanh(o / bound)`; none for WaveGlow. Of affine and mixture maps only.
        bound: Option<f64>,
        /// By which map; affine where it isn't said.
        #[serde(default, skip_serializing_if = "is_default")]
        map: MapConfig,
        /// Which part; the first half where it isn't said.
        #[serde(default, skip_serializing_if = "is_default")]
        split: Split,
    },
    /// The same coupling with SqueezeWave's conditioner (mel conditioning only).
    SeparableCoupling {
        /// The conditioner.
        net: SeparableConfig,
        /// Bound of `log_s`, as in `coupling`.
        bound: Option<f64>,
    },
    /// Exchanges the halves of the channels: around a coupling, the second half moves the first.
    Swap {},
    /// So many neighbouring steps become one of as many times the channels.
    Squeeze {
        /// How many.
        by: usize,
    },
    /// The first `channels` channels are done: they become latents.
    Early {
        /// How many.
        channels: usize,
        /// A net that tells their mean and scale from the remaining channels and the mel: a learned
        /// Gaussian prior; a standard normal where there is none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        prior: Option<WaveNetConfig>,
    },
    /// Autoregressive in time: each row of `by` samples moves by what the rows before it tell.
    Autoregressive {
        /// Samples of a row: a divisor of the channels.
        by: usize,
        /// From the end to the beginning.
        #[serde(default, skip_serializing_if = "is_default")]
        reversed: bool,
        /// The causal conditioner.
        net: SequenceConfig,
        /// Bound of `log_s`, as in `coupling`.
        bound: Option<f64>,
        /// The net hears values as far as this from 0 and louder ones as if they were there: the inverse,
        /// which goes on from its own values, finds back from any. Where it isn't said, as they are.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hears: Option<f64>,
        /// By which map; affine where it isn't said.
        #[serde(default, skip_serializing_if = "is_default")]
        map: MapConfig,
    },
    /// WaveFlow: each channel moves by what the channels before it tell, at all steps at once.
    Rowwise {
        /// The conditioner over channels and steps.
        net: RowwiseConfig,
        /// Bound of `log_s`, as in `coupling`.
        bound: Option<f64>,
        /// By which map; affine where it isn't said.
        #[serde(default, skip_serializing_if = "is_default")]
        map: MapConfig,
    },
    /// Turns the channels around within `parts` equal parts.
    Reverse {
        /// 1: all channels; 2: either half by itself; and so on.
        parts: usize,
    },
    /// Adds a contracting net's output. The likelihood becomes an estimate.
    Residual {
        /// The net.
        net: LipschitzConfig,
        /// Terms of the log-determinant's power series.
        terms: usize,
        /// Random probes of each trace; as many as a sound has values make it exact.
        probes: usize,
    },
}

/// A causal conditioner.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum SequenceConfig {
    /// A WaveNet with `causal` convolutions.
    Wavenet(WaveNetConfig),
    /// A transformer with a window.
    Transformer(TransformerConfig),
}

impl SequenceConfig {
    fn validate(&self) -> Result<()> {
        match self {
            Self::Wavenet(net) if !net.causal => Err(Error::invalid("wavenet: causal is false, expected true")),
            Self::Wavenet(net) => net.validate(),
            Self::Transformer(net) => net.validate(),
        }
    }
}

/// Whether a config needn't say so.
pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Where the tensors stand at a step of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Channels.
    pub channels: usize,
    /// Groups of samples that a step holds: the product of the squeezes so far.
    pub squeezed: usize,
}

impl StepConfig {
    /// WaveGlow's mix: its matrix held as it is.
    pub fn mix() -> Self {
        Self::Mix { form: MixForm::Direct }
    }

    /// WaveGlow's coupling: the first half moves the second by an affine map.
    pub fn coupling(net: WaveNetConfig, bound: Option<f64>) -> Self {
        Self::Coupling { net, bound, map: MapConfig::Affine, split: Split::Halves }
    }

    /// WaveGlow's early output: without a learned prior.
    pub fn early(channels: usize) -> Self {
        Self::Early { channels, prior: None }
    }

    /// The step as recipes call it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Asinh { .. } => "asinh",
            Self::Gain {} => "gain",
            Self::Actnorm {} => "actnorm",
            Self::Mix { .. } => "mix",
            Self::Scale {} => "scale",
            Self::Coupling { .. } => "coupling",
            Self::SeparableCoupling { .. } => "separable_coupling",
            Self::Swap {} => "swap",
            Self::Squeeze { .. } => "squeeze",
            Self::Early { .. } => "early",
            Self::Autoregressive { .. } => "autoregressive",
            Self::Rowwise { .. } => "rowwise",
            Self::Reverse { .. } => "reverse",
            Self::Residual { .. } => "residual",
        }
    }

    /// The place after a step that stands at `place`.
    pub fn after(&self, Place { channels, squeezed }: Place) -> Place {
        match self {
            Self::Early { channels: done, .. } => Place { channels: channels - done, squeezed },
            Self::Squeeze { by } => Place { channels: channels * by, squeezed: squeezed * by },
            _ => Place { channels, squeezed },
        }
    }
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
    /// A design of steps alone: no whitening front, no latent variable, uniform dequantisation.
    pub fn new(conditioning: ConditioningConfig, group: usize, blocks: Vec<Block>) -> Self {
        Self { whitening: None, conditioning, latent: None, dequantisation: None, group, blocks }
    }

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
            ConditioningConfig::Frame { channels, residual_layers, lookahead, .. }
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
        let frame = matches!(self.conditioning, ConditioningConfig::Frame { .. });
        match &self.latent {
            Some(_) if !frame => return wrong("latent: wants frame conditioning".to_string()),
            Some(l) if !(1..=1024).contains(&l.width) || !(1..=4096).contains(&l.hidden) => {
                return wrong("latent: width or hidden is out of range".to_string());
            }
            _ => {}
        }
        match &self.dequantisation {
            Some(_) if matches!(self.conditioning, ConditioningConfig::Mel {}) => {
                return wrong("dequantisation: wants upsample or frame conditioning".to_string());
            }
            Some(d) if !(1..=32).contains(&d.couplings) => {
                return wrong(format!("dequantisation: couplings is {}, expected 1 to 32", d.couplings));
            }
            Some(d) => d.net.validate().map_err(|e| Error::invalid(format!("flow config: dequantisation: {e}")))?,
            None => {}
        }
        // repeats may be beyond counting, of nothing too
        let rounds = |b: &Block| b.repeat.saturating_mul(b.steps.len().max(1));
        if self.blocks.iter().map(rounds).fold(0, usize::saturating_add) > MAX_STEPS {
            return wrong(format!("more than {MAX_STEPS} steps"));
        }
        let mut place = Place { channels: self.group, squeezed: 1 };
        for (i, step) in self.steps().enumerate() {
            let at = format!("step {} ({})", i + 1, step.name());
            self.validate_step(step, place, hop).map_err(|e| Error::invalid(format!("flow config: {at}: {e}")))?;
            place = step.after(place);
        }
        Ok(())
    }

    /// All steps in the direction data → latent, repeats written out.
    pub fn steps(&self) -> impl Iterator<Item = &StepConfig> {
        self.blocks.iter().flat_map(|block| std::iter::repeat_n(&block.steps, block.repeat).flatten())
    }

    /// Samples of the widest step: the rates of all steps are multiples of its rate.
    pub fn widest_step(&self) -> usize {
        let start = Place { channels: self.group, squeezed: 1 };
        self.group * self.steps().fold(start, |place, step| step.after(place)).squeezed
    }

    /// Checks one step, which stands at `place`.
    fn validate_step(&self, step: &StepConfig, Place { channels, squeezed }: Place, hop: usize) -> Result<()> {
        let frame = matches!(self.conditioning, ConditioningConfig::Frame { .. });
        let mel = matches!(self.conditioning, ConditioningConfig::Mel {});
        let problem = match step {
            StepConfig::Early { channels: done, .. } if *done == 0 || *done > channels.saturating_sub(2) => {
                format!("takes {done} of {channels} channels, at least 2 must remain")
            }
            StepConfig::Early { channels: done, .. } if !done.is_multiple_of(squeezed) => {
                format!("takes {done} channels of steps squeezed by {squeezed}, expected a multiple")
            }
            StepConfig::Early { prior: Some(_), .. } if mel => {
                "its prior wants upsample or frame conditioning".to_string()
            }
            StepConfig::Early { prior: Some(net), .. } => return net.validate(),
            StepConfig::Squeeze { .. } if !(frame || mel) => "wants frame or mel conditioning".to_string(),
            // a frame keeps a step; two, for an interpolation to have something between
            StepConfig::Squeeze { by }
                if *by < 2
                    || !(hop / self.group).is_multiple_of(by.saturating_mul(squeezed))
                    || (frame && by * squeezed == hop / self.group) =>
            {
                format!("by {by} does not fit the {} steps of a frame", hop / self.group / squeezed)
            }
            StepConfig::Squeeze { by } if channels * by > 1024 => {
                format!("makes {} channels, expected at most 1024", channels * by)
            }
            StepConfig::Asinh { scale } if !(1e-3..=1e3).contains(scale) => {
                format!("scale is {scale}, expected 0.001 to 1000")
            }
            StepConfig::Gain {} if !frame => "wants frame conditioning".to_string(),
            StepConfig::Swap {} if !channels.is_multiple_of(2) => format!("has no halves in {channels} channels"),
            StepConfig::Coupling { .. } if mel => {
                "wants upsample or frame conditioning; see separable_coupling".to_string()
            }
            StepConfig::Coupling { split: Split::Even | Split::Odd, .. } if !channels.is_multiple_of(2) => {
                format!("cannot take every other one of {channels} channels, expected an even number")
            }
            StepConfig::Coupling { bound: Some(_), map: MapConfig::Additive | MapConfig::Tanh, .. } => {
                "its map has no bound".to_string()
            }
            StepConfig::SeparableCoupling { .. } if !mel => "wants mel conditioning".to_string(),
            StepConfig::Autoregressive { .. } | StepConfig::Rowwise { .. } | StepConfig::Residual { .. } if mel => {
                "wants upsample or frame conditioning".to_string()
            }
            StepConfig::Autoregressive { hears: Some(hears), .. } if !(1e-3..=1e6).contains(hears) => {
                format!("hears is {hears}, expected 0.001 to 1000000")
            }
            StepConfig::Autoregressive { by, .. } if *by == 0 || !channels.is_multiple_of(*by) => {
                format!("by is {by}, expected a divisor of the {channels} channels")
            }
            StepConfig::Autoregressive { by, .. } if *by != channels && !frame => {
                format!("by is {by} of {channels} channels, which wants frame conditioning")
            }
            StepConfig::Autoregressive { bound: Some(_), map: MapConfig::Additive | MapConfig::Tanh, .. }
            | StepConfig::Rowwise { bound: Some(_), map: MapConfig::Additive | MapConfig::Tanh, .. } => {
                "its map has no bound".to_string()
            }
            StepConfig::Reverse { parts } if *parts == 0 || !channels.is_multiple_of(*parts) => {
                format!("parts is {parts}, expected a divisor of the {channels} channels")
            }
            StepConfig::Residual { terms, .. } if !(1..=1000).contains(terms) => {
                format!("terms is {terms}, expected 1 to 1000")
            }
            StepConfig::Residual { probes, .. } if !(1..=256).contains(probes) => {
                format!("probes is {probes}, expected 1 to 256")
            }
            StepConfig::Coupling { bound, .. }
            | StepConfig::SeparableCoupling { bound, .. }
            | StepConfig::Autoregressive { bound, .. }
            | StepConfig::Rowwise { bound, .. }
                if bound.is_some_and(|b| !(0.01..=100.0).contains(&b)) =>
            {
                "bound is out of range, expected 0.01 to 100".to_string()
            }
            StepConfig::Coupling { net, map, .. } => {
                map.validate()?;
                return net.validate();
            }
            StepConfig::SeparableCoupling { net, .. } => return net.validate(),
            StepConfig::Autoregressive { net, map, .. } => {
                map.validate()?;
                return net.validate();
            }
            StepConfig::Rowwise { net, map, .. } => {
                map.validate()?;
                return net.validate();
            }
            StepConfig::Residual { net, .. } => return net.validate(),
            _ => return Ok(()),
        };
        Err(Error::invalid(problem))
    }
}
