//! A mel file to a WAV file in a few lines: `cargo run --release --example vocode -- MEL OUT.wav [VOICE]`.

use anyhow::Context;
use melglow::audio::wav::{self, WavFormat};
use melglow::mel::file;
use melglow::vocoder::{SynthOptions, Vocoder};
use melglow::voice::Voice;
use std::path::Path;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let mel = args.next().context("usage: vocode MEL OUT.wav [VOICE]")?;
    let out = args.next().context("usage: vocode MEL OUT.wav [VOICE]")?;
    let voice = match args.next() {
        Some(folder) => Voice::open(folder)?,
        None => Voice::embedded()?,
    };
    let mel = file::read(Path::new(&mel), voice.config().mel.n_mels)?;
    let sound = Vocoder::new(&voice)?.vocode(&mel, &SynthOptions::default(), None)?;
    wav::write(Path::new(&out), &sound.samples, sound.sample_rate, WavFormat::Int16)?;
    Ok(())
}
