//! Rows times weights that were laid out once: every product of the flow's inverse.
//!
//! With `L` lanes in a vector, a panel holds `2 L` columns, and all that a tile of rows needs, in the
//! order in which it is needed:
//!
//! ```text
//!           2 L columns                      tile: up to ROWS × 2 L sums in registers
//!         ┌─────────────┐
//!  bias   │ b b b … b b │ ───────────────▶   start: the bias, with or without rows to add to
//!         ├─────────────┤
//!  tap 0  │ w w w … w w │ × row t            for each line of the panel: two vectors of weights,
//!    ⋮    │      ⋮      │                    one input of each row in all lanes, one multiply-add
//!  tap 1  │      ⋮      │ × row t + d        per row and vector
//!    ⋮    │      ⋮      │
//!  mel    │      ⋮      │ × features         the sums are stored once, or gated: in a gated panel
//!         └─────────────┘                    the first L columns are tanh's, the last L σ's, and
//!            next panel                      the tile leaves tanh · σ
//! ```
//!
//! Inputs are time-major rows where they lie: a dilated tap is a row further on, nothing is copied.
//! Each sum is taken in the order of its panel, whatever the rows that go along: the bits of a row
//! depend on its inputs alone.

use super::View;
use super::blocks::{MIN_SHARED, share};
use super::choice::Kernel;
use super::tile::{self, Floats, Job};
use super::vector::Portable;

/// Bytes in a line of the cache, where panels begin.
const LINE: usize = 64;

/// A matrix to lay out: `rows × columns` from `values`, rows `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub values: &'a [f32],
    pub stride: usize,
    pub rows: usize,
}

impl<'a> Matrix<'a> {
    /// Rows one after the other.
    pub fn new(values: &'a [f32], columns: usize) -> Self {
        Self { values, stride: columns, rows: values.len() / columns }
    }
}

/// How the columns of an answer are dealt out to panels.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub kernel: Kernel,
    pub panels: usize,
    /// Values in a row of the answer.
    pub columns: usize,
    pub gated: bool,
}

impl Layout {
    /// So many columns in their order, the last panel filled up.
    ///
    /// # Panics
    /// If the kernel doesn't run here.
    pub fn plain(kernel: Kernel, columns: usize) -> Self {
        assert!(kernel.can_run());
        Self { kernel, panels: columns.div_ceil(2 * lanes(kernel)), columns, gated: false }
    }

    /// Columns of a panel.
    pub fn width(&self) -> usize {
        2 * lanes(self.kernel)
    }

    /// Columns that are worked out: of a last panel in whose second half there are none, the first half alone.
    fn worked_out(&self) -> usize {
        let (all, half) = (self.panels * self.width(), lanes(self.kernel));
        if !self.gated && self.columns + half <= all { all - half } else { all }
    }

    /// A product to do, its rows and lines checked by the caller.
    ///
    /// # Panics
    /// If `count` is 0, or start or answer have too few values.
    pub fn job<'a, L>(&self, count: usize, lines: L, start: Start<'a>, out: (&mut [f32], usize)) -> Job<'a, L> {
        match start {
            Start::Bias | Start::Answer => {}
            Start::Rows(rows, stride) => assert!(rows.len() >= reach(count, stride, self.columns)),
            Start::Between(rows, stride, up, first) => {
                assert!(rows.len() >= reach((first + count - 1) / up + 2, stride, self.worked_out()));
            }
            Start::Held(rows, stride, up, first) => {
                assert!(rows.len() >= reach((first + count - 1) / up + 1, stride, self.worked_out()));
            }
        }
        // gated panels start between rows or with the bias: their columns and the answer's differ
        assert!(!self.gated || matches!(start, Start::Bias | Start::Between(..) | Start::Held(..)));
        assert!(out.0.len() >= reach(count, out.1, self.columns));
        Job { layout: *self, count, lines, start, out: out.0.as_mut_ptr(), stride: out.1 }
    }
}

/// Values from the first of `rows` rows, one at least, to the end of the last.
pub(super) fn reach(rows: usize, stride: usize, width: usize) -> usize {
    (rows - 1) * stride + width
}

/// Matrices one above the other, and a bias, in panels.
#[derive(Debug)]
pub struct Panels {
    layout: Layout,
    /// Panels one after the other, from a line of the cache on.
    values: Vec<f32>,
    begin: usize,
    /// Lines of a panel, without the bias.
    depth: usize,
}

