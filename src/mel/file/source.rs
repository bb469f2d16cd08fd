//! Where mels lie: files, folders of them, several in one file.

use super::{EXTENSIONS, Layout, Utterance, is_mel_file, read_with, utterances};
use crate::audio::wav::plain_name;
use crate::mel::MelSpectrogram;
use crate::{Error, Result};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

/// One mel: a file, or one of several in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The file.
    pub path: PathBuf,
    /// Which of the mels in the file, where it holds several.
    pub utterance: Option<Utterance>,
}

impl Source {
    /// Its name for messages.
    pub fn name(&self) -> PathBuf {
        match &self.utterance {
            Some(utterance) => format!("{}: key {}", self.path.display(), utterance.key).into(),
            None => self.path.clone(),
        }
    }

    /// A name for what is made of it, without an extension: its key, or its file's name.
    pub fn stem(&self) -> OsString {
        match &self.utterance {
            Some(utterance) => plain_name(&utterance.key).into(),
            None => self.path.file_stem().unwrap_or_default().to_os_string(),
        }
    }

    /// Reads it.
    ///
    /// # Errors
    /// As [`read_with`].
    pub fn read(&self, layout: Layout) -> Result<MelSpectrogram> {
        match &self.utterance {
            Some(utterance) => utterance.read(layout),
            None => read_with(&self.path, layout),
        }
    }
}

/// The mels of a file, or of the mel files of a folder in the order of their names.
///
/// # Errors
/// One line naming the folder that can't be read or holds no mel file, or as [`utterances`].
pub fn sources(path: &Path) -> Result<Vec<Source>> {
    let files = if path.is_dir() { mels_in(path)? } else { vec![path.to_owned()] };
    let found = files.iter().map(|path| in_file(path)).collect::<Result<Vec<_>>>()?;
    Ok(found.into_iter().flatten().collect())
}

/// The mels of a file.
///
/// # Errors
/// As [`utterances`].
pub fn in_file(path: &Path) -> Result<Vec<Source>> {
    let source = |utterance| Source { path: path.to_owned(), utterance };
    Ok(match utterances(path)? {
        Some(utterances) => utterances.into_iter().map(|utterance| source(Some(utterance))).collect(),
        None => vec![source(None)],
    })
}

/// The mel files of a folder, in the order of their names.
fn mels_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut mels = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let path = entry.map_err(Error::io("read", folder))?.path();
        if is_mel_file(&path) && path.is_file() {
            mels.push(path);
        }
    }
    if mels.is_empty() {
        return Err(no_mels(folder));
    }
    mels.sort();
    Ok(mels)
}

/// That a folder holds no mel files.
pub(crate) fn no_mels(folder: &Path) -> Error {
    Error::file(folder, format!("no mel files in this folder (.{})", EXTENSIONS.join(", .")))
}
