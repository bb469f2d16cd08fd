//! Conditioners that remember: a sequence in pieces, each product done once.
//!
//! What comes out doesn't depend on the pieces, bit for bit: see [`super::product`].
//!
//! The net is a WaveNet, its first and last matrices multiplied into their neighbours (`kernels/merged.rs`).

use super::blocks::{division, share};
use super::choice::Kernel;
use super::features::Features;
use super::merged;
use super::product::{Input, Matrix, Panels, Start};
use super::quantise::{self, Numbers, QuantisedRows, quantise};
use super::rows::Rows;
use super::short::ShortPanels;
use super::wavenet::Shape;

/// A WaveNet's weights in panels, and those of its projection of the mel's features.
pub struct Weights {
    /// The net's shape.
    pub shape: Shape,
    layers: Vec<Layer<Panels>>,
    /// The layers behind the first in short numbers, in place of those in f32, and which numbers.
    short: Vec<Layer<ShortPanels>>,
    numbers: Numbers,
    /// The first layer's conditioning in short numbers, gated, where features come by step: its convolution is then
    /// what this starts from.
    features: Option<ShortPanels>,
    /// All layers' conditioning from a row of features, where rows are interpolated.
    cond: Option<Panels>,
}

struct Layer<P> {
    /// Dilated convolution, and the conditioning where features come by step; gated.
    conv: P,
    /// To the next layer's input; the first layer's takes the net's input along.
    residual: Option<P>,
    /// To the output, as `residual`.
    answer: P,
}

impl Weights {
    /// Packs flat parameters in the order of [`Shape::param_count`], the conditioning's bias in the
    /// convolutions', and the projection of features, `[features, cond_width]`.
    pub fn new(kernel: Kernel, shape: &Shape, params: &[f32], cond: &[f32]) -> Self {
        let (c, outputs) = (shape.channels, shape.outputs);
        let mut layers = Vec::new();
        for (l, layer) in merged::layers(shape, params).iter().enumerate() {
            let mut above = vec![Matrix::new(&layer.conv, 2 * c)];
            if shape.up == 1 {
                let rows = cond.len() / shape.cond_width();
                above.push(Matrix { values: &cond[l * 2 * c..], stride: shape.cond_width(), rows });
            }
            let conv = Panels::gated(kernel, c, layer.conv_bias, &above);
            let residual = |matrix| Panels::new(kernel, c, layer.residual_bias, &[Matrix::new(matrix, c)]);
            let residual = layer.residual.as_deref().map(residual);
            let answer = Panels::new(kernel, outputs, &layer.answer_bias, &[Matrix::new(&layer.answer, outputs)]);
            layers.push(Layer { conv, residual, answer });
        }
        let width = shape.cond_width();
        let rows = || Panels::for_gated(kernel, c, &vec![0.0; width], &[Matrix::new(cond, width)]);
        let cond = (shape.up > 1).then(rows);
        Self { shape: shape.clone(), layers, short: Vec::new(), numbers: Numbers::Integers, features: None, cond }
    }

    /// Whether integers are faster by more than a tenth, and too near to f32 to be heard: measured where layers are as
    /// large as in WaveGlow's nets of 64 channels and more.
    pub(crate) fn gains_from_integers(&self) -> bool {
        let large = |layer: &Layer<Panels>| layer.conv.kernel().has_fast_integers() && layer.conv.depth() >= 512;
        self.shape.channels >= 64 && self.layers.len() > 1 && self.layers.iter().skip(1).all(large)
    }

    /// Goes over to short numbers where that pays: in all layers but the first, which reads the net's own
    /// few channels, and in its conditioning. Whether anything changed.
    pub(crate) fn quantise(&mut self, numbers: Numbers) -> bool {
        let c = self.shape.channels;
        if !self.short.is_empty() || !ShortPanels::exist_for(self.layers[0].conv.kernel()) {
            return false;
        }
        let taps = self.shape.kernel;
        self.numbers = numbers;
        for Layer { conv, residual, answer } in self.layers.drain(1..) {
            let mut widths = vec![c; taps];
            widths.extend((self.shape.up == 1).then(|| conv.depth() - taps * c));
            self.short.push(Layer {
                conv: ShortPanels::new(numbers, &conv, &widths),
                residual: residual.map(|residual| ShortPanels::new(numbers, &residual, &[c])),
                answer: ShortPanels::new(numbers, &answer, &[c]),
            });
        }
        if self.shape.up == 1 && !self.short.is_empty() {
            let first = &mut self.layers[0].conv;
            let [own, features] = first.split(taps * (self.shape.inputs + 1));
            self.features = Some(ShortPanels::new(numbers, &features, &[features.depth()]));
            *first = own;
        }
        !self.short.is_empty()
    }

