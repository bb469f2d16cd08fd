//! Held-out likelihood: the figure that training reports and `melglow eval` prints.

use super::dataset::Clip;
use crate::flow::{self, Flow, Likelihood};
use crate::mel::MelConfig;
use crate::statistics::Mean;
use crate::train::dataset;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::sync::atomic::{AtomicBool, Ordering};

/// Bits per sample from which on a likelihood is none: f32 can't hold latents that far out.
const OVERFLOW: f64 = 1e6;

/// Likelihood of one clip.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct ClipBits {
    /// The clip.
    pub clip: String,
    /// Samples that were judged: whole frames.
    pub samples: usize,
    /// Bits per sample of the 16-bit sound; not a number (null in JSON) where the flow's numbers overflow.
    pub bits: f64,
}

/// Bits per sample, unless the flow's numbers overflowed on the way to them.
pub fn unless_overflowed(bits: f64) -> Option<f64> {
    Some(bits).filter(|bits| bits.abs() < OVERFLOW)
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
    Ok(ClipBits { clip: clip.name.clone(), samples, bits: unless_overflowed(bits).unwrap_or(f64::NAN) })
}

/// Likelihoods of clips, and over all of them but those whose likelihood overflows.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Bits {
    /// What the likelihood behind the figures is worth.
    pub likelihood: Likelihood,
    /// Bits per sample over all samples: long clips weigh more. None where every clip is left out.
    pub per_sample: Option<f64>,
    /// Mean of the clips' bits per sample.
    pub mean: Option<f64>,
    /// Half width of the 95 % confidence interval of that mean (Student's t); none from one clip alone.
    pub ci95: Option<f64>,
    /// Names of the clips that these figures leave out, since their likelihood overflows.
    pub left_out: Vec<String>,
    /// Each clip.
    pub clips: Vec<ClipBits>,
}

impl Bits {
    /// Sums up clips.
    pub fn of(clips: Vec<ClipBits>, likelihood: Likelihood) -> Self {
        let counted = || clips.iter().filter(|clip| clip.bits.is_finite());
        let samples: f64 = counted().map(|c| c.samples as f64).sum();
        let total: f64 = counted().map(|c| c.bits * c.samples as f64).sum();
        let mean = Mean::of(counted().map(|c| c.bits));
        Self {
            likelihood,
            per_sample: (samples > 0.0).then(|| total / samples),
            mean: mean.map(|mean| mean.mean),
            ci95: mean.and_then(|mean| mean.ci95),
            left_out: clips.iter().filter(|c| !c.bits.is_finite()).map(|c| c.clip.clone()).collect(),
            clips,
        }
    }

    /// Samples of the clips that count.
    pub fn samples(&self) -> usize {
        self.clips.iter().filter(|clip| clip.bits.is_finite()).map(|clip| clip.samples).sum()
    }

    /// What to say behind a total: what the likelihood is worth, and whom it leaves out.
    pub fn remark(&self) -> String {
        let (left_out, all) = (self.left_out.len(), self.clips.len());
        let worth = self.likelihood.remark();
        match left_out {
            0 => worth.to_string(),
            _ if left_out == all => ": the likelihood of every clip overflows".to_string(),
            _ => format!("{worth}, without {} of {all}, whose likelihood overflows", dataset::count(left_out)),
        }
    }
}

/// A figure in bits per sample, or a dash where there is none.
pub fn figure(bits: Option<f64>) -> String {
    bits.map_or_else(|| "–".to_string(), |bits| format!("{bits:.4}"))
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
        assert_eq!((bits.per_sample, bits.mean), (Some(6.5), Some(7.0)));
        assert!((bits.ci95.unwrap() - 12.706).abs() < 1e-9);
        assert_eq!(Bits::of(vec![clip(1, 8.0)], Likelihood::Exact).ci95, None);
    }

    #[test]
    fn clips_whose_likelihood_overflows_are_left_out_with_their_samples() {
        let clip = |name: &str, samples, bits| ClipBits { clip: name.to_string(), samples, bits };
        let bits = |clips: &[ClipBits]| Bits::of(clips.to_vec(), Likelihood::Exact);
        let [a, b, c] = [clip("a", 100, 8.0), clip("b", 1000, f64::NAN), clip("c", 10, f64::INFINITY)];
        let found = bits(&[a, b.clone(), c.clone()]);
        assert_eq!((found.per_sample, found.mean, found.ci95, found.samples()), (Some(8.0), Some(8.0), None, 100));
        assert_eq!(found.left_out, ["b", "c"]);
        assert_eq!(found.remark(), ", without 2 clips of 3, whose likelihood overflows");
        let none = bits(&[b, c]);
        assert_eq!((none.per_sample, none.mean), (None, None));
        assert_eq!(figure(none.per_sample) + &none.remark(), "–: the likelihood of every clip overflows");
        let json = serde_json::to_value(&none).unwrap();
        assert!(json["per_sample"].is_null() && json["ci95"].is_null() && json["clips"][0]["bits"].is_null());
        assert_eq!(unless_overflowed(1e30), None);
    }
}
