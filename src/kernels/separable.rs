//! SqueezeWave's conditioner on packed weights: a sequence in pieces, each product done once.
//!
//! A block of steps goes through a layer in three passes, all of it in the cache:
//!
//! ```text
//!   h ──┬─▶ depthwise ─▶ rows ─▶ pointwise ─▶ gate ─▶ act ─▶ out ─▶ + ─▶ next layer's h
//!       │     sums                   ▲                              ▲
//!       │                  a frame's conditioning                   │
//!       └───────────────────────────────────────────────────────────┘
//! ```
//!
//! The depthwise sums stand where the next layer's input will: nothing is stored twice. The norm's
//! scale is multiplied into the depthwise weights; its shift and the depthwise bias, which every step
//! has alike, into the pointwise bias. Only beyond the ends the shift is missing, since zeros stand
//! there behind the norm: the few steps that look there have it taken away again.
//!
//! What comes out doesn't depend on the pieces, bit for bit: see [`super::product`].

use super::blocks::{division, share};
use super::choice::Kernel;
use super::product::{Input, Matrix, Panels, Start};
use super::quantise::{self, Numbers, quantise};
use super::rows::Rows;
use super::short::ShortPanels;
#[cfg(target_arch = "aarch64")]
use super::vector::Neon;
#[cfg(target_arch = "x86_64")]
use super::vector::{Avx2, Avx512};
use super::vector::{Portable, Vector};

/// Shape of a conditioner; every count in channels.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Input channels.
    pub inputs: usize,
    /// Residual channels.
    pub channels: usize,
    /// Output channels.
    pub outputs: usize,
    /// Width of the depthwise convolutions, odd.
    pub kernel: usize,
    /// Layers.
    pub layers: usize,
    /// Steps per row of conditioning, which is held for them.
    pub up: usize,
}

impl Shape {
    /// Steps on each side of a step that its output depends on.
    pub fn reach(&self) -> usize {
        self.layers * self.half()
    }

    /// Columns of conditioning.
    pub fn cond_width(&self) -> usize {
        2 * self.channels * self.layers
    }

    /// Steps that a layer looks to each side.
    fn half(&self) -> usize {
        self.kernel / 2
    }
}

/// A matrix `[in, out]`, row-major, and a bias.
pub struct Affine {
    /// The matrix.
    pub weight: Vec<f32>,
    /// Per column.
    pub bias: Vec<f32>,
}

impl Affine {
    fn panels(&self, kernel: Kernel) -> Panels {
        Panels::new(kernel, self.bias.len(), &self.bias, &[Matrix::new(&self.weight, self.bias.len())])
    }
}

/// A conditioner's parameters, weight norm applied.
pub struct Params {
    /// From the known channels.
    pub start: Affine,
    /// The layers.
    pub layers: Vec<LayerParams>,
    /// To the output.
    pub end: Affine,
    /// From a row of the mel's features to all layers' conditioning.
    pub cond: Affine,
}

/// A layer's parameters.
pub struct LayerParams {
    /// Scale and shift before the padding, per channel.
    pub norm: Option<(Vec<f32>, Vec<f32>)>,
    /// `[kernel, channels]`.
    pub depth: Vec<f32>,
    /// Per channel.
    pub depth_bias: Vec<f32>,
    /// To twice the channels.
    pub point: Affine,
    /// From the gate to the residual.
    pub out: Affine,
}

/// The weights in panels.
pub struct Weights {
    /// The net's shape.
    pub shape: Shape,
    kernel: Kernel,
    start: Panels,
    layers: Vec<Layer>,
    end: Panels,
    cond: Cond,
}

/// All layers' conditioning from a row of the mel's features.
enum Cond {
    Floats(Panels),
    /// Of features that are rounded to [`COND_NUMBERS`] first.
    Short(ShortPanels),
}

/// What conditioning is worked out in where layers are in short numbers, whichever: log mels lie far from zero, and with
/// bf16's or bytes' few bits of them the error would be 4 to 6 dB louder.
const COND_NUMBERS: Numbers = Numbers::Integers;

