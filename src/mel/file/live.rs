//! Mel frames as they arrive: raw floats, or `.npy` whose frames lie one after the other.

use super::{Element, Layout, hdf5, npy};
use crate::torch;
use crate::{Error, Result};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

/// Bytes that are asked for at a time.
const PIECE: usize = 1 << 16;

/// Letters in a row that are text and not numbers.
const SOME_TEXT: usize = 16;

/// Reads mel frames from a stream of bytes.
///
/// The stream is `.npy` by its first bytes, or else raw little-endian float32, all bands of a frame
/// after those of the one before. A `.npy` whose bands lie one after the other has no frame before
/// its end: it is read whole. Values need not be finite where frames are read as they arrive.
pub struct FrameReader<R> {
    reader: R,
    name: PathBuf,
    n_mels: usize,
    element: Element,
    big: bool,
    /// Bytes of frames that are not taken yet.
    pending: Vec<u8>,
    /// Frames that a header promises.
    promised: Option<usize>,
    taken: usize,
}

impl<R: Read> FrameReader<R> {
    /// Reads as far as it takes to know the format; `name` is for messages.
    ///
    /// # Errors
    /// If the stream can't be read, or is `.npy` and not a mel of the layout.
    pub fn open(reader: R, name: &Path, layout: Layout) -> Result<Self> {
        let mut this = Self {
            reader,
            name: name.to_path_buf(),
            n_mels: layout.n_mels,
            element: Element::F32,
            big: false,
            pending: Vec::new(),
            promised: None,
            taken: 0,
        };
        while this.pending.len() < SOME_TEXT && this.fill()? {}
        if this.pending.is_empty() {
            return Err(Error::file(name, "is empty (0 bytes)"));
        }
        if this.pending.starts_with(npy::MAGIC) {
            this.npy(layout)?;
        } else if let Some(kind) = kind(&this.pending) {
            let problem = format!("is {kind}, expected raw little-endian float32, frame after frame, or .npy");
            return Err(Error::file(name, problem));
        }
        Ok(this)
    }

    /// Frames in all, where a header says so.
    pub fn frames(&self) -> Option<usize> {
        self.promised
    }

    /// The frames that have arrived, one after the other; waits for at least one, `None` at the end.
    ///
    /// # Errors
    /// If the stream can't be read, or ends within a frame or before the frames it promised.
    pub fn read(&mut self) -> Result<Option<Vec<f32>>> {
        let size = self.n_mels * self.element.size();
        while self.pending.len() < size && self.promised != Some(self.taken) && self.fill()? {}
        let left = self.promised.map_or(usize::MAX, |promised| promised - self.taken);
        let frames = (self.pending.len() / size).min(left);
        if frames > 0 {
            self.taken += frames;
            let bytes: Vec<u8> = self.pending.drain(..frames * size).collect();
            return Ok(Some(self.element.decode(&bytes, self.big)));
        }
        if left == 0 {
            return Ok(None);
        }
        if !self.pending.is_empty() {
            let problem = format!("ends within frame {}, after {} of its {size} bytes", self.taken, self.pending.len());
            return Err(Error::file(&self.name, problem));
        }
        match self.promised {
            Some(promised) => Err(Error::file(&self.name, format!("ends after {} of {promised} frames", self.taken))),
            None => Ok(None),
        }
    }

    /// Reads what is there, at least a byte; `false` at the end.
    fn fill(&mut self) -> Result<bool> {
        let from = self.pending.len();
        self.pending.resize(from + PIECE, 0);
        let count = loop {
            match self.reader.read(&mut self.pending[from..]) {
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io("read", &self.name)(e)),
                Ok(count) => break count,
            }
        };
        self.pending.truncate(from + count);
        Ok(count > 0)
    }

    fn npy(&mut self, layout: Layout) -> Result<()> {
        while npy::split(&self.pending).is_none() && self.pending.len() < PIECE && self.fill()? {}
        let wrong = |problem: String| Error::file(&self.name, problem);
        let Some((header, data)) = npy::split(&self.pending) else {
            return Err(wrong("truncated within its header".into()));
        };
        let header = String::from_utf8_lossy(header).into_owned();
        let start = self.pending.len() - data.len();
        let fortran = npy::field(&header, "fortran_order").is_some_and(|v| v.starts_with("True"));
        let shape = npy::field(&header, "shape").and_then(npy::tuple).unwrap_or_default();
        let descr = npy::field(&header, "descr").and_then(npy::quoted).unwrap_or_default();
        // as `into_mel` has it: the shape tells, but for a square one
        let (rows, columns) = match shape[..] {
            [rows, columns] | [1, rows, columns] if rows > 0 && columns > 0 => (rows, columns),
            _ => (0, 0),
        };
        let turned = if rows == columns { layout.transpose } else { columns == self.n_mels };
        let bands_first = !turned && rows == self.n_mels;
        let frames_first = turned && columns == self.n_mels;
        if bands_first && fortran || frames_first && !fortran {
            let frames = if fortran { columns } else { rows };
            (self.element, self.big) = npy::element(descr).map_err(wrong)?;
            self.promised = Some(frames);
            self.pending.drain(..start);
            return Ok(());
        }
        // no frame is whole before the end: the ordinary reader takes it, and says what is wrong with it
        while self.pending.len() as u64 <= super::MAX_FILE && self.fill()? {}
        if self.pending.len() as u64 > super::MAX_FILE {
            return Err(Error::file(&self.name, "is larger than 4 GiB"));
        }
        let mel = super::read_bytes(&self.pending, &self.name, layout)?;
        self.promised = Some(mel.frames());
        self.pending = mel.transposed().values().iter().flat_map(|v| v.to_le_bytes()).collect();
        Ok(())
    }
}

