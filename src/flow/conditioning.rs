//! From mel frames to the rows that conditioners read.

use super::config::ConditioningConfig;
use super::{Cond, Context};
use crate::net::wavenet::{linear, matmul};
use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};

/// The mel's way into the flow.
pub enum Conditioning {
    /// WaveGlow's upsampler: a transposed convolution to samples, `n_mels · group` channels a step.
    Upsample(Upsample),
    /// A convolutional net at the frame rate.
    Frame(FrameNet),
    /// The frames themselves.
    Mel {
        /// Bands.
        n_mels: usize,
        /// Steps per frame.
        up: usize,
    },
}

/// WaveGlow's transposed convolution as one product per hop of its kernel, with the squeeze built
/// into the order of its columns: channel `mel · group + i` of a step is sample `i` of band `mel`.
pub struct Upsample {
    /// `[kernel / hop, n_mels, (hop / group) · n_mels · group]`.
    weight: Tensor,
    bias: Tensor,
    n_mels: usize,
    group: usize,
}

/// `conv5 → (h + conv3(silu(h))) × residual_layers`, no padding: the frames around come as context.
pub struct FrameNet {
    convs: Vec<(Tensor, Tensor)>,
    up: usize,
    channels: usize,
}

impl Conditioning {
    /// Asks `vb` for the tensors of the chosen kind.
    pub fn new(config: &ConditioningConfig, n_mels: usize, hop: usize, group: usize, vb: VarBuilder) -> Result<Self> {
        match config {
            ConditioningConfig::Upsample { kernel } => {
                let bound = 1.0 / ((n_mels * kernel) as f64).sqrt();
                let uniform = Init::Uniform { lo: -bound, up: bound };
                Ok(Self::Upsample(Upsample {
                    weight: vb.get_with_hints((kernel / hop, n_mels, hop * n_mels), "weight", uniform)?,
                    bias: vb.get_with_hints(n_mels, "bias", uniform)?,
                    n_mels,
                    group,
                }))
            }
            ConditioningConfig::Mel => Ok(Self::Mel { n_mels, up: hop / group }),
            &ConditioningConfig::Frame { channels, residual_layers } => {
                let conv = |i: usize| -> Result<_> {
                    let (width, inputs) = if i == 0 { (5, n_mels) } else { (3, channels) };
                    let bound = 1.0 / ((width * inputs) as f64).sqrt();
                    let uniform = Init::Uniform { lo: -bound, up: bound };
                    let vb = vb.pp(format!("convs.{i}"));
                    Ok((
                        vb.get_with_hints((width, inputs, channels), "weight", uniform)?,
                        vb.get_with_hints(channels, "bias", uniform)?,
                    ))
                };
                Ok(Self::Frame(FrameNet {
                    convs: (0..=residual_layers).map(conv).collect::<Result<_>>()?,
                    up: hop / group,
                    channels,
                }))
            }
        }
    }

    /// Channels of a row.
    pub fn features(&self) -> usize {
        match self {
            Self::Upsample(net) => net.n_mels * net.group,
            Self::Frame(net) => net.channels,
            Self::Mel { n_mels, .. } => *n_mels,
        }
    }

    /// Steps per row.
    pub fn up(&self) -> usize {
        match self {
            Self::Upsample(_) => 1,
            Self::Frame(net) => net.up,
            Self::Mel { up, .. } => *up,
        }
    }

    /// Frames wanted around a segment.
    pub fn context(&self) -> Result<Context> {
        Ok(match self {
            Self::Upsample(net) => Context { left: net.weight.dim(0)? - 1, right: 0 },
            // the convolutions' reach, and one more row to interpolate towards
            Self::Frame(net) => Context { left: net.convs.len() + 1, right: net.convs.len() + 2 },
            Self::Mel { .. } => Context { left: 0, right: 0 },
        })
    }

    /// Whether frames beyond the ends repeat the edge (or are zero, as in WaveGlow).
    pub fn repeats_edge(&self) -> bool {
        !matches!(self, Self::Upsample(_))
    }

    /// Multiply-adds per frame.
    pub fn macs_per_frame(&self) -> usize {
        match self {
            Self::Upsample(net) => net.weight.elem_count(),
            Self::Frame(net) => net.convs.iter().map(|(w, _)| w.elem_count()).sum(),
            Self::Mel { .. } => 0,
        }
    }

    /// A mel window `[batch, n_mels, left + frames + right]` → rows for `frames` frames.
    pub fn forward(&self, mel: &Tensor) -> Result<Cond> {
        let mel = mel.transpose(1, 2)?.contiguous()?;
        let rows = match self {
            Self::Upsample(net) => net.forward(&mel)?,
            Self::Frame(net) => net.forward(&mel)?,
            Self::Mel { .. } => mel,
        };
        Ok(Cond { rows, up: self.up() })
    }
}

impl Upsample {
    fn forward(&self, mel: &Tensor) -> Result<Tensor> {
        let (batch, window, _) = mel.dims3()?;
        let (taps, n_mels, columns) = self.weight.dims3()?;
        let frames = window + 1 - taps;
        // the frames that each kernel part meets, side by side: one product
        let met: Vec<Tensor> = (0..taps).map(|tap| mel.narrow(1, taps - 1 - tap, frames)).collect::<Result<_>>()?;
        let sum = matmul(&Tensor::cat(&met, 2)?, &self.weight.reshape((taps * n_mels, columns))?)?;
        let width = self.n_mels * self.group;
        let bias = self.bias.unsqueeze(1)?.broadcast_as((self.n_mels, self.group))?.reshape(width)?;
        sum.reshape((batch, frames * columns / width, width))?.broadcast_add(&bias)
    }
}

impl FrameNet {
    fn forward(&self, mel: &Tensor) -> Result<Tensor> {
        // log-mels lie between −11.5 and 2: bring them near unit scale
        let mut h = conv(&mel.affine(0.25, 1.25)?, &self.convs[0])?;
        for layer in &self.convs[1..] {
            let inner = h.narrow(1, 1, h.dim(1)? - 2)?;
            h = (inner + conv(&candle_nn::ops::silu(&h)?, layer)?)?;
        }
        candle_nn::ops::silu(&h)
    }
}

/// A convolution over `[batch, frames, in]` without padding, weight `[width, in, out]`.
fn conv(x: &Tensor, (weight, bias): &(Tensor, Tensor)) -> Result<Tensor> {
    let width = weight.dim(0)?;
    let frames = x.dim(1)? + 1 - width;
    let mut y = linear(&x.narrow(1, 0, frames)?.contiguous()?, &weight.get(0)?, bias)?;
    for tap in 1..width {
        y = (y + matmul(&x.narrow(1, tap, frames)?.contiguous()?, &weight.get(tap)?)?)?;
    }
    Ok(y)
}
