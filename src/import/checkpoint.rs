//! A foreign checkpoint on disk: which tensors it has, and their values on demand.

use crate::array::{Element, TensorData, element_count};
use crate::torch::{self, TorchFile, pickle::TensorRef};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// What a tensor may take beyond four times the file's size, bytes, when its strides overlap: the
/// largest tensor of a published model is an upsampler of 26 MB.
const HEADROOM: usize = 64 << 20;
/// Longest header of a safetensors file, bytes: that of the format's own library.
const MAX_HEADER: u64 = 100_000_000;

/// How a file stores its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// An archive of `torch.save`, PyTorch 1.6 and later.
    Torch,
    /// `torch.save` of the time before.
    TorchLegacy,
    /// `.safetensors`.
    Safetensors,
}

impl std::fmt::Display for Container {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Torch => "torch.save archive",
            Self::TorchLegacy => "torch.save file of before PyTorch 1.6",
            Self::Safetensors => "safetensors file",
        })
    }
}

/// A tensor's name, shape and type, as the file has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Dotted name, through dictionaries and pickled modules: `state_dict.module.upsample.weight`.
    pub name: String,
    /// Length of each dimension.
    pub shape: Vec<usize>,
    /// Type of its numbers, such as `float32`; of a kind unknown to us: `unknown`.
    pub dtype: &'static str,
}

/// An open checkpoint.
pub struct Checkpoint {
    path: PathBuf,
    container: Container,
    len: u64,
    tensors: Vec<TensorInfo>,
    /// Where each tensor lies, by name.
    places: BTreeMap<String, Place>,
    file: Source,
}

enum Source {
    Torch(Box<TorchFile<BufReader<File>>>),
    Safetensors(BufReader<File>),
}

#[derive(Clone)]
enum Place {
    View(TensorRef),
    Bytes { at: u64, len: usize, element: Element },
}

impl Checkpoint {
    /// Opens a file and lists its tensors; their values stay on disk.
    ///
    /// # Errors
    /// One line naming the file: not a checkpoint, truncated, damaged, or two tensors of one name.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        let meta = file.metadata().map_err(Error::io("read", path))?;
        if meta.is_dir() {
            return Err(Error::file(path, "is a folder, expected a checkpoint file"));
        }
        Self::list(path, BufReader::new(file), meta.len()).map_err(|problem| Error::file(path, problem))
    }

    fn list(path: &Path, mut reader: BufReader<File>, len: u64) -> Result<Self, String> {
        let unreadable = |e: std::io::Error| format!("cannot be read ({e})");
        let mut start = Vec::new();
        reader.by_ref().take(16).read_to_end(&mut start).map_err(unreadable)?;
        reader.rewind().map_err(unreadable)?;
        let size = usize::try_from(len).map_err(|_| "is too large")?;
        let (container, places, file) = if start.is_empty() {
            return Err("is empty (0 bytes)".into());
        } else if start.starts_with(b"PK") {
            let archive = torch::open_archive(reader)?;
            let torch = TorchFile::open_zip(archive, size, HEADROOM)?;
            (Container::Torch, views(&torch)?, Source::Torch(Box::new(torch)))
        } else if torch::is_legacy(&start) {
            let torch = TorchFile::open_legacy(reader, size, HEADROOM)?;
            (Container::TorchLegacy, views(&torch)?, Source::Torch(Box::new(torch)))
        } else if start.len() > 8 && start[8] == b'{' {
            (Container::Safetensors, header(&mut reader, len)?, Source::Safetensors(reader))
        } else if start[0] == 0x80 && (2..=5).contains(start.get(1).unwrap_or(&0)) {
            return Err("is a pickle but not one of torch.save".into());
        } else {
            return Err("is not a checkpoint we can read; expected a file of torch.save or .safetensors".into());
        };
        let tensors: Vec<TensorInfo> = places.iter().map(|(info, _)| info.clone()).collect();
        let count = places.len();
        let places: BTreeMap<_, _> = places.into_iter().map(|(info, place)| (info.name, place)).collect();
        if places.len() < count {
            let mut names: Vec<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
            names.sort_unstable();
            let mut twice: Vec<&str> = names.windows(2).filter(|p| p[0] == p[1]).map(|p| p[0]).collect();
            twice.dedup();
            return Err(format!("holds two tensors of one name: {}", twice.join(", ")));
        }
        Ok(Self { path: path.to_owned(), container, len, tensors, places, file })
    }

    /// How the file stores its tensors.
    pub fn container(&self) -> Container {
        self.container
    }

    /// The file's size, bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it holds no tensors.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All tensors, in the file's order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// What a file without tensors holds instead.
    pub fn instead(&self) -> String {
        match &self.file {
            Source::Torch(torch) => torch::describe(torch.pickle(), torch.pickle().root),
            Source::Safetensors(_) => "no tensors".into(),
        }
    }

    /// The class of the pickled module under a dotted path (empty: the root), if there is one.
    pub fn module_class(&self, path: &str) -> Option<&str> {
        let Source::Torch(torch) = &self.file else { return None };
        torch.pickle().class(self.object(path)?)
    }

    /// An attribute of a pickled module that is a tuple of numbers: the `stride` of `model.upsample`.
    pub fn attribute(&self, path: &str, key: &str) -> Option<Vec<usize>> {
        let Source::Torch(torch) = &self.file else { return None };
        let pickle = torch.pickle();
        let items = pickle.sequence(pickle.field(self.object(path)?, key)?)?;
        items.iter().map(|&item| pickle.usize(item)).collect()
    }

    /// The value at a dotted path through dictionaries and modules.
    fn object(&self, path: &str) -> Option<u32> {
        let Source::Torch(torch) = &self.file else { return None };
        let pickle = torch.pickle();
        path.split('.')
            .filter(|key| !key.is_empty())
            .try_fold(pickle.root, |id, key| pickle.field(pickle.field(id, "_modules").unwrap_or(id), key))
    }

    /// Reads a tensor, as f16, bf16 or f32 as it is stored (f64: as f32).
    ///
    /// # Errors
    /// If there is none of that name, its storage is too short, or it isn't of floats.
    pub fn read(&mut self, name: &str) -> Result<Tensor> {
        let named = |problem: String| Error::file(&self.path, format!("tensor {name}: {problem}"));
        let place = self.places.get(name).cloned().ok_or_else(|| named("is missing".into()))?;
        let data = match (&mut self.file, place) {
            (Source::Torch(torch), Place::View(view)) => torch.read(&view),
            (Source::Safetensors(reader), Place::Bytes { at, len, element }) => {
                let mut bytes = vec![0; len];
                let read = reader.seek(SeekFrom::Start(at)).and_then(|_| reader.read_exact(&mut bytes));
                let info = self.tensors.iter().find(|t| t.name == name);
                let shape = info.map(|info| info.shape.clone()).unwrap_or_default();
                read.map(|()| TensorData { shape, values: element.decode(&bytes, false), dtype: element.name() })
                    .map_err(|e| format!("truncated ({e})"))
            }
            _ => Err("is missing".into()),
        };
        let TensorData { shape, values, dtype } = data.map_err(named)?;
        let dtype = match dtype {
            "float16" => DType::F16,
            "bfloat16" => DType::BF16,
            "float32" | "float64" => DType::F32,
            other => return Err(named(format!("holds {other} values, expected floats"))),
        };
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?)
    }
}

