//! WaveNet's gate, `tanh(a) · σ(b)`, and its derivative.
//!
//! One body compiled twice (baseline and AVX2) without fused multiply-adds, so that both give the
//! same bits. Error of tanh and σ against f64: below 3e-7 (tested).

use multiversion::multiversion;

/// `e^x` for `|x| ≤ 87` (clamped): Cephes' range reduction and polynomial.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding it rounds to an integer
    let x = x.clamp(-87.0, 87.0);
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.987_569_2e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 5.0e-1;
    let e = p * (r * r) + r + 1.0;
    // ROUND's low nine bits are zero, so the shift leaves n's exponent alone
    e * f32::from_bits(rounded.to_bits().wrapping_add(127) << 23)
}

#[inline(always)]
fn forward_body(pre: &mut [f32], act: &mut [f32], channels: usize) {
    for (row, act) in pre.chunks_exact_mut(2 * channels).zip(act.chunks_exact_mut(channels)) {
        let (a, b) = row.split_at_mut(channels);
        // tanh(a) = (1 − e^−2a) / (1 + e^−2a)
        a.iter_mut().for_each(|a| {
            let e = exp(-2.0 * *a);
            *a = (1.0 - e) / (1.0 + e);
        });
        b.iter_mut().for_each(|b| *b = 1.0 / (1.0 + exp(-*b)));
        act.iter_mut().zip(a).zip(b).for_each(|((act, a), b)| *act = *a * *b);
    }
}

#[inline(always)]
fn backward_body(gated: &[f32], d_act: &[f32], d_pre: &mut [f32], channels: usize) {
    let rows = gated.chunks_exact(2 * channels).zip(d_act.chunks_exact(channels));
    for ((gated, d_act), d_pre) in rows.zip(d_pre.chunks_exact_mut(2 * channels)) {
        let (a, b) = gated.split_at(channels);
        let (da, db) = d_pre.split_at_mut(channels);
        for i in 0..channels {
            da[i] = d_act[i] * b[i] * (1.0 - a[i] * a[i]);
            db[i] = d_act[i] * a[i] * b[i] * (1.0 - b[i]);
        }
    }
}

/// Replaces `pre` `[steps, 2·channels]` by `[tanh | σ]` of its halves and writes their product to
/// `act` `[steps, channels]`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
pub fn forward(pre: &mut [f32], act: &mut [f32], channels: usize) {
    forward_body(pre, act, channels);
}

/// From `gated` `[tanh | σ]` and the gradient of the product `[steps, channels]`: the gradient
/// before the gate, `[steps, 2·channels]`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
pub fn backward(gated: &[f32], d_act: &[f32], d_pre: &mut [f32], channels: usize) {
    backward_body(gated, d_act, d_pre, channels);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gate_is_close_to_f64() {
        let xs: Vec<f32> = (-4000..=4000).map(|i| i as f32 * 0.025).collect();
        for &x in &xs {
            let mut pre = [x, x];
            let mut act = [0.0];
            forward(&mut pre, &mut act, 1);
            let (tanh, sigmoid) = (f64::from(x).tanh(), 1.0 / (1.0 + (-f64::from(x)).exp()));
            assert!((f64::from(pre[0]) - tanh).abs() < 3e-7, "tanh {x}");
            assert!((f64::from(pre[1]) - sigmoid).abs() < 3e-7, "sigmoid {x}");
            assert!((f64::from(act[0]) - tanh * sigmoid).abs() < 4e-7);
        }
    }

    #[test]
    fn simd_equals_baseline() {
        let mut a: Vec<f32> = (0..2 * 37 * 5).map(|i| ((i * 7919) % 1000) as f32 / 90.0 - 5.0).collect();
        let mut b = a.clone();
        let (mut out_a, mut out_b) = (vec![0.0; 37 * 5], vec![0.0; 37 * 5]);
        forward(&mut a, &mut out_a, 37);
        forward_body(&mut b, &mut out_b, 37);
        assert_eq!((a, out_a), (b, out_b));
    }
}
