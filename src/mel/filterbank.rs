//! Triangular mel bands: Slaney's scale with area normalisation, or HTK's with peaks of 1.

use super::{MelConfig, MelScale};

/// Hz per mel in the linear part of Slaney's scale (Auditory Toolbox, 1998).
const HZ_PER_MEL: f64 = 200.0 / 3.0;
/// Where Slaney's scale turns logarithmic, Hz.
const LOG_FROM_HZ: f64 = 1000.0;
/// Mels at [`LOG_FROM_HZ`].
const LOG_FROM_MEL: f64 = LOG_FROM_HZ / HZ_PER_MEL;

/// Natural logarithm of the frequency ratio of one mel in the logarithmic part.
fn log_step() -> f64 {
    6.4f64.ln() / 27.0
}

impl MelScale {
    /// Mels of a frequency in Hz.
    pub fn mel(self, hz: f64) -> f64 {
        match self {
            Self::Slaney if hz < LOG_FROM_HZ => hz / HZ_PER_MEL,
            Self::Slaney => LOG_FROM_MEL + (hz / LOG_FROM_HZ).ln() / log_step(),
            Self::Htk => 2595.0 * (1.0 + hz / 700.0).log10(),
        }
    }

    /// The frequency in Hz of mels.
    pub fn hz(self, mel: f64) -> f64 {
        match self {
            Self::Slaney if mel < LOG_FROM_MEL => mel * HZ_PER_MEL,
            Self::Slaney => LOG_FROM_HZ * (log_step() * (mel - LOG_FROM_MEL)).exp(),
            Self::Htk => 700.0 * (10f64.powf(mel / 2595.0) - 1.0),
        }
    }
}

/// Corner frequencies in Hz, `n_mels + 2`: band `b` rises from corner `b` to `b + 1`, falls to `b + 2`.
fn corners(config: &MelConfig) -> Vec<f64> {
    let (low, high) = (config.scale.mel(config.f_min), config.scale.mel(config.f_max));
    let steps = (config.n_mels + 1) as f64;
    (0..config.n_mels + 2).map(|i| config.scale.hz(low + (high - low) * i as f64 / steps)).collect()
}

/// The frequency in Hz at which each band peaks, `n_mels` values.
pub fn band_centres(config: &MelConfig) -> Vec<f64> {
    corners(config)[1..=config.n_mels].to_vec()
}

/// Weights of each band over the bins of the spectrum, row-major `[n_mels, n_fft / 2 + 1]`.
///
/// librosa 0.11 `filters.mel` with its defaults, or with `htk=True, norm=None` (torchaudio's).
pub fn mel_filterbank(config: &MelConfig) -> Vec<f32> {
    let bins = config.n_fft / 2 + 1;
    let hz_per_bin = f64::from(config.sample_rate) / config.n_fft as f64;
    let mut weights = Vec::with_capacity(config.n_mels * bins);
    for corner in corners(config).windows(3) {
        let [low, centre, high] = [corner[0], corner[1], corner[2]];
        let norm = match config.scale {
            MelScale::Slaney => 2.0 / (high - low),
            MelScale::Htk => 1.0,
        };
        weights.extend((0..bins).map(|bin| {
            let hz = bin as f64 * hz_per_bin;
            let rise = (hz - low) / (centre - low);
            let fall = (high - hz) / (high - centre);
            (norm * rise.min(fall).max(0.0)) as f32
        }));
    }
    weights
}

/// The filterbank without its zeros: for each band its first bin and the weights from there.
#[derive(Clone, Debug)]
pub struct MelBands {
    bands: Vec<(usize, Vec<f32>)>,
    bins: usize,
}

impl MelBands {
    /// The bands of a convention.
    pub fn new(config: &MelConfig) -> Self {
        let bins = config.n_fft / 2 + 1;
        let bands = mel_filterbank(config)
            .chunks(bins)
            .map(|row| {
                let first = row.iter().position(|&w| w != 0.0).unwrap_or(0);
                let end = row.iter().rposition(|&w| w != 0.0).map_or(first, |last| last + 1);
                (first, row[first..end].to_vec())
            })
            .collect();
        Self { bands, bins }
    }

    /// Number of bands.
    pub fn n_mels(&self) -> usize {
        self.bands.len()
    }

    /// Number of bins of the spectrum.
    pub fn bins(&self) -> usize {
        self.bins
    }

    /// A band's first bin and its weights from there.
    pub fn band(&self, band: usize) -> (usize, &[f32]) {
        let (first, weights) = &self.bands[band];
        (*first, weights)
    }

    /// Band magnitudes of one frame: `out = basis · magnitudes`.
    ///
    /// # Panics
    /// If `magnitudes` has fewer than [`bins`](Self::bins) values.
    pub fn apply(&self, magnitudes: &[f32], out: &mut [f32]) {
        for ((first, weights), out) in self.bands.iter().zip(out) {
            // in four partial sums, which needn't wait for each other
            let (bins, rest) = magnitudes[*first..*first + weights.len()].as_chunks::<4>();
            let (fours, others) = weights.as_chunks::<4>();
            let mut sums = [0.0; 4];
            for (bins, weights) in bins.iter().zip(fours) {
                for i in 0..4 {
                    sums[i] += bins[i] * weights[i];
                }
            }
            let rest: f32 = rest.iter().zip(others).map(|(m, w)| m * w).sum();
            *out = (sums[0] + sums[1]) + (sums[2] + sums[3]) + rest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mel::file;
    use crate::mel::file::tests::parity;

    #[test]
    fn scales_invert() {
        for scale in [MelScale::Slaney, MelScale::Htk] {
            for hz in [0.0, 12.5, 999.0, 1000.0, 1001.0, 8000.0] {
                assert!((scale.hz(scale.mel(hz)) - hz).abs() < 1e-9);
            }
        }
        assert!((MelScale::Slaney.mel(1000.0) - 15.0).abs() < 1e-12);
        assert!((MelScale::Slaney.mel(6400.0) - 42.0).abs() < 1e-12);
        assert!((MelScale::Htk.mel(1000.0) - 999.985_537).abs() < 1e-5);
    }

    #[test]
    fn equals_librosa() {
        let Some(path) = parity("mel_basis.npy") else {
            return;
        };
        let golden = file::read_array(&path).unwrap();
        let basis = mel_filterbank(&MelConfig::nvidia());
        assert_eq!(golden.shape, [80, 513]);
        let worst = basis.iter().zip(&golden.values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-6, "{worst}");
    }

    #[test]
    fn sparse_equals_dense() {
        let config = MelConfig::nvidia();
        let (dense, sparse) = (mel_filterbank(&config), MelBands::new(&config));
        let magnitudes: Vec<f32> = (0..513).map(|i| (i % 7) as f32).collect();
        let mut out = vec![0.0; 80];
        sparse.apply(&magnitudes, &mut out);
        for (band, &got) in out.iter().enumerate() {
            let expected: f32 = dense[band * 513..][..513].iter().zip(&magnitudes).map(|(w, m)| w * m).sum();
            assert!((got - expected).abs() < 1e-5);
            let (first, weights) = sparse.band(band);
            let peak = weights.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 + first;
            let centre = band_centres(&config)[band] * 1024.0 / 22_050.0;
            assert!((peak as f64 - centre).abs() <= 1.0);
        }
    }
}
