//! How far two sounds of equal length lie apart in their spectra.

use super::pitch::Kind;
use crate::Result;
use crate::mel::stft::Stft;
use crate::mel::{MelConfig, MelSpectrogram};
use rayon::prelude::*;
use rustfft::num_complex::Complex32;
use std::f64::consts::{LN_10, PI};

/// Cepstral coefficients that the distortion counts, from the first on: Kubichek's.
const CEPSTRA: usize = 13;
/// FFT size, hop and window, samples. Yamamoto et al. 2020, "Parallel WaveGAN", table 1.
const RESOLUTIONS: [(usize, usize, usize); 3] = [(1024, 120, 600), (2048, 240, 1200), (512, 50, 240)];
/// Powers below this are raised to it before logarithms, as in ParallelWaveGAN's code.
const LEAST_POWER: f32 = 1e-7;
/// Frames of one parallel task.
const FRAMES_PER_TASK: usize = 256;

/// Mean absolute difference of two log-mels over all values, nats.
pub fn mel_l1(a: &MelSpectrogram, b: &MelSpectrogram) -> Option<f64> {
    if a.values().len() != b.values().len() {
        return None;
    }
    let sum: f64 = a.values().iter().zip(b.values()).map(|(a, b)| f64::from((a - b).abs())).sum();
    Some(sum / a.values().len() as f64)
}

/// Mel-cepstral distortion, dB: over the hops that aren't silent, the mean of
/// `10 / ln 10 · √(2 Σ (c_d − c'_d)²)`, `d` = 1 … 13.
///
/// The coefficients are the cosine series of the log-mel magnitudes, `ln m_b = c_0 + Σ c_d cos(π d (b + ½) / M)`,
/// so that this is the root mean square over the bands, in dB, of how two smoothed spectra differ when
/// loudness doesn't count. No warping of time: both sounds are of one mel. Kubichek 1993,
/// "Mel-cepstral distance measure for objective speech quality assessment".
pub fn mel_cepstral_distortion(a: &MelSpectrogram, b: &MelSpectrogram, kinds: &[Kind]) -> Option<f64> {
    let (bands, frames) = (a.n_mels(), a.frames().min(b.frames()).min(kinds.len()));
    let cosine = |d: usize, band: usize| (PI * d as f64 * (band as f64 + 0.5) / bands as f64).cos();
    let cosines: Vec<Vec<f64>> =
        (1..=CEPSTRA.min(bands - 1)).map(|d| (0..bands).map(|band| cosine(d, band)).collect()).collect();
    let distortions: Vec<f64> = (0..frames)
        .filter(|&frame| kinds[frame] != Kind::Silence)
        .map(|frame| {
            let difference: Vec<f64> =
                (0..bands).map(|band| f64::from(a.band(band)[frame] - b.band(band)[frame])).collect();
            let coefficient = |cosines: &Vec<f64>| {
                2.0 / bands as f64 * cosines.iter().zip(&difference).map(|(c, d)| c * d).sum::<f64>()
            };
            let squares: f64 = cosines.iter().map(|cosines| coefficient(cosines).powi(2)).sum();
            10.0 / LN_10 * (2.0 * squares).sqrt()
        })
        .collect();
    (!distortions.is_empty()).then(|| distortions.iter().sum::<f64>() / distortions.len() as f64)
}

/// Multi-resolution STFT distance of Parallel WaveGAN, the mean over three resolutions: spectral
/// convergence `‖|X| − |Y|‖ / ‖|X|‖` and log magnitude `mean |ln |X| − ln |Y||`, `X` being the reference's.
///
/// `None` where the reference is silent.
///
/// # Errors
/// Never, for the sizes above.
pub fn stft_distance(reference: &[f32], other: &[f32]) -> Result<Option<(f64, f64)>> {
    if reference.is_empty() || reference.len() != other.len() {
        return Ok(None);
    }
    let (mut convergence, mut log_magnitude) = (0.0, 0.0);
    for (n_fft, hop, window) in RESOLUTIONS {
        let stft = Stft::new(n_fft, window, hop)?;
        let sums = sums(&stft, reference, other);
        if sums.energy == 0.0 {
            return Ok(None);
        }
        convergence += (sums.difference / sums.energy).sqrt();
        log_magnitude += sums.logarithms / (stft.frames(reference.len()) * stft.bins()) as f64;
    }
    let n = RESOLUTIONS.len() as f64;
    Ok(Some((convergence / n, log_magnitude / n)))
}

/// Power of a sound above a mel's range, of what no mel tells; of all frames together.
///
/// # Errors
/// If the mel's convention is out of range, or there are no samples.
pub fn power_above(samples: &[f32], mel: &MelConfig) -> Result<f64> {
    let spectra = Stft::of(mel)?.forward(samples)?;
    let hz_per_bin = f64::from(mel.sample_rate) / mel.n_fft as f64;
    // the window carries two bins over the edge
    let first = (mel.f_max / hz_per_bin) as usize + 3;
    let power = |frame| spectra.frame(frame).iter().skip(first).map(|bin| f64::from(bin.norm_sqr())).sum::<f64>();
    Ok((0..spectra.frames()).map(power).sum())
}

/// Level of a power beside another, dB; `None` where one of them is 0.
pub fn level(reference: f64, other: f64) -> Option<f64> {
    let level = 10.0 * (other / reference).log10();
    level.is_finite().then_some(level)
}

#[derive(Clone, Copy, Default)]
struct Sums {
    /// Σ (|X| − |Y|)²
    difference: f64,
    /// Σ |X|²
    energy: f64,
    /// Σ |ln |X| − ln |Y||
    logarithms: f64,
}

