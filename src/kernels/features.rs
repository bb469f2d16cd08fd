//! The mel's features, as the conditioners of a flow read them.

use super::quantise::{Numbers, QuantisedRows};
use super::rows::Rows;

/// Rows of features, by frame or by step, that are still needed: in f32, and if conditioners want them so, in short
/// numbers, once for all of them.
pub struct Features {
    rows: Rows,
    short: Option<QuantisedRows>,
}

impl Features {
    /// No rows yet, of `width` values each; in such short numbers as well.
    pub(crate) fn new(width: usize, numbers: Option<Numbers>) -> Self {
        Self { rows: Rows::new(width), short: numbers.map(|numbers| QuantisedRows::new(numbers, width)) }
    }

    /// Puts whole rows at the end.
    pub fn extend(&mut self, rows: &[f32]) {
        self.rows.extend(rows);
        if let Some(short) = &mut self.short {
            short.extend(rows);
        }
    }

    /// Forgets the rows before a place.
    pub fn forget(&mut self, before: usize) {
        self.rows.forget(before);
        if let Some(short) = &mut self.short {
            short.forget(before);
        }
    }

    /// In f32.
    pub fn rows(&self) -> &Rows {
        &self.rows
    }

    /// In short numbers.
    ///
    /// # Panics
    /// If they weren't made for such conditioners.
    pub(super) fn short(&self) -> &QuantisedRows {
        self.short.as_ref().expect("features in short numbers for conditioners that read them")
    }
}
