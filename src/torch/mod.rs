//! Files of `torch.save`: archives of PyTorch 1.6 and later, and the older "legacy" files.
//!
//! Pickled code is never run: see [`pickle`]. Storages are read one at a time, when a tensor is asked
//! for, so that a file needn't fit into memory twice.

pub mod pickle;

use crate::array::{self, Element, TensorData};
use pickle::{Id, Pickle, TensorRef, Value};
use std::collections::HashMap;
use std::io::{Read, Seek, SeekFrom};
use zip::ZipArchive;

/// First pickle of a legacy file: `0x1950a86a20f9469cfc6c`, PyTorch's `MAGIC_NUMBER`.
const LEGACY_MAGIC: &[u8] = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";
/// Deepest nesting of dictionaries, lists and modules that we follow.
const MAX_DEPTH: usize = 32;
/// Most values we visit: shared values can make a small pickle look endless.
const MAX_VISITS: usize = 1 << 20;
/// Longest dotted name of a tensor, bytes.
const MAX_NAME: usize = 1024;
/// Most bytes of names that a walk may hold.
const MAX_NAMES: usize = 64 << 20;
/// Longest pickle, bytes: that of WaveGlow with its optimiser has 0.3 million.
const MAX_PICKLE: usize = 64 << 20;

/// Whether bytes begin like a legacy file.
pub fn is_legacy(bytes: &[u8]) -> bool {
    bytes.first() == Some(&0x80) && bytes.get(2..).is_some_and(|rest| rest.starts_with(LEGACY_MAGIC))
}

/// Opens a zip archive of which nothing but the archive is in the reader.
///
/// # Errors
/// If it isn't one.
pub fn open_archive<R: Read + Seek>(reader: R) -> Result<ZipArchive<R>, String> {
    // Nothing precedes the archive; looking for its start anyway fails on some of torch.save.
    let config = zip::read::Config { archive_offset: zip::read::ArchiveOffset::Known(0) };
    ZipArchive::with_config(config, reader).map_err(|e| format!("truncated or damaged archive ({e})"))
}

/// Whether `torch.save` wrote an archive.
pub fn is_torch_archive<R: Read + Seek>(archive: &ZipArchive<R>) -> bool {
    pickle_entry(archive).is_some()
}

fn pickle_entry<R: Read + Seek>(archive: &ZipArchive<R>) -> Option<String> {
    let mut names = archive.file_names().filter_map(|name| name.ok());
    names.find(|name| name == "data.pkl" || name.ends_with("/data.pkl")).map(|name| name.into_owned())
}

/// An open file of `torch.save`: its pickle, and tensors on demand.
pub struct TorchFile<R> {
    pickle: Pickle,
    source: Source<R>,
    /// Values that may still be given out: a bound on memory for views that claim more than they have.
    budget: usize,
    /// The last storage that wasn't given out whole: views of one storage often follow each other.
    last: Option<(String, Vec<f32>)>,
}

enum Source<R> {
    /// An archive, the folder in it (with a slash), and whether its numbers are big-endian.
    Zip { archive: ZipArchive<R>, folder: String, big: bool },
    /// A legacy file, and where each storage lies: first byte, bytes.
    Legacy { reader: R, storages: HashMap<String, (u64, usize)> },
}

impl<R: Read + Seek> TorchFile<R> {
    /// Opens an archive that [`is_torch_archive`]. All tensors together may take four times
    /// `file_len` bytes and `headroom` beyond.
    ///
    /// # Errors
    /// If it is truncated or damaged.
    pub fn open_zip(mut archive: ZipArchive<R>, file_len: usize, headroom: usize) -> Result<Self, String> {
        let name = pickle_entry(&archive).ok_or("is an archive, but not one of torch.save")?;
        let folder = name.strip_suffix("data.pkl").unwrap_or_default().to_owned();
        if archive.index_for_name(&format!("{folder}constants.pkl")).is_some() {
            return Err(
                "is a TorchScript program, not a checkpoint; save the model's state_dict with torch.save".into()
            );
        }
        let limit = file_len.saturating_mul(4).saturating_add(1 << 20).min(MAX_PICKLE);
        let pickle = pickle::read(&entry(&mut archive, &name, limit)?)?;
        let big = match entry(&mut archive, &format!("{folder}byteorder"), 64) {
            Ok(order) => order.starts_with(b"big"),
            Err(_) => false,
        };
        Ok(Self::new(pickle, Source::Zip { archive, folder, big }, file_len, headroom))
    }

