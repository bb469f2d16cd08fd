//! Tensors of `torch.save`: archives of PyTorch 1.6 and later, and the older "legacy" files.
//!
//! Pickled code is never run: see the restricted reader of pickles beside this file.

use super::pickle::{self, Id, Pickle, TensorRef, Value};
use super::{Element, HEADROOM, Parsed, TensorData, gather, read_entry};
use crate::Result;
use std::collections::HashMap;
use std::io::Cursor;
use std::path::Path;
use zip::ZipArchive;

/// First pickle of a legacy file: `0x1950a86a20f9469cfc6c`, PyTorch's `MAGIC_NUMBER`.
const LEGACY_MAGIC: &[u8] = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";
/// Deepest nesting of dictionaries and lists that we follow.
const MAX_DEPTH: usize = 32;
/// Most values we visit: shared values can make a small pickle look endless.
const MAX_VISITS: usize = 1 << 20;
/// Longest dotted name of a tensor, bytes.
const MAX_NAME: usize = 1024;

type Archive<'a> = ZipArchive<Cursor<&'a [u8]>>;

/// Reads all tensors of a `torch.save` file, named by the path through dictionaries and lists, such as
/// `state_dict.upsample.weight`; a bare tensor's name is empty. Strides are honoured. Objects other
/// than tensors are left out.
///
/// # Errors
/// One line naming the file: not of `torch.save`, truncated, damaged, or a dtype we don't know.
pub fn read_tensors(path: &Path) -> Result<Vec<(String, TensorData)>> {
    super::read_arrays(path)
}

/// Whether bytes begin like a legacy file.
pub(super) fn is_legacy(bytes: &[u8]) -> bool {
    bytes.first() == Some(&0x80) && bytes.get(2..).is_some_and(|rest| rest.starts_with(LEGACY_MAGIC))
}

/// The name of an archive's pickle, if `torch.save` wrote the archive.
pub(super) fn pickle_entry(archive: &Archive) -> Option<String> {
    let mut names = archive.file_names().filter_map(|name| name.ok());
    names.find(|name| name == "data.pkl" || name.ends_with("/data.pkl")).map(|name| name.into_owned())
}

/// Reads an archive whose pickle is the entry `name`.
pub(super) fn parse_zip(mut archive: Archive, name: &str, file_len: usize) -> Result<Parsed, String> {
    let folder = name.strip_suffix("data.pkl").unwrap_or_default().to_owned();
    let bytes = entry(&mut archive, name, file_len.saturating_add(HEADROOM))?;
    let pickle = pickle::read(&bytes)?;
    let big = match entry(&mut archive, &format!("{folder}byteorder"), 64) {
        Ok(order) => order.starts_with(b"big"),
        Err(_) => false,
    };
    let source = |storage: &Storage, budget: usize| {
        let bytes = entry(&mut archive, &format!("{folder}data/{}", storage.key), budget)?;
        Ok(storage.element.decode(&bytes, big))
    };
    collect(&pickle, source, file_len)
}

fn entry(archive: &mut Archive, name: &str, budget: usize) -> Result<Vec<u8>, String> {
    let entry = archive.by_name(name).map_err(|e| format!("truncated or damaged archive: {name}: {e}"))?;
    read_entry(entry, budget).map_err(|problem| format!("{name}: {problem}"))
}

/// Reads a legacy file: pickles of magic, version, machine, object and storage keys, then the storages.
pub(super) fn parse_legacy(bytes: &[u8]) -> Result<Parsed, String> {
    let mut at = 0;
    let mut next = || {
        let pickle = pickle::read(&bytes[at..])?;
        at += pickle.len;
        Ok::<_, String>(pickle)
    };
    let (_magic, _version, _machine, object, keys) = (next()?, next()?, next()?, next()?, next()?);
    let keys = keys
        .sequence(keys.root)
        .and_then(|items| items.iter().map(|&id| keys.str(id)).collect::<Option<Vec<_>>>())
        .ok_or("truncated or damaged: no list of storages")?;
    // A storage's element type stands only where a tensor refers to it.
    let kinds: HashMap<String, Element> = (0..)
        .map_while(|id| object.try_get(id))
        .filter_map(|value| match value {
            Value::Persistent(id) => Storage::of(&object, *id).ok().map(|s| (s.key, s.element)),
            _ => None,
        })
        .collect();
    let mut storages = HashMap::new();
    for key in keys {
        let count = bytes.get(at..at + 8).ok_or("truncated before a storage")?;
        let count = u64::from_le_bytes(count.try_into().expect("8 bytes"));
        at += 8;
        let element = *kinds.get(key).ok_or_else(|| format!("storage {key} is of a kind we don't know"))?;
        let end = usize::try_from(count)
            .ok()
            .and_then(|count| count.checked_mul(element.size())?.checked_add(at))
            .filter(|&end| end <= bytes.len())
            .ok_or_else(|| format!("truncated: storage {key} promises {count} numbers"))?;
        storages.insert(key.to_owned(), at..end);
        at = end;
    }
    let source = |storage: &Storage, _budget: usize| {
        let range = storages.get(&storage.key).ok_or_else(|| format!("storage {} is missing", storage.key))?;
        Ok(storage.element.decode(&bytes[range.clone()], false))
    };
    collect(&object, source, bytes.len())
}

