//! Foreign checkpoints: every layout gives the same sound, and bad files one line.

use super::Place;
use super::golden::{audio_from_noise, max_abs, parity, tensor};
use assert_cmd::Command;
use candle_core::Tensor;
use melglow::flow::Flow;
use melglow::import::{self, Container, Halves, Imported, Kind, Options};
use melglow::voice::Voice;
use std::fs;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

/// A checkpoint of the parity folder as a voice; `None` without the folder.
pub(super) fn imported(file: &str, options: &Options) -> Option<(PathBuf, Imported)> {
    let path = parity()?.join(file);
    let imported = import::import(&path, "x", options).unwrap_or_else(|e| panic!("{file}: {e}"));
    Some((path, imported))
}

fn flow(imported: &Imported) -> Flow {
    imported.voice.build_flow().unwrap().0
}

/// Every file of set A after three steps, of the two families of serialisation and all layouts.
const SET_A: [&str; 11] = [
    "a_nvidia_train_module.pt",
    "a_nvidia_train_module_legacy.pt",
    "a_model_state_dict.pt",
    "a_dle_state_dict.pt",
    "a_dle_state_dict_ddp_legacy.pt",
    "a_module_no_weightnorm.pt",
    "a_module_no_weightnorm_legacy.pt",
    "a_state_dict_no_weightnorm.pt",
    "a_old_layers_state_dict.pt",
    "a_state_dict_no_weightnorm_fp16.pt",
    "a_init_state_dict.pt",
];

#[test]
fn every_layout_of_waveglow_sounds_as_the_reference() {
    for file in SET_A {
        let Some((_, imported)) = imported(file, &Options::default()) else { return };
        let flow = flow(&imported);
        // float32 itself is 1e-6 from float64 here; half precision weights carry 11 bits
        let tolerance = if file.contains("fp16") { 2e-2 } else { 1e-5 };
        for sigma in ["0.0", "0.6", "1.0"] {
            let audio = audio_from_noise(&flow, "a", sigma.parse().unwrap());
            let error = max_abs(&audio, &tensor(&format!("a_audio_sigma{sigma}.npy")));
            // the initial weights are another model
            assert_eq!(error < tolerance, file != "a_init_state_dict.pt", "{file}, sigma {sigma}: {error}");
        }
        let norm = imported.voice.tensors().unwrap().keys().any(|name| name.ends_with("magnitude"));
        assert_eq!(norm, !file.contains("no_weightnorm"), "{file}");
        let half = imported.voice.tensors().unwrap().values().all(|t| t.dtype() == candle_core::DType::F16);
        assert_eq!(half, file.contains("fp16"), "{file}");
    }
    let (_, imported) = imported("b_state_dict.pt", &Options::default()).unwrap();
    let flow = flow(&imported);
    for sigma in ["0.6", "1.0"] {
        let audio = audio_from_noise(&flow, "b", sigma.parse().unwrap());
        let error = max_abs(&audio, &tensor(&format!("b_audio_sigma{sigma}.npy")));
        assert!(error < 2e-5, "set B, sigma {sigma}: {error}");
    }
}

/// SqueezeWave's noise in our order: what comes in front after flow 2, then the start. The reference
/// scales only the former.
fn squeezewave_noise(set: &str, sigma: f64) -> Tensor {
    let early = (tensor(&format!("{set}_z1.npy")) * sigma).unwrap();
    Tensor::cat(&[early, tensor(&format!("{set}_z0.npy"))], 1).unwrap()
}

