//! The curves of a training run from its `log.jsonl`: bits per sample over steps.

use super::{FAMILY, LABEL, MARGIN, Picture, Size, TITLE, title};
use crate::{Error, Result};
use plotters::chart::{ChartBuilder, SeriesLabelPosition};
use plotters::element::{Circle, PathElement};
use plotters::series::LineSeries;
use plotters::style::{Color, RGBColor, ShapeStyle, WHITE};
use serde::Deserialize;
use std::fs;
use std::path::Path;

/// Of all values, the part that the axis must hold: the first steps of a fresh run may be far above.
const SHOWN: f64 = 0.98;
/// The smooth line is a median over one part in this many of all lines: single steps may be wild.
const SMOOTH: usize = 40;
const TRAINING: RGBColor = RGBColor(31, 119, 180);
const HELD_OUT: RGBColor = RGBColor(214, 39, 40);

/// What a run reports, in bits per sample, in the order of its steps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curves {
    /// Step, and bits on what was trained on.
    pub training: Vec<(f64, f64)>,
    /// Step, and bits on the clips held out.
    pub held_out: Vec<(f64, f64)>,
}

/// A line of the log; what else it says is of no concern here.
#[derive(Deserialize)]
struct Line {
    step: f64,
    bits: Option<f64>,
    held_out_bits: Option<f64>,
}

impl Curves {
    /// Reads a log as `melglow train` writes it, or the one of a run's folder.
    ///
    /// A last line without its end is left out: the run may be writing it.
    ///
    /// # Errors
    /// If it can't be read, a line isn't the log's, or no line tells of bits.
    pub fn read(path: &Path) -> Result<Self> {
        let path = &if path.is_dir() { path.join("log.jsonl") } else { path.to_path_buf() };
        let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
        let mut curves = Self::default();
        for (number, line) in text.split_inclusive('\n').enumerate() {
            let parsed: Line = match serde_json::from_str(line) {
                Ok(parsed) => parsed,
                Err(_) if !line.ends_with('\n') && number > 0 => break,
                Err(cause) => {
                    let problem = format!("line {} is no line of a training log ({cause})", number + 1);
                    return Err(Error::file(path, problem));
                }
            };
            curves.training.extend(parsed.bits.map(|bits| (parsed.step, bits)));
            curves.held_out.extend(parsed.held_out_bits.map(|bits| (parsed.step, bits)));
        }
        if curves.training.is_empty() && curves.held_out.is_empty() {
            return Err(Error::file(path, "holds neither bits nor held_out_bits; is it a training log?"));
        }
        // a run begun anew in the same folder
        curves.training.sort_by(|a, b| a.0.total_cmp(&b.0));
        curves.held_out.sort_by(|a, b| a.0.total_cmp(&b.0));
        Ok(curves)
    }

    /// Draws both curves, the one of training with its running median.
    ///
    /// # Errors
    /// If `size` is out of range.
    pub fn draw(&self, name: &str, size: Size) -> Result<Picture> {
        let all = || self.training.iter().chain(&self.held_out).copied();
        let steps = all().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), (s, _)| (low.min(s), high.max(s)));
        let mut bits: Vec<f64> = all().map(|(_, bits)| bits).collect();
        bits.sort_by(f64::total_cmp);
        let (low, high) = (bits[0], bits[(SHOWN * (bits.len() - 1) as f64).ceil() as usize]);
        let room = (0.05 * (high - low)).max(0.01);
        let (low, high) = (low - room, high + room);
        let within = |points: &[(f64, f64)]| -> Vec<(f64, f64)> {
            points.iter().map(|&(step, bits)| (step, bits.clamp(low, high))).collect()
        };
        Picture::draw(size, |area| {
            let mut chart = ChartBuilder::on(area)
                .caption(title(name), (FAMILY, TITLE))
                .margin(MARGIN)
                .margin_right(2 * MARGIN)
                .x_label_area_size(45)
                .y_label_area_size(70)
                .build_cartesian_2d(steps.0..steps.1.max(steps.0 + 1.0), low..high)?;
            chart
                .configure_mesh()
                .light_line_style(WHITE)
                .bold_line_style(RGBColor(225, 225, 225))
                .x_labels(10)
                .y_labels(10)
                .x_label_formatter(&|step| format!("{step:.0}"))
                .y_label_formatter(&|bits| format!("{bits:.2}"))
                .x_desc("step")
                .y_desc("bits per sample")
                .label_style((FAMILY, LABEL))
                .draw()?;
            chart.draw_series(LineSeries::new(within(&self.training), TRAINING.mix(0.3)))?;
            let key = |style: ShapeStyle| move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style);
            for (points, colour, label) in [
                (median(&self.training), TRAINING, "training (thin: each line of the log; thick: median)"),
                (self.held_out.clone(), HELD_OUT, "held out"),
            ] {
                if !points.is_empty() {
                    let style = colour.stroke_width(2);
                    chart.draw_series(LineSeries::new(within(&points), style))?.label(label).legend(key(style));
                }
            }
            let dots = within(&self.held_out).into_iter().map(|at| Circle::new(at, 3, HELD_OUT.filled()));
            chart.draw_series(dots)?;
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::UpperRight)
                .background_style(WHITE.mix(0.85))
                .border_style(RGBColor(180, 180, 180))
                .label_font((FAMILY, LABEL))
                .draw()?;
            Ok(())
        })
    }
}

