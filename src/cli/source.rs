//! Mels that a command is given: files, folders of them, several in one file, standard input.

use crate::mel::MelSpectrogram;
use crate::mel::file::{self, Layout};
use anyhow::{Context, Result, bail};
use std::ffi::OsString;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// The most that standard input may give: an hour of float64 mel is 200 MB.
const MAX_STDIN: u64 = 4 << 30;

/// One mel.
pub(super) enum Source {
    Stdin,
    Stored(file::Source),
}

impl Source {
    /// Its name for messages.
    pub fn name(&self) -> PathBuf {
        match self {
            Self::Stdin => "standard input".into(),
            Self::Stored(mel) => mel.name(),
        }
    }

    /// A name for what is made of it, without an extension.
    pub fn stem(&self) -> OsString {
        match self {
            Self::Stdin => "stdin".into(),
            Self::Stored(mel) => mel.stem(),
        }
    }

    /// Its key, where it is one of several in a file.
    pub fn key(&self) -> Option<&str> {
        match self {
            Self::Stored(file::Source { utterance: Some(utterance), .. }) => Some(&utterance.key),
            _ => None,
        }
    }

    /// Its file.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Stored(mel) => Some(&mel.path),
            Self::Stdin => None,
        }
    }

    /// Reads it.
    pub fn read(&self, layout: Layout) -> Result<MelSpectrogram> {
        if let Self::Stored(mel) = self {
            return Ok(mel.read(layout)?);
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

/// The mels of files, folders and archives, in order; `-` is standard input.
pub(super) fn sources(mels: &[PathBuf]) -> Result<Vec<Source>> {
    let mut found = Vec::new();
    for path in mels {
        if is_stdio(path) {
            found.push(Source::Stdin);
        } else {
            found.extend(file::sources(path)?.into_iter().map(Source::Stored));
        }
    }
    Ok(found)
}
