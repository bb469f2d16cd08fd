//! The whitening's filters from mel frames, and the synthesis filter as a stream; all on slices.

use super::config::WhiteningConfig;
use super::filtering::Solver;
use crate::kernels::pointwise::silu;
use crate::kernels::predict::{ABREAST, Predictor, synthesise};
use crate::kernels::product::{Input, Panels, Start};
use crate::kernels::rows::Rows;
use crate::mel::filterbank::{band_centres, mel_filterbank};
use crate::mel::{MelConfig, MelSpectrogram, NEAR_UNIT};
use rayon::prelude::*;
use std::collections::VecDeque;
use std::ops::Range;

/// Width of the bands above the mel's range, Hz.
const HIGH_BAND_HZ: f64 = 500.0;
/// Power of 16-bit quantisation noise at ±1 full scale.
pub const QUANTISATION_POWER: f64 = 1.0 / 12.0 / (32_768.0 * 32_768.0);
/// Frames of one parallel task.
const FRAMES_PER_TASK: usize = 32;

/// Where the bands of a mel lie among the bins, and above them.
#[derive(Clone)]
pub struct Bands {
    n_mels: usize,
    bins: usize,
    /// Σ window², which makes `|X|²` a power per sample.
    pub window_power: f64,
    /// ln Σ_k W[b, k] of each band.
    log_area: Vec<f64>,
    /// Band centres in bins.
    centres: Vec<f64>,
    /// First bin of each high band, and the end of the last.
    pub high_edges: Vec<usize>,
}

impl Bands {
    /// Of a convention and its window.
    pub fn new(mel: &MelConfig, window: &[f32]) -> Self {
        let bins = mel.n_fft / 2 + 1;
        let hz_per_bin = f64::from(mel.sample_rate) / mel.n_fft as f64;
        let high_bands = ((f64::from(mel.sample_rate) / 2.0 - mel.f_max) / HIGH_BAND_HZ).floor() as usize;
        Self {
            n_mels: mel.n_mels,
            bins,
            window_power: window.iter().map(|&w| f64::from(w) * f64::from(w)).sum(),
            log_area: mel_filterbank(mel)
                .chunks_exact(bins)
                .map(|row| row.iter().map(|&w| f64::from(w)).sum::<f64>().max(1e-9).ln())
                .collect(),
            centres: band_centres(mel).into_iter().map(|hz| hz / hz_per_bin).collect(),
            high_edges: (0..=high_bands)
                .map(|i| ((mel.f_max + i as f64 * HIGH_BAND_HZ) / hz_per_bin).round() as usize)
                .collect(),
        }
    }

    /// Bins of a spectrum.
    pub fn bins(&self) -> usize {
        self.bins
    }

    /// The spectrum before correction: `ln S₀` per bin, from one frame; `high` is
    /// `[n_mels + 1, high bands]`.
    pub fn spectrum(&self, column: &[f32], high: &[f32]) -> Vec<f32> {
        let log_power = |b: usize| 2.0 * (f64::from(column[b]) - self.log_area[b]) - self.window_power.ln();
        let mut anchors: Vec<(f64, f64)> = self.centres.iter().enumerate().map(|(b, &c)| (c, log_power(b))).collect();
        let n_high = self.high_edges.len() - 1;
        for i in 0..n_high {
            let value = high[self.n_mels * n_high + i]
                + column.iter().enumerate().map(|(b, v)| v * high[b * n_high + i]).sum::<f32>();
            anchors.push(((self.high_edges[i] + self.high_edges[i + 1]) as f64 / 2.0, f64::from(value)));
        }
        let mut at = 0;
        (0..self.bins)
            .map(|k| {
                let k = k as f64;
                while at + 1 < anchors.len() && anchors[at + 1].0 < k {
                    at += 1;
                }
                let (x0, y0) = anchors[at];
                let value = match anchors.get(at + 1) {
                    Some(&(x1, y1)) if k > x0 => y0 + (y1 - y0) * (k - x0) / (x1 - x0),
                    _ => y0,
                };
                (value.exp() + QUANTISATION_POWER).ln() as f32
            })
            .collect()
    }
}

