//! The design of a foreign model, read from its tensors' shapes.

use super::Halves;
use super::table::{Form, Part};
use crate::flow::FlowConfig;
use crate::flow::config::{Block, ConditioningConfig, SeparableConfig, StepConfig, WaveNetConfig};
use std::collections::{BTreeMap, BTreeSet};

/// Shapes by name; the names are those of a bare state dict.
pub type Shapes = BTreeMap<String, Vec<usize>>;

/// Most flows, and layers of a net, that we look for.
const MAX_COUNT: usize = 64;
/// Largest size of anything: far above any model, and products of a few don't overflow.
const MAX_SIZE: usize = 1 << 16;

/// A foreign model's design: all that its tensors say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Design {
    /// Mel bands.
    pub n_mels: usize,
    /// Channels of each flow, in the direction data → latent; the first is the group.
    pub flows: Vec<usize>,
    /// Residual channels of the conditioners.
    pub channels: usize,
    /// Width of their convolutions.
    pub kernel: usize,
    /// Layers of each.
    pub layers: usize,
    /// Weight norm is attached to every convolution that has it in training, and is kept.
    pub weight_norm: bool,
    /// What differs between the two families.
    pub family: Family,
}

/// What differs between the two families.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Family {
    /// NVIDIA's WaveGlow.
    WaveGlow {
        /// Kernel of the upsampler, samples.
        upsample: usize,
        /// A layer each for the conditioning, the residual and the skip connection, as before their fusion.
        separate_layers: bool,
    },
    /// SqueezeWave.
    SqueezeWave {
        /// Batch norm stands before the depthwise convolutions (or is folded into them).
        batch_norm: bool,
    },
}

impl Design {
    /// Reads the design from shapes.
    ///
    /// # Errors
    /// If a tensor that it needs is missing or has a strange shape.
    pub fn of(shapes: &Shapes, squeezewave: bool) -> Result<Self, String> {
        let weight = |conv: &str| {
            let found = ["weight_v", "weight", "parametrizations.weight.original1"]
                .iter()
                .find_map(|form| shapes.get(&format!("{conv}.{form}")));
            match found.map(Vec::as_slice) {
                Some(&[outputs, inputs, width]) => Ok([outputs, inputs, width]),
                Some(other) => Err(format!("{conv}.weight has shape {other:?}, expected three dimensions")),
                None => Err(format!("tensor {conv}.weight is missing, without which the design is unknown")),
            }
        };
        let count = |prefix: &str| (0..MAX_COUNT).take_while(|i| any(shapes, &format!("{prefix}{i}."))).count();
        let flow_count = count("WN.").max(count("convinv."));
        let flows = (0..flow_count)
            .map(|k| Ok(weight(&format!("convinv.{k}.conv"))?[0]))
            .collect::<Result<Vec<_>, String>>()?;
        let group = *flows.first().ok_or("it has no flows")?;
        let layers = count("WN.0.in_layers.");
        let (channels, kernel, cond_inputs, family);
        if squeezewave {
            let batch_norm = shapes.contains_key("WN.0.in_layers.0.0.running_var");
            let depth = weight(if batch_norm { "WN.0.in_layers.0.1" } else { "WN.0.in_layers.0.0" })?;
            (channels, kernel) = (depth[0], depth[2]);
            cond_inputs = weight("WN.0.cond_layer")?[1];
            family = Family::SqueezeWave { batch_norm };
        } else {
            let separate_layers = any(shapes, "WN.0.cond_layers.") || any(shapes, "WN.0.skip_layers.");
            let dilated = weight("WN.0.in_layers.0")?;
            (channels, kernel) = (dilated[1], dilated[2]);
            let cond = weight(if separate_layers { "WN.0.cond_layers.0" } else { "WN.0.cond_layer" })?[1];
            if !cond.is_multiple_of(group) {
                return Err(format!("conditioning of {cond} channels is no multiple of the group {group}"));
            }
            cond_inputs = cond / group;
            family = Family::WaveGlow { upsample: weight("upsample")?[2], separate_layers };
        }
        let upsample = if let Family::WaveGlow { upsample, .. } = family { upsample } else { 1 };
        for (what, size) in [
            ("channels", channels),
            ("kernel", kernel),
            ("group", group),
            ("mel bands", cond_inputs),
            ("upsampler", upsample),
        ] {
            if size == 0 || size > MAX_SIZE {
                return Err(format!("{what} of {size}, expected 1 to {MAX_SIZE}"));
            }
        }
        let mut design = Self { n_mels: cond_inputs, flows, channels, kernel, layers, weight_norm: true, family };
        if let Some(odd) = design.flows.iter().find(|c| **c < 2 || !c.is_multiple_of(2)) {
            return Err(format!("a flow of {odd} channels has no halves"));
        }
        if design.flows.windows(2).any(|pair| pair[1] > pair[0]) {
            return Err(format!("channels grow from flow to flow ({:?})", design.flows));
        }
        let parts = design.parts(1);
        design.weight_norm = parts.iter().filter(|part| part.normed).all(|part| {
            part.sources.iter().all(|(conv, _)| {
                shapes.contains_key(&format!("{conv}.weight_g"))
                    || shapes.contains_key(&format!("{conv}.parametrizations.weight.original0"))
            })
        });
        Ok(design)
    }

