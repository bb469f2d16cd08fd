//! Kaldi's matrices: archives (`.ark`) of keys and matrices, or a bare matrix; binary (float, double and
//! compressed) or text.
//!
//! Kaldi's `matrix/kaldi-matrix.cc` and `matrix/compressed-matrix.cc` define the formats.

use super::{Element, MAX_FILE, TensorData};
use std::io::{BufRead, Read};

/// Longest key we accept, bytes.
const MAX_KEY: u64 = 4096;

/// Whether bytes begin like an archive or a matrix: a key and a blank or nothing, then `\0B` or `[`.
pub(super) fn begins(bytes: &[u8]) -> bool {
    let start = &bytes[..bytes.len().min(MAX_KEY as usize)];
    let bare = |bytes: &[u8]| bytes.starts_with(b"\0B") || bytes.trim_ascii_start().starts_with(b"[");
    if bare(start) {
        return true;
    }
    match start.iter().position(|b| b.is_ascii_whitespace()) {
        Some(at) => at > 0 && start[..at].iter().all(|&b| b > 0x20 && b != 0x7f) && bare(&start[at + 1..]),
        None => false,
    }
}

/// Reads every matrix; a bare one's name is empty.
pub(super) fn parse(mut bytes: &[u8]) -> Result<Vec<(String, TensorData)>, String> {
    if bytes.starts_with(b"\0B") || bytes.trim_ascii_start().starts_with(b"[") {
        return Ok(vec![(String::new(), matrix(&mut bytes)?)]);
    }
    let mut arrays = Vec::new();
    while let Some(key) = key(&mut bytes)? {
        let array = matrix(&mut bytes).map_err(|problem| format!("key {key}: {problem}"))?;
        arrays.push((key, array));
    }
    if arrays.is_empty() { Err("is an archive without matrices".into()) } else { Ok(arrays) }
}

/// The keys of an archive, and where the matrix of each begins. Reads the file once, holding little.
pub(super) fn index(input: &mut impl BufRead) -> Result<Vec<(String, u64)>, String> {
    let mut input = Counted { input, at: 0 };
    let mut keys = Vec::new();
    while let Some(key) = key(&mut input)? {
        let at = input.at;
        skip(&mut input).map_err(|problem| format!("key {key}: {problem}"))?;
        keys.push((key, at));
    }
    if keys.is_empty() { Err("is an archive without matrices".into()) } else { Ok(keys) }
}

/// A reader that knows where it is.
struct Counted<'a, R> {
    input: &'a mut R,
    at: u64,
}

impl<R: BufRead> Read for Counted<'_, R> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let read = self.input.read(out)?;
        self.at += read as u64;
        Ok(read)
    }
}

impl<R: BufRead> BufRead for Counted<'_, R> {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        self.input.fill_buf()
    }

    fn consume(&mut self, amount: usize) {
        self.at += amount as u64;
        self.input.consume(amount);
    }
}

fn unreadable(error: std::io::Error) -> String {
    format!("cannot be read ({error})")
}

/// The next key and the blank after it; `None` at the end.
fn key(input: &mut impl BufRead) -> Result<Option<String>, String> {
    let mut key = Vec::new();
    loop {
        let byte = match input.fill_buf().map_err(unreadable)?.first() {
            Some(&byte) => byte,
            None if key.is_empty() => return Ok(None),
            None => return Err("truncated after a key".into()),
        };
        input.consume(1);
        match byte {
            // Lines of text archives end after the matrix.
            b'\n' | b'\r' if key.is_empty() => continue,
            b' ' | b'\t' if !key.is_empty() => break,
            0x21..=0x7e | 0x80.. if key.len() < MAX_KEY as usize => key.push(byte),
            _ => return Err("damaged: expected a key and a blank".into()),
        }
    }
    String::from_utf8(key).map(Some).map_err(|_| "damaged: a key is not text".into())
}

