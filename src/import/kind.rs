//! What a checkpoint is, judged by the names of its tensors.

/// What the tensors are the weights of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// NVIDIA's WaveGlow and its forks.
    WaveGlow,
    /// SqueezeWave.
    SqueezeWave,
    /// Text to mel: the model's name.
    AcousticModel(&'static str),
    /// A generator (or discriminator) of an adversarial network: the model's name.
    Gan(&'static str),
    /// Another vocoder that isn't a flow of our kind: the model's name.
    OtherVocoder(&'static str),
    /// None that we know.
    Unknown,
}

/// Names that all occur in a model that we can't run.
const OTHERS: [(&[&str], Kind); 14] = [
    (&["enc_p.", "dec.ups."], Kind::Gan("VITS, which speaks from text by itself")),
    (&["attention_rnn.", "postnet."], Kind::AcousticModel("Tacotron 2")),
    (&["encoder.lstm.", "postnet."], Kind::AcousticModel("Tacotron 2")),
    (&["pitch_predictor.", "duration_predictor."], Kind::AcousticModel("FastPitch")),
    (&["variance_adaptor.", "encoder."], Kind::AcousticModel("FastSpeech 2")),
    (&["decoder.estimator.", "encoder."], Kind::AcousticModel("Matcha-TTS")),
    (&["encoder.attn_layers.", "decoder.flows."], Kind::AcousticModel("Glow-TTS")),
    (&["conv_pre.", "ups.0."], Kind::Gan("HiFi-GAN or BigVGAN")),
    (&["mpd."], Kind::Gan("HiFi-GAN's discriminators")),
    (&["discriminators.0.convs.0."], Kind::Gan("HiFi-GAN's discriminators")),
    (&["upsample_net.", "conv_layers.0."], Kind::Gan("Parallel WaveGAN")),
    (&["melgan."], Kind::Gan("MelGAN")),
    (&["backbone.convnext.0.", "head."], Kind::Gan("Vocos")),
    (&["rnn1.weight_ih_l0", "rnn2.weight_ih_l0"], Kind::OtherVocoder("WaveRNN")),
];

impl Kind {
    /// The kind, and what stands before the names of a model of ours: `state_dict.module.`.
    pub fn of<'a>(names: impl Iterator<Item = &'a str> + Clone) -> (Self, &'a str) {
        let prefix = ["WN.0.", "convinv.0."].iter().find_map(|&marker| {
            names.clone().find_map(|name| {
                let (at, _) = name.match_indices(marker).find(|&(at, _)| at == 0 || name[..at].ends_with('.'))?;
                Some(&name[..at])
            })
        });
        if let Some(prefix) = prefix {
            let separable = names
                .filter_map(|name| name.strip_prefix(prefix)?.strip_prefix("WN.")?.split_once(".in_layers.0."))
                .any(|(_, rest)| rest.starts_with(|c: char| c.is_ascii_digit()));
            return (if separable { Self::SqueezeWave } else { Self::WaveGlow }, prefix);
        }
        let kind = OTHERS.iter().find(|(marks, _)| marks.iter().all(|mark| names.clone().any(|n| n.contains(mark))));
        (kind.map_or(Self::Unknown, |&(_, kind)| kind), "")
    }

    /// Why a model of this kind can't be imported; `None` if it can.
    pub fn refusal(self) -> Option<String> {
        Some(match self {
            Self::WaveGlow | Self::SqueezeWave => return None,
            Self::AcousticModel(name) => format!(
                "this is an acoustic model, not a vocoder: {name} turns text into mels; give its mels to \"melglow synth\""
            ),
            Self::Gan(name) => format!("a GAN generator: this program runs flows ({name})"),
            Self::OtherVocoder(name) => format!("a vocoder of another kind: this program runs flows ({name})"),
            Self::Unknown => return Some("its tensors are none of WaveGlow's or SqueezeWave's".into()),
        })
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::WaveGlow => f.write_str("WaveGlow"),
            Self::SqueezeWave => f.write_str("SqueezeWave"),
            Self::AcousticModel(name) => write!(f, "acoustic model ({name})"),
            Self::Gan(name) => write!(f, "GAN ({name})"),
            Self::OtherVocoder(name) => write!(f, "vocoder of another kind ({name})"),
            Self::Unknown => f.write_str("unknown"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_known_by_their_names() {
        let of = |names: &[&'static str]| Kind::of(names.iter().copied());
        assert_eq!(of(&["x", "state_dict.module.WN.0.start.bias"]), (Kind::WaveGlow, "state_dict.module."));
        assert_eq!(of(&["convinv.0.conv.weight"]), (Kind::WaveGlow, ""));
        assert_eq!(of(&["WN.0.in_layers.0.1.weight"]), (Kind::SqueezeWave, ""));
        assert_eq!(of(&["MyWN.0.x"]).0, Kind::Unknown);
        let tacotron = ["state_dict.decoder.attention_rnn.weight_ih", "state_dict.postnet.convolutions.0.0.conv.bias"];
        assert_eq!(of(&tacotron).0, Kind::AcousticModel("Tacotron 2"));
        assert_eq!(of(&["generator.conv_pre.bias", "generator.ups.0.bias"]).0, Kind::Gan("HiFi-GAN or BigVGAN"));
        assert!(of(&["a", "b"]).0.refusal().is_some());
    }
}
