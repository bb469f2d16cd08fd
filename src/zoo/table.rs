//! The table of a zoo: what is in `zoo.json`, and how it looks as Markdown.

use crate::flow::Likelihood;
use crate::flow::config::is_default;
use crate::train::dataset::count as count_clips;
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
    /// Held-out bits per sample; none where the likelihood of every clip overflows.
    pub bits: Option<f64>,
    /// Half width of the 95 % confidence interval of the clips' mean; none from one clip alone.
    pub bits_ci95: Option<f64>,
    /// Held-out clips that these figures leave out, since their likelihood overflows.
    #[serde(default, skip_serializing_if = "is_default")]
    pub left_out: usize,
    /// Time of one core over the length of the sound, without refinement.
    pub real_time_factor: f64,
    /// Frames of look-ahead of a stream; nothing where the flow can't stream.
    pub lookahead_frames: Option<usize>,
    /// Mean of the scorer's figures, without refinement.
    pub score: Option<f64>,
}

impl Row {
    /// Its bits per sample of `clips` clips.
    fn figure(&self, clips: usize) -> String {
        let Some(bits) = self.bits else { return "–".to_string() };
        // tables of earlier versions hold 0 for one clip
        let half = self.bits_ci95.filter(|_| clips > 1).map_or_else(String::new, |half| format!(" ± {half:.3}"));
        let without =
            if self.left_out > 0 { format!(" (without {})", count_clips(self.left_out)) } else { String::new() };
        format!("{bits:.3}{half}{without}")
    }
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
        let held_out = match s.held_out.len() {
            1 => "1 held-out clip".to_string(),
            clips => format!("{clips} held-out clips (± 95 % of their mean)"),
        };
        let mut text = format!(
            "Each flow trained for {} min of one core ({}) on the same segments ({} × {} samples a step, {}, seed \
             {}); bits per sample of {}; real-time factor on one core and sound of {} of them, sigma 1, no \
             refinement.\n\n",
            s.minutes,
            s.machine,
            s.batch,
            s.segment_samples,
            count_clips(s.training_clips),
            s.seed,
            held_out,
            s.spoken
        );
        text += "| recipe | bits per sample | likelihood | parameters | GMAC per second | steps | real-time factor | look-ahead |";
        text += if s.scorer.is_some() { " score |\n" } else { "\n" };
        text += "|---|---|---|---|---|---|---|---|";
        text += if s.scorer.is_some() { "---|\n" } else { "\n" };
        let mut rows: Vec<&Row> = self.rows.iter().collect();
        let likeliest = |row: &Row| row.bits.unwrap_or(f64::INFINITY);
        rows.sort_by(|a, b| likeliest(a).total_cmp(&likeliest(b)));
        for row in rows {
            let streams = row.lookahead_frames.map_or_else(|| "no stream".into(), |n| format!("{n} frames"));
            let _ = write!(
                text,
                "| {} | {} | {} | {} | {:.2} | {} | {:.3} | {streams} |",
                row.name,
                row.figure(s.held_out.len()),
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

#[cfg(test)]
mod tests {
    use super::*;

    const ROW: &str = r#"{"name": "a", "recipe_sha256": "", "parameters": 1, "gmac_per_second": 1.0, "steps": 1,
        "cpu_seconds": 1.0, "likelihood": "exact", "bits": 8.5, "bits_ci95": 0.0, "real_time_factor": 1.0,
        "lookahead_frames": null, "score": null}"#;

    fn settings(held_out: usize) -> Settings {
        Settings {
            minutes: 1.0,
            seed: 0,
            batch: 4,
            segment_samples: 2048,
            training_clips: 1,
            held_out: (0..held_out).map(|i| format!("clip {i}")).collect(),
            spoken: 1,
            scorer: None,
            machine: "here".to_string(),
        }
    }

    #[test]
    fn one_clip_has_no_interval_nor_has_what_overflows() {
        // as tables were written before
        let old: Row = serde_json::from_str(ROW).unwrap();
        assert_eq!((old.bits, old.bits_ci95, old.left_out), (Some(8.5), Some(0.0), 0));
        let none = Row { bits: None, bits_ci95: None, left_out: 3, ..old.clone() };
        let some = Row { bits_ci95: Some(0.25), left_out: 1, ..old.clone() };
        assert_eq!(
            (old.figure(1), none.figure(3), some.figure(3)),
            ("8.500".to_string(), "–".to_string(), "8.500 ± 0.250 (without 1 clip)".to_string())
        );
        assert_eq!(serde_json::from_str::<Row>(&serde_json::to_string(&none).unwrap()).unwrap(), none);
        let table = Table { settings: settings(1), rows: vec![none, old] };
        let text = table.markdown();
        assert!(text.contains("2048 samples a step, 1 clip, seed 0); bits per sample of 1 held-out clip; "), "{text}");
        assert!(text.find("| a | 8.500 |").unwrap() < text.find("| a | – |").unwrap(), "{text}");
    }
}