struct Layer {
    /// Depthwise weights with the norm's scale in them, `[kernel, channels]`.
    depth: Vec<f32>,
    /// What each tap has of the norm's shift, `[kernel, channels]`; nothing without a shift.
    shifts: Vec<f32>,
    products: Products,
}

/// A layer's two matrices, the first gated.
enum Products {
    Floats {
        point: Panels,
        out: Panels,
    },
    /// Of what is rounded to these numbers first.
    Short {
        numbers: Numbers,
        point: ShortPanels,
        out: ShortPanels,
    },
}

impl Products {
    /// Columns of all panels of the first.
    fn row_width(&self) -> usize {
        match self {
            Self::Floats { point, .. } => point.row_width(),
            Self::Short { point, .. } => point.row_width(),
        }
    }

    /// In such numbers, from f32.
    fn rounded(&self, numbers: Numbers, channels: usize) -> Option<Self> {
        let Self::Floats { point, out } = self else { return None };
        let [point, out] = [point, out].map(|panels| ShortPanels::new(numbers, panels, &[channels]));
        Some(Self::Short { numbers, point, out })
    }
}

impl Layer {
    fn new(kernel: Kernel, shape: &Shape, params: &LayerParams, cond_bias: &[f32]) -> Self {
        let c = shape.channels;
        let (mut depth, mut shifts) = (params.depth.clone(), Vec::new());
        let mut constant: Vec<f64> = params.depth_bias.iter().map(|&b| f64::from(b)).collect();
        if let Some((scale, shift)) = &params.norm {
            shifts.reserve(depth.len());
            for tap in depth.chunks_exact_mut(c) {
                for (i, w) in tap.iter_mut().enumerate() {
                    constant[i] += f64::from(*w) * f64::from(shift[i]);
                    shifts.push(*w * shift[i]);
                    *w *= scale[i];
                }
            }
        }
        let mut bias: Vec<f64> =
            params.point.bias.iter().zip(cond_bias).map(|(a, b)| f64::from(*a) + f64::from(*b)).collect();
        for (constant, row) in constant.iter().zip(params.point.weight.chunks_exact(2 * c)) {
            bias.iter_mut().zip(row).for_each(|(sum, w)| *sum += constant * f64::from(*w));
        }
        let bias: Vec<f32> = bias.into_iter().map(|b| b as f32).collect();
        let point = Panels::gated(kernel, c, &bias, &[Matrix::new(&params.point.weight, 2 * c)]);
        Self { depth, shifts, products: Products::Floats { point, out: params.out.panels(kernel) } }
    }
}

impl Weights {
    /// Packs a conditioner's parameters.
    pub fn new(kernel: Kernel, shape: &Shape, params: &Params) -> Self {
        let (c, width) = (shape.channels, shape.cond_width());
        let cond_bias = params.cond.bias.chunks_exact(2 * c);
        Self {
            kernel,
            start: params.start.panels(kernel),
            layers: params.layers.iter().zip(cond_bias).map(|(p, bias)| Layer::new(kernel, shape, p, bias)).collect(),
            end: params.end.panels(kernel),
            cond: Cond::Floats(Panels::for_gated(
                kernel,
                c,
                &vec![0.0; width],
                &[Matrix::new(&params.cond.weight, width)],
            )),
            shape: shape.clone(),
        }
    }

    /// Whether products are in short numbers.
    #[cfg(test)]
    fn is_short(&self) -> bool {
        self.layers.iter().any(|layer| matches!(layer.products, Products::Short { .. }))
    }

    /// Goes over to short numbers in all layers and their conditioning; whether anything changed.
    pub(crate) fn quantise(&mut self, numbers: Numbers) -> bool {
        if !ShortPanels::exist_for(self.kernel) {
            return false;
        }
        let mut changed = false;
        for layer in &mut self.layers {
            if let Some(products) = layer.products.rounded(numbers, self.shape.channels) {
                (layer.products, changed) = (products, true);
            }
        }
        if let Cond::Floats(panels) = &self.cond {
            self.cond = Cond::Short(ShortPanels::new(COND_NUMBERS, panels, &[panels.depth()]));
        }
        changed
    }

