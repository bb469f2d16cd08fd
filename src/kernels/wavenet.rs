//! A whole WaveNet conditioner, forward and backward, for one sequence.
//!
//! `h = start(x)`; per layer `a = tanh · σ (conv(h) + cond)`, `r = res_skip(a)`, `h += r` and, with
//! skips, `skip += r`; then `end`. Conditioning for every step is projected layer by layer, so that no pass holds the
//! whole of it. Prenger et al. 2018; NVIDIA/waveglow `glow.py`, class WN.

use super::multiply::Products;
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

/// What a sequence is conditioned on.
#[derive(Clone, Copy)]
pub enum Conditioning<'a> {
    /// For nets with a row for every step: features, `[steps, width]`, and the matrix that projects them for every
    /// layer, `[width, cond_width]`.
    Features(&'a [f32], &'a [f32]),
    /// For nets whose steps lie between rows: those projected already, `[cond_rows, cond_width]`, as they are few, and
    /// quicker to project for many sequences at once.
    Projected(&'a [f32]),
}

impl<'a> Conditioning<'a> {
    /// What a net of this shape takes of features and weights, or of rows projected already (weights unused).
    pub fn of(shape: &Shape, rows: &'a [f32], weights: &'a [f32]) -> Self {
        if shape.up == 1 { Self::Features(rows, weights) } else { Self::Projected(rows) }
    }
}

/// A conditioner at work on one sequence.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    /// Its shape.
    pub shape: &'a Shape,
    /// Flat, in the order of [`Shape::param_count`].
    pub params: &'a [f32],
    /// The sequence, `[steps, inputs]`.
    pub x: &'a [f32],
    /// What it is conditioned on.
    pub cond: Conditioning<'a>,
    /// How the layers' products are done; the first and the last matrix of the net are always met in f32.
    pub products: Products,
}

/// What a forward pass keeps for the backward pass, which computes the rest again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nothing: the backward pass begins with another forward pass.
    Nothing,
    /// What the gates have made. The layers' inputs come from that without a convolution.
    Gates,
    /// The layers' inputs too.
    Everything,
}

/// What a forward pass has kept.
pub struct Saved {
    /// `[tanh | σ]` of each layer, `[steps, 2·channels]`.
    gated: Vec<Vec<f32>>,
    /// Input of each layer, `[steps, channels]`, or none of them.
    hidden: Vec<Vec<f32>>,
    /// What `end` reads, `[steps, channels]`.
    last: Vec<f32>,
}

/// Gradients of one sequence.
pub struct Gradients {
    /// Of the input, `[steps, inputs]`.
    pub x: Vec<f32>,
    /// Of the mel's features, or of their projection.
    pub rows: Vec<f32>,
    /// Of the flat parameters.
    pub params: Vec<f32>,
    /// Of the projection's weights, if it was done here.
    pub weights: Vec<f32>,
}

fn fill_rows(out: &mut [f32], row: &[f32]) {
    out.chunks_exact_mut(row.len()).for_each(|o| o.copy_from_slice(row));
}

pub(crate) fn add(out: &mut [f32], x: &[f32]) {
    out.iter_mut().zip(x).for_each(|(o, x)| *o += x);
}

fn add_column_sums(out: &mut [f32], rows: &[f32]) {
    rows.chunks_exact(out.len()).for_each(|row| add(out, row));
}

