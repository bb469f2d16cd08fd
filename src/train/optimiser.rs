//! Adam with decoupled weight decay, global-norm clipping and a running average of the weights.
//!
//! Our own, because candle's hides its moments, so that a run couldn't resume. All state is flat
//! `f32` per parameter, in name order; each parameter is updated in one pass on its own, and norms
//! are summed in a fixed order: results don't depend on the number of threads.

use super::config::Training;
use crate::flow::WHITENING_PREFIX;
use crate::kernels;
use crate::net::Params;
use crate::net::node::{change, with_values};
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use rayon::prelude::*;
use std::collections::HashMap;
use std::ops::Range;

/// Prefix of the whitening net's tensors.
const WHITENING_NET: &str = "whiten.layers.";
/// The whitening net's learning rate, relative to the flow's. The net has been fitted, and all that
/// the flow has learnt stands on its residual; and a step sees tens of frames where the fit saw 512.
const WHITENING_RATE: f32 = 0.1;

/// The optimiser's state. The weights themselves are the parameters' own.
pub struct Optimiser {
    slots: Vec<Slot>,
    config: Training,
    /// Optimiser steps that were taken: Adam's `t`.
    updates: u64,
}

struct Slot {
    name: String,
    var: Var,
    /// Factor on the learning rate.
    rate: f32,
    /// Sum of the accumulated gradients: the backward pass's own tensor, as long as there is but one.
    grad: Option<Tensor>,
    first: Vec<f32>,
    second: Vec<f32>,
    average: Vec<f32>,
}

/// The numbers of one update, the same for all parameters.
struct Update {
    grad_scale: f32,
    lr: f32,
    /// lr · weight decay, without Adam's bias correction.
    decay: f32,
    beta1: f32,
    beta2: f32,
    /// 1 / √(1 − β₂ᵗ)
    second_scale: f32,
    eps: f32,
    average_decay: f32,
}

