//! Mels that a command is given: files, folders of them, several in one file, standard input.

use crate::audio::wav::plain_name;
use crate::mel::MelSpectrogram;
use crate::mel::file::{self, Layout, Utterance};
use anyhow::{Context, Result, bail};
use std::ffi::OsString;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// The most that standard input may give: an hour of float64 mel is 200 MB.
const MAX_STDIN: u64 = 4 << 30;

/// One mel; `-` is standard input.
pub(super) struct Source {
    pub path: PathBuf,
    /// Which of the mels in the file, where it holds several.
    pub utterance: Option<Utterance>,
}

impl Source {
    /// Its name for messages.
    pub fn name(&self) -> PathBuf {
        match &self.utterance {
            Some(utterance) => format!("{}: key {}", self.path.display(), utterance.key).into(),
            None if is_stdio(&self.path) => "standard input".into(),
            None => self.path.clone(),
        }
    }

    /// A name for what is made of it, without an extension.
    pub fn stem(&self) -> OsString {
        match &self.utterance {
            Some(utterance) => plain_name(&utterance.key).into(),
            None if is_stdio(&self.path) => "stdin".into(),
            None => self.path.file_stem().unwrap_or_default().to_os_string(),
        }
    }

    /// Reads it.
    pub fn read(&self, layout: Layout) -> Result<MelSpectrogram> {
        if let Some(utterance) = &self.utterance {
            return Ok(utterance.read(layout)?);
        }
        if !is_stdio(&self.path) {
            return Ok(file::read_with(&self.path, layout)?);
        }
        let mut bytes = Vec::new();
        io::stdin().lock().take(MAX_STDIN + 1).read_to_end(&mut bytes).context("cannot read standard input")?;
        if bytes.len() as u64 > MAX_STDIN {
            bail!("standard input: more than {MAX_STDIN} bytes");
        }
        Ok(file::read_bytes(&bytes, &self.name(), layout)?)
    }
}

pub(super) fn is_stdio(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// The mels of files, folders and archives, in order.
pub(super) fn sources(mels: &[PathBuf]) -> Result<Vec<Source>> {
    let mut paths = Vec::new();
    for path in mels {
        if !is_stdio(path) && path.is_dir() {
            paths.extend(mels_in(path)?);
        } else {
            paths.push(path.clone());
        }
    }
    let mut found = Vec::new();
    for path in paths {
        match file::utterances(&path)? {
            Some(utterances) => {
                found.extend(utterances.into_iter().map(|u| Source { path: path.clone(), utterance: Some(u) }));
            }
            None => found.push(Source { path, utterance: None }),
        }
    }
    Ok(found)
}

/// The mel files of a folder, in the order of their names.
fn mels_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let cannot = || format!("cannot read {}", folder.display());
    let mut mels = Vec::new();
    for entry in fs::read_dir(folder).with_context(cannot)? {
        let path = entry.with_context(cannot)?.path();
        if file::is_mel_file(&path) && path.is_file() {
            mels.push(path);
        }
    }
    if mels.is_empty() {
        let extensions = file::EXTENSIONS.join(", .");
        bail!("{}: no mel files in this folder (.{extensions})", folder.display());
    }
    mels.sort();
    Ok(mels)
}
