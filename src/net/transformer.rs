//! A causal transformer with a window: the conditioner of transformer autoregressive flows.

use super::wavenet::{Projection, upsample};
use super::{CondNet, Conditioning, unit_rms};
use crate::kernels::attention::{Block, EPS, TransformerRecall, Weights};
use crate::kernels::recall::Recall;
use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};

/// What stands for minus infinity before a softmax: `e` to it is zero.
const NEVER: f32 = -1e9;

/// A windowed causal transformer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransformerConfig {
    /// Width of the residual stream.
    pub channels: usize,
    /// Attention heads: a divisor of `channels`.
    pub heads: usize,
    /// Layers of attention and feed-forward.
    pub layers: usize,
    /// Rows that a row attends to, its own among them: cost is linear in the length, and the inverse
    /// remembers so many keys and values a layer.
    pub window: usize,
    /// Width of the feed-forward part, as a multiple of `channels`.
    pub expansion: usize,
}

impl TransformerConfig {
    /// Checks ranges.
    ///
    /// # Errors
    /// Names the field that is out of range.
    pub fn validate(&self) -> crate::Result<()> {
        let problem = if !(1..=4096).contains(&self.channels) {
            format!("channels is {}, expected 1 to 4096", self.channels)
        } else if self.heads == 0 || !self.channels.is_multiple_of(self.heads) {
            format!("heads is {}, expected a divisor of the {} channels", self.heads, self.channels)
        } else if !(1..=64).contains(&self.layers) {
            format!("layers is {}, expected 1 to 64", self.layers)
        } else if !(1..=4096).contains(&self.window) {
            format!("window is {}, expected 1 to 4096", self.window)
        } else if !(1..=16).contains(&self.expansion) {
            format!("expansion is {}, expected 1 to 16", self.expansion)
        } else {
            return Ok(());
        };
        Err(crate::Error::invalid(format!("transformer: {problem}")))
    }
}

/// A causal transformer: `h = start(x)`; per layer `h += cond`, `h += attention(norm(h))`,
/// `h += down(silu(up(norm(h))))`; then `end` of the norm.
///
/// Norms are root-mean-square; a learned bias per head and distance on top of ALiBi's slopes says
/// where a row stands. Zhai et al. 2024 for its place in a flow; Press et al. 2022 for the slopes.
pub struct Transformer {
    config: TransformerConfig,
    inputs: usize,
    outputs: usize,
    /// Steps per row of conditioning.
    up: usize,
    start: Projection,
    layers: Vec<Layer>,
    norm: Tensor,
    end: Projection,
}

struct Layer {
    attention_norm: Tensor,
    /// To queries, keys and values side by side.
    qkv: Projection,
    /// `[heads, window]`: by distance, 0 for the row itself.
    distance: Tensor,
    out: Projection,
    feed_norm: Tensor,
    widen: Projection,
    narrow: Projection,
}

impl Transformer {
    /// Asks `vb` for `start`, `layers.N.…`, `norm` and `end`.
    ///
    /// # Errors
    /// If `vb` hasn't a tensor in the right shape.
    pub fn new(config: &TransformerConfig, inputs: usize, outputs: usize, up: usize, vb: VarBuilder) -> Result<Self> {
        let (c, wide) = (config.channels, config.channels * config.expansion);
        let one = |name: &str, vb: &VarBuilder| vb.get_with_hints(c, name, Init::Const(1.0));
        let layer = |l: usize| -> Result<_> {
            let vb = vb.pp(format!("layers.{l}"));
            Ok(Layer {
                attention_norm: one("attention_norm", &vb)?,
                qkv: Projection::new(c, 3 * c, false, vb.pp("qkv"))?,
                distance: vb.get_with_hints((config.heads, config.window), "distance", Init::Const(0.0))?,
                out: Projection::new(c, c, false, vb.pp("out"))?,
                feed_norm: one("feed_norm", &vb)?,
                widen: Projection::new(c, wide, false, vb.pp("widen"))?,
                narrow: Projection::new(wide, c, false, vb.pp("narrow"))?,
            })
        };
        Ok(Self {
            config: config.clone(),
            inputs,
            outputs,
            up,
            start: Projection::new(inputs, c, false, vb.pp("start"))?,
            layers: (0..config.layers).map(layer).collect::<Result<_>>()?,
            norm: one("norm", &vb)?,
            end: Projection::zeros(c, outputs, vb.pp("end"))?,
        })
    }

