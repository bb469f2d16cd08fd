//! A whole WaveNet conditioner, forward and backward, for one sequence.
//!
//! `h = start(x)`; per layer `a = tanh · σ (conv(h) + cond)`, `r = res_skip(a)`, `h += r` and, with
//! skips, `skip += r`; then `end`. Prenger et al. 2018; NVIDIA/waveglow `glow.py`, class WN.

use super::{Strides, gate, matmul_add};
use std::ops::Range;

/// Shape of a conditioner; every count in channels or steps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Input channels.
    pub inputs: usize,
    /// Residual channels.
    pub channels: usize,
    /// Output channels.
    pub outputs: usize,
    /// Width of the dilated convolutions, odd.
    pub kernel: usize,
    /// The convolutions see their past alone, instead of as much on either side.
    pub causal: bool,
    /// Dilation of each layer.
    pub dilations: Vec<usize>,
    /// Skip connections (WaveGlow), or the last residual alone.
    pub skip: bool,
    /// Steps per row of conditioning: 1, or more with linear interpolation between rows, step `t`
    /// standing at row `(t + ½) / up`.
    pub up: usize,
}

/// Where each weight lies in the flat parameters; matrices are `[in, out]`, row-major.
pub(super) struct LayerParams {
    pub conv: Range<usize>,
    pub conv_bias: Range<usize>,
    pub out: Range<usize>,
    pub out_bias: Range<usize>,
}

impl Shape {
    /// Layers.
    pub fn layers(&self) -> usize {
        self.dilations.len()
    }

    /// Columns of the residual-and-skip projection of a layer.
    pub fn out_width(&self, layer: usize) -> usize {
        if self.skip && layer + 1 < self.layers() { 2 * self.channels } else { self.channels }
    }

    /// Rows of conditioning that `steps` steps need.
    pub fn cond_rows(&self, steps: usize) -> usize {
        if self.up == 1 { steps } else { steps.div_ceil(self.up) + 1 }
    }

    /// Columns of conditioning.
    pub fn cond_width(&self) -> usize {
        2 * self.channels * self.layers()
    }

    /// Steps before a step that its output depends on.
    pub fn reach(&self) -> usize {
        self.dilations.iter().map(|&dilation| self.sides(dilation).0).sum()
    }

    /// Steps after a step that its output depends on.
    pub fn lookahead(&self) -> usize {
        self.dilations.iter().map(|&dilation| self.sides(dilation).1).sum()
    }

    /// Steps before and after a step that a convolution reads there.
    pub fn sides(&self, dilation: usize) -> (usize, usize) {
        let after = if self.causal { 0 } else { self.kernel / 2 };
        ((self.kernel - 1 - after) * dilation, after * dilation)
    }

    /// Number of flat parameters: start weight and bias, per layer convolution `[kernel, in, out]`,
    /// its bias, projection, its bias; end weight and bias.
    pub fn param_count(&self) -> usize {
        self.end().1.end
    }

    /// Multiply-adds per step, without the conditioning's own projection.
    pub fn macs_per_step(&self) -> usize {
        let c = self.channels;
        let layers: usize = (0..self.layers()).map(|l| self.kernel * c * 2 * c + c * self.out_width(l)).sum();
        self.inputs * c + layers + c * self.outputs
    }

    pub(super) fn start(&self) -> (Range<usize>, Range<usize>) {
        let weight = self.inputs * self.channels;
        (0..weight, weight..weight + self.channels)
    }

    pub(super) fn layer(&self, layer: usize) -> LayerParams {
        let c = self.channels;
        let mut at = self.start().1.end;
        let mut next = |n: usize| {
            at += n;
            at - n..at
        };
        for l in 0..layer {
            next(self.kernel * c * 2 * c + 2 * c + (c + 1) * self.out_width(l));
        }
        let width = self.out_width(layer);
        LayerParams {
            conv: next(self.kernel * c * 2 * c),
            conv_bias: next(2 * c),
            out: next(c * width),
            out_bias: next(width),
        }
    }

