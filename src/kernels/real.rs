//! Between the transform of a real frame, taken as half as many complex values, and its spectrum:
//! what a pass of refinement does to a frame besides the transforms themselves.
//!
//! `n` real samples are `n/2` complex ones, even samples the real parts, odd ones the imaginary. With
//! `Z` their transform, `M = n/2`, `A = Z[k]`, `B = Z*[M−k]` and `W = e^(−2πi/n)`,
//!
//! ```text
//!   S = (A + B) / 2     D = −i Wᵏ (A − B) / 2     X[k] = S + D     X*[M−k] = S − D
//! ```
//!
//! is the spectrum, from both ends towards the middle; the way back is its inverse, times `n`. Kept by
//! real and imaginary parts, so that a compiler finds vectors in plain loops. One body compiled twice,
//! without fused multiply-adds: the same bits with AVX2 and without.

use super::gate::exp;
use multiversion::multiversion;
use rustfft::num_complex::Complex32;

/// Wᵏ for the first half of the bins.
pub struct Twiddles {
    re: Vec<f32>,
    im: Vec<f32>,
    half: usize,
}

/// One frame's spectrum, and room for its magnitudes.
pub struct Spectrum {
    /// Real and imaginary parts of `Z[k]` and `Z[M−k]` on the way in, `X[k]` and `X*[M−k]` then.
    front: [Vec<f32>; 2],
    back: [Vec<f32>; 2],
    /// `|X|` of all `M + 1` bins.
    pub magnitudes: Vec<f32>,
}

impl Twiddles {
    /// For frames of `n_fft` samples, an even number.
    pub fn new(n_fft: usize) -> Self {
        let half = n_fft / 2;
        let angle = |k: usize| -std::f64::consts::TAU * k as f64 / n_fft as f64;
        let pairs = 0..=half / 2;
        Self {
            re: pairs.clone().map(|k| angle(k).cos() as f32).collect(),
            im: pairs.map(|k| angle(k).sin() as f32).collect(),
            half,
        }
    }

    /// Room for one frame.
    pub fn spectrum(&self) -> Spectrum {
        let part = || [vec![0.0; self.re.len()], vec![0.0; self.re.len()]];
        Spectrum { front: part(), back: part(), magnitudes: vec![0.0; self.half + 1] }
    }

    /// The spectrum and its magnitudes, of a frame's transform of `n_fft / 2` values.
    ///
    /// # Panics
    /// If there are more or fewer.
    pub fn split(&self, transform: &[Complex32], spectrum: &mut Spectrum) {
        assert_eq!(transform.len(), self.half);
        split(self, transform, spectrum);
    }

    #[inline(always)]
    fn split_body(&self, z: &[Complex32], spectrum: &mut Spectrum) {
        let pairs = self.re.len();
        let Spectrum { front: [a_re, a_im], back: [b_re, b_im], magnitudes } = spectrum;
        for ((re, im), z) in a_re.iter_mut().zip(a_im.iter_mut()).zip(z) {
            (*re, *im) = (z.re, z.im);
        }
        // Z[M] is Z[0]
        (b_re[0], b_im[0]) = (z[0].re, z[0].im);
        for ((re, im), z) in b_re[1..].iter_mut().zip(&mut b_im[1..]).zip(z.iter().rev()) {
            (*re, *im) = (z.re, z.im);
        }
        let (a_re, a_im) = (&mut a_re[..pairs], &mut a_im[..pairs]);
        let (b_re, b_im) = (&mut b_re[..pairs], &mut b_im[..pairs]);
        let (w_re, w_im) = (&self.re[..pairs], &self.im[..pairs]);
        for k in 0..pairs {
            let (s_re, s_im) = (0.5 * (a_re[k] + b_re[k]), 0.5 * (a_im[k] - b_im[k]));
            // −i (A − B) / 2
            let (t_re, t_im) = (0.5 * (a_im[k] + b_im[k]), 0.5 * (b_re[k] - a_re[k]));
            let (d_re, d_im) = (w_re[k] * t_re - w_im[k] * t_im, w_re[k] * t_im + w_im[k] * t_re);
            (a_re[k], a_im[k]) = (s_re + d_re, s_im + d_im);
            (b_re[k], b_im[k]) = (s_re - d_re, s_im - d_im);
        }
        let (low, high) = magnitudes.split_at_mut(pairs);
        for ((m, re), im) in low.iter_mut().zip(&*a_re).zip(&*a_im) {
            *m = (re * re + im * im).sqrt();
        }
        // where a middle bin is its own partner, it stands among the low ones
        for ((m, re), im) in high.iter_mut().rev().zip(&*b_re).zip(&*b_im) {
            *m = (re * re + im * im).sqrt();
        }
    }

