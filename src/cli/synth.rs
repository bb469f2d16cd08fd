//! `melglow synth`: mel files to WAV files.

use super::conventions::{MelArgs, MelReader};
use super::source::{Source, is_stdio, sources};
use super::synth_stream::{self, SinkError};
use super::target;
use super::train::stop_on_interrupt;
use super::{PrecisionArgs, SpeakArgs, one_line, say, use_threads, voice, watched};
use crate::atomic;
use crate::audio::wav::{self, WavFormat};
use crate::heap;
use crate::mel::{MelConfig, MelSpectrogram};
use crate::vocoder::denoise::Denoiser;
use crate::vocoder::{SynthOptions, Vocoder};
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use std::cell::Cell;
use std::collections::HashMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Work on less sound than this shows no progress bar, seconds.
const LONG_WORK: f64 = 20.0;

/// What is said of mels that for the most part are so.
pub(super) const SMOOTH: &str = "smoother than speech, as acoustic models' often are: for the most part sharpened and \
                                 not refined, which sounds better (--refine-smooth takes all as they are)";

/// Whether [`SMOOTH`] is to be said of a mel, `smooth` of whose `frames` are so.
pub(super) fn is_smooth(smooth: usize, frames: usize) -> bool {
    2 * smooth > frames
}

/// Turn mel spectrograms into speech
///
/// Mels are .npy, .npz, .pt (a tensor saved by torch.save), .safetensors or .h5 files of shape
/// [bands, frames] or [frames, bands], or Kaldi's .ark and .scp with one mel per key: natural log,
/// made as the voice expects (`melglow mel`), or in the convention of another program
/// (--mel-convention). Each gives exactly frames × hop length samples, mono.
#[derive(Args)]
#[command(after_help = "\
Examples:
  melglow synth a.npy -o a.wav                   one mel, the built-in voice
  melglow synth mels/ -o speech/                 every mel file of a folder
  melglow synth a.npy b.pt -o speech/ --seed 7   other noise
  melglow synth a.npy -o a.wav --voice voices/nvidia --denoise 0.1   less of the voice's constant hum
  melglow synth - -o - < a.npy | aplay           as a part of a pipe
  melglow synth feats.scp -o speech/             one WAV for each key
  melglow synth a.npy -o a.wav --mel-convention hifigan
  … | melglow synth --stream --raw - -o - | aplay -f S16_LE -r 22050   frames as they arrive
  melglow synth a.npy -o a.wav --voice runs/a/step-20000 --refine 0")]
pub struct SynthArgs {
    /// Mel files, folders of them, or `-` for standard input
    #[arg(required = true, value_name = "MEL")]
    mels: Vec<PathBuf>,
    /// WAV file, folder (created if its parent exists; required for several mels), or `-` for
    /// standard output
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// Folder of a voice or checkpoint, or the name of a built-in one: lj, lj-live [default: lj]
    #[arg(long, value_name = "DIR|NAME")]
    voice: Option<String>,
    #[command(flatten)]
    precision: PrecisionArgs,
    #[command(flatten)]
    speak: SpeakArgs,
    /// Take away this much of the voice's constant hum, 0 to 10 (`melglow denoise --help`)
    #[arg(long, value_name = "STRENGTH", default_value_t = 0.0)]
    denoise: f32,
    /// Sample format of the WAV: integers of 16 or 24 bits, or floats of 32
    #[arg(long, default_value = "16")]
    bits: Bits,
    #[command(flatten)]
    mel: MelArgs,
    /// Write sound while its mel arrives, in constant memory; the samples are the same. Standard
    /// input is raw little-endian float32, frame after frame, or .npy
    #[arg(long)]
    stream: bool,
    /// With --stream: samples without a WAV header
    #[arg(long, requires = "stream")]
    raw: bool,
    /// Threads to use; the built-in voices take one for each of several mels [default: one per core]
    #[arg(long, value_name = "N", value_parser = super::thread_range())]
    threads: Option<usize>,
}