    /// The short numbers that features are read in, if they are.
    pub(super) fn short_features(&self) -> Option<Numbers> {
        self.features.is_some().then_some(self.numbers)
    }

    /// Values of a row of the first layer's convolution, where that is done by itself.
    fn first_width(&self) -> usize {
        self.features.as_ref().map_or(0, ShortPanels::row_width)
    }

    /// Multiply-adds of so many steps' convolution in a layer in the middle.
    pub fn macs(&self, steps: usize) -> usize {
        self.layer_macs(self.shape.layers() / 2, steps)
    }

    /// Multiply-adds of so many steps' convolution in a layer, by far the most of it.
    fn layer_macs(&self, layer: usize, steps: usize) -> usize {
        let (depth, width) = match self.layers.get(layer) {
            Some(layer) => {
                let apart = self.features.as_ref().map_or(0, ShortPanels::depth);
                (layer.conv.depth() + apart, layer.conv.row_width())
            }
            None => (self.short[layer - 1].conv.depth(), self.short[layer - 1].conv.row_width()),
        };
        steps * depth * width
    }
}

/// What a WaveNet remembers of one sequence.
pub struct State {
    /// Projected conditioning by frame; not kept where features come by step.
    cond: Rows,
    /// Input of each layer behind the zeros before the first step: step `t` stands as many places on
    /// as the layer looks back. The first layer's is the net's input and a one.
    hidden: Vec<Hidden>,
    /// Steps that each layer has done.
    done: Vec<usize>,
    /// The layers' shares of the output so far.
    answer: Rows,
    /// The first layer's convolution, where that is done by itself.
    first: Vec<f32>,
    /// What a layer's gates leave, `[steps, channels]`, and the same in short numbers.
    act: Vec<f32>,
    act_values: Vec<i16>,
    act_scales: Vec<f32>,
}

/// The input of a layer.
struct Hidden {
    rows: Rows,
    /// The same for a layer in short numbers.
    quantised: Option<QuantisedRows>,
}

impl Hidden {
    /// Puts `count` rows of zeros at the end and gives them.
    fn grow(&mut self, count: usize) -> (&mut [f32], QuantisedMut<'_>) {
        let quantised = self.quantised.as_mut().map_or_else(Default::default, |rows| rows.grow(count));
        (self.rows.grow(count), quantised)
    }

    /// Makes room for `count` rows at the end and gives it, to be written over.
    fn room(&mut self, count: usize) -> (&mut [f32], QuantisedMut<'_>) {
        let quantised = self.quantised.as_mut().map_or_else(Default::default, |rows| rows.room(count));
        (self.rows.room(count), quantised)
    }

    /// Forgets the rows before a place.
    fn forget(&mut self, before: usize) {
        self.rows.forget(before);
        if let Some(quantised) = &mut self.quantised {
            quantised.forget(before);
        }
    }
}

impl State {
    /// Before the first step.
    pub fn new(weights: &Weights) -> Self {
        let shape = &weights.shape;
        let hidden = |(l, dilation): (usize, &usize)| {
            let rows = Rows::new(if l == 0 { shape.inputs + 1 } else { shape.channels });
            let short = l >= weights.layers.len();
            let mut hidden =
                Hidden { rows, quantised: short.then(|| QuantisedRows::new(weights.numbers, shape.channels)) };
            hidden.grow(shape.sides(*dilation).0);
            hidden
        };
        Self {
            cond: Rows::new(weights.cond.as_ref().map_or(1, Panels::columns)),
            hidden: shape.dilations.iter().enumerate().map(hidden).collect(),
            done: vec![0; shape.layers()],
            answer: Rows::new(shape.outputs),
            first: Vec::new(),
            act: Vec::new(),
            act_values: Vec::new(),
            act_scales: Vec::new(),
        }
    }

