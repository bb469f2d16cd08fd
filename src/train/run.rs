//! A training run, from a folder of clips to checkpoints.

use super::checkpoint::{self, HeldOut};
use super::config::Recipe;
use super::dataset::{self, Clip, Dataset, Sampler};
use super::distill::Teacher;
use super::given::GivenMels;
use super::log::{Progress, duration};
use super::memory::Estimate;
use super::session::Session;
use super::warm::WarmStart;
use crate::flow::Flow;
use crate::heap;
use crate::mel::classes::Classes;
use crate::mel::detail::Detail;
use crate::net::params::{named_rng, uniform};
use crate::net::{Params, Passes};
use crate::voice::{TrainedOn, Voice};
use crate::{Error, Result, atomic};
use candle_core::Device;
use rayon::prelude::*;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Clips that the whitening front is fitted to, at most.
const WHITENING_CLIPS: usize = 400;

/// What to train, on what, and where to.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folder of clips.
    pub data: PathBuf,
    /// The clips' mels, where they aren't to be made of their sounds.
    pub mels: Option<GivenMels>,
    /// Folder of the run.
    pub out: PathBuf,
    /// The recipe; a resumed run has its own, and this one, if given, must be the same but for its steps.
    pub recipe: Option<Recipe>,
    /// A voice whose weights a new run starts from; without a recipe, its design is kept.
    pub from: Option<Voice>,
    /// Steps of the whole run in place of the recipe's.
    pub steps: Option<usize>,
    /// Segments of a batch in place of the recipe's.
    pub batch: Option<usize>,
    /// Seed of weights and segments; 0 if not given.
    pub seed: Option<u64>,
    /// Continue from the last checkpoint in `out`.
    pub resume: bool,
    /// Save and leave after this step, as if interrupted there.
    pub stop_after: Option<usize>,
    /// Where to compute.
    pub device: Device,
    /// How nets are computed, on the CPU.
    pub passes: Passes,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Steps done.
    pub step: usize,
    /// Whether all steps were done.
    pub complete: bool,
    /// Time of one core that the steps took, where the recipe limits it.
    pub cpu_seconds: Option<f64>,
    /// The last held-out likelihood that was measured here; at the last step if that completed the run.
    pub held_out: Option<HeldOut>,
    /// The last checkpoint.
    pub checkpoint: PathBuf,
}

/// Trains until the recipe's steps are done or `stop` is set; the last step is always saved.
///
/// # Errors
/// If the data or the recipe can't be used, a file can't be written, or training diverges.
pub fn train(options: &Options, stop: &AtomicBool) -> Result<Summary> {
    let resumed = resume_from(options)?;
    atomic::check_folder(&options.out)?;
    let recipe = recipe(options, resumed)?;
    let (clips, held) = data(&options.data, options.mels.as_ref(), &recipe)?;
    run(options, Job { recipe, resumed, front: None, teacher: None }, (&clips, &held), stop)
}

/// A run whose recipe and beginning are settled.
pub(crate) struct Job {
    pub recipe: Recipe,
    /// The step that it goes on from.
    pub resumed: Option<usize>,
    /// A voice whose whitening front a new run takes over, in place of fitting its own.
    pub front: Option<Voice>,
    /// Whom it learns from, if not from the clips.
    pub teacher: Option<Teacher>,
}

