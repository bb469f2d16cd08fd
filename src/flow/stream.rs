//! The flow's inverse as a stream: mel frames and noise in, residual out, each product done once.
//!
//! The weights ([`Packed`]) are shared; what a stream remembers ([`State`]) is its own. What comes
//! out doesn't depend on the pieces that go in, bit for bit.

use super::drive::Drive;
use super::split::Parts;
use super::{conditioning, scalar};
use crate::kernels::blocks::{MIN_SHARED, WELL_SHARED, awake};
use crate::kernels::conditioner::{State as NetState, Weights};
use crate::kernels::features::Features;
use crate::kernels::pointwise;
use crate::kernels::product::{Input, Panels, Start};
use crate::kernels::quantise::Numbers;
use crate::kernels::recursion;
use crate::kernels::rows::Rows;
use crate::kernels::wavenet::interpolation;
use rayon::prelude::*;
use std::ops::Range;

/// Frames of a piece at least, and its steps for each thread: enough to keep the products busy and to be worth the way
/// of the weights from memory, few enough to keep the activations in the cache.
const PIECE: (usize, usize) = (32, 192);
/// Threads that a piece grows with, at most: its activations are held for all layers.
const PIECE_THREADS: usize = 4;

/// Where an autoregressive step's values are cut off, so that a mel that the voice can't follow doesn't
/// carry it away for good. Speech stays far below: after `asinh`, whitened and of unit variance.
const MOST: f32 = 64.0;

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
        /// From features to channels.
        weights: Panels,
    },
    /// `x · matrix`, `[channels, channels]`.
    Mix {
        /// The inverse, transposed.
        matrix: Panels,
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
    /// Row after row of `by` values: `f⁻¹(x; θ)` with `θ` of the rows before it and the features.
    Autoregressive {
        /// Values of a row.
        by: usize,
        /// `f⁻¹`.
        map: scalar::Packed,
        /// How far from 0 the net hears.
        hears: f32,
        /// The causal net.
        net: Box<recursion::Weights>,
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

    /// Whether a sample depends on all that come before it.
    pub fn recursive(&self) -> bool {
        self.stages.iter().any(|s| matches!(s, Stage::Autoregressive { .. }))
    }

    /// Whether threads share any layer of so many values.
    fn shares(&self, values: usize) -> bool {
        let groups = values / (self.group - self.late());
        self.rates().any(|(s, rate)| matches!(s, Stage::Coupling { net, .. } if net.macs(groups / rate) >= MIN_SHARED))
    }

    /// What a count of steps on the couplings' nets comes to, in groups of samples.
    fn groups(&self, steps: impl Fn(&Weights) -> usize) -> usize {
        self.rates().map(|(s, rate)| if let Stage::Coupling { net, .. } = s { steps(net) * rate } else { 0 }).sum()
    }

    /// Goes over to short numbers where that pays, for whatever can; whether anything changed.
    pub(crate) fn quantise(&mut self, numbers: Numbers) -> bool {
        // a row by itself gains nothing
        let nets =
            self.stages.iter_mut().filter_map(|s| if let Stage::Coupling { net, .. } = s { Some(net) } else { None });
        // every one of them, not up to the first
        nets.map(|net| net.quantise(numbers)).filter(|&changed| changed).count() > 0
    }

    /// Whether integers are faster for every coupling's net, and not heard.
    pub(crate) fn gains_from_integers(&self) -> bool {
        let nets =
            || self.stages.iter().filter_map(|s| if let Stage::Coupling { net, .. } = s { Some(net) } else { None });
        nets().next().is_some() && nets().all(|net| net.gains_from_integers())
    }

    /// Whether threads share the work of so many frames well: then the layers of every net are large.
    pub fn shares_well(&self, frames: usize) -> bool {
        let steps = frames * self.hop / self.group;
        self.stages
            .iter()
            .all(|s| if let Stage::Coupling { net, .. } = s { net.macs(steps) >= WELL_SHARED } else { true })
    }

    /// Frames that best go through the flow together, where there are as many and so many threads share the work.
    pub fn piece_frames(&self, threads: usize) -> usize {
        PIECE.0.max((PIECE.1 * threads.min(PIECE_THREADS) * self.group).div_ceil(self.hop))
    }

    /// Frames after its own that a frame's sound depends on.
    pub fn lookahead_frames(&self) -> usize {
        self.conditioning.lookahead() + (self.groups(|net| net.lookahead()) * self.group).div_ceil(self.hop)
    }

    /// Frames on each side that a frame's sound depends on, at most; more before it if it is
    /// [`recursive`](Self::recursive).
    pub fn reach_frames(&self) -> usize {
        let steps = self.groups(|net| net.reach());
        let context = self.conditioning.context().max(self.conditioning.lookahead());
        context + (steps * self.group).div_ceil(self.hop)
    }
}

/// What one stream remembers.
pub struct State {
    /// Of the mel's way in.
    conditioning: conditioning::State,
    /// Rows of the mel's features that were made, by frame or by step.
    featured: usize,
    /// Groups of samples whose latents were drawn.
    drawn: usize,
    /// The steps, one section behind the other, and what waits in front of each.
    sections: Vec<(Section, Option<Piece>)>,
    /// Threads that share the work of a large piece.
    threads: usize,
    /// A piece that is done, its room for the next.
    spare: Piece,
}

/// What goes from section to section.
#[derive(Default)]
struct Piece {
    /// Rows, and the step of the first.
    x: Vec<f32>,
    at: usize,
    /// The mel's features that are new, and where channels come back late, the latents.
    features: Vec<f32>,
    latents: Vec<f32>,
    /// Whether nothing follows.
    last: bool,
}

/// Steps of the flow that are done one after the other.
struct Section {
    stages: Range<usize>,
    /// Channels of a step in front of the first stage, and of those that come back late, those that are left.
    channels: usize,
    late: usize,
    /// Of the mel.
    features: Features,
    /// Latents of the steps under way, for the channels that come back late.
    latents: Rows,
    couplings: Vec<Coupling>,
    recursions: Vec<Recursion>,
    /// In front of the last recursion.
    drive: Option<Drive>,
    spare: Vec<f32>,
}

/// An autoregressive step at work: its net, and the last row.
struct Recursion {
    net: recursion::State,
    row: Vec<f32>,
}

/// A coupling at work: its net, and the rows that wait for the net's answer.
struct Coupling {
    net: NetState,
    waiting: Rows,
    /// The known channels, where they don't lie in front.
    input: Vec<f32>,
}

impl State {
    /// Before the first frame. `threads` of rayon's share the work of a piece, where it is enough.
    pub fn new(packed: &Packed, threads: usize) -> Self {
        Self::of_sections(packed, std::iter::once(0..packed.stages.len()), threads)
    }

    /// Before the first frame, each net in a section of its own: while one works on a piece, others of rayon's threads
    /// work on those before it. What is pushed comes out later by as many pieces as there are sections behind the
    /// first: see [`go_on`](Self::go_on).
    pub fn in_sections(packed: &Packed) -> Self {
        let is_net = |&i: &usize| matches!(packed.stages[i], Stage::Coupling { .. } | Stage::Autoregressive { .. });
        let mut edges: Vec<_> = (0..packed.stages.len()).filter(is_net).skip(1).collect();
        edges.insert(0, 0);
        edges.push(packed.stages.len());
        Self::of_sections(packed, edges.windows(2).map(|edges| edges[0]..edges[1]), 1)
    }

    fn of_sections(packed: &Packed, sections: impl Iterator<Item = Range<usize>>, threads: usize) -> Self {
        let (mut late, first) = (packed.late(), packed.rates().next());
        let mut channels = (packed.group - late) * first.map_or(1, |(_, rate)| rate);
        let section = |stages| (Section::new(packed, stages, &mut channels, &mut late), None);
        Self {
            conditioning: conditioning::State::new(&packed.conditioning),
            featured: 0,
            drawn: 0,
            sections: sections.map(section).collect(),
            threads,
            spare: Piece::default(),
        }
    }

    /// Drives the flow's last recursion `drive` times as strongly up to `corner`, a part of the sample rate.
    pub fn driven(mut self, drive: f32, corner: f64) -> Self {
        let last = self.sections.iter_mut().rev().find(|(section, _)| !section.recursions.is_empty());
        if let (Some((section, _)), true) = (last, drive != 1.0) {
            section.drive = Some(Drive::new(drive, corner));
        }
        self
    }

    /// Takes the next mel frames, one after the other, and appends the residual that is ready to
    /// `out`. `noise(step, rows)` fills whole rows of latents, `[steps, group]`, from a step on.
    /// After `last` nothing may follow, and everything is ready, or on its way through the sections.
    pub fn push(
        &mut self,
        packed: &Packed,
        frames: &[f32],
        last: bool,
        noise: impl FnOnce(usize, &mut [f32]),
        out: &mut Vec<f32>,
    ) {
        let mut piece = std::mem::take(&mut self.spare);
        self.conditioning.push(&packed.conditioning, frames, last, self.threads, &mut piece.features);
        self.featured += piece.features.len() / packed.conditioning.features();

        let (from, known) = (self.drawn, packed.conditioning.steps(self.featured));
        let (group, late) = (packed.group, packed.late());
        let first = packed.rates().next().map_or(1, |(_, rate)| rate);
        piece.at = from / first;
        piece.last = last;
        piece.x.resize((known - from) * group, 0.0);
        noise(from, &mut piece.x);
        self.drawn = known;
        piece.latents.clear();
        if late > 0 {
            piece.latents.extend_from_slice(&piece.x);
            piece.x.clear();
            piece.latents.chunks_exact(group).for_each(|row| piece.x.extend_from_slice(&row[late..]));
        }
        self.sections[0].1 = Some(piece);
        self.go_on(packed, out);
    }

    /// Whether something is on its way through the sections.
    pub fn under_way(&self) -> bool {
        self.sections.iter().any(|(_, waiting)| waiting.is_some())
    }

    /// Lets what is on its way go one section further, and appends what is ready to `out`.
    pub fn go_on(&mut self, packed: &Packed, out: &mut Vec<f32>) {
        let threads = self.threads;
        let work = |(section, waiting): &mut (Section, Option<Piece>)| {
            if let Some(piece) = waiting {
                section.run(packed, piece, threads);
            }
        };
        match &mut self.sections[..] {
            [only] => {
                let values = only.1.as_ref().map_or(0, |piece| piece.x.len());
                awake(if packed.shares(values) { threads } else { 1 }, || work(only));
            }
            sections => sections.par_iter_mut().with_max_len(1).for_each(work),
        }
        let mut next = None;
        for (_, waiting) in &mut self.sections {
            std::mem::swap(waiting, &mut next);
        }
        if let Some(piece) = next {
            out.extend_from_slice(&piece.x);
            self.spare = piece;
        }
    }
}

impl Section {
    /// Before the first piece; `channels` and `late` in front of its stages, and then behind them.
    fn new(packed: &Packed, stages: Range<usize>, channels: &mut usize, late: &mut usize) -> Self {
        let (mut couplings, mut recursions) = (Vec::new(), Vec::new());
        let mut numbers = None;
        let before = (*channels, *late);
        for (stage, rate) in packed.rates().skip(stages.start).take(stages.len()) {
            match stage {
                Stage::Early(done) => {
                    *channels += done;
                    *late -= done / rate;
                }
                Stage::Squeeze(by) => *channels /= by,
                Stage::Coupling { net, .. } => {
                    numbers = numbers.or(net.short_features());
                    let (net, waiting) = (NetState::new(net), Rows::new(*channels));
                    couplings.push(Coupling { net, waiting, input: Vec::new() });
                }
                Stage::Autoregressive { by, net, .. } => {
                    recursions.push(Recursion { net: recursion::State::new(net), row: vec![0.0; *by] });
                }
                _ => {}
            }
        }
        Self {
            stages,
            channels: before.0,
            late: before.1,
            features: Features::new(packed.conditioning.features(), numbers),
            latents: Rows::new(packed.group),
            couplings,
            recursions,
            drive: None,
            spare: Vec::new(),
        }
    }

    /// Takes a piece, and leaves in it what is ready.
    fn run(&mut self, packed: &Packed, piece: &mut Piece, threads: usize) {
        self.features.extend(&piece.features);
        self.latents.extend(&piece.latents);
        let (group, up) = (packed.group, packed.conditioning.up());
        let (mut channels, mut early) = (self.channels, self.late);
        let (x, at, spare) = (&mut piece.x, &mut piece.at, &mut self.spare);
        let (mut couplings, mut recursions) = (self.couplings.iter_mut(), self.recursions.iter_mut());
        let mut groups = 1;
        for (stage, rate) in packed.rates().skip(self.stages.start).take(self.stages.len()) {
            groups = rate;
            match stage {
                Stage::Affine { scale, shift } => pointwise::affine(x, scale, shift),
                Stage::Sinh { scale } => pointwise::sinh(x, *scale),
                Stage::Gain { weights } => gain(x, *at, self.features.rows(), up / rate, weights, spare),
                Stage::Mix { matrix } => {
                    spare.resize(x.len(), 0.0);
                    let rows = Input::rows(x, channels);
                    matrix.product(x.len() / channels, &[rows], Start::Bias, (spare, channels));
                    std::mem::swap(x, spare);
                }
                Stage::Coupling { parts, map, net } => {
                    let coupling = couplings.next().expect("one state for each coupling");
                    *at = coupling.push(x, (parts, map), net, &self.features, piece.last, threads);
                }
                Stage::Autoregressive { by, map, hears, net } => {
                    let recursion = recursions.next().expect("one state for each step");
                    if let (Some(drive), 0) = (&mut self.drive, recursions.len()) {
                        drive.run(x);
                    }
                    recursion.run(x, (*by, *hears), map, net, self.features.rows());
                }
                Stage::Swap => x.chunks_exact_mut(channels).for_each(|row| row.rotate_left(channels / 2)),
                Stage::Squeeze(by) => {
                    *at *= by;
                    channels /= by;
                    groups /= by;
                }
                Stage::Early(done) => {
                    // of each group that the step holds, these channels
                    let columns = done / rate;
                    early -= columns;
                    spare.clear();
                    let latents = self.latents.get(*at * rate..(*at + x.len() / channels) * rate);
                    for (x, z) in x.chunks_exact(channels).zip(latents.chunks_exact(group * rate)) {
                        z.chunks_exact(group).for_each(|z| spare.extend_from_slice(&z[early..early + columns]));
                        spare.extend_from_slice(x);
                    }
                    std::mem::swap(x, spare);
                    channels += done;
                }
            }
        }
        let done = (*at + x.len() / channels) * groups;
        self.latents.forget(done);
        self.features.forget(done / up);
    }
}

impl Recursion {
    /// The inverse of the rows in `x`, in place.
    fn run(
        &mut self,
        x: &mut [f32],
        (by, hears): (usize, f32),
        map: &scalar::Packed,
        net: &recursion::Weights,
        features: &Rows,
    ) {
        for z in x.chunks_exact_mut(by) {
            map.inverse_row(z, self.net.push(net, &self.row, features));
            z.iter_mut().for_each(|x| *x = if x.is_nan() { 0.0 } else { x.clamp(-MOST, MOST) });
            self.row.iter_mut().zip(z).for_each(|(heard, x)| *heard = x.clamp(-hears, hears));
        }
    }
}

impl Coupling {
    /// Takes `x`, leaves in it what is ready, and gives the step at which that begins.
    fn push(
        &mut self,
        x: &mut Vec<f32>,
        (parts, map): (&Parts, &scalar::Packed),
        net: &Weights,
        features: &Features,
        last: bool,
        threads: usize,
    ) -> usize {
        self.waiting.extend(x);
        let (known, moved) = (parts.known(), parts.moved());
        let channels = known + moved;
        let rows = if parts.known_leads() {
            (x.as_slice(), channels)
        } else {
            let places = parts.known_channels();
            self.input.clear();
            self.input.extend(x.chunks_exact(channels).flat_map(|row| places.clone().map(|c| row[c])));
            (self.input.as_slice(), known)
        };
        let params = self.net.push(net, rows, features, last, threads);
        let at = self.waiting.start();
        let ready = at..at + params.len() / net.outputs();
        x.clear();
        x.extend_from_slice(self.waiting.get(ready.clone()));
        self.waiting.forget(ready.end);
        match map {
            scalar::Packed::Affine { bound } if parts.known_leads() => {
                pointwise::uncouple(x, known, params, moved, *bound);
            }
            _ => {
                for (x, params) in x.chunks_exact_mut(channels).zip(params.chunks_exact(net.outputs())) {
                    for (i, c) in parts.moved_channels().enumerate() {
                        x[c] = map.inverse(x[c], i, moved, params);
                    }
                }
            }
        }
        at
    }
}

/// Divides the rows of `x`, from step `at` on, by the gain that stands between the features.
fn gain(x: &mut [f32], at: usize, features: &Rows, up: usize, weights: &Panels, spare: &mut Vec<f32>) {
    let channels = weights.columns();
    let steps = x.len() / channels;
    if steps == 0 {
        return;
    }
    let first = at / up;
    let rows = (at + steps - 1) / up + 2 - first;
    spare.resize(rows * channels, 0.0);
    let features = Input::rows(features.get(first..first + rows), weights.depth());
    weights.product(rows, &[features], Start::Bias, (spare, channels));
    let end = at + steps;
    for (row, log_gain) in (first..).zip(spare.windows(2 * channels).step_by(channels)) {
        let steps = at.max(row * up)..end.min((row + 1) * up);
        let x = &mut x[(steps.start - at) * channels..(steps.end - at) * channels];
        let (now, next) = log_gain.split_at(channels);
        pointwise::ungain(x, now, next, steps.map(|t| interpolation(t, up).1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::import::{Options, import};
    use crate::kernels::choice::Kernel;
    use crate::kernels::wavenet::Shape;
    use crate::mel::file::tests::parity;
    use crate::mel::file::{TensorData, read_array};
    use candle_core::{Device, Tensor};

    /// The values of a golden file, `[channels, steps]`, by step.
    fn rows(name: &str) -> Vec<Vec<f32>> {
        let TensorData { shape, values, .. } = read_array(&parity(name).unwrap()).unwrap();
        let steps = shape[shape.len() - 1];
        (0..steps).map(|t| values.iter().skip(t).step_by(steps).copied().collect()).collect()
    }

    /// A recursion that is driven away comes back: at most [`MOST`], and the rows whose net has forgotten
    /// are those of a recursion that never was.
    #[test]
    fn a_recursion_returns() {
        let shape = Shape {
            inputs: 2,
            channels: 4,
            outputs: 4,
            kernel: 3,
            causal: true,
            dilations: vec![1, 2],
            skip: false,
            up: 1,
        };
        // parameters tell from the row before alone how far the next one moves, little
        let params: Vec<f32> = (0..shape.param_count()).map(|i| ((i * 7919) % 13) as f32 / 200.0 - 0.03).collect();
        let net = recursion::Weights::new(Kernel::Scalar, &shape, &params, &vec![0.0; 3 * shape.cond_width()]);
        let mut features = Rows::new(3);
        features.grow(200);
        let map = scalar::Packed::Affine { bound: Some(2.0) };
        let run = |x: &mut [f32]| {
            Recursion { net: recursion::State::new(&net), row: vec![0.0; 2] }.run(
                x,
                (2, f32::MAX),
                &map,
                &net,
                &features,
            );
        };
        let calm: Vec<f32> = (0..400).map(|i| (i as f32 * 0.7).sin()).collect();
        let (mut free, mut driven) = (calm.clone(), calm);
        (driven[20], driven[21], driven[23]) = (1e30, f32::NAN, f32::NEG_INFINITY);
        run(&mut free);
        run(&mut driven);
        assert_eq!((driven[20], driven[21], driven[23]), (MOST, 0.0, -MOST));
        assert!(driven.iter().all(|x| x.abs() <= MOST) && driven[24..60] != free[24..60]);
        let apart = driven[360..].iter().zip(&free[360..]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart < 1e-3, "{apart}");
    }

    /// A recursion that drives itself away is held where its net hears no further.
    #[test]
    fn a_recursion_that_hears_little_is_held() {
        let (inputs, dilations) = (1, vec![1]);
        let shape = Shape { inputs, channels: 1, outputs: 2, kernel: 3, causal: true, dilations, skip: false, up: 1 };
        // by the input's way through alone, the next value is the last one times three
        let mut params = vec![0.0; shape.param_count()];
        let end = params.len() - 4;
        (params[0], params[end]) = (1.0, -3.0);
        let net = recursion::Weights::new(Kernel::Scalar, &shape, &params, &vec![0.0; 3 * shape.cond_width()]);
        let mut features = Rows::new(3);
        features.grow(50);
        let map = scalar::Packed::Affine { bound: Some(2.0) };
        let last = |hears| {
            let mut x = vec![0.1; 50];
            let mut recursion = Recursion { net: recursion::State::new(&net), row: vec![0.0] };
            recursion.run(&mut x, (1, hears), &map, &net, &features);
            x[49]
        };
        assert_eq!(last(f32::MAX), MOST);
        assert!((last(2.0) - 6.1).abs() < 1e-5, "{}", last(2.0));
    }

    /// SqueezeWave's golden noise, mel and sound, in both forms of its batch norm.
    #[test]
    fn squeezewave_streams_as_the_reference_sounds() {
        for file in ["s128", "s128_fused", "s256", "s256_fused"] {
            let set = &file[..4];
            let Some(path) = parity(&format!("{file}_state_dict.pt")) else { return };
            let flow = import(&path, "x", &Options::default()).unwrap().voice.build_frozen_flow().unwrap();
            // what comes in front after flow 2, then the start
            let z: Vec<Vec<f32>> = rows(&format!("{set}_z1.npy"))
                .into_iter()
                .zip(rows(&format!("{set}_z0.npy")))
                .map(|(early, start)| [early, start].concat())
                .collect();
            let (mel, group, steps) = (rows(&format!("{set}_mel.npy")), z[0].len(), z.len());
            let tensor = |rows: &[Vec<f32>]| {
                let tensor = Tensor::from_vec(rows.concat(), (1, rows.len(), rows[0].len()), &Device::Cpu).unwrap();
                tensor.transpose(1, 2).unwrap().contiguous().unwrap()
            };
            let defined = flow.inverse(&tensor(&z), &tensor(&mel)).unwrap().flatten_all().unwrap();
            let defined: Vec<f32> = defined.to_vec1().unwrap();
            let golden = rows(&format!("{file}_audio_sigma1.0.npy")).concat();
            let loudest = golden.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
            for kernel in Kernel::available() {
                let packed = flow.pack(kernel).unwrap().expect("every step streams");
                let speak = |piece: usize, mut state: State| {
                    let mut out = Vec::new();
                    let draw = |first: usize, out: &mut [f32]| {
                        out.chunks_exact_mut(group).zip(&z[first..]).for_each(|(out, z)| out.copy_from_slice(z));
                    };
                    mel.chunks(piece).for_each(|mel| state.push(&packed, &mel.concat(), false, draw, &mut out));
                    state.push(&packed, &[], true, draw, &mut out);
                    while state.under_way() {
                        state.go_on(&packed, &mut out);
                    }
                    assert_eq!(out.len(), steps * group);
                    out
                };
                let whole = speak(mel.len(), State::new(&packed, 1));
                for (name, expected) in [("the reference", &golden), ("its definition", &defined)] {
                    let worst = whole.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(worst < 1e-4 * loudest, "{file}, {}: {worst} of {loudest} off {name}", kernel.name());
                }
                for piece in [1, 3, 7] {
                    for state in [State::new(&packed, 1), State::in_sections(&packed)] {
                        assert!(speak(piece, state) == whole, "{file}, {}: {piece} at a time", kernel.name());
                    }
                }
            }
        }
    }
}
