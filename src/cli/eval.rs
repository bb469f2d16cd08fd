//! `melglow eval`: how likely a voice finds recordings, and how near to them it speaks.

use super::source::is_stdio;
use super::train::{DeviceName, GivenMelArgs};
use super::{PrecisionArgs, say, use_threads, voice};
use crate::audio::wav::{self, WavFormat};
use crate::eval::griffin_lim::GriffinLim;
use crate::eval::report::{Example, Report, Setting};
use crate::eval::{ClipScores, Judge, Likelihood};
use crate::flow::Flow;
use crate::heap;
use crate::train::Recipe;
use crate::train::config::in_range;
use crate::train::dataset::{self, Clip, Dataset, count};
use crate::train::evaluate::{self, Bits, figure, unless_overflowed};
use crate::train::log::Progress;
use crate::vocoder::denoise::Denoiser;
use crate::vocoder::{SynthOptions, Vocoder};
use crate::voice::{SynthesisConfig, Voice};
use crate::{atomic, error::Error};
use anyhow::{Context, Result, bail};
use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use clap::Args;
use rayon::prelude::*;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// Names of clips that a message lists.
const NAMES_SHOWN: usize = 5;

/// Measure a voice against recordings: how likely it finds them, and how near to them it speaks
///
/// Each clip's mel is spoken and compared with the clip, beside Griffin-Lim (60 passes) from the same
/// mel: log-mel L1, mel-cepstral distortion, multi-resolution STFT distance, pitch, voicing and
/// periodicity errors, and the hum at multiples of the voice's step rate. Bits per sample are of the
/// 16-bit sound with dequantisation noise (uniform, but where the voice's design has learned its own),
/// every log-determinant counted, each clip whole, as `melglow train` reports them; and apart for
/// silent, unvoiced and voiced parts. Where the design gives a bound or an estimate, it is called so.
/// Figures are per clip and as means with a 95 % confidence interval.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  melglow eval --data LJSpeech-1.1                              the built-in voice, clips it wasn't trained on
  melglow eval --data LJSpeech-1.1 --clips LJ002-0155..LJ002-0184 --out eval/   with WAVs and a page to look at
  melglow eval --voice runs/a/step-7500 --data LJSpeech-1.1 --likelihood-only   fast: no speech
  melglow eval --data LJSpeech-1.1 --refine 0 --json bare.json  the bare flow")]
pub struct EvalArgs {
    /// Folder of a voice or checkpoint, or the name of a built-in one: lj, lj-live [default: lj]
    #[arg(long, value_name = "DIR|NAME")]
    voice: Option<String>,
    /// Folder with metadata.csv and wavs/ (the LJSpeech layout), or audio files in any folders below
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    #[command(flatten)]
    mels: GivenMelArgs,
    /// Names of clips, or ranges A..B with both ends, comma-separated [default: the held-out clips of a
    /// checkpoint's recipe, else those that the voice wasn't trained on, as far as it says]
    #[arg(long, value_name = "NAME|A..B,…", value_delimiter = ',')]
    clips: Vec<String>,
    /// Bits per sample alone, without speaking
    #[arg(long, conflicts_with_all = ["out", "sigma", "drive", "seed", "refine", "precision", "denoise", "report_clips"])]
    likelihood_only: bool,
    /// Folder (created if its parent exists) for report.html, which needs no network, and the WAVs
    /// recording/, voice/ and griffin-lim/NAME.wav
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Clips with pictures and players in report.html: those with the largest mel-cepstral distortion
    #[arg(long, value_name = "N", default_value_t = 5, requires = "out")]
    report_clips: usize,
    /// Write JSON to a file; without a name, or as `-`, to standard output instead of the table
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    json: Option<PathBuf>,
    /// Standard deviation of the noise, 0 to 10 [default: the voice's]
    #[arg(long)]
    sigma: Option<f32>,
    /// How strongly the voice's last recursion is driven as far up as the mel goes, 0 to 2 [default: the voice's]
    #[arg(long)]
    drive: Option<f32>,
    /// Which noise
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Passes of refinement towards the mel, 0 (the bare flow) to 1000 [default: the voice's]
    #[arg(long, value_name = "PASSES")]
    refine: Option<usize>,
    #[command(flatten)]
    precision: PrecisionArgs,
    /// Take away this much of the voice's constant hum, 0 to 10
    #[arg(long, value_name = "STRENGTH", default_value_t = 0.0)]
    denoise: f32,
    /// Where to compute likelihoods; speech is always made on the CPU
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu)]
    device: DeviceName,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = super::thread_range())]
    threads: Option<usize>,
}

