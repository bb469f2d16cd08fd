//! Linear prediction: a power spectrum's best predictor, and the filter pair it drives.

use multiversion::multiversion;

/// Filters that the recursions take at once, one in each lane: by itself, each of a filter's many short sums waits
/// for the one before.
pub const ABREAST: usize = 4;

/// A value of each filter.
pub type Lanes = [f64; ABREAST];

/// `f` lane by lane.
#[inline(always)]
fn each(f: impl FnMut(usize) -> f64) -> Lanes {
    std::array::from_fn(f)
}

/// Levinson and Durbin's recursion in f64, lane by lane: from the autocorrelation at lags `0..=order` to the
/// prediction-error filter's coefficients `a[1..=order]` and the error's power.
///
/// `e[n] = x[n] + Σ a[k] x[n−k]`. Makhoul 1975, "Linear prediction: a tutorial review".
#[multiversion(targets("x86_64+avx2"))]
pub fn levinson(autocorrelation: &[Lanes]) -> (Vec<Lanes>, Lanes) {
    let (r, order) = (autocorrelation, autocorrelation.len() - 1);
    let mut a = vec![Lanes::default(); order];
    let mut error = r[0];
    let mut met = r.get(1).copied().unwrap_or_default();
    for i in 0..order {
        let reflection;
        (reflection, error) = reflect(met, error);
        a[i] = reflection;
        // on the way, what the predictor from i + 1 samples makes of the next lag
        let next = r.get(i + 2).copied().unwrap_or_default();
        met = each(|l| next[l] + reflection[l] * r[1][l]);
        met = extend(&mut a[..i], reflection, met, &r[2.min(order)..]);
    }
    (a, error)
}

/// The reflection coefficient and the error's power behind it, from what the predictor leaves of the next lag.
#[inline(always)]
fn reflect(met: Lanes, error: Lanes) -> (Lanes, Lanes) {
    let reflection = each(|l| -met[l] / error[l]);
    (reflection, each(|l| error[l] * (1.0 - reflection[l] * reflection[l])))
}

/// One step of the recursion: all coefficients but the last of the predictor from one sample more, in place, and `met`
/// with their products with the lags added, the last coefficient's lag first in `r`.
#[inline(always)]
fn extend(a: &mut [Lanes], reflection: Lanes, met: Lanes, r: &[Lanes]) -> Lanes {
    let n = a.len();
    let (mut sums, mut others) = (met, Lanes::default());
    let (front, back) = a.split_at_mut(n / 2);
    // `r[0]` belongs to `a[n − 1]`
    let lags = r[..n].iter().zip(r[..n].iter().rev());
    let middle = n % 2;
    for ((f, b), (of_b, of_f)) in front.iter_mut().zip(back[middle..].iter_mut().rev()).zip(lags) {
        let (x, y) = (*f, *b);
        *f = each(|l| x[l] + reflection[l] * y[l]);
        *b = each(|l| y[l] + reflection[l] * x[l]);
        sums = each(|l| sums[l] + f[l] * of_f[l]);
        others = each(|l| others[l] + b[l] * of_b[l]);
    }
    if middle == 1 {
        let x = back[0];
        back[0] = each(|l| x[l] + reflection[l] * x[l]);
        sums = each(|l| sums[l] + back[0][l] * r[n / 2][l]);
    }
    each(|l| sums[l] + others[l])
}

