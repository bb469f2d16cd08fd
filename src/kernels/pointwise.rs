//! The steps that treat every value by itself; same bits on every processor.

use super::gate::exp;
use multiversion::multiversion;

/// Replaces each value by `sinh(scale · x) / scale`; exact to 1e-6 of the value and 2e-7 besides.
#[multiversion(targets("x86_64+avx2"))]
pub fn sinh(x: &mut [f32], scale: f32) {
    let factor = 0.5 / scale;
    for x in x {
        let u = *x * scale;
        *x = (exp(u) - exp(-u)) * factor;
    }
}

/// Rows of `x`, `channels` long: `x · scale + shift` per channel.
#[multiversion(targets("x86_64+avx2"))]
pub fn affine(x: &mut [f32], scale: &[f32], shift: &[f32]) {
    for row in x.chunks_exact_mut(scale.len()) {
        row.iter_mut().zip(scale).zip(shift).for_each(|((x, scale), shift)| *x = *x * scale + shift);
    }
}

/// `v · σ(v)`.
#[multiversion(targets("x86_64+avx2"))]
pub fn silu(x: &mut [f32]) {
    x.iter_mut().for_each(|v| *v /= 1.0 + exp(-*v));
}

/// What brings a row to unit root mean square, `eps` added to the mean square.
#[inline(always)]
pub(super) fn to_unit_rms(row: &[f32], eps: f32) -> f32 {
    1.0 / (row.iter().map(|v| v * v).sum::<f32>() / row.len() as f32 + eps).sqrt()
}

/// Rows of `width` values, each divided by the root of its mean square and `eps`.
#[multiversion(targets("x86_64+avx2"))]
pub fn rms_norm(x: &mut [f32], width: usize, eps: f32) {
    for row in x.chunks_exact_mut(width) {
        let scale = to_unit_rms(row, eps);
        row.iter_mut().for_each(|v| *v *= scale);
    }
}

/// A coupling's inverse: in rows of `known + moved` values, `(x − b) · e^−log_s` for the moved ones,
/// from rows `[b | log_s]`; `log_s` is `bound · tanh(· / bound)` if there is a bound.
#[multiversion(targets("x86_64+avx2"))]
pub fn uncouple(x: &mut [f32], known: usize, params: &[f32], moved: usize, bound: Option<f32>) {
    for (x, params) in x.chunks_exact_mut(known + moved).zip(params.chunks_exact(2 * moved)) {
        let (b, log_s) = params.split_at(moved);
        let rows = x[known..].iter_mut().zip(b).zip(log_s);
        match bound {
            Some(bound) => {
                let scale = -2.0 / bound;
                rows.for_each(|((x, b), log_s)| {
                    let e = exp(scale * log_s);
                    *x = (*x - b) * exp((e - 1.0) / (e + 1.0) * bound);
                });
            }
            None => rows.for_each(|((x, b), log_s)| *x = (*x - b) * exp(-log_s)),
        }
    }
}

/// `log_s` of an affine map and its derivative, `bound · tanh(o / bound)` if there is a bound.
#[inline(always)]
fn log_scale(o: f32, bound: Option<f32>) -> (f32, f32) {
    match bound {
        Some(bound) => {
            let e = exp(-2.0 / bound * o);
            let tanh = (1.0 - e) / (1.0 + e);
            (tanh * bound, 1.0 - tanh * tanh)
        }
        None => (o, 1.0),
    }
}

/// `log_scale` of each value, in place.
#[multiversion(targets("x86_64+avx2"))]
pub fn log_scales(o: &mut [f32], bound: Option<f32>) {
    o.iter_mut().for_each(|o| *o = log_scale(*o, bound).0);
}

/// From `log_s` and its gradient, the latter in place: that of what `log_s` was made of.
#[multiversion(targets("x86_64+avx2"))]
pub fn log_scales_backward(log_s: &[f32], d: &mut [f32], bound: f32) {
    d.iter_mut().zip(log_s).for_each(|(d, log_s)| *d *= 1.0 - (log_s / bound) * (log_s / bound));
}