#[test]
fn squeezewave_sounds_as_the_reference_and_returns_its_latents() {
    for set in ["s128", "s256"] {
        for (form, sigmas) in [("", &["0.6", "1.0"][..]), ("_fused", &["1.0"])] {
            let file = format!("{set}{form}_state_dict.pt");
            let Some((_, imported)) = imported(&file, &Options::default()) else { return };
            let flow = flow(&imported);
            let mel = tensor(&format!("{set}_mel.npy")).unsqueeze(0).unwrap();
            for sigma in sigmas {
                let z = squeezewave_noise(set, sigma.parse().unwrap());
                let audio = flow.inverse(&z, &mel).unwrap().squeeze(1).unwrap();
                let error = max_abs(&audio, &tensor(&format!("{set}{form}_audio_sigma{sigma}.npy")));
                assert!(error < 1e-4, "{file}, sigma {sigma}: {error}");
            }
            let audio = tensor(&format!("{set}_audio_sigma1.0.npy")).unsqueeze(1).unwrap();
            let (z, _) = flow.forward(&audio, &mel).unwrap();
            let error = max_abs(&z, &tensor(&format!("{set}_back_z.npy")));
            // the fused form is another model at the edges
            assert_eq!(error < 1e-4, form.is_empty(), "{file}: latents are off by {error}");
        }
    }
}

/// In the first files odd flows moved the first half. The golden sound is that of `glow_old.py`'s
/// algorithm in PyTorch, with set A's weights, mel and noise.
#[test]
fn alternating_halves_are_what_the_first_reference_did() {
    let alternating = Options { halves: Halves::Alternating, ..Options::default() };
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/a_audio_alternating_sigma0.6.npy");
    for file in ["a_old_layers_state_dict.pt", "a_dle_state_dict.pt"] {
        let Some((_, imported)) = imported(file, &alternating) else { return };
        let flow = flow(&imported);
        let audio = audio_from_noise(&flow, "a", 0.6);
        // an absolute path takes the place of the folder
        let error = max_abs(&audio, &tensor(golden.to_str().unwrap()));
        assert!(error < 1e-5, "{file}: {error}");
        let mel = super::golden::window(&tensor("a_train_mel.npy"), 4);
        let audio = tensor("a_train_audio.npy").unsqueeze(1).unwrap();
        let (z, _) = flow.forward(&audio, &mel).unwrap();
        assert!(max_abs(&flow.inverse(&z, &mel).unwrap(), &audio) < 1e-5);
    }
}

/// A tensor by name with its shape and what its storage holds.
#[derive(Clone)]
struct Entry {
    name: String,
    shape: Vec<i64>,
    values: Vec<f32>,
}

impl Entry {
    fn new(name: &str, shape: &[i64]) -> Self {
        let count = shape.iter().product::<i64>();
        let mut values: Vec<f32> = (0..count).map(|i| 0.05 * ((i * 37 % 11) as f32 - 5.0)).collect();
        if let ([rows, columns, 1], "convinv.0.conv.weight") = (shape, name) {
            values = (0..rows * columns).map(|i| f32::from(u8::from(i % (columns + 1) == 0))).collect();
        }
        Self { name: name.into(), shape: shape.into(), values }
    }
}

/// The smallest WaveGlow: 2 mel bands, hop 4, group 4, one flow of one layer of 3 channels.
fn tiny() -> Vec<Entry> {
    let shapes: [(&str, &[i64]); 13] = [
        ("upsample.weight", &[2, 2, 16]),
        ("upsample.bias", &[2]),
        ("convinv.0.conv.weight", &[4, 4, 1]),
        ("WN.0.start.weight", &[3, 2, 1]),
        ("WN.0.start.bias", &[3]),
        ("WN.0.end.weight", &[4, 3, 1]),
        ("WN.0.end.bias", &[4]),
        ("WN.0.cond_layer.weight", &[6, 8, 1]),
        ("WN.0.cond_layer.bias", &[6]),
        ("WN.0.in_layers.0.weight", &[6, 3, 3]),
        ("WN.0.in_layers.0.bias", &[6]),
        ("WN.0.res_skip_layers.0.weight", &[3, 3, 1]),
        ("WN.0.res_skip_layers.0.bias", &[3]),
    ];
    shapes.iter().map(|(name, shape)| Entry::new(name, shape)).collect()
}

