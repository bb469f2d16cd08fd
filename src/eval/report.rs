//! An evaluation as text, JSON, and one page that a browser opens without a network.

use super::{ClipScores, METRICS, Scores};
use crate::audio::Waveform;
use crate::audio::wav::{self, WavFormat};
use crate::plot::Size;
use crate::plot::spectrogram::Spectrogram;
use crate::statistics::Mean;
use crate::train::dataset::count;
use crate::train::evaluate::{Bits, ClipBits, figure};
use crate::vocoder::Precision;
use crate::{Error, Result, flow};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Map, Value, json};
use std::fmt::Write;

/// Size of a spectrogram on the page, pixels.
const PICTURE: Size = Size { width: 900, height: 300 };
/// Columns of a waveform.
const WAVE_COLUMNS: usize = 900;
/// What a waveform's height stands for at least: silence isn't magnified.
const MIN_PEAK: f32 = 0.01;
/// Digits of bits per sample.
const BITS_DIGITS: usize = 4;
const STYLE: &str = include_str!("report.css");
const SCRIPT: &str = include_str!("report.js");

/// What was evaluated, and how.
pub struct Setting {
    /// Name of the voice.
    pub voice: String,
    /// Where the clips came from.
    pub data: String,
    /// Deviation of the noise.
    pub sigma: f32,
    /// How strongly the last recursion was driven.
    pub drive: f32,
    /// Passes of refinement.
    pub refine: usize,
    /// Which noise.
    pub seed: u64,
    /// Strength of the denoiser.
    pub denoise: f32,
    /// Numbers that the flow spoke in.
    pub precision: Precision,
    /// What the voice's bits per sample are worth.
    pub likelihood: flow::Likelihood,
    /// Threads in use.
    pub threads: usize,
    /// Said about the data: clips that the voice was trained on, were resampled or left out.
    pub remarks: Vec<String>,
}

impl Setting {
    fn line(&self) -> String {
        let Self { sigma, drive, refine, seed, denoise, threads, precision, .. } = self;
        let plural = if *threads == 1 { "" } else { "s" };
        format!(
            "sigma {sigma}, drive {drive}, {refine} passes of refinement, denoising {denoise}, seed {seed}, in {}, \
             {threads} thread{plural}",
            precision.name()
        )
    }
}

/// A clip to look at and listen to.
pub struct Example {
    /// Name of the clip.
    pub clip: String,
    /// Samples per second of all three.
    pub sample_rate: u32,
    /// The recording.
    pub recording: Vec<f32>,
    /// The voice's speech.
    pub ours: Vec<f32>,
    /// Griffin-Lim's.
    pub griffin_lim: Vec<f32>,
}

/// An evaluation of clips (at least one).
pub struct Report {
    /// What was evaluated.
    pub setting: Setting,
    /// Its clips.
    pub clips: Vec<ClipScores>,
}

/// A value, or a dash where there is none.
fn number(value: Option<f64>, digits: usize) -> String {
    match value.filter(|value| value.is_finite()) {
        Some(value) => format!("{value:.digits$}"),
        None => "–".to_string(),
    }
}

/// A mean with its interval.
fn interval(mean: Option<Mean>, digits: usize) -> String {
    let half =
        mean.and_then(|mean| mean.ci95).map_or(String::new(), |half| format!(" ± {}", number(Some(half), digits)));
    number(mean.map(|mean| mean.mean), digits) + &half
}

/// A row of the summary: its heading, and cells for the voice and for Griffin-Lim.
struct Row {
    title: String,
    meaning: &'static str,
    ours: String,
    griffin_lim: Option<String>,
}

impl Report {
    fn mean(&self, value: impl Fn(&ClipScores) -> Option<f64>) -> Option<Mean> {
        Mean::of(self.clips.iter().filter_map(value))
    }

    /// Likelihoods of the clips, and over all of them.
    pub fn bits(&self) -> Bits {
        let of = |clip: &ClipScores| {
            let (samples, bits) = (clip.likelihood.samples, clip.likelihood.all.unwrap_or(f64::NAN));
            ClipBits { clip: clip.clip.clone(), samples, bits }
        };
        Bits::of(self.clips.iter().map(of).collect(), self.setting.likelihood)
    }