    /// Columns of all layers' conditioning, in their panels' order.
    fn cond_columns(&self) -> usize {
        self.layers.iter().map(|layer| layer.products.row_width()).sum()
    }

    /// Values of sixteen bits that a step takes up where products are in short numbers.
    fn short_stride(&self) -> usize {
        match self.layers.first().map(|layer| &layer.products) {
            Some(Products::Short { numbers, .. }) => numbers.stride(self.shape.channels),
            _ => 1,
        }
    }

    /// Multiply-adds of so many steps' products in a layer.
    pub fn macs(&self, steps: usize) -> usize {
        steps * 3 * self.shape.channels * self.shape.channels
    }
}

/// What a conditioner remembers of one sequence.
pub struct State {
    /// Projected conditioning by frame.
    cond: Rows,
    /// Input of each layer behind the zeros before the first step: step `t` stands as many places on
    /// as a layer looks back.
    hidden: Vec<Rows>,
    /// Steps that each layer has done.
    done: Vec<usize>,
    act: Vec<f32>,
    /// What meets a layer's matrices in short numbers.
    values: Vec<i16>,
    scales: Vec<f32>,
    /// What the last layer leaves.
    rest: Vec<f32>,
    answer: Vec<f32>,
}

impl State {
    /// Before the first step.
    pub fn new(weights: &Weights) -> Self {
        let shape = &weights.shape;
        let mut rows = Rows::new(shape.channels);
        rows.grow(shape.half());
        Self {
            cond: Rows::new(weights.cond_columns()),
            hidden: vec![rows; shape.layers],
            done: vec![0; shape.layers],
            act: Vec::new(),
            values: Vec::new(),
            scales: Vec::new(),
            rest: Vec::new(),
            answer: Vec::new(),
        }
    }

    /// Takes rows of input and gives rows of output as [`super::stream::State::push`] does.
    pub fn push(
        &mut self,
        weights: &Weights,
        (x, stride): (&[f32], usize),
        features: &Rows,
        last: bool,
        threads: usize,
    ) -> &[f32] {
        let (shape, c) = (&weights.shape, weights.shape.channels);
        let steps = x.len() / stride;
        let rows = self.hidden[0].room(steps);
        let (threads_here, block) = weights.division(steps, threads);
        share(threads_here, x.chunks(block * stride).zip(rows.chunks_mut(block * c)), |(x, rows)| {
            let input = Input { stride, ..Input::rows(x, shape.inputs) };
            weights.start.product(rows.len() / c, &[input], Start::Bias, (rows, c));
        });
        let given = self.hidden[0].end() - shape.half();
        let wanted = self.cond.end()..given.div_ceil(shape.up);
        let width = self.cond.width();
        let rows = self.cond.room(wanted.len());
        let (features, bands) = (features.get(wanted), features.width());
        match &weights.cond {
            Cond::Floats(cond) => {
                let blocks = features.chunks(block * bands).zip(rows.chunks_mut(block * width));
                share(threads_here, blocks, |(features, rows)| {
                    cond.product(rows.len() / width, &[Input::rows(features, bands)], Start::Bias, (rows, width));
                });
            }
            Cond::Short(cond) => {
                let (count, stride) = (features.len() / bands, COND_NUMBERS.stride(bands));
                self.values.resize(count * stride, 0);
                self.scales.resize(count, 0.0);
                quantise(COND_NUMBERS, features, bands, &mut self.values, &mut self.scales);
                let features = self.values.chunks(block * stride).zip(self.scales.chunks(block));
                share(threads_here, features.zip(rows.chunks_mut(block * width)), |((values, scales), rows)| {
                    let input = quantise::Input::rows(COND_NUMBERS, values, scales, bands);
                    cond.product(scales.len(), &[input], Start::Bias, (rows, width));
                });
            }
        }
        self.answer.clear();
        for layer in 0..shape.layers {
            self.layer(weights, layer, last, threads);
        }
        self.cond.forget(self.done[shape.layers - 1] / shape.up);
        &self.answer
    }