/// What `torch.save` of a state dict pickles.
fn pickle(entries: &[Entry]) -> Vec<u8> {
    let text = |s: &str| [b"X".to_vec(), (s.len() as u32).to_le_bytes().to_vec(), s.as_bytes().to_vec()].concat();
    let int = |i: i64| [b"\x8a\x08".to_vec(), i.to_le_bytes().to_vec()].concat();
    let tuple = |items: &[i64]| [b"(".to_vec(), items.iter().flat_map(|&i| int(i)).collect(), b"t".to_vec()].concat();
    let mut bytes = b"\x80\x02ccollections\nOrderedDict\n)R(".to_vec();
    for (key, entry) in entries.iter().enumerate() {
        let mut strides = vec![1i64; entry.shape.len()];
        for dim in (1..entry.shape.len()).rev() {
            strides[dim - 1] = strides[dim].wrapping_mul(entry.shape[dim]) & i64::MAX;
        }
        bytes.extend(text(&entry.name));
        bytes.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        bytes.extend(text("storage"));
        bytes.extend(b"ctorch\nFloatStorage\n");
        bytes.extend([text(&key.to_string()), text("cpu"), int(entry.values.len() as i64)].concat());
        bytes.extend(b"tQ");
        bytes.extend([int(0), tuple(&entry.shape), tuple(&strides)].concat());
        bytes.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    bytes.extend(b"u.");
    bytes
}

fn zipped(pickle: &[u8], entries: &[Entry], method: zip::CompressionMethod) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default().compression_method(method);
    writer.start_file("archive/data.pkl", options).unwrap();
    writer.write_all(pickle).unwrap();
    for (key, entry) in entries.iter().enumerate() {
        writer.start_file(format!("archive/data/{key}"), options).unwrap();
        let bytes: Vec<u8> = entry.values.iter().flat_map(|v| v.to_le_bytes()).collect();
        writer.write_all(&bytes).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

fn torch(entries: &[Entry]) -> Vec<u8> {
    zipped(&pickle(entries), entries, zip::CompressionMethod::Stored)
}

fn run(place: &Place, args: &[&str]) -> (i32, String) {
    let mut command: Command = assert_cmd::cargo::cargo_bin_cmd!("melglow");
    let output = command.current_dir(place.path("")).args(args).output().unwrap();
    assert!(output.stdout.is_empty());
    (output.status.code().expect("no signal"), String::from_utf8(output.stderr).unwrap())
}

/// The one line that importing these bytes ends with; nothing may be left behind.
fn refusal(bytes: &[u8]) -> String {
    let place = Place::new();
    place.file("x.pt", bytes);
    let before = place.names(".");
    let (code, err) = run(&place, &["import", "x.pt", "-o", "new"]);
    assert_eq!((code, err.lines().count()), (1, 1), "{err}");
    assert_eq!(place.names("."), before, "something is left behind");
    err.trim_end().strip_prefix("melglow: x.pt: ").unwrap_or_else(|| panic!("{err}")).to_string()
}

#[test]
fn an_imported_voice_speaks_and_its_card_says_what_is_known() {
    let place = Place::new();
    place.file("tiny model.pt", &torch(&tiny()));
    let (code, err) = run(&place, &["import", "tiny model.pt", "-o", "mine"]);
    assert_eq!(code, 0, "{err}");
    assert!(err.starts_with("melglow: WaveGlow: flows 1, layers 1, channels 3, kernel 3, group 4"), "{err}");
    assert!(err.contains("assumed hop 4: a quarter of the upsampler's kernel of 16"), "{err}");
    assert_eq!(place.names("mine"), ["VOICE.md", "config.json", "model.safetensors"]);
    let card = fs::read_to_string(place.path("mine/VOICE.md")).unwrap();
    let digest: String = {
        use sha2::Digest;
        let bytes = fs::read(place.path("tiny model.pt")).unwrap();
        sha2::Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect()
    };
    for part in ["# mine\n", "`tiny model.pt`", &digest, "233 parameters", "bare state dict", "## Unknown"] {
        assert!(card.contains(part), "{part} is not in: {card}");
    }
    let mel = super::npy("<f4", "(2, 50)", &[0; 400]);
    place.file("mel.npy", &mel);
    let (code, err) = run(&place, &["synth", "mel.npy", "-o", "a.wav", "--voice", "mine"]);
    assert_eq!(code, 0, "{err}");
    assert_eq!(fs::read(place.path("a.wav")).unwrap().len(), 44 + 2 * 50 * 4);
    // a folder that is no voice stays as it is
    place.file("letters/a.txt", b"dear");
    assert_eq!(run(&place, &["import", "tiny model.pt", "-o", "letters"]).0, 1);
    assert_eq!(place.names("letters"), ["a.txt"]);
}

#[test]
fn safetensors_and_prefixes_and_new_weight_norm_are_read() {
    let place = Place::new();
    let folded = import::import(&place.file("a.pt", &torch(&tiny())), "x", &Options::default()).unwrap();
    let prefixed: Vec<Entry> =
        tiny().into_iter().map(|e| Entry { name: format!("module.waveglow.{}", e.name), ..e }).collect();
    // the same weights, one as g · v / ‖v‖ in the names of torch.nn.utils.parametrizations
    let views = |entries: &[Entry]| {
        let bytes: Vec<Vec<u8>> =
            entries.iter().map(|e| e.values.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
        let views = entries.iter().zip(&bytes).map(|(entry, bytes)| {
            let shape = entry.shape.iter().map(|&n| n as usize).collect();
            let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, bytes).unwrap();
            (entry.name.as_str(), view)
        });
        safetensors::serialize(views, None).unwrap()
    };
    let mut parametrized = tiny();
    let at = parametrized.iter().position(|e| e.name == "WN.0.start.weight").unwrap();
    let plain = parametrized.remove(at);
    let norms: Vec<f32> = plain.values.chunks(2).map(|row| row.iter().map(|v| v * v).sum::<f32>().sqrt()).collect();
    let base = "WN.0.start.parametrizations.weight.original";
    parametrized.push(Entry { name: format!("{base}0"), shape: vec![3, 1, 1], values: norms });
    let doubled = plain.values.iter().map(|v| 2.0 * v).collect();
    parametrized.push(Entry { name: format!("{base}1"), values: doubled, ..plain });
    for (name, entries) in [("plain", tiny()), ("prefixed", prefixed), ("parametrized", parametrized)] {
        for (container, bytes) in [("pt", torch(&entries)), ("safetensors", views(&entries))] {
            let path = place.file(&format!("{name}.{container}"), &bytes);
            let other = import::import(&path, "x", &Options::default()).unwrap();
            let (ours, theirs) = (other.voice.tensors().unwrap(), folded.voice.tensors().unwrap());
            assert_eq!(ours.len(), theirs.len());
            for (tensor, value) in &theirs {
                assert!(max_abs(value, &ours[tensor]) < 1e-7, "{name}.{container}: {tensor}");
            }
        }
    }
    let description = import::describe(&place.path("prefixed.safetensors")).unwrap();
    assert_eq!((description.kind, description.container), (Kind::WaveGlow, Container::Safetensors));
    assert_eq!((description.prefix.as_str(), description.tensors.len()), ("module.waveglow", 13));
    assert_eq!(description.design.unwrap().n_mels, 2);
}

#[test]
fn every_parity_checkpoint_is_described() {
    let Some(folder) = parity() else { return };
    for file in SET_A {
        let d = import::describe(&folder.join(file)).unwrap();
        let module = file.contains("module");
        assert_eq!((d.kind, d.class.as_deref()), (Kind::WaveGlow, module.then_some("glow.WaveGlow")), "{file}");
        assert_eq!(d.container == Container::TorchLegacy, file.contains("legacy"), "{file}");
        let design = d.design.unwrap();
        assert_eq!((design.n_mels, design.channels, design.layers), (3, 10, 3), "{file}");
        assert_eq!(design.flows, [8, 8, 6, 6, 4, 4], "{file}");
    }
    let d = import::describe(&folder.join("s128_state_dict.pt")).unwrap();
    assert_eq!((d.kind, d.prefix.as_str()), (Kind::SqueezeWave, "state_dict"));
    assert_eq!(import::describe(&folder.join("a_mel.pt")).unwrap().kind, Kind::Unknown);
}

#[test]
fn missing_strange_and_surplus_tensors_are_all_named() {
    let without = |gone: &[&str]| -> Vec<Entry> {
        tiny().into_iter().filter(|e| !gone.iter().any(|gone| e.name == *gone)).collect()
    };
    assert_eq!(
        refusal(&torch(&without(&["WN.0.start.bias", "WN.0.end.weight", "upsample.bias"]))),
        "3 tensors missing for WaveGlow: upsample.bias, WN.0.start.bias, WN.0.end.weight"
    );
    assert_eq!(
        refusal(&torch(&without(&["convinv.0.conv.weight"]))),
        "WaveGlow: tensor convinv.0.conv.weight is missing, without which the design is unknown"
    );
    let mut strange = without(&["WN.0.end.weight"]);
    strange.push(Entry::new("WN.0.end.weight", &[5, 3, 1]));
    assert_eq!(
        refusal(&torch(&strange)),
        "tensor of strange shape for WaveGlow: WN.0.end.weight has shape [5, 3, 1], expected [4, 3, 1]"
    );
    let mut surplus = tiny();
    surplus.push(Entry::new("speaker_embedding.weight", &[4, 3]));
    assert_eq!(
        refusal(&torch(&surplus)),
        "tensor that WaveGlow doesn't have, so it is a model of another design: speaker_embedding.weight"
    );
    let mut twice = tiny();
    twice.push(twice[3].clone());
    assert_eq!(refusal(&torch(&twice)), "holds two tensors of one name: WN.0.start.weight");
    let header = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let doubled = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 4]].concat();
    assert_eq!(refusal(&doubled), "holds two tensors of one name: a");
}