impl Optimiser {
    /// An optimiser of all parameters, but of the whitening front's only its net's and only if it learns
    /// jointly, with moments zero and the average
    /// at the present weights.
    ///
    /// # Errors
    /// If a parameter can't be read.
    pub fn new(params: &Params, config: &Training) -> Result<Self> {
        let slots = params
            .named()
            .into_iter()
            .filter_map(|(name, var)| match name.starts_with(WHITENING_PREFIX) {
                false => Some((name, var, 1.0)),
                true => {
                    (config.joint_whitening && name.starts_with(WHITENING_NET)).then_some((name, var, WHITENING_RATE))
                }
            })
            .map(|(name, var, rate)| {
                let average: Vec<f32> = var.flatten_all()?.to_vec1()?;
                let zeros = || vec![0.0; average.len()];
                let (first, second) = (zeros(), zeros());
                Ok(Slot { name, var, rate, grad: None, first, second, average })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { slots, config: config.clone(), updates: 0 })
    }

    /// Number of trained values.
    pub fn values(&self) -> usize {
        self.slots.iter().map(|slot| slot.average.len()).sum()
    }

    /// Optimiser steps that were taken.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Adds the gradients of the losses of so many segments, scalars, `share` segments in a graph of its own and
    /// `at_once` graphs at a time among rayon's threads; gives the sum of the losses. They are added up in their order:
    /// the sums don't depend on the threads.
    ///
    /// # Errors
    /// If a loss or its gradients can't be computed.
    pub fn learn(
        &mut self,
        segments: usize,
        (share, at_once): (usize, usize),
        loss: impl Fn(Range<usize>) -> Result<Tensor> + Sync,
    ) -> Result<f64> {
        let parts: Vec<_> = (0..segments).step_by(share).map(|first| first..segments.min(first + share)).collect();
        let mut sum = 0.0;
        for parts in parts.chunks(at_once) {
            let graphs = parts.par_iter().map(|part| {
                let loss = loss(part.clone())?;
                Ok((f64::from(loss.to_scalar::<f32>()?), loss.backward()?))
            });
            for (loss, mut grads) in graphs.collect::<Result<Vec<_>>>()? {
                sum += loss;
                self.accumulate(&mut grads)?;
            }
        }
        Ok(sum)
    }

    /// Adds one backward pass's gradients. A parameter that the loss doesn't reach gets none.
    ///
    /// # Errors
    /// If a gradient can't be read.
    pub fn accumulate(&mut self, grads: &mut GradStore) -> Result<()> {
        let grads: Vec<Option<Tensor>> = self.slots.iter().map(|slot| grads.remove(slot.var.as_tensor())).collect();
        self.slots.par_iter_mut().zip(grads).try_for_each(|(slot, grad)| {
            let Some(grad) = grad else { return Ok(()) };
            let grad = grad.to_device(&Device::Cpu)?.contiguous()?;
            if grad.elem_count() != slot.average.len() || grad.dtype() != DType::F32 {
                return Err(Error::invalid(format!("the gradient of {} has another size or type", slot.name)));
            }
            match &slot.grad {
                Some(sum) => with_values([&grad], |[grad]| change(sum, |sum| kernels::add(sum, grad)))??,
                None => slot.grad = Some(grad),
            }
            Ok(())
        })
    }

    /// Global norm of the accumulated gradients.
    ///
    /// # Errors
    /// If a gradient can't be read.
    pub fn grad_norm(&self) -> Result<f64> {
        let of =
            |slot: &Slot| slot.grad.as_ref().map_or(Ok(0.0), |grad| with_values([grad], |[grad]| square_sum(grad)));
        let squares = self.slots.par_iter().map(of).collect::<candle_core::Result<Vec<f64>>>()?;
        Ok(squares.iter().sum::<f64>().sqrt())
    }

    /// Forgets the accumulated gradients.
    pub fn discard(&mut self) {
        self.slots.iter_mut().for_each(|slot| slot.grad = None);
    }

    /// One step with the accumulated gradients, whose norm is `norm`; forgets them.
    ///
    /// # Errors
    /// If a parameter can't be written.
    pub fn step(&mut self, lr: f64, norm: f64) -> Result<()> {
        self.updates += 1;
        let c = &self.config;
        let t = self.updates as f64;
        // bias corrections: √(1 − β₂ᵗ) / (1 − β₁ᵗ), with eps outside as in Kingma & Ba's algorithm 1
        let update = Update {
            grad_scale: (c.clip_norm / norm.max(c.clip_norm)) as f32,
            lr: (lr / (1.0 - c.beta1.powf(t))) as f32,
            decay: (lr * c.weight_decay) as f32,
            beta1: c.beta1 as f32,
            beta2: c.beta2 as f32,
            second_scale: (1.0 / (1.0 - c.beta2.powf(t)).sqrt()) as f32,
            eps: c.eps as f32,
            // early on the average forgets faster, so that it isn't held back by the first weights
            average_decay: c.ema_decay.min((1.0 + t) / (10.0 + t)) as f32,
        };
        self.slots.par_iter_mut().try_for_each(|slot| slot.update(&update))
    }

    /// The running average of the trained parameters, by name, on `device`.
    ///
    /// # Errors
    /// If a tensor can't be made.
    pub fn averages(&self, device: &Device) -> Result<HashMap<String, Tensor>> {
        self.slots
            .iter()
            .map(|s| Ok((s.name.clone(), Tensor::from_slice(&s.average, s.var.shape(), device)?)))
            .collect()
    }

    /// Moments, average and weights for a checkpoint: `first.NAME`, `second.NAME`, `average.NAME`,
    /// `weight.NAME`.
    ///
    /// # Errors
    /// If a tensor can't be made.
    pub fn state(&self) -> Result<HashMap<String, Tensor>> {
        let mut state = HashMap::new();
        for slot in &self.slots {
            for (kind, values) in slot.parts() {
                let tensor = Tensor::from_slice(values, slot.var.shape(), &Device::Cpu)?;
                state.insert(format!("{kind}.{}", slot.name), tensor);
            }
            state.insert(format!("weight.{}", slot.name), slot.var.copy()?.to_device(&Device::Cpu)?);
        }
        Ok(state)
    }

    /// Takes up a state of [`Optimiser::state`] and puts its weights into the parameters.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn restore(&mut self, state: &HashMap<String, Tensor>, updates: u64) -> Result<()> {
        let read = |slot: &Slot, kind: &str| {
            let (key, shape) = (format!("{kind}.{}", slot.name), slot.var.shape());
            let tensor = state.get(&key).ok_or_else(|| Error::invalid(format!("tensor {key} is missing")))?;
            if tensor.shape() == shape {
                return Ok(tensor);
            }
            let (is, wanted) = (tensor.dims(), shape.dims());
            Err(Error::invalid(format!("tensor {key} has shape {is:?}, expected {wanted:?}")))
        };
        for slot in &mut self.slots {
            let weight = read(slot, "weight")?;
            let flat = |kind| Ok::<_, Error>(read(slot, kind)?.flatten_all()?.to_vec1()?);
            (slot.first, slot.second, slot.average) = (flat("first")?, flat("second")?, flat("average")?);
            slot.var.set(&weight.to_device(slot.var.device())?)?;
            slot.grad = None;
        }
        self.updates = updates;
        Ok(())
    }
}

