//! What a run tells: JSON lines in `log.jsonl`, and a progress bar or a line now and then.

use crate::{Error, Result, atomic};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use std::fs::{self, File, OpenOptions};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Between two lines where there is no terminal.
const EVERY: Duration = Duration::from_secs(10);

/// The JSON-lines log of a run.
pub struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    /// Opens `RUN/log.jsonl`; lines of steps after `step` (written after the checkpoint that the
    /// run resumes from) are dropped.
    ///
    /// # Errors
    /// If the file can't be read or written.
    pub fn open(run: &Path, step: usize) -> Result<Self> {
        let path = run.join("log.jsonl");
        if path.exists() {
            let old = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
            let done = |line: &&str| {
                let step_of = |v: Value| v.get("step").and_then(Value::as_u64);
                serde_json::from_str(line).ok().and_then(step_of).is_some_and(|s| s <= step as u64)
            };
            let kept: String = old.lines().filter(done).flat_map(|line| [line, "\n"]).collect();
            atomic::write(&path, |out| out.write_all(kept.as_bytes()))?;
        }
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(Error::io("write", &path))?;
        Ok(Self { path, file })
    }

    /// Adds a line.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn line(&mut self, value: &Value) -> Result<()> {
        self.file.write_all(format!("{value}\n").as_bytes()).map_err(Error::io("write", &self.path))
    }
}

/// Progress on standard error: a bar on a terminal, else a line every ten seconds.
pub struct Progress {
    bar: Option<ProgressBar>,
    what: String,
    total: usize,
    start: (usize, Instant),
    last: Instant,
}

impl Progress {
    /// Progress of `what` from `done` of `total`.
    pub fn new(what: &str, done: usize, total: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let template = "{prefix} {bar:30} {pos}/{len} {msg} eta {eta}";
            let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = ProgressBar::new(total as u64).with_style(style).with_prefix(what.to_string());
            bar.set_position(done as u64);
            bar.reset_eta();
            bar
        });
        let now = Instant::now();
        Self { bar, what: what.to_string(), total, start: (done, now), last: now }
    }

    /// `done` of the total, with the latest figures.
    pub fn at(&mut self, done: usize, figures: impl FnOnce() -> String) {
        if let Some(bar) = &self.bar {
            bar.set_position(done as u64);
            bar.set_message(figures());
        } else if self.last.elapsed() >= EVERY {
            self.last = Instant::now();
            let here = done.saturating_sub(self.start.0).max(1);
            let rest = self.start.1.elapsed().as_secs_f64() * self.total.saturating_sub(done) as f64 / here as f64;
            eprintln!("{} {done}/{} {} eta {}", self.what, self.total, figures(), duration(rest));
        }
    }

    /// A line of its own.
    pub fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Seconds as `2 h 05 min`, `3 min 20 s` or `12 s`.
pub fn duration(seconds: f64) -> String {
    let s = seconds.round() as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        _ => format!("{} h {:02} min", s / 3600, s % 3600 / 60),
    }
}