    /// What attention adds to a score by distance, `[heads, window]`.
    fn biases(&self, layer: &Layer) -> Result<Tensor> {
        let TransformerConfig { heads, window, .. } = self.config;
        let slope = |head: usize| 2f32.powf(-8.0 * (head + 1) as f32 / heads as f32);
        let alibi = (0..heads * window).map(|i| -slope(i / window) * (i % window) as f32).collect();
        &layer.distance + Tensor::from_vec(alibi, (heads, window), layer.distance.device())?
    }

    /// Each block of `window` rows attends to itself and the block before, as far as the window goes.
    fn attention(&self, layer: &Layer, x: &Tensor) -> Result<Tensor> {
        let (batch, rows, c) = x.dims3()?;
        let TransformerConfig { heads, window, .. } = self.config;
        let (blocks, width) = (rows.div_ceil(window), c / heads);
        let qkv = layer.qkv.forward(x)?.pad_with_zeros(1, 0, blocks * window - rows)?;
        // [batch, heads, blocks, window, width]
        let part = |i: usize| {
            qkv.narrow(2, i * c, c)?.reshape((batch, blocks * window, heads, width))?.transpose(1, 2)?.contiguous()
        };
        let blocked = |t: Tensor| t.reshape((batch, heads, blocks, window, width));
        let with_past = |t: Tensor| {
            let past = t.pad_with_zeros(2, window, 0)?.narrow(2, 0, blocks * window)?.contiguous()?;
            Tensor::cat(&[blocked(past)?, blocked(t)?], 3)
        };
        let (q, k, v) = (blocked(part(0)?)?, with_past(part(1)?)?, with_past(part(2)?)?);
        let flat = |t: Tensor| {
            let (_, _, _, rows, width) = t.dims5()?;
            t.reshape((batch * heads * blocks, rows, width))
        };
        let k = flat(k)?.transpose(1, 2)?.contiguous()?;
        let scores = (flat(q)?.matmul(&k)? / (width as f64).sqrt())?;
        let scores = scores.reshape((batch, heads, blocks, window, 2 * window))?;
        let scores = scores.broadcast_add(&self.score_biases(layer)?)?;
        let scores = scores.broadcast_add(&self.beginning(blocks, x.device())?)?;
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?;
        let mixed = flat(weights)?.matmul(&flat(v)?)?;
        let mixed = mixed.reshape((batch, heads, blocks * window, width))?.narrow(2, 0, rows)?;
        layer.out.forward(&mixed.transpose(1, 2)?.reshape((batch, rows, c))?)
    }

    /// `[1, heads, 1, window, 2 · window]`: what a score gets by distance, and never where none may be seen.
    fn score_biases(&self, layer: &Layer) -> Result<Tensor> {
        let TransformerConfig { heads, window, .. } = self.config;
        let device = layer.distance.device();
        let distance = |i: usize| (i / (2 * window) + window).checked_sub(i % (2 * window)).filter(|d| *d < window);
        let places = 2 * window * window;
        let index: Vec<u32> = (0..places).map(|i| distance(i).unwrap_or(0) as u32).collect();
        let index = Tensor::from_vec(index, places, device)?;
        let biases = self.biases(layer)?.index_select(&index, 1)?.reshape((1, heads, 1, window, 2 * window))?;
        let mask: Vec<f32> = (0..places).map(|i| if distance(i).is_some() { 0.0 } else { NEVER }).collect();
        biases.broadcast_add(&Tensor::from_vec(mask, (1, 1, 1, window, 2 * window), device)?)
    }

    /// `[1, 1, blocks, 1, 2 · window]`: never where the first block looks for rows before all.
    fn beginning(&self, blocks: usize, device: &Device) -> Result<Tensor> {
        let window = self.config.window;
        let mask: Vec<f32> = (0..blocks * 2 * window).map(|i| if i < window { NEVER } else { 0.0 }).collect();
        Tensor::from_vec(mask, (1, 1, blocks, 1, 2 * window), device)
    }
}

fn rms_norm(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    unit_rms(x, EPS)?.broadcast_mul(weight)
}