impl Slot {
    fn parts(&self) -> [(&'static str, &Vec<f32>); 3] {
        [("first", &self.first), ("second", &self.second), ("average", &self.average)]
    }

    fn update(&mut self, u: &Update) -> Result<()> {
        let (var, grad) = (self.var.clone(), self.grad.take());
        let mut update = |weight: &mut [f32]| match &grad {
            Some(grad) => with_values([grad], |[grad]| self.update_by(weight, grad.iter().copied(), u)),
            None => {
                self.update_by(weight, std::iter::repeat(0.0), u);
                Ok(())
            }
        };
        if var.device().is_cpu() {
            return Ok(change(&var, update)??);
        }
        let mut weight: Vec<f32> = var.flatten_all()?.to_vec1()?;
        update(&mut weight)?;
        Ok(var.set(&Tensor::from_vec(weight, var.shape(), var.device())?)?)
    }

    fn update_by(&mut self, weight: &mut [f32], grad: impl Iterator<Item = f32>, u: &Update) {
        let (lr, keep) = (u.lr * self.rate, 1.0 - u.decay * self.rate);
        let states = self.first.iter_mut().zip(&mut self.second).zip(&mut self.average);
        for ((w, ((m, v), average)), g) in weight.iter_mut().zip(states).zip(grad) {
            let grad = g * u.grad_scale;
            *m += (1.0 - u.beta1) * (grad - *m);
            *v += (1.0 - u.beta2) * (grad * grad - *v);
            *w = *w * keep - lr * *m / (v.sqrt() * u.second_scale + u.eps);
            *average += (1.0 - u.average_decay) * (*w - *average);
        }
    }
}

/// Σ v², in lanes of eight so that it vectorises, in f64.
fn square_sum(values: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 8];
    let chunks = values.chunks_exact(8);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(v) * f64::from(v);
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::Recipe;
    use candle_nn::Init;

    fn config() -> Training {
        let mut recipe: Recipe = serde_json::from_str(include_str!("../../assets/recipes/tiny.json")).unwrap();
        recipe.training.weight_decay = 0.1;
        recipe.training.clip_norm = 0.5;
        recipe.training
    }

    /// Graphs of their own add up to the one of all, to the same bits however many there are at a time.
    #[test]
    fn parts_are_the_whole() {
        let after = |learn: &dyn Fn(&mut Optimiser, &Tensor) -> f64| {
            let params = Params::seeded(1, &Device::Cpu);
            let w = params.builder().get_with_hints(50, "w", Init::Randn { mean: 0.0, stdev: 1.0 }).unwrap();
            let mut optimiser = Optimiser::new(&params, &config()).unwrap();
            let loss = learn(&mut optimiser, &w);
            let norm = optimiser.grad_norm().unwrap();
            optimiser.step(0.05, norm).unwrap();
            (loss, norm, w.to_vec1::<f32>().unwrap())
        };
        let part = |w: &Tensor, i: usize| Ok(((w * (0.3 + i as f64))?.exp()?.mean_all()? / 7.0)?);
        let whole = after(&|optimiser, w| {
            let loss = (0..7).map(|i| part(w, i)).reduce(|a, b| Ok((a? + b?)?)).unwrap().unwrap();
            optimiser.accumulate(&mut loss.backward().unwrap()).unwrap();
            f64::from(loss.to_scalar::<f32>().unwrap())
        });
        let parts = |at_once| after(&|optimiser, w| optimiser.learn(7, (1, at_once), |i| part(w, i.start)).unwrap());
        let one = parts(1);
        assert!((one.0 - whole.0).abs() < 1e-5 * whole.0 && (one.1 - whole.1).abs() < 1e-5 * whole.1);
        assert!(one.2.iter().zip(&whole.2).all(|(a, b)| (a - b).abs() < 1e-5));
        for at_once in [2, 3, 7, 20] {
            assert_eq!(parts(at_once), one, "{at_once} at once");
        }
    }

    /// Adam in f64, straight from the paper.
    #[test]
    fn follows_adam() {
        let params = Params::seeded(1, &Device::Cpu);
        let w = params.builder().get_with_hints(3, "w", Init::Const(1.0)).unwrap();
        let c = config();
        let mut optimiser = Optimiser::new(&params, &c).unwrap();
        let target = Tensor::new(&[3f32, -2.0, 0.5], &Device::Cpu).unwrap();
        let (mut x, mut m, mut v) = ([1f64; 3], [0f64; 3], [0f64; 3]);
        for t in 1..=20 {
            let loss = (&w - &target).unwrap().sqr().unwrap().sum_all().unwrap();
            optimiser.accumulate(&mut loss.backward().unwrap()).unwrap();
            let norm = optimiser.grad_norm().unwrap();
            optimiser.step(0.05, norm).unwrap();
            let g: Vec<f64> = x.iter().zip([3.0, -2.0, 0.5]).map(|(x, t)| 2.0 * (x - t)).collect();
            let norm64 = g.iter().map(|g| g * g).sum::<f64>().sqrt();
            assert!((norm - norm64).abs() < 1e-4);
            for i in 0..3 {
                let g = g[i] * (c.clip_norm / norm64).min(1.0);
                m[i] = c.beta1 * m[i] + (1.0 - c.beta1) * g;
                v[i] = c.beta2 * v[i] + (1.0 - c.beta2) * g * g;
                let (mh, vh) = (m[i] / (1.0 - c.beta1.powi(t)), v[i] / (1.0 - c.beta2.powi(t)));
                x[i] -= 0.05 * (c.weight_decay * x[i] + mh / (vh.sqrt() + c.eps));
            }
            for (ours, x) in w.to_vec1::<f32>().unwrap().iter().zip(x) {
                assert!((f64::from(*ours) - x).abs() < 1e-4, "step {t}: {ours} against {x}");
            }
        }
    }
}
