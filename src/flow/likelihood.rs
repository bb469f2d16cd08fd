//! What a flow's figure in bits per sample is worth.

use serde::{Deserialize, Serialize};

/// What a likelihood is, from the best downwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Likelihood {
    /// The likelihood itself.
    Exact,
    /// A lower bound of it: a latent variable or learned noise was drawn, not summed over.
    LowerBound,
    /// A random estimate of it.
    Estimate,
}

impl Likelihood {
    /// What to say behind a figure in bits per sample.
    pub fn remark(self) -> &'static str {
        match self {
            Self::Exact => "",
            Self::LowerBound => ", at most (the likelihood is a lower bound)",
            Self::Estimate => ", about (the likelihood is an estimate)",
        }
    }
}

impl std::fmt::Display for Likelihood {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Exact => "exact",
            Self::LowerBound => "a lower bound",
            Self::Estimate => "an estimate",
        })
    }
}
