//! Spectrograms of mels and of sound, over seconds and hertz.

use super::{Area, Drawn, FAMILY, LABEL, MARGIN, Picture, Size, TITLE, nice_step, title};
use crate::audio::Waveform;
use crate::mel::stft::Stft;
use crate::mel::{MelConfig, MelScale, MelSpectrogram};
use crate::{Error, Result};
use plotters::chart::ChartBuilder;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::element::BitMapElement;
use plotters::style::colors::colormaps::ViridisRGB;
use rayon::prelude::*;
use rustfft::num_complex::Complex32;
use std::ops::Range;

/// The transform of sound: what most mels are made by, whatever the sample rate.
const N_FFT: usize = 1024;
/// Samples from one frame to the next.
const HOP: usize = 256;
/// Below the loudest point, what sound shows, dB.
const DB_SHOWN: f32 = 90.0;
/// Below the loudest point, what a mel shows, nats: more than from speech to the usual floor.
const NATS_SHOWN: f32 = 13.0;
/// To either side, what a difference shows, dB.
const DB_AROUND: f32 = 20.0;
/// Red, green and blue where a difference is least and most.
const LESS: [f32; 3] = [33.0, 102.0, 172.0];
const MORE: [f32; 3] = [178.0, 24.0, 43.0];
/// Width of the scale of colours with its labels, pixels.
const SCALE_WIDTH: u32 = 84;
/// Frequencies that axes on a mel scale name, Hz.
const MEL_TICKS: [f64; 15] = [
    0.0, 250.0, 500.0, 1000.0, 1500.0, 2000.0, 3000.0, 4000.0, 6000.0, 8000.0, 10_000.0, 12_000.0, 16_000.0, 20_000.0,
    24_000.0,
];

/// Levels over time and frequency, ready to be drawn.
pub struct Spectrogram {
    /// Row-major `[rows, columns]`, the lowest frequency first.
    levels: Vec<f32>,
    rows: usize,
    columns: usize,
    seconds: Range<f64>,
    hertz: HertzAxis,
    unit: &'static str,
    shown: Shown,
}

/// Which levels are shown, and in which colours.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Shown {
    /// From the loudest down, as far as this.
    Below(f32),
    /// From minus to plus this: blue, white, red.
    Around(f32),
}

impl Spectrogram {
    /// Of a mel in natural logarithms, frames centred on multiples of the hop.
    ///
    /// # Errors
    /// If the mel has another number of bands than `config`.
    pub fn of_mel(mel: &MelSpectrogram, config: &MelConfig) -> Result<Self> {
        if mel.n_mels() != config.n_mels {
            return Err(Error::invalid(format!("the mel has {} bands, expected {}", mel.n_mels(), config.n_mels)));
        }
        let (low, high) = (config.scale.mel(config.f_min), config.scale.mel(config.f_max));
        let step = (high - low) / (config.n_mels + 1) as f64;
        // band `b` peaks one step above corner `b`, and is drawn half a step to either side of that
        let units = low + 0.5 * step..high - 0.5 * step;
        Ok(Self {
            levels: mel.values().to_vec(),
            rows: mel.n_mels(),
            columns: mel.frames(),
            seconds: seconds(mel.frames(), config.hop_length, config.sample_rate),
            hertz: HertzAxis { scale: Some(config.scale), units },
            unit: "log-mel (natural)",
            shown: Shown::Below(NATS_SHOWN),
        })
    }

    /// Of sound: STFT (periodic Hann of 1024 samples, hop 256), dB, a full-scale sine at 0.
    ///
    /// At most `columns` columns are kept, each the loudest of its frames, so that an hour needs no more
    /// memory than a second.
    ///
    /// # Errors
    /// If there are no samples or one isn't finite.
    pub fn of_sound(sound: &Waveform, columns: usize) -> Result<Self> {
        let samples = &sound.samples[..];
        if samples.is_empty() {
            return Err(Error::invalid("the sound is empty"));
        }
        if let Some(at) = samples.iter().position(|s| !s.is_finite()) {
            return Err(Error::invalid(format!("sample {at} is {}, expected a finite number", samples[at])));
        }
        let stft = Stft::new(N_FFT, N_FFT, HOP)?;
        let (bins, frames) = (stft.bins(), stft.frames(samples.len()));
        let columns = columns.clamp(1, frames);
        let mut powers = vec![0.0f32; columns * bins];
        powers.par_chunks_mut(bins).enumerate().for_each_init(
            || (stft.scratch(), vec![Complex32::default(); bins]),
            |(scratch, spectrum), (column, powers)| {
                for frame in source(column, columns, frames) {
                    stft.analyse(samples, frame, scratch, spectrum);
                    for (power, bin) in powers.iter_mut().zip(spectrum.iter()) {
                        *power = power.max(bin.norm_sqr());
                    }
                }
            },
        );
        // what the window leaves of a sine of amplitude 1
        let full = (N_FFT as f32 / 4.0).powi(2);
        let db = |power: f32| 10.0 * (power / full).max(1e-20).log10();
        let levels = (0..bins).flat_map(|bin| powers.iter().skip(bin).step_by(bins).map(|&p| db(p))).collect();
        let bin = f64::from(sound.sample_rate) / N_FFT as f64;
        Ok(Self {
            levels,
            rows: bins,
            columns,
            seconds: seconds(frames, HOP, sound.sample_rate),
            hertz: HertzAxis { scale: None, units: -0.5 * bin..(bins as f64 - 0.5) * bin },
            unit: "dB",
            shown: Shown::Below(DB_SHOWN),
        })
    }

