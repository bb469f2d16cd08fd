//! The flow's inverse as a stream: mel frames and noise in, residual out, each product done once.
//!
//! The weights ([`Packed`]) are shared; what a stream remembers ([`State`]) is its own. What comes
//! out doesn't depend on the pieces that go in, bit for bit.

use super::conditioning;
use crate::kernels::matmul_rows;
use crate::kernels::stream::{Rows, State as NetState, Weights};
use crate::kernels::wavenet::{fill_rows, interpolation};

/// A step's inverse on slices, ready to stream.
pub enum Stage {
    /// Values by themselves: `x · scale + shift` per channel.
    Affine {
        /// Per channel.
        scale: Vec<f32>,
        /// Per channel.
        shift: Vec<f32>,
    },
    /// `sinh(scale · x) / scale`.
    Sinh {
        /// As in the step.
        scale: f32,
    },
    /// `x · e^−g(features)`, `g` between frames.
    Gain {
        /// `[features, channels]`.
        weight: Vec<f32>,
        /// `[channels]`.
        bias: Vec<f32>,
    },
    /// `x · matrix`, row-major `[channels, channels]`.
    Mix {
        /// The inverse, transposed.
        matrix: Vec<f32>,
    },
    /// `(x₁ − b) · e^−log_s` with `b` and `log_s` of `x₀` and the features.
    Coupling {
        /// Channels of `x₀`.
        known: usize,
        /// Bound of `log_s`.
        bound: Option<f32>,
        /// The conditioner.
        net: Box<Weights>,
    },
    /// The channels that were done come back in front.
    Early(usize),
}

/// A flow's inverse, packed: the steps in the order latent → data.
pub struct Packed {
    /// The mel's way in.
    pub conditioning: conditioning::Packed,
    /// The steps.
    pub stages: Vec<Stage>,
    /// Channels of the latents.
    pub group: usize,
    /// Samples from one frame to the next.
    pub hop: usize,
}

impl Packed {
    /// Steps after a step whose latents its data depends on.
    fn lookahead_steps(&self) -> usize {
        self.stages.iter().map(|s| if let Stage::Coupling { net, .. } = s { net.shape.lookahead() } else { 0 }).sum()
    }

    /// Frames after its own that a frame's sound depends on.
    pub fn lookahead_frames(&self) -> usize {
        self.conditioning.lookahead() + (self.lookahead_steps() * self.group).div_ceil(self.hop)
    }

    /// Frames on each side that a frame's sound depends on, at most.
    pub fn reach_frames(&self) -> usize {
        let steps: usize =
            self.stages.iter().map(|s| if let Stage::Coupling { net, .. } = s { net.shape.reach() } else { 0 }).sum();
        let context = self.conditioning.context().max(self.conditioning.lookahead());
        context + (steps * self.group).div_ceil(self.hop)
    }
}

/// What one stream remembers.
pub struct State {
    /// Of the mel's way in.
    conditioning: conditioning::State,
    /// Rows of the mel's features, by frame or by step.
    features: Rows,
    /// Latents of the steps under way, for the channels that come back late.
    latents: Rows,
    couplings: Vec<Coupling>,
    /// Steps that have come out.
    done: usize,
}

/// A coupling at work: its net, and the rows that wait for the net's answer.
struct Coupling {
    net: NetState,
    waiting: Rows,
}

impl State {
    /// Before the first frame.
    pub fn new(packed: &Packed) -> Self {
        let mut couplings = Vec::new();
        let mut channels = packed.group;
        channels -= packed.stages.iter().map(|s| if let Stage::Early(n) = s { *n } else { 0 }).sum::<usize>();
        for stage in &packed.stages {
            match stage {
                Stage::Early(done) => channels += done,
                Stage::Coupling { net, .. } => {
                    couplings.push(Coupling { net: NetState::new(net), waiting: Rows::new(channels) });
                }
                _ => {}
            }
        }
        Self {
            conditioning: conditioning::State::new(&packed.conditioning),
            features: Rows::new(packed.conditioning.features()),
            latents: Rows::new(packed.group),
            couplings,
            done: 0,
        }
    }

