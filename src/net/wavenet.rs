//! A WaveNet conditioner: the graph that defines it, and the fused CPU body that runs it.

use super::node::{values, with_values};
use super::weight_norm::normed;
use super::{CondNet, Conditioning, Passes};
use crate::kernels::conditioner::Weights;
use crate::kernels::multiply::Products;
use crate::kernels::recall::{Recall, WaveNetRecall};
use crate::kernels::wavenet::{self as kernel, Keep, Pass, Shape};
use crate::kernels::{self, choice::Kernel};
use crate::kernels::{recursion, stream};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::sync::Mutex;

/// A WaveNet conditioner.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WaveNetConfig {
    /// Residual channels.
    pub channels: usize,
    /// Width of the dilated convolutions, odd.
    pub kernel: usize,
    /// Dilation of each layer, steps.
    pub dilations: Vec<usize>,
    /// Weight norm on every convolution but the last, as in WaveGlow.
    pub weight_norm: bool,
    /// Sum of skip connections to the output (WaveGlow), or the last residual alone.
    pub skip: bool,
    /// Convolutions that see the past alone; where it isn't said, they see as much on either side.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub causal: bool,
}

impl WaveNetConfig {
    /// Checks ranges.
    ///
    /// # Errors
    /// Names the field that is out of range.
    pub fn validate(&self) -> crate::Result<()> {
        let problem = if !(1..=4096).contains(&self.channels) {
            format!("channels is {}, expected 1 to 4096", self.channels)
        } else if self.kernel.is_multiple_of(2) || self.kernel > 63 {
            format!("kernel is {}, expected an odd number up to 63", self.kernel)
        } else if self.dilations.is_empty()
            || self.dilations.len() > 64
            || self.dilations.iter().any(|d| !(1..=65_536).contains(d))
        {
            "dilations must be 1 to 64 numbers from 1 to 65536".to_string()
        } else {
            return Ok(());
        };
        Err(crate::Error::invalid(format!("wavenet: {problem}")))
    }
}

/// A conditioner: known channels and the mel's features in, coupling parameters out.
pub struct WaveNet {
    shape: Shape,
    start: Linear,
    layers: Vec<(Linear, Linear)>,
    end: Linear,
}

/// A matrix per tap, `[taps, in, out]` or `[in, out]`, and a bias.
struct Linear {
    weight: Tensor,
    /// Weight norm's magnitude per output, `[out]`.
    magnitude: Option<Tensor>,
    bias: Tensor,
}

impl Linear {
    /// PyTorch's initial range, `1/√fan_in`; magnitudes begin at the rows' own norm on average.
    fn new(dims: &[usize], weight_norm: bool, vb: VarBuilder) -> Result<Self> {
        let (fan_in, outputs) = (dims[..dims.len() - 1].iter().product::<usize>() as f64, dims[dims.len() - 1]);
        let bound = 1.0 / fan_in.sqrt();
        let uniform = Init::Uniform { lo: -bound, up: bound };
        Ok(Self {
            weight: vb.get_with_hints(dims, "weight", uniform)?,
            // the norm of fan_in uniform values in ±bound
            magnitude: if weight_norm {
                Some(vb.get_with_hints(outputs, "magnitude", Init::Const(1.0 / 3.0_f64.sqrt()))?)
            } else {
                None
            },
            bias: vb.get_with_hints(outputs, "bias", uniform)?,
        })
    }

    fn zeros(dims: (usize, usize), vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            weight: vb.get_with_hints(dims, "weight", Init::Const(0.0))?,
            magnitude: None,
            bias: vb.get_with_hints(dims.1, "bias", Init::Const(0.0))?,
        })
    }

    /// The weight with weight norm applied: `magnitude · v / ‖v‖`, norms per output.
    fn weight(&self) -> Result<Tensor> {
        let Some(magnitude) = &self.magnitude else { return Ok(self.weight.clone()) };
        normed(&self.weight, magnitude)
    }
}

/// A 1×1 convolution with optional weight norm.
pub struct Projection(Linear);

impl Projection {
    /// Asks `vb` for `weight` `[in, out]`, with weight norm `magnitude`, and `bias`.
    pub fn new(inputs: usize, outputs: usize, weight_norm: bool, vb: VarBuilder) -> Result<Self> {
        Linear::new(&[inputs, outputs], weight_norm, vb).map(Self)
    }

    /// [`Projection::new`] without weight norm, starting at zero.
    pub fn zeros(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Self> {
        Linear::zeros((inputs, outputs), vb).map(Self)
    }

    /// `[batch, rows, in]` → `[batch, rows, out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        linear(x, &self.0.weight()?, &self.0.bias)
    }

