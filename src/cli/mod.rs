//! The command line: one file per command.

pub mod train;

use crate::Result;
use clap::{Parser, Subcommand};

/// Mel spectrograms to speech with a normalizing flow.
#[derive(Parser, Debug)]
#[command(name = "melglow", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Train a voice on a folder of clips
    Train(train::TrainArgs),
}

impl Cli {
    /// Runs the command.
    ///
    /// # Errors
    /// As the command.
    pub fn run(&self) -> Result<()> {
        match &self.command {
            Command::Train(args) => train::run(args),
        }
    }
}
