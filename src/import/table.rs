//! How each tensor of ours is made of theirs.

use crate::Result;
use candle_core::{DType, Tensor};

/// Batch norm's guard of the variance: PyTorch's default, which SqueezeWave leaves alone.
const BATCH_NORM_EPS: f64 = 1e-5;

/// How a convolution's weight is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `[out, in, 1]` → `[in, out]`.
    Matrix,
    /// As [`Form::Matrix`], with weight norm in training.
    Normed,
    /// `[out, in, taps]` → `[taps, in, out]`, with weight norm in training.
    Taps,
    /// `[channels, channels, 1]` → `[channels, channels]`; no bias.
    Square,
    /// `[channels, 1, taps]` → `[taps, channels]`.
    Depthwise,
    /// A transposed convolution `[in, out, kernel]` → `[kernel / hop, in, hop · out]`, the squeeze to
    /// `group` samples built into the order of its columns.
    Upsample {
        /// Samples per frame.
        hop: usize,
        /// Samples per step.
        group: usize,
    },
    /// `weight`, `bias`, `running_mean`, `running_var` → scale and shift.
    BatchNorm,
}

/// A tensor of ours with its bias and weight norm, and what it is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The flow that it belongs to.
    pub flow: Option<usize>,
    /// Our name without `.weight`, `.magnitude` and `.bias` (but [`Form::Square`]'s, which is whole).
    pub ours: String,
    /// Their convolutions, to be joined along the outputs: name and outputs.
    pub sources: Vec<(String, usize)>,
    /// Inputs and taps of their weights.
    inner: [usize; 2],
    /// How the weight is laid out.
    pub form: Form,
    /// Whether it has weight norm in training.
    pub normed: bool,
}

/// Names with the shapes that they must have.
type Named = Vec<(String, Vec<usize>)>;

impl Part {
    pub(super) fn new(
        flow: Option<usize>,
        ours: &str,
        sources: Vec<(String, usize)>,
        inner: [usize; 2],
        form: Form,
    ) -> Self {
        let normed = matches!(form, Form::Normed | Form::Taps);
        Self { flow, ours: ours.to_string(), sources, inner, form, normed }
    }

    /// What must be there: for each need its alternatives, and whether it may be absent.
    pub(super) fn needs(&self) -> Vec<(Vec<Named>, bool)> {
        let mut needs = Vec::new();
        for (conv, outputs) in &self.sources {
            let named = |name: &str, shape: Vec<usize>| (format!("{conv}.{name}"), shape);
            let vector = vec![*outputs];
            if self.form == Form::BatchNorm {
                let names = ["weight", "bias", "running_mean", "running_var"];
                needs.push((vec![names.map(|name| named(name, vector.clone())).to_vec()], false));
                continue;
            }
            let weight = vec![*outputs, self.inner[0], self.inner[1]];
            let magnitude = vec![*outputs, 1, 1];
            let old = vec![named("weight_g", magnitude.clone()), named("weight_v", weight.clone())];
            let new = vec![
                named("parametrizations.weight.original0", magnitude),
                named("parametrizations.weight.original1", weight.clone()),
            ];
            needs.push((vec![old, new, vec![named("weight", weight)]], false));
            if self.form != Form::Square {
                needs.push((vec![vec![named("bias", vector)]], false));
            }
        }
        needs
    }

