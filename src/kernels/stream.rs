//! Conditioners that remember: a sequence in pieces, each product done once.
//!
//! What comes out doesn't depend on the pieces, bit for bit: rows go through `matmul_rows` alone.

use super::wavenet::{Shape, add, fill_rows, interpolated_bias};
use super::{gate, matmul_rows};
use std::ops::Range;

/// The rows of a sequence that are still needed, by their place in the whole sequence.
#[derive(Clone, Debug)]
pub struct Rows {
    values: Vec<f32>,
    width: usize,
    /// Place of the first row in `values`.
    base: usize,
    /// Place of the first row that is still needed.
    first: usize,
}

impl Rows {
    /// No rows yet, of `width` values each.
    pub fn new(width: usize) -> Self {
        Self { values: Vec::new(), width, base: 0, first: 0 }
    }

    /// Values of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Place of the first row that is still needed.
    pub fn start(&self) -> usize {
        self.first
    }

    /// One past the place of the last row.
    pub fn end(&self) -> usize {
        self.base + self.values.len() / self.width
    }

    /// Puts whole rows at the end.
    pub fn extend(&mut self, rows: &[f32]) {
        debug_assert!(rows.len().is_multiple_of(self.width));
        self.values.extend_from_slice(rows);
    }

    /// Makes `count` rows of zeros at the end and gives them.
    pub fn grow(&mut self, count: usize) -> &mut [f32] {
        let from = self.values.len();
        self.values.resize(from + count * self.width, 0.0);
        &mut self.values[from..]
    }

    /// Rows by their places.
    ///
    /// # Panics
    /// If one isn't there.
    pub fn get(&self, places: Range<usize>) -> &[f32] {
        &self.values[(places.start - self.base) * self.width..(places.end - self.base) * self.width]
    }

    /// Rows by their places, to be changed.
    ///
    /// # Panics
    /// If one isn't there.
    pub fn get_mut(&mut self, places: Range<usize>) -> &mut [f32] {
        &mut self.values[(places.start - self.base) * self.width..(places.end - self.base) * self.width]
    }

    /// Forgets the rows before a place.
    pub fn forget(&mut self, before: usize) {
        self.first = before.clamp(self.first, self.end());
        // moved together only when more is dead than alive: each row is moved once or less on average
        let dead = (self.first - self.base) * self.width;
        if 2 * dead > self.values.len() {
            self.values.drain(..dead);
            self.base = self.first;
        }
    }
}

/// A WaveNet's weights, and those of its projection of the mel's features.
pub struct Weights {
    /// The net's shape.
    pub shape: Shape,
    /// Flat, in the order of [`Shape::param_count`], the conditioning's bias in the convolutions'.
    pub params: Vec<f32>,
    /// `[features, cond_width]`.
    pub cond: Vec<f32>,
}

/// What a WaveNet remembers of one sequence.
pub struct State {
    /// Projected conditioning by frame; not kept where features come by step.
    cond: Rows,
    /// Input of each layer, and after the last (without skips) what `end` reads.
    hidden: Vec<Rows>,
    /// Steps that each layer has done.
    done: Vec<usize>,
    /// Sums of skip connections on their way to the last layer.
    skip: Rows,
    pre: Vec<f32>,
    act: Vec<f32>,
    out: Vec<f32>,
}

impl State {
    /// Before the first step.
    pub fn new(weights: &Weights) -> Self {
        let Shape { channels, .. } = weights.shape;
        let layers = weights.shape.layers();
        Self {
            cond: Rows::new(weights.shape.cond_width()),
            hidden: vec![Rows::new(channels); layers + 1],
            done: vec![0; layers],
            skip: Rows::new(channels),
            pre: Vec::new(),
            act: Vec::new(),
            out: Vec::new(),
        }
    }

