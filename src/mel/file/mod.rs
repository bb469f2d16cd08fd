//! Mel spectrograms on disk: `.npy`, `.npz`, `.pt`, `.safetensors`, HDF5 and Kaldi's matrices, told apart
//! by content.

mod hdf5;
mod kaldi;
pub mod live;
mod npy;
mod source;
mod utterance;

pub(crate) use source::no_mels;
pub use source::{Source, in_file, sources};
pub use utterance::{Utterance, utterances};

use super::MelSpectrogram;
pub use crate::array::TensorData;
use crate::array::{Element, MAX_DIMS, element_count, gather};
use crate::torch::{self, TorchFile, read_entry};
use crate::{Error, Result, atomic};
use std::fs;
use std::io::{Cursor, Read};
use std::path::Path;
use zip::ZipArchive;

/// File name extensions that [`is_mel_file`] knows, lower case.
pub const EXTENSIONS: [&str; 8] = ["npy", "npz", "pt", "pth", "safetensors", "h5", "hdf5", "ark"];

/// Largest file we read into memory, bytes.
const MAX_FILE: u64 = 4 << 30;
/// What reading may take beyond a few times the file's own size, bytes: a packed or repeated array
/// can be larger than its file, a hostile one endlessly so.
const HEADROOM: usize = 1 << 30;

/// How a mel lies in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Number of mel bands the reader expects.
    pub n_mels: usize,
    /// A file with as many frames as bands holds `[frames, n_mels]` instead of `[n_mels, frames]`; any
    /// other file shows by its shape which of them it holds.
    pub transpose: bool,
}

/// Whether a file's name ends like that of a mel file, in any case.
pub fn is_mel_file(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    EXTENSIONS.iter().any(|known| extension.eq_ignore_ascii_case(known))
}

/// Reads a mel of `n_mels` bands stored as `[n_mels, frames]` or `[frames, n_mels]`, with a leading
/// dimension of 1 or without.
///
/// # Errors
/// As [`read_with`].
pub fn read(path: &Path, n_mels: usize) -> Result<MelSpectrogram> {
    read_with(path, Layout { n_mels, transpose: false })
}

/// Reads a mel in the given layout, with a leading dimension of 1 or without.
///
/// A file of several arrays must name one of them `mel` or `feats`.
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
    } else if bytes.starts_with(hdf5::MAGIC) {
        hdf5::parse(bytes)?
    } else if bytes.starts_with(b"PK") {
        let archive = torch::open_archive(Cursor::new(bytes))?;
        if torch::is_torch_archive(&archive) {
            return torch_arrays(TorchFile::open_zip(archive, bytes.len(), HEADROOM)?);
        }
        npz(archive, bytes.len())?
    } else if torch::is_legacy(bytes) {
        return torch_arrays(TorchFile::open_legacy(Cursor::new(bytes), bytes.len(), HEADROOM)?);
    } else if let Some(kind) = sound(bytes) {
        return Err(format!("is sound ({kind}), expected a mel; make one with \"melglow mel\""));
    } else if bytes.len() > 8 && bytes[8] == b'{' {
        safetensors(bytes)?
    } else if bytes[0] == 0x80 && (2..=5).contains(bytes.get(1).unwrap_or(&0)) {
        return Err("is a pickle but not one of torch.save".into());
    } else if kaldi::begins(bytes) {
        kaldi::parse(bytes)?
    } else {
        return Err("is not a mel file we can read; expected .npy, .npz, .pt, .safetensors, .h5 or .ark".into());
    };
    Ok(Parsed { arrays, instead: None })
}

/// The name of a sound format by its first bytes.
pub(crate) fn sound(bytes: &[u8]) -> Option<&'static str> {
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