#[test]
fn weights_that_are_not_finite_are_all_named() {
    let mut bad = tiny();
    bad[1].values[0] = f32::NAN;
    bad[7].values[5] = f32::INFINITY;
    assert_eq!(
        refusal(&torch(&bad)),
        "weights that are not finite (NaN or infinite): upsample.bias, WN.0.cond_layer.weight"
    );
}

#[test]
fn storages_and_shapes_that_lie_are_refused() {
    let mut short = tiny();
    short[7].values.truncate(40);
    assert_eq!(
        refusal(&torch(&short)),
        "tensor WN.0.cond_layer.weight: truncated: shape [6, 8, 1] reaches beyond its storage"
    );
    let shape = |at: usize, shape: &[i64]| {
        let mut entries = tiny();
        entries[at].shape = shape.into();
        refusal(&torch(&entries))
    };
    let huge = 1i64 << 62;
    assert_eq!(shape(0, &[2, 2, huge]), format!("WaveGlow: upsampler of {huge}, expected 1 to 65536"));
    assert_eq!(
        shape(2, &[huge, huge, huge]),
        format!("WaveGlow: conditioning of 8 channels is no multiple of the group {huge}")
    );
    assert!(shape(1, &[huge, huge]).starts_with("tensor of strange shape for WaveGlow: upsample.bias has shape ["));
    // all sizes within bounds, together far beyond the file
    let mut greedy = tiny();
    for (at, shape) in [(0, [1024, 1024, 16]), (1, [1024, 0, 0]), (7, [6, 4096, 1])] {
        greedy[at].shape = shape.iter().copied().filter(|&n| n > 0).collect();
    }
    assert_eq!(
        refusal(&torch(&greedy)),
        "tensor upsample.weight: truncated: shape [1024, 1024, 16] reaches beyond its storage"
    );
}