/// Runs a job on training clips and held-out clips.
///
/// # Errors
/// As [`train`].
pub(crate) fn run(
    options: &Options,
    job: Job,
    (clips, held): (&[Clip], &[Clip]),
    stop: &AtomicBool,
) -> Result<Summary> {
    let recipe = job.recipe;
    let trained_on = trained_on(clips, &Dataset::names(&options.data)?);
    let sampler = Sampler::new(clips, &recipe)?;
    if sampler.clips() < clips.len() {
        eprintln!("{} clips are shorter than a segment and are left out", clips.len() - sampler.clips());
    }
    let seed = options.seed.unwrap_or(0);
    let params = Params::seeded(seed, &options.device);
    let flow = Flow::new(&recipe.flow, &recipe.mel, params.builder())?;
    let values = params.named().iter().map(|(_, var)| var.elem_count()).sum();
    let samples = clips.iter().chain(held).map(|c| c.frames(recipe.mel.hop_length) * recipe.mel.hop_length).sum();
    match job.teacher {
        None => {
            let (segments, at_once) = recipe.training.graphs(&options.device);
            let at_once = at_once.min((recipe.training.batch * recipe.training.accumulate).div_ceil(segments));
            let estimate = Estimate::new(&recipe, (values, samples), options.passes, (at_once, segments));
            eprintln!("{values} parameters; {estimate}");
        }
        // how much its teacher takes beside it isn't estimated
        Some(_) => eprintln!("{values} parameters"),
    }
    let mut session = match job.resumed {
        Some(step) => {
            drop((params, flow)); // the checkpoint has its own
            Session::resume(options, (recipe, trained_on), step, job.teacher, &sampler)?
        }
        None => {
            let from = options.from.as_ref();
            let trained_on = from.into_iter().fold(trained_on, TrainedOn::after);
            let warm =
                job.front.as_ref().or(from).map(|voice| WarmStart::apply(voice, &recipe, &params)).transpose()?;
            if let (Some(warm), Some(voice), None) = (&warm, from, &job.front) {
                eprintln!("from voice {}: {warm}", voice.config().name);
            }
            if flow.has_whitening() && warm.as_ref().is_none_or(WarmStart::fresh_whitening) {
                fit_whitening(&flow, clips, seed, stop)?;
            }
            Session::start(options, (recipe, trained_on), seed, (params, flow), warm.as_ref(), job.teacher, &sampler)?
        }
    };
    session.run(&sampler, held, options.stop_after, stop)
}

/// The step to resume from, if that was asked for.
pub(crate) fn resume_from(options: &Options) -> Result<Option<usize>> {
    let last = checkpoint::steps(&options.out)?.last().copied();
    match (options.resume, last) {
        (true, None) => Err(Error::file(&options.out, "holds no checkpoint to resume from")),
        (false, Some(step)) => {
            let problem = format!("holds a run at step {step}; add --resume, or choose another folder");
            Err(Error::file(&options.out, problem))
        }
        (_, last) => Ok(last),
    }
}

/// The recipe of a run: a resumed one's own, else the given one for these clips, with what the options change.
pub(crate) fn recipe(options: &Options, resumed: Option<usize>) -> Result<Recipe> {
    let mut recipe = match (resumed, &options.recipe) {
        (Some(step), given) => {
            let mut own = checkpoint::recipe(&options.out, step)?;
            if let Some(given) = given {
                let mut given = given.clone();
                given.training.steps = own.training.steps;
                given.training.batch = options.batch.unwrap_or(own.training.batch);
                if options.mels.is_some() {
                    given.training.leave_copies_out();
                }
                // as it was settled when the run began
                if given.validation.stand_in(&Dataset::names(&options.data)?).is_some_and(|v| v == own.validation) {
                    given.validation = own.validation.clone();
                }
                if given != own {
                    let problem = "the run was started with another recipe; leave --recipe and --batch out";
                    return Err(Error::file(&options.out, problem));
                }
            }
            own.training.steps = options.steps.unwrap_or(own.training.steps);
            own
        }
        (None, Some(given)) => holding_out(given.clone(), &Dataset::names(&options.data)?),
        (None, None) if let Some(voice) = &options.from => Recipe::fine_tuning(voice.config()),
        (None, None) => return Err(Error::invalid("a new run needs a recipe, or a voice to start from")),
    };
    recipe.training.steps = options.steps.unwrap_or(recipe.training.steps);
    recipe.training.batch = options.batch.unwrap_or(recipe.training.batch);
    if options.mels.is_some() && recipe.training.leave_copies_out() {
        eprintln!("recipe {} trains on copies of its clips, which given mels aren't of: without them", recipe.name);
    }
    recipe.validate()?;
    Ok(recipe)
}