impl CondNet for Transformer {
    fn forward(&self, x: &Tensor, cond: Conditioning) -> Result<Tensor> {
        let c = self.config.channels;
        let cond = upsample(&cond.rows()?, self.up, x.dim(1)?)?;
        let mut h = self.start.forward(&x.contiguous()?)?;
        for (l, layer) in self.layers.iter().enumerate() {
            h = (h + cond.narrow(2, l * c, c)?)?;
            h = (&h + self.attention(layer, &rms_norm(&h, &layer.attention_norm)?)?)?;
            let wide = candle_nn::ops::silu(&layer.widen.forward(&rms_norm(&h, &layer.feed_norm)?)?)?;
            h = (h + layer.narrow.forward(&wide)?)?;
        }
        self.end.forward(&rms_norm(&h, &self.norm)?)
    }

    fn recall(&self, cond: Conditioning) -> Result<Box<dyn Recall>> {
        let flat = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
        let both = |p: &Projection| -> Result<_> { Ok((flat(&p.weight()?)?, flat(p.bias())?)) };
        let block = |layer: &Layer| -> Result<_> {
            Ok(Block {
                attention_norm: flat(&layer.attention_norm)?,
                qkv: both(&layer.qkv)?,
                distance: flat(&self.biases(layer)?)?,
                out: both(&layer.out)?,
                feed_norm: flat(&layer.feed_norm)?,
                widen: both(&layer.widen)?,
                narrow: both(&layer.narrow)?,
            })
        };
        let weights = Weights {
            heads: self.config.heads,
            window: self.config.window,
            up: self.up,
            start: both(&self.start)?,
            blocks: self.layers.iter().map(block).collect::<Result<_>>()?,
            norm: flat(&self.norm)?,
            end: both(&self.end)?,
        };
        Ok(Box::new(TransformerRecall::new(weights, flat(&cond.rows()?)?)))
    }

    fn cond_width(&self) -> usize {
        self.config.channels * self.config.layers
    }

    fn reach(&self) -> usize {
        (self.config.window - 1) * self.config.layers
    }

    fn macs_per_step(&self) -> usize {
        let TransformerConfig { channels: c, layers, window, expansion, .. } = self.config;
        (self.inputs + self.outputs) * c + layers * ((4 + 2 * expansion) * c * c + 2 * window * c)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::params::scattered;
    use crate::net::{Params, Passes};

    #[test]
    fn row_by_row_is_the_whole_at_once_and_the_past_alone_matters() {
        let config = TransformerConfig { channels: 12, heads: 3, layers: 2, window: 5, expansion: 2 };
        let params = Params::seeded(1, &Device::Cpu);
        let net = Transformer::new(&config, 2, 4, 4, params.builder()).unwrap();
        let projection = Projection::new(3, net.cond_width(), false, params.builder().pp("cond")).unwrap();
        for (i, (_, var)) in params.named().iter().enumerate() {
            var.set(&(var.as_tensor() + scattered(i as u64, 0.5, var.shape())).unwrap()).unwrap();
        }
        for rows in [1, 5, 23] {
            let x = scattered(0, 1.0, (1, rows, 2));
            let features = scattered(1, 1.0, (1, rows.div_ceil(4) + 1, 3));
            let cond = Conditioning { features: &features, projection: &projection, passes: Passes::default() };
            let run = |x: &Tensor| net.forward(x, cond).unwrap().squeeze(0).unwrap().to_vec2::<f32>().unwrap();
            let whole = run(&x);
            let mut recall = net.recall(cond).unwrap();
            for (row, x) in whole.iter().zip(x.squeeze(0).unwrap().to_vec2::<f32>().unwrap()) {
                let mut out = [0.0; 4];
                recall.push(&x, &mut out);
                assert!(row.iter().zip(out).all(|(a, b)| (a - b).abs() < 1e-4), "{row:?} {out:?}");
            }
            let bump: Vec<f32> = (0..2 * rows).map(|i| if i / 2 == rows / 2 { 1.0 } else { 0.0 }).collect();
            let moved = run(&(&x + Tensor::from_vec(bump, (1, rows, 2), &Device::Cpu).unwrap()).unwrap());
            let same: Vec<bool> = whole.iter().zip(&moved).map(|(a, b)| a == b).collect();
            assert!(same[..rows / 2].iter().all(|s| *s) && !same[rows / 2]);
            // two layers of five rows look back at most eight
            assert!(same.iter().skip(rows / 2 + 9).all(|s| *s));
        }
    }
}
