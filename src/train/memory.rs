//! How much memory a run will take, roughly, before it starts.

use super::config::Recipe;
use crate::flow::config::{ConditioningConfig, MapConfig, Place, SequenceConfig, StepConfig, WaveNetConfig};
use crate::net::Passes;

/// Copies of each parameter: the variable, the optimiser's two moments and average.
const PARAMETER_COPIES: u64 = 4;
/// And in each graph: the gradient, and twice the flat copy that the fused conditioner takes.
const GRAPH_COPIES: u64 = 3;
/// Tensors of the size of the data that the graph keeps per step of the flow.
const GRAPH_TENSORS: u64 = 12;
/// Tensors of a mixture's size that the graph keeps.
const MIXTURE_TENSORS: u64 = 40;
/// Activations above which the fused conditioner keeps the gates alone (per coupling, bytes).
const KEPT: u64 = 16 << 20;
const F32: u64 = 4;

/// An estimate in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// Parameters, gradients, moments, average.
    pub parameters: u64,
    /// Activations of the forward and backward passes that go on at a time.
    pub activations: u64,
    /// Clips, once all are whitened.
    pub clips: u64,
}

impl Estimate {
    /// For a recipe with `values` parameters on clips of `samples` samples in all, and so many graphs at a time of so
    /// many segments.
    pub fn new(
        recipe: &Recipe,
        (values, samples): (usize, usize),
        passes: Passes,
        (graphs, segments): (usize, usize),
    ) -> Self {
        let (graphs, batch) = (graphs as u64, (graphs * segments) as u64);
        let (values, samples) = (values as u64, samples as u64);
        let mel = recipe.mel.n_mels as u64 * F32 / recipe.mel.hop_length as u64;
        let (group, hop) = (recipe.flow.group as u64, recipe.mel.hop_length as u64);
        let t = &recipe.training;
        let positions = batch * t.segment_samples as u64;
        let steps = positions / group;
        // conditioning at the step rate, or a row per frame
        let (rows, features) = match recipe.flow.conditioning {
            ConditioningConfig::Upsample { .. } => (steps, recipe.mel.n_mels as u64 * group),
            ConditioningConfig::Frame { channels, .. } => (positions / hop + batch, channels as u64),
            ConditioningConfig::Mel {} => (positions / hop, recipe.mel.n_mels as u64),
        };
        let mut activations = 3 * rows * features * F32;
        let mut largest = 0;
        let mut place = Place { channels: recipe.flow.group, squeezed: 1 };
        for step in recipe.flow.steps() {
            let steps = steps / place.squeezed as u64;
            let mut here = GRAPH_TENSORS * steps * place.channels as u64 * F32;
            let mut wavenet = |net: &WaveNetConfig, positions: u64| {
                let width = (net.channels * net.dilations.len()) as u64;
                let all = 3 * positions * width * F32;
                // of one sequence after the other, on each of its threads
                largest = largest.max(2 * all);
                match passes {
                    Passes { recompute: true, .. } => 0,
                    _ if all <= KEPT => all,
                    _ => all / 3 * 2,
                }
            };
            // what the graph makes at each position, layer by layer
            let graph = |width: usize, positions: u64| GRAPH_TENSORS * positions * width as u64 * F32;
            let values = steps * place.channels as u64;
            let mixture = |map: &MapConfig, values: u64| match map {
                MapConfig::MixLogistic { components } => MIXTURE_TENSORS * *components as u64 * values * F32,
                _ => 0,
            };
            here += match step {
                StepConfig::Coupling { net, map, .. } => wavenet(net, steps) + mixture(map, values / 2),
                StepConfig::Early { prior: Some(net), .. } => wavenet(net, steps),
                StepConfig::SeparableCoupling { net, .. } => {
                    let width = net.channels * net.layers;
                    graph(width, steps) + 2 * rows * 2 * width as u64 * F32
                }
                StepConfig::Autoregressive { by, net, map, .. } => {
                    let positions = values / *by as u64;
                    let net = match net {
                        SequenceConfig::Wavenet(net) => wavenet(net, positions),
                        SequenceConfig::Transformer(net) => {
                            let width = (4 + net.expansion) * net.channels + 2 * net.window * net.heads;
                            graph(width * net.layers, positions)
                        }
                    };
                    net + mixture(map, values)
                }
                StepConfig::Rowwise { net, map, .. } => {
                    graph(net.channels * net.dilations.len(), values) + mixture(map, values)
                }
                StepConfig::Residual { net, .. } => graph(3 * net.channels * net.layers, steps),
                _ => 0,
            };
            activations += here;
            place = step.after(place);
        }
        Self {
            parameters: (PARAMETER_COPIES + graphs * GRAPH_COPIES) * values * F32,
            activations: activations + largest,
            // 16-bit samples, residuals (kept unless whitened anew at each step), mel
            clips: samples * (2 + if recipe.whitens_anew() { 0 } else { F32 } + mel),
        }
    }

    /// All together.
    pub fn total(&self) -> u64 {
        self.parameters + self.activations + self.clips
    }
}

impl std::fmt::Display for Estimate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "memory about {}: parameters and moments {}, activations {}, clips {}",
            size(self.total()),
            size(self.parameters),
            size(self.activations),
            size(self.clips)
        )
    }
}

fn size(bytes: u64) -> String {
    let mega = bytes as f64 / 1e6;
    if mega < 1000.0 { format!("{mega:.0} MB") } else { format!("{:.1} GB", mega / 1000.0) }
}