/// The median around each point, over fewer at the ends.
fn median(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let half = points.len() / SMOOTH / 2;
    let around = |(i, &(step, _)): (usize, &(f64, f64))| {
        let reach = half.min(i).min(points.len() - 1 - i);
        let mut bits: Vec<f64> = points[i - reach..=i + reach].iter().map(|&(_, bits)| bits).collect();
        (step, *bits.select_nth_unstable_by(reach, f64::total_cmp).1)
    };
    points.iter().enumerate().map(around).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Curves> {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("log.jsonl"), text).unwrap();
        let by_file = Curves::read(&folder.path().join("log.jsonl"));
        assert_eq!(by_file.as_ref().ok(), Curves::read(folder.path()).as_ref().ok());
        by_file
    }

    #[test]
    fn both_curves_of_a_log() {
        let text = "{\"held_out_bits\":8.0,\"held_out_mean\":8.1,\"step\":0}\n{\"bits\":7.9,\"step\":10}\n\
                    {\"event\":\"skipped\",\"step\":15}\n{\"bits\":7.5,\"step\":20}\n{\"bits\":7.";
        let curves = read(text).unwrap();
        assert_eq!(curves.training, [(10.0, 7.9), (20.0, 7.5)]);
        assert_eq!(curves.held_out, [(0.0, 8.0)]);
        let size = Size { width: 500, height: 300 };
        let picture = curves.draw("run", size).unwrap();
        let red = |p: &[u8]| p == [214, 39, 40];
        assert!(picture.size() == size && picture.rgb().chunks(3).any(red), "no held-out curve");
    }

    #[test]
    fn other_files_are_one_line() {
        for (text, expected) in [
            ("", "holds neither bits"),
            ("{\"step\":1}\n", "holds neither bits"),
            ("{\"step\":1,\"bits\":7}\nhello\n{}\n", "line 2 is no line of a training log"),
            ("hello", "line 1 is no line of a training log"),
        ] {
            let message = read(text).unwrap_err().to_string();
            assert!(message.contains(expected) && !message.contains('\n'), "{message}");
        }
    }

    #[test]
    fn a_single_value_and_wild_ones_are_drawn() {
        let one = Curves { training: vec![(1.0, 7.0)], held_out: vec![] };
        one.draw("one", Size::default()).unwrap();
        let wild = Curves { training: (0..500).map(|i| (f64::from(i), 1e9 / f64::from(i * i + 1))).collect(), ..one };
        wild.draw("wild", Size::default()).unwrap();
    }

    #[test]
    fn the_median_of_a_line_is_the_line_whatever_one_step_does() {
        let mut line: Vec<_> = (0..200).map(|i| (f64::from(i), 2.0 * f64::from(i))).collect();
        assert!(median(&line) == line);
        line[100].1 = 1e9;
        assert!(median(&line)[100].1 < 220.0);
    }
}
