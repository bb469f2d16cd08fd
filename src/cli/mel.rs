//! `melglow mel`: mel spectrograms from sound files.

use super::conventions::ConventionArgs;
use super::{one_line, say, voice};
use crate::audio::{decode, resample};
use crate::mel::convention::Convention;
use crate::mel::extract::Extractor;
use crate::mel::stats::MelStats;
use crate::mel::{MelConfig, file};
use anyhow::{Context, bail};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Make mel spectrograms (.npy) from sound files
///
/// In NVIDIA's convention, a voice's (--voice), or that of another program (--mel-convention), which
/// is as that program's own: values, frames and order of the axes.
#[derive(Debug, Default, clap::Args)]
#[command(after_help = "\
Examples:
  melglow mel a.wav -o a.npy                           as the built-in voice expects
  melglow mel wavs/ -o mels/ --voice runs/a/step-2000  as that voice expects
  melglow mel a.wav -o a.npy --mel-convention hifigan
  melglow mel a.wav -o a.npy --mel-convention espnet --mel-stats stats.h5")]
pub struct Args {
    /// Sound files (WAV, FLAC, MP3, Ogg), or folders of them
    #[arg(required = true, value_name = "IN")]
    pub inputs: Vec<PathBuf>,
    /// The .npy file to write, or the folder for several
    #[arg(short, long, value_name = "OUT")]
    pub output: PathBuf,
    /// Folder of a voice or checkpoint whose convention to use, or the name of a built-in one
    #[arg(long, value_name = "DIR|NAME")]
    pub voice: Option<String>,
    /// The convention to write.
    #[command(flatten)]
    pub convention: ConventionArgs,
}

/// How to make mels.
struct Maker {
    convention: Convention,
    extractor: Extractor,
    stats: Option<MelStats>,
}

/// Runs the command.
///
/// # Errors
/// If nothing is to be done, or any file failed; each bad file is named on standard error, the others
/// are written all the same.
pub fn run(args: Args) -> anyhow::Result<()> {
    let config = match args.voice.as_deref() {
        Some(choice) => voice(Some(choice))?.config().mel.clone(),
        None => MelConfig::nvidia(),
    };
    let convention = args.convention.convention(&config)?;
    if args.voice.is_some() && convention.mel != config {
        bail!("the voice isn't of convention {}: leave out --voice or --mel-convention", convention.name);
    }
    let stats = args.convention.stats(convention.mel.n_mels)?;
    let maker = Maker { extractor: Extractor::of(&convention)?, convention, stats };
    let jobs = jobs(&args)?;
    if let [(input, output)] = &jobs[..] {
        return maker.convert(input, output);
    }
    let mut failed = 0;
    for (input, output) in &jobs {
        if let Err(error) = maker.convert(input, output) {
            say(&one_line(&error));
            failed += 1;
        }
    }
    if failed > 0 {
        bail!("{failed} of {} files failed, named above", jobs.len());
    }
    Ok(())
}

/// Which file becomes which. An output folder is made if there are several files.
fn jobs(args: &Args) -> anyhow::Result<Vec<(PathBuf, PathBuf)>> {
    let mut inputs = Vec::new();
    for input in &args.inputs {
        if input.is_dir() {
            inputs.extend(folder(input)?);
        } else {
            inputs.push(input.clone());
        }
    }
    let alone = args.inputs.len() == 1 && !args.inputs[0].is_dir();
    if alone && !args.output.is_dir() {
        if args.output.extension().is_none_or(|e| !e.eq_ignore_ascii_case("npy")) {
            bail!("output {} does not end in .npy, the format of mels we write", args.output.display());
        }
        return Ok(vec![(inputs.swap_remove(0), args.output.clone())]);
    }
    std::fs::create_dir_all(&args.output).with_context(|| format!("cannot create folder {}", args.output.display()))?;
    let mut taken: HashMap<PathBuf, PathBuf> = HashMap::new();
    let mut jobs = Vec::new();
    for input in inputs {
        let Some(name) = input.file_stem() else { bail!("{} has no file name", input.display()) };
        let mut name = name.to_owned();
        name.push(".npy");
        let output = args.output.join(name);
        if let Some(other) = taken.insert(output.clone(), input.clone()) {
            bail!("{} and {} would both become {}", other.display(), input.display(), output.display());
        }
        jobs.push((input, output));
    }
    Ok(jobs)
}

/// The sound files of a folder, by name; folders within aren't searched.
fn folder(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let failed = || format!("cannot read folder {}", path.display());
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).with_context(failed)? {
        let file = entry.with_context(failed)?.path();
        if decode::is_audio_file(&file) && file.is_file() {
            files.push(file);
        }
    }
    if files.is_empty() {
        bail!("folder {} holds no sound files ({})", path.display(), decode::EXTENSIONS.join(", "));
    }
    files.sort();
    Ok(files)
}

impl Maker {
    fn convert(&self, input: &Path, output: &Path) -> anyhow::Result<()> {
        let sound = decode::read(input)?;
        let named = || input.display().to_string();
        let rate = self.convention.mel.sample_rate;
        let samples = if sound.sample_rate == rate {
            sound.samples
        } else {
            say(&format!("{}: resampled from {} to {rate} Hz", input.display(), sound.sample_rate));
            resample::resample(&sound.samples, sound.sample_rate, rate).with_context(named)?
        };
        let mut mel = self.extractor.extract(&samples).with_context(named)?;
        if let Some(stats) = &self.stats {
            mel = stats.normalise(&mel).with_context(named)?;
        }
        if self.convention.frames_first {
            mel = mel.transposed();
        }
        file::write_npy(output, &mel)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audio::wav::{self, WavFormat};

    fn args(inputs: &[&Path], output: &Path) -> Args {
        Args { inputs: inputs.iter().map(|p| p.to_path_buf()).collect(), output: output.to_owned(), ..Args::default() }
    }

    #[test]
    fn a_file_and_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        wav::write(&at("a.wav"), &[0.1; 22_050], 22_050, WavFormat::Int16).unwrap();
        wav::write(&at("b.wav"), &[0.1; 44_100], 44_100, WavFormat::Int24).unwrap();
        run(args(&[&at("a.wav")], &at("one.npy"))).unwrap();
        assert_eq!(file::read(&at("one.npy"), 80).unwrap().frames(), 87);
        run(args(&[folder.path()], &at("out"))).unwrap();
        assert_eq!(file::read(&at("out/b.npy"), 80).unwrap().frames(), 87);
        assert!(run(args(&[&at("a.wav")], &at("one.txt"))).is_err());
    }

    #[test]
    fn bad_files_do_not_stop_the_good_ones() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("a.wav"), b"not sound").unwrap();
        wav::write(&at("b.wav"), &[0.1; 100], 22_050, WavFormat::Float32).unwrap();
        let error = run(args(&[&at("a.wav"), &at("b.wav"), &at("c.wav")], &at("out"))).unwrap_err();
        assert_eq!(error.to_string(), "2 of 3 files failed, named above");
        assert!(at("out/b.npy").exists() && !at("out/a.npy").exists());
    }

    #[test]
    fn two_files_of_one_name_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("x/a.wav"), folder.path().join("y/a.flac"));
        let error = run(args(&[&a, &b], &folder.path().join("out"))).unwrap_err();
        assert!(error.to_string().contains("would both become"), "{error}");
        assert!(run(args(&[folder.path()], &folder.path().join("out"))).is_err());
    }
}