/// Every tensor of a `torch.save` file.
fn torch_arrays(mut file: TorchFile<Cursor<&[u8]>>) -> Result<Parsed, String> {
    let pickle = file.pickle();
    let instead = Some(torch::describe(pickle, pickle.root));
    let found: Vec<_> =
        torch::tensors(pickle, pickle.root)?.into_iter().map(|(name, tensor)| (name, tensor.clone())).collect();
    let mut arrays = Vec::with_capacity(found.len());
    for (name, tensor) in found {
        let named = |problem: String| if name.is_empty() { problem } else { format!("tensor {name}: {problem}") };
        let array = file.read(&tensor).map_err(named)?;
        arrays.push((name, array));
    }
    Ok(Parsed { arrays, instead })
}

fn safetensors(bytes: &[u8]) -> Result<Vec<(String, TensorData)>, String> {
    let file =
        safetensors::SafeTensors::deserialize(bytes).map_err(|e| format!("truncated or damaged safetensors ({e})"))?;
    let mut arrays = Vec::new();
    for (name, view) in file.iter() {
        let kind = Element::of_safetensors(view.dtype())
            .ok_or_else(|| format!("tensor {name} has dtype {:?}, which is not supported", view.dtype()))?;
        let values = kind.decode(view.data(), false);
        arrays.push((name.to_owned(), TensorData { shape: view.shape().to_vec(), values, dtype: kind.name() }));
    }
    arrays.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(arrays)
}

/// A name from a file, fit for a line of text.
fn printable(name: &str) -> String {
    name.replace(|c: char| c.is_control(), "?")
}

/// Names of the array that is the mel among several.
const MEL_NAMES: [&str; 2] = ["mel", "feats"];

/// The place of the only array, or of the one called `mel` or `feats`.
pub(crate) fn the_mel(arrays: &[(String, TensorData)]) -> Option<usize> {
    if arrays.len() == 1 { Some(0) } else { arrays.iter().position(|(name, _)| MEL_NAMES.contains(&name.as_str())) }
}

/// The only array, or the one called `mel` or `feats`.
fn single(parsed: Parsed) -> Result<TensorData, String> {
    let Parsed { mut arrays, instead } = parsed;
    if let Some(at) = the_mel(&arrays) {
        return Ok(arrays.swap_remove(at).1);
    }
    if arrays.is_empty() {
        return Err(format!("holds {}, expected a tensor", instead.as_deref().unwrap_or("no arrays")));
    }
    let names: Vec<String> = arrays.iter().take(6).map(|(name, _)| printable(name)).collect();
    let more = if arrays.len() > names.len() { ", …" } else { "" };
    Err(format!(
        "holds {} arrays ({}{more}), expected a single one or one named {}",
        arrays.len(),
        names.join(", "),
        MEL_NAMES.join(" or ")
    ))
}

/// The mel in an array.
pub(crate) fn into_mel(array: TensorData, Layout { n_mels, transpose }: Layout) -> Result<MelSpectrogram, String> {
    if !array.dtype.contains("float") {
        return Err(format!("holds {} values, expected float16, float32 or float64", array.dtype));
    }
    let shape = &array.shape;
    let expected = format!("[{n_mels}, frames] or [frames, {n_mels}]");
    let (rows, columns) = match shape[..] {
        [rows, columns] | [1, rows, columns] => (rows, columns),
        _ => return Err(format!("shape is {shape:?}, expected {expected}")),
    };
    if rows == 0 || columns == 0 {
        return Err(format!("the mel is empty (shape {shape:?})"));
    }
    if rows != n_mels && columns != n_mels {
        return Err(format!("shape is {shape:?}, expected {expected}; it has another number of mel bands"));
    }
    let transpose = if rows == columns { transpose } else { columns == n_mels };
    if transpose {
        // Checked after the exchange, so that a message gives band and frame the right way round.
        let values = (0..columns).flat_map(|b| (0..rows).map(move |f| f * columns + b)).map(|i| array.values[i]);
        return MelSpectrogram::new(values.collect(), n_mels).map_err(|e| e.to_string());
    }
    MelSpectrogram::new(array.values, n_mels).map_err(|e| e.to_string())
}

#[cfg(test)]
pub(crate) mod tests;
