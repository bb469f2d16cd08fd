//! Files that are either whole or absent.

use crate::{Error, Result};
use std::fs;
use std::io::{self, BufWriter, Seek, Write};
use std::path::Path;

/// Writes a file through `fill`, so that `path` holds the old content or all of the new one.
///
/// The bytes go to a temporary file in the same folder, which takes the name at the end and is
/// removed on any failure. Something that exists and isn't a plain file (`/dev/null`, a pipe) is
/// written directly.
///
/// # Errors
/// [`Error::Io`] naming `path`.
pub fn write<T>(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<T>) -> Result<T> {
    write_with_head(path, fill, |_| Ok(Vec::new()))
}

/// [`write()`] of a file whose first bytes are known only at the end: `head` gives what then replaces
/// them, except in something that isn't a plain file.
///
/// # Errors
/// As [`write()`].
pub fn write_with_head<T>(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<T>,
    head: impl FnOnce(&T) -> io::Result<Vec<u8>>,
) -> Result<T> {
    replace(path, fill, head).map_err(Error::io("write", path))
}

fn replace<T>(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<T>,
    head: impl FnOnce(&T) -> io::Result<Vec<u8>>,
) -> io::Result<T> {
    let existing = fs::metadata(path).ok();
    if let Some(meta) = existing.as_ref().filter(|meta| !meta.is_file()) {
        if meta.is_dir() {
            return Err(io::Error::new(io::ErrorKind::IsADirectory, "it is a folder"));
        }
        let mut direct = BufWriter::new(fs::OpenOptions::new().write(true).open(path)?);
        let value = fill(&mut direct)?;
        direct.flush()?;
        return Ok(value);
    }
    // A link is followed: its target is replaced, not the link.
    let target = if existing.is_some() { fs::canonicalize(path)? } else { path.to_owned() };
    let folder = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".melglow-").suffix(".part");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // What a new file gets (less the umask), or what the old one had; a temporary file would be private.
        let old = existing.map(|meta| meta.permissions());
        builder.permissions(old.unwrap_or_else(|| fs::Permissions::from_mode(0o666)));
    }
    // its own message names the temporary file
    let temporary = builder.tempfile_in(folder).map_err(|e| io::Error::from(e.kind()))?;
    let mut temporary = BufWriter::new(temporary);
    let value = fill(&mut temporary)?;
    let head = head(&value)?;
    temporary.seek(io::SeekFrom::Start(0))?;
    temporary.write_all(&head)?;
    let temporary = temporary.into_inner().map_err(io::IntoInnerError::into_error)?;
    temporary.persist(&target).map_err(|failed| failed.error)?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        write(&path, |out| out.write_all(b"old")).unwrap();
        let failed = write(&path, |out| {
            out.write_all(b"new")?;
            Err::<(), _>(io::Error::other("disk full"))
        });
        assert!(failed.unwrap_err().to_string().starts_with("cannot write"));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn a_private_file_stays_private() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::write(&path, b"old").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        write(&path, |out| out.write_all(b"new")).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn missing_folder_is_an_error_that_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let error = write(&folder.path().join("no/file"), |out| out.write_all(b"x")).unwrap_err();
        assert!(error.to_string().ends_with("no/file"), "{error}");
    }

    #[test]
    fn a_folder_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(write(folder.path(), |out| out.write_all(b"x")).is_err());
    }
}