/// Input of a product: rows that are read as they lie.
#[derive(Clone, Copy)]
pub(crate) struct Input<'a> {
    pub rows: &'a [f32],
    /// Values from one row to the next.
    pub stride: usize,
    /// Values from one value of a row to the next: 1, or where rows are columns of what lies there, its width.
    pub step: usize,
    /// Values of a row that are read.
    pub width: usize,
    /// How often rows are read, `dilation` rows further each time.
    pub taps: usize,
    pub dilation: usize,
}

impl<'a> Input<'a> {
    /// Rows one after the other, read once.
    pub fn rows(rows: &'a [f32], width: usize) -> Self {
        Self { rows, stride: width, step: 1, width, taps: 1, dilation: 0 }
    }
}

/// What the products are added to, beside the bias.
#[derive(Clone, Copy)]
pub(crate) enum Start<'a> {
    /// Nothing.
    Bias,
    /// What stands in the answer's rows, and no bias.
    Answer,
    /// Rows and their stride.
    Rows(&'a [f32], usize),
    /// Between rows in the panels' own order of columns, [`Panels::row_width`] of them and more, or without the
    /// second half of the last panel if no column is there: rows, stride, steps per row, and the first step, counted from the first row.
    Between(&'a [f32], usize, usize, usize),
    /// As `Between`, but each row is held for its steps.
    Held(&'a [f32], usize, usize, usize),
}

impl Panels {
    /// The columns of matrices, one above the other, and a bias.
    pub(crate) fn new(kernel: Kernel, columns: usize, bias: &[f32], matrices: &[Matrix]) -> Self {
        Self::pack(kernel, (columns, false), &plain_order(columns, 2 * lanes(kernel)), bias, matrices)
    }

    /// Matrices of `2 · channels` columns whose answer is `tanh(first half) · σ(second half)`.
    pub(crate) fn gated(kernel: Kernel, channels: usize, bias: &[f32], matrices: &[Matrix]) -> Self {
        Self::pack(kernel, (channels, true), &gated_order(kernel, channels, false), bias, matrices)
    }

    /// Matrices that make rows for [`Start::Between`] of gated panels of so many channels: as many side by side
    /// as the bias has columns for.
    pub(crate) fn for_gated(kernel: Kernel, channels: usize, bias: &[f32], matrices: &[Matrix]) -> Self {
        Self::side_by_side(kernel, &gated_order(kernel, channels, false), channels, bias, matrices)
    }

    /// As [`for_gated`](Self::for_gated), rows that are added to those of [`super::single::RowPanels::gated`].
    pub(super) fn for_single(kernel: Kernel, channels: usize, bias: &[f32], matrices: &[Matrix]) -> Self {
        Self::side_by_side(kernel, &gated_order(kernel, channels, true), channels, bias, matrices)
    }

    /// Columns in an order again and again, of `2 · channels` after the other.
    fn side_by_side(kernel: Kernel, one: &[Option<usize>], channels: usize, bias: &[f32], matrices: &[Matrix]) -> Self {
        let firsts = (0..bias.len()).step_by(2 * channels);
        let mut order: Vec<_> =
            firsts.flat_map(|first| one.iter().map(move |from| from.map(|from| first + from))).collect();
        let columns = order.len();
        order.resize(columns.next_multiple_of(2 * lanes(kernel)), None);
        Self::pack(kernel, (columns, false), &order, bias, matrices)
    }

    /// Views of so many rows, one above the other, and a bias, or without one zeros.
    ///
    /// # Panics
    /// If a view doesn't lie within its slice.
    pub(super) fn of_views(kernel: Kernel, columns: usize, bias: &[f32], views: &[(usize, View)]) -> Self {
        assert!(views.iter().all(|(rows, view)| view.0.len() >= view.1.end(*rows, columns)));
        let layout = Layout::plain(kernel, columns);
        let (width, depth) = (layout.width(), views.iter().map(|(rows, _)| rows).sum());
        let (mut values, begin) = from_a_line(layout.panels * (depth + 1) * width);
        values.resize(begin + layout.panels * (depth + 1) * width, 0.0);
        for (panel, lines) in values[begin..].chunks_exact_mut((depth + 1) * width).enumerate() {
            let columns = panel * width..columns.min((panel + 1) * width);
            let (own, mut lines) = lines.split_at_mut(width);
            own.iter_mut().zip(bias.iter().skip(columns.start)).for_each(|(own, bias)| *own = *bias);
            for &(rows, (values, strides)) in views {
                let of_view;
                (of_view, lines) = lines.split_at_mut(rows * width);
                for (row, line) in of_view.chunks_exact_mut(width).enumerate() {
                    let from = &values[row * strides.row + columns.start * strides.column..];
                    match strides.column {
                        1 => line[..columns.len()].copy_from_slice(&from[..columns.len()]),
                        apart => {
                            line[..columns.len()].iter_mut().zip(from.iter().step_by(apart)).for_each(|(w, v)| *w = *v)
                        }
                    }
                }
            }
        }
        Self { layout, values, begin, depth }
    }

    fn pack(
        kernel: Kernel,
        (columns, gated): (usize, bool),
        order: &[Option<usize>],
        bias: &[f32],
        matrices: &[Matrix],
    ) -> Self {
        let layout = Layout { kernel, panels: order.len() / (2 * lanes(kernel)), columns, gated };
        let widths = std::iter::repeat_n(2 * lanes(kernel), layout.panels);
        let (values, begin) = packed(kernel, order, widths, bias, matrices);
        Self { layout, values, begin, depth: matrices.iter().map(|m| m.rows).sum() }
    }

    /// The matrices' first `rows` rows and the bias, whose answer has the panels' own order of columns, to be the
    /// [`Start::Held`] of the other rows, which have no bias.
    pub(super) fn split(&self, rows: usize) -> [Self; 2] {
        let (Layout { panels, .. }, width) = (self.layout, self.layout.width());
        let part = |layout, depth: usize, lines: &dyn Fn(&[f32], &mut Vec<f32>)| {
            let (mut values, begin) = from_a_line(panels * (depth + 1) * width);
            self.lines().for_each(|panel| lines(panel, &mut values));
            Self { layout, values, begin, depth }
        };
        let first = Layout { columns: self.row_width(), gated: false, ..self.layout };
        [
            part(first, rows, &|panel, values| values.extend_from_slice(&panel[..(rows + 1) * width])),
            part(self.layout, self.depth - rows, &|panel, values| {
                values.resize(values.len() + width, 0.0);
                values.extend_from_slice(&panel[(rows + 1) * width..]);
            }),
        ]
    }

    /// Values in a row of the answer.
    pub fn columns(&self) -> usize {
        self.layout.columns
    }

    /// Rows of the matrices.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// The kernels that these panels are for.
    pub fn kernel(&self) -> Kernel {
        self.layout.kernel
    }

    /// Columns of all panels, those that fill the last one up among them.
    pub fn row_width(&self) -> usize {
        self.layout.panels * self.layout.width()
    }

    /// How columns are dealt out.
    pub(super) fn layout(&self) -> Layout {
        self.layout
    }

    /// The lines of each panel, the bias in front.
    pub(super) fn lines(&self) -> impl Iterator<Item = &[f32]> {
        self.values[self.begin..].chunks_exact((self.depth + 1) * self.layout.width())
    }

    /// The answer's first `count` rows, `stride` apart in `out`.
    ///
    /// # Panics
    /// If inputs, start or answer have too few values.
    pub(crate) fn product(&self, count: usize, inputs: &[Input], start: Start, out: (&mut [f32], usize)) {
        if count == 0 {
            return;
        }
        self.assert_fit(count, inputs);
        let lines = Floats { panels: self.values[self.begin..].as_ptr(), depth: self.depth, inputs };
        let job = self.layout.job(count, lines, start, out);
        // SAFETY: the assertions, here and of the job, keep every address within its slice.
        unsafe { run(&job) }
    }

    /// `count` rows from the bias, one after the other. Of several threads each reads panels of its own: for weights that
    /// are far more than what meets them.
    ///
    /// # Panics
    /// As [`product`](Self::product), or if the panels are gated.
    pub(crate) fn shared(&self, threads: usize, count: usize, inputs: &[Input], out: &mut [f32]) {
        let Layout { panels, columns, gated, .. } = self.layout;
        assert!(!gated);
        let macs = count * self.depth * columns;
        let (threads, width) = (if macs >= MIN_SHARED { threads } else { 1 }, self.layout.width());
        if threads == 1 {
            self.product(count, inputs, Start::Bias, (out, columns));
            return;
        }
        self.assert_fit(count, inputs);
        let lines = |first: usize| {
            let panels = self.values[self.begin + first * (self.depth + 1) * width..].as_ptr();
            Floats { panels, depth: self.depth, inputs }
        };
        let out = Shared(self.layout.job(count, lines(0), Start::Bias, (out, columns)).out);
        let each = panels.div_ceil(threads);
        share(threads, (0..panels).step_by(each), |first| {
            let panels = each.min(panels - first);
            let columns = panels * width;
            let layout = Layout { panels, columns: columns.min(self.layout.columns - first * width), ..self.layout };
            // SAFETY: the whole job was checked, and this is the part of it that writes these panels' columns.
            unsafe {
                let (out, stride) = (out.pointer().add(first * width), self.layout.columns);
                run(&Job { layout, count, lines: lines(first), start: Start::Bias, out, stride });
            }
        });
    }

    /// That rows are there for a product, one at least.
    fn assert_fit(&self, count: usize, inputs: &[Input]) {
        assert!(inputs.iter().map(|i| i.width * i.taps).sum::<usize>() == self.depth);
        for i in inputs {
            let width = if i.width == 0 { 0 } else { (i.width - 1) * i.step + 1 };
            assert!(i.rows.len() >= reach(count + (i.taps - 1) * i.dilation, i.stride, width));
        }
    }
}

/// Where threads write, each its own columns.
struct Shared(*mut f32);

impl Shared {
    fn pointer(&self) -> *mut f32 {
        self.0
    }
}

// SAFETY: whoever writes through it from several threads writes to different places.
unsafe impl Sync for Shared {}

/// A job on the kernels that its panels are for.
///
/// # Safety
/// The job must be checked; panels exist only for kernels that run here.
unsafe fn run(job: &Job<Floats>) {
    // SAFETY: the caller's promise.
    unsafe {
        match job.layout.kernel {
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => tile::avx2(job),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512 => tile::avx512(job),
            #[cfg(target_arch = "aarch64")]
            Kernel::Neon => tile::neon(job),
            _ => tile::run::<Portable>(job),
        }
    }
}

/// The lines of panels, a bias in front of each panel's, from a line of the cache on, and where that is: of columns in an
/// order, `None` to fill up, in panels so wide.
///
/// # Panics
/// If the kernel doesn't run here.
pub(super) fn packed(
    kernel: Kernel,
    mut order: &[Option<usize>],
    widths: impl Iterator<Item = usize>,
    bias: &[f32],
    matrices: &[Matrix],
) -> (Vec<f32>, usize) {
    assert!(kernel.can_run());
    let depth: usize = matrices.iter().map(|m| m.rows).sum();
    let (mut values, begin) = from_a_line(order.len() * (depth + 1));
    for columns in widths.map_while(|width| order.split_off(..width)) {
        let lines = matrices.iter().flat_map(|m| m.values.chunks(m.stride).take(m.rows));
        for line in std::iter::once(bias).chain(lines) {
            values.extend(columns.iter().map(|from| from.map_or(0.0, |from| line[from])));
        }
    }
    (values, begin)
}

/// Room for so many values from a line of the cache on, and where that is: all before it is there.
pub(super) fn from_a_line<T: Copy + Default>(count: usize) -> (Vec<T>, usize) {
    let line = LINE / size_of::<T>();
    let mut values: Vec<T> = Vec::with_capacity(count + line);
    let begin = values.as_ptr().align_offset(LINE).min(line);
    values.resize(begin, T::default());
    (values, begin)
}

/// Values in a vector of a set of kernels.
pub(super) fn lanes(kernel: Kernel) -> usize {
    match kernel {
        Kernel::Scalar | Kernel::Neon => 4,
        Kernel::Avx2 => 8,
        Kernel::Avx512 => 16,
    }
}

/// Source columns of panels that aren't gated, filled up to a multiple.
pub(super) fn plain_order(columns: usize, multiple: usize) -> Vec<Option<usize>> {
    (0..columns.next_multiple_of(multiple)).map(|i| (i < columns).then_some(i)).collect()
}

/// Source columns of gated panels: tanh's that fill a vector, and as many of σ's, again and again. With `halves` those that
/// are left, if they fill half a vector or less, share one.
pub(super) fn gated_order(kernel: Kernel, channels: usize, halves: bool) -> Vec<Option<usize>> {
    let lanes = lanes(kernel);
    let panel = |first: usize| {
        let width = if halves && channels - first <= lanes / 2 { lanes / 2 } else { lanes };
        let some = move |from: usize| (first..first + width).map(move |i| (i < channels).then_some(from + i));
        some(0).chain(some(channels))
    };
    (0..channels).step_by(lanes).flat_map(panel).collect()
}

#[cfg(test)]
mod tests {
    use super::super::testing::values;
    use super::*;

    /// One convolution with a second input, for every start: (rows, taps, dilation, width, second, columns).
    const SHAPES: [[usize; 6]; 9] = [
        [1, 1, 0, 1, 1, 1],
        [2, 3, 5, 3, 2, 7],
        [5, 3, 1, 8, 1, 16],
        [13, 5, 2, 10, 9, 33],
        [29, 3, 4, 17, 64, 64],
        [70, 1, 0, 64, 3, 130],
        [7, 3, 8, 100, 31, 12],
        [4, 2, 1, 11, 5, 500],
        [1, 3, 2, 7, 2, 85],
    ];

    #[test]
    fn threads_share_columns() {
        // (rows, depth, columns), each large enough to be shared
        for [rows, depth, columns] in [[1, 70, 16_000], [5, 64, 4_000], [33, 320, 131]] {
            let (x, w, bias) = (values(rows * depth, 1), values(depth * columns, 2), values(columns, 3));
            for kernel in Kernel::tested(rows * depth * columns) {
                let panels = Panels::new(kernel, columns, &bias, &[Matrix::new(&w, columns)]);
                let (input, mut expected) = ([Input::rows(&x, depth)], vec![0.0; rows * columns]);
                panels.product(rows, &input, Start::Bias, (&mut expected, columns));
                for threads in [1, 2, 3, 200] {
                    let mut out = vec![f32::NAN; rows * columns];
                    panels.shared(threads, rows, &input, &mut out);
                    assert!(out == expected, "{}: {rows} × {depth} × {columns} on {threads}", kernel.name());
                }
            }
        }
    }

    #[test]
    fn panels_compute_what_they_stand_for() {
        for kernel in Kernel::tested(0) {
            for [rows, taps, dilation, width, second, columns] in SHAPES {
                let (x, y) = (values((rows + (taps - 1) * dilation) * width, 1), values(rows * second, 2));
                let (conv, more) = (values(taps * width * columns, 3), values(second * columns, 4));
                let bias = values(columns, 5);
                let matrices = [Matrix::new(&conv, columns), Matrix::new(&more, columns)];
                let panels = Panels::new(kernel, columns, &bias, &matrices);
                let input = [Input { taps, dilation, ..Input::rows(&x, width) }, Input::rows(&y, second)];
                let sum = |t: usize, j: usize| {
                    let tap = |k: usize| x[(t + k * dilation) * width..][..width].iter();
                    let conv = (0..taps).flat_map(tap).enumerate().map(|(i, x)| x * conv[i * columns + j]);
                    let more = (0..second).map(|i| y[t * second + i] * more[i * columns + j]);
                    conv.chain(more).map(f64::from).sum::<f64>()
                };
                let stride = columns + 3;
                let before = values(rows * stride, 6);
                for start in [Start::Bias, Start::Answer, Start::Rows(&before, stride)] {
                    let mut out = before.clone();
                    panels.product(rows, &input, start, (&mut out, stride));
                    for (i, (out, before)) in out.iter().zip(&before).enumerate() {
                        let (t, j) = (i / stride, i % stride);
                        let expected = match start {
                            _ if j >= columns => f64::from(*before),
                            Start::Bias => f64::from(bias[j]) + sum(t, j),
                            Start::Answer => f64::from(*before) + sum(t, j),
                            _ => f64::from(bias[j] + before) + sum(t, j),
                        };
                        let error = (f64::from(*out) - expected).abs();
                        // half a unit of f32 for each addition, of sums that stay below 60
                        assert!(error < 2e-4, "{}: row {t}, column {j} of {columns}: {error}", kernel.name());
                    }
                    // the bits don't depend on the company
                    for (from, to) in [(rows / 3, rows - rows / 5), (rows / 2, rows / 2 + 1)] {
                        let mut part = before[from * stride..].to_vec();
                        let some =
                            [Input { rows: &x[from * width..], ..input[0] }, Input::rows(&y[from * second..], second)];
                        let start = match start {
                            Start::Rows(rows, stride) => Start::Rows(&rows[from * stride..], stride),
                            start => start,
                        };
                        panels.product(to - from, &some, start, (&mut part, stride));
                        let wanted = &out[from * stride..to * stride];
                        assert!(part[..wanted.len()] == *wanted, "{}: rows {from}..{to}", kernel.name());
                    }
                }
            }
        }
    }

    #[test]
    fn gated_panels_start_between_rows_or_with_held_ones() {
        for kernel in Kernel::tested(0) {
            // single rows of many channels go through panels abreast
            for (channels, up, first, rows) in [
                (1, 4, 3, 9),
                (8, 2, 0, 6),
                (10, 16, 5, 40),
                (37, 32, 31, 13),
                (100, 4, 6, 1),
                (208, 2, 3, 1),
                (20, 4, 6, 1),
                (40, 4, 6, 1),
                (80, 4, 6, 1),
            ] {
                let width = 2 * channels;
                let (x, weight, bias) = (values(rows * 5, 1), values(5 * width, 2), values(width, 3));
                let features = values(((first + rows) / up + 2) * 3, 4);
                let project = values(3 * 2 * width, 5);
                let cond =
                    Panels::for_gated(kernel, channels, &vec![0.0; 2 * width], &[Matrix::new(&project, 2 * width)]);
                let count = features.len() / 3;
                let mut between = vec![0.0; count * cond.columns()];
                cond.product(count, &[Input::rows(&features, 3)], Start::Bias, (&mut between, cond.columns()));

                let panels = Panels::gated(kernel, channels, &bias, &[Matrix::new(&weight, width)]);
                assert_eq!(panels.row_width() * 2, cond.columns());
                // the second of the two layers
                let second = &between[panels.row_width()..];
                for (held, start) in [
                    (false, Start::Between(second, cond.columns(), up, first)),
                    (true, Start::Held(second, cond.columns(), up, first)),
                ] {
                    let mut out = vec![0.0; rows * channels];
                    panels.product(rows, &[Input::rows(&x, 5)], start, (&mut out, channels));
                    for t in 0..rows {
                        let pre = |j: usize| {
                            let row = |r: usize| -> f64 {
                                let term = |i: usize| features[r * 3 + i] * project[i * 2 * width + width + j];
                                (0..3).map(|i| f64::from(term(i))).sum()
                            };
                            let at = (first + t) as f64 + 0.5;
                            let r = (first + t) / up;
                            let part = if held { 0.0 } else { at / up as f64 - r as f64 };
                            let own: f64 = (0..5).map(|i| f64::from(x[t * 5 + i] * weight[i * width + j])).sum();
                            f64::from(bias[j]) + own + row(r) * (1.0 - part) + row(r + 1) * part
                        };
                        for j in 0..channels {
                            let expected = pre(j).tanh() / (1.0 + (-pre(channels + j)).exp());
                            let error = (f64::from(out[t * channels + j]) - expected).abs();
                            assert!(error < 2e-6, "{}: step {t}, channel {j} of {channels}: {error}", kernel.name());
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_gate_is_close_to_f64() {
        for kernel in Kernel::tested(0) {
            let xs: Vec<f32> = (-4000..=4000).map(|i| i as f32 * 0.025).collect();
            let pairs: Vec<f32> = xs.iter().flat_map(|&x| [x, 1.0, 1.0, x, x, x]).collect();
            let identity = Panels::gated(kernel, 1, &[0.0; 2], &[Matrix::new(&[1.0, 0.0, 0.0, 1.0], 2)]);
            let mut out = vec![0.0; pairs.len() / 2];
            identity.product(out.len(), &[Input::rows(&pairs, 2)], Start::Bias, (&mut out, 1));
            for (pair, out) in pairs.chunks_exact(2).zip(out) {
                let (a, b) = (f64::from(pair[0]), f64::from(pair[1]));
                let error = (f64::from(out) - a.tanh() / (1.0 + (-b).exp())).abs();
                assert!(error < 3e-7, "{}: {pair:?}: {error}", kernel.name());
            }
        }
    }
}