    /// Takes the next rows of input, the first values of rows of `x` that are `stride` long, and
    /// `features` as far as they are known (of the steps up to the end of the input, at least);
    /// gives the rows of output that are new, `[steps, outputs]`. `threads` share the work where it
    /// is enough.
    ///
    /// After `last` nothing may follow, and everything is ready.
    pub fn push(
        &mut self,
        weights: &Weights,
        (x, stride): (&[f32], usize),
        features: &Features,
        last: bool,
        threads: usize,
    ) -> &[f32] {
        let shape = &weights.shape;
        let inputs = shape.inputs;
        let (rows, _) = self.hidden[0].room(x.len() / stride);
        for (row, x) in rows.chunks_exact_mut(inputs + 1).zip(x.chunks_exact(stride)) {
            row[..inputs].copy_from_slice(&x[..inputs]);
            row[inputs] = 1.0;
        }
        let given = self.hidden[0].rows.end() - shape.sides(shape.dilations[0]).0;
        if let Some(cond) = &weights.cond {
            let features = features.rows();
            let wanted = self.cond.end()..(given.div_ceil(shape.up) + 1).min(features.end());
            let (count, width) = (wanted.len(), cond.columns());
            let rows = self.cond.room(count);
            let features = Input::rows(features.get(wanted), features.width());
            cond.product(count, &[features], Start::Bias, (rows, width));
        }
        let ready = self.done[shape.layers() - 1];
        for layer in 0..shape.layers() {
            self.layer(weights, layer, features, last, threads);
        }
        let end = self.done[shape.layers() - 1];
        self.cond.forget(end / shape.up);
        self.answer.forget(ready);
        self.answer.get(ready..end)
    }

    /// Carries one layer as far as its input allows.
    fn layer(&mut self, weights: &Weights, l: usize, features: &Features, last: bool, threads: usize) {
        let shape = &weights.shape;
        let c = shape.channels;
        let (before, after) = shape.sides(shape.dilations[l]);
        let (inputs, next) = self.hidden.split_at_mut(l + 1);
        let h = &mut inputs[l];
        if last {
            h.grow(after);
        }
        let from = self.done[l];
        let to = h.rows.end().saturating_sub(before + after).max(from);
        let steps = to - from;
        if steps == 0 {
            return;
        }
        self.act.resize(steps * c, 0.0);
        if h.quantised.is_some() {
            self.act_values.resize(steps * weights.numbers.stride(c), 0);
            self.act_scales.resize(steps, 0.0);
        }
        if l == 0 {
            self.answer.room(steps);
            self.first.resize(weights.first_width() * steps, 0.0);
        }
        let (threads, block) = division(steps, weights.layer_macs(l, steps), threads);
        let (next, next_quantised) = next.first_mut().map_or_else(Default::default, |next| next.room(steps));
        let mut rest = Block {
            from,
            first: &mut self.first,
            act: &mut self.act,
            act_quantised: (&mut self.act_values, &mut self.act_scales),
            next,
            next_quantised,
            answer: self.answer.get_mut(from..to),
        };
        let work = Work { weights, l, h, cond: &self.cond, features };
        if steps <= block {
            work.run(rest);
        } else {
            let blocks = std::iter::from_fn(|| rest.split_off(block, weights));
            share(threads, blocks, |block| work.run(block));
        }
        h.forget(to);
        self.done[l] = to;
    }
}

/// Values and scales of quantised rows.
type QuantisedMut<'a> = (&'a mut [i16], &'a mut [f32]);

/// Where some steps of a layer go.
struct Block<'a> {
    /// The first step.
    from: usize,
    /// The first layer's convolution, where that is done by itself.
    first: &'a mut [f32],
    /// What the gates leave.
    act: &'a mut [f32],
    /// The same of layers in short numbers.
    act_quantised: QuantisedMut<'a>,
    /// The next layer's input, if there is one.
    next: &'a mut [f32],
    /// The same if that is in short numbers.
    next_quantised: QuantisedMut<'a>,
    answer: &'a mut [f32],
}