    /// How much louder each point is than in another spectrogram of the same size, dB; what is quieter
    /// than all that would be shown counts as that quiet.
    ///
    /// # Errors
    /// If the sizes differ.
    pub fn minus(&self, other: &Self) -> Result<Self> {
        if (self.rows, self.columns) != (other.rows, other.columns) {
            return Err(Error::invalid("the spectrograms have different sizes"));
        }
        let floor = other.loudest() - DB_SHOWN;
        let levels = self.levels.iter().zip(&other.levels).map(|(a, b)| a.max(floor) - b.max(floor)).collect();
        let (seconds, hertz) = (self.seconds.clone(), self.hertz.clone());
        let (rows, columns) = (self.rows, self.columns);
        Ok(Self { levels, rows, columns, seconds, hertz, unit: self.unit, shown: Shown::Around(DB_AROUND) })
    }

    fn loudest(&self) -> f32 {
        self.levels.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }

    /// The lowest and the highest level of the scale.
    fn scale(&self) -> Range<f32> {
        match self.shown {
            Shown::Below(depth) => {
                let (loudest, quietest) = (self.loudest(), self.levels.iter().copied().fold(f32::INFINITY, f32::min));
                // a mel of one value alone still needs two ends
                (loudest - depth).max(quietest).min(loudest - 1.0)..loudest
            }
            Shown::Around(depth) => -depth..depth,
        }
    }

    /// Draws it with axes in seconds and hertz, a scale of colours, and a title.
    ///
    /// # Errors
    /// If `size` is out of range.
    pub fn draw(&self, name: &str, size: Size) -> Result<Picture> {
        let shown = self.scale();
        Picture::draw(size, |area| {
            let (left, right) = area.split_horizontally(size.width - SCALE_WIDTH);
            self.draw_levels(&left, name, &shown)?;
            self.draw_scale(&right, &shown)
        })
    }

    fn draw_levels(&self, area: &Area, name: &str, shown: &Range<f32>) -> Drawn {
        let mut chart = ChartBuilder::on(area)
            .caption(title(name), (FAMILY, TITLE))
            .margin(MARGIN)
            .x_label_area_size(45)
            .y_label_area_size(70)
            .build_cartesian_2d(self.seconds.clone(), self.hertz.clone())?;
        let span = self.seconds.end - self.seconds.start;
        let decimals = (-nice_step(span, 10).log10().floor()).max(0.0) as usize;
        chart
            .configure_mesh()
            .disable_mesh()
            .x_labels(10)
            .x_label_formatter(&|s| format!("{s:.decimals$}"))
            .y_label_formatter(&|hz| format!("{hz:.0}"))
            .x_desc("seconds")
            .y_desc("hertz")
            .label_style((FAMILY, LABEL))
            .draw()?;
        let inside = chart.plotting_area().strip_coord_spec();
        let (width, height) = inside.dim_in_pixel();
        let column = |x| source(x, width as usize, self.columns);
        let mut rgb = Vec::with_capacity(3 * (width * height) as usize);
        for y in (0..height as usize).rev() {
            for x in 0..width as usize {
                let levels =
                    source(y, height as usize, self.rows).flat_map(|row| &self.levels[row * self.columns..][column(x)]);
                rgb.extend(self.colour(self.summary(levels.copied()), shown));
            }
        }
        blit(&inside, rgb)
    }

