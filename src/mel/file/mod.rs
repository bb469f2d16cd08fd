//! Mel spectrograms on disk: `.npy`, `.npz`, `.pt` and `.safetensors`, told apart by content.

pub mod live;
mod npy;
mod pickle;
pub mod torch;

use super::MelSpectrogram;
use crate::{Error, Result, atomic};
use std::fs;
use std::io::{Cursor, Read};
use std::path::Path;
use zip::ZipArchive;

/// File name extensions that [`is_mel_file`] knows, lower case.
pub const EXTENSIONS: [&str; 5] = ["npy", "npz", "pt", "pth", "safetensors"];

/// Most dimensions an array may have.
const MAX_DIMS: usize = 16;
/// Largest file we read into memory, bytes.
const MAX_FILE: u64 = 4 << 30;
/// What reading may take beyond a few times the file's own size, bytes: a packed or repeated array
/// can be larger than its file, a hostile one endlessly so.
const HEADROOM: usize = 1 << 30;

/// A named-dtype array in memory, row-major, its values as `f32`.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorData {
    /// Length of each dimension.
    pub shape: Vec<usize>,
    /// All values, row-major.
    pub values: Vec<f32>,
    /// Type of the numbers in the file, such as `float16` or `int64`.
    pub dtype: &'static str,
}

/// How a mel lies in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Number of mel bands the reader expects.
    pub n_mels: usize,
    /// The file holds `[frames, n_mels]` instead of `[n_mels, frames]`.
    pub transpose: bool,
}

/// Whether a file's name ends like that of a mel file, in any case.
pub fn is_mel_file(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    EXTENSIONS.iter().any(|known| extension.eq_ignore_ascii_case(known))
}

/// Reads a mel of `n_mels` bands stored as `[n_mels, frames]` or `[1, n_mels, frames]`.
///
/// # Errors
/// As [`read_with`].
pub fn read(path: &Path, n_mels: usize) -> Result<MelSpectrogram> {
    read_with(path, Layout { n_mels, transpose: false })
}

/// Reads a mel in the given layout, with a leading dimension of 1 or without.
///
/// A file of several arrays must name one of them `mel`.
///
/// # Errors
/// One line naming the file: not a known format, truncated, no single float array, another shape,
/// empty, or a value that isn't finite (with its position).
pub fn read_with(path: &Path, layout: Layout) -> Result<MelSpectrogram> {
    read_bytes(&load(path)?, path, layout)
}

/// Reads a mel from a file's bytes; `name` is for messages.
///
/// # Errors
/// As [`read_with`].
pub fn read_bytes(bytes: &[u8], name: &Path, layout: Layout) -> Result<MelSpectrogram> {
    parse(bytes).and_then(single).and_then(|array| into_mel(array, layout)).map_err(|p| Error::file(name, p))
}

/// Reads every array of a file, with its name (empty for a bare array), in the file's order.
///
/// # Errors
/// One line naming the file: not a known format, truncated, or damaged.
pub fn read_arrays(path: &Path) -> Result<Vec<(String, TensorData)>> {
    parse(&load(path)?).map(|parsed| parsed.arrays).map_err(|problem| Error::file(path, problem))
}

/// Reads the only array of a file, or the one named `mel`.
///
/// # Errors
/// As [`read_arrays`], or if there is no such array.
pub fn read_array(path: &Path) -> Result<TensorData> {
    parse(&load(path)?).and_then(single).map_err(|problem| Error::file(path, problem))
}

/// Writes a mel as float32 `.npy` of shape `[n_mels, frames]`, whole or not at all.
///
/// # Errors
/// If the file can't be written.
pub fn write_npy(path: &Path, mel: &MelSpectrogram) -> Result<()> {
    atomic::write(path, |out| npy::write(out, &[mel.n_mels(), mel.frames()], mel.values()))
}

/// A file's bytes, unless it is far too large.
fn load(path: &Path) -> Result<Vec<u8>> {
    let file = fs::File::open(path).map_err(Error::io("read", path))?;
    if file.metadata().map_err(Error::io("read", path))?.is_dir() {
        return Err(Error::file(path, "is a folder, expected a file"));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(Error::file(path, "is larger than 4 GiB"));
    }
    Ok(bytes)
}

/// What a file holds.
struct Parsed {
    arrays: Vec<(String, TensorData)>,
    /// What there was instead of arrays, for the message.
    instead: Option<String>,
}