/// What a tensor's storage says of itself.
struct Storage {
    key: String,
    element: Element,
    /// Where a legacy view of it starts, elements.
    offset: usize,
}

impl Storage {
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

/// Builds every tensor reachable from the root.
fn collect(
    pickle: &Pickle,
    mut source: impl FnMut(&Storage, usize) -> Result<Vec<f32>, String>,
    file_len: usize,
) -> Result<Parsed, String> {
    let mut found = Vec::new();
    visit(pickle, &mut found)?;
    let mut budget = file_len.saturating_mul(4).saturating_add(HEADROOM) / size_of::<f32>();
    let mut storages: HashMap<String, Vec<f32>> = HashMap::new();
    let mut arrays = Vec::new();
    for (name, tensor) in found {
        let named = |problem: String| {
            if name.is_empty() { problem } else { format!("tensor {name}: {problem}") }
        };
        let Value::Persistent(id) = pickle.get(tensor.storage) else { unreachable!("checked on building") };
        let storage = Storage::of(pickle, *id).map_err(named)?;
        if !storages.contains_key(&storage.key) {
            let limit = budget.saturating_mul(storage.element.size());
            let values = source(&storage, limit).map_err(named)?;
            budget = budget.checked_sub(values.len()).ok_or_else(|| named("is too large".into()))?;
            storages.insert(storage.key.clone(), values);
        }
        let count = super::element_count(&tensor.shape).ok_or_else(|| named("is too large".into()))?;
        budget = budget.checked_sub(count).ok_or_else(|| named("is too large".into()))?;
        let values = storage
            .offset
            .checked_add(tensor.offset)
            .and_then(|offset| gather(&storages[&storage.key], offset, &tensor.shape, &tensor.strides))
            .ok_or_else(|| named(format!("truncated: shape {:?} reaches beyond its storage", tensor.shape)))?;
        arrays.push((name, TensorData { shape: tensor.shape.clone(), values, dtype: storage.element.name() }));
    }
    let instead = match pickle.get(pickle.root) {
        Value::Opaque(class) | Value::Global(class) => Some(format!("a Python object ({})", clip(class))),
        Value::Dict(_) | Value::Sequence(_) => Some("a dictionary or list without tensors".into()),
        _ => Some("a plain value".into()),
    };
    Ok(Parsed { arrays, instead })
}

/// The first characters of a name from a file, fit for one line.
fn clip(name: &str) -> String {
    name.chars().filter(|c| !c.is_control()).take(60).collect()
}

/// Lists the tensors under the root with their dotted names, in order.
fn visit<'a>(pickle: &'a Pickle, found: &mut Vec<(String, &'a TensorRef)>) -> Result<(), String> {
    let mut visits = 0;
    let mut waiting = vec![(String::new(), pickle.root, 0)];
    while let Some((name, id, depth)) = waiting.pop() {
        let children: Vec<(String, Id)> = match pickle.get(id) {
            Value::Tensor(tensor) => {
                found.push((name, tensor));
                continue;
            }
            Value::Dict(pairs) => pairs
                .iter()
                .filter_map(|&(key, value)| match pickle.get(key) {
                    Value::Str(key) => Some((key.clone(), value)),
                    Value::Int(key) => Some((key.to_string(), value)),
                    _ => None,
                })
                .collect(),
            Value::Sequence(items) => items.iter().enumerate().map(|(i, &item)| (i.to_string(), item)).collect(),
            _ => continue,
        };
        visits += children.len();
        if depth == MAX_DEPTH || visits > MAX_VISITS {
            return Err("is nested too deeply to be a set of tensors".into());
        }
        for (key, child) in children.into_iter().rev() {
            if !matches!(pickle.get(child), Value::Tensor(_) | Value::Dict(_) | Value::Sequence(_)) {
                continue;
            }
            let name = if name.is_empty() { key } else { format!("{name}.{key}") };
            if name.len() > MAX_NAME {
                return Err("has an endless tensor name".into());
            }
            waiting.push((name, child, depth + 1));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::parity;
    use super::*;

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
        let after = super::super::read_arrays(&path.with_file_name("a_train_after3.npz")).unwrap();
        let trained = read_tensors(&path.with_file_name("a_model_state_dict.pt")).unwrap();
        for (name, expected) in &after {
            let got = find(&trained, &format!("model.{name}"));
            assert_eq!((&got.shape, &got.values), (&expected.shape, &expected.values), "{name}");
        }
    }

    /// A pickled module is opaque; the optimiser beside it isn't.
    #[test]
    fn a_pickled_module_is_opaque() {
        for name in ["a_nvidia_train_module.pt", "a_nvidia_train_module_legacy.pt"] {
            let Some(path) = parity(name) else { return };
            let tensors = read_tensors(&path).unwrap();
            assert!(!tensors.is_empty() && tensors.iter().all(|(n, _)| n.starts_with("optimizer.")));
            let error = super::super::read(&path, 80).unwrap_err().to_string();
            assert!(!error.contains('\n'), "{error}");
        }
    }
}