/// The net's input for one of the frames up to `end`, edges repeated.
pub fn net_row<'a>(
    config: &WhiteningConfig,
    frame: usize,
    end: usize,
    column: &impl Fn(usize) -> &'a [f32],
) -> impl Iterator<Item = f32> {
    (0..config.window())
        .map(move |d| (frame + d).saturating_sub(config.context).min(end - 1))
        .flat_map(|f| column(f).iter().map(|v| v * NEAR_UNIT.0 + NEAR_UNIT.1))
}

/// Everything that makes filters from mel frames.
pub struct Filters {
    /// The design.
    pub config: WhiteningConfig,
    /// Samples from one frame to the next.
    pub hop: usize,
    /// Where the mel's bands lie.
    pub bands: Bands,
    /// `[n_mels + 1, high bands]`.
    pub high: Vec<f32>,
    /// The net.
    pub layers: Vec<Panels>,
    /// From spectra to filters.
    pub solver: Solver,
}

impl Filters {
    /// From the fitted parts.
    pub fn new(
        config: &WhiteningConfig,
        mel: &MelConfig,
        bands: Bands,
        high: Vec<f32>,
        layers: Vec<Panels>,
        solver: Solver,
    ) -> Self {
        Self { config: config.clone(), hop: mel.hop_length, bands, high, layers, solver }
    }

    /// Samples that one filter is for.
    pub fn share(&self) -> usize {
        self.hop / self.config.filters_per_hop
    }

    /// `ln S` of some of the frames up to `end`, `[frames, bins]`.
    fn log_spectra<'a>(&self, frames: Range<usize>, end: usize, column: impl Fn(usize) -> &'a [f32]) -> Vec<f32> {
        let mut h: Vec<f32> = Vec::new();
        frames.clone().for_each(|f| h.extend(net_row(&self.config, f, end, &column)));
        for (i, layer) in self.layers.iter().enumerate() {
            if i > 0 {
                silu(&mut h);
            }
            let mut next = vec![0.0; frames.len() * layer.columns()];
            layer.product(frames.len(), &[Input::rows(&h, layer.depth())], Start::Bias, (&mut next, layer.columns()));
            h = next;
        }
        for (row, f) in h.chunks_exact_mut(self.bands.bins).zip(frames) {
            row.iter_mut().zip(self.bands.spectrum(column(f), &self.high)).for_each(|(h, s)| *h += s);
        }
        h
    }

    /// The filters of some frames, `filters_per_hop` of each, every one for its share of the hop after the
    /// frame's centre: from the spectra there and at the next frame.
    fn between<'a>(&self, frames: Range<usize>, spectrum: impl Fn(usize) -> &'a [f32]) -> Vec<Predictor> {
        let mut scratch = self.solver.scratch();
        let per_hop = self.config.filters_per_hop;
        let place = |f: usize| (0..per_hop).map(move |j| (f, j));
        let places: Vec<_> = frames.flat_map(place).map(|(f, j)| (spectrum(f), spectrum(f + 1), j)).collect();
        let together = places.chunks(ABREAST).flat_map(|places| {
            let solved = self.solver.solve(places, &mut scratch);
            (0..places.len()).map(move |lane| solved.predictor(lane))
        });
        together.collect()
    }

    /// The filters of some frames of a mel, `filters_per_hop` a frame.
    pub fn of(&self, mel: &MelSpectrogram, frames: Range<usize>) -> Vec<Predictor> {
        let (end, n_mels, bins) = (mel.frames(), mel.n_mels(), self.bands.bins);
        // with those around them that the net sees
        let seen = frames.start.saturating_sub(self.config.context)..end.min(frames.end + 1 + self.config.lookahead());
        let columns = mel.columns(seen.clone());
        let column = |f: usize| &columns[(f - seen.start) * n_mels..][..n_mels];
        (0..frames.len().div_ceil(FRAMES_PER_TASK))
            .into_par_iter()
            .flat_map_iter(|task| {
                let first = frames.start + task * FRAMES_PER_TASK;
                let last = (first + FRAMES_PER_TASK).min(frames.end);
                let spectra = self.log_spectra(first..(last + 1).min(end), end, column);
                self.between(first..last, |f| &spectra[(f.min(end - 1) - first) * bins..][..bins])
            })
            .collect()
    }

    /// Residual of some frames (at most frames · hop) → samples. `past` has the samples before them, as
    /// far as the filters look back, and then those before the frames to come.
    pub fn inverse(&self, e: &[f32], mel: &MelSpectrogram, frames: Range<usize>, past: &mut Vec<f32>) -> Vec<f32> {
        let (predictors, share) = (self.of(mel, frames), self.share());
        let mut x = std::mem::take(past);
        let before = x.len();
        x.resize(before + e.len(), 0.0);
        for (i, (e, predictor)) in e.chunks(share).zip(&predictors).enumerate() {
            let at = before + i * share;
            synthesise(predictor, &mut x, at..at + e.len(), e);
        }
        *past = x[x.len().saturating_sub(self.config.order)..].to_vec();
        x.drain(..before);
        x
    }
}

