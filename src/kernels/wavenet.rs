//! A whole WaveNet conditioner, forward and backward, for one sequence.
//!
//! `h = start(x)`; per layer `a = tanh · σ (conv(h) + cond)`, `r = res_skip(a)`, `h += r` and, with
//! skips, `skip += r`; then `end`. Conditioning for every step is projected layer by layer, so that no forward pass
//! holds the whole of it; its gradient is gathered from all layers and meets their matrices at once. Prenger et al. 2018; NVIDIA/waveglow `glow.py`, class WN.

use super::multiply::{Products, Rows, Term};
use super::{Strides, View, add, fill_rows, gate, matmul_add};
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

    /// Rows of zeros that stand before and after every layer's input: as many as the widest convolution reads.
    fn padding(&self) -> (usize, usize) {
        let widest = self.dilations.iter().copied().max().unwrap_or(0);
        self.sides(widest)
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

/// [`Conditioning`], features as products want them.
enum Conditioned<'a> {
    Features(Rows<'a>, &'a [f32]),
    Projected(&'a [f32]),
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
    /// Input of each layer, `[steps, channels]` and the padding, or none of them.
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
        let own = self.own(&h);
        let mut skip = if shape.skip { vec![0.0; steps * c] } else { Vec::new() };
        let mut pre = vec![0.0; steps * 2 * c];
        let mut act = vec![0.0; steps * c];
        let mut out = Vec::new();
        let cond = self.conditioned();
        for layer in 0..shape.layers() {
            self.before_gate(layer, &cond, &h, &mut pre);
            gate::forward(&mut pre, &mut act, c);
            self.residual(layer, &act, &mut out);
            if keep == Keep::Everything {
                hidden.push(h.clone());
            }
            if keep != Keep::Nothing {
                gated.push(pre.clone());
            }
            add_residual(shape, layer, &out, &mut h[own.clone()]);
            if shape.skip {
                let width = shape.out_width(layer);
                out.chunks_exact(width).zip(skip.chunks_exact_mut(c)).for_each(|(o, s)| add(s, &o[width - c..]));
            }
        }
        let last = if shape.skip { skip } else { h[own].to_vec() };
        let (weight, bias) = shape.end();
        let mut y = vec![0.0; steps * shape.outputs];
        fill_rows(&mut y, shape.outputs, &params[bias]);
        matmul_add(
            (steps, c, shape.outputs),
            (&last, Strides::rows(c)),
            (&params[weight], Strides::rows(shape.outputs)),
            (&mut y, Strides::rows(shape.outputs)),
        );
        (y, (keep != Keep::Nothing).then_some(Saved { gated, hidden, last }))
    }

    /// Where the values of the steps lie among rows `[steps, channels]` and their padding.
    fn own(&self, padded: &[f32]) -> Range<usize> {
        let (before, after) = self.shape.padding();
        before * self.shape.channels..padded.len() - after * self.shape.channels
    }

    /// The input of the first layer and its padding.
    fn first_hidden(&self) -> Vec<f32> {
        let (c, steps, inputs) = (self.shape.channels, self.steps(), self.shape.inputs);
        let ((weight, bias), (before, after)) = (self.shape.start(), self.shape.padding());
        let mut h = vec![0.0; (before + steps + after) * c];
        let own = self.own(&h);
        fill_rows(&mut h[own.clone()], c, &self.params[bias]);
        matmul_add(
            (steps, inputs, c),
            (self.x, Strides::rows(inputs)),
            (&self.params[weight], Strides::rows(c)),
            (&mut h[own], Strides::rows(c)),
        );
        h
    }

    /// The conditioning as products want it.
    fn conditioned(&self) -> Conditioned<'_> {
        match self.cond {
            Conditioning::Features(features, weights) => {
                let width = weights.len() / self.shape.cond_width();
                Conditioned::Features(self.products.rows(features, width), weights)
            }
            Conditioning::Projected(rows) => Conditioned::Projected(rows),
        }
    }

    /// A layer's convolution: its taps' matrices, of which the first meets padded rows from `first` on.
    fn convolution<'a>(
        &self,
        layer: usize,
        (rows, first): (&'a Rows<'a>, usize),
        matrices: impl Iterator<Item = View<'a>>,
    ) -> Term<'a> {
        Term { rows, first, dilation: self.shape.dilations[layer], matrices: matrices.collect() }
    }

    /// Fills `pre` `[steps, 2·channels]` with what goes into a layer's gate.
    fn before_gate(&self, layer: usize, cond: &Conditioned, h: &[f32], pre: &mut [f32]) {
        let (shape, p, steps) = (self.shape, self.shape.layer(layer), self.steps());
        let (c, width, bias) = (shape.channels, shape.cond_width(), &self.params[p.conv_bias]);
        let (before, _) = shape.padding();
        let first = before - shape.sides(shape.dilations[layer]).0;
        let taps = self.params[p.conv].chunks_exact(2 * c * c).map(|tap| (tap, Strides::rows(2 * c)));
        let h = self.products.rows(h, c);
        let conv = self.convolution(layer, (&h, first), taps);
        match cond {
            Conditioned::Features(features, weights) => {
                let projection = (&weights[layer * 2 * c..], Strides::rows(width));
                let terms = [Term::new(features, projection), conv];
                self.products.sum((steps, 2 * c), Some(bias), &terms, (pre, 2 * c));
            }
            Conditioned::Projected(rows) => {
                interpolated_bias(shape.up, bias, (&rows[layer * 2 * c..], width, 0), 0, pre);
                self.products.sum((steps, 2 * c), None, &[conv], (pre, 2 * c));
            }
        }
    }

    /// What a layer adds to the residual and the skip sum, `[steps, out_width]`, from its gates' product.
    fn residual(&self, layer: usize, act: &[f32], out: &mut Vec<f32>) {
        let (c, steps) = (self.shape.channels, self.steps());
        let (p, width) = (self.shape.layer(layer), self.shape.out_width(layer));
        out.resize(steps * width, 0.0);
        let act = self.products.rows(act, c);
        let term = Term::new(&act, (&self.params[p.out], Strides::rows(width)));
        self.products.sum((steps, width), Some(&self.params[p.out_bias]), &[term], (out, width));
    }

    /// The layers' inputs, from what their gates have made: bit for bit those of the forward pass.
    fn hidden_again(&self, gated: &[Vec<f32>]) -> Vec<Vec<f32>> {
        let mut hidden = vec![self.first_hidden()];
        let own = self.own(&hidden[0]);
        let (mut act, mut out) = (vec![0.0; own.len()], Vec::new());
        for (layer, gated) in gated.iter().enumerate().take(self.shape.layers() - 1) {
            product_of_halves(gated, &mut act, self.shape.channels);
            self.residual(layer, &act, &mut out);
            let mut h = hidden[layer].clone();
            add_residual(self.shape, layer, &out, &mut h[own.clone()]);
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
        let (mut act, mut d_act, no_bias) = (vec![0.0; steps * c], vec![0.0; steps * c], vec![0.0; c]);
        // turned round, what was before is after
        let (after, before) = shape.padding();
        let mut d_pre = vec![0.0; (before + steps + after) * 2 * c];
        let own = before * 2 * c..(before + steps) * 2 * c;
        // before the gates of all layers, where features come by step: they meet all layers' matrices at once
        let cond_width = shape.cond_width();
        let mut d_all = match cond {
            Conditioning::Features(..) => vec![0.0; steps * cond_width],
            Conditioning::Projected(_) => Vec::new(),
        };
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
            let sums = products.sums((steps, width), d_out);
            sums.add(c, &products.columns(&act, c), 0, (&mut d_params[p.out.clone()], width));
            add_column_sums(&mut d_params[p.out_bias], d_out);
            let d_out = products.rows(d_out, width);
            let term = Term::new(&d_out, (&params[p.out], Strides::rows(width).t()));
            products.sum((steps, c), Some(&no_bias), &[term], (&mut d_act, c));
            gate::backward(gated, &d_act, &mut d_pre[own.clone()], c);
            let d = &d_pre[own.clone()];
            add_column_sums(&mut d_params[p.conv_bias], d);
            let sums = products.sums((steps, 2 * c), d);
            match cond {
                Conditioning::Features(..) => {
                    let all = d_all.chunks_exact_mut(cond_width).zip(d.chunks_exact(2 * c));
                    all.for_each(|(all, d)| all[layer * 2 * c..][..2 * c].copy_from_slice(d));
                }
                Conditioning::Projected(_) => gather(shape, d, layer, &mut d_rows),
            }
            let dilation = shape.dilations[layer];
            let (back, ahead) = shape.sides(dilation);
            let h = products.columns(&hidden[layer], c);
            for (tap, d_conv) in d_params[p.conv.clone()].chunks_exact_mut(2 * c * c).enumerate() {
                sums.add(c, &h, after - back + tap * dilation, (d_conv, 2 * c));
            }
            let taps = params[p.conv].chunks_exact(2 * c * c).rev().map(|tap| (tap, Strides::rows(2 * c).t()));
            let d_pre = products.rows(&d_pre, 2 * c);
            let conv = self.convolution(layer, (&d_pre, before - ahead), taps);
            products.sum((steps, c), None, &[conv], (&mut dh, c));
        }
        if let Conditioning::Features(features, weights) = cond {
            let width = weights.len() / cond_width;
            let sums = products.sums((steps, cond_width), &d_all);
            sums.add(width, &products.columns(features, width), 0, (&mut d_weights, cond_width));
            let d_all = products.rows(&d_all, cond_width);
            let term = Term::new(&d_all, (weights, Strides::rows(cond_width).t()));
            products.sum((steps, width), None, &[term], (&mut d_rows, width));
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

/// What the fused nets of tests are held to: the conditioner in plain loops, for features of three values a row.
#[cfg(test)]
pub(super) fn reference(shape: &Shape, params: &[f32], x: &[f32], features: &[f32], weights: &[f32]) -> Vec<f32> {
    let (c, steps, cond_width) = (shape.channels, x.len() / shape.inputs, shape.cond_width());
    let at = |range: &Range<usize>, i: usize| f64::from(params[range.start + i]);
    // a row times a matrix and a bias
    let times = |row: &[f64], (weight, bias): (&Range<usize>, &Range<usize>)| -> Vec<f64> {
        let n = bias.len();
        let column = |j: usize| row.iter().enumerate().map(|(k, v)| v * at(weight, k * n + j)).sum::<f64>();
        (0..n).map(|j| at(bias, j) + column(j)).collect()
    };
    let projected = |row: usize, column: usize| -> f64 {
        (0..3).map(|k| f64::from(features[row * 3 + k]) * f64::from(weights[k * cond_width + column])).sum()
    };
    let cond = |t: usize, column: usize| match shape.up {
        1 => projected(t, column),
        up => {
            let (row, part) = interpolation(t, up);
            let now = projected(row, column);
            now + f64::from(part) * (projected(row + 1, column) - now)
        }
    };
    let (weight, bias) = shape.start();
    let first = |row: &[f32]| times(&row.iter().map(|v| f64::from(*v)).collect::<Vec<_>>(), (&weight, &bias));
    let mut h: Vec<Vec<f64>> = x.chunks_exact(shape.inputs).map(first).collect();
    let mut skip = vec![vec![0.0; c]; steps];
    for (layer, &dilation) in shape.dilations.iter().enumerate() {
        let (p, back) = (shape.layer(layer), shape.sides(dilation).0);
        let before = h.clone();
        for t in 0..steps {
            let mut pre: Vec<f64> = (0..2 * c).map(|j| at(&p.conv_bias, j) + cond(t, layer * 2 * c + j)).collect();
            for tap in 0..shape.kernel {
                let Some(row) = (t + tap * dilation).checked_sub(back).and_then(|from| before.get(from)) else {
                    continue;
                };
                for (j, pre) in pre.iter_mut().enumerate() {
                    let column = row.iter().enumerate().map(|(k, v)| v * at(&p.conv, (tap * c + k) * 2 * c + j));
                    *pre += column.sum::<f64>();
                }
            }
            let act: Vec<_> = (0..c).map(|j| pre[j].tanh() / (1.0 + (-pre[c + j]).exp())).collect();
            let out = times(&act, (&p.out, &p.out_bias));
            let (to_next, to_skip) = if shape.skip { out.split_at(out.len() - c) } else { out.split_at(c) };
            h[t].iter_mut().zip(to_next).for_each(|(h, out)| *h += out);
            skip[t].iter_mut().zip(to_skip).for_each(|(skip, out)| *skip += out);
        }
    }
    let (weight, bias) = shape.end();
    let last = if shape.skip { skip } else { h };
    last.iter().flat_map(|row| times(row, (&weight, &bias))).map(|v| v as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::super::choice::Kernel;
    use super::super::merged;
    use super::super::testing::values;
    use super::*;

    #[test]
    fn fused_it_is_the_net() {
        // (channels, kernel, dilations, causal, skip, up), convolutions wider than the sequence among them
        let shapes: [(_, _, &[usize], _, _, _); 6] = [
            (7, 3, &[1, 4, 2], false, true, 1),
            (17, 3, &[2], true, false, 1),
            (8, 5, &[1, 16], false, true, 8),
            (40, 3, &[1, 3, 40], true, false, 8),
            (3, 1, &[1, 1], false, false, 1),
            (33, 3, &[64, 1], false, true, 1),
        ];
        for (channels, kernel, dilations, causal, skip, up) in shapes {
            let dilations = dilations.to_vec();
            let shape = Shape { inputs: 3, channels, outputs: 5, kernel, causal, dilations, skip, up };
            let (steps, width) = (61, shape.cond_width());
            let (x, params) = (values(steps * 3, 1), values(shape.param_count(), 2));
            let params: Vec<_> = params.iter().map(|p| p / (channels as f32).sqrt()).collect();
            let (features, weights) = (values(shape.cond_rows(steps) * 3, 3), values(3 * width, 4));
            let expected = reference(&shape, &params, &x, &features, &weights);
            let projected = merged::chained(&features, 3, 3, &weights, width);
            let cond = Conditioning::of(&shape, if up == 1 { &features } else { &projected }, &weights);
            for kernel in Kernel::tested(steps * params.len()) {
                let pass = Pass { shape: &shape, params: &params, x: &x, cond, products: Products::Floats(kernel) };
                let (y, _) = pass.forward(Keep::Nothing);
                let loudest = expected.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
                let worst = y.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(y.len() == expected.len() && loudest > 0.1, "{shape:?}");
                assert!(worst < 1e-5 * loudest, "{}: {shape:?}: {worst}", kernel.name());
            }
        }
    }

    #[test]
    fn what_is_computed_again_is_what_was_kept() {
        for (skip, up, dilations) in
            [(true, 1, vec![1, 4, 2]), (false, 1, vec![2]), (true, 8, vec![1]), (false, 8, vec![1, 3])]
        {
            let shape = Shape { inputs: 3, channels: 7, outputs: 4, kernel: 3, causal: !skip, dilations, skip, up };
            let steps = 29;
            let (x, params) = (values(steps * 3, 1), values(shape.param_count(), 2));
            let (rows, width) = (shape.cond_rows(steps), shape.cond_width());
            let (features, weights, projected) = (values(rows * 5, 3), values(5 * width, 4), values(rows * width, 3));
            let cond = Conditioning::of(&shape, if up == 1 { &features } else { &projected }, &weights);
            let dy = values(steps * 4, 5);
            let all = [Products::default(), Products::Bfloats(Kernel::Scalar)].map(|products| {
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
