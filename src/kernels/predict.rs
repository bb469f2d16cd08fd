//! Linear prediction: a power spectrum's best predictor, and the filter pair it drives.

use multiversion::multiversion;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Mul};

/// Levinson and Durbin's recursion in f64: from the autocorrelation at lags `0..=order` to the
/// prediction-error filter's coefficients `a[1..=order]` and the error's power.
///
/// `e[n] = x[n] + Σ a[k] x[n−k]`. Makhoul 1975, "Linear prediction: a tutorial review".
#[multiversion(targets("x86_64+avx2"))]
pub fn levinson(autocorrelation: &[f64]) -> (Vec<f64>, f64) {
    let order = autocorrelation.len() - 1;
    let (mut a, mut previous) = (vec![0.0; order], vec![0.0; order]);
    let mut error = autocorrelation[0];
    let lags = backwards(autocorrelation);
    for i in 0..order {
        error = extend(&lags, &mut a, &mut previous, i, error);
    }
    (a, error)
}

/// The lags `order … 1` of `r`, so that sums over them run forwards.
fn backwards(r: &[f64]) -> Vec<f64> {
    r[1..].iter().rev().copied().collect()
}

/// One step of the recursion, from the lags [`backwards`]: the predictor from `i` samples, `a[..i]`,
/// becomes that from `i + 1`; its error's power.
#[inline(always)]
fn extend(lags: &[f64], a: &mut [f64], previous: &mut [f64], i: usize, error: f64) -> f64 {
    let at = lags.len() - i;
    let reflection = -(lags[at - 1] + dot(&a[..i], &lags[at..])) / error;
    previous[..i].copy_from_slice(&a[..i]);
    for (a, p) in a[..i].iter_mut().zip(previous[..i].iter().rev()) {
        *a += reflection * p;
    }
    a[i] = reflection;
    error * (1.0 - reflection * reflection)
}

/// Solves `R u = q`, where `R[i, j] = r[|i − j|]` is as large as `q`: Levinson's recursion for any
/// right-hand side. Golub & Van Loan, "Matrix computations", §4.7.3.
#[multiversion(targets("x86_64+avx2"))]
pub fn toeplitz_solve(r: &[f64], q: &[f64]) -> Vec<f64> {
    let n = q.len();
    let mut u = vec![0.0; n];
    let (mut a, mut previous) = (vec![0.0; n], vec![0.0; n]);
    let mut error = r[0];
    let lags = backwards(&r[..n]);
    for i in 0..n {
        if i > 0 {
            error = extend(&lags, &mut a, &mut previous, i - 1, error);
        }
        let met = dot(&u[..i], &lags[lags.len() - i..]);
        // `R` takes the predictor turned around, [a[i] … a[1], 1], to [0 … 0, error]
        let share = (q[i] - met) / error;
        for (u, a) in u[..i].iter_mut().zip(a[..i].iter().rev()) {
            *u += share * a;
        }
        u[i] = share;
    }
    u
}

/// The gradient of [`levinson`]: from its input, its coefficients, and the gradients of these
/// (`d_a`) and of the error's power, to that of the autocorrelation.
///
/// The coefficients solve `R a = −r`, so `da = −R⁻¹ [dr | dR] ã` with `ã = [1, a]`; the error
/// `ãᵀ R̃ ã` is stationary in `a`, so only `dR̃` moves it.
#[multiversion(targets("x86_64+avx2"))]
pub fn levinson_backward(autocorrelation: &[f64], a: &[f64], d_a: &[f64], d_error: f64) -> Vec<f64> {
    let full: Vec<f64> = std::iter::once(1.0).chain(a.iter().copied()).collect();
    let mut v: Vec<f64> = full.iter().map(|a| d_error * a).collect();
    v[1..].iter_mut().zip(toeplitz_solve(autocorrelation, d_a)).for_each(|(v, u)| *v -= u);
    // Σ over all i, j with |i − j| = lag of v[i] · ã[j]
    let mut gradient = vec![0.0; full.len()];
    for (lag, g) in gradient.iter_mut().enumerate() {
        let past = dot(&v[lag..], &full[..full.len() - lag]);
        *g = if lag == 0 { past } else { past + dot(&v[..v.len() - lag], &full[lag..]) };
    }
    gradient
}

const LANES: usize = 16;