    /// The clips, and how likely they are over all samples.
    fn summary(&self, of: &str) -> String {
        let (clips, seconds, bits) = (count(self.clips.len()), self.seconds(), self.bits());
        let line = self.setting.line();
        format!(
            "{line}; {clips}{of}, {seconds:.1} s; {} bits per sample over all samples{}",
            figure(bits.per_sample),
            bits.remark()
        )
    }

    fn seconds(&self) -> f64 {
        self.clips.iter().map(|clip| clip.seconds).sum()
    }

    fn rows(&self) -> Vec<Row> {
        let bits = (0..4).map(|part| {
            let name = self.clips[0].likelihood.parts()[part].0;
            Row {
                title: if part == 0 { "bits per sample".to_string() } else { format!("  {name}") },
                meaning: if part == 0 { "negative log-likelihood of the recordings, of 16-bit samples" } else { "" },
                ours: interval(self.mean(|clip| clip.likelihood.parts()[part].1), BITS_DIGITS),
                griffin_lim: None,
            }
        });
        let scores = METRICS.iter().enumerate().map(|(i, metric)| {
            let cell = |of: fn(&ClipScores) -> &Scores| interval(self.mean(|clip| of(clip).0[i]), metric.digits);
            Row {
                title: metric.title.to_string(),
                meaning: metric.meaning,
                ours: cell(|clip| &clip.ours),
                griffin_lim: Some(cell(|clip| &clip.griffin_lim)),
            }
        });
        let speed = Row {
            title: "real-time factor".to_string(),
            meaning: "time of synthesis over the length of the sound",
            ours: interval(self.mean(|clip| Some(clip.real_time_factor)), 3),
            griffin_lim: None,
        };
        bits.chain(scores).chain([speed]).collect()
    }

    /// Headings of a clip's row, and for each clip the cells.
    fn clip_rows(&self) -> (Vec<&'static str>, Vec<Vec<String>>) {
        let titles = METRICS.iter().map(|metric| metric.title);
        let titles = ["clip", "seconds", "bits"].into_iter().chain(titles).chain(["RTF"]).collect();
        let cells = |clip: &ClipScores| {
            let scores = METRICS.iter().zip(clip.ours.0).map(|(metric, value)| number(value, metric.digits));
            [clip.clip.clone(), number(Some(clip.seconds), 2), number(clip.likelihood.all, BITS_DIGITS)]
                .into_iter()
                .chain(scores)
                .chain([number(Some(clip.real_time_factor), 3)])
                .collect()
        };
        (titles, self.clips.iter().map(cells).collect())
    }

    /// As text: every clip, then the means.
    pub fn text(&self) -> String {
        let (titles, rows) = self.clip_rows();
        let width = |column: usize| {
            rows.iter().map(|row| &row[column]).map(|cell| cell.chars().count()).fold(titles[column].len(), usize::max)
        };
        let widths: Vec<usize> = (0..titles.len()).map(width).collect();
        let line = |cells: &mut dyn Iterator<Item = &str>| {
            let mut line = String::new();
            for (i, (cell, &width)) in cells.zip(&widths).enumerate() {
                let _ = if i == 0 { write!(line, "{cell:width$}") } else { write!(line, "  {cell:>width$}") };
            }
            line + "\n"
        };
        let mut text = line(&mut titles.iter().copied());
        rows.iter().for_each(|row| text += &line(&mut row.iter().map(String::as_str)));
        let _ = write!(
            text,
            "\n{}\n\n{:18} {:>20} {:>20}\n",
            self.summary(""),
            "mean ± 95 %",
            self.setting.voice,
            "Griffin-Lim"
        );
        for row in self.rows() {
            let _ = writeln!(
                text,
                "{:18} {:>20} {:>20}",
                row.title,
                row.ours,
                row.griffin_lim.as_deref().unwrap_or_default()
            );
        }
        // no spaces at the ends of lines
        text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n") + "\n"
    }