/// Runs the command.
///
/// # Errors
/// If the voice or the data can't be used, or an output can't be written.
pub fn run(args: &EvalArgs) -> Result<()> {
    use_threads(args.threads)?;
    heap::keep();
    let options = SynthOptions {
        sigma: args.sigma,
        drive: args.drive,
        seed: args.seed,
        refine: args.refine,
        ..Default::default()
    };
    options.validate()?;
    Denoiser::check(args.denoise)?;
    check_outputs(args)?;
    let voice = voice(args.voice.as_deref())?;
    let device = args.device.open()?;
    voice.build_flow_on(&device)?; // for its checks
    let config = voice.config();
    // plain tensors, not variables: no graph is kept
    let builder = VarBuilder::from_tensors(voice.tensors()?, DType::F32, &device);
    let flow = Flow::new(&config.flow, &config.mel, builder)?;
    let (dataset, remarks) = clips(args, &voice)?;
    remarks.iter().for_each(|remark| say(remark));
    if args.likelihood_only {
        let bits = evaluate::bits(&flow, &config.mel, &dataset.clips, &device, &AtomicBool::new(false))?;
        overflow(&bits).iter().for_each(|remark| say(remark));
        return print(args, &table(&bits), &serde_json::to_value(&bits)?);
    }
    let vocoder = args.precision.vocoder(&voice)?;
    let SynthesisConfig { sigma, drive, refine, .. } = vocoder.asked(&options)?;
    let folder = args.out.as_deref().map(Folder::open).transpose()?;
    let setting = Setting {
        voice: config.name.clone(),
        data: args.data.display().to_string(),
        sigma,
        drive,
        refine,
        seed: args.seed,
        denoise: args.denoise,
        precision: vocoder.precision(),
        likelihood: flow.likelihood_kind(),
        threads: rayon::current_num_threads(),
        remarks,
    };
    let speaker = Speaker::new(vocoder, flow, device, options, args.denoise)?;
    let mut report = Report { setting, clips: Vec::new() };
    let mut examples: Vec<(f64, Example)> = Vec::new();
    let mut progress = Progress::new("eval", 0, dataset.clips.len());
    for clips in dataset.clips.chunks(rayon::current_num_threads()) {
        // one after the other, each on all threads; what is measured then, a clip on each
        let spoken = clips.iter().map(|clip| speaker.speak(clip).with_context(|| clip.name.clone()));
        let spoken = spoken.collect::<Result<Vec<_>>>()?;
        let measured = clips.par_iter().zip(spoken);
        let measured = measured.map(|(clip, spoken)| speaker.measure(clip, spoken).with_context(|| clip.name.clone()));
        for (clip, measured) in clips.iter().zip(measured.collect::<Vec<_>>()) {
            let (scores, example) = measured?;
            if let Some(folder) = &folder {
                folder.write(&example)?;
                examples.push((scores.distortion().unwrap_or_default(), example));
                examples.sort_by(|a, b| b.0.total_cmp(&a.0));
                examples.truncate(args.report_clips);
            }
            report.clips.push(scores);
            progress.at(report.clips.len(), || clip.name.clone());
        }
    }
    drop(progress);
    if let Some(remark) = overflow(&report.bits()) {
        say(&remark);
        report.setting.remarks.push(remark);
    }
    if let Some(folder) = &folder {
        let examples: Vec<Example> = examples.into_iter().map(|(_, example)| example).collect();
        let page = report.html(&examples)?;
        atomic::write(&folder.path.join("report.html"), |out| out.write_all(page.as_bytes()))?;
    }
    print(args, &report.text(), &report.json())
}

/// Finds out before any long work whether the outputs can be written.
fn check_outputs(args: &EvalArgs) -> Result<()> {
    if let Some(folder) = &args.out {
        Folder::check(folder)?;
    }
    // a folder that --out will make has room for it
    let in_new = |path: &Path| args.out.as_deref().is_some_and(|out| !out.exists() && path.parent() == Some(out));
    match args.json.as_deref().filter(|path| !is_stdio(path) && !in_new(path)) {
        Some(path) => Ok(atomic::check(path)?),
        None => Ok(()),
    }
}

