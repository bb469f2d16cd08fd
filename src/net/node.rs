//! Tensors' values on the CPU, for nodes of our own in candle's graph and for the optimiser.

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Storage, Tensor};
use std::cell::Cell;

/// A contiguous f32 tensor's values.
///
/// # Errors
/// If it is of another kind.
pub fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(&storage.as_slice::<f32>()?[from..to]),
        None => candle_core::bail!("tensors must be contiguous"),
    }
}

/// What `f` makes of the values of contiguous f32 tensors on the CPU.
///
/// # Errors
/// If one is of another kind.
pub fn with_values<const N: usize, T>(tensors: [&Tensor; N], f: impl FnOnce([&[f32]; N]) -> T) -> Result<T> {
    let held = tensors.map(Tensor::storage_and_layout);
    let mut all = [&[][..]; N];
    for (values_of, (storage, layout)) in all.iter_mut().zip(&held) {
        let Storage::Cpu(storage) = &**storage else { candle_core::bail!("tensors must be on the CPU") };
        *values_of = values(storage, layout)?;
    }
    Ok(f(all))
}

/// What `f` makes of the values of a contiguous f32 tensor on the CPU, changing them where they lie.
///
/// # Errors
/// If it is of another kind.
pub fn change<T>(tensor: &Tensor, f: impl FnOnce(&mut [f32]) -> T) -> Result<T> {
    let mut made = None;
    tensor.inplace_op1(&Change(Cell::new(Some(|values: &mut [f32]| made = Some(f(values))))))?;
    made.ok_or_else(|| candle_core::Error::Msg("tensors must be on the CPU".into()))
}

struct Change<F>(Cell<Option<F>>);

impl<F: FnOnce(&mut [f32])> InplaceOp1 for Change<F> {
    fn name(&self) -> &'static str {
        "change"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (CpuStorage::F32(values), Some((from, to))) = (storage, layout.contiguous_offsets()) else {
            candle_core::bail!("only contiguous tensors of f32 are changed in place")
        };
        if let Some(f) = self.0.take() {
            f(&mut values[from..to]);
        }
        Ok(())
    }
}
