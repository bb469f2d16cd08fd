//! From mel frames to the rows that conditioners read.

use super::config::ConditioningConfig;
use super::{Cond, Context};
use crate::kernels::choice::Kernel;
use crate::kernels::pointwise::{rms_norm, silu};
use crate::kernels::product::{Input, Matrix, Panels, Start};
use crate::kernels::rows::Rows;
use crate::mel::NEAR_UNIT;
use crate::net::unit_rms;
use crate::net::wavenet::{linear, matmul};
use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};

/// Added to the mean square that a row is divided by.
const NORM_EPS: f32 = 1e-5;

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

/// `conv5 → (h + conv3(a(h))) × residual_layers → a`, no padding: the frames around come as context.
/// `a` is SiLU, with `norm` of `h` at unit root mean square over its channels.
pub struct FrameNet {
    convs: Vec<(Tensor, Tensor)>,
    up: usize,
    channels: usize,
    /// Frames after its own that a row sees.
    lookahead: usize,
    norm: bool,
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
            ConditioningConfig::Mel {} => Ok(Self::Mel { n_mels, up: hop / group }),
            &ConditioningConfig::Frame { channels, residual_layers, lookahead, norm } => {
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
                    lookahead: lookahead.unwrap_or(residual_layers + 2),
                    norm,
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
            // one more row to interpolate towards
            Self::Frame(net) => Context { left: net.span() - 1 - net.lookahead, right: net.lookahead + 1 },
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

    /// The weights for streaming.
    pub fn pack(&self, kernel: Kernel) -> Result<Packed> {
        let pack = |weight: &Tensor, bias: &[f32]| -> Result<Panels> {
            let values = weight.flatten_all()?.to_vec1::<f32>()?;
            Ok(Panels::new(kernel, bias.len(), bias, &[Matrix::new(&values, bias.len())]))
        };
        Ok(match self {
            &Self::Mel { n_mels, up } => Packed::Mel { n_mels, up },
            Self::Upsample(net) => {
                let (taps, _, columns) = net.weight.dims3()?;
                let width = net.n_mels * net.group;
                let bias: Vec<f32> = net.bias.to_vec1()?;
                let bias: Vec<f32> = (0..columns).map(|i| bias[i % width / net.group]).collect();
                // the last hop of the kernel meets the first of the frames on hand
                let order: Vec<usize> = (0..taps).rev().collect();
                let order = Tensor::new(order.iter().map(|&tap| tap as u32).collect::<Vec<_>>(), net.weight.device())?;
                let weight = pack(&net.weight.index_select(&order, 0)?, &bias)?;
                Packed::Upsample { weight, features: width, taps, n_mels: net.n_mels }
            }
            Self::Frame(net) => Packed::Frame {
                convs: net.convs.iter().map(|(w, b)| pack(w, &b.to_vec1()?)).collect::<Result<_>>()?,
                n_mels: net.convs[0].0.dim(1)?,
                up: net.up,
                lookahead: net.lookahead,
                norm: net.norm,
            },
        })
    }

    /// A mel window `[batch, n_mels, left + frames + right]` → rows for `frames` frames.
    pub fn forward(&self, mel: &Tensor) -> Result<Cond> {
        let mel = mel.transpose(1, 2)?.contiguous()?;
        let rows = match self {
            Self::Upsample(net) => net.forward(&mel)?,
            Self::Frame(net) => net.forward(&mel)?,
            Self::Mel { .. } => mel,
        };
        Ok(Cond::new(rows, self.up()))
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
    /// Frames that a row sees.
    fn span(&self) -> usize {
        3 + 2 * self.convs.len()
    }

    fn forward(&self, mel: &Tensor) -> Result<Tensor> {
        let (factor, summand) = NEAR_UNIT;
        let mut h = conv(&mel.affine(f64::from(factor), f64::from(summand))?, &self.convs[0])?;
        for layer in &self.convs[1..] {
            let inner = h.narrow(1, 1, h.dim(1)? - 2)?;
            h = (inner + conv(&self.activate(&h)?, layer)?)?;
        }
        self.activate(&h)
    }

    fn activate(&self, h: &Tensor) -> Result<Tensor> {
        if !self.norm {
            return candle_nn::ops::silu(h);
        }
        candle_nn::ops::silu(&unit_rms(h, NORM_EPS)?)
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

/// The mel's way in, packed for streaming.
pub enum Packed {
    /// As [`Conditioning::Upsample`].
    Upsample {
        /// From `taps` frames, the oldest first, to the features of a frame's steps.
        weight: Panels,
        /// Features of a step.
        features: usize,
        /// Hops of the kernel.
        taps: usize,
        /// Bands.
        n_mels: usize,
    },
    /// As [`Conditioning::Frame`].
    Frame {
        /// Of the frames or rows that a convolution sees, the first first.
        convs: Vec<Panels>,
        /// Bands.
        n_mels: usize,
        /// Steps per row.
        up: usize,
        /// Frames after its own that a row sees.
        lookahead: usize,
        /// As [`ConditioningConfig::Frame`] has it.
        norm: bool,
    },
    /// As [`Conditioning::Mel`].
    Mel {
        /// Bands.
        n_mels: usize,
        /// Steps per frame.
        up: usize,
    },
}

impl Packed {
    /// Channels of a row.
    pub fn features(&self) -> usize {
        match self {
            Self::Upsample { features, .. } => *features,
            Self::Frame { convs, .. } => convs[0].columns(),
            Self::Mel { n_mels, .. } => *n_mels,
        }
    }

    /// Steps per row.
    pub fn up(&self) -> usize {
        match self {
            Self::Upsample { .. } => 1,
            Self::Frame { up, .. } | Self::Mel { up, .. } => *up,
        }
    }

    /// Steps that so many rows are enough for.
    pub fn steps(&self, rows: usize) -> usize {
        match self {
            // between rows stand whole frames of steps
            Self::Frame { up, .. } if *up > 1 => rows.saturating_sub(1) * up,
            _ => rows * self.up(),
        }
    }

    /// Frames after a frame that its steps depend on.
    pub fn lookahead(&self) -> usize {
        match self {
            Self::Upsample { .. } | Self::Mel { .. } => 0,
            Self::Frame { lookahead, .. } => lookahead + 1,
        }
    }

    /// Frames before a frame that its steps depend on.
    pub fn context(&self) -> usize {
        match self {
            Self::Upsample { taps, .. } => taps - 1,
            Self::Mel { .. } => 0,
            Self::Frame { convs, lookahead, .. } => 2 + 2 * convs.len() - lookahead,
        }
    }
}

/// What the way in remembers of one stream.
pub struct State {
    /// Input of each convolution (of the mel, for the upsampler), frames beyond the ends among them.
    inputs: Vec<Rows>,
    /// What the residual convolutions add to.
    residuals: Vec<Rows>,
    last_frame: Vec<f32>,
}

impl State {
    /// Before the first frame.
    pub fn new(packed: &Packed) -> Self {
        let (inputs, residuals) = match packed {
            Packed::Upsample { n_mels, .. } => (vec![Rows::new(*n_mels)], Vec::new()),
            Packed::Frame { convs, n_mels, .. } => {
                let rows = Rows::new(convs[0].columns());
                let mut inputs = vec![rows.clone(); convs.len()];
                inputs[0] = Rows::new(*n_mels);
                (inputs, vec![rows; convs.len() - 1])
            }
            Packed::Mel { .. } => (Vec::new(), Vec::new()),
        };
        Self { inputs, residuals, last_frame: Vec::new() }
    }

    /// Takes the next mel frames and leaves the rows that are ready in `features`; `threads` share the work.
    pub fn push(&mut self, packed: &Packed, frames: &[f32], last: bool, threads: usize, features: &mut Vec<f32>) {
        match packed {
            Packed::Upsample { weight, taps, .. } => self.upsample(weight, *taps, frames, threads, features),
            Packed::Mel { .. } => {
                features.clear();
                features.extend_from_slice(frames);
            }
            Packed::Frame { convs, n_mels, lookahead, norm, .. } => {
                let scaled: Vec<f32> = frames.iter().map(|v| v * NEAR_UNIT.0 + NEAR_UNIT.1).collect();
                if self.inputs[0].end() == 0 && !scaled.is_empty() {
                    // the first frame, as often as the first row looks back
                    let before = 2 + 2 * convs.len() - lookahead;
                    self.inputs[0].extend(&scaled[..*n_mels].repeat(before));
                }
                self.inputs[0].extend(&scaled);
                if let Some(frame) = scaled.chunks_exact(*n_mels).last() {
                    self.last_frame = frame.to_vec();
                }
                if last {
                    let after = self.last_frame.repeat(lookahead + 1);
                    self.inputs[0].extend(&after);
                }
                features.clear();
                self.frame_net(convs, *norm, features);
            }
        }
    }

    /// A tap per hop of the kernel; a row of the product holds the features of a frame's steps.
    fn upsample(&mut self, weight: &Panels, taps: usize, frames: &[f32], threads: usize, features: &mut Vec<f32>) {
        let input = &mut self.inputs[0];
        if input.end() == 0 {
            // nothing sounds before the first frame
            input.grow(taps - 1);
        }
        let first = input.end();
        input.extend(frames);
        let rows = input.end() - first;
        // all of it is written over
        features.resize(rows * weight.columns(), 0.0);
        let frames = taps_of(weight, input.get(first + 1 - taps..first + rows), input.width());
        weight.shared(threads, rows, &[frames], features);
        input.forget(input.end() + 1 - taps);
    }

    /// Each convolution does the rows whose input is complete.
    fn frame_net(&mut self, convs: &[Panels], norm: bool, features: &mut Vec<f32>) {
        for (i, conv) in convs.iter().enumerate() {
            let input = &mut self.inputs[i];
            let (inputs, outputs) = (input.width(), conv.columns());
            let (first, end) = (input.start(), input.end());
            let rows = (end - first + 1).saturating_sub(conv.depth() / inputs);
            if rows == 0 {
                return;
            }
            let mut h = vec![0.0; rows * outputs];
            // the row in the middle of a residual convolution's three
            let start = match i {
                0 => Start::Bias,
                _ => Start::Rows(self.residuals[i - 1].get(first + 1..first + 1 + rows), outputs),
            };
            conv.product(rows, &[taps_of(conv, input.get(first..end), inputs)], start, (&mut h, outputs));
            input.forget(first + rows);
            if i > 0 {
                self.residuals[i - 1].forget(first + rows);
            }
            if i + 1 < convs.len() {
                self.residuals[i].extend(&h);
            }
            if norm {
                rms_norm(&mut h, outputs, NORM_EPS);
            }
            silu(&mut h);
            match self.inputs.get_mut(i + 1) {
                Some(next) => next.extend(&h),
                None => features.extend_from_slice(&h),
            }
        }
    }
}

/// Rows of `width` values for a convolution, as many taps as its matrices hold.
fn taps_of<'a>(weight: &Panels, rows: &'a [f32], width: usize) -> Input<'a> {
    Input { taps: weight.depth() / width, dilation: 1, ..Input::rows(rows, width) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::Params;
    use candle_core::Device;

    #[test]
    fn with_norm_no_mel_has_features_far_above_the_usual() {
        let most = |norm: bool, mel: f64| {
            let config = ConditioningConfig::Frame { channels: 9, residual_layers: 2, lookahead: None, norm };
            let params = Params::seeded(1, &Device::Cpu);
            let net = Conditioning::new(&config, 5, 16, 4, params.builder()).unwrap();
            let ramp = Tensor::arange(0.0_f32, 100.0, &Device::Cpu).unwrap().reshape((1, 5, 20)).unwrap();
            let rows = net.forward(&(ramp * mel).unwrap()).unwrap().rows;
            rows.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap()
        };
        assert!(most(false, 1e4) > 1e3);
        // one channel of nine has it all
        assert!(most(true, 1e4) <= 3.0 && most(true, 1e4) > 0.5);
    }
}