    /// What one pixel shows of several points: the loudest, or their mean difference.
    fn summary(&self, levels: impl Iterator<Item = f32>) -> f32 {
        match self.shown {
            Shown::Below(_) => levels.fold(f32::NEG_INFINITY, f32::max),
            Shown::Around(_) => {
                let (sum, count) = levels.fold((0.0, 0.0), |(sum, count), level| (sum + level, count + 1.0));
                sum / f32::max(count, 1.0)
            }
        }
    }

    fn colour(&self, level: f32, shown: &Range<f32>) -> [u8; 3] {
        let part = ((level - shown.start) / (shown.end - shown.start)).clamp(0.0, 1.0);
        match self.shown {
            Shown::Below(_) => {
                let plotters::style::RGBColor(red, green, blue) = ViridisRGB::get_color(part);
                [red, green, blue]
            }
            Shown::Around(_) => {
                let end = if part < 0.5 { LESS } else { MORE };
                let strength = (2.0 * part - 1.0).abs();
                end.map(|end| (255.0 + strength * (end - 255.0)).round() as u8)
            }
        }
    }

    fn draw_scale(&self, area: &Area, shown: &Range<f32>) -> Drawn {
        let mut chart = ChartBuilder::on(area)
            .margin_top(MARGIN + TITLE + 7)
            .margin_bottom(MARGIN + 45)
            .margin_right(4)
            .right_y_label_area_size(62)
            .build_cartesian_2d(0.0..1.0f64, f64::from(shown.start)..f64::from(shown.end))?;
        chart
            .configure_mesh()
            .disable_mesh()
            .disable_x_axis()
            .y_labels(10)
            .y_label_formatter(&|level| format!("{level:.0}"))
            .y_desc(self.unit)
            .label_style((FAMILY, LABEL))
            .draw()?;
        let inside = chart.plotting_area().strip_coord_spec();
        let (width, height) = inside.dim_in_pixel();
        let level = |y: u32| shown.start + (shown.end - shown.start) * (y as f32 + 0.5) / height as f32;
        blit(
            &inside,
            (0..height).rev().flat_map(|y| (0..width).flat_map(move |_| self.colour(level(y), shown))).collect(),
        )
    }
}

/// When `frames` frames begin and end, each half a hop to either side of its centre.
fn seconds(frames: usize, hop: usize, sample_rate: u32) -> Range<f64> {
    let at = |frame: f64| frame * hop as f64 / f64::from(sample_rate);
    at(-0.5)..at(frames as f64 - 0.5)
}

/// Which of `from` cells the cell `at` of `to` shows: at least one.
fn source(at: usize, to: usize, from: usize) -> Range<usize> {
    let start = at * from / to;
    start..((at + 1) * from / to).max(start + 1)
}

fn blit(area: &Area, rgb: Vec<u8>) -> Drawn {
    let size = area.dim_in_pixel();
    let element = BitMapElement::<_>::with_owned_buffer((0, 0), size, rgb).ok_or("a bitmap of another size")?;
    Ok(area.draw(&element)?)
}

/// Frequencies, evenly in hertz or on a mel scale.
#[derive(Clone)]
struct HertzAxis {
    scale: Option<MelScale>,
    /// Ends of the axis: mels of the scale, or hertz.
    units: Range<f64>,
}

impl HertzAxis {
    fn unit(&self, hz: f64) -> f64 {
        self.scale.map_or(hz, |scale| scale.mel(hz))
    }
}

