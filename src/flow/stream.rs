//! The flow's inverse as a stream: mel frames and noise in, residual out, each product done once.
//!
//! The weights ([`Packed`]) are shared; what a stream remembers ([`State`]) is its own. What comes
//! out doesn't depend on the pieces that go in, bit for bit.

use super::split::Parts;
use super::{conditioning, scalar};
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
    /// `f⁻¹(x₁; θ)` with `θ` of `x₀` and the features.
    Coupling {
        /// Where `x₀` and `x₁` lie.
        parts: Parts,
        /// `f⁻¹`.
        map: scalar::Packed,
        /// The conditioner.
        net: Box<Weights>,
    },
    /// The halves change places.
    Swap,
    /// A step becomes so many.
    Squeeze(usize),
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
    /// Stages with the groups of samples that a step of theirs holds.
    fn rates(&self) -> impl Iterator<Item = (&Stage, usize)> {
        let squeezes = self.stages.iter().map(|s| if let Stage::Squeeze(by) = s { *by } else { 1 });
        let mut rate: usize = squeezes.product();
        self.stages.iter().map(move |stage| {
            let own = rate;
            if let Stage::Squeeze(by) = stage {
                rate /= by;
            }
            (stage, own)
        })
    }

    /// Channels of a group that come back late.
    fn late(&self) -> usize {
        self.rates().map(|(s, rate)| if let Stage::Early(done) = s { done / rate } else { 0 }).sum()
    }

    /// What a count of steps on the couplings' nets comes to, in groups of samples.
    fn groups(&self, steps: impl Fn(&Weights) -> usize) -> usize {
        self.rates().map(|(s, rate)| if let Stage::Coupling { net, .. } = s { steps(net) * rate } else { 0 }).sum()
    }

    /// Frames after its own that a frame's sound depends on.
    pub fn lookahead_frames(&self) -> usize {
        self.conditioning.lookahead() + (self.groups(|net| net.shape.lookahead()) * self.group).div_ceil(self.hop)
    }

    /// Frames on each side that a frame's sound depends on, at most.
    pub fn reach_frames(&self) -> usize {
        let steps = self.groups(|net| net.shape.reach());
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
        let (mut channels, first) = (packed.group - packed.late(), packed.rates().next());
        channels *= first.map_or(1, |(_, rate)| rate);
        for stage in &packed.stages {
            match stage {
                Stage::Early(done) => channels += done,
                Stage::Squeeze(by) => channels /= by,
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
        let late = packed.late();
        let first = packed.rates().next().map_or(1, |(_, rate)| rate);
        let (mut at, mut early, mut channels) = (from / first, late, (group - late) * first);
        let mut x: Vec<f32> =
            self.latents.get(from..known).chunks_exact(group).flat_map(|row| &row[late..]).copied().collect();
        let mut couplings = self.couplings.iter_mut();
        for (stage, rate) in packed.rates() {
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
                Stage::Gain { weight, bias } => gain(&mut x, at, &self.features, up / rate, weight, bias),
                Stage::Mix { matrix } => {
                    let mut mixed = vec![0.0; x.len()];
                    matmul_rows((x.len() / channels, channels, channels), &x, (matrix, channels), &mut mixed);
                    x = mixed;
                }
                Stage::Coupling { parts, map, net } => {
                    let coupling = couplings.next().expect("one state for each coupling");
                    at = coupling.push(&mut x, parts, map, net, &self.features, last);
                }
                Stage::Swap => x.chunks_exact_mut(channels).for_each(|row| row.rotate_left(channels / 2)),
                Stage::Squeeze(by) => {
                    at *= by;
                    channels /= by;
                }
                Stage::Early(done) => {
                    // of each group that the step holds, these channels
                    let columns = done / rate;
                    early -= columns;
                    let rows = x.len() / channels;
                    let latents = self.latents.get(at * rate..(at + rows) * rate).chunks_exact(group);
                    let latents: Vec<f32> = latents.flat_map(|z| &z[early..early + columns]).copied().collect();
                    x = x
                        .chunks_exact(channels)
                        .zip(latents.chunks_exact(*done))
                        .flat_map(|(x, z)| z.iter().chain(x))
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
        parts: &Parts,
        map: &scalar::Packed,
        net: &Weights,
        features: &Rows,
        last: bool,
    ) -> usize {
        self.waiting.extend(x);
        let (moved, channels) = (parts.moved(), parts.known() + parts.moved());
        let known = parts.known_channels();
        let input: Vec<f32> = x.chunks_exact(channels).flat_map(|row| known.clone().map(|c| row[c])).collect();
        let mut params = Vec::new();
        self.net.push(net, &input, features, last, &mut params);
        let at = self.waiting.start();
        let rows = params.len() / net.shape.outputs;
        x.clear();
        x.extend_from_slice(self.waiting.get(at..at + rows));
        self.waiting.forget(at + rows);
        for (x, params) in x.chunks_exact_mut(channels).zip(params.chunks_exact(net.shape.outputs)) {
            for (i, c) in parts.moved_channels().enumerate() {
                x[c] = map.inverse(x[c], i, moved, params);
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