#[test]
fn code_is_never_run_and_bombs_do_not_go_off() {
    let place = Place::new();
    let victim = place.path("victim");
    let command = format!("touch {}", victim.display());
    let mut evil = b"\x80\x02cos\nsystem\n(X".to_vec();
    evil.extend((command.len() as u32).to_le_bytes());
    evil.extend(command.as_bytes());
    evil.extend(b"tR.");
    let stored = zip::CompressionMethod::Stored;
    assert_eq!(refusal(&zipped(&evil, &[], stored)), "holds a Python object (os.system), expected a checkpoint");
    // the same call in the place of a tensor
    let mut state = b"\x80\x02}X\x0f\x00\x00\x00WN.0.start.bias".to_vec();
    state.extend(&evil[2..evil.len() - 1]);
    state.extend(b"s.");
    assert_eq!(
        refusal(&zipped(&state, &[], stored)),
        "holds a dictionary or list without tensors, expected a checkpoint"
    );
    assert!(!victim.exists());

    // 200 MB of pickle in an archive of 0.2 MB; a pickle that asks for memory beyond its size
    let bomb = zipped(&vec![b'N'; 200 << 20], &[], zip::CompressionMethod::Deflated);
    assert_eq!(refusal(&bomb), "archive/data.pkl: is too large");
    let values = zipped(&vec![b'N'; 3 << 20], &[], stored);
    assert!(refusal(&values).starts_with("pickle: needs more memory than a file of its size should at byte "));
    // a short legacy file that promises 2⁶⁰ numbers
    let mut legacy =
        b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.\x80\x02}q\x00.".to_vec();
    let one = [Entry::new("a", &[1])];
    let mut object = pickle(&one);
    let at = object.windows(2).position(|w| w == b"tQ").unwrap();
    object.insert(at, b'N');
    legacy.extend(object);
    legacy.extend(b"\x80\x02]X\x01\x00\x00\x000a.");
    legacy.extend((1u64 << 60).to_le_bytes());
    assert_eq!(refusal(&legacy), format!("truncated: storage 0 promises {} numbers", 1u64 << 60));
}