    pub(super) fn end(&self) -> (Range<usize>, Range<usize>) {
        let at = self.layer(self.layers() - 1).out_bias.end;
        let weight = at + self.channels * self.outputs;
        (at..weight, weight..weight + self.outputs)
    }

    /// For each tap: the range of output steps it reaches and the first input step it reads.
    fn taps(&self, dilation: usize, steps: usize) -> impl Iterator<Item = (usize, Range<usize>, usize)> {
        let (before, _) = self.sides(dilation);
        (0..self.kernel).filter_map(move |tap| {
            let (back, ahead) = (before.saturating_sub(tap * dilation), (tap * dilation).saturating_sub(before));
            let range = back.min(steps)..steps.saturating_sub(ahead).max(back.min(steps));
            (!range.is_empty()).then(|| (tap, range.clone(), range.start + ahead - back))
        })
    }
}

/// What the backward pass needs of the forward pass.
pub struct Saved {
    /// Input of each layer `[steps, channels]`, and after the last what `end` reads.
    hidden: Vec<Vec<f32>>,
    /// `[tanh | σ]` of each layer, `[steps, 2·channels]`.
    gated: Vec<Vec<f32>>,
}

fn fill_rows(out: &mut [f32], row: &[f32]) {
    out.chunks_exact_mut(row.len()).for_each(|o| o.copy_from_slice(row));
}

pub(super) fn add(out: &mut [f32], x: &[f32]) {
    out.iter_mut().zip(x).for_each(|(o, x)| *o += x);
}

fn add_column_sums(out: &mut [f32], rows: &[f32]) {
    rows.chunks_exact(out.len()).for_each(|row| add(out, row));
}

/// Runs the conditioner over one sequence.
///
/// `x`: `[steps, inputs]`; `cond`: `[cond_rows, cond_width]`; returns `[steps, outputs]` and, if
/// `save`, what [`backward`] needs.
pub fn forward(shape: &Shape, params: &[f32], x: &[f32], cond: &[f32], save: bool) -> (Vec<f32>, Option<Saved>) {
    let (c, steps) = (shape.channels, x.len() / shape.inputs);
    assert!(params.len() == shape.param_count() && cond.len() >= shape.cond_rows(steps) * shape.cond_width());
    let mut saved = Saved { hidden: Vec::new(), gated: Vec::new() };

    let (weight, bias) = shape.start();
    let mut h = vec![0.0; steps * c];
    fill_rows(&mut h, &params[bias]);
    matmul_add(
        (steps, shape.inputs, c),
        (x, Strides::rows(shape.inputs)),
        (&params[weight], Strides::rows(c)),
        (&mut h, Strides::rows(c)),
    );

    let mut skip = if shape.skip { vec![0.0; steps * c] } else { Vec::new() };
    let mut pre = vec![0.0; steps * 2 * c];
    let mut act = vec![0.0; steps * c];
    let mut out = Vec::new();
    for layer in 0..shape.layers() {
        let p = shape.layer(layer);
        conditioned_bias(shape, layer, &params[p.conv_bias], cond, &mut pre);
        let conv = &params[p.conv];
        for (tap, range, from) in shape.taps(shape.dilations[layer], steps) {
            matmul_add(
                (range.len(), c, 2 * c),
                (&h[from * c..], Strides::rows(c)),
                (&conv[tap * c * 2 * c..], Strides::rows(2 * c)),
                (&mut pre[range.start * 2 * c..], Strides::rows(2 * c)),
            );
        }
        gate::forward(&mut pre, &mut act, c);
        let width = shape.out_width(layer);
        out.resize(steps * width, 0.0);
        fill_rows(&mut out, &params[p.out_bias]);
        matmul_add(
            (steps, c, width),
            (&act, Strides::rows(c)),
            (&params[p.out], Strides::rows(width)),
            (&mut out, Strides::rows(width)),
        );
        if save {
            saved.hidden.push(h.clone());
            saved.gated.push(pre.clone());
        }
        if !shape.skip {
            add(&mut h, &out);
        } else if width == c {
            add(&mut skip, &out);
        } else {
            for ((out, h), skip) in out.chunks_exact(2 * c).zip(h.chunks_exact_mut(c)).zip(skip.chunks_exact_mut(c)) {
                add(h, &out[..c]);
                add(skip, &out[c..]);
            }
        }
    }
    let last = if shape.skip { skip } else { h };
    let (weight, bias) = shape.end();
    let mut y = vec![0.0; steps * shape.outputs];
    fill_rows(&mut y, &params[bias]);
    matmul_add(
        (steps, c, shape.outputs),
        (&last, Strides::rows(c)),
        (&params[weight], Strides::rows(shape.outputs)),
        (&mut y, Strides::rows(shape.outputs)),
    );
    saved.hidden.push(last);
    (y, save.then_some(saved))
}

