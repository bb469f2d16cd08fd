//! A windowed causal transformer, row by row, with the keys and values of the window remembered.

use super::pointwise::to_unit_rms;
use super::recall::{Recall, matvec_add};
use super::wavenet::interpolation;

/// Weights `[in, out]`, row-major, and biases.
pub type Linear = (Vec<f32>, Vec<f32>);

/// Keeps the root of a mean square away from zero.
pub const EPS: f32 = 1e-6;

/// One layer.
pub struct Block {
    /// Of the norm before attention.
    pub attention_norm: Vec<f32>,
    /// Queries, keys and values.
    pub qkv: Linear,
    /// What a score gets by head and distance, `[heads, window]`.
    pub distance: Vec<f32>,
    /// After attention.
    pub out: Linear,
    /// Of the norm before the feed-forward part.
    pub feed_norm: Vec<f32>,
    /// Into the feed-forward part.
    pub widen: Linear,
    /// Out of it.
    pub narrow: Linear,
}

/// The whole net.
pub struct Weights {
    /// Attention heads.
    pub heads: usize,
    /// Rows that a row attends to, its own among them.
    pub window: usize,
    /// Steps per row of conditioning.
    pub up: usize,
    /// From the input.
    pub start: Linear,
    /// The layers.
    pub blocks: Vec<Block>,
    /// Of the last norm.
    pub norm: Vec<f32>,
    /// To the output.
    pub end: Linear,
}

/// What a layer remembers: a ring of `window` places, laid out so that scores and sums are products of a
/// row and a matrix.
#[derive(Clone)]
struct Store {
    /// `[channels, window]`.
    keys: Vec<f32>,
    /// `[heads, window, channels / heads]`.
    values: Vec<f32>,
}

/// The net at work on one sequence.
pub struct TransformerRecall {
    weights: Weights,
    /// Conditioning with its bias, `[rows, layers · channels]`.
    cond: Vec<f32>,
    stores: Vec<Store>,
    done: usize,
    hidden: Vec<f32>,
    normed: Vec<f32>,
    qkv: Vec<f32>,
    scores: Vec<f32>,
    mixed: Vec<f32>,
    wide: Vec<f32>,
}

impl TransformerRecall {
    /// Before the first row. `cond` must hold the rows of every step that will come.
    pub fn new(weights: Weights, cond: Vec<f32>) -> Self {
        let c = weights.norm.len();
        Self {
            stores: vec![
                Store { keys: vec![0.0; weights.window * c], values: vec![0.0; weights.window * c] };
                weights.blocks.len()
            ],
            done: 0,
            hidden: vec![0.0; c],
            normed: vec![0.0; c],
            qkv: vec![0.0; 3 * c],
            scores: vec![0.0; weights.window],
            mixed: vec![0.0; c],
            wide: vec![0.0; weights.blocks.first().map_or(0, |block| block.widen.1.len())],
            cond,
            weights,
        }
    }

    /// Adds the conditioning of a layer at the present row.
    fn condition(&mut self, layer: usize) {
        let (c, width) = (self.hidden.len(), self.hidden.len() * self.stores.len());
        let row = |r: usize| &self.cond[r * width + layer * c..][..c];
        if self.weights.up == 1 {
            self.hidden.iter_mut().zip(row(self.done)).for_each(|(h, cond)| *h += cond);
            return;
        }
        let (r, part) = interpolation(self.done, self.weights.up);
        let between = row(r).iter().zip(row(r + 1)).map(|(now, next)| now + part * (next - now));
        self.hidden.iter_mut().zip(between).for_each(|(h, cond)| *h += cond);
    }

    fn attend(&mut self, layer: usize) {
        let (block, store, c) = (&self.weights.blocks[layer], &mut self.stores[layer], self.hidden.len());
        let (window, width) = (self.weights.window, c / self.weights.heads);
        apply(&block.qkv, &self.normed, &mut self.qkv);
        let (q, kv) = self.qkv.split_at_mut(c);
        let (k, v) = kv.split_at(c);
        let place = self.done % window;
        store.keys[place..].iter_mut().step_by(window).zip(k).for_each(|(store, k)| *store = *k);
        let scale = 1.0 / (width as f32).sqrt();
        q.iter_mut().for_each(|q| *q *= scale);
        self.mixed.fill(0.0);
        for (head, (q, v)) in q.chunks_exact(width).zip(v.chunks_exact(width)).enumerate() {
            let matrix = head * window * width..(head + 1) * window * width;
            let (keys, values) = (&store.keys[matrix.clone()], &mut store.values[matrix]);
            values[place * width..][..width].copy_from_slice(v);
            for (other, score) in self.scores.iter_mut().enumerate() {
                let distance = (place + window - other) % window;
                let seen = distance <= self.done;
                *score = if seen { block.distance[head * window + distance] } else { f32::NEG_INFINITY };
            }
            matvec_add(q, keys, &mut self.scores);
            let largest = self.scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            self.scores.iter_mut().for_each(|s| *s = (*s - largest).exp());
            let total: f32 = self.scores.iter().sum();
            self.scores.iter_mut().for_each(|s| *s /= total);
            matvec_add(&self.scores, values, &mut self.mixed[head * width..][..width]);
        }
        matvec_add(&self.mixed, &block.out.0, &mut self.hidden);
        self.hidden.iter_mut().zip(&block.out.1).for_each(|(h, b)| *h += b);
    }

    fn feed(&mut self, layer: usize) {
        let block = &self.weights.blocks[layer];
        apply(&block.widen, &self.normed, &mut self.wide);
        self.wide.iter_mut().for_each(|v| *v /= 1.0 + (-*v).exp());
        matvec_add(&self.wide, &block.narrow.0, &mut self.hidden);
        self.hidden.iter_mut().zip(&block.narrow.1).for_each(|(h, b)| *h += b);
    }
}

impl Recall for TransformerRecall {
    fn push(&mut self, x: &[f32], out: &mut [f32]) {
        apply(&self.weights.start, x, &mut self.hidden);
        for layer in 0..self.stores.len() {
            self.condition(layer);
            norm(&self.hidden, &self.weights.blocks[layer].attention_norm, &mut self.normed);
            self.attend(layer);
            norm(&self.hidden, &self.weights.blocks[layer].feed_norm, &mut self.normed);
            self.feed(layer);
        }
        norm(&self.hidden, &self.weights.norm, &mut self.normed);
        apply(&self.weights.end, &self.normed, out);
        self.done += 1;
    }
}

fn apply((weight, bias): &Linear, x: &[f32], out: &mut [f32]) {
    out.copy_from_slice(bias);
    matvec_add(x, weight, out);
}

fn norm(x: &[f32], weight: &[f32], out: &mut [f32]) {
    let scale = to_unit_rms(x, EPS);
    out.iter_mut().zip(x).zip(weight).for_each(|((out, x), weight)| *out = x * scale * weight);
}