    /// Takes the next rows of input, and `features` as far as they are known (of the steps up to
    /// the end of the input, at least); appends what is ready to `out`, `[steps, outputs]`.
    ///
    /// After `last` nothing may follow, and everything is ready.
    pub fn push(&mut self, weights: &Weights, x: &[f32], features: &Rows, last: bool, out: &mut Vec<f32>) {
        let shape = &weights.shape;
        let (c, layers) = (shape.channels, shape.layers());
        let (weight, bias) = shape.start();
        let steps = x.len() / shape.inputs;
        let h = self.hidden[0].grow(steps);
        fill_rows(h, &weights.params[bias]);
        matmul_rows((steps, shape.inputs, c), x, (&weights.params[weight], c), h);
        if shape.up > 1 {
            self.project(weights, features);
        }
        for layer in 0..layers {
            self.layer(weights, layer, features, last);
        }

        let last = if shape.skip { &mut self.skip } else { &mut self.hidden[layers] };
        let ready = last.start()..self.done[layers - 1];
        let (weight, bias) = shape.end();
        let at = out.len();
        out.resize(at + ready.len() * shape.outputs, 0.0);
        fill_rows(&mut out[at..], &weights.params[bias]);
        let weight = (&weights.params[weight], shape.outputs);
        matmul_rows((ready.len(), c, shape.outputs), last.get(ready.clone()), weight, &mut out[at..]);
        last.forget(ready.end);
    }

    /// Projects the rows of features that steps on hand stand between.
    fn project(&mut self, weights: &Weights, features: &Rows) {
        let (up, width) = (weights.shape.up, weights.shape.cond_width());
        let inputs = weights.cond.len() / width;
        let wanted = self.cond.end()..(self.hidden[0].end().div_ceil(up) + 1).min(features.end());
        if !wanted.is_empty() {
            let rows = self.cond.grow(wanted.len());
            matmul_rows((wanted.len(), inputs, width), features.get(wanted), (&weights.cond, width), rows);
        }
        self.cond.forget(self.done[weights.shape.layers() - 1] / up);
    }

    /// Carries one layer as far as its input allows.
    fn layer(&mut self, weights: &Weights, layer: usize, features: &Rows, last: bool) {
        let (shape, p) = (&weights.shape, weights.shape.layer(layer));
        let (c, dilation) = (shape.channels, shape.dilations[layer]);
        let (before, after) = shape.sides(dilation);
        let known = self.hidden[layer].end();
        let from = self.done[layer];
        let to = if last { known } else { known.saturating_sub(after).max(from) };
        let steps = to - from;
        if steps == 0 {
            return;
        }

        let w = 2 * c;
        self.pre.resize(steps * w, 0.0);
        let bias = &weights.params[p.conv_bias];
        if shape.up > 1 {
            let rows = self.cond.start()..self.cond.end();
            interpolated_bias(shape, layer, bias, (self.cond.get(rows), self.cond.start()), from, &mut self.pre);
        } else {
            let width = shape.cond_width();
            let inputs = weights.cond.len() / width;
            fill_rows(&mut self.pre, bias);
            let cond = (&weights.cond[layer * w..], width);
            matmul_rows((steps, inputs, w), features.get(from..to), cond, &mut self.pre);
        }
        let conv = &weights.params[p.conv];
        for tap in 0..shape.kernel {
            // output step `t` reads input step `t + tap · dilation − before`, where there is one
            let shift = tap * dilation;
            let (first, end) = (from.max(before.saturating_sub(shift)), to.min((known + before).saturating_sub(shift)));
            if first < end {
                let input = self.hidden[layer].get(first + shift - before..end + shift - before);
                let pre = &mut self.pre[(first - from) * w..];
                matmul_rows((end - first, c, w), input, (&conv[tap * c * w..], w), pre);
            }
        }
        self.act.resize(steps * c, 0.0);
        gate::forward(&mut self.pre, &mut self.act, c);
        let width = shape.out_width(layer);
        self.out.resize(steps * width, 0.0);
        fill_rows(&mut self.out, &weights.params[p.out_bias]);
        matmul_rows((steps, c, width), &self.act, (&weights.params[p.out], width), &mut self.out);

        let (inputs, next) = self.hidden.split_at_mut(layer + 1);
        let h = &mut inputs[layer];
        if !shape.skip || width == 2 * c {
            next[0].extend(h.get(from..to));
            let next = next[0].get_mut(from..to);
            for (next, out) in next.chunks_exact_mut(c).zip(self.out.chunks_exact(width)) {
                add(next, &out[..c]);
            }
        }
        if shape.skip {
            let new = to - self.skip.end().min(to);
            self.skip.grow(new);
            for (skip, out) in self.skip.get_mut(from..to).chunks_exact_mut(c).zip(self.out.chunks_exact(width)) {
                add(skip, &out[width - c..]);
            }
        }
        h.forget(to.saturating_sub(before));
        self.done[layer] = to;
    }
}