    /// Takes the next mel frames, one after the other, and appends the residual that is ready to
    /// `out`. `noise(step, rows)` fills whole rows of latents, `[steps, group]`, from a step on.
    /// After `last` nothing may follow, and everything is ready.
    pub fn push(
        &mut self,
        packed: &Packed,
        frames: &[f32],
        last: bool,
        noise: impl FnOnce(usize, &mut [f32]),
        out: &mut Vec<f32>,
    ) {
        self.conditioning.push(&packed.conditioning, frames, last, &mut self.features);
        let up = packed.conditioning.up();
        // between rows stand whole frames of steps
        let known = if up == 1 { self.features.end() } else { self.features.end().saturating_sub(1) * up };
        let from = self.latents.end();
        noise(from, self.latents.grow(known - from));

        let group = packed.group;
        let late: usize = packed.stages.iter().map(|s| if let Stage::Early(n) = s { *n } else { 0 }).sum();
        let (mut at, mut early, mut channels) = (from, late, group - late);
        let mut x: Vec<f32> =
            self.latents.get(from..known).chunks_exact(group).flat_map(|row| &row[late..]).copied().collect();
        let mut couplings = self.couplings.iter_mut();
        for stage in &packed.stages {
            match stage {
                Stage::Affine { scale, shift } => {
                    for row in x.chunks_exact_mut(channels) {
                        row.iter_mut().zip(scale).zip(shift).for_each(|((x, scale), shift)| *x = *x * scale + shift);
                    }
                }
                Stage::Sinh { scale } => x.iter_mut().for_each(|x| {
                    let u = *x * scale;
                    *x = (u.exp() - (-u).exp()) * (0.5 / scale);
                }),
                Stage::Gain { weight, bias } => gain(&mut x, at, &self.features, up, weight, bias),
                Stage::Mix { matrix } => {
                    let mut mixed = vec![0.0; x.len()];
                    matmul_rows((x.len() / channels, channels, channels), &x, (matrix, channels), &mut mixed);
                    x = mixed;
                }
                Stage::Coupling { known, bound, net } => {
                    let coupling = couplings.next().expect("one state for each coupling");
                    at = coupling.push(&mut x, *known, *bound, net, &self.features, last);
                }
                Stage::Early(done) => {
                    early -= done;
                    let rows = x.len() / channels;
                    let latents = self.latents.get(at..at + rows).chunks_exact(group);
                    x = x
                        .chunks_exact(channels)
                        .zip(latents)
                        .flat_map(|(x, z)| z[early..early + done].iter().chain(x))
                        .copied()
                        .collect();
                    channels += done;
                }
            }
        }
        out.extend_from_slice(&x);
        self.done = at + x.len() / group;
        self.latents.forget(self.done);
        self.features.forget(self.done / up);
    }
}

impl Coupling {
    /// Takes `x`, leaves in it what is ready, and gives the step at which that begins.
    fn push(
        &mut self,
        x: &mut Vec<f32>,
        known: usize,
        bound: Option<f32>,
        net: &Weights,
        features: &Rows,
        last: bool,
    ) -> usize {
        self.waiting.extend(x);
        let channels = known + net.shape.outputs / 2;
        let input: Vec<f32> = x.chunks_exact(channels).flat_map(|row| &row[..known]).copied().collect();
        let mut params = Vec::new();
        self.net.push(net, &input, features, last, &mut params);
        let at = self.waiting.start();
        let rows = params.len() / net.shape.outputs;
        x.clear();
        x.extend_from_slice(self.waiting.get(at..at + rows));
        self.waiting.forget(at + rows);
        let moved = channels - known;
        for (x, params) in x.chunks_exact_mut(channels).zip(params.chunks_exact(2 * moved)) {
            let (b, log_s) = params.split_at(moved);
            for ((x, b), log_s) in x[known..].iter_mut().zip(b).zip(log_s) {
                let log_s = match bound {
                    Some(bound) => (log_s / bound).tanh() * bound,
                    None => *log_s,
                };
                *x = (*x - b) * (-log_s).exp();
            }
        }
        at
    }
}

/// Divides the rows of `x`, from step `at` on, by the gain that stands between the features.
fn gain(x: &mut [f32], at: usize, features: &Rows, up: usize, weight: &[f32], bias: &[f32]) {
    let channels = bias.len();
    let steps = x.len() / channels;
    if steps == 0 {
        return;
    }
    let first = at / up;
    let rows = (at + steps - 1) / up + 2 - first;
    let mut log_gain = vec![0.0; rows * channels];
    fill_rows(&mut log_gain, bias);
    let inputs = weight.len() / channels;
    matmul_rows((rows, inputs, channels), features.get(first..first + rows), (weight, channels), &mut log_gain);
    for (i, x) in x.chunks_exact_mut(channels).enumerate() {
        let (row, part) = interpolation(at + i, up);
        let (now, next) = log_gain[(row - first) * channels..].split_at(channels);
        for ((x, now), next) in x.iter_mut().zip(now).zip(next) {
            *x *= (-(now + part * (next - now))).exp();
        }
    }
}