    /// [`Projection::forward`] without the bias.
    pub fn product(&self, x: &Tensor) -> Result<Tensor> {
        matmul(x, &self.0.weight()?)
    }

    /// The bias, `[out]`. It is the same in every row, so whoever reads the rows adds it where that
    /// costs nothing.
    pub fn bias(&self) -> &Tensor {
        &self.0.bias
    }

    /// The matrix `[in, out]`, weight norm applied.
    pub fn weight(&self) -> Result<Tensor> {
        self.0.weight()
    }

    /// Multiply-adds per row.
    pub fn macs(&self) -> usize {
        self.0.weight.elem_count()
    }
}

impl WaveNet {
    /// Asks `vb` for `start`, `layers.N.conv`, `layers.N.out` and `end`.
    pub fn new(config: &WaveNetConfig, inputs: usize, outputs: usize, up: usize, vb: VarBuilder) -> Result<Self> {
        let shape = Shape {
            inputs,
            channels: config.channels,
            outputs,
            kernel: config.kernel,
            causal: config.causal,
            dilations: config.dilations.clone(),
            skip: config.skip,
            up,
        };
        let (c, norm) = (config.channels, config.weight_norm);
        let layer = |l: usize| -> Result<_> {
            let vb = vb.pp(format!("layers.{l}"));
            Ok((
                Linear::new(&[config.kernel, c, 2 * c], norm, vb.pp("conv"))?,
                Linear::new(&[c, shape.out_width(l)], norm, vb.pp("out"))?,
            ))
        };
        Ok(Self {
            start: Linear::new(&[inputs, c], norm, vb.pp("start"))?,
            layers: (0..shape.layers()).map(layer).collect::<Result<_>>()?,
            end: Linear::zeros((c, outputs), vb.pp("end"))?,
            shape,
        })
    }

    /// Its shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// All parameters in the kernel's order, weight norm applied, each layer's share of the
    /// conditioning's bias added to the convolution's; then what `rest` holds.
    fn flat_params(&self, cond_bias: &Tensor, rest: Option<&Tensor>) -> Result<Tensor> {
        let mut parts = Vec::new();
        let mut push = |linear: &Linear, bias: Tensor| -> Result<()> {
            parts.push(linear.weight()?.flatten_all()?);
            parts.push(bias);
            Ok(())
        };
        push(&self.start, self.start.bias.clone())?;
        for (l, (conv, out)) in self.layers.iter().enumerate() {
            push(conv, self.layer_bias(l, conv, cond_bias)?)?;
            push(out, out.bias.clone())?;
        }
        push(&self.end, self.end.bias.clone())?;
        parts.extend(rest.map(Tensor::flatten_all).transpose()?);
        Tensor::cat(&parts, 0)
    }

    fn layer_bias(&self, layer: usize, conv: &Linear, cond_bias: &Tensor) -> Result<Tensor> {
        let width = 2 * self.shape.channels;
        &conv.bias + cond_bias.narrow(0, layer * width, width)?
    }

    /// The definition, in tensor operations of any device: what the fused body is held to.
    pub fn forward_graph(&self, x: &Tensor, cond: Conditioning) -> Result<Tensor> {
        let (c, steps) = (self.shape.channels, x.dim(1)?);
        let cond_bias = cond.projection.bias();
        let cond = upsample(&cond.product()?, self.shape.up, steps)?;
        let mut h = linear(x, &self.start.weight()?, &self.start.bias)?;
        let mut skip: Option<Tensor> = None;
        for (l, (conv, out)) in self.layers.iter().enumerate() {
            let dilation = self.shape.dilations[l];
            let (before, after) = self.shape.sides(dilation);
            let padded = h.pad_with_zeros(1, before, after)?;
            let weight = conv.weight()?;
            let bias = self.layer_bias(l, conv, cond_bias)?;
            let mut pre = cond.narrow(2, l * 2 * c, 2 * c)?.broadcast_add(&bias)?;
            for tap in 0..self.shape.kernel {
                let shifted = padded.narrow(1, tap * dilation, steps)?.contiguous()?;
                pre = (pre + matmul(&shifted, &weight.get(tap)?)?)?;
            }
            let gate = candle_nn::ops::sigmoid(&pre.narrow(2, c, c)?.contiguous()?)?;
            let act = (pre.narrow(2, 0, c)?.tanh()? * gate)?;
            let out = linear(&act, &out.weight()?, &out.bias)?;
            if !self.shape.skip {
                h = (h + out)?;
                continue;
            }
            let part = if self.shape.out_width(l) == 2 * c {
                h = (h + out.narrow(2, 0, c)?)?;
                out.narrow(2, c, c)?
            } else {
                out
            };
            skip = Some(match skip {
                Some(skip) => (skip + part)?,
                None => part,
            });
        }
        linear(&skip.unwrap_or(h), &self.end.weight()?, &self.end.bias)
    }

