//! Weight norm as one node of candle's graph.

use super::node::{values, with_values};
use crate::kernels::weight_norm as kernel;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

/// `magnitude · v / ‖v‖`, norms per output: `v` `[…, out]`, `magnitude` `[out]`. Fused on the CPU, tensor operations
/// elsewhere.
///
/// # Errors
/// If the shapes don't fit.
pub fn normed(v: &Tensor, magnitude: &Tensor) -> Result<Tensor> {
    if v.dims().last() != Some(&magnitude.elem_count()) {
        candle_core::bail!("weight norm: {:?} does not fit {:?}", v.dims(), magnitude.dims())
    }
    if !v.device().is_cpu() {
        return normed_graph(v, magnitude);
    }
    v.contiguous()?.apply_op2(&magnitude.contiguous()?, WeightNorm)
}

/// The definition of [`normed`] in tensor operations of any device.
pub fn normed_graph(v: &Tensor, magnitude: &Tensor) -> Result<Tensor> {
    let rows = v.reshape(((), magnitude.elem_count()))?;
    let scale = (magnitude / rows.sqr()?.sum(0)?.sqrt()?)?;
    rows.broadcast_mul(&scale)?.reshape(v.dims())
}

struct WeightNorm;

impl CustomOp2 for WeightNorm {
    fn name(&self) -> &'static str {
        "weight norm"
    }

    fn cpu_fwd(&self, v: &CpuStorage, vl: &Layout, g: &CpuStorage, gl: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(kernel::forward(values(v, vl)?, values(g, gl)?)), vl.shape().clone()))
    }

    fn bwd(&self, v: &Tensor, g: &Tensor, _: &Tensor, dw: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dw = dw.contiguous()?;
        let (dv, dg) = with_values([v, g, &dw], |[v, g, dw]| kernel::backward(v, g, dw))?;
        Ok((Some(Tensor::from_vec(dv, v.shape(), v.device())?), Some(Tensor::from_vec(dg, g.shape(), g.device())?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::params::scattered;
    use candle_core::Var;

    #[test]
    fn fused_it_equals_its_graph_in_values_and_gradients() {
        for dims in [vec![1, 1], vec![3, 7], vec![3, 5, 4], vec![300, 33]] {
            let outputs = dims[dims.len() - 1];
            let v = Var::from_tensor(&scattered(1, 1.0, dims.clone())).unwrap();
            let g = Var::from_tensor(&scattered(2, 1.0, outputs)).unwrap();
            let weight = scattered(3, 1.0, dims);
            let off = |a: &Tensor, b: &Tensor| {
                let distance = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
                assert!(a.dims() == b.dims());
                distance.max(0).unwrap().to_scalar::<f32>().unwrap()
            };
            let (fused, graph) = (normed(&v, &g).unwrap(), normed_graph(&v, &g).unwrap());
            assert!(off(&fused, &graph) < 1e-6);
            let grads = |y: &Tensor| (y * &weight).unwrap().sum_all().unwrap().backward().unwrap();
            let (a, b) = (grads(&fused), grads(&graph));
            for var in [&v, &g] {
                assert!(off(a.get(var).unwrap(), b.get(var).unwrap()) < 1e-5, "{:?}", v.dims());
            }
            assert!(off(a.get(&g).unwrap(), &g.zeros_like().unwrap()) > 0.01);
        }
    }
}