/// The table on standard output, or JSON there; JSON in a file.
fn print(args: &EvalArgs, table: &str, json: &serde_json::Value) -> Result<()> {
    let json = serde_json::to_string_pretty(json)? + "\n";
    let file = args.json.as_deref().filter(|path| !is_stdio(path));
    let text = if args.json.is_some() && file.is_none() { &json } else { table };
    // first what no full disk can spoil: the work is done
    std::io::stdout().write_all(text.as_bytes()).context("cannot write to standard output")?;
    if let Some(path) = file {
        atomic::write(path, |out| out.write_all(json.as_bytes()))?;
    }
    Ok(())
}

/// The clips to judge, and what is to be said about them.
fn clips(args: &EvalArgs, voice: &Voice) -> Result<(Dataset, Vec<String>)> {
    let (mel, trained_on) = (&voice.config().mel, voice.config().trained_on.as_ref());
    let known = |name: &str| trained_on.is_some_and(|known| known.clips.iter().any(|range| in_range(name, range)));
    let recipe = args.voice.as_deref().map(|dir| Path::new(dir).join("train/recipe.json")).filter(|p| p.is_file());
    let names = Dataset::names(&args.data)?;
    let mels = args.mels.given()?.map(|mels| mels.open(mel)).transpose()?;
    let read = |wanted: &dyn Fn(&str) -> bool| Dataset::read(&args.data, mel, mels.as_ref(), wanted);
    let dataset = if !args.clips.is_empty() {
        dataset::check_names(&args.data, &args.clips, &names)?;
        read(&|name| args.clips.iter().any(|range| in_range(name, range)))
    } else if let Some(path) = recipe {
        let held = Recipe::open(&path.display().to_string())?.validation.held_out(&names);
        if held.is_empty() {
            bail!(
                "{}: has none of the clips that the voice's recipe holds out; choose by --clips",
                args.data.display()
            );
        }
        read(&|name| held.contains(name))
    } else {
        let all_known = names.iter().all(|name| known(name));
        read(&|name| all_known || !known(name))
    }?;
    let mut remarks: Vec<String> = dataset.skipped.iter().map(|line| format!("skipped {line}")).collect();
    if dataset.resampled > 0 {
        remarks.push(format!("{} resampled to {} Hz, the voice's", count(dataset.resampled), mel.sample_rate));
    }
    remarks.extend(dataset.remark_on_mels());
    let heard: Vec<&str> = dataset.clips.iter().map(|clip| clip.name.as_str()).filter(|name| known(name)).collect();
    if !heard.is_empty() {
        let listed = listed(&heard, dataset.clips.len());
        remarks.push(format!("these clips were trained on, by their names: {listed}; figures flatter the voice"));
    }
    Ok((dataset, remarks))
}

/// The first few names, and how many there are of `all`.
fn listed(names: &[&str], all: usize) -> String {
    let more = if names.len() > NAMES_SHOWN { ", …" } else { "" };
    format!("{}{more} ({} of {all})", names[..names.len().min(NAMES_SHOWN)].join(", "), count(names.len()))
}

/// What is to be said about clips that totals leave out.
fn overflow(bits: &Bits) -> Option<String> {
    let names: Vec<&str> = bits.left_out.iter().map(String::as_str).collect();
    let listed = (!names.is_empty()).then(|| listed(&names, bits.clips.len()))?;
    Some(format!("the likelihood of these clips overflows, no total counts them: {listed}"))
}

/// What a voice has made of a clip.
struct Spoken {
    /// By hop.
    nats: Vec<f64>,
    speech: Vec<f32>,
    real_time_factor: f64,
}

/// A voice at work on clips.
struct Speaker {
    flow: Flow,
    device: Device,
    vocoder: Vocoder,
    options: SynthOptions,
    denoiser: Option<(Denoiser, f32)>,
    judge: Judge,
    griffin_lim: GriffinLim,
}

impl Speaker {
    fn new(vocoder: Vocoder, flow: Flow, device: Device, options: SynthOptions, denoise: f32) -> Result<Self> {
        let config = vocoder.config();
        let denoiser = if denoise > 0.0 { Some((Denoiser::new(&vocoder)?, denoise)) } else { None };
        Ok(Self {
            judge: Judge::new(&config.mel, config.flow.widest_step())?,
            griffin_lim: GriffinLim::new(&config.mel)?,
            flow,
            device,
            vocoder,
            options,
            denoiser,
        })
    }