/// Sums over all frames, in an order that doesn't depend on the number of threads.
fn sums(stft: &Stft, reference: &[f32], other: &[f32]) -> Sums {
    let frames = stft.frames(reference.len());
    let task = |task: usize| {
        let mut scratch = stft.scratch();
        let (mut x, mut y) = (vec![Complex32::default(); stft.bins()], vec![Complex32::default(); stft.bins()]);
        let mut sums = Sums::default();
        for frame in task * FRAMES_PER_TASK..((task + 1) * FRAMES_PER_TASK).min(frames) {
            stft.analyse(reference, frame, &mut scratch, &mut x);
            stft.analyse(other, frame, &mut scratch, &mut y);
            for (x, y) in x.iter().zip(&y) {
                let (a, b) = (x.norm_sqr(), y.norm_sqr());
                sums.energy += f64::from(a);
                sums.difference += f64::from(a.sqrt() - b.sqrt()).powi(2);
                sums.logarithms += 0.5 * f64::from((a.max(LEAST_POWER) / b.max(LEAST_POWER)).ln().abs());
            }
        }
        sums
    };
    let tasks: Vec<Sums> = (0..frames.div_ceil(FRAMES_PER_TASK)).into_par_iter().map(task).collect();
    tasks.into_iter().fold(Sums::default(), |all, part| Sums {
        difference: all.difference + part.difference,
        energy: all.energy + part.energy,
        logarithms: all.logarithms + part.logarithms,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vocoder::noise::Noise;

    fn mel(value: impl Fn(usize, usize) -> f32) -> MelSpectrogram {
        MelSpectrogram::new((0..80 * 5).map(|i| value(i / 5, i % 5)).collect(), 80).unwrap()
    }

    #[test]
    fn equal_mels_have_no_distance_and_loudness_alone_no_distortion() {
        let a = mel(|band, frame| -5.0 + (band as f32 * 0.3).sin() + frame as f32);
        let louder = mel(|band, frame| -4.5 + (band as f32 * 0.3).sin() + frame as f32);
        let speech = [Kind::Voiced; 5];
        assert_eq!(mel_l1(&a, &a), Some(0.0));
        assert_eq!(mel_cepstral_distortion(&a, &a, &speech), Some(0.0));
        assert!((mel_l1(&a, &louder).unwrap() - 0.5).abs() < 1e-5);
        assert!(mel_cepstral_distortion(&a, &louder, &speech).unwrap() < 1e-5);
        assert_eq!(mel_cepstral_distortion(&a, &louder, &[Kind::Silence; 5]), None);
    }

    /// One coefficient off by 1 is a cosine of amplitude 1 neper, 8.686 dB, whose root mean square is √½
    /// of that.
    #[test]
    fn one_coefficient_off_is_its_root_mean_square() {
        let a = mel(|_, _| -5.0);
        let off = |d: f64| mel(move |band, _| (-5.0 + (PI * d * (band as f64 + 0.5) / 80.0).cos()) as f32);
        let kinds = [Kind::Silence, Kind::Unvoiced, Kind::Voiced, Kind::Silence, Kind::Voiced];
        let found = mel_cepstral_distortion(&a, &off(7.0), &kinds).unwrap();
        assert!((found - 20.0 / LN_10 * 0.5f64.sqrt()).abs() < 1e-4, "{found}");
        assert!(mel_cepstral_distortion(&a, &off(14.0), &kinds).unwrap() < 1e-4, "beyond the thirteenth");
    }

    /// A tone above the range counts, one below doesn't.
    #[test]
    fn the_level_above_is_that_of_what_lies_above() {
        let mel = MelConfig::nvidia();
        let sound = |low: f64, high: f64| -> Vec<f32> {
            let tone = |hz: f64, i: usize| (std::f64::consts::TAU * hz * i as f64 / f64::from(mel.sample_rate)).sin();
            (0..20_000).map(|i| (low * tone(3000.0, i) + high * tone(9500.0, i)) as f32).collect()
        };
        let power = |sound: &[f32]| power_above(sound, &mel).unwrap();
        let level = |other: &[f32]| level(power(&sound(0.2, 0.1)), power(other));
        assert!((level(&sound(0.9, 0.05)).unwrap() + 6.02).abs() < 0.1, "{:?}", level(&sound(0.9, 0.05)));
        assert!(level(&sound(0.4, 0.1)).unwrap().abs() < 0.1);
        assert_eq!(level(&[0.0; 20_000]), None);
        let whole = MelConfig { f_max: f64::from(mel.sample_rate) / 2.0, ..mel.clone() };
        let above = power_above(&sound(0.2, 0.1), &whole).unwrap();
        assert_eq!(super::level(above, above), None);
    }

    #[test]
    fn stft_distance_of_scaled_sounds_is_known() {
        let mut sound = vec![0.0; 20_000];
        Noise::new(5).fill(0, &mut sound);
        let half: Vec<f32> = sound.iter().map(|x| 0.5 * x).collect();
        assert_eq!(stft_distance(&sound, &sound).unwrap(), Some((0.0, 0.0)));
        let (convergence, log_magnitude) = stft_distance(&sound, &half).unwrap().unwrap();
        assert!((convergence - 0.5).abs() < 1e-4, "{convergence}");
        assert!((log_magnitude - 2f64.ln()).abs() < 1e-3, "{log_magnitude}");
        assert_eq!(stft_distance(&[0.0; 3000], &half[..3000]).unwrap(), None);
        assert_eq!(stft_distance(&[], &[]).unwrap(), None);
        assert!(stft_distance(&[0.5], &[0.1]).unwrap().is_some());
    }
}
