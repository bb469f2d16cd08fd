//! Convolutions over rows and steps as one node of candle's graph, with a right gradient at any batch.

use super::node::{values, with_values};
use super::wavenet::matmul;
use crate::kernels::plane::{self as kernel, Plane};
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// `x` `[batch, rows, steps, in]`, `weight` `[taps, in, out]`, `taps` as in [`Plane`] →
/// `[batch, rows − first, steps, out]`. Fused on the CPU, tensor operations elsewhere.
///
/// # Errors
/// If the shapes don't fit.
pub fn convolve(x: &Tensor, weight: &Tensor, taps: &[(usize, isize)], first: usize) -> Result<Tensor> {
    let (_, rows, steps, inputs) = x.dims4()?;
    let (count, width, outputs) = weight.dims3()?;
    if count != taps.len() || width != inputs || first >= rows {
        candle_core::bail!("convolution: {:?} does not fit {} taps {:?}", x.dims(), taps.len(), weight.dims())
    }
    if !x.device().is_cpu() {
        return convolve_graph(x, weight, taps, first);
    }
    let plane = Plane { rows, first, steps, inputs, outputs, taps: taps.to_vec() };
    x.contiguous()?.apply_op2(&weight.contiguous()?, Convolve(plane))
}

/// The definition of [`convolve`] in tensor operations of any device.
pub fn convolve_graph(x: &Tensor, weight: &Tensor, taps: &[(usize, isize)], first: usize) -> Result<Tensor> {
    let (batch, rows, steps, inputs) = x.dims4()?;
    let outputs = weight.dim(2)?;
    let top = taps.iter().map(|tap| tap.0).max().unwrap_or(0);
    let side = taps.iter().map(|tap| tap.1.unsigned_abs()).max().unwrap_or(0);
    let padded = x.pad_with_zeros(1, top, 0)?.pad_with_zeros(2, side, side)?;
    let mut y = Tensor::zeros((batch, (rows - first) * steps, outputs), x.dtype(), x.device())?;
    for (tap, &(back, ahead)) in taps.iter().enumerate() {
        let rows = padded.narrow(1, top + first - back, rows - first)?;
        let met = rows.narrow(2, (side as isize + ahead) as usize, steps)?.contiguous()?;
        y = (y + matmul(&met.reshape((batch, (), inputs))?, &weight.get(tap)?)?)?;
    }
    y.reshape((batch, rows - first, steps, outputs))
}

struct Convolve(Plane);

impl CustomOp2 for Convolve {
    fn name(&self) -> &'static str {
        "convolve"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, w: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, w, plane) = (values(x, xl)?, values(w, wl)?, &self.0);
        let item = plane.rows * plane.steps * plane.inputs;
        let y: Vec<_> = x.par_chunks(item).map(|x| kernel::forward(plane, x, w)).collect();
        let shape = (xl.dims()[0], plane.rows - plane.first, plane.steps, plane.outputs);
        Ok((CpuStorage::F32(y.concat()), shape.into()))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let plane = &self.0;
        let item = plane.rows * plane.steps * plane.inputs;
        let gradients: Vec<_> = with_values([x, w, &dy.contiguous()?], |[x, w, dy]| {
            let items = x.par_chunks(item).zip(dy.par_chunks(plane.output_len()));
            let gradient = |(x, dy)| {
                let mut d_weight = vec![0.0; w.len()];
                (kernel::backward(plane, x, w, dy, &mut d_weight), d_weight)
            };
            items.map(gradient).collect()
        })?;
        let (mut dx, mut dw) = (Vec::with_capacity(x.elem_count()), vec![0.0; w.elem_count()]);
        for (x, w) in gradients {
            dx.extend_from_slice(&x);
            dw.iter_mut().zip(w).for_each(|(sum, w)| *sum += w);
        }
        let device = x.device();
        Ok((Some(Tensor::from_vec(dx, x.shape(), device)?), Some(Tensor::from_vec(dw, w.shape(), device)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn fused_convolution_equals_its_graph_in_values_and_gradients() {
        let some = |n: usize| (0..n).map(|i| ((i * 7919 + 5) % 1000) as f32 / 500.0 - 1.0).collect::<Vec<_>>();
        for (rows, first, steps) in [(1, 0, 9), (4, 0, 7), (4, 3, 7), (3, 2, 1)] {
            let taps = [(0, 0), (1, -2), (2, 1), (0, 3), (5, 0)];
            let x = Var::from_vec(some(3 * rows * steps * 4), (3, rows, steps, 4), &Device::Cpu).unwrap();
            let w = Var::from_vec(some(5 * 4 * 6), (5, 4, 6), &Device::Cpu).unwrap();
            let off = |a: &Tensor, b: &Tensor| {
                (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap()
            };
            let fused = convolve(&x, &w, &taps, first).unwrap();
            let graph = convolve_graph(&x, &w, &taps, first).unwrap();
            assert!(off(&fused, &graph) < 1e-5);
            let weight = Tensor::from_vec(some(fused.elem_count()), fused.shape(), &Device::Cpu).unwrap();
            let grads = |y: &Tensor| (y * &weight).unwrap().sum_all().unwrap().backward().unwrap();
            let (a, b) = (grads(&fused), grads(&graph));
            for var in [&x, &w] {
                assert!(off(a.get(var).unwrap(), b.get(var).unwrap()) < 1e-4);
            }
        }
    }
}