/// The recipe with other clips held out, if it names none of these; says so.
fn holding_out(recipe: Recipe, names: &[String]) -> Recipe {
    let Some(validation) = recipe.validation.stand_in(names) else { return recipe };
    eprintln!("recipe {} names clips to hold out, none of which is here: every 20th is held out instead", recipe.name);
    Recipe { validation, ..recipe }
}

/// Training clips and held-out clips; says what was left out.
pub(crate) fn data(folder: &Path, mels: Option<&GivenMels>, recipe: &Recipe) -> Result<(Vec<Clip>, Vec<Clip>)> {
    let _apart = heap::Apart::begin();
    let names = Dataset::names(folder)?;
    let held_out = recipe.validation.held_out(&names);
    let nothing_left = |clips: usize| {
        let problem = format!("all of its clips ({clips}) are held out by the recipe's validation, none is left");
        Error::file(folder, format!("{problem} to train on; hold out fewer"))
    };
    if names.iter().all(|name| held_out.contains(name)) {
        return Err(nothing_left(names.len()));
    }
    let mels = mels.map(|mels| mels.open(&recipe.mel)).transpose()?;
    let dataset = Dataset::read(folder, &recipe.mel, mels.as_ref(), |_| true)?;
    for line in &dataset.skipped {
        eprintln!("skipped {line}");
    }
    if !dataset.skipped.is_empty() {
        eprintln!("{} clips skipped", dataset.skipped.len());
    }
    if dataset.resampled > 0 {
        eprintln!("{} clips resampled to {} Hz", dataset.resampled, recipe.mel.sample_rate);
    }
    if let Some(remark) = dataset.remark_on_mels() {
        eprintln!("{remark}");
    }
    let (mut clips, held) = dataset.split(|name| held_out.contains(name));
    if clips.is_empty() {
        return Err(nothing_left(held.len()));
    }
    let hop = recipe.mel.hop_length;
    let seconds = |clips: &[Clip]| {
        clips.iter().map(|c| c.frames(hop) * hop).sum::<usize>() as f64 / f64::from(recipe.mel.sample_rate)
    };
    eprintln!(
        "{}, {}; held out {}, {}",
        dataset::count(clips.len()),
        duration(seconds(&clips)),
        held.len(),
        duration(seconds(&held))
    );
    let (shifted, varied) = (shifted(&clips, recipe)?, varied(&clips, recipe)?);
    let recordings = clips.len();
    clips.extend(shifted);
    let smoothed = smoothed(&clips, recordings, recipe);
    clips.extend(smoothed);
    clips.extend(varied);
    Ok((clips, held))
}

/// What the voice will have learnt from: `clips`, of a folder with `names`.
fn trained_on(clips: &[Clip], names: &[String]) -> TrainedOn {
    let known: HashSet<&str> = clips.iter().map(|clip| clip.name.as_str()).collect();
    let ranges = names
        .chunk_by(|a, b| known.contains(a.as_str()) == known.contains(b.as_str()))
        .filter(|chunk| known.contains(chunk[0].as_str()))
        .map(
            |chunk| {
                if chunk.len() > 1 { format!("{}..{}", chunk[0], chunk[chunk.len() - 1]) } else { chunk[0].clone() }
            },
        )
        .collect();
    let bands = clips.first().map_or(0, |clip| clip.mel.n_mels());
    let extreme = |band: usize, pick: fn(f32, f32) -> f32| {
        clips.iter().flat_map(|clip| clip.mel.band(band)).copied().reduce(pick).unwrap_or_default()
    };
    let detail = clips.iter().map(|clip| clip.detail).sum::<Detail>().mean();
    // to hundredths, outwards: short in a file
    TrainedOn {
        clips: ranges,
        low: (0..bands).map(|band| (100.0 * extreme(band, f32::min)).floor() / 100.0).collect(),
        high: (0..bands).map(|band| (100.0 * extreme(band, f32::max)).ceil() / 100.0).collect(),
        // measured at each checkpoint: the front may learn along
        residual_level: None,
        // to thousandths
        detail: detail.map(|mean| (1000.0 * mean).round() / 1000.0).filter(|mean| *mean > 0.0),
    }
}