    /// Speaks the clip's mel, and says how likely the voice finds the clip.
    fn speak(&self, clip: &Clip) -> Result<Spoken> {
        let nats = evaluate::hop_nats(&self.flow, &self.vocoder.config().mel, clip, &self.device)?;
        let start = Instant::now();
        let mut speech = self.vocoder.vocode(&clip.mel, &self.options, None)?.samples;
        if let Some((denoiser, strength)) = &self.denoiser {
            speech = denoiser.denoise(&speech, *strength)?;
        }
        let seconds = speech.len() as f64 / f64::from(self.vocoder.config().mel.sample_rate);
        Ok(Spoken { nats, speech, real_time_factor: start.elapsed().as_secs_f64() / seconds })
    }

    /// Compares what was spoken, and Griffin-Lim's, with the clip.
    fn measure(&self, clip: &Clip, spoken: Spoken) -> Result<(ClipScores, Example)> {
        let Spoken { nats, speech, real_time_factor } = spoken;
        let (mel, recording) = (&self.vocoder.config().mel, self.judge.hear(&clip.samples())?);
        let length = recording.samples.len();
        // a mel's last frame is centred on the end of its sound
        let ours = self.judge.hear(&speech[..length])?;
        let yardstick = self.judge.hear(&self.griffin_lim.speak(&clip.mel, GriffinLim::PASSES)?[..length])?;
        let scores = ClipScores {
            clip: clip.name.clone(),
            seconds: length as f64 / f64::from(mel.sample_rate),
            likelihood: Likelihood::of(&nats, &recording.track.kind, mel.hop_length),
            ours: self.judge.compare(&recording, &ours)?,
            griffin_lim: self.judge.compare(&recording, &yardstick)?,
            real_time_factor,
        };
        let example = Example {
            clip: clip.name.clone(),
            sample_rate: mel.sample_rate,
            recording: recording.samples,
            ours: ours.samples,
            griffin_lim: yardstick.samples,
        };
        Ok((scores, example))
    }
}

/// The folder for WAVs and the page.
struct Folder {
    path: PathBuf,
}

impl Folder {
    const RECORDING: &str = "recording";
    const VOICE: &str = "voice";
    const GRIFFIN_LIM: &str = "griffin-lim";

    /// Finds out whether [`Folder::open`] will do, without making anything.
    fn check(path: &Path) -> Result<()> {
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            // which isn't made
            fs::metadata(parent).map_err(Error::io("create folder", path))?;
        }
        Ok(atomic::check_folder(path)?)
    }

    /// Makes the folder and those in it.
    fn open(path: &Path) -> Result<Self> {
        for folder in
            [path.to_path_buf(), path.join(Self::RECORDING), path.join(Self::VOICE), path.join(Self::GRIFFIN_LIM)]
        {
            if !folder.is_dir() {
                fs::create_dir(&folder).map_err(Error::io("create folder", &folder))?;
            }
        }
        Ok(Self { path: path.to_path_buf() })
    }

    fn write(&self, example: &Example) -> Result<()> {
        let name = format!("{}.wav", wav::plain_name(&example.clip));
        for (folder, samples) in [
            (Self::RECORDING, &example.recording),
            (Self::VOICE, &example.ours),
            (Self::GRIFFIN_LIM, &example.griffin_lim),
        ] {
            wav::write(&self.path.join(folder).join(&name), samples, example.sample_rate, WavFormat::Int16)?;
        }
        Ok(())
    }
}

fn table(bits: &Bits) -> String {
    let (counted, left_out) = (bits.clips.len() - bits.left_out.len(), bits.left_out.len());
    let all = if left_out == 0 { "all".to_string() } else { format!("all but {left_out}") };
    let width = bits.clips.iter().map(|c| c.clip.len()).max().unwrap_or(0).max(4).max(all.len());
    let mut text = format!("{:width$}  {:>9}  bits per sample\n", "clip", "samples");
    for clip in &bits.clips {
        let bits = figure(unless_overflowed(clip.bits));
        text += &format!("{:width$}  {:>9}  {bits}\n", clip.clip, clip.samples);
    }
    if bits.per_sample.is_none() {
        return text + &format!("no total{}\n", bits.remark());
    }
    text += &format!("{all:width$}  {:>9}  {}\n", bits.samples(), figure(bits.per_sample));
    let half = bits.ci95.map_or_else(String::new, |half| format!(" ± {half:.4} (95 %)"));
    text + &format!("mean of {} {}{half}{}\n", count(counted), figure(bits.mean), bits.remark())
}