    /// [`WaveNet::flat_params`], and the projection's weights `[features, cond_width]`.
    fn flat_weights(&self, projection: &Projection) -> Result<(Vec<f32>, Vec<f32>)> {
        let cond = projection.0.weight()?.flatten_all()?;
        Ok((self.flat_params(projection.bias(), None)?.to_vec1()?, cond.to_vec1()?))
    }
}

impl CondNet for WaveNet {
    /// Fused on the CPU, the graph elsewhere.
    fn forward(&self, x: &Tensor, cond: Conditioning) -> Result<Tensor> {
        if !x.device().is_cpu() {
            return self.forward_graph(x, cond);
        }
        // rows for every step are projected inside, layer by layer
        let weights = if self.shape.up == 1 { Some(cond.projection.weight()?) } else { None };
        let rows = if weights.is_some() { cond.features.clone() } else { cond.product()? };
        let params = self.flat_params(cond.projection.bias(), weights.as_ref())?;
        let (x, rows) = (x.contiguous()?, rows.contiguous()?);
        let goes_back = [&x, &rows, &params].iter().any(|t| t.track_op());
        let Passes { recompute, products } = cond.passes;
        let (shape, saved) = (self.shape.clone(), Mutex::new(None));
        let op = Fused { shape, keeps: goes_back && !recompute, products, saved };
        x.apply_op3(&rows, &params, op)
    }

    fn pack(&self, projection: &Projection, kernel: Kernel) -> Result<Option<Weights>> {
        let (params, cond) = self.flat_weights(projection)?;
        Ok(Some(Weights::WaveNet(stream::Weights::new(kernel, &self.shape, &params, &cond))))
    }

    fn pack_recursion(&self, projection: &Projection, kernel: Kernel) -> Result<Option<recursion::Weights>> {
        if !self.shape.causal {
            return Ok(None);
        }
        let (params, cond) = self.flat_weights(projection)?;
        Ok(Some(recursion::Weights::new(kernel, &self.shape, &params, &cond)))
    }

    fn recall(&self, cond: Conditioning) -> Result<Box<dyn Recall>> {
        if !self.shape.causal {
            candle_core::bail!("the wavenet is not causal")
        }
        let flat = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
        let params = flat(&self.flat_params(cond.projection.bias(), None)?)?;
        Ok(Box::new(WaveNetRecall::new(self.shape.clone(), params, flat(&cond.product()?)?)))
    }

    fn cond_width(&self) -> usize {
        self.shape.cond_width()
    }

    fn reach(&self) -> usize {
        self.shape.reach()
    }

    fn macs_per_step(&self) -> usize {
        self.shape.macs_per_step()
    }
}

/// `x` `[batch, steps, in]` times `weight` `[in, out]`, as one product.
pub fn matmul(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (batch, steps, inputs) = x.dims3()?;
    x.reshape((batch * steps, inputs))?.matmul(weight)?.reshape((batch, steps, ()))
}

/// [`matmul`] plus bias.
pub fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    matmul(x, weight)?.broadcast_add(bias)
}

/// Rows at the frame rate, `[batch, rows, width]`, interpolated linearly to `steps` steps, step `t`
/// standing at row `(t + ½) / up`; `up` 1 changes nothing.
pub fn upsample(rows: &Tensor, up: usize, steps: usize) -> Result<Tensor> {
    if up == 1 {
        return Ok(rows.clone());
    }
    let (batch, n, width) = rows.dims3()?;
    let fraction: Vec<f32> = (0..up).map(|t| kernel::interpolation(t, up).1).collect();
    let fraction = Tensor::from_vec(fraction, (1, 1, up, 1), rows.device())?;
    let now = rows.narrow(1, 0, n - 1)?.unsqueeze(2)?;
    let next = rows.narrow(1, 1, n - 1)?.unsqueeze(2)?;
    let between = (&next - &now)?.broadcast_mul(&fraction)?;
    now.broadcast_add(&between)?.reshape((batch, (n - 1) * up, width))?.narrow(1, 0, steps)
}

/// Activations above which the layers' inputs aren't kept, as they are quick to make again: 16 MiB.
const KEEP_LIMIT: usize = 4 << 20;

