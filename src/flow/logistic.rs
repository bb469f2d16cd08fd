//! Mixtures of logistics: the map `y = logit(F(x))` of their distribution function, and its inverse by
//! a safeguarded search for the root.

use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;

/// Bound of the components' log-scales, by `bound · tanh(o / bound)`.
const LOG_SCALE_BOUND: f64 = 5.0;
/// The components' means start evenly spread over ± this: equal components would stay equal.
const SPREAD: f64 = 1.5;
/// Steps of the search, at most. Bisection alone halves the bracket as often, beyond what f32 resolves.
const SEARCH_STEPS: usize = 100;
/// Where the search may stop: how far `logit(F(x))` is off, relative to its size above 1.
const TOLERANCE: f64 = 1e-9;

/// A mixture per value, each `[batch, steps, components, values]`.
pub struct Mixture {
    log_weight: Tensor,
    mean: Tensor,
    log_scale: Tensor,
}

impl Mixture {
    /// Of a net's outputs `[batch, steps, 3 · components · values]`: for each component the weights' logits of
    /// all values; then means; then log-scales. At zero, a broad hill around zero.
    ///
    /// # Errors
    /// If the shape doesn't fit.
    pub fn new(params: &Tensor, components: usize) -> Result<Self> {
        let (batch, steps, width) = params.dims3()?;
        let values = width / (3 * components);
        let part = |i: usize| {
            params.narrow(2, i * components * values, components * values)?.reshape((batch, steps, components, values))
        };
        let spread: Vec<f32> = (0..components).map(|k| spread(k, components) as f32).collect();
        let spread = Tensor::from_vec(spread, (1, 1, components, 1), params.device())?;
        Ok(Self {
            log_weight: candle_nn::ops::log_softmax(&part(0)?, 2)?,
            mean: part(1)?.broadcast_add(&spread)?,
            log_scale: ((part(2)? / LOG_SCALE_BOUND)?.tanh()? * LOG_SCALE_BOUND)?,
        })
    }

    /// `[batch, steps, values]` → `logit(F(x))` and the logarithm of its derivative.
    ///
    /// In logarithms throughout: in the far tails `F` is 0 or 1 in f32, its logit isn't.
    ///
    /// # Errors
    /// If the shapes don't fit.
    pub fn forward(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let t = (x.unsqueeze(2)?.broadcast_sub(&self.mean)? * self.log_scale.neg()?.exp()?)?;
        let (below, above) = (log_sigmoid(&t)?, log_sigmoid(&t.neg()?)?);
        let sum = |of: Tensor| (of + &self.log_weight)?.log_sum_exp(2);
        let density = sum(((&below + &above)? - &self.log_scale)?)?;
        let (below, above) = (sum(below)?, sum(above)?);
        let log_slope = ((density - &below)? - &above)?;
        Ok(((below - above)?, log_slope))
    }

    /// The inverse of [`Mixture::forward`], differentiable in `y` and the mixture.
    ///
    /// # Errors
    /// If a root isn't found: a value or the mixture isn't finite.
    pub fn inverse(&self, y: &Tensor) -> Result<Tensor> {
        let x = self.search(y)?;
        // a term of value zero carries the gradient of the implicit function
        let (reached, log_slope) = self.forward(&x)?;
        let slope = log_slope.detach().exp()?;
        x + (((y - y.detach())? - (&reached - reached.detach())?)? / slope)?
    }

    fn search(&self, y: &Tensor) -> Result<Tensor> {
        let (_, _, components, values) = self.mean.dims4()?;
        let flat = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
        let (weight, mean, scale) = (flat(&self.log_weight.exp()?)?, flat(&self.mean)?, flat(&self.log_scale.exp()?)?);
        let row = components * values;
        let roots = flat(y)?
            .par_chunks(values)
            .enumerate()
            .map(|(step, y)| {
                let mut mixture = vec![[0.0; 3]; components];
                y.iter()
                    .enumerate()
                    .map(|(value, &y)| {
                        for (k, part) in mixture.iter_mut().enumerate() {
                            let at = step * row + k * values + value;
                            *part = [weight[at], mean[at], scale[at]].map(f64::from);
                        }
                        root(&mixture, f64::from(y)).map(|x| x as f32)
                    })
                    .collect::<Option<Vec<f32>>>()
            })
            .collect::<Option<Vec<_>>>();
        let Some(roots) = roots else {
            candle_core::bail!("the search for a root of the mixture of logistics does not converge")
        };
        Tensor::from_vec(roots.concat(), y.shape(), y.device())
    }
}