    /// Opens a legacy file: pickles of magic, version, machine, object and storage keys, then the
    /// storages. The budget is that of [`TorchFile::open_zip`].
    ///
    /// # Errors
    /// If it is truncated or damaged.
    pub fn open_legacy(mut reader: R, file_len: usize, headroom: usize) -> Result<Self, String> {
        let unreadable = |e: std::io::Error| format!("cannot be read ({e})");
        let mut bytes = Vec::new();
        reader.by_ref().take(MAX_PICKLE as u64).read_to_end(&mut bytes).map_err(unreadable)?;
        let mut at = 0;
        let mut next = || {
            let pickle = pickle::read(&bytes[at..])?;
            at += pickle.len;
            Ok::<_, String>(pickle)
        };
        let (_magic, _version, _machine, object, keys) = (next()?, next()?, next()?, next()?, next()?);
        drop(bytes);
        let keys = keys
            .sequence(keys.root)
            .and_then(|items| items.iter().map(|&id| keys.str(id).map(str::to_owned)).collect::<Option<Vec<_>>>())
            .ok_or("truncated or damaged: no list of storages")?;
        // A storage's element type stands only where a tensor refers to it.
        let kinds: HashMap<String, Element> = (0..)
            .map_while(|id| object.try_get(id))
            .filter_map(|value| match value {
                Value::Persistent(id) => Storage::of(&object, *id).ok().map(|s| (s.key, s.element)),
                _ => None,
            })
            .collect();
        let mut at = at as u64;
        let mut storages = HashMap::new();
        for key in keys {
            let mut count = [0; 8];
            reader.seek(SeekFrom::Start(at)).map_err(unreadable)?;
            reader.read_exact(&mut count).map_err(|_| "truncated before a storage")?;
            at += 8;
            let count = u64::from_le_bytes(count);
            let element = *kinds.get(&key).ok_or_else(|| format!("storage {key} is of a kind we don't know"))?;
            let bytes = usize::try_from(count)
                .ok()
                .and_then(|count| count.checked_mul(element.size()))
                .filter(|&bytes| at.checked_add(bytes as u64).is_some_and(|end| end <= file_len as u64))
                .ok_or_else(|| format!("truncated: storage {key} promises {count} numbers"))?;
            storages.insert(key, (at, bytes));
            at += bytes as u64;
        }
        Ok(Self::new(object, Source::Legacy { reader, storages }, file_len, headroom))
    }

    fn new(pickle: Pickle, source: Source<R>, file_len: usize, headroom: usize) -> Self {
        let budget = file_len.saturating_mul(4).saturating_add(headroom) / size_of::<f32>();
        Self { pickle, source, budget, last: None }
    }

    /// What was pickled.
    pub fn pickle(&self) -> &Pickle {
        &self.pickle
    }

    /// Whether it is of the time before archives.
    pub fn is_legacy(&self) -> bool {
        matches!(self.source, Source::Legacy { .. })
    }