/// Replaces `x` by `x · e^log_s + b`, `log_s` being what [`log_scales`] makes of `o`.
#[multiversion(targets("x86_64+avx2"))]
pub fn couple(x: &mut [f32], b: &[f32], o: &[f32], bound: Option<f32>) {
    x.iter_mut().zip(b).zip(o).for_each(|((x, b), o)| *x = *x * exp(log_scale(*o, bound).0) + b);
}

/// The gradients of [`couple`]: replaces that of its result, `d`, by that of `x`, and `o` by its own; that of `b` is
/// the one of the result.
#[multiversion(targets("x86_64+avx2"))]
pub fn couple_backward(x: &[f32], o: &mut [f32], d: &mut [f32], bound: Option<f32>) {
    for ((x, o), d) in x.iter().zip(o).zip(d) {
        let (log_s, slope) = log_scale(*o, bound);
        *d *= exp(log_s);
        *o = *d * x * slope;
    }
}

/// Rows of `x`: divided by `e^g`, `g` between two rows, `part` of the way for each row of `x`.
#[multiversion(targets("x86_64+avx2"))]
pub fn ungain(x: &mut [f32], now: &[f32], next: &[f32], parts: impl Iterator<Item = f32>) {
    for (row, part) in x.chunks_exact_mut(now.len()).zip(parts) {
        for ((x, now), next) in row.iter_mut().zip(now).zip(next) {
            *x *= exp(-(now + part * (next - now)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(count: usize, most: f32) -> Vec<f32> {
        (0..count).map(|i| most * (2.0 * i as f32 / (count - 1) as f32 - 1.0)).collect()
    }

    #[test]
    fn close_to_f64() {
        let xs = ramp(1001, 20.0);
        let (mut sinh_x, mut silu_x) = (xs.clone(), xs.clone());
        sinh(&mut sinh_x, 0.5);
        silu(&mut silu_x);
        for ((&x, sinh_x), silu_x) in xs.iter().zip(sinh_x).zip(silu_x) {
            let x = f64::from(x);
            let expected = (x * 0.5).sinh() / 0.5;
            assert!((f64::from(sinh_x) - expected).abs() < 1e-6 * expected.abs() + 4e-7, "sinh {x}: {sinh_x}");
            assert!((f64::from(silu_x) - x / (1.0 + (-x).exp())).abs() < 2e-6, "silu {x}: {silu_x}");
        }
    }

    #[test]
    fn rows_have_unit_mean_square() {
        let mut x = ramp(7 * 5, 300.0);
        x[..7].fill(0.0);
        let before = x.clone();
        rms_norm(&mut x, 7, 1e-5);
        assert_eq!(x[..7], [0.0; 7]);
        for (row, before) in x.chunks_exact(7).zip(before.chunks_exact(7)).skip(1) {
            let square = row.iter().map(|v| v * v).sum::<f32>() / 7.0;
            assert!((square - 1.0).abs() < 1e-5, "{square}");
            row.iter().zip(before).for_each(|(v, b)| assert!((v * before[0] - b * row[0]).abs() < 1e-2, "{v}"));
        }
    }

    #[test]
    fn a_coupling_is_undone() {
        for (known, moved) in [(1, 1), (3, 4), (8, 8), (5, 17)] {
            for bound in [None, Some(2.0)] {
                let (before, rows) = (ramp((known + moved) * 9, 3.0), ramp(2 * moved * 9, 4.0));
                let mut x = before.clone();
                uncouple(&mut x, known, &rows, moved, bound);
                for (i, (&got, &before)) in x.iter().zip(&before).enumerate() {
                    let (row, channel) = (i / (known + moved), i % (known + moved));
                    let Some(j) = channel.checked_sub(known) else {
                        assert_eq!(got, before);
                        continue;
                    };
                    let (b, log_s) = (rows[row * 2 * moved + j], f64::from(rows[row * 2 * moved + moved + j]));
                    let log_s = bound.map_or(log_s, |bound| f64::from(bound) * (log_s / f64::from(bound)).tanh());
                    let expected = f64::from(before - b) * (-log_s).exp();
                    assert!((f64::from(got) - expected).abs() < 3e-6 * expected.abs() + 1e-6, "{got}, not {expected}");
                }
            }
        }
    }
}