/// Fills `pre` `[steps, 2·channels]` with bias plus this layer's conditioning.
fn conditioned_bias(shape: &Shape, layer: usize, bias: &[f32], cond: &[f32], pre: &mut [f32]) {
    let w = bias.len();
    if shape.up == 1 {
        let rows = cond.chunks_exact(shape.cond_width());
        for (pre, row) in pre.chunks_exact_mut(w).zip(rows) {
            pre.iter_mut().zip(&row[layer * w..]).zip(bias).for_each(|((p, c), b)| *p = c + b);
        }
    } else {
        interpolated_bias(shape, layer, bias, (cond, 0), 0, pre);
    }
}

/// Fills `pre` `[steps, 2·channels]`, from step `first` on, with bias plus this layer's conditioning
/// between rows; `cond` begins with row `cond.1`.
pub(super) fn interpolated_bias(
    shape: &Shape,
    layer: usize,
    bias: &[f32],
    cond: (&[f32], usize),
    first: usize,
    pre: &mut [f32],
) {
    let (w, width) = (bias.len(), shape.cond_width());
    let row = |r: usize| &cond.0[(r - cond.1) * width + layer * w..][..w];
    for (i, pre) in pre.chunks_exact_mut(w).enumerate() {
        let (r, frac) = interpolation(first + i, shape.up);
        let (now, next) = (row(r), row(r + 1));
        for i in 0..w {
            pre[i] = bias[i] + now[i] + frac * (next[i] - now[i]);
        }
    }
}

/// The row before step `t` and how far the step stands towards the next row.
pub fn interpolation(t: usize, up: usize) -> (usize, f32) {
    (t / up, ((t % up) as f32 + 0.5) / up as f32)
}

