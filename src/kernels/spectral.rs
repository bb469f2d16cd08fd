//! How much a convolution can stretch its input, and how that depends on its weights.

use super::{Strides, matmul_add};

/// Rounds of the power iteration: it begins anew each time, so that the result depends on the weights alone.
const ROUNDS: usize = 40;
/// The power iteration stays below the norm, by 2 % where neighbouring frequencies are nearly as strong.
const SLACK: f32 = 1.03;

/// The spectral norm of a convolution with `weight` `[kernel, in, out]`, and its gradient by the weight.
///
/// By power iteration on a ring of steps long enough for the kernel's frequencies, with slack for what it
/// has not reached: up to 3 % too large. Yoshida & Miyato 2017; for convolutions Gouk et al. 2018, §3.2.
pub fn conv_norm(weight: &[f32], (kernel, inputs, outputs): (usize, usize, usize)) -> (f32, Vec<f32>) {
    assert_eq!(weight.len(), kernel * inputs * outputs);
    let steps = if kernel == 1 { 1 } else { 8 * kernel };
    let width = kernel * inputs;
    // anything that no singular vector is orthogonal to
    let mut v: Vec<f32> = (0..steps * inputs).map(|i| ((i * 7919 + 13) % 2003) as f32 / 1001.0 - 1.0).collect();
    let mut met = vec![0.0; steps * width];
    let mut u = vec![0.0; steps * outputs];
    let mut norm = 0.0;
    for _ in 0..ROUNDS {
        normalise(&mut v);
        for (t, row) in met.chunks_exact_mut(width).enumerate() {
            for (tap, part) in row.chunks_exact_mut(inputs).enumerate() {
                part.copy_from_slice(&v[(t + tap) % steps * inputs..][..inputs]);
            }
        }
        u.fill(0.0);
        let (tall, wide) = (Strides::rows(width), Strides::rows(outputs));
        matmul_add((steps, width, outputs), (&met, tall), (weight, wide), (&mut u, wide));
        norm = normalise(&mut u);
        let mut back = vec![0.0; steps * width];
        matmul_add((steps, outputs, width), (&u, wide), (weight, wide.t()), (&mut back, tall));
        v.fill(0.0);
        for (t, row) in back.chunks_exact(width).enumerate() {
            for (tap, part) in row.chunks_exact(inputs).enumerate() {
                let at = (t + tap) % steps * inputs;
                v[at..at + inputs].iter_mut().zip(part).for_each(|(v, p)| *v += p);
            }
        }
    }
    let mut gradient = vec![0.0; weight.len()];
    let rows = Strides::rows(outputs);
    matmul_add((width, steps, outputs), (&met, Strides::rows(width).t()), (&u, rows), (&mut gradient, rows));
    gradient.iter_mut().for_each(|g| *g *= SLACK);
    (SLACK * norm, gradient)
}

/// Scales a vector to length 1 and gives what its length was; zeros stay.
fn normalise(vector: &mut [f32]) -> f32 {
    let norm = vector.iter().map(|v| v * v).sum::<f32>().sqrt();
    if norm > 0.0 {
        vector.iter_mut().for_each(|v| *v /= norm);
    }
    norm
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 104_729 + 7) % 2003) as f32 / 1001.0 - 1.0).collect()
    }

    #[test]
    fn known_norms_are_found() {
        let found = |weight: &[f32], dims, truth: f32| {
            let norm = conv_norm(weight, dims).0;
            assert!(norm >= truth && norm <= 1.031 * truth, "{norm} for {truth}");
        };
        // a moving sum passes a constant three times as large, a difference the fastest alternation twice
        found(&[1.0, 1.0, 1.0], (3, 1, 1), 3.0);
        found(&[1.0, -1.0, 0.0], (3, 1, 1), 2.0);
        found(&[3.0, 0.0, 0.0, -5.0], (1, 2, 2), 5.0);
        assert_eq!(conv_norm(&[0.0; 12], (3, 2, 2)).0, 0.0);
    }

    #[test]
    fn nothing_is_stretched_further() {
        let dims @ (kernel, inputs, outputs) = (3, 4, 6);
        let weight = values(kernel * inputs * outputs);
        let (norm, _) = conv_norm(&weight, dims);
        // the best of many sequences, zeros around them
        let mut worst = 0.0_f32;
        for seed in 0..200 {
            let x: Vec<f32> = (0..30 * inputs).map(|i| (((i + 1) * (seed + 3)) as f32 * 0.37).sin()).collect();
            let mut square = 0.0;
            for t in 0..30 - kernel + 1 {
                for o in 0..outputs {
                    let y: f32 = (0..kernel * inputs).map(|i| weight[i * outputs + o] * x[t * inputs + i]).sum();
                    square += y * y;
                }
            }
            worst = worst.max((square / x.iter().map(|x| x * x).sum::<f32>()).sqrt());
        }
        assert!(worst <= norm && worst > 0.3 * norm, "{worst} of {norm}");
    }

    #[test]
    fn the_gradient_is_that_of_finite_differences() {
        let dims = (3, 4, 6);
        let weight = values(72);
        let (norm, gradient) = conv_norm(&weight, dims);
        // the norm is homogeneous of degree 1
        let along: f32 = weight.iter().zip(&gradient).map(|(w, g)| w * g).sum();
        assert!((along - norm).abs() < 1e-3 * norm, "{along} {norm}");
        let direction: Vec<f32> = (0..72).map(|i| (i as f32).cos()).collect();
        let at = |h: f32| {
            let moved: Vec<f32> = weight.iter().zip(&direction).map(|(w, d)| w + h * d).collect();
            f64::from(conv_norm(&moved, dims).0)
        };
        let numerical = (at(0.01) - at(-0.01)) / 0.02;
        let stated: f32 = direction.iter().zip(&gradient).map(|(d, g)| d * g).sum();
        assert!((numerical - f64::from(stated)).abs() < 0.03 * numerical.abs().max(0.3), "{numerical} {stated}");
    }
}
