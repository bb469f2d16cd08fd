//! `melglow plot`: spectrograms and training curves as PNG.

use super::conventions::ConventionArgs;
use super::source::{is_stdio, sources};
use super::{target, voice};
use crate::atomic;
use crate::audio::decode;
use crate::mel::MelConfig;
use crate::mel::file;
use crate::plot::curves::Curves;
use crate::plot::spectrogram::Spectrogram;
use crate::plot::{Picture, Size};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// Draw a mel or a sound as a spectrogram, or a training run's curves, as PNG
///
/// A mel is drawn over the frequencies of its bands, in natural logarithms; a sound by its STFT (1024
/// samples, hop 256) in dB below a full-scale sine; a run by the bits per sample of its log.jsonl.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  melglow plot a.npy -o a.png                          a mel as the built-in voice expects it
  melglow plot a.npy -o a.png --mel-convention espnet  its bands, hop and axes
  melglow plot feats.scp -o a.png --key LJ001-0001     one mel of several
  melglow plot a.wav -o a.png --width 2400 --height 800
  melglow plot runs/a -o a.png                         training and held-out bits over steps")]
pub struct PlotArgs {
    /// Mel (as `synth` reads them; `-` is standard input), sound file, log.jsonl or the folder of a run
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// PNG file to write, or `-` for standard output
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// Which mel of a file that holds several
    #[arg(long)]
    key: Option<String>,
    /// Folder of a voice or checkpoint by whose convention to read a mel, or the name of a built-in one
    #[arg(long, value_name = "DIR|NAME")]
    voice: Option<String>,
    #[command(flatten)]
    convention: ConventionArgs,
    /// A mel with as many frames as bands is [frames, bands]; others show by their shape
    #[arg(long)]
    transpose: bool,
    /// Width of the picture, pixels
    #[arg(long, value_name = "PIXELS", default_value_t = Size::default().width, value_parser = pixels())]
    width: u32,
    /// Height of the picture, pixels
    #[arg(long, value_name = "PIXELS", default_value_t = Size::default().height, value_parser = pixels())]
    height: u32,
}

fn pixels() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(i64::from(*Size::RANGE.start())..=i64::from(*Size::RANGE.end()))
}

/// Runs the command.
///
/// # Errors
/// If the input isn't one that can be drawn, or the picture can't be written.
pub fn run(args: &PlotArgs) -> Result<()> {
    target::check(&args.output, ("PNG", target::NOT_PNG), [args.input.as_path()])?;
    if is_stdio(&args.output) {
        target::check_stdout()?;
    }
    let picture = draw(args)?;
    if is_stdio(&args.output) {
        let mut png = Vec::new();
        picture.write_png(&mut png)?;
        io::stdout().lock().write_all(&png).context("cannot write to standard output")
    } else {
        Ok(atomic::write(&args.output, |out| picture.write_png(out))?)
    }
}

fn draw(args: &PlotArgs) -> Result<Picture> {
    let (input, size) = (&args.input, Size { width: args.width, height: args.height });
    let name = input.file_name().unwrap_or(input.as_os_str()).to_string_lossy();
    if is_stdio(input) {
        return draw_mel(args, size);
    }
    if input.is_dir() && !input.join("log.jsonl").is_file() {
        bail!("{}: is a folder without log.jsonl, so no training run; name a file in it", input.display());
    }
    if input.is_dir() || input.extension().is_some_and(|e| e == "jsonl") {
        return Ok(Curves::read(input)?.draw(&name, size)?);
    }
    if decode::is_audio_file(input) || begins_like_sound(input)? {
        let sound = decode::read(input)?;
        let spectrogram = Spectrogram::of_sound(&sound, size.width as usize);
        return Ok(spectrogram.with_context(|| input.display().to_string())?.draw(&name, size)?);
    }
    draw_mel(args, size)
}

fn begins_like_sound(path: &Path) -> Result<bool> {
    let cannot = || format!("cannot read {}", path.display());
    let mut start = Vec::new();
    File::open(path).with_context(cannot)?.take(16).read_to_end(&mut start).with_context(cannot)?;
    Ok(file::sound(&start).is_some())
}

fn draw_mel(args: &PlotArgs, size: Size) -> Result<Picture> {
    let config = match args.voice.as_deref() {
        Some(choice) => voice(Some(choice))?.config().mel.clone(),
        None => MelConfig::nvidia(),
    };
    let convention = args.convention.convention(&config)?;
    let stats = args.convention.stats(convention.mel.n_mels)?;
    let mut found = sources(std::slice::from_ref(&args.input))?;
    if let Some(key) = &args.key {
        found.retain(|source| source.key() == Some(key));
    }
    let source = match (&found[..], &args.key) {
        ([source], _) => source,
        ([], Some(key)) => bail!("{}: holds no mel of key {key}", args.input.display()),
        _ => bail!("{}: holds {} mels; choose one with --key", args.input.display(), found.len()),
    };
    let layout = convention.layout(args.transpose);
    let name = source.name();
    let logs = convention.logs(&source.read(layout)?, stats).with_context(|| name.display().to_string())?;
    let short = name.file_name().unwrap_or(name.as_os_str()).to_string_lossy();
    Ok(Spectrogram::of_mel(&logs, &convention.mel)?.draw(&short, size)?)
}