impl Pass<'_> {
    fn steps(&self) -> usize {
        self.x.len() / self.shape.inputs
    }

    /// Runs the conditioner: `[steps, outputs]` and, if asked to keep it, what [`Pass::backward`] needs.
    ///
    /// # Panics
    /// If parameters or features don't fit the shape and the steps.
    pub fn forward(&self, keep: Keep) -> (Vec<f32>, Option<Saved>) {
        let Self { shape, params, cond, .. } = *self;
        let (c, steps) = (shape.channels, self.steps());
        assert!(params.len() == shape.param_count());
        let width = shape.cond_width();
        assert!(match cond {
            Conditioning::Features(features, weights) => {
                shape.up == 1 && features.len() * width >= steps * weights.len() && weights.len().is_multiple_of(width)
            }
            Conditioning::Projected(rows) => shape.up > 1 && rows.len() >= shape.cond_rows(steps) * width,
        });
        let (mut gated, mut hidden) = (Vec::new(), Vec::new());
        let mut h = self.first_hidden();
        let mut skip = if shape.skip { vec![0.0; steps * c] } else { Vec::new() };
        let mut pre = vec![0.0; steps * 2 * c];
        let mut act = vec![0.0; steps * c];
        let mut out = Vec::new();
        for layer in 0..shape.layers() {
            self.before_gate(layer, &h, &mut pre);
            gate::forward(&mut pre, &mut act, c);
            self.residual(layer, &act, &mut out);
            if keep == Keep::Everything {
                hidden.push(h.clone());
            }
            if keep != Keep::Nothing {
                gated.push(pre.clone());
            }
            add_residual(shape, layer, &out, &mut h);
            if shape.skip {
                let width = shape.out_width(layer);
                out.chunks_exact(width).zip(skip.chunks_exact_mut(c)).for_each(|(o, s)| add(s, &o[width - c..]));
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
        (y, (keep != Keep::Nothing).then_some(Saved { gated, hidden, last }))
    }

    /// The input of the first layer.
    fn first_hidden(&self) -> Vec<f32> {
        let (c, steps, inputs) = (self.shape.channels, self.steps(), self.shape.inputs);
        let (weight, bias) = self.shape.start();
        let mut h = vec![0.0; steps * c];
        fill_rows(&mut h, &self.params[bias]);
        matmul_add(
            (steps, inputs, c),
            (self.x, Strides::rows(inputs)),
            (&self.params[weight], Strides::rows(c)),
            (&mut h, Strides::rows(c)),
        );
        h
    }

    /// Fills `pre` `[steps, 2·channels]` with what goes into a layer's gate.
    fn before_gate(&self, layer: usize, h: &[f32], pre: &mut [f32]) {
        let (shape, p, steps) = (self.shape, self.shape.layer(layer), self.steps());
        let (c, width, bias) = (shape.channels, shape.cond_width(), &self.params[p.conv_bias]);
        match self.cond {
            Conditioning::Features(features, weights) => {
                fill_rows(pre, bias);
                let features_width = weights.len() / width;
                self.products.add(
                    (steps, features_width, 2 * c),
                    (features, Strides::rows(features_width)),
                    (&weights[layer * 2 * c..], Strides::rows(width)),
                    (pre, Strides::rows(2 * c)),
                );
            }
            Conditioning::Projected(rows) => {
                interpolated_bias(shape.up, bias, (&rows[layer * 2 * c..], width, 0), 0, pre);
            }
        }
        let conv = &self.params[p.conv];
        for (tap, range, from) in shape.taps(shape.dilations[layer], steps) {
            self.products.add(
                (range.len(), c, 2 * c),
                (&h[from * c..], Strides::rows(c)),
                (&conv[tap * c * 2 * c..], Strides::rows(2 * c)),
                (&mut pre[range.start * 2 * c..], Strides::rows(2 * c)),
            );
        }
    }

    /// What a layer adds to the residual and the skip sum, `[steps, out_width]`, from its gates' product.
    fn residual(&self, layer: usize, act: &[f32], out: &mut Vec<f32>) {
        let (c, steps) = (self.shape.channels, self.steps());
        let (p, width) = (self.shape.layer(layer), self.shape.out_width(layer));
        out.resize(steps * width, 0.0);
        fill_rows(out, &self.params[p.out_bias]);
        self.products.add(
            (steps, c, width),
            (act, Strides::rows(c)),
            (&self.params[p.out], Strides::rows(width)),
            (out, Strides::rows(width)),
        );
    }

    /// The layers' inputs, from what their gates have made: bit for bit those of the forward pass.
    fn hidden_again(&self, gated: &[Vec<f32>]) -> Vec<Vec<f32>> {
        let mut hidden = vec![self.first_hidden()];
        let (mut act, mut out) = (vec![0.0; hidden[0].len()], Vec::new());
        for (layer, gated) in gated.iter().enumerate().take(self.shape.layers() - 1) {
            product_of_halves(gated, &mut act, self.shape.channels);
            self.residual(layer, &act, &mut out);
            let mut h = hidden[layer].clone();
            add_residual(self.shape, layer, &out, &mut h);
            hidden.push(h);
        }
        hidden
    }

    /// Gradients of one sequence, from those of its output and what [`Pass::forward`] has kept, if anything.
    pub fn backward(&self, saved: Option<&Saved>, dy: &[f32]) -> Gradients {
        let Self { shape, params, x, cond, products } = *self;
        let (c, steps, outputs) = (shape.channels, self.steps(), shape.outputs);
        let again;
        let saved = match saved {
            Some(saved) => saved,
            None => {
                again = self.forward(Keep::Everything).1;
                again.as_ref().expect("asked to keep it")
            }
        };
        let hidden_again = saved.hidden.is_empty().then(|| self.hidden_again(&saved.gated));
        let hidden = hidden_again.as_ref().unwrap_or(&saved.hidden);
        let mut d_params = vec![0.0; params.len()];
        let (rows, weights): (&[f32], &[f32]) = match cond {
            Conditioning::Features(features, weights) => (features, weights),
            Conditioning::Projected(rows) => (rows, &[]),
        };
        let (mut d_rows, mut d_weights) = (vec![0.0; rows.len()], vec![0.0; weights.len()]);

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
            (&saved.last, Strides::rows(c).t()),
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
            product_of_halves(gated, &mut act, c);
            products.add(
                (c, steps, width),
                (&act, Strides::rows(c).t()),
                (d_out, Strides::rows(width)),
                (&mut d_params[p.out.clone()], Strides::rows(width)),
            );
            add_column_sums(&mut d_params[p.out_bias], d_out);
            d_act.fill(0.0);
            products.add(
                (steps, width, c),
                (d_out, Strides::rows(width)),
                (&params[p.out], Strides::rows(width).t()),
                (&mut d_act, Strides::rows(c)),
            );
            gate::backward(gated, &d_act, &mut d_pre, c);
            add_column_sums(&mut d_params[p.conv_bias], &d_pre);
            match cond {
                Conditioning::Features(..) => self.features_gradient(layer, &d_pre, (&mut d_rows, &mut d_weights)),
                Conditioning::Projected(_) => gather(shape, &d_pre, layer, &mut d_rows),
            }
            let (h, conv) = (&hidden[layer], &params[p.conv.clone()]);
            let d_conv = &mut d_params[p.conv];
            for (tap, range, from) in shape.taps(shape.dilations[layer], steps) {
                let (n, at) = (range.len(), tap * c * 2 * c);
                let d_rows = (&d_pre[range.start * 2 * c..], Strides::rows(2 * c));
                products.add(
                    (c, n, 2 * c),
                    (&h[from * c..], Strides::rows(c).t()),
                    d_rows,
                    (&mut d_conv[at..], Strides::rows(2 * c)),
                );
                products.add(
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
        Gradients { x: dx, rows: d_rows, params: d_params, weights: d_weights }
    }

    /// Adds the gradients of features and of the projection's weights, from those before a layer's gate.
    fn features_gradient(&self, layer: usize, d_pre: &[f32], (d_features, d_weights): (&mut [f32], &mut [f32])) {
        let Conditioning::Features(features, weights) = self.cond else { return };
        let (steps, w, width) = (self.steps(), 2 * self.shape.channels, self.shape.cond_width());
        let features_width = weights.len() / width;
        self.products.add(
            (features_width, steps, w),
            (features, Strides::rows(features_width).t()),
            (d_pre, Strides::rows(w)),
            (&mut d_weights[layer * w..], Strides::rows(width)),
        );
        self.products.add(
            (steps, w, features_width),
            (d_pre, Strides::rows(w)),
            (&weights[layer * w..], Strides::rows(width).t()),
            (d_features, Strides::rows(features_width)),
        );
    }
}

/// Adds a layer's `out` `[steps, out_width]` to the next one's input, if there is one.
fn add_residual(shape: &Shape, layer: usize, out: &[f32], h: &mut [f32]) {
    let c = shape.channels;
    match shape.out_width(layer) {
        width if width == 2 * c => {
            out.chunks_exact(width).zip(h.chunks_exact_mut(c)).for_each(|(o, h)| add(h, &o[..c]))
        }
        _ if shape.skip => {}
        _ => add(h, out),
    }
}

/// `tanh · σ` of `[tanh | σ]`.
fn product_of_halves(gated: &[f32], act: &mut [f32], channels: usize) {
    for (act, gated) in act.chunks_exact_mut(channels).zip(gated.chunks_exact(2 * channels)) {
        let (tanh, sigma) = gated.split_at(channels);
        act.iter_mut().zip(tanh).zip(sigma).for_each(|((act, tanh), sigma)| *act = tanh * sigma);
    }
}

/// Fills `pre` `[steps, 2·channels]`, from step `first` on, with bias plus this layer's conditioning
/// between rows of `rows.0`, `rows.1` apart, which begin with row `rows.2`.
pub(super) fn interpolated_bias(up: usize, bias: &[f32], rows: (&[f32], usize, usize), first: usize, pre: &mut [f32]) {
    let w = bias.len();
    let row = |r: usize| &rows.0[(r - rows.2) * rows.1..][..w];
    for (i, pre) in pre.chunks_exact_mut(w).enumerate() {
        let (r, frac) = interpolation(first + i, up);
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

/// Adds to a layer's columns of projected rows, between which steps were interpolated, what the gradient before its
/// gate makes of theirs.
fn gather(shape: &Shape, d_pre: &[f32], layer: usize, d_rows: &mut [f32]) {
    let (w, width) = (2 * shape.channels, shape.cond_width());
    for (t, d) in d_pre.chunks_exact(w).enumerate() {
        let (r, frac) = interpolation(t, shape.up);
        let (now, next) = d_rows[r * width..].split_at_mut(width);
        let (now, next) = (&mut now[layer * w..][..w], &mut next[layer * w..][..w]);
        for i in 0..w {
            now[i] += (1.0 - frac) * d[i];
            next[i] += frac * d[i];
        }
    }
}

/// What the packed nets of tests are held to: the conditioner in f32 for features of three values a row.
#[cfg(test)]
pub(super) fn reference(shape: &Shape, params: &[f32], x: &[f32], features: &[f32], weights: &[f32]) -> Vec<f32> {
    let projected = super::merged::chained(features, 3, 3, weights, shape.cond_width());
    let cond = Conditioning::of(shape, if shape.up == 1 { features } else { &projected }, weights);
    Pass { shape, params, x, cond, products: Products::Floats }.forward(Keep::Nothing).0
}

#[cfg(test)]
mod tests {
    use super::super::choice::Kernel;
    use super::*;

    #[test]
    fn what_is_computed_again_is_what_was_kept() {
        let some = |n: usize, seed: usize| -> Vec<f32> {
            (0..n).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0).collect()
        };
        for (skip, up, dilations) in
            [(true, 1, vec![1, 4, 2]), (false, 1, vec![2]), (true, 8, vec![1]), (false, 8, vec![1, 3])]
        {
            let shape = Shape { inputs: 3, channels: 7, outputs: 4, kernel: 3, causal: !skip, dilations, skip, up };
            let steps = 29;
            let (x, params) = (some(steps * 3, 1), some(shape.param_count(), 2));
            let (rows, width) = (shape.cond_rows(steps), shape.cond_width());
            let (features, weights, projected) = (some(rows * 5, 3), some(5 * width, 4), some(rows * width, 3));
            let cond = Conditioning::of(&shape, if up == 1 { &features } else { &projected }, &weights);
            let dy = some(steps * 4, 5);
            let all = [Products::Floats, Products::Bfloats(Kernel::Scalar)].map(|products| {
                let pass = Pass { shape: &shape, params: &params, x: &x, cond, products };
                let [nothing, gates, everything] = [Keep::Nothing, Keep::Gates, Keep::Everything].map(|keep| {
                    let (y, saved) = pass.forward(keep);
                    let d = pass.backward(saved.as_ref(), &dy);
                    [y, d.x, d.rows, d.params, d.weights]
                });
                assert!(nothing == gates && gates == everything, "{shape:?}");
                everything
            });
            for (floats, bfloats) in all[0].iter().zip(&all[1]).filter(|(floats, _)| !floats.is_empty()) {
                let power = |v: &mut dyn Iterator<Item = f32>| v.map(|v| f64::from(v).powi(2)).sum::<f64>();
                let noise = power(&mut floats.iter().zip(bfloats).map(|(a, b)| a - b));
                let ratio = noise / power(&mut floats.iter().copied());
                // eight bits: not the same, and near it
                assert!((1e-9..2e-4).contains(&ratio), "{shape:?}: {ratio}");
            }
        }
    }
}