/// Sample format of a WAV.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Bits {
    #[value(name = "16")]
    Int16,
    #[value(name = "24")]
    Int24,
    #[value(name = "32f")]
    Float32,
}

impl From<Bits> for WavFormat {
    fn from(bits: Bits) -> Self {
        match bits {
            Bits::Int16 => Self::Int16,
            Bits::Int24 => Self::Int24,
            Bits::Float32 => Self::Float32,
        }
    }
}

/// Runs the command.
///
/// # Errors
/// If anything went wrong; with several mels, after the others are done.
pub fn run(args: SynthArgs) -> Result<()> {
    use_threads(args.threads)?;
    heap::keep();
    Denoiser::check(args.denoise)?;
    if args.stream && args.denoise > 0.0 {
        bail!("--denoise needs the whole sound: leave out --stream, or run \"melglow denoise\" on its WAV file");
    }
    let jobs = plan(&args.mels, &args.output, if args.raw { "raw" } else { "wav" })?;
    if is_stdio(&args.output) {
        target::check_stdout()?;
    }
    for job in &jobs {
        let others = if args.raw { &[] } else { target::NOT_WAV };
        target::check(&job.wav, ("WAV", others), jobs.iter().filter_map(|job| job.mel.path()))?;
    }
    let voice = voice(args.voice.as_deref())?;
    let options = args.speak.options()?;
    let reader = MelReader::new(&args.mel, voice.config())?;
    let vocoder = args.precision.vocoder(&voice)?;
    // the vocoder has the weights in a form of its own
    drop(voice);
    vocoder.asked(&options)?;
    if args.stream {
        vocoder.stream(&options).context("without --stream it speaks")?;
    }
    let denoiser = if args.denoise > 0.0 { Some((Denoiser::new(&vocoder)?, args.denoise)) } else { None };
    let folder = OutputFolder::open(&args.output, &jobs)?;
    let session = Session {
        vocoder,
        denoiser,
        options,
        format: args.bits.into(),
        reader,
        stream: args.stream,
        raw: args.raw,
        stop: Mutex::default(),
        bar: Mutex::default(),
        total: Mutex::default(),
    };
    let failed = session.speak_all(&jobs)?;
    session.finish(jobs.len() - failed);
    folder.close(failed == jobs.len());
    if failed > 0 {
        bail!("{failed} of {} mels failed", jobs.len());
    }
    Ok(())
}

/// One mel and where its sound goes; `-` is standard input or output.
pub(super) struct Job {
    pub mel: Source,
    pub wav: PathBuf,
}

/// Finds the mels and names their WAV files.
fn plan(mels: &[PathBuf], output: &Path, ending: &str) -> Result<Vec<Job>> {
    let found = sources(mels)?;
    let ends_like_folder = output.as_os_str().to_string_lossy().ends_with(['/', std::path::MAIN_SEPARATOR]);
    let single = mels.len() == 1 && found.len() == 1 && !mels[0].is_dir();
    let to_folder = !is_stdio(output) && (output.is_dir() || ends_like_folder || !single);
    if !to_folder {
        if found.len() > 1 || !single && is_stdio(output) {
            bail!("standard output takes one mel, not {}; give a folder with -o", found.len());
        }
        let wav = output.to_path_buf();
        return Ok(found.into_iter().map(|mel| Job { mel, wav: wav.clone() }).collect());
    }
    let like_wav = !ends_like_folder && output.extension().is_some_and(|e| e.eq_ignore_ascii_case("wav"));
    if found.len() > 1 && like_wav && !output.exists() {
        bail!(
            "{}: {} mels need a folder for their WAV files; write {0}/ if that is its name",
            output.display(),
            found.len()
        );
    }
    if output.exists() && !output.is_dir() {
        bail!("{}: is not a folder; several mels need one for their WAV files", output.display());
    }
    let mut jobs = Vec::with_capacity(found.len());
    let mut taken: HashMap<PathBuf, PathBuf> = HashMap::new();
    for mel in found {
        let mut name = mel.stem();
        name.push(format!(".{ending}"));
        let job = Job { mel, wav: output.join(name) };
        if let Some(other) = taken.insert(job.wav.clone(), job.mel.name()) {
            bail!(
                "{} and {} would both be written to {}",
                other.display(),
                job.mel.name().display(),
                job.wav.display()
            );
        }
        jobs.push(job);
    }
    Ok(jobs)
}

