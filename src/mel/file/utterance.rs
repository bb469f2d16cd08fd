//! Files of several mels, each under a key: Kaldi's `.ark` and `.scp`, and HDF5 files of many datasets.

use super::{Layout, TensorData, hdf5, into_mel, kaldi, load, printable};
use crate::mel::MelSpectrogram;
use crate::{Error, Result};
use std::collections::HashSet;
use std::fs::File;
use std::io::{BufReader, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// One mel of a file of several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Utterance {
    /// Its key.
    pub key: String,
    path: PathBuf,
    place: Place,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    /// All of a file.
    Whole,
    /// A matrix of an archive, from this byte on.
    At(u64),
    /// A dataset of an HDF5 file.
    Dataset(String),
}

fn ends_in(path: &Path, extensions: &[&str]) -> bool {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    extensions.iter().any(|known| extension.eq_ignore_ascii_case(known))
}

/// The mels of a file, without reading them, if its name is one of files of several: `.ark`, `.scp`, or
/// `.h5` and `.hdf5` with more than one matrix. `None` for all other files.
///
/// # Errors
/// One line naming the file: it can't be read, is damaged, names no mels, or one key twice.
pub fn utterances(path: &Path) -> Result<Option<Vec<Utterance>>> {
    let found = if ends_in(path, &["ark"]) {
        let keys = kaldi::index(&mut BufReader::new(open(path)?)).map_err(|problem| Error::file(path, problem))?;
        let all = keys.into_iter();
        all.map(|(key, at)| Utterance { key, path: path.to_owned(), place: Place::At(at) }).collect()
    } else if ends_in(path, &["scp"]) {
        script(path)?
    } else if ends_in(path, &["h5", "hdf5"]) {
        open(path)?; // for its message
        let names = hdf5::matrices(path).map_err(|problem| Error::file(path, problem))?;
        if names.len() < 2 {
            return Ok(None);
        }
        let dataset = |name: String| (printable(&name), Place::Dataset(name));
        let all = names.into_iter().map(dataset);
        all.map(|(key, place)| Utterance { key, path: path.to_owned(), place }).collect()
    } else {
        return Ok(None);
    };
    let mut seen = HashSet::new();
    if let Some(twice) = found.iter().find(|utterance| !seen.insert(&utterance.key)) {
        return Err(Error::file(path, format!("key {} stands there twice", twice.key)));
    }
    Ok(Some(found))
}

fn open(path: &Path) -> Result<File> {
    let file = File::open(path).map_err(Error::io("read", path))?;
    if file.metadata().map_err(Error::io("read", path))?.is_dir() {
        return Err(Error::file(path, "is a folder, expected a file"));
    }
    Ok(file)
}

/// The lines `key file`, `key file.ark:byte` or `key file.h5:dataset` of a script file. Files are looked
/// for from here, as Kaldi does, and then beside the script.
fn script(path: &Path) -> Result<Vec<Utterance>> {
    let text =
        String::from_utf8(load(path)?).map_err(|_| Error::file(path, "is not text, expected lines of key and file"))?;
    let beside = |file: &str| {
        let plain = PathBuf::from(file);
        if plain.exists() { plain } else { path.parent().unwrap_or(Path::new("")).join(plain) }
    };
    let mut found = Vec::new();
    for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
        let problem = |what: &str| Error::file(path, format!("line {number}: {what}"));
        let (key, file) = line.trim().split_once([' ', '\t']).ok_or_else(|| problem("expected a key and a file"))?;
        let file = file.trim();
        if file.ends_with('|') || file == "-" {
            return Err(problem("names a command, and we run none; write the features to an .ark first"));
        }
        if file.ends_with(']') {
            return Err(problem("takes a part of a matrix, which is not supported"));
        }
        let (path, place) = match file.rsplit_once(':') {
            Some((file, at)) if !at.is_empty() && at.bytes().all(|b| b.is_ascii_digit()) => {
                let at = at.parse().map_err(|_| problem("the place in the archive is out of range"))?;
                (beside(file), Place::At(at))
            }
            Some((file, name)) if ends_in(Path::new(file), &["h5", "hdf5"]) => {
                (beside(file), Place::Dataset(name.to_owned()))
            }
            _ => (beside(file), Place::Whole),
        };
        found.push(Utterance { key: key.to_owned(), path, place });
    }
    if found.is_empty() {
        return Err(Error::file(path, "names no mels"));
    }
    Ok(found)
}

impl Utterance {
    /// Reads the mel.
    ///
    /// # Errors
    /// As [`read_with`](super::read_with); the line names the file and the key.
    pub fn read(&self, layout: Layout) -> Result<MelSpectrogram> {
        let problem = |problem: String| Error::file(&self.path, format!("key {}: {problem}", self.key));
        self.array()?.and_then(|array| into_mel(array, layout)).map_err(problem)
    }

    fn array(&self) -> Result<Result<TensorData, String>> {
        Ok(match &self.place {
            Place::Whole => super::parse(&load(&self.path)?).and_then(super::single),
            Place::Dataset(name) => {
                open(&self.path)?;
                hdf5::read_one(&self.path, name)
            }
            Place::At(at) => {
                let mut file = open(&self.path)?;
                let len = file.metadata().map_err(Error::io("read", &self.path))?.len();
                if *at >= len {
                    return Ok(Err(format!("byte {at} lies beyond the end of the archive")));
                }
                file.seek(SeekFrom::Start(*at)).map_err(Error::io("read", &self.path))?;
                kaldi::matrix(&mut BufReader::new(file))
            }
        })
    }
}