/// The kernel as one node of candle's graph: of the input; the mel's features, or where steps lie between rows their
/// projection; and the flat parameters, with the projection's weights behind them where it is done inside.
struct Fused {
    shape: Shape,
    /// Whether there is a backward pass to come that wants activations kept.
    keeps: bool,
    products: Products,
    saved: Mutex<Option<Vec<kernel::Saved>>>,
}

impl Fused {
    /// One sequence's pass, with parameters and the projection's weights, if there are any.
    fn pass<'a>(&'a self, (params, weights): (&'a [f32], &'a [f32]), x: &'a [f32], rows: &'a [f32]) -> Pass<'a> {
        let cond = kernel::Conditioning::of(&self.shape, rows, weights);
        Pass { shape: &self.shape, params, x, cond, products: self.products }
    }

    /// How many weights project rows of `width` features here.
    fn weights(&self, width: usize) -> usize {
        if self.shape.up == 1 { width * self.shape.cond_width() } else { 0 }
    }

    fn keep(&self, batch: usize, steps: usize) -> Keep {
        match batch * steps * self.shape.layers() * 3 * self.shape.channels {
            _ if !self.keeps => Keep::Nothing,
            floats if floats <= KEEP_LIMIT => Keep::Everything,
            _ => Keep::Gates,
        }
    }
}

impl CustomOp3 for Fused {
    fn name(&self) -> &'static str {
        "wavenet"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        features: &CpuStorage,
        fl: &Layout,
        params: &CpuStorage,
        pl: &Layout,
    ) -> Result<(CpuStorage, candle_core::Shape)> {
        let (batch, steps, inputs) = xl.shape().dims3()?;
        let (items, rows, width) = fl.shape().dims3()?;
        if inputs != self.shape.inputs
            || rows < self.shape.cond_rows(steps)
            || items != batch
            || pl.shape().elem_count() != self.shape.param_count() + self.weights(width)
            || self.shape.up > 1 && width != self.shape.cond_width()
        {
            candle_core::bail!("wavenet: x {:?} and features {:?} do not fit {:?}", xl.dims(), fl.dims(), self.shape)
        }
        let (x, features) = (values(x, xl)?, values(features, fl)?);
        let params = values(params, pl)?.split_at(self.shape.param_count());
        let keep = self.keep(batch, steps);
        let results: Vec<_> = x
            .par_chunks(steps * inputs)
            .zip(features.par_chunks(rows * width))
            .map(|(x, rows)| self.pass(params, x, rows).forward(keep))
            .collect();
        let mut y = Vec::with_capacity(batch * steps * self.shape.outputs);
        let mut saved = Vec::new();
        for (out, s) in results {
            y.extend_from_slice(&out);
            saved.extend(s);
        }
        if keep != Keep::Nothing
            && let Ok(mut slot) = self.saved.lock()
        {
            *slot = Some(saved);
        }
        Ok((CpuStorage::F32(y), (batch, steps, self.shape.outputs).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        features: &Tensor,
        params: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (batch, steps, inputs) = x.dims3()?;
        let (_, rows, width) = features.dims3()?;
        let dy = dy.contiguous()?;
        let saved = self.saved.lock().ok().and_then(|mut slot| slot.take());
        let count = self.shape.param_count();
        let results: Vec<_> = with_values([x, features, params, &dy], |[x, features, params, dy]| {
            let params = params.split_at(count);
            let item = |b: usize| {
                let x = &x[b * steps * inputs..][..steps * inputs];
                let features = &features[b * rows * width..][..rows * width];
                let dy = &dy[b * steps * self.shape.outputs..][..steps * self.shape.outputs];
                let saved = saved.as_ref().map(|saved| &saved[b]);
                self.pass(params, x, features).backward(saved, dy)
            };
            (0..batch).into_par_iter().map(item).collect()
        })?;
        let (mut dx, mut d_features) = (Vec::with_capacity(x.elem_count()), Vec::with_capacity(features.elem_count()));
        let mut d_params = vec![0.0; params.elem_count()];
        for item in results {
            dx.extend_from_slice(&item.x);
            d_features.extend_from_slice(&item.rows);
            let (d_own, d_weights) = d_params.split_at_mut(count);
            kernels::add(d_own, &item.params);
            kernels::add(d_weights, &item.weights);
        }
        let device = x.device();
        Ok((
            Some(Tensor::from_vec(dx, x.shape(), device)?),
            Some(Tensor::from_vec(d_features, features.shape(), device)?),
            Some(Tensor::from_vec(d_params, params.shape(), device)?),
        ))
    }
}
