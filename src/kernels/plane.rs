//! Convolutions over a plane of rows and steps, `[rows, steps, channels]`, forward and backward.
//!
//! A tap looks some rows back and some steps to the side; beyond the edges are zeros. One row makes
//! it a convolution in time.

use super::{Strides, matmul_add};

/// Shape of a convolution over one item of a batch.
#[derive(Clone, Debug)]
pub struct Plane {
    /// Rows of the input.
    pub rows: usize,
    /// The first row that is worked out.
    pub first: usize,
    /// Steps of a row.
    pub steps: usize,
    /// Input channels.
    pub inputs: usize,
    /// Output channels.
    pub outputs: usize,
    /// Where each tap looks: rows back, steps ahead.
    pub taps: Vec<(usize, isize)>,
}

/// What a tap does for one row: `len` steps from `input` make those from `output`, in values of the
/// slices' beginnings.
struct Span {
    tap: usize,
    input: usize,
    output: usize,
    len: usize,
}

impl Plane {
    /// Taps of a convolution of width `kernel` in time alone, around the step.
    pub fn line(kernel: usize) -> Vec<(usize, isize)> {
        (0..kernel).map(|tap| (0, tap as isize - (kernel / 2) as isize)).collect()
    }

    /// Values of the output.
    pub fn output_len(&self) -> usize {
        (self.rows - self.first) * self.steps * self.outputs
    }

    fn spans(&self) -> impl Iterator<Item = Span> {
        self.taps.iter().enumerate().flat_map(move |(tap, &(back, ahead))| {
            let skipped = ahead.unsigned_abs();
            let (from, to) = if ahead < 0 { (0, skipped) } else { (skipped, 0) };
            (self.first.max(back)..self.rows).filter(move |_| skipped < self.steps).map(move |row| Span {
                tap,
                input: ((row - back) * self.steps + from) * self.inputs,
                output: ((row - self.first) * self.steps + to) * self.outputs,
                len: self.steps - skipped,
            })
        })
    }

    fn weight<'a>(&self, weight: &'a [f32], tap: usize) -> &'a [f32] {
        let size = self.inputs * self.outputs;
        &weight[tap * size..(tap + 1) * size]
    }
}

/// `weight` is `[taps, inputs, outputs]`; gives `[rows − first, steps, outputs]`.
pub fn forward(plane: &Plane, x: &[f32], weight: &[f32]) -> Vec<f32> {
    let (wide, tall) = (Strides::rows(plane.outputs), Strides::rows(plane.inputs));
    let mut y = vec![0.0; plane.output_len()];
    for span in plane.spans() {
        let shape = (span.len, plane.inputs, plane.outputs);
        let weight = plane.weight(weight, span.tap);
        matmul_add(shape, (&x[span.input..], tall), (weight, wide), (&mut y[span.output..], wide));
    }
    y
}

/// From the gradient of the output to that of the input; adds that of the weight to `d_weight`.
pub fn backward(plane: &Plane, x: &[f32], weight: &[f32], dy: &[f32], d_weight: &mut [f32]) -> Vec<f32> {
    let (wide, tall) = (Strides::rows(plane.outputs), Strides::rows(plane.inputs));
    let mut dx = vec![0.0; x.len()];
    let size = plane.inputs * plane.outputs;
    for span in plane.spans() {
        let (x, dy) = (&x[span.input..], &dy[span.output..]);
        let back = (span.len, plane.outputs, plane.inputs);
        matmul_add(back, (dy, wide), (plane.weight(weight, span.tap), wide.t()), (&mut dx[span.input..], tall));
        let d_weight = &mut d_weight[span.tap * size..][..size];
        matmul_add((plane.inputs, span.len, plane.outputs), (x, tall.t()), (dy, wide), (d_weight, wide));
    }
    dx
}