    /// Reads a tensor of this file, strides honoured.
    ///
    /// # Errors
    /// If its storage is missing or too short, of numbers we don't know, or all that was read so far
    /// is too large for the file.
    pub fn read(&mut self, tensor: &TensorRef) -> Result<TensorData, String> {
        let storage = Storage::of_tensor(&self.pickle, tensor)?;
        let short = || format!("truncated: shape {:?} reaches beyond its storage", tensor.shape);
        let count = array::element_count(&tensor.shape).ok_or("is too large")?;
        self.budget = self.budget.checked_sub(count).ok_or("is too large")?;
        let offset = storage.offset.checked_add(tensor.offset).ok_or_else(short)?;
        if self.last.as_ref().is_none_or(|(key, _)| *key != storage.key) {
            self.last = None;
            let values = self.storage(&storage)?;
            let whole = offset == 0 && count == values.len() && array::is_row_major(&tensor.shape, &tensor.strides);
            if whole {
                return Ok(TensorData { shape: tensor.shape.clone(), values, dtype: storage.element.name() });
            }
            self.last = Some((storage.key.clone(), values));
        }
        let values = self.last.as_ref().map_or(&[][..], |(_, values)| values);
        let values = array::gather(values, offset, &tensor.shape, &tensor.strides).ok_or_else(short)?;
        Ok(TensorData { shape: tensor.shape.clone(), values, dtype: storage.element.name() })
    }

    /// All numbers of a storage.
    fn storage(&mut self, storage: &Storage) -> Result<Vec<f32>, String> {
        let limit = self.budget.saturating_mul(storage.element.size()).saturating_add(MAX_PICKLE);
        match &mut self.source {
            Source::Zip { archive, folder, big } => {
                let bytes = entry(archive, &format!("{folder}data/{}", storage.key), limit)?;
                Ok(storage.element.decode(&bytes, *big))
            }
            Source::Legacy { reader, storages } => {
                let &(at, len) =
                    storages.get(&storage.key).ok_or_else(|| format!("storage {} is missing", storage.key))?;
                let mut bytes = vec![0; len];
                let read = reader.seek(SeekFrom::Start(at)).and_then(|_| reader.read_exact(&mut bytes));
                read.map_err(|e| format!("truncated or damaged ({e})"))?;
                Ok(storage.element.decode(&bytes, false))
            }
        }
    }
}

fn entry<R: Read + Seek>(archive: &mut ZipArchive<R>, name: &str, limit: usize) -> Result<Vec<u8>, String> {
    let entry = archive.by_name(name).map_err(|e| format!("truncated or damaged archive: {name}: {e}"))?;
    read_entry(entry, limit).map_err(|problem| format!("{name}: {problem}"))
}

/// A member of an archive, at most `limit` bytes of it, its size word not believed.
///
/// # Errors
/// If it is damaged or longer.
pub fn read_entry(entry: impl Read, limit: usize) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    entry.take(limit as u64 + 1).read_to_end(&mut bytes).map_err(|e| format!("truncated or damaged ({e})"))?;
    if bytes.len() > limit { Err("is too large".into()) } else { Ok(bytes) }
}

/// What a tensor's storage says of itself.
struct Storage {
    key: String,
    element: Element,
    /// Where a legacy view of it starts, elements.
    offset: usize,
}

impl Storage {
    fn of_tensor(pickle: &Pickle, tensor: &TensorRef) -> Result<Self, String> {
        match pickle.get(tensor.storage) {
            Value::Persistent(id) => Self::of(pickle, *id),
            _ => Err("tensor without a storage".into()),
        }
    }

