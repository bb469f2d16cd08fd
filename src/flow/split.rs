//! Which channels a coupling knows, and which it moves.

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

/// How a coupling divides the channels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// The first half is known, the second moves; of an odd number, the second has one more.
    #[default]
    Halves,
    /// What [`Split::Halves`] moves is known, the rest moves.
    Swapped,
    /// Channels 0, 2, 4, … of an even number are known: within a group of samples, every other one.
    Even,
    /// Channels 1, 3, 5, … of an even number are known.
    Odd,
}

impl Split {
    /// Where the parts of `channels` channels lie.
    pub fn of(self, channels: usize) -> Parts {
        match self {
            Self::Halves => Parts::Blocks { known: channels / 2, moved: channels - channels / 2, known_first: true },
            Self::Swapped => Parts::Blocks { known: channels - channels / 2, moved: channels / 2, known_first: false },
            Self::Even => Parts::Combs { each: channels / 2, known_first: true },
            Self::Odd => Parts::Combs { each: channels / 2, known_first: false },
        }
    }
}

/// The known and the moved channels of a coupling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parts {
    /// One behind the other.
    Blocks {
        /// Known channels.
        known: usize,
        /// Moved channels.
        moved: usize,
        /// Which lie in front.
        known_first: bool,
    },
    /// Alternating.
    Combs {
        /// Channels of either part.
        each: usize,
        /// Whether channel 0 is known.
        known_first: bool,
    },
}

impl Parts {
    /// Known channels.
    pub fn known(&self) -> usize {
        match *self {
            Self::Blocks { known, .. } => known,
            Self::Combs { each, .. } => each,
        }
    }

    /// Moved channels.
    pub fn moved(&self) -> usize {
        match *self {
            Self::Blocks { moved, .. } => moved,
            Self::Combs { each, .. } => each,
        }
    }

    /// `[batch, steps, channels]` → known and moved channels.
    pub fn take(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        match *self {
            Self::Blocks { known, moved, known_first: true } => {
                Ok((x.narrow(2, 0, known)?, x.narrow(2, known, moved)?))
            }
            Self::Blocks { known, moved, known_first: false } => {
                Ok((x.narrow(2, moved, known)?, x.narrow(2, 0, moved)?))
            }
            Self::Combs { each, known_first } => {
                let (batch, steps, _) = x.dims3()?;
                let pairs = x.reshape((batch, steps, each, 2))?;
                let comb = |i| pairs.narrow(3, i, 1)?.squeeze(3);
                let known = usize::from(!known_first);
                Ok((comb(known)?, comb(1 - known)?))
            }
        }
    }

    /// The inverse of [`Parts::take`].
    pub fn join(&self, known: &Tensor, moved: &Tensor) -> Result<Tensor> {
        match *self {
            Self::Blocks { known_first: true, .. } => Tensor::cat(&[known, moved], 2),
            Self::Blocks { known_first: false, .. } => Tensor::cat(&[moved, known], 2),
            Self::Combs { known_first, .. } => {
                let pair = if known_first { [known, moved] } else { [moved, known] };
                Tensor::stack(&pair, 3)?.flatten_from(2)
            }
        }
    }

    /// Whether the known channels lie in front, one behind the other.
    pub fn known_leads(&self) -> bool {
        matches!(self, Self::Blocks { known_first: true, .. })
    }

    /// The places of the known channels, in order.
    pub fn known_channels(&self) -> impl Iterator<Item = usize> + Clone {
        self.channels(true)
    }

    /// The places of the moved channels, in order.
    pub fn moved_channels(&self) -> impl Iterator<Item = usize> + Clone {
        self.channels(false)
    }

    fn channels(&self, of_known: bool) -> impl Iterator<Item = usize> + Clone {
        let (count, other) = if of_known { (self.known(), self.moved()) } else { (self.moved(), self.known()) };
        let (first, stride) = match *self {
            Self::Blocks { known_first, .. } => (if known_first == of_known { 0 } else { other }, 1),
            Self::Combs { known_first, .. } => (usize::from(known_first != of_known), 2),
        };
        (0..count).map(move |i| first + i * stride)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn parts_are_all_the_channels_once() {
        for (split, channels, known) in [
            (Split::Halves, 5, vec![0, 1]),
            (Split::Swapped, 5, vec![2, 3, 4]),
            (Split::Even, 4, vec![0, 2]),
            (Split::Odd, 4, vec![1, 3]),
        ] {
            let parts = split.of(channels);
            assert_eq!(parts.known_channels().collect::<Vec<_>>(), known);
            let x = Tensor::arange(0f32, 3.0 * channels as f32, &Device::Cpu).unwrap();
            let x = x.reshape((1, 3, channels)).unwrap();
            let (a, b) = parts.take(&x).unwrap();
            let row = |t: &Tensor| t.get(0).unwrap().get(0).unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(row(&a), known.iter().map(|&i| i as f32).collect::<Vec<_>>());
            assert_eq!(row(&b), parts.moved_channels().map(|i| i as f32).collect::<Vec<_>>());
            let back = parts.join(&a, &b).unwrap();
            assert_eq!(back.to_vec3::<f32>().unwrap(), x.to_vec3::<f32>().unwrap());
        }
    }
}
