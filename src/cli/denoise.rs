//! `melglow denoise`: a voice's constant hum out of sound that it made.

use super::source::is_stdio;
use super::synth::Bits;
use super::{say, use_threads, voice};
use crate::audio::{decode, wav};
use crate::vocoder::Vocoder;
use crate::vocoder::denoise::Denoiser;
use anyhow::{Context, Result, bail};
use clap::Args;
use std::io;
use std::path::PathBuf;

/// Take a voice's constant hum out of sound that it made
///
/// NVIDIA's denoiser for WaveGlow: what the voice says to a mel of zeros (with a whitening front: of
/// silence) without noise is taken for its hum, and its magnitudes, times the strength, are subtracted
/// from the sound's; phases stay. `synth --denoise` does the same while it speaks. Made for imported
/// voices without refinement; the built-in voice has no hum to speak of.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  melglow denoise a.wav -o b.wav --voice voices/nvidia                  strength 0.1
  melglow denoise a.wav -o b.wav --voice voices/nvidia --strength 0.01
  melglow denoise a.wav -o - --voice voices/nvidia | aplay")]
pub struct DenoiseArgs {
    /// Sound file (WAV, FLAC, MP3, Ogg), of the voice's sample rate
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// WAV file to write, or `-` for standard output
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// Folder of the voice that made the sound, or the name of a built-in one: lj, lj-live [default: lj]
    #[arg(long, value_name = "DIR|NAME")]
    voice: Option<String>,
    /// How much of the hum to take away, 0 (nothing) to 10
    #[arg(long, default_value_t = Denoiser::DEFAULT_STRENGTH)]
    strength: f32,
    /// Sample format of the WAV: integers of 16 or 24 bits, or floats of 32
    #[arg(long, default_value = "16")]
    bits: Bits,
    /// Threads to use [default: one per core]
    #[arg(long, value_name = "N", value_parser = super::thread_range())]
    threads: Option<usize>,
}

/// Runs the command.
///
/// # Errors
/// If the sound or the voice can't be used, or the sound can't be written.
pub fn run(args: &DenoiseArgs) -> Result<()> {
    use_threads(args.threads)?;
    Denoiser::check(args.strength)?;
    let sound = decode::read(&args.input)?;
    let voice = voice(args.voice.as_deref())?;
    let (name, rate) = (&voice.config().name, voice.config().mel.sample_rate);
    let input = args.input.display();
    if sound.sample_rate != rate {
        bail!("{input}: has {} Hz, voice {name} speaks at {rate} Hz; name the voice that made it", sound.sample_rate);
    }
    if let Some(at) = sound.samples.iter().position(|s| !s.is_finite()) {
        bail!("{input}: sample {at} is {}, expected a finite number", sound.samples[at]);
    }
    let denoiser = Denoiser::new(&Vocoder::new(&voice)?)?;
    let samples = denoiser.denoise(&sound.samples, args.strength).with_context(|| input.to_string())?;
    let format = args.bits.into();
    let saturated = if is_stdio(&args.output) {
        let out = io::BufWriter::new(io::stdout().lock());
        wav::write_to(out, &samples, rate, format).context("cannot write to standard output")?
    } else {
        wav::write(&args.output, &samples, rate, format)?
    };
    if saturated > 0 {
        say(&format!(
            "{}: {saturated} samples saturated",
            if is_stdio(&args.output) { std::path::Path::new("standard output") } else { &args.output }.display()
        ));
    }
    Ok(())
}
