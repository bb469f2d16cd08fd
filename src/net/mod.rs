//! Conditioner networks, and the named parameters they are made of.

pub mod lipschitz;
pub(crate) mod node;
pub mod params;
pub mod plane;
pub mod rowwise;
pub mod separable;
pub mod transformer;
pub mod wavenet;
mod weight_norm;

use crate::kernels::choice::Kernel;
use crate::kernels::conditioner::Weights;
use crate::kernels::multiply::Products;
use crate::kernels::recall::Recall;
use crate::kernels::recursion;
use candle_core::{D, Result, Tensor};
pub use lipschitz::LipschitzNet;
pub use params::Params;
pub use separable::SeparableNet;
pub use transformer::Transformer;
pub use wavenet::{Projection, WaveNet};

/// How the nets' passes over whole segments are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passes {
    /// The backward pass computes activations again that the forward pass would keep: less memory, more time.
    pub recompute: bool,
    /// How the products of WaveNets' layers are done on the CPU. What is added up, the weights that are trained and
    /// all the rest stay in f32.
    pub products: Products,
}

/// What conditions a net.
#[derive(Clone, Copy)]
pub struct Conditioning<'a> {
    /// The mel's features, `[batch, rows, features]`.
    pub features: &'a Tensor,
    /// What makes `cond_width` values of a row of them.
    pub projection: &'a Projection,
    /// How the net is computed.
    pub passes: Passes,
}

impl Conditioning<'_> {
    /// The projected rows, `[batch, rows, cond_width]`, without their bias.
    pub(crate) fn product(&self) -> Result<Tensor> {
        self.projection.product(self.features)
    }

    /// The projected rows with their bias.
    pub(crate) fn rows(&self) -> Result<Tensor> {
        self.projection.forward(self.features)
    }
}

/// A conditioner of couplings: from the known channels and the mel to the parameters of the rest.
pub trait CondNet {
    /// `x` `[batch, steps, inputs]` → `[batch, steps, outputs]`.
    fn forward(&self, x: &Tensor, cond: Conditioning) -> Result<Tensor>;
    /// The weights for streaming, with those of the projection of the mel's features, or `None` if
    /// the net can't stream.
    fn pack(&self, _projection: &Projection, _kernel: Kernel) -> Result<Option<Weights>> {
        Ok(None)
    }
    /// The weights for streaming row by row, as [`pack`](Self::pack), or `None` if the net isn't causal or can't
    /// stream.
    fn pack_recursion(&self, _projection: &Projection, _kernel: Kernel) -> Result<Option<recursion::Weights>> {
        Ok(None)
    }
    /// The net at work row by row, for the conditioning of one whole sequence, a batch of 1: what it gives for a
    /// row depends on that row and those before.
    ///
    /// # Errors
    /// If the net isn't causal.
    fn recall(&self, _cond: Conditioning) -> Result<Box<dyn Recall>> {
        candle_core::bail!("the net is not causal")
    }
    /// Columns of conditioning that it wants.
    fn cond_width(&self) -> usize;
    /// Steps on each side that an output depends on.
    fn reach(&self) -> usize;
    /// Multiply-adds per step, without the conditioning's own projection.
    fn macs_per_step(&self) -> usize;
}

/// Each row at unit root mean square, `eps` added to the mean square.
pub(crate) fn unit_rms(x: &Tensor, eps: f32) -> Result<Tensor> {
    x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(eps))?.sqrt()?)
}