    /// Samples per step.
    pub fn group(&self) -> usize {
        self.flows[0]
    }

    /// Channels that are done before flow `k`.
    fn early(&self, k: usize) -> usize {
        if k == 0 { 0 } else { self.flows[k - 1] - self.flows[k] }
    }

    /// The design in our terms. `dilation(layer)` says how a WaveNet is dilated.
    pub fn flow_config(&self, halves: Halves, dilation: impl Fn(usize) -> usize) -> FlowConfig {
        let weight_norm = self.weight_norm;
        let (channels, kernel) = (self.channels, self.kernel);
        let (conditioning, coupling) = match self.family {
            Family::WaveGlow { upsample, .. } => {
                let dilations = (0..self.layers).map(dilation).collect();
                let net = WaveNetConfig { channels, kernel, dilations, weight_norm, skip: true, causal: false };
                (ConditioningConfig::Upsample { kernel: upsample }, StepConfig::coupling(net, None))
            }
            Family::SqueezeWave { batch_norm } => {
                let net = SeparableConfig { channels, kernel, layers: self.layers, weight_norm, norm: batch_norm };
                (ConditioningConfig::Mel {}, StepConfig::SeparableCoupling { net, bound: None })
            }
        };
        let mut steps = Vec::new();
        for k in 0..self.flows.len() {
            if self.early(k) > 0 {
                steps.push(StepConfig::early(self.early(k)));
            }
            steps.push(StepConfig::mix());
            if halves.swapped(k) {
                steps.extend([StepConfig::Swap {}, coupling.clone(), StepConfig::Swap {}]);
            } else {
                steps.push(coupling.clone());
            }
        }
        let blocks = vec![Block { repeat: 1, steps }];
        FlowConfig::new(conditioning, self.group(), blocks)
    }

    /// Every tensor of ours and those of theirs that it is made of; `hop` in samples.
    pub fn table(&self, halves: Halves, hop: usize) -> Vec<Part> {
        let mut parts = self.parts(hop);
        // where each flow's mix and coupling stand among the steps
        let (mut step, mut places) = (0, Vec::new());
        for k in 0..self.flows.len() {
            step += usize::from(self.early(k) > 0);
            let coupling = step + 1 + usize::from(halves.swapped(k));
            places.push((step, coupling));
            step = coupling + 1 + usize::from(halves.swapped(k));
        }
        for part in &mut parts {
            if let Some(k) = part.flow {
                let (mix, coupling) = places[k];
                let step = if part.form == Form::Square { mix } else { coupling };
                part.ours = format!("steps.{step}{}", part.ours);
            }
        }
        parts
    }