    /// As JSON; what isn't defined is null.
    pub fn json(&self) -> Value {
        let Setting { voice, data, sigma, drive, refine, seed, denoise, precision, likelihood, threads, remarks } =
            &self.setting;
        let total = self.bits();
        let scores = |of: fn(&ClipScores) -> &Scores| -> Value {
            let means = (0..METRICS.len()).map(|i| (METRICS[i].key, self.mean(|clip| of(clip).0[i])));
            means.map(|(key, mean)| (key.to_string(), json!(mean))).collect::<Map<_, _>>().into()
        };
        let bits: Map<String, Value> = (0..4)
            .map(|part| {
                let name = self.clips[0].likelihood.parts()[part].0;
                (name.to_string(), json!(self.mean(|clip| clip.likelihood.parts()[part].1)))
            })
            .collect();
        let clip = |clip: &ClipScores| {
            json!({
                "clip": clip.clip,
                "seconds": clip.seconds,
                "bits": clip.likelihood,
                "voice": clip.ours.to_json(),
                "griffin_lim": clip.griffin_lim.to_json(),
                "real_time_factor": clip.real_time_factor,
            })
        };
        json!({
            "voice": voice, "data": data, "sigma": sigma, "drive": drive, "refine": refine, "seed": seed, "denoise": denoise,
            "precision": precision.name(), "threads": threads, "remarks": remarks, "likelihood": likelihood,
            "per_sample": total.per_sample,
            "left_out": total.left_out,
            "means": {
                "bits": bits,
                "voice": scores(|clip| &clip.ours),
                "griffin_lim": scores(|clip| &clip.griffin_lim),
                "real_time_factor": self.mean(|clip| Some(clip.real_time_factor)),
            },
            "clips": self.clips.iter().map(clip).collect::<Vec<_>>(),
        })
    }

    /// As a page that needs nothing else: tables, and the examples with pictures and players.
    ///
    /// # Errors
    /// If a picture can't be drawn.
    pub fn html(&self, examples: &[Example]) -> Result<String> {
        let voice = escape(&self.setting.voice);
        let mut page = format!(
            "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
             <meta name=\"viewport\" content=\"width=device-width\">\
             <title>melglow eval: {voice}</title><style>{STYLE}</style></head><body>\n\
             <h1>Voice {voice}</h1>\n<p>{}.</p>\n",
            escape(&self.summary(&format!(" of {}", self.setting.data))),
        );
        for remark in &self.setting.remarks {
            let _ = writeln!(page, "<p class=\"remark\">{}</p>", escape(remark));
        }
        page += "<h2>Means over the clips, ± 95 % confidence</h2>\n<table><tr><th></th>";
        let _ = writeln!(page, "<th>{voice}</th><th>Griffin-Lim</th><th class=\"text\">what it is</th></tr>");
        for row in self.rows() {
            let indent = if row.title.starts_with(' ') { " class=\"part\"" } else { "" };
            let _ = writeln!(
                page,
                "<tr><th{indent}>{}</th><td>{}</td><td>{}</td><td class=\"text\">{}</td></tr>",
                escape(row.title.trim()),
                row.ours,
                row.griffin_lim.unwrap_or_default(),
                escape(row.meaning),
            );
        }
        page += "</table>\n<p>Lower is better throughout. Griffin-Lim: 60 passes from the same mel.</p>\n";
        self.clip_table(&mut page);
        if !examples.is_empty() {
            page += "<h2>The clips with the largest mel-cepstral distortion</h2>\n";
        }
        examples.iter().try_for_each(|example| self.example(&mut page, example))?;
        let _ = writeln!(page, "<script>{SCRIPT}</script></body></html>");
        Ok(page)
    }

    fn clip_table(&self, page: &mut String) {
        let (titles, rows) = self.clip_rows();
        *page += "<h2>Clips</h2>\n<p>Click a heading to sort; the worst of each column is marked.</p>\n\
                  <div class=\"wide\"><table class=\"sortable\"><thead><tr>";
        titles.iter().for_each(|title| *page += &format!("<th>{}</th>", escape(title)));
        *page += "</tr></thead><tbody>\n";
        let value = |row: &Vec<String>, column: usize| row[column].parse::<f64>().ok();
        let worst = |column: usize| {
            let column = rows.iter().filter_map(|row| value(row, column));
            column.max_by(f64::total_cmp)
        };
        // of names and lengths none is worse
        let worst: Vec<Option<f64>> = (0..titles.len()).map(|i| if i < 2 { None } else { worst(i) }).collect();
        for row in &rows {
            *page += "<tr>";
            for (i, cell) in row.iter().enumerate() {
                let marked = rows.len() > 1 && worst[i].is_some() && value(row, i) == worst[i];
                let class = if marked { " class=\"worst\"" } else { "" };
                *page += &format!("<td{class}>{}</td>", escape(cell));
            }
            *page += "</tr>\n";
        }
        *page += "</tbody></table></div>\n";
    }

