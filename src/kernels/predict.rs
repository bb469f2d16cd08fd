//! Linear prediction: a power spectrum's best predictor, and the filter pair it drives.

/// Levinson and Durbin's recursion in f64: from the autocorrelation at lags `0..=order` to the
/// prediction-error filter's coefficients `a[1..=order]` and the error's power.
///
/// `e[n] = x[n] + Σ a[k] x[n−k]`. Makhoul 1975, "Linear prediction: a tutorial review".
pub fn levinson(autocorrelation: &[f64]) -> (Vec<f64>, f64) {
    let order = autocorrelation.len() - 1;
    let mut a = vec![0.0; order];
    let mut error = autocorrelation[0];
    let mut previous = vec![0.0; order];
    for i in 0..order {
        let mut acc = autocorrelation[i + 1];
        for (a, r) in a[..i].iter().zip(autocorrelation[1..=i].iter().rev()) {
            acc += a * r;
        }
        let reflection = -acc / error;
        previous[..i].copy_from_slice(&a[..i]);
        for (a, p) in a[..i].iter_mut().zip(previous[..i].iter().rev()) {
            *a += reflection * p;
        }
        a[i] = reflection;
        error *= 1.0 - reflection * reflection;
    }
    (a, error)
}

const LANES: usize = 16;

/// Σ a·b in `LANES` partial sums (a fixed order, which the compiler can vectorise).
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0_f32; LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a.remainder().iter().zip(b.remainder()).map(|(x, y)| x * y).sum();
    for (a, b) in a.zip(b) {
        for i in 0..LANES {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f32>() + tail
}

/// One filter of the pair: coefficients in the order of the samples they meet (`a[order]` first).
#[derive(Clone, Debug)]
pub struct Predictor {
    /// `a[order] … a[1]`.
    pub reversed: Vec<f32>,
    /// Standard deviation of the prediction error.
    pub gain: f32,
}

impl Predictor {
    /// From [`levinson`]'s answer.
    pub fn new(a: &[f64], error: f64) -> Self {
        Self { reversed: a.iter().rev().map(|&a| a as f32).collect(), gain: error.max(1e-30).sqrt() as f32 }
    }
}

/// `e[n] = (x[n] + Σ a[k] x[n−k]) / gain` for the samples at `range` of `x`, whose past is what
/// stands before them (zeros before the start).
pub fn residual(predictor: &Predictor, x: &[f32], range: std::ops::Range<usize>, e: &mut [f32]) {
    run(|| residual_body(predictor, x, range, e));
}

/// The inverse: `x[n] = gain · e[n] − Σ a[k] x[n−k]`, in place at `range` of `x`.
pub fn synthesise(predictor: &Predictor, x: &mut [f32], range: std::ops::Range<usize>, e: &[f32]) {
    run(|| synthesise_body(predictor, x, range, e));
}

#[inline(always)]
fn predict(predictor: &Predictor, x: &[f32], n: usize) -> f32 {
    let order = predictor.reversed.len();
    let past = order.min(n);
    dot(&predictor.reversed[order - past..], &x[n - past..n])
}

#[inline(always)]
fn residual_body(predictor: &Predictor, x: &[f32], range: std::ops::Range<usize>, e: &mut [f32]) {
    let scale = 1.0 / predictor.gain;
    for (n, e) in range.zip(e) {
        *e = (x[n] + predict(predictor, x, n)) * scale;
    }
}

#[inline(always)]
fn synthesise_body(predictor: &Predictor, x: &mut [f32], range: std::ops::Range<usize>, e: &[f32]) {
    for (n, e) in range.zip(e) {
        x[n] = predictor.gain * e - predict(predictor, x, n);
    }
}

/// Runs `body` compiled for AVX2 where there is AVX2; same bits either way.
#[inline(always)]
fn run(body: impl FnOnce()) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn avx2(body: impl FnOnce()) {
            body();
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2, as just asked.
            return unsafe { avx2(body) };
        }
    }
    body();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levinson_solves_the_normal_equations() {
        let r: Vec<f64> =
            (0..=12).map(|k| 0.9_f64.powi(k) * (f64::from(k) * 0.7).cos() + if k == 0 { 0.1 } else { 0.0 }).collect();
        let (a, error) = levinson(&r);
        for i in 1..=12_usize {
            let row: f64 = r[i] + (1..=12_usize).map(|k| a[k - 1] * r[i.abs_diff(k)]).sum::<f64>();
            assert!(row.abs() < 1e-9, "row {i}: {row}");
        }
        let expected = r[0] + (1..=12).map(|k| a[k - 1] * r[k]).sum::<f64>();
        assert!((error - expected).abs() < 1e-9);
    }

    #[test]
    fn synthesise_inverts_residual() {
        let r: Vec<f64> =
            (0..=37).map(|k| 0.95_f64.powi(k) * (f64::from(k) * 0.3).cos() + if k == 0 { 0.05 } else { 0.0 }).collect();
        let (a, error) = levinson(&r);
        let predictor = Predictor::new(&a, error);
        let x: Vec<f32> = (0..500).map(|i| ((i * i % 97) as f32 / 97.0) - 0.5).collect();
        let mut e = vec![0.0; 500];
        residual(&predictor, &x, 0..500, &mut e);
        let mut back = vec![0.0; 500];
        synthesise(&predictor, &mut back, 0..500, &e);
        let worst = x.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-4, "{worst}");
    }
}