    /// The table with names of ours that begin after their step's.
    fn parts(&self, hop: usize) -> Vec<Part> {
        let (c, mut parts) = (self.channels, Vec::new());
        if let Family::WaveGlow { upsample, .. } = self.family {
            let form = Form::Upsample { hop, group: self.group() };
            let shape = [self.n_mels, upsample];
            parts.push(Part::new(None, "conditioning", vec![("upsample".into(), self.n_mels)], shape, form));
        }
        for (k, &channels) in self.flows.iter().enumerate() {
            let net = format!("WN.{k}");
            let mut add = |ours: &str, sources: Vec<(String, usize)>, shape, form| {
                parts.push(Part::new(Some(k), &format!(".{ours}"), sources, shape, form));
            };
            let mix = vec![(format!("convinv.{k}.conv"), channels)];
            add("weight", mix, [channels, 1], Form::Square);
            add("start", vec![(format!("{net}.start"), c)], [channels / 2, 1], Form::Normed);
            add("end", vec![(format!("{net}.end"), channels)], [c, 1], Form::Matrix);
            let each = |kind: &str, layers: std::ops::Range<usize>, width| {
                layers.map(|l| (format!("{net}.{kind}.{l}"), width)).collect::<Vec<_>>()
            };
            match self.family {
                Family::WaveGlow { separate_layers, .. } => {
                    let cond = if separate_layers {
                        each("cond_layers", 0..self.layers, 2 * c)
                    } else {
                        vec![(format!("{net}.cond_layer"), 2 * c * self.layers)]
                    };
                    add("cond", cond, [self.n_mels * self.group(), 1], Form::Normed);
                    for l in 0..self.layers {
                        let last = l + 1 == self.layers;
                        let out = match (separate_layers, last) {
                            (false, false) => each("res_skip_layers", l..l + 1, 2 * c),
                            (false, true) => each("res_skip_layers", l..l + 1, c),
                            (true, false) => {
                                [each("res_layers", l..l + 1, c), each("skip_layers", l..l + 1, c)].concat()
                            }
                            (true, true) => each("skip_layers", l..l + 1, c),
                        };
                        let conv = each("in_layers", l..l + 1, 2 * c);
                        add(&format!("layers.{l}.conv"), conv, [c, self.kernel], Form::Taps);
                        add(&format!("layers.{l}.out"), out, [c, 1], Form::Normed);
                    }
                }
                Family::SqueezeWave { batch_norm } => {
                    let cond = vec![(format!("{net}.cond_layer"), 2 * c * self.layers)];
                    add("cond", cond, [self.n_mels, 1], Form::Normed);
                    for l in 0..self.layers {
                        let layer = format!("{net}.in_layers.{l}");
                        let depth = usize::from(batch_norm);
                        if batch_norm {
                            let norm = vec![(format!("{layer}.0"), c)];
                            add(&format!("layers.{l}.norm"), norm, [0, 0], Form::BatchNorm);
                        }
                        let depthwise = vec![(format!("{layer}.{depth}"), c)];
                        add(&format!("layers.{l}.depth"), depthwise, [1, self.kernel], Form::Depthwise);
                        let pointwise = vec![(format!("{layer}.{}", depth + 1), 2 * c)];
                        add(&format!("layers.{l}.point"), pointwise, [c, 1], Form::Matrix);
                        let out = vec![(format!("{net}.res_skip_layers.{l}"), c)];
                        add(&format!("layers.{l}.out"), out, [c, 1], Form::Normed);
                    }
                }
            }
        }
        parts
    }

    /// Names that are needed and absent; those of a strange shape, in words; and those that no part of
    /// the design asks for.
    pub fn misfits(&self, shapes: &Shapes) -> (Vec<String>, Vec<String>, Vec<String>) {
        let (mut missing, mut strange, mut used) = (Vec::new(), Vec::new(), BTreeSet::new());
        for part in self.parts(1) {
            for (alternatives, optional) in part.needs() {
                // the first form that is there at all, or the last
                let there = |form: &&Vec<(String, Vec<usize>)>| form.iter().any(|(name, _)| shapes.contains_key(name));
                let form = alternatives.iter().find(there);
                if form.is_none() && optional {
                    continue;
                }
                for (name, expected) in form.or(alternatives.last()).into_iter().flatten() {
                    match shapes.get(name) {
                        None => missing.push(name.clone()),
                        Some(shape) if shape != expected => {
                            strange.push(format!("{name} has shape {shape:?}, expected {expected:?}"));
                        }
                        Some(_) => {}
                    }
                    used.insert(name.clone());
                }
            }
            // beside weight norm a plain weight is stale, and batch norm counts its batches
            for (conv, _) in &part.sources {
                used.extend([format!("{conv}.weight"), format!("{conv}.num_batches_tracked")]);
            }
        }
        let surplus = shapes.keys().filter(|name| !used.contains(*name)).cloned().collect();
        (missing, strange, surplus)
    }
}

fn any(shapes: &Shapes, prefix: &str) -> bool {
    shapes.range(prefix.to_string()..).next().is_some_and(|(name, _)| name.starts_with(prefix))
}