    fn example(&self, page: &mut String, example: &Example) -> Result<()> {
        let clip = escape(&example.clip);
        let _ = writeln!(page, "<section><h3>{clip}</h3>");
        if let Some(scores) = self.clips.iter().find(|scores| scores.clip == example.clip) {
            let figures =
                METRICS.iter().zip(scores.ours.0).map(|(m, value)| format!("{} {}", m.title, number(value, m.digits)));
            let _ = writeln!(page, "<p>{}</p>", escape(&figures.collect::<Vec<_>>().join(" · ")));
        }
        let spectrogram = |samples: &[f32]| {
            let sound = Waveform { samples: samples.to_vec(), sample_rate: example.sample_rate };
            Spectrogram::of_sound(&sound, PICTURE.width as usize)
        };
        let recording = spectrogram(&example.recording)?;
        let peak = example.recording.iter().fold(MIN_PEAK, |peak, x| x.abs().max(peak));
        for (name, samples, difference) in [
            ("recording", &example.recording, false),
            (self.setting.voice.as_str(), &example.ours, true),
            ("Griffin-Lim", &example.griffin_lim, false),
        ] {
            let spectrogram = spectrogram(samples)?;
            let _ = writeln!(
                page,
                "<h4>{}</h4><audio controls preload=\"metadata\" src=\"{}\"></audio>\n{}\n{}",
                escape(name),
                player(samples, example.sample_rate)?,
                waveform(samples, peak),
                picture(&spectrogram, &format!("{}: {name}", example.clip))?,
            );
            if difference {
                let title = format!("{}: {name} louder (red) or softer (blue) than the recording", example.clip);
                *page += &picture(&spectrogram.minus(&recording)?, &title)?;
            }
        }
        *page += "</section>\n";
        Ok(())
    }
}

/// A sound as the address of a player: a WAV of 16 bits.
fn player(samples: &[f32], sample_rate: u32) -> Result<String> {
    let mut bytes = Vec::new();
    wav::write_to(std::io::Cursor::new(&mut bytes), samples, sample_rate, WavFormat::Int16)
        .map_err(|e| Error::invalid(format!("cannot write a WAV: {e}")))?;
    Ok(format!("data:audio/wav;base64,{}", BASE64_STANDARD.encode(bytes)))
}

fn picture(spectrogram: &Spectrogram, name: &str) -> Result<String> {
    let mut bytes = Vec::new();
    let picture = spectrogram.draw(name, PICTURE)?;
    picture.write_png(&mut bytes).map_err(|e| Error::invalid(format!("cannot write a PNG: {e}")))?;
    let data = BASE64_STANDARD.encode(bytes);
    Ok(format!("<img alt=\"spectrogram of {}\" src=\"data:image/png;base64,{data}\">", escape(name)))
}

/// The lowest and highest sample of each column, as an outline that `peak` fills.
fn waveform(samples: &[f32], peak: f32) -> String {
    let columns = WAVE_COLUMNS.min(samples.len()).max(1);
    let column = |i: usize| &samples[i * samples.len() / columns..(i + 1) * samples.len() / columns];
    let point = |i: usize, value: f32| format!("{i} {:.1} ", 40.0 - 36.0 * (value / peak).clamp(-1.1, 1.1));
    let upper = (0..columns).map(|i| point(i, column(i).iter().copied().fold(-1.0, f32::max)));
    let lower = (0..columns).rev().map(|i| point(i, column(i).iter().copied().fold(1.0, f32::min)));
    let outline: String = upper.chain(lower).collect();
    format!(
        "<svg viewBox=\"0 0 {columns} 80\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"waveform\">\
         <polygon points=\"{outline}\"/></svg>"
    )
}