/// How a matrix goes on after its dimensions.
enum Body {
    Plain(Element),
    /// Per column four percentiles, then a byte per value, column after column.
    ByColumn {
        min: f32,
        range: f32,
    },
    /// 16 bits per value, row after row.
    Words {
        min: f32,
        range: f32,
    },
    /// 8 bits per value, row after row.
    Bytes {
        min: f32,
        range: f32,
    },
    /// Numbers and line ends up to a bracket.
    Text,
}

struct Header {
    rows: usize,
    columns: usize,
    vector: bool,
    body: Body,
}

impl Header {
    /// Bytes of the body.
    fn len(&self) -> Option<u64> {
        let count = self.rows.checked_mul(self.columns)?;
        let len = match self.body {
            Body::Plain(element) => count.checked_mul(element.size())?,
            Body::ByColumn { .. } => self.columns.checked_mul(8)?.checked_add(count)?,
            Body::Words { .. } => count.checked_mul(2)?,
            Body::Bytes { .. } => count,
            Body::Text => return None,
        };
        Some(len as u64).filter(|&len| len <= MAX_FILE)
    }
}

fn exact<const N: usize>(input: &mut impl Read) -> Result<[u8; N], String> {
    let mut bytes = [0; N];
    input.read_exact(&mut bytes).map_err(|_| "truncated within a matrix's header")?;
    Ok(bytes)
}

fn header(input: &mut impl BufRead) -> Result<Header, String> {
    let first = loop {
        match input.fill_buf().map_err(unreadable)?.first() {
            Some(b' ' | b'\t' | b'\n' | b'\r') => input.consume(1),
            Some(&first) => break first,
            None => return Err("truncated before a matrix".into()),
        }
    };
    input.consume(1);
    if first == b'[' {
        return Ok(Header { rows: 0, columns: 0, vector: false, body: Body::Text });
    }
    if first != 0 || exact::<1>(input)? != *b"B" {
        return Err("holds no Kaldi matrix (expected \\0B or a bracket)".into());
    }
    let mut token = Vec::new();
    (&mut *input).take(8).read_until(b' ', &mut token).map_err(unreadable)?;
    let sized = |input: &mut _| match exact::<5>(input)? {
        [4, size @ ..] => usize::try_from(i32::from_le_bytes(size)).map_err(|_| "a size is negative".to_owned()),
        _ => Err("damaged: a size is not of 4 bytes".into()),
    };
    let body = match &token[..] {
        b"FM " => Body::Plain(Element::F32),
        b"DM " => Body::Plain(Element::F64),
        b"FV " | b"DV " => {
            let body = Body::Plain(if token[0] == b'F' { Element::F32 } else { Element::F64 });
            return Ok(Header { rows: 1, columns: sized(input)?, vector: true, body });
        }
        b"CM " | b"CM2 " | b"CM3 " => {
            let [min, range] = [exact::<4>(input)?, exact(input)?].map(f32::from_le_bytes);
            let sizes = [exact::<4>(input)?, exact(input)?].map(|size| usize::try_from(i32::from_le_bytes(size)));
            let [Ok(rows), Ok(columns)] = sizes else { return Err("a size is negative".into()) };
            let body = match token[2] {
                b'2' => Body::Words { min, range },
                b'3' => Body::Bytes { min, range },
                _ => Body::ByColumn { min, range },
            };
            return Ok(Header { rows, columns, vector: false, body });
        }
        _ => {
            let token = String::from_utf8_lossy(&token).trim().replace(|c: char| c.is_control(), "?");
            return Err(format!("holds a Kaldi object of type {token}, expected a matrix (FM, DM, CM, CM2, CM3)"));
        }
    };
    Ok(Header { rows: sized(input)?, columns: sized(input)?, vector: false, body })
}