    /// Our tensors from theirs. `get` gives one by name, or nothing: then what needs it is left out
    /// (gradients and parts of a model can be renamed, too). With `weight_norm` magnitudes stay apart,
    /// else they are multiplied in.
    ///
    /// # Errors
    /// If shapes don't fit, or `get` fails.
    pub fn convert(
        &self,
        weight_norm: bool,
        get: &mut impl FnMut(&str) -> Result<Option<Tensor>>,
    ) -> Result<Vec<(String, Tensor)>> {
        let mut ours = Vec::new();
        if self.form == Form::BatchNorm {
            let conv = &self.sources[0].0;
            let mut part = |name: &str| get(&format!("{conv}.{name}"));
            if let (Some(weight), Some(bias), Some(mean), Some(var)) =
                (part("weight")?, part("bias")?, part("running_mean")?, part("running_var")?)
            {
                let (scale, shift) = fold_batch_norm([&weight, &bias, &mean, &var])?;
                ours.push((format!("{}.scale", self.ours), scale));
                ours.push((format!("{}.shift", self.ours), shift));
            }
            return Ok(ours);
        }
        let keep = weight_norm && self.normed;
        let (mut weights, mut magnitudes, mut biases) = (Vec::new(), Vec::new(), Vec::new());
        for (conv, _) in &self.sources {
            let magnitude = either(get, conv, ["weight_g", "parametrizations.weight.original0"])?;
            let direction = either(get, conv, ["weight_v", "parametrizations.weight.original1"])?;
            weights.push(match (direction, &magnitude) {
                (Some(direction), Some(magnitude)) if !keep => Some(fold_weight_norm(&direction, magnitude)?),
                (Some(direction), _) => Some(direction),
                (None, _) => get(&format!("{conv}.weight"))?,
            });
            magnitudes.push(magnitude);
            biases.push(get(&format!("{conv}.bias"))?);
        }
        if let Some(weight) = join(weights)? {
            let name = if self.form == Form::Square { self.ours.clone() } else { format!("{}.weight", self.ours) };
            ours.push((name, self.lay_out(&weight)?));
        }
        if let Some(magnitude) = join(magnitudes)?.filter(|_| keep) {
            ours.push((format!("{}.magnitude", self.ours), magnitude.flatten_all()?));
        }
        if let Some(bias) = join(biases)?.filter(|_| self.form != Form::Square) {
            ours.push((format!("{}.bias", self.ours), bias));
        }
        Ok(ours)
    }

    fn lay_out(&self, weight: &Tensor) -> Result<Tensor> {
        let weight = match self.form {
            Form::Matrix | Form::Normed => weight.squeeze(2)?.t()?,
            Form::Taps => weight.permute((2, 1, 0))?,
            Form::Square => weight.squeeze(2)?,
            Form::Depthwise => weight.squeeze(1)?.t()?,
            Form::Upsample { hop, group } => {
                let (inputs, outputs, kernel) = weight.dims3()?;
                // [in, out, tap · hop/group · group] → [tap, in, hop/group · out · group]
                let weight = weight.reshape(vec![inputs, outputs, kernel / hop, hop / group, group])?;
                let weight = weight.permute(vec![2, 0, 3, 1, 4])?.contiguous()?;
                weight.reshape((kernel / hop, inputs, hop * outputs))?
            }
            Form::BatchNorm => weight.clone(),
        };
        Ok(weight.contiguous()?)
    }
}

fn either(
    get: &mut impl FnMut(&str) -> Result<Option<Tensor>>,
    conv: &str,
    names: [&str; 2],
) -> Result<Option<Tensor>> {
    match get(&format!("{conv}.{}", names[0]))? {
        Some(tensor) => Ok(Some(tensor)),
        None => get(&format!("{conv}.{}", names[1])),
    }
}

/// All along the first dimension, unless one is absent.
fn join(parts: Vec<Option<Tensor>>) -> Result<Option<Tensor>> {
    let Some(mut parts) = parts.into_iter().collect::<Option<Vec<_>>>() else { return Ok(None) };
    match parts.len() {
        1 => Ok(parts.pop()),
        _ => Ok(Some(Tensor::cat(&parts, 0)?)),
    }
}

/// `g · v / ‖v‖`, norms over all dimensions but the first.
fn fold_weight_norm(v: &Tensor, g: &Tensor) -> Result<Tensor> {
    let (v, g) = (v.to_dtype(DType::F32)?, g.to_dtype(DType::F32)?.flatten_all()?);
    let norm = v.flatten_from(1)?.sqr()?.sum(1)?.sqrt()?;
    Ok(v.broadcast_mul(&(g / norm)?.reshape(((), 1, 1))?)?)
}

/// Scale and shift of a batch norm in evaluation.
fn fold_batch_norm([weight, bias, mean, var]: [&Tensor; 4]) -> Result<(Tensor, Tensor)> {
    let double = |t: &Tensor| t.to_dtype(DType::F64);
    let scale = (double(weight)? / (double(var)? + BATCH_NORM_EPS)?.sqrt()?)?;
    let shift = (double(bias)? - (double(mean)? * &scale)?)?;
    Ok((scale.to_dtype(DType::F32)?, shift.to_dtype(DType::F32)?))
}
