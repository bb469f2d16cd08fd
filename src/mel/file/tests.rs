use super::*;
use std::io::Write;
use std::path::PathBuf;

/// A golden file, or `None` (said aloud) where the shared folder is absent.
pub(crate) fn parity(name: &str) -> Option<PathBuf> {
    let shared = std::env::var_os("MELGLOW_SHARED")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
    let path = shared.join("parity").join(name);
    if !path.exists() {
        eprintln!("SKIPPED: no golden file {}; set MELGLOW_SHARED", path.display());
        return None;
    }
    Some(path)
}

const LAYOUT: Layout = Layout { n_mels: 2, transpose: false };

fn npy_bytes(shape: &[usize], values: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::new();
    npy::write(&mut bytes, shape, values).unwrap();
    bytes
}

fn zipped(entries: &[(&str, &[u8])], deflate: bool) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let method = if deflate { zip::CompressionMethod::Deflated } else { zip::CompressionMethod::Stored };
    for (name, bytes) in entries {
        writer.start_file(*name, zip::write::SimpleFileOptions::default().compression_method(method)).unwrap();
        writer.write_all(bytes).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

/// `_rebuild_tensor_v2` of a `[2, 3]` tensor in protocol 2.
fn tensor_pickle(kind: &str, strides: [u8; 2]) -> Vec<u8> {
    let mut bytes = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x00((X\x07\x00\x00\x00storageq\x01ctorch\n".to_vec();
    bytes.extend(kind.as_bytes());
    bytes.extend(b"\nq\x02X\x01\x00\x00\x000q\x03X\x03\x00\x00\x00cpuq\x04K\x06tq\x05QK\x00K\x02K\x03\x86q\x06");
    bytes.extend([b'K', strides[0], b'K', strides[1], 0x86]);
    bytes.extend(b"q\x07\x89ccollections\nOrderedDict\nq\x08)Rq\x09tq\x0aRq\x0b.");
    bytes
}

fn little(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

const SIX: [f32; 6] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];

fn torch_zip() -> Vec<u8> {
    zipped(&[("a/data.pkl", &tensor_pickle("FloatStorage", [3, 1])), ("a/data/0", &little(&SIX))], false)
}

fn torch_legacy() -> Vec<u8> {
    let mut bytes =
        b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.\x80\x02}q\x00.".to_vec();
    let mut object = tensor_pickle("FloatStorage", [1, 2]);
    // Legacy storages carry a sixth item, the view: None.
    let at = object.windows(3).position(|w| w == b"K\x06t").unwrap();
    object.insert(at + 2, b'N');
    bytes.extend(object);
    bytes.extend(b"\x80\x02]q\x00X\x01\x00\x00\x000q\x01a.");
    bytes.extend(6u64.to_le_bytes());
    bytes.extend(little(&SIX));
    bytes
}

fn safetensors_bytes(dtype: &str, data: &[u8]) -> Vec<u8> {
    let header = format!(r#"{{"mel":{{"dtype":"{dtype}","shape":[2,3],"data_offsets":[0,{}]}}}}"#, data.len());
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

fn every_format() -> Vec<(&'static str, Vec<u8>)> {
    let npy = npy_bytes(&[2, 3], &SIX);
    vec![
        ("npy", npy.clone()),
        ("npz", zipped(&[("mel.npy", &npy), ("other.npy", &npy)], false)),
        ("npz deflated", zipped(&[("arr_0.npy", &npy)], true)),
        ("pt", torch_zip()),
        ("pt legacy", torch_legacy()),
        ("safetensors", safetensors_bytes("F32", &little(&SIX))),
    ]
}

fn problem(bytes: &[u8], layout: Layout) -> String {
    let message = read_bytes(bytes, Path::new("x"), layout).unwrap_err().to_string();
    assert!(!message.contains('\n'), "{message}");
    message
}

#[test]
fn every_format_is_read() {
    for (name, bytes) in every_format() {
        let mel = read_bytes(&bytes, Path::new("x"), LAYOUT).unwrap_or_else(|e| panic!("{name}: {e}"));
        let expected = if name == "pt legacy" { [1.0, 3.0, 5.0, 2.0, 4.0, 6.0] } else { SIX };
        assert_eq!((mel.frames(), mel.values()), (3, &expected[..]), "{name}");
    }
}

#[test]
fn golden_files_agree() {
    let Some(npy) = parity("lj_mel.npy") else {
        return;
    };
    let mel = read(&npy, 80).unwrap();
    assert_eq!(mel.frames(), 164);
    assert_eq!(read(&npy.with_extension("pt"), 80).unwrap(), mel);
    let b = npy.with_file_name("b_mel.npy");
    assert_eq!(read(&b, 80).unwrap(), read(&b.with_extension("npz"), 80).unwrap());
    assert_eq!(read(&b.with_file_name("a_mel.pt"), 3).unwrap().frames(), 6);
}

#[test]
fn shapes() {
    let one = npy_bytes(&[1, 2, 3], &SIX);
    assert_eq!(read_bytes(&one, Path::new("x"), LAYOUT).unwrap().frames(), 3);
    let turned = Layout { n_mels: 3, transpose: true };
    let mel = read_bytes(&one, Path::new("x"), turned).unwrap();
    assert_eq!((mel.n_mels(), mel.values()), (3, &[1.0, 4.0, 2.0, 5.0, 3.0, 6.0][..]));
    let expected = |n_mels| Layout { n_mels, transpose: false };
    assert_eq!(read_bytes(&npy_bytes(&[2, 3], &SIX), Path::new("x"), expected(3)).unwrap(), mel);
    let square = npy_bytes(&[2, 2], &SIX[..4]);
    assert_eq!(read_bytes(&square, Path::new("x"), LAYOUT).unwrap().values(), [1.0, 2.0, 3.0, 4.0]);
    let turned = Layout { n_mels: 2, transpose: true };
    assert_eq!(read_bytes(&square, Path::new("x"), turned).unwrap().values(), [1.0, 3.0, 2.0, 4.0]);
    assert_eq!(
        problem(&npy_bytes(&[2, 3], &SIX), expected(80)),
        "x: shape is [2, 3], expected [80, frames] or [frames, 80]; it has another number of mel bands"
    );
    assert!(problem(&npy_bytes(&[6], &SIX), LAYOUT).contains("shape is [6]"));
    assert!(problem(&npy_bytes(&[3, 2, 1], &SIX), LAYOUT).contains("shape is [3, 2, 1]"));
    assert!(problem(&npy_bytes(&[2, 0], &[]), LAYOUT).contains("the mel is empty (shape [2, 0])"));
}

#[test]
fn values_that_are_not_finite_are_placed() {
    let bytes = npy_bytes(&[2, 3], &[0.0, 0.0, 0.0, 0.0, f32::NAN, 0.0]);
    assert_eq!(problem(&bytes, LAYOUT), "x: value NaN at band 1, frame 1 is not finite");
    let bytes = npy_bytes(&[3, 2], &[0.0, 0.0, 0.0, f32::INFINITY, 0.0, 0.0]);
    assert!(problem(&bytes, Layout { n_mels: 2, transpose: true }).contains("value inf at band 1, frame 1"));
}

#[test]
fn wrong_contents_say_what_they_are() {
    let complex =
        zipped(&[("a/data.pkl", &tensor_pickle("ComplexFloatStorage", [3, 1])), ("a/data/0", &[0; 48])], false);
    assert!(problem(&complex, LAYOUT).contains("complex"));
    let long = zipped(&[("a/data.pkl", &tensor_pickle("LongStorage", [3, 1])), ("a/data/0", &[0; 48])], false);
    assert!(problem(&long, LAYOUT).contains("holds int64 values, expected float16"));
    assert!(problem(&safetensors_bytes("I32", &[0; 24]), LAYOUT).contains("int32"));
    let far = zipped(&[("a/data.pkl", &tensor_pickle("FloatStorage", [200, 1])), ("a/data/0", &[0; 24])], false);
    assert!(problem(&far, LAYOUT).contains("beyond its storage"));
    let object = zipped(&[("a/data.pkl", b"\x80\x02cos\nsystem\n(X\x02\x00\x00\x00lstR.")], false);
    assert_eq!(problem(&object, LAYOUT), "x: holds a Python object (os.system), expected a tensor");
    let npy = npy_bytes(&[2, 3], &SIX);
    let many = zipped(&[("a.npy", &npy), ("b.npy", &npy)], false);
    assert!(problem(&many, LAYOUT).contains("holds 2 arrays (a, b), expected a single one or one named mel or feats"));
    assert!(problem(&zipped(&[("readme.txt", b"")], false), LAYOUT).contains("without arrays"));
    assert!(problem(b"RIFF....WAVE", LAYOUT).contains("melglow mel"));
    assert!(problem(b"", LAYOUT).contains("is empty"));
    assert!(problem(b"hello world", LAYOUT).contains("not a mel file"));
    assert!(problem(b"\x80\x02]q\x00.", LAYOUT).contains("torch.save"));
    assert!(matches!(read(Path::new("missing.npy"), 80), Err(Error::Io { .. })));
}

#[test]
fn what_we_write_we_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.npy");
    let mel = MelSpectrogram::new(SIX.to_vec(), 3).unwrap();
    write_npy(&path, &mel).unwrap();
    assert_eq!(read(&path, 3).unwrap(), mel);
    assert!(is_mel_file(&path) && is_mel_file(Path::new("A.PT")) && !is_mel_file(Path::new("a.wav")));
}

#[test]
fn no_truncation_is_accepted_or_panics() {
    for (name, bytes) in every_format() {
        for len in 0..bytes.len() {
            assert!(read_bytes(&bytes[..len], Path::new("x"), LAYOUT).is_err(), "{name} cut to {len}");
        }
    }
}

#[test]
fn random_bytes_never_panic() {
    let mut state = 0x1234_5678_9abc_def0u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as usize
    };
    for (_, whole) in every_format() {
        for _ in 0..4000 {
            let mut bytes = whole.clone();
            for _ in 0..1 + random() % 4 {
                let at = random() % bytes.len();
                bytes[at] = random() as u8;
            }
            let _ = read_bytes(&bytes, Path::new("x"), LAYOUT);
            // The magic kept, the rest noise.
            let keep = 1 + random() % 40;
            bytes.iter_mut().skip(keep).for_each(|b| *b = random() as u8);
            let _ = read_bytes(&bytes, Path::new("x"), LAYOUT);
            if keep > 20 {
                let mut pickle = whole[whole.len() / 2..].to_vec();
                pickle.iter_mut().for_each(|b| *b = random() as u8);
                let _ = torch::pickle::read(&pickle);
            }
        }
    }
}