/// Solves `R u = q` lane by lane, where `R[i, j] = r[|i − j|]` is as large as `q`: Levinson's recursion for any
/// right-hand side. Golub & Van Loan, "Matrix computations", §4.7.3.
#[multiversion(targets("x86_64+avx2"))]
pub fn toeplitz_solve(r: &[Lanes], q: &[Lanes]) -> Vec<Lanes> {
    let n = q.len();
    let mut u = vec![Lanes::default(); n];
    let mut a = vec![Lanes::default(); n];
    let mut error = r[0];
    let mut left = r.get(1).copied().unwrap_or_default();
    for i in 0..n {
        if i > 0 {
            let reflection;
            (reflection, error) = reflect(left, error);
            a[i - 1] = reflection;
            let next = r.get(i + 1).copied().unwrap_or_default();
            left = each(|l| next[l] + reflection[l] * r[1][l]);
            left = extend(&mut a[..i - 1], reflection, left, &r[2.min(r.len())..]);
        }
        let (mut met, mut others) = (Lanes::default(), Lanes::default());
        let pairs = u[..i].chunks_exact(2).zip(r[1..=i].rchunks_exact(2));
        for (u, r) in pairs {
            met = each(|l| met[l] + u[0][l] * r[1][l]);
            others = each(|l| others[l] + u[1][l] * r[0][l]);
        }
        if i % 2 == 1 {
            met = each(|l| met[l] + u[i - 1][l] * r[1][l]);
        }
        // `R` takes the predictor turned around, [a[i] … a[1], 1], to [0 … 0, error]
        let share = each(|k| (q[i][k] - met[k] - others[k]) / error[k]);
        for (u, a) in u[..i].iter_mut().zip(a[..i].iter().rev()) {
            *u = each(|l| u[l] + share[l] * a[l]);
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
pub fn levinson_backward(autocorrelation: &[Lanes], a: &[Lanes], d_a: &[Lanes], d_error: Lanes) -> Vec<Lanes> {
    let full: Vec<Lanes> = std::iter::once(&[1.0; ABREAST]).chain(a).copied().collect();
    let mut v: Vec<Lanes> = full.iter().map(|a| each(|l| d_error[l] * a[l])).collect();
    for (v, u) in v[1..].iter_mut().zip(toeplitz_solve(autocorrelation, d_a)) {
        *v = each(|l| v[l] - u[l]);
    }
    // Σ over all i, j with |i − j| = lag of v[i] · ã[j]
    let sum = |lag: usize| {
        let past = dot_abreast(&v[lag..], &full);
        if lag == 0 {
            return past;
        }
        let ahead = dot_abreast(&v, &full[lag..]);
        each(|l| past[l] + ahead[l])
    };
    (0..full.len()).map(sum).collect()
}

/// Σ a·b of each lane, as far as both go.
#[inline(always)]
fn dot_abreast(a: &[Lanes], b: &[Lanes]) -> Lanes {
    let count = a.len().min(b.len());
    let mut sums = [Lanes::default(); 4];
    let (a, b) = (a[..count].chunks_exact(sums.len()), b[..count].chunks_exact(sums.len()));
    for (a, b) in a.remainder().iter().zip(b.remainder()) {
        sums[0] = each(|l| sums[0][l] + a[l] * b[l]);
    }
    for (a, b) in a.zip(b) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum = each(|l| sum[l] + a[l] * b[l]);
        }
    }
    each(|l| (sums[0][l] + sums[1][l]) + (sums[2][l] + sums[3][l]))
}

const LANES: usize = 16;

/// Σ a·b in `LANES` partial sums (a fixed order, which the compiler can vectorise).
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0; LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a.remainder().iter().zip(b.remainder()).map(|(&x, &y)| x * y).sum();
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
    /// From one lane of [`levinson`]'s answer.
    pub fn new(a: impl DoubleEndedIterator<Item = f64>, error: f64) -> Self {
        Self { reversed: a.rev().map(|a| a as f32).collect(), gain: error.max(1e-30).sqrt() as f32 }
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

    /// An autocorrelation for each lane.
    fn lags(order: usize) -> Vec<Lanes> {
        let lag = |k: usize, l: usize| {
            let decay = 0.9 - 0.1 * l as f64;
            decay.powi(k as i32) * (k as f64 * (0.7 + 0.3 * l as f64)).cos() + if k == 0 { 0.1 } else { 0.0 }
        };
        (0..=order).map(|k| each(|l| lag(k, l))).collect()
    }

    #[test]
    fn levinson_solves_the_normal_equations() {
        for order in [0, 1, 2, 3, 12, 17] {
            let r = lags(order);
            let (a, error) = levinson(&r);
            assert_eq!(a.len(), order);
            for l in 0..ABREAST {
                for i in 1..=order {
                    let row: f64 = r[i][l] + (1..=order).map(|k| a[k - 1][l] * r[i.abs_diff(k)][l]).sum::<f64>();
                    assert!(row.abs() < 1e-9, "order {order}, lane {l}, row {i}: {row}");
                }
                let expected = r[0][l] + (1..=order).map(|k| a[k - 1][l] * r[k][l]).sum::<f64>();
                assert!((error[l] - expected).abs() < 1e-9, "order {order}, lane {l}");
            }
        }
    }

    #[test]
    fn toeplitz_solve_solves() {
        for n in [1, 2, 3, 16, 17] {
            let r = lags(n);
            let q: Vec<Lanes> = (0..n).map(|i| each(|l| (((i + 5 * l) * 7919 % 31) as f64 - 15.0) / 7.0)).collect();
            let u = toeplitz_solve(&r, &q);
            for l in 0..ABREAST {
                for i in 0..n {
                    let row: f64 = (0..n).map(|j| r[i.abs_diff(j)][l] * u[j][l]).sum();
                    let q = q[i][l];
                    assert!((row - q).abs() < 1e-9, "lane {l}, row {i} of {n}: {row} against {q}");
                }
            }
        }
    }

    #[test]
    fn levinson_has_the_gradient_of_finite_differences() {
        for order in [1, 2, 9] {
            let r = lags(order);
            let d_a: Vec<Lanes> = (0..order).map(|i| each(|l| (i as f64 * 1.3 + l as f64).sin())).collect();
            let d_error = each(|l| 0.7 - 0.5 * l as f64);
            let loss = |r: &[Lanes]| {
                let (a, error) = levinson(r);
                let of_lane = |l| a.iter().zip(&d_a).map(|(a, d): (&Lanes, &Lanes)| a[l] * d[l]).sum::<f64>();
                each(|l| of_lane(l) + d_error[l] * error[l])
            };
            let stated = levinson_backward(&r, &levinson(&r).0, &d_a, d_error);
            for (k, stated) in stated.into_iter().enumerate() {
                let at = |h: f64| {
                    let mut r = r.clone();
                    r[k] = each(|l| r[k][l] + h);
                    loss(&r)
                };
                let (more, less) = (at(1e-6), at(-1e-6));
                for l in 0..ABREAST {
                    let numerical = (more[l] - less[l]) / 2e-6;
                    let near = 1e-6 * numerical.abs().max(1.0);
                    assert!((numerical - stated[l]).abs() < near, "lane {l}, lag {k}: {}, {numerical}", stated[l]);
                }
            }
        }
    }

    #[test]
    fn synthesise_inverts_residual() {
        let (a, error) = levinson(&lags(37));
        let predictor = Predictor::new(a.iter().map(|a| a[1]), error[1]);
        let x: Vec<f32> = (0..500).map(|i| ((i * i % 97) as f32 / 97.0) - 0.5).collect();
        let mut e = vec![0.0; 500];
        residual(&predictor, &x, 0..500, &mut e);
        let mut back = vec![0.0; 500];
        synthesise(&predictor, &mut back, 0..500, &e);
        let worst = x.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-4, "{worst}");
    }
}
