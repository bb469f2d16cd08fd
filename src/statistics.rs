//! Means with their confidence.

use serde::Serialize;

/// 97.5 % quantiles of Student's t with 1 to 10 degrees of freedom.
const T: [f64; 10] = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228];
/// The same of the normal distribution.
const Z: f64 = 1.959_964;

/// A mean over clips.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Mean {
    /// The mean.
    pub mean: f64,
    /// Half the width of its 95 % confidence interval (Student's t); none from one value alone.
    pub ci95: Option<f64>,
    /// How many values it is of.
    pub count: usize,
}

impl Mean {
    /// Of the values that are finite; `None` without any.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        let count = values.len();
        if count == 0 {
            return None;
        }
        let n = count as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0);
        Some(Self { mean, ci95: (count > 1).then(|| quantile(count - 1) * (variance / n).sqrt()), count })
    }
}

/// 97.5 % quantile of Student's t; beyond the table by its expansion about the normal distribution's
/// (Abramowitz & Stegun 26.7.5), there right to a thousandth.
fn quantile(degrees: usize) -> f64 {
    let v = degrees as f64;
    let [z, z3, z5, z7] = [1, 3, 5, 7].map(|power| Z.powi(power));
    let expanded = z
        + (z3 + z) / (4.0 * v)
        + (5.0 * z5 + 16.0 * z3 + 3.0 * z) / (96.0 * v * v)
        + (3.0 * z7 + 19.0 * z5 + 17.0 * z3 - 15.0 * z) / (384.0 * v * v * v);
    T.get(degrees - 1).copied().unwrap_or(expanded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_the_tables() {
        for (degrees, expected) in [(1, 12.706), (10, 2.228), (11, 2.201), (29, 2.045), (100, 1.984)] {
            assert!((quantile(degrees) - expected).abs() < 1e-3, "{degrees}: {}", quantile(degrees));
        }
    }

    #[test]
    fn the_mean_of_few_and_none() {
        assert_eq!(Mean::of([]), None);
        assert_eq!(Mean::of([f64::NAN]), None);
        assert_eq!(Mean::of([2.0, f64::INFINITY]), Some(Mean { mean: 2.0, ci95: None, count: 1 }));
        let two = Mean::of([1.0, 3.0]).unwrap();
        assert_eq!((two.mean, two.count), (2.0, 2));
        assert!((two.ci95.unwrap() - 12.706).abs() < 1e-9);
    }
}