/// Text that stands in a page as itself.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::Likelihood;

    fn report() -> Report {
        let clip = |name: &str, value: f64| ClipScores {
            clip: name.to_string(),
            seconds: 2.0 * value,
            likelihood: Likelihood {
                samples: 100 * value as usize,
                all: Some(7.0 + value),
                voiced: Some(8.0),
                ..Likelihood::default()
            },
            ours: Scores([Some(value); METRICS.len()]),
            griffin_lim: Scores([None; METRICS.len()]),
            real_time_factor: 0.05,
        };
        let setting = Setting {
            voice: "<v>".to_string(),
            data: "data & more".to_string(),
            sigma: 1.0,
            drive: 1.0,
            refine: 60,
            seed: 0,
            denoise: 0.0,
            precision: Precision::Int16,
            likelihood: flow::Likelihood::LowerBound,
            threads: 1,
            remarks: vec!["1 clip was trained on".to_string()],
        };
        Report { setting, clips: vec![clip("a", 1.0), clip("b", 3.0)] }
    }

    #[test]
    fn undefined_values_are_dashes_and_null() {
        let report = report();
        let text = report.text();
        assert!(text.contains("mel L1                   2.000 ± 12.706                    –\n"), "{text}");
        assert!(text.contains("  silence                             –\n"), "{text}");
        assert!(
            text.contains("9.5000 bits per sample over all samples, at most (the likelihood is a lower bound)\n"),
            "{text}"
        );
        assert!(!text.contains("NaN"));
        let json = report.json();
        assert_eq!(json["per_sample"], 9.5);
        assert!(
            text.contains("seed 0, in int16, 1 thread; 2 clips, 8.0 s; ") && json["precision"] == "int16",
            "{text}"
        );
        assert_eq!(json["likelihood"], "lower_bound");
        assert_eq!(json["means"]["voice"]["mcd_db"]["mean"], 2.0);
        assert!(json["means"]["griffin_lim"]["mcd_db"].is_null() && json["clips"][1]["bits"]["silence"].is_null());
        assert_eq!(json["clips"][1]["voice"]["tone_db"], 3.0);
    }

    #[test]
    fn what_overflows_is_left_out_of_every_total() {
        let mut report = report();
        report.clips[1].likelihood = Likelihood { samples: 300, ..Likelihood::default() };
        let (text, json) = (report.text(), report.json());
        let expected = "8.0000 bits per sample over all samples, at most (the likelihood is a lower bound), without 1 \
                        clip of 2, whose likelihood overflows";
        assert!(text.contains(expected) && report.html(&[]).unwrap().contains(expected), "{text}");
        assert!(text.contains("bits per sample                  8.0000\n"), "{text}");
        assert_eq!((json["per_sample"].as_f64(), &json["left_out"][0]), (Some(8.0), &json!("b")));
        assert_eq!(
            (json["means"]["bits"]["all"]["count"].as_u64(), &json["clips"][1]["bits"]["all"]),
            (Some(1), &Value::Null)
        );
        report.clips.remove(0);
        let text = report.text();
        assert!(
            text.contains(
                "1 clip, 6.0 s; – bits per sample over all samples: the likelihood of every clip overflows\n"
            ),
            "{text}"
        );
        assert!(!text.contains("-0.0"), "{text}");
        assert!(report.json()["per_sample"].is_null());
    }

    #[test]
    fn the_page_needs_nothing_else() {
        let sound = |level: f32| (0..5000).map(|i| level * (i as f32 * 0.1).sin()).collect::<Vec<_>>();
        let example = Example {
            clip: "b".to_string(),
            sample_rate: 22_050,
            recording: sound(0.5),
            ours: sound(0.4),
            griffin_lim: sound(0.0),
        };
        let page = report().html(&[example]).unwrap();
        assert_eq!(page.matches("<audio").count(), 3);
        assert_eq!(page.matches("src=\"data:image/png;base64,").count(), 4);
        assert_eq!(page.matches("<svg").count(), 3);
        assert!(page.contains("&lt;v&gt;") && !page.contains("<v>") && page.contains("data &amp; more"));
        assert!(!page.contains("http:") && !page.contains("https:"));
        assert!(page.contains("1 clip was trained on"));
    }
}