    /// Carries one layer as far as its input allows; the last one to the answer.
    fn layer(&mut self, weights: &Weights, l: usize, last: bool, threads: usize) {
        let shape = &weights.shape;
        let (c, half) = (shape.channels, shape.half());
        let (inputs, next) = self.hidden.split_at_mut(l + 1);
        let h = &mut inputs[l];
        if last {
            h.grow(half);
        }
        let from = self.done[l];
        let to = h.end().saturating_sub(2 * half).max(from);
        let steps = to - from;
        if steps == 0 {
            return;
        }
        let short = weights.short_stride();
        self.act.resize(steps * c, 0.0);
        self.values.resize(steps * short, 0);
        self.scales.resize(steps, 0.0);
        let next = match next.first_mut() {
            Some(next) => next.room(steps),
            None => {
                self.rest.resize(steps * c, 0.0);
                self.answer.resize(steps * shape.outputs, 0.0);
                &mut self.rest
            }
        };
        let (threads, block) = weights.division(steps, threads);
        let answers = self.answer.chunks_mut(block * shape.outputs).map(Some).chain(std::iter::repeat_with(|| None));
        let short = self.values.chunks_mut(block * short).zip(self.scales.chunks_mut(block));
        let acts = self.act.chunks_mut(block * c).zip(short);
        let blocks = (from..to).step_by(block).zip(acts).zip(next.chunks_mut(block * c)).zip(answers);
        let work = Work { weights, layer: &weights.layers[l], l, h, cond: &self.cond, end: last.then_some(to) };
        share(threads, blocks, |(((from, (act, short)), next), answer)| work.run(from, (act, short), next, answer));
        h.forget(to);
        self.done[l] = to;
    }
}

impl Weights {
    /// How many threads share so many steps, and the steps of a block.
    fn division(&self, steps: usize, threads: usize) -> (usize, usize) {
        division(steps, self.macs(steps), threads)
    }
}

/// A layer's work, for any of its blocks.
struct Work<'a> {
    weights: &'a Weights,
    layer: &'a Layer,
    l: usize,
    h: &'a Rows,
    cond: &'a Rows,
    /// One past the last step, once it is known.
    end: Option<usize>,
}

impl Work<'_> {
    /// One block: steps from `from` for as long as `act` is, with room for them in short numbers.
    fn run(
        &self,
        from: usize,
        (act, (values, scales)): (&mut [f32], (&mut [i16], &mut [f32])),
        next: &mut [f32],
        answer: Option<&mut [f32]>,
    ) {
        let (shape, layer) = (&self.weights.shape, self.layer);
        let (c, half) = (shape.channels, shape.half());
        let steps = act.len() / c;
        let x = self.h.get(from..from + steps + 2 * half);
        depthwise(self.weights.kernel, x, (&layer.depth, c), next);
        self.take_shifts(from, next);

        let first = self.cond.start();
        let rows = &self.cond.get(first..self.cond.end())[self.l * layer.products.row_width()..];
        let held = Start::Held(rows, self.cond.width(), shape.up, from - first * shape.up);
        let own = Start::Rows(&x[half * c..], c);
        match &layer.products {
            Products::Floats { point, out } => {
                point.product(steps, &[Input::rows(next, c)], held, (act, c));
                out.product(steps, &[Input::rows(act, c)], own, (next, c));
            }
            Products::Short { numbers, point, out } => {
                quantise(*numbers, next, c, values, scales);
                point.product(steps, &[quantise::Input::rows(*numbers, values, scales, c)], held, (act, c));
                quantise(*numbers, act, c, values, scales);
                out.product(steps, &[quantise::Input::rows(*numbers, values, scales, c)], own, (next, c));
            }
        }
        if let Some(answer) = answer {
            self.weights.end.product(steps, &[Input::rows(next, c)], Start::Bias, (answer, shape.outputs));
        }
    }

    /// Takes the norm's shift from the sums of steps that look beyond the ends.
    fn take_shifts(&self, from: usize, sums: &mut [f32]) {
        let (c, half) = (self.weights.shape.channels, self.weights.shape.half());
        let to = from + sums.len() / c;
        let after = self.end.map_or(to, |end| (end - half.min(end)).clamp(from, to));
        let before = half.clamp(from, to);
        for t in (from..before).chain(after.max(before)..to) {
            let sums = &mut sums[(t - from) * c..][..c];
            for (tap, shifts) in self.layer.shifts.chunks_exact(c).enumerate() {
                if t + tap < half || self.end.is_some_and(|end| t + tap >= end + half) {
                    sums.iter_mut().zip(shifts).for_each(|(sum, shift)| *sum -= shift);
                }
            }
        }
    }
}

