//! Held-out likelihood: the figure that training reports and `melglow eval` prints.

use super::dataset::Clip;
use crate::flow::{self, Flow, Likelihood};
use crate::mel::MelConfig;
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

/// Likelihood of a whole clip (its whole frames) in one forward pass, every log-determinant counted.
///
/// # Errors
/// If the flow fails.
pub fn clip_bits(flow: &Flow, mel: &MelConfig, clip: &Clip, device: &Device) -> Result<ClipBits> {
    let hop = mel.hop_length;
    // anew each time: the front may learn along with the flow
    let whitened = clip.whiten(flow, hop)?;
    let samples = whitened.residual.len();
    let x = Tensor::from_slice(&whitened.residual, (1, 1, samples), device)?;
    let window = flow.mel_window(&clip.mel, 0, clip.frames(hop))?.to_device(device)?;
    let (z, log_det) = flow.forward(&x, &window)?;
    // as flow::nll, but summed in f64: a clip has hundreds of thousands of terms
    let z: Vec<f32> = z.flatten_all()?.to_vec1()?;
    let half_square = 0.5 * z.iter().map(|&z| f64::from(z).powi(2)).sum::<f64>();
    let nats = half_square + 0.5 * samples as f64 * std::f64::consts::TAU.ln()
        - f64::from(log_det.to_vec1::<f32>()?[0])
        - whitened.log_det.iter().map(|&v| f64::from(v)).sum::<f64>();
    Ok(ClipBits { clip: clip.name.clone(), samples, bits: flow::bits_per_sample(nats / samples as f64) })
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
    /// Half width of the 95 % confidence interval of that mean (normal approximation).
    pub ci95: f64,
    /// Each clip.
    pub clips: Vec<ClipBits>,
}

impl Bits {
    /// Sums up clips (at least one).
    pub fn of(clips: Vec<ClipBits>, likelihood: Likelihood) -> Self {
        let n = clips.len() as f64;
        let samples: f64 = clips.iter().map(|c| c.samples as f64).sum();
        let per_sample = clips.iter().map(|c| c.bits * c.samples as f64).sum::<f64>() / samples;
        let mean = clips.iter().map(|c| c.bits).sum::<f64>() / n;
        let variance = clips.iter().map(|c| (c.bits - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
        Self { likelihood, per_sample, mean, ci95: 1.96 * (variance / n).sqrt(), clips }
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
        assert!((bits.ci95 - 1.96).abs() < 1e-12);
        assert_eq!(Bits::of(vec![clip(1, 8.0)], Likelihood::Exact).ci95, 0.0);
    }
}