/// The tensors of a `torch.save` file.
fn views(torch: &TorchFile<BufReader<File>>) -> Result<Vec<(TensorInfo, Place)>, String> {
    let pickle = torch.pickle();
    let found = torch::tensors(pickle, pickle.root)?;
    let info = |(name, tensor): (String, &TensorRef)| {
        let dtype = torch::dtype(pickle, tensor).unwrap_or("unknown");
        (TensorInfo { name, shape: tensor.shape.clone(), dtype }, Place::View(tensor.clone()))
    };
    Ok(found.into_iter().map(info).collect())
}

/// The tensors of a safetensors file, from its header. The format's own library wants the whole file
/// in memory, and takes the last of two tensors of one name.
fn header(reader: &mut BufReader<File>, file_len: u64) -> Result<Vec<(TensorInfo, Place)>, String> {
    let damaged = |e: &dyn std::fmt::Display| format!("truncated or damaged safetensors ({e})");
    let mut len = [0; 8];
    reader.read_exact(&mut len).map_err(|e| damaged(&e))?;
    let len = u64::from_le_bytes(len);
    if len > MAX_HEADER || len > file_len - 8 {
        return Err(damaged(&format_args!("a header of {len} bytes")));
    }
    let mut json = vec![0; len as usize];
    reader.read_exact(&mut json).map_err(|e| damaged(&e))?;
    let Pairs(pairs) = serde_json::from_slice(&json).map_err(|e| damaged(&e))?;
    let data = 8 + len;
    let mut tensors = Vec::new();
    for (name, info) in pairs {
        let element = Element::of_safetensors(info.dtype).ok_or_else(|| {
            format!("tensor {} has dtype {:?}, which is not supported", torch::clip(&name), info.dtype)
        })?;
        let (from, to) = info.data_offsets;
        let bytes = element_count(&info.shape).and_then(|count| count.checked_mul(element.size()));
        if to > (file_len - data) as usize || from > to || bytes != Some(to - from) {
            let problem = format!("shape {:?} and bytes {from} to {to} do not fit", info.shape);
            return Err(damaged(&format_args!("tensor {}: {problem}", torch::clip(&name))));
        }
        let place = Place::Bytes { at: data + from as u64, len: to - from, element };
        tensors.push((TensorInfo { name, shape: info.shape, dtype: element.name() }, place));
    }
    Ok(tensors)
}

/// A safetensors header as it is written, a repeated name repeated.
struct Pairs(Vec<(String, safetensors::tensor::TensorInfo)>);

impl<'de> serde::Deserialize<'de> for Pairs {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Pairs;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a table of tensors")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<serde::de::IgnoredAny>()?;
                    } else {
                        pairs.push((name, map.next_value()?));
                    }
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}