/// Sums of each channel over a few rows: `out[t] = Σ taps[k] · x[t + k]`, rows of `channels` values.
///
/// # Panics
/// If `x` has too few rows.
fn depthwise(kernel: Kernel, x: &[f32], (taps, channels): (&[f32], usize), out: &mut [f32]) {
    let count = taps.len() / channels;
    assert!(kernel.can_run() && x.len() + channels >= out.len() + count * channels);
    assert!(out.len().is_multiple_of(channels) && taps.len().is_multiple_of(channels) && count > 0);
    let job = Depthwise { x, taps, channels, out };
    // SAFETY: the assertions keep every address within its slice, and the kernel runs here.
    unsafe {
        match kernel {
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => avx2(job),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512 => avx512(job),
            #[cfg(target_arch = "aarch64")]
            Kernel::Neon => neon(job),
            _ => run::<Portable>(job),
        }
    }
}

/// Checked sums.
struct Depthwise<'a> {
    x: &'a [f32],
    taps: &'a [f32],
    channels: usize,
    out: &'a mut [f32],
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(job: Depthwise) {
    // SAFETY: the caller's promise.
    unsafe { run::<Avx2>(job) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512(job: Depthwise) {
    // SAFETY: the caller's promise.
    unsafe { run::<Avx512>(job) }
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
unsafe fn neon(job: Depthwise) {
    // SAFETY: the caller's promise.
    unsafe { run::<Neon>(job) }
}

/// Values of the widest vector.
const WIDEST: usize = 16;

/// # Safety
/// The processor must have the vector's feature, and the job be checked.
#[inline(always)]
unsafe fn run<V: Vector>(job: Depthwise) {
    let (c, count) = (job.channels, job.taps.len() / job.channels);
    let whole = c / V::LANES * V::LANES;
    for (t, out) in job.out.chunks_exact_mut(c).enumerate() {
        // SAFETY: `depthwise` has checked that all these lie within their slices; `some` copies no
        // more than the channels that are left.
        unsafe {
            let (x, taps, out) = (job.x.as_ptr().add(t * c), job.taps.as_ptr(), out.as_mut_ptr());
            if count == 3 {
                // SqueezeWave's own, with its loop undone
                for at in (0..whole).step_by(V::LANES) {
                    sum::<V>(x.add(at), taps.add(at), (3, c), V::LANES).store(out.add(at));
                }
            } else {
                for at in (0..whole).step_by(V::LANES) {
                    sum::<V>(x.add(at), taps.add(at), (count, c), V::LANES).store(out.add(at));
                }
            }
            if whole < c {
                let mut last = [0.0; WIDEST];
                sum::<V>(x.add(whole), taps.add(whole), (count, c), c - whole).store(last.as_mut_ptr());
                std::ptr::copy_nonoverlapping(last.as_ptr(), out.add(whole), c - whole);
            }
        }
    }
}

/// A vector of sums: of the first `filled` channels, behind them zeros.
///
/// # Safety
/// So many values, at most a vector's, must stand in each of the `count` rows, `c` apart, of `x` and of
/// `taps`; the processor must have the vector's feature.
#[inline(always)]
unsafe fn sum<V: Vector>(x: *const f32, taps: *const f32, (count, c): (usize, usize), filled: usize) -> V {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sum = some::<V>(taps, filled).mul(some(x, filled));
        for k in 1..count {
            sum = some::<V>(taps.add(k * c), filled).fma(some(x.add(k * c), filled), sum);
        }
        sum
    }
}

/// The first `count` values of a vector, behind them zeros.
///
/// # Safety
/// So many values, at most a vector's, must stand at `at`, and the processor must have the vector's
/// feature.
#[inline(always)]
unsafe fn some<V: Vector>(at: *const f32, count: usize) -> V {
    if count == V::LANES {
        // SAFETY: the caller's promise.
        return unsafe { V::load(at) };
    }
    let mut copy = [0.0; WIDEST];
    // SAFETY: the caller's promise.
    unsafe {
        std::ptr::copy_nonoverlapping(at, copy.as_mut_ptr(), count);
        V::load(copy.as_ptr())
    }
}

#[cfg(test)]
mod tests {
    use super::super::blocks::MIN_SHARED;
    use super::super::testing::values_to;
    use super::*;
    use crate::kernels::choice::Precision;

    fn affine(inputs: usize, outputs: usize, seed: usize) -> Affine {
        let most = 1.5 / (inputs as f32).sqrt();
        Affine { weight: values_to(inputs * outputs, seed, most), bias: values_to(outputs, seed + 1, 0.3) }
    }

    /// Parameters, from three features.
    fn params(shape: &Shape, normed: bool) -> Params {
        let c = shape.channels;
        let layer = |l: usize| LayerParams {
            norm: normed.then(|| (values_to(c, 10 * l + 1, 2.0), values_to(c, 10 * l + 2, 1.0))),
            depth: values_to(shape.kernel * c, 10 * l + 3, 0.8),
            depth_bias: values_to(c, 10 * l + 4, 0.5),
            point: affine(c, 2 * c, 10 * l + 5),
            out: affine(c, c, 10 * l + 7),
        };
        Params {
            start: affine(shape.inputs, c, 901),
            layers: (0..shape.layers).map(layer).collect(),
            end: affine(c, shape.outputs, 903),
            cond: affine(3, shape.cond_width(), 905),
        }
    }

    fn product(x: &[f64], affine: &Affine) -> Vec<f64> {
        let columns = affine.bias.len();
        let sum = |row: &[f64], j: usize| -> f64 {
            row.iter().enumerate().map(|(i, x)| x * f64::from(affine.weight[i * columns + j])).sum()
        };
        let row = |row| (0..columns).map(move |j| f64::from(affine.bias[j]) + sum(row, j));
        x.chunks_exact(affine.weight.len() / columns).flat_map(row).collect()
    }

    /// The net by its definition, in f64.
    fn defined(shape: &Shape, params: &Params, x: &[f32], features: &[f32]) -> Vec<f64> {
        let (c, half) = (shape.channels, shape.half());
        let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
        let (mut h, cond) = (product(&wide(x), &params.start), product(&wide(features), &params.cond));
        let steps = h.len() / c;
        for (l, layer) in params.layers.iter().enumerate() {
            let mut normed = h.clone();
            if let Some((scale, shift)) = &layer.norm {
                let factors = scale.iter().zip(shift).cycle();
                normed.iter_mut().zip(factors).for_each(|(h, (a, b))| *h = *h * f64::from(*a) + f64::from(*b));
            }
            let depth = |t: usize, j: usize| {
                let taps = (0..shape.kernel).filter(|tap| (half..half + steps).contains(&(t + tap)));
                let sum = taps.map(|tap| normed[(t + tap - half) * c + j] * f64::from(layer.depth[tap * c + j]));
                f64::from(layer.depth_bias[j]) + sum.sum::<f64>()
            };
            let depth: Vec<f64> = (0..steps * c).map(|i| depth(i / c, i % c)).collect();
            let pre = product(&depth, &layer.point);
            let gated = |i: usize| {
                let (t, j) = (i / c, i % c);
                let at = |j: usize| pre[t * 2 * c + j] + cond[t / shape.up * shape.cond_width() + l * 2 * c + j];
                at(j).tanh() / (1.0 + (-at(c + j)).exp())
            };
            let act: Vec<f64> = (0..steps * c).map(gated).collect();
            h.iter_mut().zip(product(&act, &layer.out)).for_each(|(h, out)| *h += out);
        }
        product(&h, &params.end)
    }

    /// The output for pieces of so many frames; rows of `x` have a value too many.
    fn streamed(weights: &Weights, x: &[f32], features: &[f32], piece: usize, threads: usize) -> Vec<f32> {
        let (up, width) = (weights.shape.up, weights.shape.inputs + 1);
        let (mut state, mut rows, mut out, mut given) = (State::new(weights), Rows::new(3), Vec::new(), 0);
        for features in features.chunks(3 * piece) {
            rows.extend(features);
            let known = rows.end() * up;
            let x = (&x[given * width..known * width], width);
            out.extend_from_slice(state.push(weights, x, &rows, false, threads));
            given = known;
        }
        out.extend_from_slice(state.push(weights, (&[], width), &rows, true, threads));
        out
    }

    /// Whole in one piece: the last rows come with the end.
    fn whole(weights: &Weights, x: &[f32], features: &[f32], threads: usize) -> Vec<f32> {
        let mut rows = Rows::new(3);
        rows.extend(features);
        State::new(weights).push(weights, (x, weights.shape.inputs + 1), &rows, true, threads).to_vec()
    }

    #[test]
    fn packed_is_the_net_for_any_pieces() {
        // inputs, channels, outputs, kernel, layers, up, frames
        let shapes = [
            (1, 1, 2, 3, 1, 1, 1),
            (3, 10, 4, 3, 3, 2, 13),
            (4, 6, 8, 5, 2, 3, 1),
            (8, 64, 16, 3, 4, 2, 53),
            (5, 37, 6, 7, 2, 1, 5),
            (2, 19, 7, 1, 2, 4, 7),
            (2, 8, 3, 63, 2, 1, 17),
        ];
        for ((inputs, channels, outputs, kernel, layers, up, frames), normed) in
            shapes.into_iter().flat_map(|shape| [(shape, false), (shape, true)])
        {
            let shape = Shape { inputs, channels, outputs, kernel, layers, up };
            let (params, steps) = (params(&shape, normed), frames * up);
            let (x, features) = (values_to(steps * (inputs + 1), 3, 1.0), values_to(frames * 3, 4, 1.0));
            let known: Vec<f32> = x.chunks_exact(inputs + 1).flat_map(|row| &row[..inputs]).copied().collect();
            let expected = defined(&shape, &params, &known, &features);
            let loudest = expected.iter().fold(0.0_f64, |most, v| most.max(v.abs()));
            assert!(loudest > 0.1);
            for set in Kernel::tested(steps * layers * channels * (kernel + 3 * channels)) {
                // in integers a product is exact to about 13 bits of its largest values, or 7, in bf16 every number to 8
                for (precision, most) in
                    [(Precision::F32, 1e-5), (Precision::Int16, 1e-3), (Precision::Int8, 4e-2), (Precision::Bf16, 2e-2)]
                {
                    let mut weights = Weights::new(set, &shape, &params);
                    if precision.short().is_some_and(|numbers| !weights.quantise(numbers)) {
                        continue;
                    }
                    assert_eq!(weights.is_short(), precision != Precision::F32);
                    let name = format!("{}, {}: {shape:?}", set.name(), precision.name());
                    let whole = whole(&weights, &x, &features, 1);
                    let worst = whole.iter().zip(&expected).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
                    assert!(whole.len() == expected.len() && worst < most * loudest, "{name}: {worst} of {loudest}");
                    for piece in [1, 2, 7, frames] {
                        let pieces = streamed(&weights, &x, &features, piece, 1);
                        assert!(pieces == whole, "{name}, {piece} at a time");
                    }
                }
            }
        }
    }

    #[test]
    fn threads_share_a_large_piece() {
        let shape = Shape { inputs: 4, channels: 64, outputs: 8, kernel: 3, layers: 2, up: 2 };
        let frames = MIN_SHARED / (3 * 64 * 64) / 2 + 50;
        let (x, features) = (values_to(frames * 2 * 5, 3, 1.0), values_to(frames * 3, 4, 1.0));
        for precision in Precision::ALL {
            let mut weights = Weights::new(Kernel::chosen().unwrap(), &shape, &params(&shape, true));
            precision.short().map(|numbers| weights.quantise(numbers));
            assert!(weights.division(2 * frames, 3).0 == 3);
            assert!(whole(&weights, &x, &features, 3) == whole(&weights, &x, &features, 1));
        }
    }
}
