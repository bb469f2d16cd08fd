//! The `melglow` program: parse, dispatch, print the error chain.

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    match melglow::cli::Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("melglow: {:#}", anyhow::Error::from(error));
            ExitCode::FAILURE
        }
    }
}
