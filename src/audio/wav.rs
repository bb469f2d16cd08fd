//! Writing WAV files and streams.

use crate::{Result, atomic};
use std::io::{self, Write};
use std::path::Path;

/// How samples are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WavFormat {
    /// 16-bit integers, steps of 1/32768.
    #[default]
    Int16,
    /// 24-bit integers, steps of 1/8388608.
    Int24,
    /// 32-bit floats, as they are (values beyond ±1 are kept).
    Float32,
}

impl WavFormat {
    fn bits(self) -> u16 {
        match self {
            Self::Int16 => 16,
            Self::Int24 => 24,
            Self::Float32 => 32,
        }
    }
}

/// Writes mono samples to a file, whole or not at all, and returns how many were saturated.
///
/// # Errors
/// If the file can't be written or would exceed WAV's 4 GiB.
pub fn write(path: &Path, samples: &[f32], sample_rate: u32, format: WavFormat) -> Result<usize> {
    atomic::write(path, |out| write_to(out, samples, sample_rate, format))
}

/// Writes mono samples to a stream that need not seek (standard output), and returns how many were
/// saturated: integers stop at full scale instead of wrapping around.
///
/// # Errors
/// If the stream fails or the samples exceed WAV's 4 GiB.
pub fn write_to(mut out: impl Write, samples: &[f32], sample_rate: u32, format: WavFormat) -> io::Result<usize> {
    write_header(&mut out, samples.len() as u64, sample_rate, format)?;
    let saturated = write_samples(&mut out, samples, format)?;
    write_padding(&mut out, samples.len() as u64, format)?;
    out.flush()?;
    Ok(saturated)
}

/// Writes the header of a mono stream of `samples` samples; [`write_samples`] in any number of
/// pieces and one [`write_padding`] complete it.
///
/// # Errors
/// If the stream fails or the samples exceed WAV's 4 GiB.
pub fn write_header(mut out: impl Write, samples: u64, sample_rate: u32, format: WavFormat) -> io::Result<()> {
    out.write_all(&header(Some(samples), sample_rate, format)?)
}

/// A header; without a number of samples, that of a stream whose end nobody knows: both sizes are
/// the largest there are, which players take for "until it ends".
///
/// # Errors
/// If the samples exceed WAV's 4 GiB.
pub fn header(samples: Option<u64>, sample_rate: u32, format: WavFormat) -> io::Result<Vec<u8>> {
    let bytes_each = u32::from(format.bits() / 8);
    let too_long = || io::Error::new(io::ErrorKind::FileTooLarge, "more than WAV's 4 GiB");
    let data = match samples {
        Some(samples) => u32::try_from(samples * u64::from(bytes_each)).map_err(|_| too_long())?,
        None => u32::MAX,
    };
    // RIFF's size counts "WAVE", the chunks and the padding to an even length.
    let chunks = match format {
        WavFormat::Float32 => 4 + (8 + 18) + (8 + 4) + 8,
        _ => 4 + (8 + 16) + 8,
    };
    let riff = match samples {
        Some(_) => data.checked_add(chunks + data % 2).ok_or_else(too_long)?,
        None => u32::MAX,
    };
    let mut header = Vec::with_capacity(64);
    header.extend(b"RIFF");
    header.extend(riff.to_le_bytes());
    header.extend(b"WAVEfmt ");
    let (fmt_len, tag) = if format == WavFormat::Float32 { (18u32, 3u16) } else { (16, 1) };
    header.extend(fmt_len.to_le_bytes());
    header.extend(tag.to_le_bytes());
    header.extend(1u16.to_le_bytes());
    header.extend(sample_rate.to_le_bytes());
    header.extend(sample_rate.saturating_mul(bytes_each).to_le_bytes());
    header.extend((bytes_each as u16).to_le_bytes());
    header.extend(format.bits().to_le_bytes());
    if format == WavFormat::Float32 {
        // Formats other than PCM carry an extension size and a count of samples.
        header.extend(0u16.to_le_bytes());
        header.extend(b"fact");
        header.extend(4u32.to_le_bytes());
        header.extend((data / 4).to_le_bytes());
    }
    header.extend(b"data");
    header.extend(data.to_le_bytes());
    Ok(header)
}

