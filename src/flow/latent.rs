//! A latent variable beside the flow: what the mel leaves open about a frame as a whole.

use super::Cond;
use super::config::LatentConfig;
use crate::net::params::{named_rng, normal};
use crate::net::wavenet::Projection;
use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

/// Bound of the log-deviations, by `bound · tanh(o / bound)`.
const BOUND: f64 = 3.0;

/// A Gaussian latent `h` for each frame, which conditions the flow beside the mel.
///
/// `log p(x|mel) ≥ E[log p(x|h, mel)] − KL(q(h|x, mel) ‖ p(h|mel))`, `h` from the encoder `q`; to speak,
/// `h` is drawn from the prior `p`. Both start as the standard normal. Su & Wu 2018 (f-VAEs).
pub struct Latent {
    hidden: Projection,
    posterior: Projection,
    prior: Projection,
    width: usize,
    hop: usize,
}

/// Mean and log-deviation, `[batch, frames, width]` each.
struct Gaussian {
    mean: Tensor,
    log_s: Tensor,
}

impl Gaussian {
    fn of(params: &Tensor) -> Result<Self> {
        let width = params.dim(2)? / 2;
        let log_s = ((params.narrow(2, width, width)? / BOUND)?.tanh()? * BOUND)?;
        Ok(Self { mean: params.narrow(2, 0, width)?, log_s })
    }

    fn at(&self, noise: &Tensor) -> Result<Tensor> {
        &self.mean + (self.log_s.exp()? * noise)?
    }

    /// KL(self ‖ other) of each batch item, nats.
    fn divergence(&self, other: &Self) -> Result<Tensor> {
        let ratio = (&self.log_s - &other.log_s)?;
        let distance = ((&self.mean - &other.mean)? * other.log_s.neg()?.exp()?)?;
        (((((&ratio * 2.0)?.exp()? + distance.sqr()?)? - 1.0)? * 0.5)? - ratio)?.sum((1, 2))
    }
}

impl Latent {
    /// Asks `vb` for `hidden`, `posterior` and `prior`; `features` are those of the mel's rows.
    pub fn new(config: &LatentConfig, features: usize, hop: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            hidden: Projection::new(hop + features, config.hidden, false, vb.pp("hidden"))?,
            posterior: Projection::zeros(config.hidden, 2 * config.width, vb.pp("posterior"))?,
            prior: Projection::zeros(features, 2 * config.width, vb.pp("prior"))?,
            width: config.width,
            hop,
        })
    }

    /// Values of a frame's latent.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Multiply-adds per frame of speech: those of the prior.
    pub fn macs_per_frame(&self) -> usize {
        self.prior.macs()
    }

    /// Data `[batch, steps, group]` → conditioning with a latent that the encoder drew, and the bound's
    /// −KL, `[batch]`, nats. The draw is a function of the data, so that a figure can be repeated.
    ///
    /// # Errors
    /// If the shapes don't fit.
    pub fn encode(&self, x: &Tensor, cond: &Cond) -> Result<(Cond, Tensor)> {
        let x = self.frames(x)?;
        let (batch, frames, _) = x.dims3()?;
        let rows = cond.rows.narrow(1, 0, frames)?;
        let hidden = candle_nn::ops::silu(&self.hidden.forward(&Tensor::cat(&[&x, &rows], 2)?)?)?;
        let posterior = Gaussian::of(&self.posterior.forward(&hidden)?)?;
        let prior = Gaussian::of(&self.prior.forward(&rows.contiguous()?)?)?;
        let items: Vec<Vec<f32>> = x.flatten_from(1)?.to_vec2()?;
        let noise: Vec<f32> = items.iter().flat_map(|x| normals(x, frames * self.width)).collect();
        let noise = Tensor::from_vec(noise, (batch, frames, self.width), x.device())?;
        Ok((Self::beside(cond, &posterior.at(&noise)?)?, posterior.divergence(&prior)?.neg()?))
    }

    /// Latents `[batch, steps, group]` → conditioning with a latent drawn from the prior.
    ///
    /// The draw is a function of the frame's own noise, and as strong: the same in every block that a frame
    /// is worked out in, and the mean for silence.
    ///
    /// # Errors
    /// If the shapes don't fit.
    pub fn draw(&self, z: &Tensor, cond: &Cond) -> Result<Cond> {
        let z = self.frames(z)?;
        let (batch, frames, hop) = z.dims3()?;
        let prior = Gaussian::of(&self.prior.forward(&cond.rows.narrow(1, 0, frames)?.contiguous()?)?)?;
        let values: Vec<f32> = z.flatten_all()?.to_vec1()?;
        let noise = values.chunks_exact(hop).flat_map(|z| {
            let power = z.iter().map(|z| z * z).sum::<f32>() / hop as f32;
            normals(z, self.width).map(move |v| v * power.sqrt())
        });
        let noise = Tensor::from_vec(noise.collect(), (batch, frames, self.width), z.device())?;
        Self::beside(cond, &prior.at(&noise)?)
    }

    fn frames(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, steps, group) = x.dims3()?;
        x.contiguous()?.reshape((batch, steps * group / self.hop, self.hop))
    }

    /// Latents beside the mel's rows; the row after the last frame, which is only leant towards, has none.
    pub fn beside(cond: &Cond, h: &Tensor) -> Result<Cond> {
        let h = h.pad_with_zeros(1, 0, cond.rows.dim(1)? - h.dim(1)?)?;
        Ok(Cond { rows: Tensor::cat(&[&cond.rows, &h], 2)?, ..*cond })
    }
}

/// `count` normal values that follow from `values`, bit for bit (FNV-1a picks the stream).
fn normals(values: &[f32], count: usize) -> impl Iterator<Item = f32> + use<> {
    let seed = values
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |h, v| (h ^ u64::from(v.to_bits())).wrapping_mul(0x0100_0000_01b3));
    let mut rng = named_rng(seed, "latent");
    (0..count).map(move |_| normal(&mut rng))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn tensor(seed: u64, dims: (usize, usize, usize)) -> Tensor {
        let mut rng = named_rng(seed, "test");
        let values: Vec<f32> = (0..dims.0 * dims.1 * dims.2).map(|_| normal(&mut rng)).collect();
        Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
    }

    /// Against the mean of log q − log p over draws from q.
    #[test]
    fn the_divergence_is_that_of_its_definition() {
        let (q, p) = (Gaussian::of(&tensor(1, (2, 3, 8))).unwrap(), Gaussian::of(&tensor(2, (2, 3, 8))).unwrap());
        let stated: Vec<f32> = q.divergence(&p).unwrap().to_vec1().unwrap();
        let log = |g: &Gaussian, h: &Tensor| {
            let off = ((h - &g.mean).unwrap() * g.log_s.neg().unwrap().exp().unwrap()).unwrap();
            ((off.sqr().unwrap() * -0.5).unwrap() - &g.log_s).unwrap().sum((1, 2)).unwrap().to_vec1::<f32>().unwrap()
        };
        let (mut sums, draws) = ([0.0; 2], 4000);
        for draw in 0..draws {
            let h = q.at(&tensor(10 + draw, (2, 3, 4))).unwrap();
            let terms = log(&q, &h).into_iter().zip(log(&p, &h));
            sums.iter_mut().zip(terms).for_each(|(sum, (q, p))| *sum += f64::from(q - p) / draws as f64);
        }
        for (sum, stated) in sums.iter().zip(stated) {
            assert!((sum - f64::from(stated)).abs() < 0.05 * sum.abs() + 0.1, "{sum}, stated {stated}");
        }
    }
}