/// The recipe's further copies of the clips, each cut a little later.
fn shifted(clips: &[Clip], recipe: &Recipe) -> Result<Vec<Clip>> {
    let (hop, shifts) = (recipe.mel.hop_length, recipe.training.shifts);
    // an odd stride meets every position within a step
    let stride = (hop / shifts) | 1;
    let long = |clip: &&Clip| clip.frames(hop) > 1;
    (1..shifts)
        .flat_map(|k| clips.iter().filter(long).map(move |clip| (clip, k * stride % hop)))
        .collect::<Vec<_>>()
        .into_par_iter()
        .map(|(clip, shift)| clip.shifted(shift, &recipe.mel))
        .collect()
}

/// The recipe's further copies of the clips, as others would have spoken them.
fn varied(clips: &[Clip], recipe: &Recipe) -> Result<Vec<Clip>> {
    let Some(variety) = &recipe.training.variety else { return Ok(Vec::new()) };
    let long = |clip: &&Clip| clip.frames(recipe.mel.hop_length) > 2;
    (0..variety.copies)
        .flat_map(|copy| clips.iter().filter(long).map(move |clip| (clip, copy)))
        .collect::<Vec<_>>()
        .into_par_iter()
        .map(|(clip, copy)| clip.varied(copy, variety, &recipe.mel))
        .collect()
}

/// The recipe's further copies of so many clips, with smoother mels; of those cut later in turn.
fn smoothed(clips: &[Clip], recordings: usize, recipe: &Recipe) -> Vec<Clip> {
    let Some(smooth) = &recipe.training.smooth else { return Vec::new() };
    let mels: Vec<_> = clips[..recordings].iter().map(|clip| &clip.mel).collect();
    let classes = |copy: usize| {
        (smooth.classes > 0 && copy % 2 == 1).then(|| {
            let mut rng = named_rng(copy as u64, "classes");
            let count = smooth.classes as f32 * 16_f32.powf(-uniform(&mut rng));
            Classes::of(&mels, count as usize, &mut rng)
        })
    };
    let classes: Vec<_> = (0..smooth.copies).map(classes).collect();
    let turns: Vec<_> = clips.iter().cycle().take(recordings * smooth.copies).enumerate().collect();
    let copy =
        |(turn, clip): (usize, &Clip)| clip.smoothed(turn / recordings, smooth, classes[turn / recordings].as_ref());
    turns.into_par_iter().map(copy).collect()
}

/// Fits the whitening front to a part of the clips, evenly spread.
pub(crate) fn fit_whitening(flow: &Flow, clips: &[Clip], seed: u64, stop: &AtomicBool) -> Result<()> {
    let stride = clips.len().div_ceil(WHITENING_CLIPS).max(1);
    let clips: Vec<_> = clips.iter().step_by(stride).map(|clip| (clip.dequantised(), &clip.mel)).collect();
    let pairs: Vec<_> = clips.iter().map(|(samples, mel)| (samples.as_slice(), *mel)).collect();
    let mut progress: Option<Progress> = None;
    flow.fit_whitening(&pairs, seed, &mut |step, steps, loss| {
        let progress = progress.get_or_insert_with(|| Progress::new("whitening", 0, steps));
        progress.at(step, || format!("loss {loss:.4}"));
        !stop.load(Ordering::Relaxed)
    })
}

#[cfg(test)]
mod tests {
    use super::super::config::SmoothMels;
    use super::*;
    use crate::mel::MelConfig;
    use crate::voice::VoiceConfig;