/// Gradients of one sequence: adds to `d_params`, and returns those of `x` and of `cond`.
pub fn backward(
    shape: &Shape,
    params: &[f32],
    x: &[f32],
    cond_len: usize,
    saved: &Saved,
    dy: &[f32],
    d_params: &mut [f32],
) -> (Vec<f32>, Vec<f32>) {
    let (c, steps, outputs) = (shape.channels, x.len() / shape.inputs, shape.outputs);
    let mut d_cond = vec![0.0; cond_len];

    let (weight, bias) = shape.end();
    let mut d_last = vec![0.0; steps * c];
    matmul_add(
        (steps, outputs, c),
        (dy, Strides::rows(outputs)),
        (&params[weight.clone()], Strides::rows(outputs).t()),
        (&mut d_last, Strides::rows(c)),
    );
    matmul_add(
        (c, steps, outputs),
        (&saved.hidden[shape.layers()], Strides::rows(c).t()),
        (dy, Strides::rows(outputs)),
        (&mut d_params[weight], Strides::rows(outputs)),
    );
    add_column_sums(&mut d_params[bias], dy);

    // with skips every layer's skip half gets d_last, and the last residual has no reader
    let (mut dh, d_skip) = if shape.skip { (vec![0.0; steps * c], d_last) } else { (d_last, Vec::new()) };
    let mut d_out = Vec::new();
    let (mut act, mut d_act) = (vec![0.0; steps * c], vec![0.0; steps * c]);
    let mut d_pre = vec![0.0; steps * 2 * c];
    for layer in (0..shape.layers()).rev() {
        let p = shape.layer(layer);
        let width = shape.out_width(layer);
        let d_out: &[f32] = if !shape.skip {
            &dh
        } else if width == c {
            &d_skip
        } else {
            d_out.resize(steps * 2 * c, 0.0);
            for ((d, h), s) in d_out.chunks_exact_mut(2 * c).zip(dh.chunks_exact(c)).zip(d_skip.chunks_exact(c)) {
                d[..c].copy_from_slice(h);
                d[c..].copy_from_slice(s);
            }
            &d_out
        };
        let gated = &saved.gated[layer];
        for (act, g) in act.chunks_exact_mut(c).zip(gated.chunks_exact(2 * c)) {
            for i in 0..c {
                act[i] = g[i] * g[c + i];
            }
        }
        matmul_add(
            (c, steps, width),
            (&act, Strides::rows(c).t()),
            (d_out, Strides::rows(width)),
            (&mut d_params[p.out.clone()], Strides::rows(width)),
        );
        add_column_sums(&mut d_params[p.out_bias], d_out);
        d_act.fill(0.0);
        matmul_add(
            (steps, width, c),
            (d_out, Strides::rows(width)),
            (&params[p.out], Strides::rows(width).t()),
            (&mut d_act, Strides::rows(c)),
        );
        gate::backward(gated, &d_act, &mut d_pre, c);
        add_column_sums(&mut d_params[p.conv_bias], &d_pre);
        conditioning_gradient(shape, layer, &d_pre, &mut d_cond);
        let (h, conv) = (&saved.hidden[layer], &params[p.conv.clone()]);
        let d_conv = &mut d_params[p.conv];
        for (tap, range, from) in shape.taps(shape.dilations[layer], steps) {
            let (n, at) = (range.len(), tap * c * 2 * c);
            let d_rows = (&d_pre[range.start * 2 * c..], Strides::rows(2 * c));
            matmul_add(
                (c, n, 2 * c),
                (&h[from * c..], Strides::rows(c).t()),
                d_rows,
                (&mut d_conv[at..], Strides::rows(2 * c)),
            );
            matmul_add(
                (n, 2 * c, c),
                d_rows,
                (&conv[at..], Strides::rows(2 * c).t()),
                (&mut dh[from * c..], Strides::rows(c)),
            );
        }
    }
    let (weight, bias) = shape.start();
    let mut dx = vec![0.0; x.len()];
    matmul_add(
        (steps, c, shape.inputs),
        (&dh, Strides::rows(c)),
        (&params[weight.clone()], Strides::rows(c).t()),
        (&mut dx, Strides::rows(shape.inputs)),
    );
    matmul_add(
        (shape.inputs, steps, c),
        (x, Strides::rows(shape.inputs).t()),
        (&dh, Strides::rows(c)),
        (&mut d_params[weight], Strides::rows(c)),
    );
    add_column_sums(&mut d_params[bias], &dh);
    (dx, d_cond)
}

fn conditioning_gradient(shape: &Shape, layer: usize, d_pre: &[f32], d_cond: &mut [f32]) {
    let (w, width) = (2 * shape.channels, shape.cond_width());
    for (t, d) in d_pre.chunks_exact(w).enumerate() {
        if shape.up == 1 {
            add(&mut d_cond[t * width + layer * w..][..w], d);
        } else {
            let (r, frac) = interpolation(t, shape.up);
            let (now, next) = d_cond[r * width..].split_at_mut(width);
            let (now, next) = (&mut now[layer * w..][..w], &mut next[layer * w..][..w]);
            for i in 0..w {
                now[i] += (1.0 - frac) * d[i];
                next[i] += frac * d[i];
            }
        }
    }
}
