//! Watches losses and gradients: which steps must not be taken.

/// Gradient norms that the median is taken over; none is judged before there are so many.
const NORMS: usize = 101;
/// A norm that many times the median is a jump. Clipping takes care of what lies below: segments
/// with a click or a loud pop are there to be learnt.
const JUMP: f32 = 1000.0;

/// Why a step must not be taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// The loss or the gradient is not finite.
    NotFinite,
    /// The gradient's norm is far above the usual.
    Jump {
        /// The norm.
        norm: f64,
        /// The median of the last norms.
        median: f32,
    },
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotFinite => write!(f, "loss or gradient is not finite"),
            Self::Jump { norm, median } => write!(f, "gradient norm jumps to {norm:.2}, usual is {median:.2}"),
        }
    }
}

/// What is wrong with a step, if something is: its loss, its gradient norm, and the norms of the
/// steps before it.
pub fn fault(loss: f64, norm: f64, norms: &[f32]) -> Option<Fault> {
    if !loss.is_finite() || !norm.is_finite() {
        return Some(Fault::NotFinite);
    }
    if norms.len() < NORMS {
        return None;
    }
    let mut sorted = norms.to_vec();
    let (_, &mut median, _) = sorted.select_nth_unstable_by(norms.len() / 2, f32::total_cmp);
    (norm as f32 > JUMP * median).then_some(Fault::Jump { norm, median })
}

/// Adds the norm of a step that was taken.
pub fn remember(norms: &mut Vec<f32>, norm: f64) {
    norms.push(norm as f32);
    if norms.len() > NORMS {
        norms.remove(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_far_off_is_a_fault() {
        let mut norms = Vec::new();
        assert_eq!(fault(f64::NAN, 1.0, &norms), Some(Fault::NotFinite));
        assert_eq!(fault(1.0, f64::INFINITY, &norms), Some(Fault::NotFinite));
        assert_eq!(fault(1.0, 1e9, &norms), None, "nothing to compare with yet");
        (0..300).for_each(|i| remember(&mut norms, 0.5 + f64::from(i % 7) / 10.0));
        assert_eq!(norms.len(), NORMS);
        assert_eq!(fault(1.0, 799.0, &norms), None);
        assert_eq!(fault(1.0, 801.0, &norms), Some(Fault::Jump { norm: 801.0, median: 0.8 }));
    }
}
