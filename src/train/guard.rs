//! Watches losses and gradients: which steps must not be taken.

/// Gradient norms that the median is taken over; none is judged before there are so many.
const NORMS: usize = 101;
/// A norm that many times the median is a jump.
const JUMP: f32 = 10.0;

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

/// What is wrong with a step, if something is: its loss, its gradient norm, the norms of the steps
/// before it, and the norm that clipping leaves.
pub fn fault(loss: f64, norm: f64, norms: &[f32], clip_norm: f64) -> Option<Fault> {
    if !loss.is_finite() || !norm.is_finite() {
        return Some(Fault::NotFinite);
    }
    // a norm below the clip can't do harm, however small the usual ones are
    if norms.len() < NORMS || norm <= clip_norm {
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
        assert_eq!(fault(f64::NAN, 1.0, &norms, 1.0), Some(Fault::NotFinite));
        assert_eq!(fault(1.0, f64::INFINITY, &norms, 1.0), Some(Fault::NotFinite));
        assert_eq!(fault(1.0, 1e9, &norms, 1.0), None, "nothing to compare with yet");
        (0..300).for_each(|i| remember(&mut norms, 0.5 + f64::from(i % 7) / 10.0));
        assert_eq!(norms.len(), NORMS);
        assert_eq!(fault(1.0, 7.9, &norms, 1.0), None);
        assert_eq!(fault(1.0, 8.1, &norms, 1.0), Some(Fault::Jump { norm: 8.1, median: 0.8 }));
        assert_eq!(fault(1.0, 8.1, &norms, 10.0), None, "clipping leaves it as it is");
    }
}
