//! Warm start: a new run with the weights of a voice.

use super::config::Recipe;
use crate::flow::WHITENING_PREFIX;
use crate::net::Params;
use crate::voice::Voice;
use crate::{Error, Result};
use candle_core::DType;
use std::collections::BTreeSet;

/// What became of the weights of a run that starts from a voice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WarmStart {
    /// Parameters that were taken from the voice.
    pub taken: BTreeSet<String>,
    /// Parameters that the voice hasn't, or not in that shape: they start as in a new run.
    pub fresh: Vec<String>,
    /// The voice's tensors that the run doesn't use.
    pub unused: Vec<String>,
}

impl WarmStart {
    /// Puts the voice's weights into `params` wherever name and shape are the same; a weight with
    /// weight norm is never taken for one without.
    ///
    /// # Errors
    /// If the recipe's mel isn't the voice's, or nothing fits.
    pub fn apply(voice: &Voice, recipe: &Recipe, params: &Params) -> Result<Self> {
        let name = &voice.config().name;
        if voice.config().mel != recipe.mel {
            return Err(Error::invalid(format!(
                "recipe {} has another mel convention than voice {name}; leave --recipe out, or change its mel section",
                recipe.name
            )));
        }
        let mut theirs = voice.tensors()?;
        let ours = params.named();
        let normed = |names: &BTreeSet<&str>, name: &str| {
            name.strip_suffix(".weight").is_some_and(|base| names.contains(format!("{base}.magnitude").as_str()))
        };
        let own: BTreeSet<&str> = ours.iter().map(|(name, _)| name.as_str()).collect();
        let foreign: Vec<String> = theirs.keys().cloned().collect();
        let foreign: BTreeSet<&str> = foreign.iter().map(String::as_str).collect();
        let mut warm = Self::default();
        for (name, var) in &ours {
            let fits = theirs.get(name).is_some_and(|tensor| tensor.shape() == var.shape())
                && normed(&own, name) == normed(&foreign, name);
            match theirs.remove(name).filter(|_| fits) {
                Some(tensor) => {
                    var.set(&tensor.to_dtype(DType::F32)?.to_device(var.device())?)?;
                    warm.taken.insert(name.clone());
                }
                None => warm.fresh.push(name.clone()),
            }
        }
        if warm.taken.is_empty() {
            return Err(Error::invalid(format!("nothing of voice {name} fits the flow of recipe {}", recipe.name)));
        }
        warm.unused = foreign.into_iter().filter(|name| !warm.taken.contains(*name)).map(str::to_string).collect();
        Ok(warm)
    }

    /// Whether step `index` of the flow has nothing of the voice's and must be initialised from data.
    pub fn is_fresh(&self, index: usize) -> bool {
        let prefix = format!("steps.{index}.");
        !self.taken.iter().any(|name| name.starts_with(&prefix))
    }

    /// Whether the whitening front has nothing of the voice's.
    pub fn fresh_whitening(&self) -> bool {
        self.fresh.iter().any(|name| name.starts_with(WHITENING_PREFIX))
    }
}

impl std::fmt::Display for WarmStart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} tensors taken", self.taken.len())?;
        match self.fresh.as_slice() {
            [] => write!(f, ", none starts fresh")?,
            fresh => write!(f, ", {} start fresh ({})", fresh.len(), fresh.join(", "))?,
        }
        match self.unused.as_slice() {
            [] => Ok(()),
            unused => write!(f, ", {} of the voice's are not used ({})", unused.len(), unused.join(", ")),
        }
    }
}