/// Where the mean of component `k` starts.
fn spread(k: usize, components: usize) -> f64 {
    SPREAD * ((2 * k + 1) as f64 / components as f64 - 1.0)
}

/// The inverse of [`Mixture::forward`] for one value, whose parameters are `raw(part, component)`: part 0
/// the weights' logits, 1 the means, 2 the log-scales, as a net gives them. NaN if no root is found.
pub fn inverse_value(y: f32, components: usize, raw: impl Fn(usize, usize) -> f32) -> f32 {
    let raw = |part, k| f64::from(raw(part, k));
    let largest = (0..components).map(|k| raw(0, k)).fold(f64::NEG_INFINITY, f64::max);
    let mut mixture: Vec<[f64; 3]> = (0..components)
        .map(|k| {
            let log_scale = LOG_SCALE_BOUND * (raw(2, k) / LOG_SCALE_BOUND).tanh();
            [(raw(0, k) - largest).exp(), raw(1, k) + spread(k, components), log_scale.exp()]
        })
        .collect();
    let total: f64 = mixture.iter().map(|part| part[0]).sum();
    mixture.iter_mut().for_each(|part| part[0] /= total);
    root(&mixture, f64::from(y)).map_or(f32::NAN, |x| x as f32)
}

/// `log σ(t)` without overflow.
pub fn log_sigmoid(t: &Tensor) -> Result<Tensor> {
    (t.neg()?.relu()? + (t.abs()?.neg()?.exp()? + 1.0)?.log()?)?.neg()
}

/// `logit(F(x))` and its derivative, of components `[weight, mean, scale]`.
fn logit(mixture: &[[f64; 3]], x: f64) -> (f64, f64) {
    let log_sigmoid = |t: f64| -((-t).max(0.0) + (-t.abs()).exp().ln_1p());
    // sums of e^log relative to the largest term
    let (mut low, mut high) = (f64::NEG_INFINITY, f64::NEG_INFINITY);
    for [_, mean, scale] in mixture {
        let t = (x - mean) / scale;
        low = low.max(log_sigmoid(t));
        high = high.max(log_sigmoid(-t));
    }
    let (mut below, mut above, mut density) = (0.0, 0.0, 0.0);
    for [weight, mean, scale] in mixture {
        let t = (x - mean) / scale;
        let (a, b) = ((log_sigmoid(t) - low).exp(), (log_sigmoid(-t) - high).exp());
        below += weight * a;
        above += weight * b;
        density += weight * a * b / scale;
    }
    (low + below.ln() - high - above.ln(), density / (below * above))
}

