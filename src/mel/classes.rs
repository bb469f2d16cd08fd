//! Mels of means: what a voice's frames of one kind have in common.

use super::MelSpectrogram;
use super::smooth::Average;
use crate::net::params::uniform;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// Cepstral coefficients that tell kinds of frames apart, from the first on: the level isn't among them.
const CEPSTRA: usize = 13;
/// Standard deviation, in frames, of the mean that cepstra and levels are of.
const FRAMES: f32 = 1.5;

type Cepstra = [f32; CEPSTRA];

/// Kinds of frames, and what the mels of each are on average: what an acoustic model that knows little but a frame's
/// kind would say of it.
pub struct Classes {
    /// A frame of each class; a frame's class is the nearest one's.
    anchors: Vec<Cepstra>,
    /// Means of the frames' log-mels above their level, `[classes, bands]`.
    means: Vec<f32>,
    /// The mels' lowest value: their floor. No mean is below it.
    floor: f32,
}

impl Classes {
    /// So many classes of the mels' frames, at least one: each about a frame drawn by `rng`.
    ///
    /// # Panics
    /// If there is no mel.
    pub fn of(mels: &[&MelSpectrogram], count: usize, rng: &mut ChaCha8Rng) -> Self {
        let frames: Vec<Frames> = mels.par_iter().map(|mel| Frames::of(mel)).collect();
        let all: Vec<&Cepstra> = frames.iter().flat_map(|frames| &frames.cepstra).collect();
        let mut draw = || *all[((uniform(rng) * all.len() as f32) as usize).min(all.len() - 1)];
        // a frame drawn twice has one class, the other stays empty
        let anchors: Vec<Cepstra> = (0..count.max(1)).map(|_| draw()).collect();
        let bands = mels[0].n_mels();
        let floor = mels.iter().flat_map(|mel| mel.values()).copied().fold(f32::INFINITY, f32::min);
        let mut classes = Self { means: vec![0.0; anchors.len() * bands], anchors, floor };
        let kinds: Vec<Vec<usize>> = frames.par_iter().map(|frames| classes.kinds(frames)).collect();
        let mut sizes = vec![0_u32; classes.anchors.len()];
        for ((mel, frames), kinds) in mels.iter().zip(&frames).zip(&kinds) {
            for (f, (&kind, level)) in kinds.iter().zip(&frames.levels).enumerate() {
                sizes[kind] += 1;
                let sums = &mut classes.means[kind * bands..][..bands];
                sums.iter_mut().enumerate().for_each(|(band, sum)| *sum += mel.band(band)[f] - level);
            }
        }
        for (means, size) in classes.means.chunks_mut(bands).zip(sizes) {
            means.iter_mut().for_each(|mean| *mean /= size.max(1) as f32);
        }
        classes
    }

    /// The mel with each frame as its class is on average, at its own level.
    pub fn mean(&self, mel: &MelSpectrogram) -> MelSpectrogram {
        let frames = Frames::of(mel);
        let (bands, count) = (mel.n_mels(), mel.frames());
        let mut said = mel.clone();
        for (f, (kind, level)) in self.kinds(&frames).into_iter().zip(&frames.levels).enumerate() {
            for (band, mean) in self.means[kind * bands..][..bands].iter().enumerate() {
                said.values[band * count + f] = (level + mean).max(self.floor);
            }
        }
        said
    }

    fn kinds(&self, frames: &Frames) -> Vec<usize> {
        let far = |a: &Cepstra, b: &Cepstra| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
        let nearest = |own: &Cepstra| {
            let far = self.anchors.iter().map(|anchor| far(anchor, own));
            far.enumerate().min_by(|a, b| a.1.total_cmp(&b.1)).map_or(0, |(kind, _)| kind)
        };
        frames.cepstra.iter().map(nearest).collect()
    }
}

/// What is known of a mel's frames, smoothed over neighbours.
struct Frames {
    cepstra: Vec<Cepstra>,
    /// Means over the bands, nats.
    levels: Vec<f32>,
}