/// Reads the matrix that begins here.
pub(super) fn matrix(input: &mut impl BufRead) -> Result<TensorData, String> {
    let header = header(input)?;
    if let Body::Text = header.body {
        return text(input);
    }
    let len = header.len().ok_or("a matrix is too large")?;
    let mut bytes = Vec::new();
    input.take(len).read_to_end(&mut bytes).map_err(unreadable)?;
    if (bytes.len() as u64) < len {
        return Err(format!(
            "truncated: {} of {len} bytes of a {} × {} matrix",
            bytes.len(),
            header.rows,
            header.columns
        ));
    }
    let Header { rows, columns, .. } = header;
    let word = |bytes: &[u8]| f32::from(u16::from_le_bytes([bytes[0], bytes[1]])) / 65_535.0;
    let (values, dtype): (Vec<f32>, _) = match header.body {
        Body::Plain(element) => (element.decode(&bytes, false), element.name()),
        Body::Words { min, range } => (bytes.chunks_exact(2).map(|w| min + range * word(w)).collect(), "float16"),
        Body::Bytes { min, range } => (bytes.iter().map(|&b| min + range * f32::from(b) / 255.0).collect(), "float8"),
        Body::ByColumn { min, range } => {
            let (percentiles, bytes) = bytes.split_at(8 * columns);
            let columns_of: Vec<[f32; 4]> =
                percentiles.chunks_exact(8).map(|p| [0, 2, 4, 6].map(|at| min + range * word(&p[at..]))).collect();
            let cell = |row: usize, column: usize| expand(bytes[column * rows + row], columns_of[column]);
            ((0..rows).flat_map(|r| (0..columns).map(move |c| (r, c))).map(|(r, c)| cell(r, c)).collect(), "float8")
        }
        Body::Text => unreachable!("read above"),
    };
    let shape = if header.vector { vec![columns] } else { vec![rows, columns] };
    Ok(TensorData { shape, values, dtype })
}

/// A byte between a column's minimum, quartiles and maximum.
fn expand(byte: u8, [p0, p25, p75, p100]: [f32; 4]) -> f32 {
    let value = f32::from(byte);
    match byte {
        0..=64 => p0 + (p25 - p0) * value / 64.0,
        65..=192 => p25 + (p75 - p25) * (value - 64.0) / 128.0,
        193.. => p75 + (p100 - p75) * (value - 192.0) / 63.0,
    }
}

/// Passes over the matrix that begins here.
fn skip(input: &mut impl BufRead) -> Result<(), String> {
    let header = header(input)?;
    if let Body::Text = header.body {
        return text(input).map(drop);
    }
    let len = header.len().ok_or("a matrix is too large")?;
    let passed = std::io::copy(&mut input.take(len), &mut std::io::sink()).map_err(unreadable)?;
    if passed < len { Err(format!("truncated: {passed} of {len} bytes of a matrix")) } else { Ok(()) }
}

/// The rows up to the closing bracket.
fn text(input: &mut impl BufRead) -> Result<TensorData, String> {
    let mut bytes = Vec::new();
    input.take(MAX_FILE).read_until(b']', &mut bytes).map_err(unreadable)?;
    if bytes.pop() != Some(b']') {
        return Err("truncated: no closing bracket".into());
    }
    let text = std::str::from_utf8(&bytes).map_err(|_| "damaged: a matrix is not text")?;
    let (mut values, mut rows, mut columns) = (Vec::new(), 0, 0);
    for line in text.lines() {
        let before = values.len();
        for number in line.split_ascii_whitespace() {
            values.push(number.parse::<f32>().map_err(|_| "damaged: a matrix holds something else than numbers")?);
        }
        match values.len() - before {
            0 => continue,
            count if rows > 0 && count != columns => {
                return Err(format!("damaged: a row of {count} numbers after one of {columns}"));
            }
            count => (rows, columns) = (rows + 1, count),
        }
    }
    Ok(TensorData { shape: vec![rows, columns], values, dtype: "float32" })
}