    /// The transform whose inverse, `n_fft / 2` complex values not divided by anything, is `n_fft` times
    /// the frame of the spectrum with its bins times `gains`, one for each of the `M + 1`.
    ///
    /// # Panics
    /// If there are more or fewer of either.
    pub fn join(&self, spectrum: &mut Spectrum, gains: &[f32], transform: &mut [Complex32]) {
        assert!(transform.len() == self.half && gains.len() == self.half + 1);
        join(self, spectrum, gains, transform);
    }

    #[inline(always)]
    fn join_body(&self, spectrum: &mut Spectrum, gains: &[f32], z: &mut [Complex32]) {
        let pairs = self.re.len();
        let Spectrum { front: [a_re, a_im], back: [b_re, b_im], .. } = spectrum;
        let (a_re, a_im) = (&mut a_re[..pairs], &mut a_im[..pairs]);
        let (b_re, b_im) = (&mut b_re[..pairs], &mut b_im[..pairs]);
        let (w_re, w_im) = (&self.re[..pairs], &self.im[..pairs]);
        for ((re, im), g) in a_re.iter_mut().zip(a_im.iter_mut()).zip(gains) {
            (*re, *im) = (*re * g, *im * g);
        }
        for ((re, im), g) in b_re.iter_mut().zip(b_im.iter_mut()).zip(gains.iter().rev()) {
            (*re, *im) = (*re * g, *im * g);
        }
        for k in 0..pairs {
            let (s_re, s_im) = (a_re[k] + b_re[k], a_im[k] + b_im[k]);
            let (d_re, d_im) = (a_re[k] - b_re[k], a_im[k] - b_im[k]);
            // i W⁻ᵏ (A − B)
            let (t_re, t_im) = (w_im[k] * d_re - w_re[k] * d_im, w_re[k] * d_re + w_im[k] * d_im);
            (a_re[k], a_im[k]) = (s_re + t_re, s_im + t_im);
            (b_re[k], b_im[k]) = (s_re - t_re, t_im - s_im);
        }
        for ((z, re), im) in z.iter_mut().zip(&*a_re).zip(&*a_im) {
            *z = Complex32::new(*re, *im);
        }
        for ((z, re), im) in z.iter_mut().rev().zip(&b_re[1..]).zip(&b_im[1..]) {
            *z = Complex32::new(*re, *im);
        }
    }
}

#[multiversion(targets("x86_64+avx2"))]
fn split(twiddles: &Twiddles, transform: &[Complex32], spectrum: &mut Spectrum) {
    twiddles.split_body(transform, spectrum);
}

#[multiversion(targets("x86_64+avx2"))]
fn join(twiddles: &Twiddles, spectrum: &mut Spectrum, gains: &[f32], transform: &mut [Complex32]) {
    twiddles.join_body(spectrum, gains, transform);
}

#[multiversion(targets("x86_64+avx2"))]
fn exp_all(values: &mut [f32]) {
    values.iter_mut().for_each(|value| *value = exp(*value));
}

/// The natural logarithm of a positive normal number: Cephes' polynomial around 1; error below 2e-7 of the
/// value or of 1, whichever is more.
#[inline(always)]
pub(super) fn ln(x: f32) -> f32 {
    // √½, from which on mantissas count as the next power's
    const FROM: i32 = 0x3f35_04f3;
    let bits = x.to_bits().cast_signed();
    let power = (bits - FROM) >> 23;
    let f = f32::from_bits((bits - (power << 23)).cast_unsigned()) - 1.0;
    let n = power as f32;
    let p = 7.037_683_6e-2;
    let p = p * f - 1.151_461e-1;
    let p = p * f + 1.167_699_9e-1;
    let p = p * f - 1.242_014_1e-1;
    let p = p * f + 1.424_932_3e-1;
    let p = p * f - 1.666_805_8e-1;
    let p = p * f + 2.000_071_5e-1;
    let p = p * f - 2.499_999_4e-1;
    let p = p * f + 3.333_333e-1;
    let square = f * f;
    f + (p * f * square - 2.121_944_4e-4 * n - 0.5 * square) + 0.693_359_4 * n
}

