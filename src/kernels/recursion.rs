//! A causal WaveNet that waits for its own answer: one row at a time, as the inverse of an autoregressive step
//! wants it.
//!
//! A row by itself makes a product that only reads weights, and they lie further away than the first cache.
//! But of a layer's taps all but the last look at rows that are a dilation or more away, so that they are done
//! ahead, for as many rows together as the dilation is long:
//!
//! ```text
//!   dilation 3:   h₀ h₁ h₂ h₃ h₄ h₅   rows that are there
//!                 └──┬───┘ └──┬───┘
//!                    ▼        ▼
//!                 ┌──────────────┐
//!                 │ ahead₆ ₇ ₈   │    the first two taps of the next three, and their conditioning
//!                 └──────────────┘
//! ```
//!
//! What is left of a row is `own · h` on top of that, the gate, and one product to the next layer's input and
//! the output together. What comes out doesn't depend on the pieces that the features come in, bit for bit.

use super::choice::Kernel;
use super::merged;
use super::product::{Input, Matrix, Panels, Start};
use super::rows::Rows;
use super::single::RowPanels;
use super::wavenet::Shape;

/// A WaveNet's weights in panels, and those of its projection of the mel's features.
pub struct Weights {
    shape: Shape,
    layers: Vec<Layer>,
    /// All layers' conditioning from a row of features, where rows are interpolated.
    cond: Option<Panels>,
}

struct Layer {
    /// The taps before the row's own, and the conditioning where features come by step: what gates start from.
    ahead: Panels,
    /// The row's own tap; gated.
    own: RowPanels,
    /// From the gates to the next layer's input and the output, side by side, or the last layer's to the
    /// output; the first layer's takes the net's input along.
    out: RowPanels,
}

impl Weights {
    /// Packs flat parameters in the order of [`Shape::param_count`], the conditioning's bias in the
    /// convolutions', and the projection of features, `[features, cond_width]`.
    ///
    /// # Panics
    /// If the shape isn't causal.
    pub fn new(kernel: Kernel, shape: &Shape, params: &[f32], cond: &[f32]) -> Self {
        assert!(shape.causal);
        let (c, outputs, width) = (shape.channels, shape.outputs, shape.cond_width());
        let layer = |(l, layer): (usize, &merged::Layer)| {
            let inputs = if l == 0 { shape.inputs + 1 } else { c };
            let (before, own) = layer.conv.split_at((shape.kernel - 1) * inputs * 2 * c);
            let mut above = vec![Matrix::new(before, 2 * c)];
            if shape.up == 1 {
                above.push(Matrix { values: &cond[l * 2 * c..], stride: width, rows: cond.len() / width });
            }
            let out = match &layer.residual {
                Some(residual) => {
                    let mut answer = layer.answer.clone();
                    // with skips, the net's input has no part in the output
                    answer.resize(residual.len() / c * outputs, 0.0);
                    let rows = residual.chunks_exact(c).zip(answer.chunks_exact(outputs));
                    let side_by_side: Vec<f32> =
                        rows.flat_map(|(to_next, to_output)| [to_next, to_output].concat()).collect();
                    let bias = [layer.residual_bias, &layer.answer_bias].concat();
                    RowPanels::new(kernel, &bias, Matrix::new(&side_by_side, c + outputs))
                }
                None => RowPanels::new(kernel, &layer.answer_bias, Matrix::new(&layer.answer, outputs)),
            };
            Layer {
                ahead: Panels::for_single(kernel, c, layer.conv_bias, &above),
                own: RowPanels::gated(kernel, c, Matrix::new(own, 2 * c)),
                out,
            }
        };
        let layers = merged::layers(shape, params).iter().enumerate().map(layer).collect();
        let rows = || Panels::for_single(kernel, c, &vec![0.0; width], &[Matrix::new(cond, width)]);
        Self { shape: shape.clone(), layers, cond: (shape.up > 1).then(rows) }
    }
}

/// Rows that a layer's input grows by, at least.
const GROWTH: usize = 64;