impl<'a> Block<'a> {
    /// The first `steps` steps, or all that are left, if there are any.
    fn split_off(&mut self, steps: usize, weights: &Weights) -> Option<Self> {
        /// Whatever isn't there stays empty.
        fn front<'a, T>(rest: &mut &'a mut [T], count: usize) -> &'a mut [T] {
            rest.split_off_mut(..count.min(rest.len())).unwrap_or_default()
        }
        let Weights { shape, numbers, .. } = weights;
        let c = shape.channels;
        let steps = steps.min(self.act.len() / c);
        let quantised =
            |(values, scales): &mut QuantisedMut<'a>| (front(values, steps * numbers.stride(c)), front(scales, steps));
        let block = Self {
            from: self.from,
            first: front(&mut self.first, steps * weights.first_width()),
            act: front(&mut self.act, steps * c),
            act_quantised: quantised(&mut self.act_quantised),
            next: front(&mut self.next, steps * c),
            next_quantised: quantised(&mut self.next_quantised),
            answer: front(&mut self.answer, steps * shape.outputs),
        };
        self.from += steps;
        (steps > 0).then_some(block)
    }
}

/// A layer's work, for any of its blocks.
struct Work<'a> {
    weights: &'a Weights,
    l: usize,
    h: &'a Hidden,
    cond: &'a Rows,
    features: &'a Features,
}

impl Work<'_> {
    /// One block.
    fn run(&self, block: Block) {
        let steps = block.act.len() / self.weights.shape.channels;
        match self.weights.layers.get(self.l) {
            Some(layer) => self.floats(layer, steps, block),
            None => self.short(&self.weights.short[self.l - 1], steps, block),
        }
    }

    /// In f32.
    fn floats(&self, layer: &Layer<Panels>, steps: usize, block: Block) {
        let shape = &self.weights.shape;
        let (c, dilation) = (shape.channels, shape.dilations[self.l]);
        let (before, after) = shape.sides(dilation);
        let Block { from, first, act, next, next_quantised, answer, .. } = block;
        let (x, width) = (self.h.rows.get(from..from + steps + before + after), self.h.rows.width());
        let conv = Input { taps: shape.kernel, dilation, ..Input::rows(x, width) };
        if let Some(start) = self.between(from, layer.conv.row_width()) {
            layer.conv.product(steps, &[conv], start, (act, c));
        } else if let Some(panels) = &self.weights.features {
            let width = self.weights.first_width();
            layer.conv.product(steps, &[conv], Start::Bias, (first, width));
            panels.product(
                steps,
                &[self.features.short().get(from..from + steps)],
                Start::Held(first, width, 1, 0),
                (act, c),
            );
        } else {
            let rows = self.features.rows();
            let features = Input::rows(rows.get(from..from + steps), rows.width());
            layer.conv.product(steps, &[conv, features], Start::Bias, (act, c));
        }

        // the step's own row
        let own = &x[before * width..];
        let act = Input::rows(act, c);
        if let Some(residual) = &layer.residual {
            if self.l == 0 {
                residual.product(steps, &[act, Input::rows(own, width)], Start::Bias, (next, c));
            } else {
                residual.product(steps, &[act], Start::Rows(own, width), (next, c));
            }
            if !next_quantised.1.is_empty() {
                quantise(self.weights.numbers, next, c, next_quantised.0, next_quantised.1);
            }
        }
        let own = [act, Input::rows(own, width)];
        let (inputs, start) = match self.l {
            0 if shape.skip => (&own[..1], Start::Bias),
            0 => (&own[..], Start::Bias),
            _ => (&own[..1], Start::Answer),
        };
        layer.answer.product(steps, inputs, start, (answer, shape.outputs));
    }

    /// In short numbers, a layer behind the first; what is kept and added up stays in f32.
    fn short(&self, layer: &Layer<ShortPanels>, steps: usize, block: Block) {
        let shape = &self.weights.shape;
        let (c, dilation) = (shape.channels, shape.dilations[self.l]);
        let (before, after) = shape.sides(dilation);
        let Block { from, act, act_quantised, next, next_quantised, answer, .. } = block;
        let quantised = self.h.quantised.as_ref().expect("a layer in short numbers has its input so");
        let conv =
            quantise::Input { taps: shape.kernel, dilation, ..quantised.get(from..from + steps + before + after) };
        if let Some(start) = self.between(from, layer.conv.row_width()) {
            layer.conv.product(steps, &[conv], start, (act, c));
        } else {
            let features = self.features.short().get(from..from + steps);
            layer.conv.product(steps, &[conv, features], Start::Bias, (act, c));
        }
        let (values, scales) = act_quantised;
        quantise(self.weights.numbers, act, c, values, scales);
        let act = [quantise::Input::rows(self.weights.numbers, values, scales, c)];
        if let Some(residual) = &layer.residual {
            let own = Start::Rows(self.h.rows.get(from + before..from + before + steps), c);
            residual.product(steps, &act, own, (next, c));
            quantise(self.weights.numbers, next, c, next_quantised.0, next_quantised.1);
        }
        layer.answer.product(steps, &act, Start::Answer, (answer, shape.outputs));
    }

    /// Where the convolution of steps from `from` on starts, if that is between rows.
    fn between(&self, from: usize, row_width: usize) -> Option<Start<'_>> {
        let cond = self.weights.cond.as_ref()?;
        let (first, up) = (self.cond.start(), self.weights.shape.up);
        let rows = &self.cond.get(first..self.cond.end())[self.l * row_width..];
        Some(Start::Between(rows, cond.columns(), up, from - first * up))
    }
}

