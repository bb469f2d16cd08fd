//! Pitch and voicing of a recording, hop by hop.

use rayon::prelude::*;

/// Lowest and highest pitch that is looked for, Hz.
const HERTZ: (f64, f64) = (60.0, 500.0);
/// Peaks of the correlation below this are no candidates.
const LEAST_PEAK: f32 = 0.3;
/// Candidates of a hop at most, the strongest.
const CANDIDATES: usize = 12;
/// How much less a peak at the longest lag counts than one at lag 0: multiples of a period have peaks
/// as high as the period's own.
const LAG_PENALTY: f32 = 0.3;
/// Cost of a jump by an octave from one hop to the next.
const OCTAVE_COST: f32 = 0.5;
/// Cost of becoming voiced or unvoiced.
const VOICING_COST: f32 = 0.1;
/// Silence is this much weaker than the loudest part: 45 dB.
const SILENCE: f64 = 3.162e-5;
/// Nor is anything speech that is weaker than one step of 16 bits, as a power.
const LEAST_POWER: f64 = 1.0 / (32_768.0 * 32_768.0);

/// What a hop of sound is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// 45 dB weaker than the loudest hop, or weaker than one step of 16 bits.
    Silence,
    /// Neither.
    Unvoiced,
    /// Periodic.
    Voiced,
}

/// Pitch, periodicity and kind of each whole hop of a sound.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Track {
    /// Pitch in Hz; 0 where unvoiced.
    pub hertz: Vec<f32>,
    /// The highest normalised correlation with itself a period before, 0 to 1.
    pub periodicity: Vec<f32>,
    /// What each hop is.
    pub kind: Vec<Kind>,
}

/// One hop's possible pitches, and the best correlation of all.
struct Hop {
    /// Lag in samples and correlation.
    candidates: Vec<(f32, f32)>,
    periodicity: f32,
    power: f64,
}

/// Follows the pitch of a sound from 60 to 500 Hz.
///
/// At the middle of each hop the normalised cross-correlation of two stretches, each about its mean and
/// as long as the longest period, gives candidates; dynamic programming chooses among them and being
/// unvoiced, with costs for jumps. After D. Talkin 1995, "A robust algorithm for pitch tracking (RAPT)", without its
/// coarse first pass and its spectral costs.
pub fn track(samples: &[f32], sample_rate: u32, hop: usize) -> Track {
    let rate = f64::from(sample_rate);
    let lags = ((rate / HERTZ.1) as usize).max(2)..(rate / HERTZ.0) as usize + 1;
    // every hop sees as much: beyond the ends the edge goes on, no step and no sound
    let pad = lags.end + 1;
    let edge = |sample: Option<&f32>| vec![sample.copied().unwrap_or_default(); pad];
    let padded = [&edge(samples.first())[..], samples, &edge(samples.last())[..]].concat();

    let hops: Vec<Hop> =
        (0..samples.len() / hop).into_par_iter().map(|i| look(&padded, pad + i * hop + hop / 2, &lags)).collect();
    let loudest = hops.iter().map(|hop| hop.power).fold(0.0, f64::max);
    let silent = |hop: &Hop| hop.power < (SILENCE * loudest).max(LEAST_POWER);
    let hertz: Vec<f32> =
        best_path(&hops, lags.end, &silent).into_iter().map(|lag| lag.map_or(0.0, |lag| rate as f32 / lag)).collect();
    let kind = hops.iter().zip(&hertz).map(|(hop, &hz)| match hz {
        _ if silent(hop) => Kind::Silence,
        0.0 => Kind::Unvoiced,
        _ => Kind::Voiced,
    });
    Track { kind: kind.collect(), periodicity: hops.iter().map(|hop| hop.periodicity).collect(), hertz }
}

/// Correlations of the two stretches around `centre`, for all lags.
fn look(padded: &[f32], centre: usize, lags: &std::ops::Range<usize>) -> Hop {
    let width = lags.end;
    let correlate = |lag: usize| {
        let start = centre - (width + lag) / 2;
        let (a, b) = (&padded[start..start + width], &padded[start + lag..start + lag + width]);
        let (mut ab, mut aa, mut bb, mut sum_a, mut sum_b) = (0.0f32, 0.0f32, 0.0f32, 0.0f32, 0.0f32);
        for (a, b) in a.iter().zip(b) {
            ab += a * b;
            aa += a * a;
            bb += b * b;
            sum_a += a;
            sum_b += b;
        }
        // each about its own mean, an offset isn't sound; nothing correlates with next to nothing
        let about = |product: f32, sums: f32| product - sums / width as f32;
        let powers = about(aa, sum_a * sum_a).max(0.0) * about(bb, sum_b * sum_b).max(0.0);
        about(ab, sum_a * sum_b) / (powers.sqrt() + width as f32 * LEAST_POWER as f32)
    };
    let correlations: Vec<f32> = (lags.start - 1..lags.end + 1).map(correlate).collect();
    let mut candidates: Vec<(f32, f32)> = correlations
        .windows(3)
        .zip(lags.clone())
        .filter(|(c, _)| c[1] >= LEAST_PEAK && c[1] > c[0] && c[1] >= c[2])
        .map(|(c, lag)| {
            let (slope, bend) = (0.5 * (c[2] - c[0]), c[0] - 2.0 * c[1] + c[2]);
            let shift = (-slope / bend.min(-1e-9)).clamp(-0.5, 0.5);
            (lag as f32 + shift, c[1])
        })
        .collect();
    candidates.sort_by(|a, b| b.1.total_cmp(&a.1));
    candidates.truncate(CANDIDATES);
    let periodicity = correlations.iter().copied().fold(0.0, f32::max).min(1.0);
    let around = &padded[centre - width / 2..centre + width.div_ceil(2)];
    let moment = |power: i32| around.iter().map(|&x| f64::from(x).powi(power)).sum::<f64>() / width as f64;
    Hop { candidates, periodicity, power: moment(2) - moment(1).powi(2) }
}

