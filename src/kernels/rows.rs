//! The rows of a sequence that are still needed.

use std::ops::Range;

/// The rows of a sequence that are still needed, by their place in the whole sequence.
#[derive(Clone, Debug)]
pub struct Rows<T = f32> {
    /// From the first row kept on; behind the last one there may be more, of no meaning.
    values: Vec<T>,
    width: usize,
    /// Place of the first row in `values`.
    base: usize,
    /// Place of the first row that is still needed.
    first: usize,
    /// One past the place of the last row.
    end: usize,
}

impl<T: Copy + Default> Rows<T> {
    /// No rows yet, of `width` values each.
    pub fn new(width: usize) -> Self {
        Self { values: Vec::new(), width, base: 0, first: 0, end: 0 }
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
        self.end
    }

    /// Puts whole rows at the end.
    pub fn extend(&mut self, rows: &[T]) {
        debug_assert!(rows.len().is_multiple_of(self.width));
        self.room(rows.len() / self.width).copy_from_slice(rows);
    }

    /// Makes `count` rows of zeros at the end and gives them.
    pub fn grow(&mut self, count: usize) -> &mut [T] {
        let rows = self.room(count);
        rows.fill(T::default());
        rows
    }

    /// Makes room for `count` rows at the end and gives it, with whatever lies there: all of it is to be written over.
    pub fn room(&mut self, count: usize) -> &mut [T] {
        let from = (self.end - self.base) * self.width;
        self.end += count;
        let to = (self.end - self.base) * self.width;
        if self.values.len() < to {
            self.values.resize(to, T::default());
        }
        &mut self.values[from..to]
    }

    /// Rows by their places.
    ///
    /// # Panics
    /// If one hasn't come yet. Forgotten ones may be anything.
    pub fn get(&self, places: Range<usize>) -> &[T] {
        &self.values[(places.start - self.base) * self.width..(places.end - self.base) * self.width]
    }

    /// Rows by their places, to be changed.
    ///
    /// # Panics
    /// If one hasn't come yet. Forgotten ones may be anything.
    pub fn get_mut(&mut self, places: Range<usize>) -> &mut [T] {
        &mut self.values[(places.start - self.base) * self.width..(places.end - self.base) * self.width]
    }

    /// Forgets the rows before a place.
    pub fn forget(&mut self, before: usize) {
        self.first = before.clamp(self.first, self.end);
        // moved together only when more is dead than alive: each row is moved once or less on average
        let (dead, all) = ((self.first - self.base) * self.width, (self.end - self.base) * self.width);
        if 2 * dead > all {
            self.values.copy_within(dead..all, 0);
            self.base = self.first;
        }
    }
}