#[test]
fn models_of_another_kind_are_told_what_they_are() {
    let of = |names: &[&str]| {
        let entries: Vec<_> = names.iter().map(|name| Entry::new(name, &[2, 2])).collect();
        refusal(&torch(&entries))
    };
    assert_eq!(
        of(&["embedding.weight", "decoder.attention_rnn.weight_ih", "postnet.convolutions.0.0.conv.weight"]),
        "this is an acoustic model, not a vocoder: Tacotron 2 turns text into mels; give its mels to \"melglow synth\""
    );
    assert_eq!(
        of(&["conv_pre.weight_g", "ups.0.weight_g", "resblocks.0.convs1.0.weight_g"]),
        "a GAN generator: this program runs flows (HiFi-GAN or BigVGAN)"
    );
    assert_eq!(of(&["fc.weight"]), "its tensors are none of WaveGlow's or SqueezeWave's (the first is fc.weight)");
    assert_eq!(refusal(b""), "is empty (0 bytes)");
    assert_eq!(
        refusal(b"hello, this is no checkpoint"),
        "is not a checkpoint we can read; expected a file of torch.save or .safetensors"
    );
    assert_eq!(refusal(b"\x80\x04]."), "is a pickle but not one of torch.save");
    let place = Place::new();
    let (code, err) = run(&place, &["import", "gone.pt", "-o", "new"]);
    assert_eq!(code, 1);
    assert!(err.starts_with("melglow: cannot read gone.pt: No such file"), "{err}");
}