    /// Reads `('storage', kind, key, device, numel[, view])`.
    fn of(pickle: &Pickle, id: Id) -> Result<Self, String> {
        let bad = || "tensor with a storage we don't understand".to_owned();
        let items = pickle.sequence(id).ok_or_else(bad)?;
        let (&[tag, kind, key, _device, _count], rest) = items.split_first_chunk().ok_or_else(bad)?;
        if pickle.str(tag) != Some("storage") {
            return Err(bad());
        }
        let Value::Global(kind) = pickle.get(kind) else {
            return Err(bad());
        };
        let element = match kind.rsplit('.').next().unwrap_or_default() {
            "HalfStorage" => Element::F16,
            "BFloat16Storage" => Element::Bf16,
            "FloatStorage" => Element::F32,
            "DoubleStorage" => Element::F64,
            "LongStorage" => Element::I64,
            "IntStorage" => Element::I32,
            "ShortStorage" => Element::I16,
            "CharStorage" => Element::I8,
            "ByteStorage" => Element::U8,
            "BoolStorage" => Element::Bool,
            "ComplexFloatStorage" | "ComplexDoubleStorage" => {
                return Err("holds complex numbers, expected float16, float32 or float64".into());
            }
            _ => return Err(format!("holds numbers of a kind we don't know ({kind})")),
        };
        let key = pickle.str(key).ok_or_else(bad)?.to_owned();
        let view = rest.first().and_then(|&view| pickle.sequence(view)).and_then(|view| view.get(1).copied());
        let offset = view.map_or(Some(0), |offset| pickle.usize(offset)).ok_or_else(bad)?;
        Ok(Self { key, element, offset })
    }
}

/// The type of a tensor's numbers.
///
/// # Errors
/// If it is one that we don't know.
pub fn dtype(pickle: &Pickle, tensor: &TensorRef) -> Result<&'static str, String> {
    Storage::of_tensor(pickle, tensor).map(|storage| storage.element.name())
}

/// What a value is that holds no tensors, in words.
pub fn describe(pickle: &Pickle, id: Id) -> String {
    match pickle.get(id) {
        Value::Object { .. } | Value::Global(_) => {
            format!("a Python object ({})", clip(pickle.class(id).unwrap_or("of no known class")))
        }
        Value::Dict(_) | Value::Sequence(_) => "a dictionary or list without tensors".into(),
        _ => "a plain value".into(),
    }
}

/// The first characters of a name from a file, fit for one line.
pub fn clip(name: &str) -> String {
    name.chars().filter(|c| !c.is_control()).take(60).collect()
}

/// The parts of a pickled `torch.nn.Module` that hold tensors or further modules.
///
/// Other attributes are left out with reason: a weight-normed layer keeps a stale `weight` there.
const MODULE_PARTS: [&str; 3] = ["_parameters", "_buffers", "_modules"];