/// Replaces magnitudes by how far wanted logarithms are above theirs, at most `most` either way; magnitudes
/// below `floor`, a normal number, count as that.
#[multiversion(targets("x86_64+avx2"))]
pub fn log_ratios(wanted: &[f32], magnitudes: &mut [f32], floor: f32, most: f32) {
    for (m, wanted) in magnitudes.iter_mut().zip(wanted) {
        *m = (wanted - ln(m.max(floor))).clamp(-most, most);
    }
}

/// Multiplies magnitudes by `(magnitude / mean of those up to radius bins away)^power`, and `factors` says by how
/// much: what stands out, stands out further. As many of both; `sums` is room.
///
/// # Panics
/// If there are more or fewer factors than magnitudes.
pub fn sharpen(magnitudes: &mut [f32], factors: &mut [f32], sums: &mut Vec<f64>, radius: usize, power: f32) {
    assert_eq!(magnitudes.len(), factors.len());
    let mut sum = 0.0;
    sums.clear();
    sums.push(0.0);
    // in f64, since next to loud bins lie bins a million times quieter
    sums.extend(magnitudes.iter().map(|&m| {
        sum += f64::from(m);
        sum
    }));
    for (i, factor) in factors.iter_mut().enumerate() {
        let (from, to) = (i.saturating_sub(radius), (i + radius + 1).min(magnitudes.len()));
        *factor = ((sums[to] - sums[from]) / (to - from) as f64) as f32;
    }
    raise(magnitudes, factors, power);
}

/// The ratio of magnitudes and means to a power, and the magnitudes times that.
#[multiversion(targets("x86_64+avx2"))]
fn raise(magnitudes: &mut [f32], means: &mut [f32], power: f32) {
    // silence stays what it is
    const LEAST: f32 = 1e-12;
    for (m, mean) in magnitudes.iter_mut().zip(means) {
        let factor = exp(power * (ln(m.max(LEAST)) - ln(mean.max(LEAST))));
        *m *= factor;
        *mean = factor;
    }
}

/// Straight lines between values by band, for each of the first bins.
pub struct Lines {
    /// Bands, and the bin at which the line to the next band's value ends.
    runs: Vec<(usize, usize)>,
    /// For each bin, how far on that line.
    weights: Vec<f32>,
    n_bands: usize,
}

impl Lines {
    /// Of bins that stand so far, 0 to 1, between a band of `n_bands` and the next; behind the last is 0.
    ///
    /// # Panics
    /// If there is no such band.
    pub fn new(bins: &[(usize, f32)], n_bands: usize) -> Self {
        assert!(bins.iter().all(|&(band, _)| band < n_bands));
        let mut end = 0;
        let runs = bins.chunk_by(|a, b| a.0 == b.0).map(|run| {
            end += run.len();
            (run[0].0, end)
        });
        Self { runs: runs.collect(), weights: bins.iter().map(|&(_, weight)| weight).collect(), n_bands }
    }