impl Ranged for HertzAxis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, hz: &f64, limit: (i32, i32)) -> i32 {
        let part = (self.unit(*hz) - self.units.start) / (self.units.end - self.units.start);
        limit.0 + (part * f64::from(limit.1 - limit.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        let Range { start, end } = self.units;
        let most = hint.max_num_points().max(1);
        if self.scale.is_none() {
            let step = nice_step(end - start, most);
            return (0..).map(|i| f64::from(i) * step).take_while(|&hz| hz <= end).collect();
        }
        let (mut points, mut last) = (Vec::new(), f64::NEG_INFINITY);
        for hz in MEL_TICKS {
            let unit = self.unit(hz);
            if (start..=end).contains(&unit) && unit - last >= (end - start) / most as f64 {
                points.push(hz);
                last = unit;
            }
        }
        points
    }

    fn range(&self) -> Range<f64> {
        let hz = |unit| self.scale.map_or(unit, |scale| scale.hz(unit));
        hz(self.units.start)..hz(self.units.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sine(hz: f32, seconds: f32) -> Waveform {
        let samples = (0..(16_000.0 * seconds) as usize)
            .map(|i| (std::f32::consts::TAU * hz * i as f32 / 16_000.0).sin())
            .collect();
        Waveform { samples, sample_rate: 16_000 }
    }

    #[test]
    fn a_full_scale_sine_is_0_db_at_its_frequency() {
        for columns in [20, 10_000] {
            let spectrogram = Spectrogram::of_sound(&sine(2000.0, 1.0), columns).unwrap();
            assert_eq!((spectrogram.rows, spectrogram.columns), (513, columns.min(63)));
            let column = |row: usize| spectrogram.levels[row * spectrogram.columns + spectrogram.columns / 2];
            assert!(column(128).abs() < 0.01, "{}", column(128)); // 2000 Hz / 16 000 Hz · 1024
            assert!(column(300) < -60.0, "{}", column(300));
        }
    }

    /// The row of pixels where a tone lies is the brightest, at the height that the axis gives it.
    #[test]
    fn tones_are_drawn_where_the_axis_says() {
        let spectrogram = Spectrogram::of_sound(&sine(6000.0, 0.5), 400).unwrap();
        let size = Size { width: 600, height: 400 };
        let picture = spectrogram.draw("tone", size).unwrap();
        assert_eq!(picture.size(), size);
        let brightness = |y: usize| {
            let pixel = &picture.rgb()[3 * (y * 600 + 300)..][..3];
            pixel.iter().map(|&v| usize::from(v)).sum::<usize>()
        };
        // inside of the axes; titles and labels are black on white
        let inside: Vec<usize> = (45..335).collect();
        let brightest = inside.iter().copied().max_by_key(|&y| (brightness(y) < 700).then(|| brightness(y))).unwrap();
        // 6000 of 8000 Hz: a quarter from the top of what lies between title and labels
        assert!((100..130).contains(&brightest), "{brightest}");
    }

    #[test]
    fn differences_are_white_where_there_are_none() {
        let of = |level: f32| {
            let sound = sine(2000.0, 0.5).samples.iter().map(|x| level * x).collect();
            Spectrogram::of_sound(&Waveform { samples: sound, sample_rate: 16_000 }, 60).unwrap()
        };
        let (quiet, loud) = (of(0.1), of(0.5));
        let none = quiet.minus(&quiet).unwrap();
        assert!(none.levels.iter().all(|&level| level == 0.0));
        assert_eq!(none.colour(0.0, &none.scale()), [255, 255, 255]);
        assert_eq!(none.colour(-50.0, &none.scale()), [33, 102, 172]);
        let more = loud.minus(&quiet).unwrap();
        let peak = more.levels[128 * more.columns + more.columns / 2];
        assert!((peak - 14.0).abs() < 0.1, "{peak}");
        assert_eq!(more.summary([1.0, -3.0, 5.0].into_iter()), 1.0);
        more.draw("difference", Size::default()).unwrap();
        assert!(Spectrogram::of_sound(&sine(100.0, 0.1), 60).unwrap().minus(&quiet).is_err());
    }

    #[test]
    fn mel_bands_lie_between_their_corners() {
        let config = MelConfig::nvidia();
        let axis = Spectrogram::of_mel(&MelSpectrogram::new(vec![0.0; 160], 80).unwrap(), &config).unwrap().hertz;
        // band 40's centre is in the middle of its row
        let centre = crate::mel::filterbank::band_centres(&config)[40];
        assert_eq!(axis.map(&centre, (0, 800)), 405);
        let points = axis.key_points(10);
        assert!(points.len() >= 5 && points.contains(&1000.0), "{points:?}");
    }

    #[test]
    fn every_cell_is_shown_once_or_more() {
        for (to, from) in [(10, 3), (3, 10), (7, 7), (1, 5)] {
            let shown: Vec<usize> = (0..to).flat_map(|at| source(at, to, from)).collect();
            assert!((0..from).all(|cell| shown.contains(&cell)), "{to} of {from}: {shown:?}");
            assert!(shown.iter().all(|&cell| cell < from));
        }
    }

    #[test]
    fn flat_and_tiny_mels_are_drawn() {
        let config = MelConfig::nvidia();
        for frames in [1, 2, 3000] {
            let mel = MelSpectrogram::new(vec![-11.5; 80 * frames], 80).unwrap();
            Spectrogram::of_mel(&mel, &config).unwrap().draw("flat", Size::default()).unwrap();
        }
        let silence = Waveform { samples: vec![0.0; 1], sample_rate: 8000 };
        Spectrogram::of_sound(&silence, 100).unwrap().draw("silence", Size { width: 240, height: 240 }).unwrap();
        assert!(Spectrogram::of_sound(&Waveform { samples: vec![f32::NAN], sample_rate: 8000 }, 9).is_err());
    }
}
