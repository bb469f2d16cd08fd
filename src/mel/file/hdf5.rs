//! HDF5, as h5py writes it for ParallelWaveGAN and ESPnet.

use super::{Element, HEADROOM, MAX_FILE, TensorData};
use hdf5_reader::{Dataset, Datatype, Hdf5File, OpenOptions};
use std::path::Path;

/// h5py's own filter, by its registered number.
const LZF: u32 = 32_000;
/// The first bytes of every file (without a user block, which h5py doesn't write).
pub(super) const MAGIC: &[u8] = b"\x89HDF\r\n\x1a\n";
/// Deepest nesting of groups that we follow.
const MAX_DEPTH: usize = 8;
/// Most datasets we list.
const MAX_DATASETS: usize = 1 << 20;

/// Reads every numeric dataset, named by its path without the leading slash.
pub(super) fn parse(bytes: &[u8]) -> Result<Vec<(String, TensorData)>, String> {
    let limit = bytes.len().saturating_mul(4).saturating_add(HEADROOM);
    let file = Hdf5File::from_bytes_with_options(bytes, options(limit)).map_err(damaged)?;
    // The options bound each read, this all of them together.
    let mut budget = limit;
    let read = |(name, dataset): (String, Dataset)| {
        let name = super::printable(&name);
        let array = read(&dataset, &mut budget).map_err(|problem| format!("dataset {name}: {problem}"))?;
        Ok((name, array))
    };
    datasets(&file)?.into_iter().map(read).collect()
}

/// Names of the datasets of floats with two dimensions, or three of which the first is 1.
pub(super) fn matrices(path: &Path) -> Result<Vec<String>, String> {
    let file = Hdf5File::open_with_options(path, options(HEADROOM)).map_err(damaged)?;
    let is_matrix = |dataset: &Dataset| {
        let float = element(dataset.dtype()).is_some_and(|element| element.name().contains("float"));
        float && matches!(dataset.shape(), [_, _] | [1, _, _])
    };
    Ok(datasets(&file)?.into_iter().filter(|(_, dataset)| is_matrix(dataset)).map(|(name, _)| name).collect())
}

/// Reads one dataset.
pub(super) fn read_one(path: &Path, name: &str) -> Result<TensorData, String> {
    let file = Hdf5File::open_with_options(path, options(MAX_FILE as usize)).map_err(damaged)?;
    let dataset = file.dataset(name).map_err(|_| format!("the file has no dataset {name}"))?;
    read(&dataset, &mut (MAX_FILE as usize))
}

fn options(limit: usize) -> OpenOptions {
    OpenOptions::default().with_max_read_bytes(limit)
}

/// All numeric datasets with their names.
fn datasets(file: &Hdf5File) -> Result<Vec<(String, Dataset)>, String> {
    let mut found = Vec::new();
    let mut waiting = vec![(String::new(), file.root_group().map_err(damaged)?, 0)];
    let mut visited = 0;
    while let Some((prefix, group, depth)) = waiting.pop() {
        let (groups, datasets) = group.members().map_err(damaged)?;
        visited += groups.len() + datasets.len();
        if depth == MAX_DEPTH || visited > MAX_DATASETS {
            return Err("is nested too deeply to be a set of mels".into());
        }
        let numeric = datasets.into_iter().filter(|dataset| element(dataset.dtype()).is_some());
        found.extend(numeric.map(|dataset| (join(&prefix, dataset.name()), dataset)));
        waiting.extend(groups.into_iter().rev().map(|group| (join(&prefix, group.name()), group, depth + 1)));
    }
    if found.is_empty() { Err("is an HDF5 file without numbers".into()) } else { Ok(found) }
}

fn join(prefix: &str, name: &str) -> String {
    // Names of objects are given with the path or without it.
    let name = name.rsplit('/').next().unwrap_or_default();
    if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") }
}

fn damaged(error: hdf5_reader::error::Error) -> String {
    let error = error.to_string();
    if error.contains(&format!("id {LZF}")) {
        return "is compressed by LZF, which isn't read: write it again with gzip or none".to_string();
    }
    format!("truncated or damaged HDF5 ({})", super::printable(&error))
}

fn element(kind: &Datatype) -> Option<Element> {
    match *kind {
        Datatype::FloatingPoint { size: 2, .. } => Some(Element::F16),
        Datatype::FloatingPoint { size: 4, .. } => Some(Element::F32),
        Datatype::FloatingPoint { size: 8, .. } => Some(Element::F64),
        Datatype::FixedPoint { size: 8, .. } => Some(Element::I64),
        Datatype::FixedPoint { size: 4, .. } => Some(Element::I32),
        Datatype::FixedPoint { size: 2, .. } => Some(Element::I16),
        Datatype::FixedPoint { size: 1, signed: true, .. } => Some(Element::I8),
        Datatype::FixedPoint { size: 1, signed: false, .. } => Some(Element::U8),
        _ => None,
    }
}

fn read(dataset: &Dataset, budget: &mut usize) -> Result<TensorData, String> {
    let element = element(dataset.dtype()).ok_or("holds no numbers")?;
    let shape: Option<Vec<usize>> = dataset.shape().iter().map(|&len| usize::try_from(len).ok()).collect();
    let shape = shape.filter(|shape| shape.len() <= super::MAX_DIMS).ok_or("shape is out of range")?;
    let count = super::element_count(&shape).ok_or("shape is out of range")?;
    *budget = count.checked_mul(element.size()).and_then(|size| budget.checked_sub(size)).ok_or("is too large")?;
    let bytes = dataset.read_native_bytes().map_err(damaged)?;
    let values = element.decode(&bytes, cfg!(target_endian = "big"));
    if values.len() != count {
        return Err(format!("{} values, expected {count}", values.len()));
    }
    Ok(TensorData { shape, values, dtype: element.name() })
}
