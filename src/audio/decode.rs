//! Reading sound files: WAV, FLAC, MP3, Ogg Vorbis and AAC in MP4.

use super::Waveform;
use crate::{Error, Result};
use std::fs::File;
use std::path::Path;
use symphonia::core::codecs::audio::well_known::{CODEC_ID_AAC, CODEC_ID_MP3, CODEC_ID_VORBIS};
use symphonia::core::codecs::audio::{AudioDecoder, AudioDecoderOptions};
use symphonia::core::errors::Error as Symphonia;
use symphonia::core::formats::probe::Hint;
use symphonia::core::formats::{FormatOptions, FormatReader, TrackType};
use symphonia::core::io::MediaSourceStream;
use symphonia::core::meta::MetadataOptions;

/// File name extensions that [`is_audio_file`] knows, lower case.
pub const EXTENSIONS: [&str; 9] = ["wav", "wave", "flac", "mp3", "ogg", "oga", "m4a", "aac", "mp4"];

/// Whether a file's name ends like that of a sound file, in any case.
pub fn is_audio_file(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    EXTENSIONS.iter().any(|known| extension.eq_ignore_ascii_case(known))
}

/// Reads a sound file whole, channels mixed down to their mean, at the file's own sample rate.
///
/// The format is found by content; integers of `b` bits are divided by 2^(b-1) exactly. A mono file's
/// samples are kept as they are.
///
/// # Errors
/// One line naming the file: not a known format, truncated, corrupt, or without sound.
pub fn read(path: &Path) -> Result<Waveform> {
    let file = File::open(path).map_err(Error::io("read", path))?;
    let meta = file.metadata().map_err(Error::io("read", path))?;
    if meta.is_dir() {
        return Err(Error::file(path, "is a folder, expected a sound file"));
    }
    if meta.is_file() && meta.len() == 0 {
        return Err(Error::file(path, "is empty, expected a sound file"));
    }
    let mut source = Source::open(file, path)?;
    source.read_all().map_err(|problem| Error::file(path, problem))
}

/// The first sound track of a file, and its decoder.
struct Source {
    format: Box<dyn FormatReader>,
    decoder: Box<dyn AudioDecoder>,
    track: u32,
    /// Samples per channel that the header promises, where its word is exact.
    promised: Option<u64>,
    /// A lossy stream: players skip a damaged packet, such as the first of a cut MP3.
    lossy: bool,
}

impl Source {
    fn open(file: File, path: &Path) -> Result<Self> {
        let unknown = |cause: Symphonia| {
            Error::file(path, format!("not a sound file we can read ({cause}); expected WAV, FLAC, MP3 or Ogg"))
        };
        let mut hint = Hint::new();
        if let Some(extension) = path.extension().and_then(|e| e.to_str()) {
            hint.with_extension(extension);
        }
        let stream = MediaSourceStream::new(Box::new(file), Default::default());
        let format = symphonia::default::get_probe()
            .probe(&hint, stream, FormatOptions::default(), MetadataOptions::default())
            .map_err(unknown)?;
        let no_sound = || Error::file(path, "has no sound track");
        let track = format.default_track(TrackType::Audio).ok_or_else(no_sound)?;
        let parameters = track.codec_params.as_ref().and_then(|p| p.audio()).ok_or_else(no_sound)?;
        let lossy = [CODEC_ID_MP3, CODEC_ID_VORBIS, CODEC_ID_AAC].contains(&parameters.codec);
        let promised = track.num_frames.filter(|_| !lossy);
        let decoder = symphonia::default::get_codecs()
            .make_audio_decoder(parameters, &AudioDecoderOptions::default())
            .map_err(unknown)?;
        let track = track.id;
        Ok(Self { format, decoder, track, promised, lossy })
    }