/// The synthesis filter at work on one stream of mel frames and residual.
pub struct Synthesis {
    mel: Rows,
    spectra: Rows,
    filters: VecDeque<Predictor>,
    /// The last samples, as many as the filter looks back on.
    samples: Rows,
}

impl Synthesis {
    /// Before the first frame.
    pub fn new(filters: &Filters) -> Self {
        Self {
            mel: Rows::new(filters.bands.n_mels),
            spectra: Rows::new(filters.bands.bins),
            filters: VecDeque::new(),
            samples: Rows::new(1),
        }
    }

    /// Takes the next mel frames, one after the other; after `last` no more may follow.
    pub fn hear(&mut self, filters: &Filters, frames: &[f32], last: bool) {
        self.mel.extend(frames);
        let (from, end) = (self.spectra.end(), self.mel.end());
        let to = if last { end } else { end.saturating_sub(filters.config.lookahead()).max(from) };
        if from < to {
            let mel = &self.mel;
            let new = filters.log_spectra(from..to, end, |f| mel.get(f..f + 1));
            self.spectra.extend(&new);
        }
        let done = self.spectra.start();
        let to = if last { to } else { to.saturating_sub(1).max(done) };
        let spectra = &self.spectra;
        let spectrum = |f: usize| {
            let f = f.min(spectra.end() - 1);
            spectra.get(f..f + 1)
        };
        self.filters.extend(filters.between(done..to, spectrum));
        self.spectra.forget(to);
        self.mel.forget(self.spectra.end().saturating_sub(filters.config.context));
    }

    /// Frames whose filters are ready.
    pub fn ready(&self, filters: &Filters) -> usize {
        self.filters.len() / filters.config.filters_per_hop
    }

    /// Whole frames of residual, as many as are [`ready`](Self::ready) at most, → as many samples.
    pub fn speak(&mut self, filters: &Filters, residual: &[f32], out: &mut Vec<f32>) {
        for residual in residual.chunks_exact(filters.share()) {
            let Some(predictor) = self.filters.pop_front() else { return };
            self.samples.grow(residual.len());
            let (start, end) = (self.samples.start(), self.samples.end());
            let new = end - start - residual.len()..end - start;
            let x = self.samples.get_mut(start..end);
            synthesise(&predictor, x, new.clone(), residual);
            out.extend_from_slice(&x[new]);
            self.samples.forget(end.saturating_sub(filters.config.order));
        }
    }
}
