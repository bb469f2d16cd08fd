//! Weight norm, `w = g · v / ‖v‖` per column, forward and backward: few passes over matrices that are read from memory.
//!
//! Salimans and Kingma 2016. Columns are summed over 128 rows at a time and those sums in their order, so that
//! results don't depend on threads.

use multiversion::multiversion;
use rayon::prelude::*;

/// Rows that are summed by themselves.
const ROWS: usize = 128;

/// `v` `[rows, columns]` brought to columns of the norms `g`.
///
/// # Panics
/// If `v` isn't whole rows.
pub fn forward(v: &[f32], g: &[f32]) -> Vec<f32> {
    let columns = g.len();
    let scales: Vec<_> = summed(v, v, columns).iter().zip(g).map(|(sum, g)| g / sum.sqrt()).collect();
    let mut w = vec![0.0; v.len()];
    w.par_chunks_mut(ROWS * columns).zip(v.par_chunks(ROWS * columns)).for_each(|(w, v)| {
        for (w, v) in w.chunks_exact_mut(columns).zip(v.chunks_exact(columns)) {
            w.iter_mut().zip(v).zip(&scales).for_each(|((w, v), scale)| *w = v * scale);
        }
    });
    w
}

/// Gradients of `v` and of `g`, from those of `w`.
///
/// # Panics
/// As [`forward`]; if `dw` isn't as large as `v`.
pub fn backward(v: &[f32], g: &[f32], dw: &[f32]) -> (Vec<f32>, Vec<f32>) {
    assert_eq!(v.len(), dw.len());
    let columns = g.len();
    let (squares, dots) = (summed(v, v, columns), summed(v, dw, columns));
    let norms: Vec<_> = squares.iter().map(|sum| sum.sqrt()).collect();
    let dg: Vec<_> = dots.iter().zip(&norms).map(|(dot, norm)| dot / norm).collect();
    // dv = g / ‖v‖ · (dw − v · (v · dw) / ‖v‖²)
    let scales: Vec<_> = g.iter().zip(&norms).map(|(g, norm)| g / norm).collect();
    let parts: Vec<_> = dots.iter().zip(&squares).map(|(dot, square)| dot / square).collect();
    let mut dv = vec![0.0; v.len()];
    let rows = v.par_chunks(ROWS * columns).zip(dw.par_chunks(ROWS * columns));
    dv.par_chunks_mut(ROWS * columns).zip(rows).for_each(|(dv, (v, dw))| {
        for ((dv, v), dw) in dv.chunks_exact_mut(columns).zip(v.chunks_exact(columns)).zip(dw.chunks_exact(columns)) {
            for ((((dv, v), dw), scale), part) in dv.iter_mut().zip(v).zip(dw).zip(&scales).zip(&parts) {
                *dv = scale * (dw - v * part);
            }
        }
    });
    (dv, dg)
}

/// `Σ a · b` of each column.
fn summed(a: &[f32], b: &[f32], columns: usize) -> Vec<f32> {
    assert!(a.len().is_multiple_of(columns));
    let parts: Vec<_> = a
        .par_chunks(ROWS * columns)
        .zip(b.par_chunks(ROWS * columns))
        .map(|(a, b)| {
            let mut sums = vec![0.0; columns];
            add_products(&mut sums, a, b);
            sums
        })
        .collect();
    let mut sums = vec![0.0; columns];
    parts.iter().for_each(|part| super::add(&mut sums, part));
    sums
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn add_products(sums: &mut [f32], a: &[f32], b: &[f32]) {
    let columns = sums.len();
    for (a, b) in a.chunks_exact(columns).zip(b.chunks_exact(columns)) {
        sums.iter_mut().zip(a).zip(b).for_each(|((sum, a), b)| *sum += a * b);
    }
}
