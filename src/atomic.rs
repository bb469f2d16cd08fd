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

/// Makes sure, before long work, that a file could be written at `path`; leaves nothing behind.
///
/// # Errors
/// [`Error::Io`] naming `path`.
pub fn check(path: &Path) -> Result<()> {
    let check = || match fs::metadata(path) {
        Ok(meta) if meta.is_dir() => Err(is_a_folder()),
        Ok(meta) if !meta.is_file() => Ok(()),
        Ok(_) => try_in(folder_of(&fs::canonicalize(path)?)),
        Err(_) => try_in(folder_of(path)),
    };
    check().map_err(Error::io("write", path))
}

/// Makes sure, before long work, that files could be written in the folder `path`, which may be missing
/// with any number of folders above it; leaves nothing behind.
///
/// # Errors
/// [`Error::Io`] naming `path`.
pub fn check_folder(path: &Path) -> Result<()> {
    let existing = path.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new(""));
    let existing = if existing.as_os_str().is_empty() { Path::new(".") } else { existing };
    try_in(existing).map_err(Error::io("create", path))
}

/// Makes a file in a folder and removes it.
pub(crate) fn try_in(folder: &Path) -> io::Result<()> {
    if !folder.is_dir() && folder.exists() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    tempfile::tempfile_in(folder).map(drop).map_err(nameless)
}

/// An error of the crate tempfile without the temporary name.
pub(crate) fn nameless(error: io::Error) -> io::Error {
    let system = error.get_ref().and_then(|inner| inner.source()?.downcast_ref::<io::Error>()?.raw_os_error());
    system.map_or(error, io::Error::from_raw_os_error)
}

fn is_a_folder() -> io::Error {
    io::Error::new(io::ErrorKind::IsADirectory, "it is a folder")
}

/// The folder that a file is in.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn replace<T>(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<T>,
    head: impl FnOnce(&T) -> io::Result<Vec<u8>>,
) -> io::Result<T> {
    let existing = fs::metadata(path).ok();
    if let Some(meta) = existing.as_ref().filter(|meta| !meta.is_file()) {
        if meta.is_dir() {
            return Err(is_a_folder());
        }
        let mut direct = BufWriter::new(fs::OpenOptions::new().write(true).open(path)?);
        let value = fill(&mut direct)?;
        direct.flush()?;
        return Ok(value);
    }
    // A link is followed: its target is replaced, not the link.
    let target = if existing.is_some() { fs::canonicalize(path)? } else { path.to_owned() };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".melglow-").suffix(".part");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // What a new file gets (less the umask), or what the old one had; a temporary file would be private.
        let old = existing.map(|meta| meta.permissions());
        builder.permissions(old.unwrap_or_else(|| fs::Permissions::from_mode(0o666)));
    }
    let mut temporary = BufWriter::new(builder.tempfile_in(folder_of(&target)).map_err(nameless)?);
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
        assert!(check(folder.path()).is_err());
    }

    #[test]
    fn what_can_be_written_is_known_before() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("file"), b"old").unwrap();
        for good in ["file", "new"] {
            check(&at(good)).unwrap();
        }
        for good in ["", "a", "a/b/c"] {
            check_folder(&at(good)).unwrap();
        }
        check_folder(Path::new("a/b")).unwrap();
        let message = |result: Result<()>| {
            let error = result.unwrap_err();
            format!("{error}: {}", std::error::Error::source(&error).unwrap())
                .replace(folder.path().to_str().unwrap(), "")
        };
        assert!(message(check(&at("no/new"))).starts_with("cannot write /no/new: No such file"));
        assert!(!message(check(&at("no/new"))).contains("tmp"));
        assert!(message(check(&at("file/new"))).starts_with("cannot write /file/new: "));
        assert!(message(check_folder(&at("file/a/b"))).starts_with("cannot create /file/a/b: not a directory"));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