/// What the net remembers of one sequence.
pub struct State {
    /// Projected conditioning by frame; not kept where features come by step.
    cond: Rows,
    layers: Vec<LayerState>,
    /// Steps done.
    done: usize,
    /// What a layer's gates leave, and the output: with room for whole panels.
    act: Vec<f32>,
    out: Vec<f32>,
}

struct LayerState {
    /// The layer's input behind the zeros before the first step: step `t` stands as many places on as the layer
    /// looks back, and behind the last one there may be room. The first layer's is the net's input and a one, the
    /// others' their channels and the output so far, with zeros behind them, so that panels are full.
    input: Rows,
    /// What the gates of steps start from: a row for each of as many as the dilation is long, and the first of them and
    /// the end of those that are done.
    ahead: Vec<f32>,
    first: usize,
    known: usize,
}

impl State {
    /// Before the first step.
    pub fn new(weights: &Weights) -> Self {
        let shape = &weights.shape;
        let last = weights.layers.last().map_or(0, |layer| layer.out.room());
        let layer = |(l, layer): (usize, &Layer)| {
            let width = match l.checked_sub(1) {
                None => shape.inputs + 1,
                Some(before) => weights.layers[before].out.room().max(shape.channels + last),
            };
            let mut input = Rows::new(width);
            input.grow(shape.sides(shape.dilations[l]).0);
            let ahead = vec![0.0; shape.dilations[l] * layer.ahead.columns()];
            LayerState { input, ahead, first: 0, known: 0 }
        };
        Self {
            cond: Rows::new(weights.cond.as_ref().map_or(1, Panels::columns)),
            layers: weights.layers.iter().enumerate().map(layer).collect(),
            done: 0,
            act: vec![0.0; weights.layers.iter().map(|layer| layer.own.room()).max().unwrap_or(0)],
            out: vec![0.0; last],
        }
    }

    /// Takes the next row of input, and `features` as far as they are known; gives the row of output.
    ///
    /// # Panics
    /// If features of the row are missing: its own, or where rows stand between features, both its neighbours.
    pub fn push(&mut self, weights: &Weights, x: &[f32], features: &Rows) -> &[f32] {
        let Shape { inputs, channels: c, outputs, kernel, up, .. } = weights.shape;
        let t = self.done;
        if let Some(cond) = &weights.cond {
            let wanted = self.cond.end()..features.end();
            let (count, width) = (wanted.len(), cond.columns());
            if count > 0 {
                let rows = self.cond.room(count);
                let features = Input::rows(features.get(wanted), features.width());
                cond.product(count, &[features], Start::Bias, (rows, width));
            }
        }

        let row = own_row(&mut self.layers[0].input, t + (kernel - 1) * weights.shape.dilations[0]);
        row[..inputs].copy_from_slice(x);
        row[inputs] = 1.0;
        for (l, (layer, &dilation)) in weights.layers.iter().zip(&weights.shape.dilations).enumerate() {
            let (state, next) = self.layers.split_at_mut(l + 1);
            let state = &mut state[l];
            let (back, width) = ((kernel - 1) * dilation, if l == 0 { inputs + 1 } else { c });
            if state.known == t {
                // steps stand between rows
                let known = if up == 1 { features.end() } else { (self.cond.end() - 1) * up };
                let steps = dilation.min(known - t);
                state.look_ahead(layer, (t, steps, dilation), (kernel, width), (l, up), features, &self.cond);
            }
            let own = state.input.get(t + back..t + back + 1);
            let ahead = &state.ahead[(t - state.first) * layer.ahead.columns()..];
            layer.own.row(&[&own[..width]], Some(ahead), &mut self.act);
            let act = &self.act[..c];
            let out = match (next, weights.shape.dilations.get(l + 1)) {
                ([next, ..], Some(dilation)) => own_row(&mut next.input, t + (kernel - 1) * dilation),
                _ => &mut self.out[..],
            };
            match l {
                0 if layer.out.depth() > c => layer.out.row(&[act, own], None, out),
                0 => layer.out.row(&[act], None, out),
                _ => {
                    let before = if l + 1 < weights.layers.len() { own } else { &own[c..] };
                    layer.out.row(&[act], Some(before), out);
                }
            }
        }
        self.done += 1;
        self.cond.forget(self.done / up);
        &self.out[..outputs]
    }
}