fn parse(bytes: &[u8]) -> Result<Parsed, String> {
    let arrays = if bytes.is_empty() {
        return Err("is empty (0 bytes)".into());
    } else if bytes.starts_with(npy::MAGIC) {
        vec![(String::new(), npy::parse(bytes)?)]
    } else if bytes.starts_with(b"PK") {
        // Nothing precedes the archive; looking for its start anyway fails on some of torch.save.
        let config = zip::read::Config { archive_offset: zip::read::ArchiveOffset::Known(0) };
        let archive = ZipArchive::with_config(config, Cursor::new(bytes))
            .map_err(|e| format!("truncated or damaged archive ({e})"))?;
        match torch::pickle_entry(&archive) {
            Some(entry) => return torch::parse_zip(archive, &entry, bytes.len()),
            None => npz(archive, bytes.len())?,
        }
    } else if torch::is_legacy(bytes) {
        return torch::parse_legacy(bytes);
    } else if let Some(kind) = sound(bytes) {
        return Err(format!("is sound ({kind}), expected a mel; make one with \"melglow mel\""));
    } else if bytes.len() > 8 && bytes[8] == b'{' {
        safetensors(bytes)?
    } else if bytes[0] == 0x80 && (2..=5).contains(bytes.get(1).unwrap_or(&0)) {
        return Err("is a pickle but not one of torch.save".into());
    } else {
        return Err("is not a mel file we can read; expected .npy, .npz, .pt or .safetensors".into());
    };
    Ok(Parsed { arrays, instead: None })
}

/// The name of a sound format by its first bytes.
fn sound(bytes: &[u8]) -> Option<&'static str> {
    let kinds: [(&[u8], _); 4] = [(b"RIFF", "WAV"), (b"fLaC", "FLAC"), (b"OggS", "Ogg"), (b"ID3", "MP3")];
    kinds.iter().find(|(magic, _)| bytes.starts_with(magic)).map(|&(_, kind)| kind)
}

fn npz(mut archive: ZipArchive<Cursor<&[u8]>>, file_len: usize) -> Result<Vec<(String, TensorData)>, String> {
    let mut arrays = Vec::new();
    let mut budget = file_len.saturating_add(HEADROOM);
    for index in 0..archive.len() {
        let entry = archive.by_index(index).map_err(|e| format!("damaged archive ({e})"))?;
        let name = entry.name().map_err(|e| format!("damaged archive ({e})"))?.into_owned();
        let Some(name) = name.strip_suffix(".npy") else {
            continue;
        };
        let bytes = read_entry(entry, budget).map_err(|p| format!("array {name}: {p}"))?;
        budget -= bytes.len();
        arrays.push((name.to_owned(), npy::parse(&bytes).map_err(|p| format!("array {name}: {p}"))?));
    }
    if arrays.is_empty() { Err("is an archive without arrays".into()) } else { Ok(arrays) }
}

/// A member of an archive, at most `budget` bytes of it, its size word not believed.
fn read_entry(entry: impl Read, budget: usize) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    entry.take(budget as u64 + 1).read_to_end(&mut bytes).map_err(|e| format!("truncated or damaged ({e})"))?;
    if bytes.len() > budget { Err("is too large".into()) } else { Ok(bytes) }
}

fn safetensors(bytes: &[u8]) -> Result<Vec<(String, TensorData)>, String> {
    use safetensors::Dtype;
    let file =
        safetensors::SafeTensors::deserialize(bytes).map_err(|e| format!("truncated or damaged safetensors ({e})"))?;
    let mut arrays = Vec::new();
    for (name, view) in file.iter() {
        let kind = match view.dtype() {
            Dtype::F16 => Element::F16,
            Dtype::BF16 => Element::Bf16,
            Dtype::F32 => Element::F32,
            Dtype::F64 => Element::F64,
            Dtype::I64 => Element::I64,
            Dtype::I32 => Element::I32,
            Dtype::I16 => Element::I16,
            Dtype::I8 => Element::I8,
            Dtype::U8 => Element::U8,
            Dtype::BOOL => Element::Bool,
            other => {
                return Err(format!("tensor {name} has dtype {other:?}, which is not supported"));
            }
        };
        let values = kind.decode(view.data(), false);
        arrays.push((name.to_owned(), TensorData { shape: view.shape().to_vec(), values, dtype: kind.name() }));
    }
    arrays.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(arrays)
}

/// Number types of PyTorch and safetensors files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Element {
    F16,
    Bf16,
    F32,
    F64,
    I64,
    I32,
    I16,
    I8,
    U8,
    Bool,
}