/// Writes the next samples after [`write_header`], and returns how many were saturated.
///
/// # Errors
/// If the stream fails.
pub fn write_samples(mut out: impl Write, samples: &[f32], format: WavFormat) -> io::Result<usize> {
    let mut saturated = 0;
    let mut bytes = Vec::with_capacity(4 * samples.len().min(16_384));
    for piece in samples.chunks(16_384) {
        bytes.clear();
        for &sample in piece {
            match format {
                WavFormat::Int16 => {
                    bytes.extend((quantise(sample, 32_768.0, &mut saturated) as i16).to_le_bytes());
                }
                WavFormat::Int24 => {
                    let value = quantise(sample, 8_388_608.0, &mut saturated);
                    bytes.extend(&value.to_le_bytes()[..3]);
                }
                WavFormat::Float32 => bytes.extend(sample.to_le_bytes()),
            }
        }
        out.write_all(&bytes)?;
    }
    Ok(saturated)
}

/// Writes the byte that makes an odd number of data bytes even.
///
/// # Errors
/// If the stream fails.
pub fn write_padding(mut out: impl Write, samples: u64, format: WavFormat) -> io::Result<()> {
    if (samples * u64::from(format.bits() / 8)) % 2 == 1 { out.write_all(&[0]) } else { Ok(()) }
}

/// A name for a file out of a name that may be anything: it leads nowhere else.
pub(crate) fn plain_name(name: &str) -> String {
    name.replace(['/', '\\'], "_")
}

/// The nearest integer of `sample · scale` within `-scale ..= scale - 1`; NaN is 0 and counts.
fn quantise(sample: f32, scale: f64, saturated: &mut usize) -> i32 {
    let value = (f64::from(sample) * scale).round();
    if !(-scale..scale).contains(&value) {
        *saturated += 1;
    }
    value.clamp(-scale, scale - 1.0) as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(samples: &[f32], format: WavFormat) -> (Vec<u8>, usize) {
        let mut out = Vec::new();
        let saturated = write_to(&mut out, samples, 22_050, format).unwrap();
        (out, saturated)
    }

    #[test]
    fn every_i16_survives() {
        let samples: Vec<f32> = (-32_768..=32_767).map(|v| v as f32 / 32_768.0).collect();
        let (out, saturated) = bytes(&samples, WavFormat::Int16);
        assert_eq!(saturated, 0);
        let mut reader = hound::WavReader::new(&out[..]).unwrap();
        assert_eq!(reader.spec().sample_rate, 22_050);
        assert!(reader.samples::<i16>().map(Result::unwrap).eq(-32_768..=32_767));
    }

    #[test]
    fn saturates_and_counts() {
        let samples = [1.5, -1.5, 1.0, -1.0, 0.5, f32::NAN, f32::INFINITY];
        let (out, saturated) = bytes(&samples, WavFormat::Int16);
        assert_eq!(saturated, 5);
        let read: Vec<i16> = hound::WavReader::new(&out[..]).unwrap().samples().map(Result::unwrap).collect();
        assert_eq!(read, [32_767, -32_768, 32_767, -32_768, 16_384, 0, 32_767]);
    }

    #[test]
    fn odd_24_bit_length_is_padded() {
        let (out, saturated) = bytes(&[0.25, -0.25, 2.0], WavFormat::Int24);
        assert_eq!((out.len(), saturated), (44 + 10, 1));
        assert_eq!(u32::from_le_bytes(out[4..8].try_into().unwrap()) as usize, out.len() - 8);
        let read: Vec<i32> = hound::WavReader::new(&out[..]).unwrap().samples().map(Result::unwrap).collect();
        assert_eq!(read, [2_097_152, -2_097_152, 8_388_607]);
    }

    #[test]
    fn floats_are_kept() {
        let samples = [1.5, -0.1, 0.0];
        let (out, saturated) = bytes(&samples, WavFormat::Float32);
        assert_eq!(saturated, 0);
        assert_eq!(u32::from_le_bytes(out[4..8].try_into().unwrap()) as usize, out.len() - 8);
        let read: Vec<f32> = hound::WavReader::new(&out[..]).unwrap().samples().map(Result::unwrap).collect();
        assert_eq!(read, samples);
    }

    #[test]
    fn a_stream_of_unknown_length_differs_in_its_sizes_alone() {
        for format in [WavFormat::Int16, WavFormat::Float32] {
            let (known, endless) = (header(Some(5), 22_050, format).unwrap(), header(None, 22_050, format).unwrap());
            assert_eq!(known.len(), endless.len());
            assert_eq!((&endless[4..8], &endless[endless.len() - 4..]), (&[255; 4][..], &[255; 4][..]));
            assert_eq!(known[8..36], endless[8..36]);
        }
    }

    #[test]
    fn too_long_is_an_error() {
        let error = write_header(io::sink(), 1 << 31, 22_050, WavFormat::Int16).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
    }
}
