//! The card of an imported voice: what is known of it, and what isn't.

use super::{Checkpoint, Design, Family, Halves, Kind};
use crate::voice::VoiceConfig;

/// What is known of an imported model.
pub(super) struct Facts {
    name: String,
    file: String,
    bytes: u64,
    sha256: String,
    origin: String,
    architecture: String,
    parameters: usize,
    gmac_per_second: f64,
    mel: String,
    sigma: f32,
    halves: Halves,
}

impl Facts {
    pub(super) fn of(
        checkpoint: &Checkpoint,
        prefix: &str,
        (kind, design, halves): (Kind, &Design, Halves),
        config: &VoiceConfig,
        (parameters, macs_per_sample): (usize, f64),
        sha256: String,
    ) -> Self {
        let mel = &config.mel;
        let path = prefix.trim_end_matches('.');
        let place = if path.is_empty() { "bare state dict".to_string() } else { format!("under \"{path}\"") };
        let class = checkpoint.module_class(path).map_or_else(String::new, |c| format!(", a pickled {c}"));
        let norm = if design.weight_norm { "weight norm attached" } else { "weight norm folded" };
        let details = match &design.family {
            Family::WaveGlow { upsample, separate_layers } => {
                let layers = if *separate_layers { ", layers of before the fusion" } else { "" };
                format!("upsampler of {upsample} samples{layers}")
            }
            Family::SqueezeWave { batch_norm: true } => "batch norm attached".to_string(),
            Family::SqueezeWave { batch_norm: false } => "batch norm folded".to_string(),
        };
        let file = checkpoint.path().file_name().unwrap_or_default().to_string_lossy();
        Self {
            name: config.name.clone(),
            file: crate::torch::clip(&file),
            bytes: checkpoint.len(),
            sha256,
            origin: format!("{}, {place}{class}; {norm}", checkpoint.container()),
            architecture: format!(
                "{kind}: flows {}, layers {}, channels {}, kernel {}, group {}, of which {:?} flow on, {} mel bands, {details}",
                design.flows.len(),
                design.layers,
                design.channels,
                design.kernel,
                design.group(),
                design.flows,
                design.n_mels
            ),
            parameters,
            gmac_per_second: macs_per_sample * f64::from(mel.sample_rate) / 1e9,
            mel: format!(
                "{} Hz, FFT {}, window {}, hop {}, {} bands from {} to {} Hz, floor {:e}",
                mel.sample_rate, mel.n_fft, mel.win_length, mel.hop_length, mel.n_mels, mel.f_min, mel.f_max, mel.floor
            ),
            sigma: config.synthesis.sigma,
            halves,
        }
    }

    /// One line.
    pub(super) fn summary(&self) -> String {
        format!(
            "{}; {} parameters, {:.2} GMAC per second of sound",
            self.architecture, self.parameters, self.gmac_per_second
        )
    }

    /// The text of `VOICE.md`.
    pub(super) fn card(&self, assumed: &[String]) -> String {
        let assumed = match assumed {
            [] => "- **Assumed:** nothing; the file or the command said it all.\n".to_string(),
            lines => lines.iter().map(|line| format!("- **Assumed:** {line}\n")).collect(),
        };
        format!(
            "# {}\n\n\
            - **Source:** `{}`, {} bytes, SHA-256 `{}`.\n\
            - **Layout:** {}.\n\
            - **Architecture:** {}.\n\
            - **Size:** {} parameters, {:.2} GMAC per second of sound.\n\
            - **Halves:** {}.\n\
            - **Mel:** {}.\n\
            {assumed}\
            - **Default synthesis:** sigma {}, no refinement (`--refine` adds it).\n\n\
            ## Unknown\n\n\
            The file doesn't say it: speaker and data, licence of the weights, training steps, likelihood, scores, \
            known faults. `melglow eval --voice DIR --data FOLDER` measures the likelihood.\n",
            self.name,
            self.file,
            self.bytes,
            self.sha256,
            self.origin,
            self.architecture,
            self.parameters,
            self.gmac_per_second,
            self.halves,
            self.mel,
            self.sigma
        )
    }
}