#[cfg(test)]
mod tests {
    use super::super::blocks::MIN_SHARED;
    use super::super::testing::values_to;
    use super::*;
    use crate::kernels::choice::Precision;
    use crate::kernels::wavenet;

    /// (inputs, channels, outputs, kernel, dilations, up)
    type Case = (usize, usize, usize, usize, &'static [usize], usize);
    const SHAPES: [Case; 5] = [
        (1, 1, 2, 3, &[1], 1),
        (3, 10, 4, 3, &[1, 2, 4], 1),
        (4, 6, 8, 5, &[3, 1], 16),
        (8, 64, 16, 3, &[1, 2, 4, 8, 16], 16),
        (2, 19, 6, 1, &[1, 1], 4),
    ];

    fn shapes() -> impl Iterator<Item = Shape> {
        SHAPES.into_iter().flat_map(|(inputs, channels, outputs, kernel, dilations, up)| {
            [(false, false), (false, true), (true, false), (true, true)].map(|(causal, skip)| {
                let dilations = dilations.to_vec();
                Shape { inputs, channels, outputs, kernel, causal, dilations, skip, up }
            })
        })
    }

    /// The output for pieces of so many rows of features; rows of `x` have a value too many.
    fn streamed(
        weights: &Weights,
        x: &[f32],
        steps: usize,
        features: &[f32],
        piece: usize,
        threads: usize,
    ) -> Vec<f32> {
        let (up, width) = (weights.shape.up, x.len() / steps);
        let mut rows = Features::new(3, weights.short_features());
        let (mut state, mut out, mut given) = (State::new(weights), Vec::new(), 0);
        for features in features.chunks(3 * piece) {
            rows.extend(features);
            // steps stand between rows
            let known = if up == 1 { rows.rows().end() } else { (rows.rows().end() - 1) * up }.min(steps);
            out.extend_from_slice(state.push(
                weights,
                (&x[given * width..known * width], width),
                &rows,
                false,
                threads,
            ));
            given = known;
        }
        out.extend_from_slice(state.push(weights, (&[], width), &rows, true, threads));
        out
    }

    #[test]
    fn packed_is_the_net_for_any_pieces() {
        for shape in shapes() {
            let steps = 4 * shape.up + 23 * usize::from(shape.up == 1);
            let params = values_to(shape.param_count(), 1, 1.2 / (shape.channels as f32).sqrt());
            let cond = values_to(3 * shape.cond_width(), 2, 0.5);
            let rows = shape.cond_rows(steps);
            let (x, features) = (values_to(steps * (shape.inputs + 1), 3, 1.0), values_to(rows * 3, 4, 1.0));
            let known: Vec<f32> =
                x.chunks_exact(shape.inputs + 1).flat_map(|row| &row[..shape.inputs]).copied().collect();
            let expected = wavenet::reference(&shape, &params, &known, &features, &cond);
            let loudest = expected.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
            assert!(loudest > 0.1);
            for kernel in Kernel::tested(steps * params.len()) {
                // in integers a product is exact to about 13 bits of its largest values, or 7, in bf16 every number to 8
                for (precision, most) in
                    [(Precision::F32, 1e-5), (Precision::Int16, 1e-3), (Precision::Int8, 4e-2), (Precision::Bf16, 2e-2)]
                {
                    let mut weights = Weights::new(kernel, &shape, &params, &cond);
                    if precision.short().is_some_and(|numbers| !weights.quantise(numbers)) {
                        continue;
                    }
                    let numbers = precision.name();
                    let whole = streamed(&weights, &x, steps, &features, rows, 1);
                    let worst = whole.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(
                        whole.len() == expected.len() && worst < most * loudest,
                        "{}, {numbers}: {shape:?}: {worst}",
                        kernel.name()
                    );
                    for piece in [1, 2, 7] {
                        let pieces = streamed(&weights, &x, steps, &features, piece, 1);
                        assert!(pieces == whole, "{}, {numbers}: {shape:?}, {piece} at a time", kernel.name());
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_not_a_number_goes_no_further_than_the_net_looks() {
        let all = [Numbers::Integers, Numbers::Bytes, Numbers::Bfloats];
        for (shape, numbers) in shapes().flat_map(|s| all.map(|numbers| (s.clone(), numbers))) {
            let (at, steps) = (shape.up + 40, 4 * shape.up + 99);
            let rows = shape.cond_rows(steps);
            let params = values_to(shape.param_count(), 1, 0.3);
            let mut weights =
                Weights::new(Kernel::chosen().unwrap(), &shape, &params, &values_to(3 * shape.cond_width(), 2, 0.5));
            weights.quantise(numbers);
            let features = values_to(rows * 3, 4, 1.0);
            let clean = values_to(steps * (shape.inputs + 1), 3, 1.0);
            let expected = streamed(&weights, &clean, steps, &features, rows, 1);
            for bad in [f32::NAN, f32::INFINITY, f32::MAX, -1e30] {
                let mut x = clean.clone();
                x[at * (shape.inputs + 1)] = bad;
                let out = streamed(&weights, &x, steps, &features, rows, 1);
                let near = at.saturating_sub(shape.lookahead())..at + shape.reach() + 1;
                let rows = out.chunks(shape.outputs).zip(expected.chunks(shape.outputs)).enumerate();
                assert!(rows.len() == steps && near.end < steps);
                for (t, (out, expected)) in rows {
                    assert!(near.contains(&t) || out == expected, "{shape:?}: {bad} at {at} is heard at {t}");
                }
            }
        }
    }

    #[test]
    fn threads_share_a_large_piece() {
        let (inputs, channels, outputs, kernel, dilations) = (4, 64, 8, 3, vec![1, 2]);
        let shape = Shape { inputs, channels, outputs, kernel, causal: false, dilations, skip: true, up: 1 };
        let steps = MIN_SHARED / (3 * 64 * 128) + 100;
        let params = values_to(shape.param_count(), 1, 0.1);
        let (x, features) = (values_to(steps * 5, 3, 1.0), values_to(steps * 3, 4, 1.0));
        for precision in Precision::ALL {
            let cond = values_to(3 * shape.cond_width(), 2, 0.5);
            let mut weights = Weights::new(Kernel::chosen().unwrap(), &shape, &params, &cond);
            precision.short().map(|numbers| weights.quantise(numbers));
            let alone = streamed(&weights, &x, steps, &features, steps, 1);
            assert!(streamed(&weights, &x, steps, &features, steps, 3) == alone);
        }
    }
}