impl Frames {
    fn of(mel: &MelSpectrogram) -> Self {
        let (bands, smooth) = (mel.n_mels(), Average::new(FRAMES));
        let project = |order: usize| {
            let mut sums = vec![0.0; mel.frames()];
            for band in 0..bands {
                let angle = std::f32::consts::PI * order as f32 * (band as f32 + 0.5) / bands as f32;
                let weight = angle.cos() / bands as f32;
                sums.iter_mut().zip(mel.band(band)).for_each(|(sum, value)| *sum += weight * value);
            }
            let mut means = sums.clone();
            smooth.of(&sums, &mut means);
            means
        };
        let cepstra: Vec<Vec<f32>> = (1..=CEPSTRA).map(project).collect();
        let frame = |f: usize| std::array::from_fn(|order| cepstra[order][f]);
        Self { cepstra: (0..mel.frames()).map(frame).collect(), levels: project(0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::params::named_rng;

    /// Frames that rise or fall over the bands, in turn for 20 frames each, with noise and a level of their own.
    fn mel(name: &str, noise: f32) -> MelSpectrogram {
        let mut rng = named_rng(1, name);
        let mut value = |i: usize| {
            let (band, f) = (i / 200, i % 200);
            let slope = if f / 20 % 2 == 0 { 0.1 } else { -0.1 };
            -5.0 + f as f32 * 0.01 + slope * (band as f32 - 19.5) + noise * (uniform(&mut rng) - 0.5)
        };
        MelSpectrogram::new((0..40 * 200).map(&mut value).collect(), 40).unwrap()
    }

    #[test]
    fn frames_become_what_their_kind_has_in_common() {
        let (plain, noisy) = (mel("a", 0.0), mel("a", 1.0));
        let classes = Classes::of(&[&noisy, &mel("b", 1.0)], 12, &mut named_rng(3, "classes"));
        let said = classes.mean(&noisy);
        // where the slopes change, smoothed cepstra lie between the two
        let inner: Vec<usize> = (0..40 * 200).filter(|i| (4..16).contains(&(i % 20))).collect();
        let off = |mel: &MelSpectrogram| {
            inner.iter().map(|&i| (mel.values()[i] - plain.values()[i]).abs()).sum::<f32>() / inner.len() as f32
        };
        assert!(off(&noisy) > 0.24, "{}", off(&noisy));
        assert!(off(&said) < 0.08, "{}", off(&said));
    }

    #[test]
    fn of_one_kind_all_frames_are_alike_but_for_their_level() {
        let mel = mel("a", 1.0);
        for clips in [vec![&mel], vec![&mel, &mel]] {
            let said = Classes::of(&clips, 1, &mut named_rng(3, "classes")).mean(&mel);
            for band in 1..40 {
                let above = |f: usize| said.band(band)[f] - said.band(0)[f];
                assert!((0..200).all(|f| (above(f) - above(0)).abs() < 1e-4));
            }
            // their mean stays
            let mean = |mel: &MelSpectrogram| mel.values().iter().sum::<f32>() / mel.values().len() as f32;
            assert!((mean(&said) - mean(&mel)).abs() < 1e-3);
        }
    }

    #[test]
    fn nothing_is_below_the_floor() {
        // loud frames rise over the bands, quiet ones lie on the floor: on average half of that rise
        let value = |i: usize| if i % 10 < 5 { 0.3 * (i / 10) as f32 - 6.0 } else { -11.0 };
        let mel = MelSpectrogram::new((0..40 * 10).map(value).collect(), 40).unwrap();
        let said = Classes::of(&[&mel], 1, &mut named_rng(3, "classes")).mean(&mel);
        assert!(said.values().iter().all(|value| *value >= -11.0));
        assert!(said.values().contains(&-11.0), "it would have been");
    }

    #[test]
    fn a_single_frame_has_its_class() {
        let mel = MelSpectrogram::new(vec![-3.0, -5.0, -4.0], 3).unwrap();
        let said = Classes::of(&[&mel], 500, &mut named_rng(3, "classes")).mean(&mel);
        said.values().iter().zip(mel.values()).for_each(|(said, own)| assert!((said - own).abs() < 1e-5));
    }
}
