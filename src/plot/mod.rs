//! Pictures as PNG: spectrograms, and the curves of a training run.

pub mod curves;
pub mod spectrogram;

use crate::{Error, Result};
use plotters::coord::Shift;
use plotters::drawing::{DrawingArea, IntoDrawingArea};
use plotters::prelude::BitMapBackend;
use plotters::style::{FontStyle, WHITE, register_font};
use std::io::{self, Write};
use std::ops::RangeInclusive;

/// The letters of every picture: DejaVu Sans, Latin and Greek; its licence lies beside it.
const FONT: &[u8] = include_bytes!("../../assets/fonts/DejaVuSans-subset.ttf");
/// The family that the drawing library finds them by.
const FAMILY: &str = "sans-serif";
/// Height of labels, pixels.
const LABEL: u32 = 15;
/// Height of the title, pixels.
const TITLE: u32 = 18;
/// Space around everything, pixels.
const MARGIN: u32 = 12;

type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;
type Drawn<T = ()> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Width and height of a picture in pixels, axes and labels included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Pixels from left to right, within [`Size::RANGE`].
    pub width: u32,
    /// Pixels from top to bottom, within [`Size::RANGE`].
    pub height: u32,
}

impl Size {
    /// From what leaves room beside the labels to what viewers open.
    pub const RANGE: RangeInclusive<u32> = 240..=8192;
}

impl Default for Size {
    fn default() -> Self {
        Self { width: 1200, height: 480 }
    }
}

/// A drawn picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    size: Size,
    /// Row-major `[height, width, 3]`.
    rgb: Vec<u8>,
}

impl Picture {
    /// A white picture that `fill` draws on.
    fn draw(size: Size, fill: impl FnOnce(&Area) -> Drawn) -> Result<Self> {
        if !Size::RANGE.contains(&size.width) || !Size::RANGE.contains(&size.height) {
            let (low, high) = (Size::RANGE.start(), Size::RANGE.end());
            return Err(Error::invalid(format!(
                "a picture of {} × {} pixels, expected {low} to {high} each",
                size.width, size.height
            )));
        }
        let failed = |problem: &dyn std::fmt::Display| Error::invalid(format!("cannot draw: {problem}"));
        register_font(FAMILY, FontStyle::Normal, FONT).map_err(|_| failed(&"the font is damaged"))?;
        let mut rgb = vec![0; 3 * size.width as usize * size.height as usize];
        {
            let area = BitMapBackend::with_buffer(&mut rgb, (size.width, size.height)).into_drawing_area();
            area.fill(&WHITE).map_err(|e| failed(&e))?;
            fill(&area).map_err(|e| failed(&e))?;
            area.present().map_err(|e| failed(&e))?;
        }
        Ok(Self { size, rgb })
    }

    /// Width and height.
    pub fn size(&self) -> Size {
        self.size
    }

    /// All pixels, row-major `[height, width, 3]`: red, green, blue.
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }

    /// Writes it as PNG.
    ///
    /// # Errors
    /// If `out` fails.
    pub fn write_png(&self, out: impl Write) -> io::Result<()> {
        let mut encoder = png::Encoder::new(out, self.size.width, self.size.height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.rgb)?;
        writer.finish()?;
        Ok(())
    }
}

/// A title as one line that the font can show.
fn title(text: &str) -> String {
    text.replace(char::is_control, " ")
}

/// The distance 1, 2 or 5 times a power of ten that divides `span` into at most `most` parts.
fn nice_step(span: f64, most: usize) -> f64 {
    let least = span / most as f64;
    let power = 10f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0].map(|m| m * power).into_iter().find(|&step| step >= least).unwrap_or(10.0 * power)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_1_2_5_and_few() {
        for (span, most, expected) in
            [(10.0, 10, 1.0), (11.0, 10, 2.0), (24_000.0, 12, 2000.0), (0.3, 4, 0.1), (70.0, 10, 10.0)]
        {
            let step = nice_step(span, most);
            assert!((step / expected - 1.0).abs() < 1e-9, "{span} / {most}: {step}");
        }
    }

    #[test]
    fn pictures_have_bounds() {
        let drawn = |width| Picture::draw(Size { width, height: 300 }, |_| Ok(()));
        assert_eq!(drawn(100).unwrap_err().to_string(), "a picture of 100 × 300 pixels, expected 240 to 8192 each");
        assert!(drawn(300).unwrap().rgb().iter().all(|&v| v == 255));
    }
}
