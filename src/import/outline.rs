//! A model's names and shapes without its values: enough to see whether it fits a design.

use crate::flow::Flow;
use crate::voice::VoiceConfig;
use crate::{Error, Result};
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

/// Shapes by name, and which were asked for.
#[derive(Clone)]
pub(super) struct Outline {
    shapes: Arc<BTreeMap<String, Shape>>,
    asked: Arc<Mutex<BTreeSet<String>>>,
}

impl Outline {
    pub(super) fn of(tensors: &[(String, Tensor)]) -> Self {
        let shapes = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shape().clone())).collect();
        Self { shapes: Arc::new(shapes), asked: Arc::default() }
    }

    /// Numbers in all tensors.
    pub(super) fn values(&self) -> usize {
        self.shapes.values().map(Shape::elem_count).sum()
    }

    /// The flow of a voice with these tensors, without values.
    ///
    /// # Errors
    /// If a tensor is missing, surplus or of the wrong shape.
    pub(super) fn build(&self, config: &VoiceConfig) -> Result<Flow> {
        let builder = VarBuilder::from_backend(Box::new(self.clone()), DType::F32, Device::Cpu);
        let flow = Flow::new(&config.flow, &config.mel, builder)?;
        let asked = self.asked.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match self.shapes.keys().find(|name| !asked.contains(*name)) {
            Some(name) => Err(Error::invalid(format!("tensor {name} is not part of the flow"))),
            None => Ok(flow),
        }
    }
}

impl SimpleBackend for Outline {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        if self.shapes.get(name) != Some(&shape) {
            candle_core::bail!("tensor {name}: expected {shape:?}, got {:?}", self.shapes.get(name))
        }
        self.asked.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(name.to_string());
        Tensor::zeros((), dtype, device)?.broadcast_as(shape)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("tensor {name} was asked for without a shape")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.shapes.contains_key(name)
    }
}