impl Element {
    fn name(self) -> &'static str {
        match self {
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
            Self::F32 => "float32",
            Self::F64 => "float64",
            Self::I64 => "int64",
            Self::I32 => "int32",
            Self::I16 => "int16",
            Self::I8 => "int8",
            Self::U8 => "uint8",
            Self::Bool => "bool",
        }
    }

    fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 | Self::I16 => 2,
            Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }

    /// Whole elements of `bytes` as `f32`.
    fn decode(self, bytes: &[u8], big: bool) -> Vec<f32> {
        let one = |bytes: &[u8]| {
            let mut le = [0u8; 8];
            let le = &mut le[..bytes.len()];
            le.copy_from_slice(bytes);
            if big {
                le.reverse();
            }
            match (self, &*le) {
                (Self::F16, &[a, b]) => half::f16::from_le_bytes([a, b]).to_f32(),
                (Self::Bf16, &[a, b]) => half::bf16::from_le_bytes([a, b]).to_f32(),
                (Self::I16, &[a, b]) => f32::from(i16::from_le_bytes([a, b])),
                (Self::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
                (Self::I32, &[a, b, c, d]) => i32::from_le_bytes([a, b, c, d]) as f32,
                (Self::F64, &[a, b, c, d, e, f, g, h]) => f64::from_le_bytes([a, b, c, d, e, f, g, h]) as f32,
                (Self::I64, &[a, b, c, d, e, f, g, h]) => i64::from_le_bytes([a, b, c, d, e, f, g, h]) as f32,
                (Self::I8, &[a]) => f32::from(a as i8),
                (_, &[a]) => f32::from(a),
                _ => unreachable!("chunks have the element's size"),
            }
        };
        bytes.chunks_exact(self.size()).map(one).collect()
    }
}

/// The product of a shape, unless it overflows.
fn element_count(shape: &[usize]) -> Option<usize> {
    // A zero must not hide an overflow: strides are products of the other lengths.
    shape.iter().try_fold(1usize, |product, &len| product.checked_mul(len.max(1)))?;
    Some(shape.iter().product())
}

/// Values at `offset + Σ index · stride`, row-major over `shape`; `None` if one lies outside.
fn gather(values: &[f32], offset: usize, shape: &[usize], strides: &[usize]) -> Option<Vec<f32>> {
    let count = element_count(shape)?;
    if shape.len() != strides.len() {
        return None;
    }
    if count == 0 {
        return Some(Vec::new());
    }
    let last = shape
        .iter()
        .zip(strides)
        .try_fold(offset, |at, (&len, &stride)| at.checked_add((len - 1).checked_mul(stride)?))?;
    if last >= values.len() {
        return None;
    }
    let mut out = Vec::with_capacity(count);
    let mut index = vec![0; shape.len()];
    let mut at = offset;
    loop {
        out.push(values[at]);
        let mut dim = shape.len();
        loop {
            if dim == 0 {
                return Some(out);
            }
            dim -= 1;
            index[dim] += 1;
            at += strides[dim];
            if index[dim] < shape[dim] {
                break;
            }
            at -= strides[dim] * shape[dim];
            index[dim] = 0;
        }
    }
}

/// The only array, or the one called `mel`.
fn single(parsed: Parsed) -> Result<TensorData, String> {
    let Parsed { mut arrays, instead } = parsed;
    if arrays.len() == 1 {
        return Ok(arrays.swap_remove(0).1);
    }
    if let Some(at) = arrays.iter().position(|(name, _)| name == "mel") {
        return Ok(arrays.swap_remove(at).1);
    }
    if arrays.is_empty() {
        return Err(format!("holds {}, expected a tensor", instead.as_deref().unwrap_or("no arrays")));
    }
    let names: Vec<&str> = arrays.iter().take(6).map(|(name, _)| name.as_str()).collect();
    let more = if arrays.len() > names.len() { ", …" } else { "" };
    Err(format!("holds {} arrays ({}{more}), expected a single one or one named mel", arrays.len(), names.join(", ")))
}

fn into_mel(array: TensorData, Layout { n_mels, transpose }: Layout) -> Result<MelSpectrogram, String> {
    if !array.dtype.contains("float") {
        return Err(format!("holds {} values, expected float16, float32 or float64", array.dtype));
    }
    let shape = &array.shape;
    let expected = if transpose { format!("[frames, {n_mels}]") } else { format!("[{n_mels}, frames]") };
    let (rows, columns) = match shape[..] {
        [rows, columns] | [1, rows, columns] => (rows, columns),
        _ => return Err(format!("shape is {shape:?}, expected {expected}")),
    };
    if rows == 0 || columns == 0 {
        return Err(format!("the mel is empty (shape {shape:?})"));
    }
    let (bands, other) = if transpose { (columns, rows) } else { (rows, columns) };
    if bands != n_mels {
        let remedy = match (other == n_mels, transpose) {
            (true, false) => "; it looks transposed, try --transpose",
            (true, true) => "; it isn't transposed, leave out --transpose",
            (false, _) => "; it has another number of mel bands",
        };
        return Err(format!("shape is {shape:?}, expected {expected}{remedy}"));
    }
    if transpose {
        // Checked after the exchange, so that a message gives band and frame the right way round.
        let values = (0..columns).flat_map(|b| (0..rows).map(move |f| f * columns + b)).map(|i| array.values[i]);
        return MelSpectrogram::new(values.collect(), n_mels).map_err(|e| e.to_string());
    }
    MelSpectrogram::new(array.values, n_mels).map_err(|e| e.to_string())
}

#[cfg(test)]
pub(crate) mod tests;