    /// `e^line` for each bin, written to the front of `gains`.
    ///
    /// # Panics
    /// If `values` aren't one for each band, or `gains` has no room.
    pub fn exp(&self, values: &[f32], gains: &mut [f32]) {
        assert_eq!(values.len(), self.n_bands);
        let gains = &mut gains[..self.weights.len()];
        let mut from = 0;
        for &(band, end) in &self.runs {
            let value = values[band];
            let slope = values.get(band + 1).copied().unwrap_or_default() - value;
            for (gain, weight) in gains[from..end].iter_mut().zip(&self.weights[from..end]) {
                *gain = value + weight * slope;
            }
            from = end;
        }
        exp_all(gains);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use realfft::RealFftPlanner;
    use rustfft::FftPlanner;

    #[test]
    fn what_stands_out_is_sharpened() {
        let plain = |m: &[f32], i: usize| {
            let near: Vec<f64> = (i.saturating_sub(3)..(i + 4).min(m.len())).map(|i| f64::from(m[i])).collect();
            (f64::from(m[i]) * near.len() as f64 / near.iter().sum::<f64>()).powf(0.3)
        };
        let before: Vec<f32> = (0..37).map(|i| ((i * 7919 + 13) % 101) as f32 * 10f32.powi(i % 7 - 3)).collect();
        let (mut m, mut factors) = (before.clone(), vec![0.0; 37]);
        sharpen(&mut m, &mut factors, &mut Vec::new(), 3, 0.3);
        for i in 0..37 {
            let factor = if before[i] == 0.0 { f64::from(factors[i]) } else { plain(&before, i) };
            assert!((f64::from(factors[i]) - factor).abs() < 1e-5 * factor, "{} {factor}", factors[i]);
            assert_eq!(m[i], before[i] * factors[i]);
        }
        let mut silence = [0.0; 37];
        sharpen(&mut silence, &mut factors, &mut Vec::new(), 3, 0.3);
        assert_eq!((silence, factors), ([0.0; 37], vec![1.0; 37]));
    }

    #[test]
    fn equals_the_library_at_every_size() {
        for n_fft in [2, 4, 6, 10, 14, 64, 1000, 1024, 1026] {
            let half = n_fft / 2;
            let mut time: Vec<f32> = (0..n_fft).map(|i| ((i * 7919 + 13) % 2003) as f32 / 1001.0 - 1.0).collect();
            let gains: Vec<f32> = (0..=half).map(|i| 0.5 + ((i * 31) % 17) as f32 / 10.0).collect();
            let mut z: Vec<Complex32> = time.chunks_exact(2).map(|t| Complex32::new(t[0], t[1])).collect();

            let mut planner = RealFftPlanner::new();
            let mut bins = vec![Complex32::default(); half + 1];
            planner.plan_fft_forward(n_fft).process(&mut time, &mut bins).unwrap();
            let magnitudes: Vec<f32> = bins.iter().map(|bin| bin.norm()).collect();
            bins.iter_mut().zip(&gains).for_each(|(bin, g)| *bin *= g);
            (bins[0].im, bins[half].im) = (0.0, 0.0);
            planner.plan_fft_inverse(n_fft).process(&mut bins, &mut time).unwrap();

            let (twiddles, mut planner) = (Twiddles::new(n_fft), FftPlanner::new());
            let mut spectrum = twiddles.spectrum();
            planner.plan_fft_forward(half).process(&mut z);
            twiddles.split(&z, &mut spectrum);
            let close = |a: f32, b: f32| (a - b).abs() < 1e-6 * n_fft as f32;
            assert!(spectrum.magnitudes.iter().zip(&magnitudes).all(|(&a, &b)| close(a, b)), "{n_fft}");
            twiddles.join(&mut spectrum, &gains, &mut z);
            planner.plan_fft_inverse(half).process(&mut z);
            let back = z.iter().flat_map(|z| [z.re, z.im]);
            assert!(back.zip(&time).all(|(a, &b)| close(a, b)), "{n_fft}");
        }
    }

    #[test]
    fn baseline_gives_the_same_bits() {
        let z: Vec<Complex32> = (0..512).map(|i| Complex32::new((i % 7) as f32 - 3.1, (i % 11) as f32 - 5.3)).collect();
        let gains: Vec<f32> = (0..513).map(|i| (i % 5) as f32 * 0.3).collect();
        let twiddles = Twiddles::new(1024);
        let (mut a, mut b) = (twiddles.spectrum(), twiddles.spectrum());
        let (mut to_a, mut to_b) = (z.clone(), z.clone());
        twiddles.split(&z, &mut a);
        twiddles.split_body(&z, &mut b);
        assert_eq!(a.magnitudes, b.magnitudes);
        twiddles.join(&mut a, &gains, &mut to_a);
        twiddles.join_body(&mut b, &gains, &mut to_b);
        assert_eq!(to_a, to_b);
    }

    #[test]
    fn logarithms_are_close_to_f64() {
        let mut magnitudes: Vec<f32> = (0..20_000).map(|i| ((i as f32 - 12_000.0) * 3e-3).exp()).collect();
        let expected: Vec<f64> = magnitudes.iter().map(|&m| f64::from(m.max(1e-5)).ln()).collect();
        log_ratios(&vec![0.0; magnitudes.len()], &mut magnitudes, 1e-5, 9.0);
        for (m, expected) in magnitudes.iter().zip(expected) {
            let error = (f64::from(*m) + expected.clamp(-9.0, 9.0)).abs();
            assert!(error < 2e-7 * expected.abs().max(1.0), "{expected}: off by {error}");
        }
    }

    #[test]
    fn lines_go_from_band_to_band() {
        let bins = [(0, 0.0), (0, 0.5), (1, 0.0), (1, 0.25), (1, 0.75), (2, 0.0), (2, 0.5)];
        let mut gains = [1.0; 9];
        Lines::new(&bins, 3).exp(&[1.0, 2.0, -2.0], &mut gains);
        let expected = [1.0, 1.5, 2.0, 1.0, -1.0, -2.0, -1.0];
        for (gain, line) in gains.iter().zip(expected) {
            assert!((gain.ln() - line).abs() < 1e-5, "{gain}, e^{line}");
        }
        assert_eq!(gains[7..], [1.0, 1.0]);
    }
}
