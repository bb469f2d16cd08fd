//! From mel frames to the rows that conditioners read.

use super::config::ConditioningConfig;
use super::{Cond, Context};
use crate::kernels::matmul_rows;
use crate::kernels::stream::Rows;
use crate::kernels::wavenet::{add, fill_rows};
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
    /// Frames after its own that a row sees.
    lookahead: usize,
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
            &ConditioningConfig::Frame { channels, residual_layers, lookahead } => {
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

    /// The weights for streaming, if this kind can.
    pub fn pack(&self) -> Result<Option<Packed>> {
        let flat = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
        Ok(Some(match self {
            Self::Mel { .. } => return Ok(None),
            Self::Upsample(net) => Packed::Upsample {
                weight: flat(&net.weight)?,
                bias: flat(&net.bias)?.iter().flat_map(|&b| std::iter::repeat_n(b, net.group)).collect(),
                taps: net.weight.dim(0)?,
                n_mels: net.n_mels,
            },
            Self::Frame(net) => Packed::Frame {
                convs: net.convs.iter().map(|(w, b)| Ok((flat(w)?, flat(b)?))).collect::<Result<_>>()?,
                n_mels: net.convs[0].0.dim(1)?,
                up: net.up,
                lookahead: net.lookahead,
            },
        }))
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
    /// Frames that a row sees.
    fn span(&self) -> usize {
        3 + 2 * self.convs.len()
    }

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

/// The mel's way in, packed for streaming.
pub enum Packed {
    /// As [`Conditioning::Upsample`].
    Upsample {
        /// `[taps, n_mels, columns]`.
        weight: Vec<f32>,
        /// Per feature.
        bias: Vec<f32>,
        /// Hops of the kernel.
        taps: usize,
        /// Bands.
        n_mels: usize,
    },
    /// As [`Conditioning::Frame`].
    Frame {
        /// Weights `[width, in, out]` and biases.
        convs: Vec<(Vec<f32>, Vec<f32>)>,
        /// Bands.
        n_mels: usize,
        /// Steps per row.
        up: usize,
        /// Frames after its own that a row sees.
        lookahead: usize,
    },
}

impl Packed {
    /// Channels of a row.
    pub fn features(&self) -> usize {
        match self {
            Self::Upsample { bias, .. } => bias.len(),
            Self::Frame { convs, .. } => convs[0].1.len(),
        }
    }

    /// Steps per row.
    pub fn up(&self) -> usize {
        match self {
            Self::Upsample { .. } => 1,
            Self::Frame { up, .. } => *up,
        }
    }

    /// Frames after a frame that its steps depend on.
    pub fn lookahead(&self) -> usize {
        match self {
            Self::Upsample { .. } => 0,
            Self::Frame { lookahead, .. } => lookahead + 1,
        }
    }

    /// Frames before a frame that its steps depend on.
    pub fn context(&self) -> usize {
        match self {
            Self::Upsample { taps, .. } => taps - 1,
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
                let rows = Rows::new(convs[0].1.len());
                let mut inputs = vec![rows.clone(); convs.len()];
                inputs[0] = Rows::new(*n_mels);
                (inputs, vec![rows; convs.len() - 1])
            }
        };
        Self { inputs, residuals, last_frame: Vec::new() }
    }

    /// Takes the next mel frames and puts the rows that are ready behind `features`.
    pub fn push(&mut self, packed: &Packed, frames: &[f32], last: bool, features: &mut Rows) {
        match packed {
            Packed::Upsample { weight, bias, taps, .. } => self.upsample(weight, bias, *taps, frames, features),
            Packed::Frame { convs, n_mels, lookahead, .. } => {
                // log-mels lie between −11.5 and 2: bring them near unit scale
                let scaled: Vec<f32> = frames.iter().map(|v| v * 0.25 + 1.25).collect();
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
                self.frame_net(convs, features);
            }
        }
    }

    /// A tap per hop of the kernel; a row of the product holds the features of a frame's steps.
    fn upsample(&mut self, weight: &[f32], bias: &[f32], taps: usize, frames: &[f32], features: &mut Rows) {
        let input = &mut self.inputs[0];
        let n_mels = input.width();
        if input.end() == 0 {
            // nothing sounds before the first frame
            input.grow(taps - 1);
        }
        let first = input.end();
        input.extend(frames);
        let (rows, columns) = (input.end() - first, weight.len() / (taps * n_mels));
        let out = features.grow(rows * columns / bias.len());
        fill_rows(out, bias);
        for (tap, weight) in weight.chunks_exact(n_mels * columns).enumerate() {
            let input = input.get(first - tap..first - tap + rows);
            matmul_rows((rows, n_mels, columns), input, (weight, columns), out);
        }
        input.forget(input.end() + 1 - taps);
    }

    /// Each convolution does the rows whose input is complete.
    fn frame_net(&mut self, convs: &[(Vec<f32>, Vec<f32>)], features: &mut Rows) {
        for (i, (weight, bias)) in convs.iter().enumerate() {
            let input = &mut self.inputs[i];
            let (inputs, outputs) = (input.width(), bias.len());
            let width = weight.len() / (inputs * outputs);
            let first = input.start();
            let rows = (input.end() - first + 1).saturating_sub(width);
            if rows == 0 {
                return;
            }
            let mut h = vec![0.0; rows * outputs];
            fill_rows(&mut h, bias);
            for (tap, weight) in weight.chunks_exact(inputs * outputs).enumerate() {
                let input = input.get(first + tap..first + tap + rows);
                matmul_rows((rows, inputs, outputs), input, (weight, outputs), &mut h);
            }
            input.forget(first + rows);
            if i > 0 {
                // the row in the middle of the convolution's three
                let residual = &mut self.residuals[i - 1];
                add(&mut h, residual.get(first + 1..first + 1 + rows));
                residual.forget(first + rows);
            }
            let active: Vec<f32> = h.iter().map(|v| v / (1.0 + (-v).exp())).collect();
            if i + 1 < convs.len() {
                self.residuals[i].extend(&h);
                self.inputs[i + 1].extend(&active);
            } else {
                features.extend(&active);
            }
        }
    }
}