/// Lists the tensors below a value with their dotted names, such as `state_dict.upsample.weight`, in
/// order; a bare tensor's name is empty. Dictionaries, lists and pickled modules are followed, the
/// latter named as in their `state_dict`.
///
/// # Errors
/// If it is nested without end.
pub fn tensors(pickle: &Pickle, root: Id) -> Result<Vec<(String, &TensorRef)>, String> {
    let mut found = Vec::new();
    let (mut visits, mut names) = (0, 0);
    let mut waiting = vec![(String::new(), root, 0)];
    while let Some((name, id, depth)) = waiting.pop() {
        let pairs = match pickle.get(id) {
            Value::Tensor(tensor) => {
                found.push((name, &**tensor));
                continue;
            }
            Value::Object { .. } => {
                let parts = MODULE_PARTS.iter().filter_map(|part| pickle.dict(pickle.field(id, part)?));
                parts.flatten().copied().collect()
            }
            Value::Dict(pairs) => pairs.clone(),
            Value::Sequence(_) => Vec::new(),
            _ => continue,
        };
        let items = pickle.sequence(id).unwrap_or_default();
        let keyed = pairs.iter().filter_map(|&(key, value)| match pickle.get(key) {
            Value::Str(key) => Some((key.clone(), value)),
            Value::Int(key) => Some((key.to_string(), value)),
            _ => None,
        });
        let children = keyed.chain(items.iter().enumerate().map(|(i, &item)| (i.to_string(), item)));
        let first = waiting.len();
        for (key, child) in children {
            visits += 1;
            if depth == MAX_DEPTH || visits > MAX_VISITS {
                return Err("is nested too deeply to be a set of tensors".into());
            }
            let kind = pickle.get(child);
            if !matches!(kind, Value::Tensor(_) | Value::Dict(_) | Value::Sequence(_) | Value::Object { .. }) {
                continue;
            }
            let name = if name.is_empty() { key } else { format!("{name}.{key}") };
            names += name.len();
            if name.len() > MAX_NAME || names > MAX_NAMES {
                return Err("has endless tensor names".into());
            }
            waiting.push((name, child, depth + 1));
        }
        waiting[first..].reverse();
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mel::file::{self, read_arrays as read_tensors, tests::parity};

    fn find<'a>(tensors: &'a [(String, TensorData)], name: &str) -> &'a TensorData {
        &tensors.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no tensor {name}")).1
    }

    /// The same weights in the archive, the legacy file with its `module.` prefix, and in half.
    #[test]
    fn checkpoints_agree() {
        let Some(path) = parity("a_dle_state_dict.pt") else {
            return;
        };
        let zip = read_tensors(&path).unwrap();
        let legacy = read_tensors(&path.with_file_name("a_dle_state_dict_ddp_legacy.pt")).unwrap();
        assert!(zip.len() > 50 && zip.len() == legacy.len());
        for (name, tensor) in &zip {
            let other = find(&legacy, &name.replacen("state_dict.", "state_dict.module.", 1));
            assert_eq!(tensor, other, "{name}");
        }
        let plain = read_tensors(&path.with_file_name("a_state_dict_no_weightnorm.pt")).unwrap();
        let half = read_tensors(&path.with_file_name("a_state_dict_no_weightnorm_fp16.pt")).unwrap();
        for (name, tensor) in &plain {
            let half = find(&half, name);
            assert_eq!((&tensor.shape, half.dtype), (&half.shape, "float16"));
            assert!(tensor.values.iter().zip(&half.values).all(|(a, b)| (a - b).abs() <= 1e-3 * a.abs() + 1e-6));
        }
    }

    /// The 1×1 matrices are stored column-major; W·Wᵀ = 1 holds either way, so compare with the file
    /// of the weights after three steps, in which NumPy stored them row-major.
    #[test]
    fn strides_are_honoured() {
        let Some(path) = parity("b_state_dict.pt") else {
            return;
        };
        let tensors = read_tensors(&path).unwrap();
        let upsample = find(&tensors, "state_dict.upsample.weight");
        assert_eq!(upsample.shape, [80, 80, 1024]);
        // Strides (11, 887, 1): neighbours overlap.
        let at = |i: usize, o: usize, t: usize| upsample.values[(i * 80 + o) * 1024 + t];
        assert_eq!(at(1, 0, 0), at(0, 0, 11));
        assert_eq!(at(3, 5, 100), at(0, 5, 133));
        assert_eq!(at(0, 1, 3), at(0, 0, 890));
        let after = read_tensors(&path.with_file_name("a_train_after3.npz")).unwrap();
        let trained = read_tensors(&path.with_file_name("a_model_state_dict.pt")).unwrap();
        for (name, expected) in &after {
            let got = find(&trained, &format!("model.{name}"));
            assert_eq!((&got.shape, &got.values), (&expected.shape, &expected.values), "{name}");
        }
    }

    /// A pickled module gives its parameters under the names of its state dict, not the stale
    /// `weight` that weight norm leaves beside them.
    #[test]
    fn a_pickled_module_gives_its_parameters() {
        for name in ["a_nvidia_train_module.pt", "a_nvidia_train_module_legacy.pt"] {
            let Some(path) = parity(name) else { return };
            let of = |path: &std::path::Path| {
                let mut tensors = read_tensors(path).unwrap();
                tensors.retain(|(n, _)| n.starts_with("model."));
                tensors.sort_by(|a, b| a.0.cmp(&b.0));
                tensors
            };
            let (module, dict) = (of(&path), of(&path.with_file_name("a_model_state_dict.pt")));
            assert!(module.len() > 50 && module == dict, "{name}");
            let error = file::read(&path, 80).unwrap_err().to_string();
            assert!(!error.contains('\n'), "{error}");
        }
    }
}