/// A thousand damaged files; `examples/fuzz_import.rs` goes on for as long as one likes.
#[test]
fn damaged_files_never_panic() {
    let place = Place::new();
    let mut state = 0x1234_5678_9abc_def0u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as usize % below
    };
    let entries = tiny();
    let pickled = pickle(&entries);
    let mut legacy =
        b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.\x80\x02}q\x00.".to_vec();
    legacy.extend(&pickled);
    legacy.extend(b"\x80\x02].");
    let mut survived = 0;
    for round in 0..1000 {
        let mut bytes = if round % 2 == 0 { pickled.clone() } else { legacy.clone() };
        for _ in 0..1 + random(3) {
            let at = random(bytes.len());
            match random(3) {
                0 => bytes[at] = random(256) as u8,
                1 => bytes.insert(at, b"()}]tuesbQRNq\x81\x85"[random(15)]),
                _ => drop(bytes.drain(at..(at + 1 + random(8)).min(bytes.len()))),
            }
        }
        let bytes = if round % 2 == 0 { zipped(&bytes, &entries, zip::CompressionMethod::Stored) } else { bytes };
        let path = place.file("x.pt", &bytes);
        let _ = import::describe(&path);
        match import::import(&path, "x", &Options::default()) {
            Ok(_) => survived += 1,
            Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
        }
    }
    assert!((1..700).contains(&survived), "{survived} of 1000 survive: the damage is not what it should be");
}

/// The parity models are untrained: neither choice can fit, and that is what is said.
#[test]
fn a_clip_is_judged_with_both_halves() {
    let Some(folder) = parity() else { return };
    let place = Place::new();
    let (model, clip) = (folder.join("b_state_dict.pt"), folder.join("LJ001-0002.wav"));
    let args = ["import", model.to_str().unwrap(), "-o", "b", "--check", clip.to_str().unwrap()];
    let (code, err) = run(&place, &args);
    assert_eq!(code, 0, "{err}");
    assert!(err.contains(" bits per sample with --halves same, "), "{err}");
    assert!(
        err.trim_end().ends_with("is the mel convention (--config, --hop, --sample-rate) that of the model?"),
        "{err}"
    );
    // a clip that can't be used is noticed before anything is written
    let (code, err) = run(&place, &["import", model.to_str().unwrap(), "-o", "c", "--check", "gone.wav"]);
    assert_eq!((code, place.path("c").exists()), (1, false), "{err}");
}

#[test]
fn a_training_config_gives_the_mel() {
    let place = Place::new();
    place.file("tiny.pt", &torch(&tiny()));
    place.file(
        "config.json",
        br#"{"train_config": {"seed": 1}, "data_config": {"segment_length": 16000, "sampling_rate": 16000,
            "filter_length": 64, "hop_length": 8, "win_length": 32, "mel_fmin": 50.0, "mel_fmax": 7000.0}}"#,
    );
    let args = ["import", "tiny.pt", "-o", "mine", "--config", "config.json"];
    let (code, err) = run(&place, &args);
    assert_eq!(code, 0, "{err}");
    assert!(!err.contains("assumed"), "{err}");
    let mel = Voice::open(place.path("mine")).unwrap().config().mel.clone();
    assert_eq!((mel.sample_rate, mel.n_fft, mel.hop_length, mel.win_length), (16_000, 64, 8, 32));
    assert_eq!((mel.f_min, mel.f_max, mel.n_mels), (50.0, 7000.0, 2));
    // options come before the file
    let (_, err) = run(&place, &[&args[..], &["--hop", "5"]].concat());
    assert_eq!(err, "melglow: tiny.pt: flow config: group is 4, expected 2 to 256 and a divisor of the hop 5\n");
    place.file("other.json", b"{}");
    let (code, err) = run(&place, &["import", "tiny.pt", "-o", "b", "--config", "other.json"]);
    assert_eq!(code, 1);
    assert!(err.starts_with("melglow: other.json: missing field `data_config`"), "{err}");
}