/// The cheapest way through the hops: a lag for each, or `None` where unvoiced.
fn best_path(hops: &[Hop], longest: usize, silent: &dyn Fn(&Hop) -> bool) -> Vec<Option<f32>> {
    // state 0 is unvoiced, state 1 + i candidate i; for each hop and state the cheapest state before
    let mut before: Vec<Vec<usize>> = Vec::with_capacity(hops.len());
    let mut last: (Vec<Option<f32>>, Vec<f32>) = (vec![None], vec![0.0]);
    let mut states = Vec::with_capacity(hops.len());
    for hop in hops {
        let (mut lags, mut local) = (vec![None], vec![hop.candidates.iter().map(|c| c.1).fold(0.0, f32::max)]);
        if !silent(hop) {
            for &(lag, peak) in &hop.candidates {
                lags.push(Some(lag));
                local.push(1.0 - peak * (1.0 - LAG_PENALTY * lag / longest as f32));
            }
        }
        let (mut costs, mut from) = (Vec::new(), Vec::new());
        for (lag, local) in lags.iter().zip(local) {
            let step = |(old, cost): (&Option<f32>, &f32)| {
                cost + match (old, lag) {
                    (Some(old), Some(lag)) => OCTAVE_COST * (lag / old).log2().abs(),
                    (None, None) => 0.0,
                    _ => VOICING_COST,
                }
            };
            let all = last.0.iter().zip(&last.1).map(step).enumerate();
            let (place, cost) = all.min_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or_default();
            from.push(place);
            costs.push(cost + local);
        }
        before.push(from);
        states.push(lags.clone());
        last = (lags, costs);
    }
    let cheapest = last.1.iter().enumerate().min_by(|a, b| a.1.total_cmp(b.1));
    let mut state = cheapest.map_or(0, |(state, _)| state);
    let mut path = Vec::with_capacity(hops.len());
    for (lags, from) in states.iter().zip(&before).rev() {
        path.push(lags[state]);
        state = from[state];
    }
    path.reverse();
    path
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vocoder::noise::Noise;

    const RATE: u32 = 22_050;
    const HOP: usize = 256;

    fn sine(hz: f64, level: f32, len: usize) -> Vec<f32> {
        (0..len).map(|i| level * (std::f64::consts::TAU * hz * i as f64 / f64::from(RATE)).sin() as f32).collect()
    }

    /// Pulses with all harmonics, shaped a little.
    fn pulses(hz: f64, len: usize) -> Vec<f32> {
        let (mut phase, mut last) = (0.0, 0.0f32);
        (0..len)
            .map(|_| {
                phase += hz / f64::from(RATE);
                let pulse = if phase >= 1.0 { 1.0 } else { 0.0 };
                phase -= phase.floor();
                last = 0.9 * last + 0.3 * pulse;
                last
            })
            .collect()
    }

    #[test]
    fn sines_and_pulse_trains_have_their_pitch() {
        for hz in [75.0, 110.0, 203.7, 331.0, 470.0] {
            for sound in [sine(hz, 0.3, 12_000), pulses(hz, 12_000)] {
                let track = track(&sound, RATE, HOP);
                assert_eq!(track.hertz.len(), 12_000 / HOP);
                // the ends see silence beyond the sound
                for (hop, found) in track.hertz[2..44].iter().enumerate() {
                    let cents = 1200.0 * (f64::from(*found) / hz).log2();
                    assert!(cents.abs() < 15.0, "{hz} Hz, hop {hop}: {found}");
                    assert_eq!(track.kind[hop + 2], Kind::Voiced);
                    assert!(track.periodicity[hop + 2] > 0.9);
                }
            }
        }
    }

    #[test]
    fn noise_is_unvoiced_and_silence_silent() {
        let mut sound = vec![0.0; 20 * HOP];
        Noise::new(3).fill(0, &mut sound[..10 * HOP]);
        let track = track(&sound, RATE, HOP);
        let of = |kind: Kind, hops: std::ops::Range<usize>| track.kind[hops].iter().filter(|k| **k == kind).count();
        assert_eq!(of(Kind::Unvoiced, 0..10), 10);
        assert_eq!(of(Kind::Silence, 12..20), 8);
        assert!(track.hertz.iter().all(|&hz| hz == 0.0));
        assert!(track.periodicity[..9].iter().all(|&p| p < 0.5), "{:?}", track.periodicity);
    }

    #[test]
    fn silence_and_short_sounds_do_not_panic() {
        for len in [0, 1, 255, 256, 300] {
            assert_eq!(track(&vec![0.1; len], RATE, HOP).kind, vec![Kind::Silence; len / HOP], "{len}");
        }
        assert_eq!(track(&[0.0; 1024], RATE, HOP).kind, [Kind::Silence; 4]);
    }
}
