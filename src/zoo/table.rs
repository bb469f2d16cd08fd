//! The table of a zoo: what is in `zoo.json`, and how it looks as Markdown.

use crate::flow::Likelihood;
use crate::{Error, Result, atomic};
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use std::path::Path;

/// The table's file in a zoo's folder.
pub const JSON_FILE: &str = "zoo.json";
/// The same for reading.
pub const MARKDOWN_FILE: &str = "zoo.md";

/// What all flows of a zoo have in common.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Minutes of one core that each flow was trained.
    pub minutes: f64,
    /// Seed of weights and segments.
    pub seed: u64,
    /// Segments of a training step.
    pub batch: usize,
    /// Samples of a segment, before they are cut to whole hops.
    pub segment_samples: usize,
    /// Clips that were trained on.
    pub training_clips: usize,
    /// Clips whose likelihood was measured.
    pub held_out: Vec<String>,
    /// How many of these were spoken.
    pub spoken: usize,
    /// The command that scored the sound.
    pub scorer: Option<String>,
    /// The processor.
    pub machine: String,
}

/// One flow.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// The recipe's name, `-raw` behind it without the whitening front.
    pub name: String,
    /// Digest of the recipe as it was trained.
    pub recipe_sha256: String,
    /// Trained values, the whitening front's apart.
    pub parameters: usize,
    /// Multiply-adds per second of audio, 10⁹, with the whitening's.
    pub gmac_per_second: f64,
    /// Optimiser steps.
    pub steps: usize,
    /// Time of one core that they took.
    pub cpu_seconds: f64,
    /// What its likelihood is worth.
    pub likelihood: Likelihood,
    /// Held-out bits per sample.
    pub bits: f64,
    /// Half width of the 95 % confidence interval of the clips' mean.
    pub bits_ci95: f64,
    /// Time of one core over the length of the sound, without refinement.
    pub real_time_factor: f64,
    /// Frames of look-ahead of a stream; nothing where the flow can't stream.
    pub lookahead_frames: Option<usize>,
    /// Mean of the scorer's figures, without refinement.
    pub score: Option<f64>,
}

/// A zoo's table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// What all rows have in common.
    pub settings: Settings,
    /// The flows, in the order they were finished.
    pub rows: Vec<Row>,
}

impl Table {
    /// The table in a zoo's folder, or an empty one where there is none.
    ///
    /// # Errors
    /// If it can't be read, or was made with other settings.
    pub fn open(folder: &Path, settings: Settings) -> Result<Self> {
        let path = folder.join(JSON_FILE);
        if !path.exists() {
            return Ok(Self { settings, rows: Vec::new() });
        }
        let json = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let table: Self = serde_json::from_str(&json).map_err(|e| Error::file(&path, e.to_string()))?;
        if table.settings != settings {
            let problem =
                "was made with other settings (minutes, seed, clips, scorer or machine); choose another --out";
            return Err(Error::file(&path, problem));
        }
        Ok(table)
    }

    /// The row of a recipe, if it is finished.
    ///
    /// # Errors
    /// If another recipe of that name is.
    pub fn row(&self, name: &str, recipe_sha256: &str) -> Result<Option<&Row>> {
        match self.rows.iter().find(|row| row.name == name) {
            Some(row) if row.recipe_sha256 != recipe_sha256 => {
                Err(Error::invalid(format!("recipe {name} isn't the one that the table has; choose another --out")))
            }
            row => Ok(row),
        }
    }

    /// Writes the table, both ways.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let json = serde_json::to_string_pretty(self).map_err(|e| Error::invalid(e.to_string()))? + "\n";
        for (name, text) in [(JSON_FILE, json), (MARKDOWN_FILE, self.markdown())] {
            atomic::write(&folder.join(name), |out| out.write_all(text.as_bytes()))?;
        }
        Ok(())
    }

    /// The table for reading, the likeliest flow first.
    pub fn markdown(&self) -> String {
        let s = &self.settings;
        let mut text = format!(
            "Each flow trained for {} min of one core ({}) on the same segments ({} × {} samples a step, {} clips, \
             seed {}); bits per sample of {} held-out clips (± 95 % of their mean); real-time factor on one core and \
             sound of {} of them, sigma 1, no refinement.\n\n",
            s.minutes,
            s.machine,
            s.batch,
            s.segment_samples,
            s.training_clips,
            s.seed,
            s.held_out.len(),
            s.spoken
        );
        text += "| recipe | bits per sample | likelihood | parameters | GMAC per second | steps | real-time factor | look-ahead |";
        text += if s.scorer.is_some() { " score |\n" } else { "\n" };
        text += "|---|---|---|---|---|---|---|---|";
        text += if s.scorer.is_some() { "---|\n" } else { "\n" };
        let mut rows: Vec<&Row> = self.rows.iter().collect();
        rows.sort_by(|a, b| a.bits.total_cmp(&b.bits));
        for row in rows {
            let streams = row.lookahead_frames.map_or_else(|| "no stream".into(), |n| format!("{n} frames"));
            let _ = write!(
                text,
                "| {} | {:.3} ± {:.3} | {} | {} | {:.2} | {} | {:.3} | {streams} |",
                row.name,
                row.bits,
                row.bits_ci95,
                row.likelihood,
                count(row.parameters),
                row.gmac_per_second,
                row.steps,
                row.real_time_factor,
            );
            if s.scorer.is_some() {
                text += &row.score.map_or_else(|| " – |".into(), |score| format!(" {score:.2} |"));
            }
            text += "\n";
        }
        if let Some(scorer) = &s.scorer {
            let _ = writeln!(text, "\nScore: mean of `{scorer} RECORDING SOUND`.");
        }
        text
    }
}

/// A number of parameters as `1.98 M` or `12 k`.
fn count(values: usize) -> String {
    match values {
        0..1000 => values.to_string(),
        1000..1_000_000 => format!("{:.0} k", values as f64 / 1e3),
        _ => format!("{:.2} M", values as f64 / 1e6),
    }
}