    #[test]
    fn what_was_heard_is_named_in_short() {
        let mel = Recipe::open("tiny").unwrap().mel;
        let clip = |name, level: f32| {
            let sound: Vec<f32> = (0..4096).map(|i| level * (i as f32 * 0.3).sin()).collect();
            Clip::new(name, &sound, &mel).unwrap()
        };
        let names = ["a", "b", "c", "d", "e", "f"].map(String::from);
        let clips = [clip("a", 0.1), clip("b", 0.5), clip("c", 0.1), clip("e", 0.1), clip("a", 0.01)];
        let known = trained_on(&clips, &names);
        assert_eq!(known.clips, ["a..c", "e"]);
        for (band, (low, high)) in known.low.iter().zip(&known.high).enumerate() {
            let all = clips.iter().flat_map(|clip| clip.mel.band(band)).copied();
            let (least, most) = (all.clone().fold(f32::MAX, f32::min), all.fold(f32::MIN, f32::max));
            assert!((0.0..0.011).contains(&(least - low)) && (0.0..0.011).contains(&(high - most)), "{band}");
        }
        let again = TrainedOn { clips: vec!["e".into(), "z".into()], ..known.clone() };
        let config = VoiceConfig { trained_on: Some(again), ..config_of(&mel) };
        let voice = Voice::from_parts(config, &[]).unwrap();
        assert_eq!(known.after(&voice).clips, ["e", "z", "a..c"]);
    }

    fn config_of(mel: &MelConfig) -> VoiceConfig {
        let recipe = Recipe::open("tiny").unwrap();
        VoiceConfig::new("v", mel.clone(), recipe.flow.clone(), recipe.synthesis())
    }

    #[test]
    fn shifts_are_the_same_sound_off_the_grid() {
        let mut recipe = Recipe::open("tiny").unwrap();
        recipe.training.shifts = 3;
        let (mel, hop) = (recipe.mel.clone(), recipe.mel.hop_length);
        let sound: Vec<f32> = (0..8 * hop).map(|i| (i as f32 * 0.05).sin() * (i as f32 / (8 * hop) as f32)).collect();
        let clips = [Clip::new("long", &sound, &mel).unwrap(), Clip::new("short", &sound[..hop], &mel).unwrap()];
        let shifted = shifted(&clips, &recipe).unwrap();
        assert_eq!(shifted.len(), 2, "two more of the long one, none of the short one");
        let stride = (hop / 3) | 1;
        for (k, clip) in shifted.iter().enumerate() {
            let shift = (k + 1) * stride;
            let expected = Clip::new("long", &sound[shift..], &mel).unwrap();
            assert_eq!(clip.mel, expected.mel);
            assert_ne!(shift % recipe.flow.group, 0);
        }
    }

    #[test]
    fn smoothed_copies_are_of_each_shift_in_turn() {
        let mut recipe = Recipe::open("tiny").unwrap();
        let mel = recipe.mel.clone();
        let sound = |level: f32| -> Vec<f32> { (0..4096).map(|i| level * (i as f32 * 0.3).sin()).collect() };
        let clips = [("a", 0.1), ("b", 0.2), ("a", 0.3), ("b", 0.4), ("a", 0.5), ("b", 0.6)]
            .map(|(name, level)| Clip::new(name, &sound(level), &mel).unwrap());
        assert!(smoothed(&clips, 2, &recipe).is_empty());
        let smooth = SmoothMels { copies: 4, bands: 1.0, frames: 1.0, classes: 0 };
        recipe.training.smooth = Some(smooth.clone());
        let smoothed = |recipe: &Recipe| smoothed(&clips, 2, recipe);
        let over_bands = smoothed(&recipe);
        recipe.training.smooth = Some(SmoothMels { classes: 8, ..smooth });
        let of_classes = smoothed(&recipe);
        let order = [0, 1, 2, 3, 4, 5, 0, 1];
        assert_eq!(over_bands.len(), order.len());
        for (copy, of) in over_bands.iter().chain(&of_classes).zip(order.iter().cycle()) {
            assert_eq!((&copy.name, copy.samples()), (&clips[*of].name, clips[*of].samples()));
            assert_ne!(copy.mel, clips[*of].mel);
        }
        assert_ne!(over_bands[0].mel, over_bands[6].mel, "the same cut twice, smoothed in another way");
        for (turn, (a, b)) in over_bands.iter().zip(&of_classes).enumerate() {
            assert_eq!(a.mel == b.mel, turn / 2 % 2 == 0, "every other copy is of classes: {turn}");
        }
    }
}
