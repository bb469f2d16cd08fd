//! Causal nets a row at a time: what an autoregressive inverse asks again and again.
//!
//! A matrix times one row is what the time goes into. One body compiled twice (baseline and AVX2)
//! without fused multiply-adds, so that both give the same bits.

use super::add;
use super::gate;
use super::wavenet::{Shape, interpolated_bias};
use multiversion::multiversion;

/// A causal net that takes a sequence row by row and remembers what it needs.
pub trait Recall {
    /// Takes the next row and writes the outputs that belong to it.
    fn push(&mut self, x: &[f32], out: &mut [f32]);
}

/// Outputs whose sums stay in registers together.
const TILE: usize = 32;

#[inline(always)]
fn matvec_body(x: &[f32], weight: &[f32], out: &mut [f32]) {
    let n = out.len();
    let (tiles, rest) = out.split_at_mut(n / TILE * TILE);
    for (i, tile) in tiles.chunks_exact_mut(TILE).enumerate() {
        let mut sums = [0.0; TILE];
        sums.copy_from_slice(tile);
        for (x, row) in x.iter().zip(weight.chunks_exact(n)) {
            let row = &row[i * TILE..][..TILE];
            for j in 0..TILE {
                sums[j] += x * row[j];
            }
        }
        tile.copy_from_slice(&sums);
    }
    if rest.is_empty() {
        return;
    }
    let from = n - rest.len();
    for (x, row) in x.iter().zip(weight.chunks_exact(n)) {
        rest.iter_mut().zip(&row[from..]).for_each(|(out, w)| *out += x * w);
    }
}

/// `out[n] += x[k] · weight[k, n]`, weight row-major.
#[multiversion(targets("x86_64+avx2"))]
pub fn matvec_add(x: &[f32], weight: &[f32], out: &mut [f32]) {
    debug_assert_eq!(weight.len(), x.len() * out.len());
    matvec_body(x, weight, out);
}

/// A causal WaveNet, row by row.
pub struct WaveNetRecall {
    shape: Shape,
    /// Flat, in the order of [`Shape::param_count`].
    params: Vec<f32>,
    /// Projected conditioning, `[rows, cond_width]`.
    cond: Vec<f32>,
    /// The last inputs of each layer, a ring of `(kernel − 1) · dilation + 1` rows.
    rings: Vec<Vec<f32>>,
    /// Rows taken so far.
    done: usize,
    hidden: Vec<f32>,
    pre: Vec<f32>,
    act: Vec<f32>,
    skip: Vec<f32>,
    out: Vec<f32>,
}

impl WaveNetRecall {
    /// Before the first row. `cond` must hold the rows of every step that will come.
    ///
    /// # Panics
    /// If the net isn't causal or the parameters don't fit its shape.
    pub fn new(shape: Shape, params: Vec<f32>, cond: Vec<f32>) -> Self {
        assert!(shape.causal && params.len() == shape.param_count());
        let c = shape.channels;
        let rings = shape.dilations.iter().map(|d| vec![0.0; ((shape.kernel - 1) * d + 1) * c]).collect();
        let row = || vec![0.0; c];
        let (hidden, act, skip) = (row(), row(), row());
        Self { params, cond, rings, done: 0, hidden, pre: vec![0.0; 2 * c], act, skip, out: Vec::new(), shape }
    }
}

impl Recall for WaveNetRecall {
    fn push(&mut self, x: &[f32], out: &mut [f32]) {
        let (shape, params, t) = (&self.shape, &self.params, self.done);
        let c = shape.channels;
        let (weight, bias) = shape.start();
        self.hidden.copy_from_slice(&params[bias]);
        matvec_add(x, &params[weight], &mut self.hidden);
        self.skip.fill(0.0);
        for (layer, ring) in self.rings.iter_mut().enumerate() {
            let p = shape.layer(layer);
            let bias = &params[p.conv_bias];
            if shape.up == 1 {
                let cond = &self.cond[t * shape.cond_width() + layer * 2 * c..];
                self.pre.copy_from_slice(bias);
                add(&mut self.pre, &cond[..2 * c]);
            } else {
                let rows = (&self.cond[layer * 2 * c..], shape.cond_width(), 0);
                interpolated_bias(shape.up, bias, rows, t, &mut self.pre);
            }
            let (rows, dilation) = (ring.len() / c, shape.dilations[layer]);
            ring[t % rows * c..][..c].copy_from_slice(&self.hidden);
            for (tap, weight) in params[p.conv].chunks_exact(2 * c * c).enumerate() {
                let back = (shape.kernel - 1 - tap) * dilation;
                // rows before the first are zeros
                if back <= t {
                    matvec_add(&ring[(t - back) % rows * c..][..c], weight, &mut self.pre);
                }
            }
            gate::forward(&mut self.pre, &mut self.act, c);
            self.out.clear();
            self.out.extend_from_slice(&params[p.out_bias]);
            matvec_add(&self.act, &params[p.out], &mut self.out);
            let width = self.out.len();
            if !shape.skip || width == 2 * c {
                add(&mut self.hidden, &self.out[..c]);
            }
            if shape.skip {
                add(&mut self.skip, &self.out[width - c..]);
            }
        }
        let (weight, bias) = shape.end();
        out.copy_from_slice(&params[bias]);
        matvec_add(if shape.skip { &self.skip } else { &self.hidden }, &params[weight], out);
        self.done += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::super::merged::chained;
    use super::super::testing::values;
    use super::super::wavenet::reference;
    use super::*;

    #[test]
    fn simd_equals_baseline_and_the_sum() {
        for (k, n) in [(1, 1), (5, 31), (7, 32), (32, 64), (3, 77)] {
            let (x, w, start) = (values(k, 1), values(k * n, 2), values(n, 3));
            let (mut a, mut b) = (start.clone(), start.clone());
            matvec_add(&x, &w, &mut a);
            matvec_body(&x, &w, &mut b);
            assert_eq!(a, b);
            for j in 0..n {
                let sum = (0..k).map(|i| f64::from(x[i]) * f64::from(w[i * n + j])).sum::<f64>();
                assert!((f64::from(a[j]) - f64::from(start[j]) - sum).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn row_by_row_is_the_whole_at_once() {
        for (skip, up) in [(false, 4), (true, 4), (false, 1), (true, 1)] {
            let shape =
                Shape { inputs: 2, channels: 5, outputs: 3, kernel: 3, causal: true, dilations: vec![1, 3], skip, up };
            let some = |n: usize| (0..n).map(|i| ((i * 7919) % 1000) as f32 / 900.0 - 0.5).collect::<Vec<_>>();
            let (x, params) = (some(2 * 19), some(shape.param_count()));
            let (rows, width) = (shape.cond_rows(19), shape.cond_width());
            let (features, weights) = (some(rows * 3), some(3 * width));
            let cond = chained(&features, 3, 3, &weights, width);
            let whole = reference(&shape, &params, &x, &features, &weights);
            let mut net = WaveNetRecall::new(shape, params, cond);
            let mut rows = vec![0.0; whole.len()];
            x.chunks_exact(2).zip(rows.chunks_exact_mut(3)).for_each(|(x, out)| net.push(x, out));
            assert!(rows.iter().zip(&whole).all(|(a, b)| (a - b).abs() < 1e-5), "skip {skip}, up {up}");
        }
    }
}