/// Σ a·b in `LANES` partial sums (a fixed order, which the compiler can vectorise).
#[inline(always)]
fn dot<T: Copy + Default + Mul<Output = T> + Add<Output = T> + AddAssign + Sum>(a: &[T], b: &[T]) -> T {
    let mut sums = [T::default(); LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: T = a.remainder().iter().zip(b.remainder()).map(|(&x, &y)| x * y).sum();
    for (a, b) in a.zip(b) {
        for i in 0..LANES {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().copied().sum::<T>() + tail
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
#[multiversion(targets("x86_64+avx2"))]
pub fn residual(predictor: &Predictor, x: &[f32], range: std::ops::Range<usize>, e: &mut [f32]) {
    let scale = 1.0 / predictor.gain;
    for (n, e) in range.zip(e) {
        *e = (x[n] + predict(predictor, x, n)) * scale;
    }
}

/// The gradient of [`residual`] in the coefficients `a[1..=order]`, from that of `e`, in f64.
#[multiversion(targets("x86_64+avx2"))]
pub fn residual_backward(predictor: &Predictor, x: &[f32], range: std::ops::Range<usize>, d_e: &[f32]) -> Vec<f64> {
    let order = predictor.reversed.len();
    let scale = 1.0 / f64::from(predictor.gain);
    let mut reversed = vec![0.0; order];
    for (n, &d) in range.zip(d_e) {
        let past = order.min(n);
        let d = f64::from(d) * scale;
        for (g, &x) in reversed[order - past..].iter_mut().zip(&x[n - past..n]) {
            *g += d * f64::from(x);
        }
    }
    reversed.reverse();
    reversed
}

/// The gradient of [`residual`] in `x`, from that of `e`: added to `d_x` at `range` and before it.
#[multiversion(targets("x86_64+avx2"))]
pub fn residual_backward_sound(predictor: &Predictor, d_x: &mut [f32], range: std::ops::Range<usize>, d_e: &[f32]) {
    let order = predictor.reversed.len();
    let scale = 1.0 / predictor.gain;
    for (n, &d) in range.zip(d_e) {
        let past = order.min(n);
        d_x[n] += d * scale;
        for (g, &a) in d_x[n - past..n].iter_mut().zip(&predictor.reversed[order - past..]) {
            *g += d * scale * a;
        }
    }
}

/// The inverse: `x[n] = gain · e[n] − Σ a[k] x[n−k]`, in place at `range` of `x`.
#[multiversion(targets("x86_64+avx2"))]
pub fn synthesise(predictor: &Predictor, x: &mut [f32], range: std::ops::Range<usize>, e: &[f32]) {
    for (n, e) in range.zip(e) {
        x[n] = predictor.gain * e - predict(predictor, x, n);
    }
}

#[inline(always)]
fn predict(predictor: &Predictor, x: &[f32], n: usize) -> f32 {
    let order = predictor.reversed.len();
    let past = order.min(n);
    dot(&predictor.reversed[order - past..], &x[n - past..n])
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
    fn toeplitz_solve_solves() {
        for n in [1, 2, 17] {
            let r: Vec<f64> = (0..=n)
                .map(|k| 0.9_f64.powi(k) * (f64::from(k) * 0.7).cos() + if k == 0 { 0.1 } else { 0.0 })
                .collect();
            let n = n as usize;
            let q: Vec<f64> = (0..n).map(|i| ((i * 7919 % 31) as f64 - 15.0) / 7.0).collect();
            let u = toeplitz_solve(&r, &q);
            for i in 0..n {
                let row: f64 = (0..n).map(|j| r[i.abs_diff(j)] * u[j]).sum();
                assert!((row - q[i]).abs() < 1e-9, "row {i} of {n}: {row} against {}", q[i]);
            }
        }
    }

    #[test]
    fn levinson_has_the_gradient_of_finite_differences() {
        let order = 9;
        let r: Vec<f64> = (0..=order)
            .map(|k| 0.9_f64.powi(k) * (f64::from(k) * 0.7).cos() + if k == 0 { 0.1 } else { 0.0 })
            .collect();
        let d_a: Vec<f64> = (0..order).map(|i| (f64::from(i) * 1.3).sin()).collect();
        let d_error = 0.7;
        let loss = |r: &[f64]| {
            let (a, error) = levinson(r);
            a.iter().zip(&d_a).map(|(a, d)| a * d).sum::<f64>() + d_error * error
        };
        let stated = levinson_backward(&r, &levinson(&r).0, &d_a, d_error);
        for (k, stated) in stated.into_iter().enumerate() {
            let at = |h: f64| {
                let mut r = r.clone();
                r[k] += h;
                loss(&r)
            };
            let numerical = (at(1e-6) - at(-1e-6)) / 2e-6;
            assert!((numerical - stated).abs() < 1e-6 * numerical.abs().max(1.0), "lag {k}: {stated}, {numerical}");
        }
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
