//! A WaveNet in fewer multiplications.
//!
//! Its first and last layers are matrices next to matrices, so they are multiplied into them:
//!
//! ```text
//!   [x 1] ──┬─▶ conv₀ · start ─▶ gate ─┬─▶ residual₀, start ─▶ h₁ ──┬─▶ conv₁ ─▶ gate ─▶ …
//!           │                          │                           │
//!           └──────────────────────────┴─▶ answer₀                 └─▶ answer₁ ─▶ …  sum: the output
//! ```
//!
//! `answer` is a layer's share of the output: its skip, or without skips its residual, times `end`.
//! The channel of ones carries `start`'s bias, so that the zeros beyond the ends stay zeros.

use super::wavenet::Shape;
use std::borrow::Cow;

/// A layer's matrices, `[in, out]`, row-major. The first layer reads `[x 1]`, the others `channels` values.
pub(super) struct Layer<'a> {
    /// All taps of the convolution, `[kernel · in, 2 · channels]`.
    pub conv: Cow<'a, [f32]>,
    /// Its bias, with that of the conditioning.
    pub conv_bias: &'a [f32],
    /// From the gates to the next layer's input, in the first layer also from its own input.
    pub residual: Option<Vec<f32>>,
    /// The residual's bias.
    pub residual_bias: &'a [f32],
    /// From the gates to the output, in the first layer without skips also from its own input.
    pub answer: Vec<f32>,
    /// The output's bias in the first layer, zeros in the others.
    pub answer_bias: Vec<f32>,
}

/// The layers of a net with flat parameters in the order of [`Shape::param_count`].
pub(super) fn layers<'a>(shape: &Shape, params: &'a [f32]) -> Vec<Layer<'a>> {
    let (c, outputs) = (shape.channels, shape.outputs);
    let (end, end_bias) = (&params[shape.end().0], &params[shape.end().1]);
    // weight and bias lie one after the other: the bias is the row of the ones
    let start = &params[shape.start().0.start..shape.start().1.end];
    let mut bias: Vec<f64> = end_bias.iter().map(|&b| f64::from(b)).collect();
    let layer = |l| {
        let p = shape.layer(l);
        let (conv, out, out_bias) = (&params[p.conv], &params[p.out], &params[p.out_bias]);
        let (first, last, width) = (l == 0, l + 1 == shape.layers(), shape.out_width(l));
        let conv = if first {
            conv.chunks_exact(c * 2 * c).flat_map(|tap| chained(start, c, c, tap, 2 * c)).collect()
        } else {
            Cow::Borrowed(conv)
        };
        let residual = (!last).then(|| {
            let mut residual: Vec<f32> = out.chunks_exact(width).flat_map(|row| &row[..c]).copied().collect();
            residual.extend_from_slice(if first { start } else { &[] });
            residual
        });
        // without skips, the last residual is the sum of the input and all layers' residuals
        let mut answer = chained(&out[width - c..], width, c, end, outputs);
        answer.extend(if first && !shape.skip { chained(start, c, c, end, outputs) } else { Vec::new() });
        let share = chained(&out_bias[width - c..], c, c, end, outputs);
        bias.iter_mut().zip(share).for_each(|(sum, b)| *sum += f64::from(b));
        Layer {
            conv,
            conv_bias: &params[p.conv_bias],
            residual,
            residual_bias: &out_bias[..c],
            answer,
            answer_bias: vec![0.0; outputs],
        }
    };
    let mut layers: Vec<Layer> = (0..shape.layers()).map(layer).collect();
    layers[0].answer_bias = bias.into_iter().map(|b| b as f32).collect();
    layers
}

/// `a · b`, `a` with rows of `inner` values `stride` apart, in f64 and rounded once.
pub(super) fn chained(a: &[f32], stride: usize, inner: usize, b: &[f32], columns: usize) -> Vec<f32> {
    let mut product = Vec::with_capacity(a.len().div_ceil(stride) * columns);
    let mut sums = vec![0.0_f64; columns];
    for row in a.chunks(stride) {
        sums.fill(0.0);
        for (a, b) in row[..inner].iter().zip(b.chunks_exact(columns)) {
            sums.iter_mut().zip(b).for_each(|(sum, b)| *sum += f64::from(*a) * f64::from(*b));
        }
        product.extend(sums.iter().map(|&sum| sum as f32));
    }
    product
}