/// The folder that WAV files go to, and whether it is new.
struct OutputFolder {
    created: Option<PathBuf>,
}

impl OutputFolder {
    /// Sees to it that the folder is there and can be written, before any long work.
    fn open(output: &Path, jobs: &[Job]) -> Result<Self> {
        let wav = &jobs[0].wav;
        if is_stdio(wav) || wav.exists() && !wav.is_file() {
            return Ok(Self { created: None });
        }
        let folder = match wav.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let mut created = None;
        if !folder.is_dir() {
            if wav == output {
                bail!("cannot write {}: no folder {}", wav.display(), folder.display());
            }
            fs::create_dir(folder).with_context(|| format!("cannot create folder {}", folder.display()))?;
            created = Some(folder.to_path_buf());
        }
        atomic::try_in(folder).with_context(|| format!("cannot write into folder {}", folder.display()))?;
        Ok(Self { created })
    }

    /// Removes a new folder that got nothing.
    fn close(self, nothing_written: bool) {
        if let (Some(folder), true) = (self.created, nothing_written) {
            let _ = fs::remove_dir(folder);
        }
    }
}

/// What the jobs share, and what they add up to.
struct Session {
    vocoder: Vocoder,
    /// With its strength.
    denoiser: Option<(Denoiser, f32)>,
    options: SynthOptions,
    format: WavFormat,
    reader: MelReader,
    stream: bool,
    raw: bool,
    /// What Ctrl-C sets, once it is watched for.
    stop: Mutex<Option<Arc<AtomicBool>>>,
    bar: Mutex<Option<ProgressBar>>,
    total: Mutex<Total>,
}

/// What was spoken.
#[derive(Default)]
struct Total {
    /// Seconds of sound.
    audio: f64,
    compute: Duration,
    /// Mels, and those that for the most part aren't refined.
    mels: usize,
    smooth: usize,
}

