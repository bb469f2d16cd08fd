//! Files of a folder and of the folders in it.

use crate::{Error, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// Folders within folders that are entered.
const DEEPEST: usize = 16;

/// The files below a folder that `wanted` accepts, in the order of their names: a file's path from there without its
/// extension, with `/` between folders. Folders whose name begins with a dot and links to folders aren't entered.
///
/// # Errors
/// If a folder can't be read, or lies too deep.
pub(crate) fn files_below(folder: &Path, wanted: impl Fn(&Path) -> bool) -> Result<Vec<(String, PathBuf)>> {
    let mut files = Vec::new();
    enter(folder, "", 0, &wanted, &mut files)?;
    files.sort();
    Ok(files)
}

fn enter(
    folder: &Path,
    before: &str,
    depth: usize,
    wanted: &impl Fn(&Path) -> bool,
    files: &mut Vec<(String, PathBuf)>,
) -> Result<()> {
    if depth > DEEPEST {
        return Err(Error::file(folder, format!("lies more than {DEEPEST} folders deep")));
    }
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let entry = entry.map_err(Error::io("read", folder))?;
        let (path, kind) = (entry.path(), entry.file_type().map_err(Error::io("read", folder))?);
        let name = |part: &std::ffi::OsStr| part.to_str().map(|part| format!("{before}{part}"));
        if kind.is_dir() {
            let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
            if let Some(name) = name(&entry.file_name()).filter(|_| !hidden) {
                enter(&path, &format!("{name}/"), depth + 1, wanted, files)?;
            }
        } else if let Some(name) = path.file_stem().and_then(name)
            && wanted(&path)
            && path.is_file()
        {
            files.push((name, path));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_paths_from_the_folder() {
        let place = tempfile::tempdir().unwrap();
        for file in ["b.wav", "a.wav", "p1/c.wav", "p1/x/d.wav", "p1/notes.txt", ".trash/e.wav"] {
            let path = place.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let wav = |path: &Path| path.extension().is_some_and(|e| e == "wav");
        let found = files_below(place.path(), wav).unwrap();
        let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["a", "b", "p1/c", "p1/x/d"]);
        assert_eq!(found[3].1, place.path().join("p1/x/d.wav"));
        let deep = place.path().join("d/".repeat(DEEPEST + 1));
        fs::create_dir_all(deep).unwrap();
        assert!(files_below(place.path(), wav).unwrap_err().to_string().contains("more than 16 folders deep"));
    }
}
