//! Named parameters: created with seeded values for training, or taken from a file.

use crate::kernels;
use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};

/// The parameters of a model by name, in name order. Cloning shares them.
#[derive(Clone)]
pub struct Params(Arc<Store>);

struct Store {
    state: Mutex<State>,
    device: Device,
    /// Constructors get tensors that no gradient is kept for.
    frozen: bool,
}

struct State {
    vars: BTreeMap<String, Var>,
    source: Source,
}

enum Source {
    /// New values, drawn from this seed and the tensor's name.
    Seed(u64),
    /// Given values; each leaves when it is asked for, so that nothing is held twice.
    Tensors(HashMap<String, Tensor>),
}

impl Params {
    /// Parameters that will be drawn at random: each from `seed` and its own name, so that the
    /// order of construction doesn't matter.
    pub fn seeded(seed: u64, device: &Device) -> Self {
        Self::with(Source::Seed(seed), device, false)
    }

    /// Parameters from tensors that a file gave.
    pub fn loaded(tensors: HashMap<String, Tensor>, device: &Device) -> Self {
        Self::with(Source::Tensors(tensors), device, false)
    }

    /// [`Params::loaded`] for inference: nothing is kept for gradients, so that memory doesn't grow
    /// with the number of steps.
    pub fn frozen(tensors: HashMap<String, Tensor>, device: &Device) -> Self {
        Self::with(Source::Tensors(tensors), device, true)
    }

    fn with(source: Source, device: &Device, frozen: bool) -> Self {
        let state = Mutex::new(State { vars: BTreeMap::new(), source });
        Self(Arc::new(Store { state, device: device.clone(), frozen }))
    }

    /// What constructors of nets take.
    pub fn builder(&self) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), DType::F32, self.0.device.clone())
    }

    /// Every parameter that a constructor has asked for, in name order.
    pub fn named(&self) -> Vec<(String, Var)> {
        self.lock().vars.iter().map(|(name, var)| (name.clone(), var.clone())).collect()
    }

    /// Names in the file that no constructor has asked for, in order.
    pub fn surplus(&self) -> Vec<String> {
        let state = self.lock();
        let Source::Tensors(tensors) = &state.source else { return Vec::new() };
        let mut names: Vec<_> = tensors.keys().cloned().collect();
        names.sort();
        names
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl SimpleBackend for Params {
    fn get(&self, shape: Shape, name: &str, init: Init, _: DType, device: &Device) -> Result<Tensor> {
        let given = |var: &Var| if self.0.frozen { var.as_detached_tensor() } else { var.as_tensor().clone() };
        let mut state = self.lock();
        if let Some(var) = state.vars.get(name) {
            return Ok(given(var));
        }
        let var = match &mut state.source {
            Source::Seed(seed) => Var::from_tensor(&draw(*seed, name, &shape, init, device)?)?,
            Source::Tensors(tensors) => {
                let Some(tensor) = tensors.remove(name) else {
                    candle_core::bail!("tensor {name} {shape:?} is missing")
                };
                if tensor.shape() != &shape {
                    candle_core::bail!("tensor {name} has shape {:?}, expected {:?}", tensor.dims(), shape.dims())
                }
                Var::from_tensor(&tensor.to_device(device)?.to_dtype(DType::F32)?.contiguous()?)?
            }
        };
        let tensor = given(&var);
        state.vars.insert(name.to_string(), var);
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        candle_core::bail!("tensor {name} was asked for without a shape")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        let state = self.lock();
        match &state.source {
            Source::Seed(_) => true,
            Source::Tensors(tensors) => tensors.contains_key(name) || state.vars.contains_key(name),
        }
    }
}

/// A stream of random numbers of its own for each (seed, name): FNV-1a of the name picks the stream.
pub fn named_rng(seed: u64, name: &str) -> ChaCha8Rng {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(hash);
    rng
}

/// Uniform in [0, 1), 24 bits.
pub fn uniform(rng: &mut ChaCha8Rng) -> f32 {
    (rng.next_u32() >> 8) as f32 / (1 << 24) as f32
}

/// Standard normal, by Box and Muller (one value from two uniforms, so that positions are countable).
pub fn normal(rng: &mut ChaCha8Rng) -> f32 {
    kernels::normal::normal([rng.next_u32(), rng.next_u32()])
}

/// Uniform values between `-size` and `size`, the same for the same seed, for tests.
#[cfg(test)]
pub(crate) fn scattered(seed: u64, size: f32, shape: impl Into<Shape>) -> Tensor {
    let (mut rng, shape) = (named_rng(seed, "test"), shape.into());
    let values = (0..shape.elem_count()).map(|_| size * (2.0 * uniform(&mut rng) - 1.0)).collect::<Vec<_>>();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn draw(seed: u64, name: &str, shape: &Shape, init: Init, device: &Device) -> Result<Tensor> {
    let mut rng = named_rng(seed, name);
    let count = shape.elem_count();
    let values: Vec<f32> = match init {
        Init::Const(value) => vec![value as f32; count],
        Init::Randn { mean, stdev } => (0..count).map(|_| mean as f32 + stdev as f32 * normal(&mut rng)).collect(),
        Init::Uniform { lo, up } => (0..count).map(|_| lo as f32 + (up - lo) as f32 * uniform(&mut rng)).collect(),
        Init::Kaiming { .. } => candle_core::bail!("{name}: state the range of the initial values"),
    };
    Tensor::from_vec(values, shape, device)
}