/// What a mutex holds, whatever became of those who held it before.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Session {
    /// Speaks all mels, and says how many failed. Where threads are little help within an utterance, several mels are
    /// spoken at a time; their samples are the same.
    fn speak_all(&self, jobs: &[Job]) -> Result<usize> {
        let threads = rayon::current_num_threads();
        let at_once = if self.stream || !self.vocoder.recursive() { 1 } else { threads.min(jobs.len()) };
        let next = AtomicUsize::new(0);
        if at_once == 1 {
            return self.speak_next(jobs, &next);
        }
        let start = Instant::now();
        let pool = || rayon::ThreadPoolBuilder::new().num_threads(threads / at_once).build();
        let pools = (0..at_once).map(|_| pool()).collect::<Result<Vec<_>, _>>().context("cannot start threads")?;
        let failed = std::thread::scope(|scope| {
            let speak = || self.speak_next(jobs, &next);
            let running: Vec<_> = pools.iter().map(|pool| scope.spawn(move || pool.install(speak))).collect();
            // all of them, not up to the first that ended badly
            let ended: Vec<_> = running.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
            ended.into_iter().map(|ended| ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).sum()
        });
        lock(&self.total).compute = start.elapsed();
        failed
    }

    /// Speaks mels as long as there are any that nobody has taken, and says how many failed.
    fn speak_next(&self, jobs: &[Job], next: &AtomicUsize) -> Result<usize> {
        let mut failed = 0;
        while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            let spoken =
                if self.stopped() { Err(crate::Error::Interrupted.into()) } else { self.speak(job, jobs.len()) };
            match spoken {
                Ok(()) => {}
                Err(_) if self.stopped() => {
                    self.leave(&job.wav, self.stream);
                    return Err(crate::Error::Interrupted.into());
                }
                Err(error) if jobs.len() == 1 || super::is_broken_pipe(&error) => return Err(error),
                Err(error) => {
                    failed += 1;
                    self.say(&one_line(&error));
                }
            }
        }
        Ok(failed)
    }

    /// Reads, speaks and writes one mel of `count`.
    fn speak(&self, job: &Job, count: usize) -> Result<()> {
        if self.stream {
            return self.speak_stream(job);
        }
        // what comes through a pipe must end before anything is watched for
        let name = &job.mel.name();
        let (decoded, warning) = self.reader.decode(job.mel.read(self.reader.layout)?, name)?;
        if let Some(warning) = warning {
            self.say(&warning);
        }
        let mel = decoded.mel;
        self.check_size(mel.frames()).with_context(|| name.display().to_string())?;

        let stop = self.watch()?;
        let config = &self.vocoder.config().mel;
        let seconds = decoded.samples.len() as f64 / f64::from(config.sample_rate);
        let shown = Cell::new(0);
        let progress = self.bar(count, seconds).map(|bar| {
            bar.set_message(name.file_name().unwrap_or_default().to_string_lossy().into_owned());
            let shown = &shown;
            move |part: f32| {
                let now = (1000.0 * part) as u64;
                bar.inc(now.saturating_sub(shown.replace(now)));
            }
        });
        let start = Instant::now();
        let (count, rate, mut saturated) = (decoded.samples.len() as u64, config.sample_rate, 0);
        let mut fill = |out: &mut dyn Write| -> io::Result<()> {
            wav::write_header(&mut *out, count, rate, self.format)?;
            let mut made = 0;
            let sink = |sound: &[f32]| -> Result<(), SinkError> {
                if stop.load(Ordering::Relaxed) {
                    return Err(crate::Error::Interrupted.into());
                }
                // what is meant of the samples that were just made
                let within = |at: usize| at.clamp(made, made + sound.len()) - made;
                let meant = &sound[within(decoded.samples.start)..within(decoded.samples.end)];
                made += sound.len();
                saturated += wav::write_samples(&mut *out, meant, self.format)?;
                Ok(())
            };
            self.sound(&mel, progress.as_ref().map(|p| p as &dyn Fn(f32)), sink).map_err(SinkError::into_io)?;
            wav::write_padding(&mut *out, count, self.format)?;
            out.flush()
        };
        if is_stdio(&job.wav) {
            fill(&mut io::BufWriter::new(io::stdout().lock())).context("cannot write to standard output")?;
        } else {
            atomic::write(&job.wav, fill)?;
        }
        self.spoke(seconds, start.elapsed());
        let smooth = is_smooth(self.vocoder.smooth_frames(&mel, &self.options), mel.frames());
        let mut total = lock(&self.total);
        total.mels += 1;
        total.smooth += usize::from(smooth);
        drop(total);
        if saturated > 0 {
            let to = if is_stdio(&job.wav) { name } else { &job.wav };
            self.say(&format!("{}: {saturated} samples saturated", to.display()));
        }
        Ok(())
    }

    /// The sound of a mel as it is made, or, where the hum is taken away, when it is whole.
    fn sound(
        &self,
        mel: &MelSpectrogram,
        progress: Option<&dyn Fn(f32)>,
        mut sink: impl FnMut(&[f32]) -> Result<(), SinkError>,
    ) -> Result<(), SinkError> {
        let Some((denoiser, strength)) = &self.denoiser else {
            return self.vocoder.vocode_in_pieces(mel, &self.options, progress, sink);
        };
        let sound = self.vocoder.vocode(mel, &self.options, progress)?;
        sink(&denoiser.denoise(&sound.samples, *strength)?)
    }

    /// Streams one mel.
    fn speak_stream(&self, job: &Job) -> Result<()> {
        let stop = self.watch()?;
        let start = Instant::now();
        let output = synth_stream::Output { format: self.format, raw: self.raw };
        let samples = synth_stream::run(&self.vocoder, &self.options, job, &self.reader, &output, &stop)?;
        self.spoke(samples as f64 / f64::from(self.vocoder.config().mel.sample_rate), start.elapsed());
        if self.stopped() { Err(crate::Error::Interrupted.into()) } else { Ok(()) }
    }

    /// The bar of `count` mels, of which one has so many seconds; none where nobody watches, or not for long.
    fn bar(&self, count: usize, seconds: f64) -> Option<ProgressBar> {
        let mut bar = lock(&self.bar);
        if bar.is_none() && watched() && (count > 1 || seconds > LONG_WORK) {
            *bar = Some(progress_bar(count));
        }
        bar.clone()
    }

    fn spoke(&self, audio: f64, compute: Duration) {
        let mut total = lock(&self.total);
        total.audio += audio;
        total.compute += compute;
    }

    /// The flag that Ctrl-C sets, watched for from the first call on.
    fn watch(&self) -> Result<Arc<AtomicBool>> {
        let mut stop = lock(&self.stop);
        if stop.is_none() {
            *stop = Some(stop_on_interrupt()?);
        }
        Ok(stop.clone().unwrap_or_default())
    }

    fn stopped(&self) -> bool {
        lock(&self.stop).as_ref().is_some_and(|stop| stop.load(Ordering::Relaxed))
    }

    /// Says what is there of a sound that was left.
    fn leave(&self, wav: &Path, streamed: bool) {
        if !is_stdio(wav) {
            let state = if streamed && wav.exists() { "ends there" } else { "is not written" };
            self.say(&format!("left early: {} {state}", wav.display()));
        }
    }

    /// Refuses mels so long that their sound can't be held or stored.
    fn check_size(&self, frames: usize) -> Result<()> {
        let MelConfig { hop_length, sample_rate, .. } = self.vocoder.config().mel;
        let hours = frames as f64 * hop_length as f64 / f64::from(sample_rate) / 3600.0;
        let bytes_each = match self.format {
            WavFormat::Int16 => 2,
            WavFormat::Int24 => 3,
            WavFormat::Float32 => 4,
        };
        if frames as u64 * hop_length as u64 * bytes_each > u64::from(u32::MAX) - 1024 {
            bail!("{hours:.1} hours of sound are more than a WAV file's 4 GiB; split the mel");
        }
        let denoiser = self.denoiser.as_ref().map_or(0, |(denoiser, _)| denoiser.memory(frames * hop_length));
        let needed = self.vocoder.memory(frames, self.options.refine).max(denoiser) as u64;
        if let Some(available) = available_memory()
            && needed > available
        {
            bail!(
                "{hours:.1} hours of sound need {:.1} GB of memory, {:.1} GB are available; split the mel",
                needed as f64 / 1e9,
                available as f64 / 1e9
            );
        }
        Ok(())
    }

    fn say(&self, message: &str) {
        match &*lock(&self.bar) {
            Some(bar) => bar.suspend(|| say(message)),
            None => say(message),
        }
    }

    /// Says how it went.
    fn finish(&self, done: usize) {
        if let Some(bar) = &*lock(&self.bar) {
            bar.finish_and_clear();
        }
        let Total { audio, compute, mels, smooth } = &*lock(&self.total);
        if *smooth > 0 {
            let which = if *mels == 1 { "the mel is".into() } else { format!("{smooth} of {mels} mels are") };
            say(&format!("{which} {SMOOTH}"));
        }
        if done > 0 && *audio > 0.0 {
            let compute = compute.as_secs_f64();
            let threads = rayon::current_num_threads();
            say(&format!(
                "{audio:.2} s of sound in {compute:.2} s: real-time factor {:.3} ({threads} thread{})",
                compute / audio,
                if threads == 1 { "" } else { "s" }
            ));
        }
    }
}

fn progress_bar(count: usize) -> ProgressBar {
    let bar = ProgressBar::new(1000 * count as u64);
    if let Ok(style) = ProgressStyle::with_template("{wide_bar} {percent:>3} % {eta:>4} {msg}") {
        bar.set_style(style);
    }
    bar
}

/// Bytes of memory that the system can still give; `None` where it doesn't say.
fn available_memory() -> Option<u64> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}