/// The `x` with `logit(F(x)) = y`: Newton's steps, halving the bracket wherever one leaves it or gains
/// little. `None` if `y` or the mixture isn't finite.
///
/// `F` lies between its components' distribution functions, so the root lies between theirs.
fn root(mixture: &[[f64; 3]], y: f64) -> Option<f64> {
    let own = mixture.iter().map(|[_, mean, scale]| mean + scale * y);
    let (mut low, mut high) = own.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), x| (l.min(x), h.max(x)));
    let tolerance = TOLERANCE * y.abs().max(1.0);
    let mut x = 0.5 * (low + high);
    let mut last = f64::INFINITY;
    for _ in 0..SEARCH_STEPS {
        let (reached, slope) = logit(mixture, x);
        let off = reached - y;
        if !off.is_finite() {
            return None;
        }
        // in a flat stretch the bracket closes first
        if off.abs() < tolerance || high - low <= 1e-9 * x.abs().max(1.0) {
            return Some(x);
        }
        if off > 0.0 {
            high = x
        } else {
            low = x
        }
        let newton = x - off / slope;
        let gains = off.abs() < 0.5 * last;
        x = if gains && newton > low && newton < high { newton } else { 0.5 * (low + high) };
        last = off.abs();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn roots_are_found_in_flat_and_steep_mixtures_and_far_out() {
        // narrow hills far apart: between them the curve is flat, within them steep
        let mixtures = [
            vec![[0.3, -8.0, 0.007], [0.7, 9.0, 0.007]],
            vec![[1.0, 0.5, 148.0]],
            vec![[1e-6, 0.0, 1.0], [1.0, 3.0, 0.01]],
        ];
        for mixture in &mixtures {
            for y in [-900.0, -30.0, -1.0, -0.847_297_860, 0.0, 0.5, 12.0, 1e4] {
                let x = root(mixture, y).unwrap();
                let (reached, slope) = logit(mixture, x);
                assert!((reached - y).abs() < 1e-8 * (1.0 + y.abs() + slope * x.abs()), "{mixture:?} {y}: {reached}");
            }
        }
    }

    #[test]
    fn a_value_by_itself_has_the_same_inverse() {
        let params: Vec<f32> = (0..9).map(|i| ((i * 37) % 11) as f32 / 6.0 - 0.8).collect();
        for y in [-3.0, 0.4, 7.0] {
            let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap().reshape((1, 1, ())).unwrap();
            let whole = Mixture::new(&tensor(&params), 3).unwrap().inverse(&tensor(&[y])).unwrap();
            let whole: Vec<f32> = whole.flatten_all().unwrap().to_vec1().unwrap();
            let alone = inverse_value(y, 3, |part, k| params[3 * part + k]);
            assert!((alone - whole[0]).abs() < 1e-5 * (1.0 + alone.abs()), "{alone} {whole:?}");
        }
        assert!(inverse_value(f32::NAN, 3, |part, k| params[3 * part + k]).is_nan());
    }

    #[test]
    fn without_a_root_the_search_says_so() {
        assert_eq!(root(&[[1.0, 0.0, 1.0]], f64::NAN), None);
        assert_eq!(root(&[[1.0, f64::NAN, 1.0]], 0.0), None);
        let params = Tensor::zeros((1, 1, 6), DType::F32, &Device::Cpu).unwrap();
        let y = Tensor::new(&[[[f32::INFINITY]]], &Device::Cpu).unwrap();
        let error = Mixture::new(&params, 2).unwrap().inverse(&y).unwrap_err().to_string();
        assert!(error.contains("does not converge"), "{error}");
    }

    #[test]
    fn the_inverse_has_the_gradient_of_finite_differences() {
        let values: Vec<f32> = (0..24).map(|i| ((i * 37) % 11) as f32 / 6.0 - 0.8).collect();
        let params = Var::from_vec(values, (2, 1, 12), &Device::Cpu).unwrap();
        let y = Var::from_vec(vec![0.3f32, -1.2, 2.0, 0.1], (2, 1, 2), &Device::Cpu).unwrap();
        let sum = || Mixture::new(&params, 2).unwrap().inverse(&y).unwrap().sqr().unwrap().sum_all().unwrap();
        let grads = sum().backward().unwrap();
        for var in [&params, &y] {
            let origin: Vec<f32> = var.flatten_all().unwrap().to_vec1().unwrap();
            let grad: Vec<f32> = grads.get(var).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            for i in 0..origin.len() {
                let at = |h: f32| {
                    let mut moved = origin.clone();
                    moved[i] += h;
                    var.set(&Tensor::from_vec(moved, var.shape(), &Device::Cpu).unwrap()).unwrap();
                    sum().to_scalar::<f32>().unwrap()
                };
                let numerical = (at(1e-2) - at(-1e-2)) / 2e-2;
                at(0.0);
                assert!((numerical - grad[i]).abs() < 0.02 * (1.0 + numerical.abs()), "{i}: {numerical}, {}", grad[i]);
            }
        }
    }
}