/// The row at a place that may be the first behind the last one.
fn own_row(rows: &mut Rows, place: usize) -> &mut [f32] {
    if rows.end() == place {
        rows.grow(GROWTH);
    }
    rows.get_mut(place..place + 1)
}

impl LayerState {
    /// What the gates of the steps from `t` on start from.
    fn look_ahead(
        &mut self,
        layer: &Layer,
        (t, steps, dilation): (usize, usize, usize),
        (kernel, width): (usize, usize),
        (l, up): (usize, usize),
        features: &Rows,
        cond: &Rows,
    ) {
        (self.first, self.known) = (t, t + steps);
        self.input.forget(t);
        let taps = match kernel {
            1 => Input::rows(&[], 0),
            _ => Input {
                taps: kernel - 1,
                dilation,
                stride: self.input.width(),
                ..Input::rows(self.input.get(t..t + steps + (kernel - 2) * dilation), width)
            },
        };
        let columns = layer.ahead.columns();
        let (by_step, start) = if up == 1 {
            (Input::rows(features.get(t..t + steps), features.width()), Start::Bias)
        } else {
            let first = cond.start();
            let rows = &cond.get(first..cond.end())[l * columns..];
            (Input::rows(&[], 0), Start::Between(rows, cond.width(), up, t - first * up))
        };
        layer.ahead.product(steps, &[taps, by_step], start, (&mut self.ahead, columns));
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::values_to;
    use super::super::wavenet;
    use super::*;

    /// The output for pieces of so many rows of features.
    fn streamed(weights: &Weights, x: &[f32], features: &[f32], piece: usize) -> Vec<f32> {
        let (mut rows, mut state, mut out, mut x) =
            (Rows::new(3), State::new(weights), Vec::new(), x.chunks_exact(weights.shape.inputs));
        for features in features.chunks(3 * piece) {
            rows.extend(features);
            let known = if weights.shape.up == 1 { rows.end() } else { (rows.end() - 1) * weights.shape.up };
            while state.done < known {
                let Some(x) = x.next() else { break };
                out.extend_from_slice(state.push(weights, x, &rows));
            }
        }
        out
    }

    #[test]
    fn row_by_row_is_the_net_for_any_pieces() {
        // (inputs, channels, outputs, kernel, dilations, up)
        let shapes: [(_, _, _, _, &[usize], _); 6] = [
            (1, 1, 2, 3, &[1], 1),
            (3, 10, 4, 3, &[1, 2, 4], 1),
            (4, 6, 8, 5, &[3, 1], 16),
            (4, 40, 8, 3, &[1, 3, 9, 27, 81], 64),
            (2, 19, 6, 1, &[1, 1], 4),
            (2, 8, 6, 1, &[1], 1),
        ];
        for (inputs, channels, outputs, kernel, dilations, up) in shapes {
            for skip in [false, true] {
                let dilations = dilations.to_vec();
                let shape = Shape { inputs, channels, outputs, kernel, causal: true, dilations, skip, up };
                let steps = 4 * up + 23 * usize::from(up == 1);
                let params = values_to(shape.param_count(), 1, 1.2 / (channels as f32).sqrt());
                let cond = values_to(3 * shape.cond_width(), 2, 0.5);
                let rows = shape.cond_rows(steps);
                let (x, features) = (values_to(steps * inputs, 3, 1.0), values_to(rows * 3, 4, 1.0));
                let expected = wavenet::reference(&shape, &params, &x, &features, &cond);
                let loudest = expected.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
                assert!(loudest > 0.1);
                for kernel in Kernel::tested(steps * params.len()) {
                    let weights = Weights::new(kernel, &shape, &params, &cond);
                    let whole = streamed(&weights, &x, &features, rows);
                    let worst = whole.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    let name = kernel.name();
                    assert!(whole.len() == expected.len() && worst < 1e-5 * loudest, "{name}: {shape:?}: {worst}");
                    for piece in [1, 2, 7] {
                        assert!(
                            streamed(&weights, &x, &features, piece) == whole,
                            "{name}: {shape:?}, {piece} at a time"
                        );
                    }
                }
            }
        }
    }
}