    fn read_all(&mut self) -> Result<Waveform, String> {
        let mut samples = Vec::new();
        let mut sample_rate = 0;
        let mut interleaved: Vec<f32> = Vec::new();
        loop {
            let packet = match self.format.next_packet() {
                Ok(Some(packet)) => packet,
                Ok(None) => break,
                // The end of a file cut within a packet.
                Err(Symphonia::IoError(e)) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
                    if self.lossy || self.promised.is_some() {
                        break;
                    }
                    return Err(format!("truncated after {} samples", samples.len()));
                }
                Err(Symphonia::ResetRequired) => {
                    return Err("changes its format midway, which is not supported".into());
                }
                Err(cause) => {
                    return Err(format!("damaged after {} samples ({cause})", samples.len()));
                }
            };
            if packet.track_id != self.track {
                continue;
            }
            let decoded = match self.decoder.decode(&packet) {
                Ok(decoded) => decoded,
                Err(Symphonia::DecodeError(_)) if self.lossy => continue,
                Err(cause) => {
                    return Err(format!("damaged after {} samples ({cause})", samples.len()));
                }
            };
            let (rate, channels) = (decoded.spec().rate(), decoded.spec().channels().count());
            if sample_rate != 0 && rate != sample_rate {
                return Err(format!("changes its sample rate from {sample_rate} to {rate} midway"));
            }
            sample_rate = rate;
            decoded.copy_to_vec_interleaved(&mut interleaved);
            match channels {
                0 => return Err("has no channels".into()),
                1 => samples.extend_from_slice(&interleaved),
                _ => {
                    samples.extend(interleaved.chunks_exact(channels).map(|c| c.iter().sum::<f32>() / channels as f32))
                }
            }
        }
        match self.promised {
            Some(promised) if (samples.len() as u64) < promised => {
                Err(format!("truncated: {} of {promised} samples", samples.len()))
            }
            _ if samples.is_empty() => Err("holds no sound (0 samples)".into()),
            _ if sample_rate == 0 => Err("has a sample rate of 0".into()),
            _ => Ok(Waveform { samples, sample_rate }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audio::wav::{self, WavFormat};

    fn temporary(bytes: &[u8], name: &str) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        (folder, path)
    }

    fn data(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
    }

    #[test]
    fn int16_is_divided_exactly() {
        let samples: Vec<f32> = (-32_768..=32_767).map(|v| v as f32 / 32_768.0).collect();
        let mut bytes = Vec::new();
        wav::write_to(&mut bytes, &samples, 22_050, WavFormat::Int16).unwrap();
        let (_folder, path) = temporary(&bytes, "a.wav");
        assert_eq!(read(&path).unwrap(), Waveform { samples, sample_rate: 22_050 });
    }

    #[test]
    fn every_wav_depth() {
        let folder = tempfile::tempdir().unwrap();
        for (bits, float, tolerance) in
            [(8, false, 1.0 / 128.0), (16, false, 4e-5), (24, false, 2e-7), (32, false, 1e-7), (32, true, 0.0)]
        {
            let path = folder.path().join("a.wav");
            let sample_format = if float { hound::SampleFormat::Float } else { hound::SampleFormat::Int };
            let spec = hound::WavSpec { channels: 2, sample_rate: 16_000, bits_per_sample: bits, sample_format };
            let mut writer = hound::WavWriter::create(&path, spec).unwrap();
            for value in [0.5f32, -0.25, -1.0, 0.0] {
                if float {
                    writer.write_sample(value).unwrap();
                } else {
                    writer.write_sample((f64::from(value) * 2f64.powi(i32::from(bits) - 1)) as i32).unwrap();
                }
            }
            writer.finalize().unwrap();
            let sound = read(&path).unwrap();
            assert_eq!(sound.sample_rate, 16_000);
            for (got, expected) in sound.samples.iter().zip([0.125, -0.5]) {
                assert!((got - expected).abs() <= tolerance, "{bits} {float}: {got}");
            }
        }
    }

    #[test]
    fn float64_wav() {
        let mut bytes = Vec::new();
        wav::write_to(&mut bytes, &[0.0; 4], 8000, WavFormat::Float32).unwrap();
        bytes[32] = 8; // block align
        bytes[34] = 64; // bits per sample
        bytes[28..32].copy_from_slice(&64_000u32.to_le_bytes());
        bytes.truncate(58);
        bytes.extend(0.5f64.to_le_bytes());
        bytes.extend((-1.5f64).to_le_bytes());
        let (_folder, path) = temporary(&bytes, "a.wav");
        assert_eq!(read(&path).unwrap().samples, [0.5, -1.5]);
    }

    /// The files hold 0.1 s of a 440 Hz sine of amplitude 0.5 at 16 kHz, stereo, both channels alike.
    #[test]
    fn compressed_formats() {
        for (name, least, tolerance) in [("tone.flac", 1600, 1e-4), ("tone.ogg", 1600, 0.05), ("tone.mp3", 1600, 0.05)]
        {
            let sound = read(&data(name)).unwrap();
            assert_eq!(sound.sample_rate, 16_000, "{name}");
            assert!(sound.samples.len() >= least && sound.samples.len() < 5000, "{name}: {}", sound.samples.len());
            let power = sound.samples.iter().map(|s| s * s).sum::<f32>() / 1600.0;
            assert!((power - 0.125).abs() < tolerance, "{name}: {power}");
        }
    }

    #[test]
    fn truncated_garbage_and_empty_are_one_line() {
        let mut bytes = Vec::new();
        wav::write_to(&mut bytes, &[0.1; 1000], 22_050, WavFormat::Int16).unwrap();
        let flac = std::fs::read(data("tone.flac")).unwrap();
        let garbage: Vec<u8> = (0..5000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        for (bytes, name) in [
            (&bytes[..1000], "cut.wav"),
            (&bytes[..44], "cut.wav"),
            (&bytes[..20], "cut.wav"),
            (&flac[..flac.len() / 2], "cut.flac"),
            (&garbage[..], "garbage.wav"),
            (&garbage[..], "garbage.mp3"),
            (&[][..], "empty.wav"),
        ] {
            let (_folder, path) = temporary(bytes, name);
            let message = read(&path).unwrap_err().to_string();
            assert!(message.contains(name) && !message.contains('\n'), "{message}");
        }
        assert!(matches!(read(Path::new("missing.wav")), Err(Error::Io { .. })));
    }

    #[test]
    fn no_truncation_or_flipped_byte_panics() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        for name in ["tone.flac", "tone.ogg", "tone.mp3"] {
            let whole = std::fs::read(data(name)).unwrap();
            let mut state = 7u32;
            for round in 0..60 {
                let mut bytes = whole.clone();
                for _ in 0..8 {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let at = state as usize % bytes.len();
                    bytes[at] = (state >> 24) as u8;
                }
                bytes.truncate(whole.len() * (round + 1) / 60);
                std::fs::write(&path, &bytes).unwrap();
                let _ = read(&path);
            }
        }
    }

    #[test]
    fn names() {
        assert!(is_audio_file(Path::new("a/B.WAV")) && is_audio_file(Path::new("x.flac")));
        assert!(!is_audio_file(Path::new("a.npy")) && !is_audio_file(Path::new("wav")));
    }
}
