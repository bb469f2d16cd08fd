//! `melglow play`: mels spoken through the sound card while they are made.

use super::conventions::MelArgs;
use super::{PrecisionArgs, SpeakArgs};
use anyhow::Result;
use clap::Args;
use std::path::PathBuf;

/// Speak mel spectrograms through the sound card, while they are made
///
/// Several mels follow one another without a gap. On a terminal space pauses and q leaves; Ctrl-C
/// fades out (exit code 130). While the mel comes from standard input only Ctrl-C is heard.
#[derive(Args)]
#[command(after_help = "\
Examples:
  melglow play a.npy                          the built-in voice, the default device
  melglow play mels/*.npy --save all.wav      and keep what was said
  … | melglow play -                          frames as they arrive: raw little-endian float32 or .npy
  melglow play --list-devices")]
pub struct PlayArgs {
    /// Mel files, or `-` for standard input
    #[arg(required_unless_present = "list_devices", value_name = "MEL")]
    pub mels: Vec<PathBuf>,
    /// Sound device, as --list-devices names it [default: the system's]
    #[arg(long, value_name = "NAME")]
    pub device: Option<String>,
    /// Print the names of the sound devices, and what they are
    #[arg(long)]
    pub list_devices: bool,
    /// Loudness, 0 to 4; 1 leaves the samples as they are
    #[arg(long, default_value_t = 1.0)]
    pub volume: f32,
    /// Length of the device's own buffer, milliseconds, 5 to 2000: it is still heard after a key
    #[arg(long, value_name = "MS", default_value_t = 40, value_parser = clap::value_parser!(u32).range(5..=2000))]
    pub latency_ms: u32,
    /// Samples per second to ask of the device [default: the voice's, if the device takes them]
    #[arg(long, value_name = "HZ", value_parser = clap::value_parser!(u32).range(8000..=384_000))]
    pub rate: Option<u32>,
    /// Sound to have ready before the first of it plays, seconds [default: as the voice's measured
    /// speed demands]
    #[arg(long, value_name = "SECONDS")]
    pub prebuffer: Option<f32>,
    /// Write what is said to a 16-bit WAV file as well, even if there is no device
    #[arg(long, value_name = "OUT.wav")]
    pub save: Option<PathBuf>,
    /// Folder of a voice or checkpoint, or the name of a built-in one: lj, lj-live [default: lj]
    #[arg(long, value_name = "DIR|NAME")]
    pub voice: Option<String>,
    /// The flow's numbers.
    #[command(flatten)]
    pub precision: PrecisionArgs,
    /// The flow's noise, and the refinement.
    #[command(flatten)]
    pub speak: SpeakArgs,
    /// How the mels are made.
    #[command(flatten)]
    pub mel: MelArgs,
}

/// Runs the command.
///
/// # Errors
/// If a mel is bad, or there is no device, or it is lost.
#[cfg(feature = "play")]
pub fn run(args: PlayArgs) -> Result<()> {
    super::player::run(args)
}

/// Says what is missing.
///
/// # Errors
/// Always.
#[cfg(not(feature = "play"))]
pub fn run(_: PlayArgs) -> Result<()> {
    anyhow::bail!(
        "this melglow was built without playback (cargo's feature \"play\", which needs ALSA: libasound2-dev); \
         pipe instead: melglow synth MEL -o - | aplay"
    )
}
