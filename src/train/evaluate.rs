//! Held-out likelihood: the figure that training reports and `melglow eval` prints.

use super::dataset::Clip;
use crate::flow::{self, Flow, Likelihood};
use crate::mel::MelConfig;
use crate::statistics::Mean;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::sync::atomic::{AtomicBool, Ordering};

/// Likelihood of one clip.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct ClipBits {
    /// The clip.
    pub clip: String,
    /// Samples that were judged: whole frames.
    pub samples: usize,
    /// Bits per sample of the 16-bit sound.
    pub bits: f64,
}

/// Negative log-likelihood of each hop of a clip (its whole frames) in one forward pass, nats: latents'
/// squares and every log-determinant, by the time they belong to.
///
/// # Errors
/// If the flow fails.
pub fn hop_nats(flow: &Flow, mel: &MelConfig, clip: &Clip, device: &Device) -> Result<Vec<f64>> {
    let hop = mel.hop_length;
    // anew each time: the front may learn along with the flow
    let whitened = clip.whiten(flow, hop)?;
    let samples = whitened.residual.len();
    let x = Tensor::from_slice(&whitened.residual, (1, 1, samples), device)?;
    let window = flow.mel_window(&clip.mel, 0, clip.frames(hop))?.to_device(device)?;
    let (z, log_det) = flow.forward_by_step(&x, &window)?;
    let nats: Vec<f32> = ((z.sqr()?.sum(1)? * 0.5)? - log_det)?.flatten_all()?.to_vec1()?;
    let constant = 0.5 * hop as f64 * std::f64::consts::TAU.ln();
    // summed in f64: a clip has hundreds of thousands of terms
    let steps = nats.chunks_exact(hop / flow.group()).map(|hop| hop.iter().map(|&v| f64::from(v)).sum::<f64>());
    Ok(steps.zip(&whitened.log_det).map(|(nats, &whitening)| nats + constant - f64::from(whitening)).collect())
}

/// Likelihood of a whole clip.
///
/// # Errors
/// If the flow fails.
pub fn clip_bits(flow: &Flow, mel: &MelConfig, clip: &Clip, device: &Device) -> Result<ClipBits> {
    let nats = hop_nats(flow, mel, clip, device)?;
    let samples = nats.len() * mel.hop_length;
    let bits = flow::bits_per_sample(nats.iter().sum::<f64>() / samples as f64);
    Ok(ClipBits { clip: clip.name.clone(), samples, bits })
}

/// Likelihoods of clips, and over all of them.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Bits {
    /// What the likelihood behind the figures is worth.
    pub likelihood: Likelihood,
    /// Bits per sample over all samples: long clips weigh more.
    pub per_sample: f64,
    /// Mean of the clips' bits per sample.
    pub mean: f64,
    /// Half width of the 95 % confidence interval of that mean (Student's t); 0 for one clip.
    pub ci95: f64,
    /// Each clip.
    pub clips: Vec<ClipBits>,
}

impl Bits {
    /// Sums up clips (at least one).
    pub fn of(clips: Vec<ClipBits>, likelihood: Likelihood) -> Self {
        let samples: f64 = clips.iter().map(|c| c.samples as f64).sum();
        let per_sample = clips.iter().map(|c| c.bits * c.samples as f64).sum::<f64>() / samples;
        let mean = Mean::of(clips.iter().map(|c| c.bits));
        let (mean, ci95) = mean.map_or((f64::NAN, 0.0), |m| (m.mean, m.ci95.unwrap_or_default()));
        Self { likelihood, per_sample, mean, ci95, clips }
    }
}

/// Likelihood of `clips` (at least one), each whole.
///
/// # Errors
/// If the flow fails; [`Error::Interrupted`] soon after `stop` is set.
pub fn bits(flow: &Flow, mel: &MelConfig, clips: &[Clip], device: &Device, stop: &AtomicBool) -> Result<Bits> {
    let judge = |clip| {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        clip_bits(flow, mel, clip, device)
    };
    Ok(Bits::of(clips.iter().map(judge).collect::<Result<_>>()?, flow.likelihood_kind()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_clips_weigh_more_in_the_figure_but_not_in_the_mean() {
        let clip = |samples, bits| ClipBits { clip: String::new(), samples, bits };
        let bits = Bits::of(vec![clip(100, 8.0), clip(300, 6.0)], Likelihood::Exact);
        assert_eq!((bits.per_sample, bits.mean), (6.5, 7.0));
        assert!((bits.ci95 - 12.706).abs() < 1e-9);
        assert_eq!(Bits::of(vec![clip(1, 8.0)], Likelihood::Exact).ci95, 0.0);
    }
}