/// What bytes are that are no frames; log-mels don't begin so.
fn kind(bytes: &[u8]) -> Option<String> {
    let text = |byte: &u8| byte.is_ascii_graphic() || byte.is_ascii_whitespace();
    if let Some(kind) = super::sound(bytes) {
        return Some(format!("sound ({kind})"));
    }
    let kind = if bytes.starts_with(b"PK\x03\x04") {
        "an archive (.npz or .pt)"
    } else if bytes.starts_with(hdf5::MAGIC) {
        "HDF5"
    } else if torch::is_legacy(bytes) {
        "a file of torch.save"
    } else if bytes.len() > 9 && bytes[4..8] == [0; 4] && bytes[8..10] == *b"{\"" {
        "a .safetensors file"
    } else if bytes
        .windows(4)
        .take(SOME_TEXT)
        .any(|tag| [b"\0BFM", b"\0BDM", b"\0BCM"].iter().any(|known| tag == *known))
    {
        "an archive of Kaldi's"
    } else if bytes.len() >= SOME_TEXT && bytes.iter().take(PIECE).all(text) {
        "text"
    } else {
        return None;
    };
    Some(kind.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reader that gives a few bytes at a time.
    struct Trickle<'a>(&'a [u8], usize);

    impl Read for Trickle<'_> {
        fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
            let count = self.1.min(out.len()).min(self.0.len());
            out[..count].copy_from_slice(&self.0[..count]);
            self.0 = &self.0[count..];
            Ok(count)
        }
    }

    fn read(bytes: &[u8], step: usize, transpose: bool) -> Result<Vec<f32>, String> {
        let layout = Layout { n_mels: 2, transpose };
        let mut reader =
            FrameReader::open(Trickle(bytes, step), Path::new("stdin"), layout).map_err(|e| e.to_string())?;
        let mut all = Vec::new();
        while let Some(frames) = reader.read().map_err(|e| e.to_string())? {
            assert!(!frames.is_empty() && frames.len().is_multiple_of(2));
            all.extend(frames);
        }
        Ok(all)
    }

    fn floats(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    fn npy_file(fortran: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let header = format!("{{'descr': '<f4', 'fortran_order': {fortran}, 'shape': {shape}, }}\n");
        npy::tests::with_header(1, &header, data)
    }

    #[test]
    fn raw_floats_as_they_come() {
        let values = [1.0, 2.0, f32::NAN, 4.0, 5.0, 6.0];
        for step in [1, 3, 8, 100] {
            let got = read(&floats(&values), step, false).unwrap();
            assert!(got.iter().zip(&values).all(|(a, b)| a.to_bits() == b.to_bits()) && got.len() == 6, "{step}");
        }
        assert_eq!(read(&[], 1, false).unwrap_err(), "stdin: is empty (0 bytes)");
        assert_eq!(
            read(&floats(&values)[..19], 4, false).unwrap_err(),
            "stdin: ends within frame 2, after 3 of its 8 bytes"
        );
    }

    #[test]
    fn what_is_no_frames_is_not_spoken() {
        let tensors = b"\x40\0\0\0\0\0\0\0{\"mel\":{}}".as_slice();
        for (bytes, kind) in [
            (b"PK\x03\x04\x14\0\0\0\0\0\0\0\0\0\0\0".as_slice(), "an archive"),
            (b"\x89HDF\r\n\x1a\n\0\0\0\0\0\0\0\0", "HDF5"),
            (b"RIFF\x24\0\0\0WAVEfmt ", "sound (WAV)"),
            (tensors, "a .safetensors file"),
            (b"-11.5129 -4.2 -3.9\n", "text"),
        ] {
            for step in [1, 100] {
                let error = read(bytes, step, false).unwrap_err();
                assert!(error.starts_with(&format!("stdin: is {kind}")) && error.contains(".npy"), "{error}");
            }
        }
    }

    #[test]
    fn npy_in_every_order() {
        let rows = floats(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let frames = [1.0, 4.0, 2.0, 5.0, 3.0, 6.0];
        for step in [1, 7, 1000] {
            // two bands of three frames, band after band; then frame after frame
            assert_eq!(read(&npy_file("False", "(2, 3)", &rows), step, false).unwrap(), frames);
            assert_eq!(read(&npy_file("True", "(1, 2, 3)", &floats(&frames)), step, false).unwrap(), frames);
            assert_eq!(read(&npy_file("False", "(3, 2)", &floats(&frames)), step, false).unwrap(), frames);
        }
        let cut = npy_file("True", "(2, 3)", &floats(&frames[..4]));
        assert_eq!(read(&cut, 5, false).unwrap_err(), "stdin: ends after 2 of 3 frames");
        let wrong = read(&npy_file("False", "(3, 3)", &floats(&[0.0; 9])), 5, false).unwrap_err();
        assert!(wrong.starts_with("stdin: "), "{wrong}");
    }
}
