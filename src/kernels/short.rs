//! Matrices in numbers shorter than f32, whichever they are.

use super::bfloat::BfloatPanels;
use super::choice::Kernel;
use super::integer::IntegerPanels;
use super::product::{Panels, Start};
use super::quantise::{Input, Numbers};

/// A matrix and a bias in panels of short numbers.
#[derive(Debug)]
pub(crate) struct ShortPanels {
    depth: usize,
    row_width: usize,
    values: Values,
}

#[derive(Debug)]
enum Values {
    /// [`super::integer`].
    Integers(IntegerPanels),
    /// [`super::bfloat`].
    Bfloats(BfloatPanels),
}

impl ShortPanels {
    /// Whether these kernels have a form in short numbers: on Arm f32 is as fast.
    pub fn exist_for(kernel: Kernel) -> bool {
        kernel != Kernel::Neon
    }

    /// Panels rounded; `widths`: of the rows that meet the matrix, one after the other, every tap's.
    ///
    /// # Panics
    /// If the widths don't add up to the matrix's rows, or the kernel has no form in short numbers.
    pub fn new(numbers: Numbers, panels: &Panels, widths: &[usize]) -> Self {
        assert!(Self::exist_for(panels.kernel()) && widths.iter().sum::<usize>() == panels.depth());
        let values = match numbers {
            Numbers::Integers | Numbers::Bytes => Values::Integers(IntegerPanels::new(numbers, panels, widths)),
            Numbers::Bfloats => Values::Bfloats(BfloatPanels::new(panels, widths)),
        };
        Self { depth: panels.depth(), row_width: panels.row_width(), values }
    }

    /// As [`Panels::product`].
    ///
    /// # Panics
    /// If inputs, start or answer have too few values.
    pub fn product(&self, count: usize, inputs: &[Input], start: Start, out: (&mut [f32], usize)) {
        match &self.values {
            Values::Integers(panels) => panels.product(count, inputs, start, out),
            Values::Bfloats(panels) => panels.product(count, inputs, start, out),
        }
    }

    /// Rows of the matrix.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// As [`Panels::row_width`].
    pub fn row_width(&self) -> usize {
        self.row_width
    }
}
