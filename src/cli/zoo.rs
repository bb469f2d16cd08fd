//! `melglow zoo`: many flows, trained alike, in one table.

use super::bench::machine::Machine;
use super::thread_range;
use super::train::stop_on_interrupt;
use crate::heap;
use crate::train::config::Validation;
use crate::zoo::{self, MARKDOWN_FILE, Options};
use crate::{Error, Result};
use clap::Args;
use std::io::Write;
use std::path::PathBuf;

/// Train flows of many designs for the same time on the same segments, and compare them
///
/// Each recipe gets M minutes of one core, on the same segments in the same order, behind the same
/// mel-driven whitening filter (its own, or that of recipe parallel where it has none; fitted once, which comes
/// on top: some minutes); NAME-raw is a recipe without the filter. Then its held-out likelihood, size, cost and speed
/// are measured. The table, zoo.md and zoo.json, is written after each recipe; the same command goes on
/// where it was interrupted. The voices stay in the folder, to be heard.
#[derive(Args, Clone, Debug)]
pub struct ZooArgs {
    /// Folder with metadata.csv and wavs/ (the LJSpeech layout), or audio files in any folders below
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Minutes of one core for each recipe
    #[arg(long, value_name = "M", value_parser = minutes)]
    minutes: f64,
    /// Recipes, by name or path, comma-separated; NAME-raw: without the whitening filter [default: all
    /// built-in ones, and nice, realnvp, glow and waveglow-64 raw as well]
    #[arg(long, value_name = "NAME|PATH,…", value_delimiter = ',')]
    recipes: Vec<String>,
    /// Folder of the zoo
    #[arg(long, value_name = "DIR", default_value = "zoo")]
    out: PathBuf,
    /// Clips to measure the likelihood on: names or ranges A..B with both ends, comma-separated
    /// [default: every 20th]
    #[arg(long, value_name = "NAME|A..B,…", value_delimiter = ',')]
    held_out: Vec<String>,
    /// How many of these clips are spoken, for speed and scores
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    spoken: usize,
    /// Command that scores sounds: it is called with a recording and a sound and prints a number last
    #[arg(long, value_name = "CMD")]
    scorer: Option<String>,
    /// Seed of weights and segments
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Threads of training
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = thread_range())]
    threads: usize,
}

fn minutes(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(minutes) if minutes > 0.0 && minutes <= 1e6 => Ok(minutes),
        _ => Err("expected a number above 0".to_string()),
    }
}

/// Runs the command.
///
/// # Errors
/// As [`zoo::run`].
pub fn run(args: &ZooArgs) -> anyhow::Result<()> {
    super::use_threads(Some(args.threads))?;
    heap::keep();
    let held_out = match args.held_out.as_slice() {
        [] => Validation::DEFAULT,
        names => Validation::Clips { names: names.to_vec() },
    };
    let options = Options {
        data: args.data.clone(),
        out: args.out.clone(),
        minutes: args.minutes,
        recipes: args.recipes.clone(),
        held_out,
        spoken: args.spoken,
        seed: args.seed,
        scorer: args.scorer.clone(),
        machine: Machine::here().processor,
    };
    match zoo::run(&options, &*stop_on_interrupt()?) {
        Ok(table) => {
            eprintln!("the table is in {}", args.out.join(MARKDOWN_FILE).display());
            Ok(std::io::stdout().write_all(table.markdown().as_bytes())?)
        }
        Err(Error::Interrupted) => {
            eprintln!("stopped; the same command goes on");
            Err(Error::Interrupted.into())
        }
        Err(error) => Err(error.into()),
    }
}
