//! One binary for all integration tests.

mod cli;
mod denoise;
mod distill;
mod eval;
mod given_mels;
mod golden;
mod import;
mod laws;
mod mels;
mod mels_cli;
#[cfg(all(feature = "play", target_os = "linux"))]
mod play;
mod plot;
mod recipes;
mod sequential;
mod stream;
#[cfg(all(feature = "play", target_os = "linux"))]
mod terminal;
mod train;
mod voice;
mod zoo;

use melglow::flow::Flow;
use melglow::flow::config::{Block, ConditioningConfig, FlowConfig, StepConfig, WaveNetConfig};
use melglow::mel::{MelConfig, MelSpectrogram, file};
use melglow::net::Params;
use melglow::voice::{SynthesisConfig, Voice, VoiceConfig};
use std::path::{Path, PathBuf};

/// The design of a flow that is built and run in no time.
fn tiny_flow() -> FlowConfig {
    let net =
        WaveNetConfig { channels: 8, kernel: 3, dilations: vec![1, 2], weight_norm: false, skip: false, causal: false };
    let steps = vec![StepConfig::Actnorm {}, StepConfig::mix(), StepConfig::coupling(net, Some(2.0))];
    let conditioning = ConditioningConfig::Frame { channels: 8, residual_layers: 1, lookahead: None, norm: false };
    FlowConfig::new(conditioning, 16, vec![Block { repeat: 2, steps }])
}

/// A voice with seeded weights, as `name`.
fn tiny_voice(name: &str) -> Voice {
    seeded_voice(name, MelConfig::nvidia(), tiny_flow())
}

/// A voice of any design with seeded weights.
fn seeded_voice(name: &str, mel: MelConfig, flow: FlowConfig) -> Voice {
    let params = Params::seeded(1, &candle_core::Device::Cpu);
    Flow::new(&flow, &mel, params.builder()).unwrap();
    let tensors: Vec<_> = params.named().into_iter().map(|(name, var)| (name, var.as_tensor().clone())).collect();
    let synthesis = SynthesisConfig::new(0.02, 2);
    Voice::from_parts(VoiceConfig::new(name, mel, flow, synthesis), &tensors).unwrap()
}

/// A mel of 80 bands that looks a little like speech.
fn tiny_mel(frames: usize) -> MelSpectrogram {
    let values = (0..80 * frames).map(|i| -6.0 + (i as f32 * 0.37).sin() - (i / frames) as f32 / 40.0);
    MelSpectrogram::new(values.collect(), 80).unwrap()
}

/// A temporary folder with a tiny voice `voice/`.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        tiny_voice("tiny").save(folder.path().join("voice")).unwrap();
        Self { folder }
    }

    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes bytes as a file.
    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// Writes a good mel as a file.
    fn mel(&self, name: &str, frames: usize) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        file::write_npy(&path, &tiny_mel(frames)).unwrap();
        path
    }

    /// Names in a folder, sorted.
    fn names(&self, name: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path(name)).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// The bytes of a version 1 `.npy` file.
fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
    while !(10 + header.len() + 1).is_multiple_of(64) {
        header.push(' ');
    }
    header.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}
