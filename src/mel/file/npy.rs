//! NumPy's `.npy`: versions 1 to 3, C and Fortran order, floats of 16 to 64 bits and integers in both byte
//! orders.
//!
//! numpy.lib.format's documentation describes the format.

use super::{Element, MAX_DIMS, TensorData, element_count, gather};
use std::io::{self, Write};

/// The first bytes of every file.
pub(super) const MAGIC: &[u8] = b"\x93NUMPY";
/// Longest header we accept; NumPy's own limit is 10 000.
const MAX_HEADER: usize = 1 << 16;

/// Reads an array; the message of an error says what is wrong.
pub(super) fn parse(bytes: &[u8]) -> Result<TensorData, String> {
    let (header, data) = split(bytes).ok_or("truncated within its header")?;
    let header = std::str::from_utf8(header).map_err(|_| "header is not text")?;
    let descr = field(header, "descr").ok_or("header lacks 'descr'")?;
    let descr = quoted(descr).ok_or("holds records, expected an array of floats")?;
    let fortran = match field(header, "fortran_order") {
        Some(value) if value.starts_with("True") => true,
        Some(value) if value.starts_with("False") => false,
        _ => return Err("header lacks 'fortran_order'".into()),
    };
    let shape = field(header, "shape").and_then(tuple).ok_or("header lacks a valid 'shape'")?;
    let (element, big) = element(descr)?;
    let size = element.size();
    let count = element_count(&shape).ok_or("shape is out of range")?;
    let needed = count.checked_mul(size).ok_or("shape is out of range")?;
    if data.len() < needed {
        return Err(format!("truncated: {} of {needed} bytes of data for shape {shape:?}", data.len()));
    }
    let values = element.decode(&data[..needed], big);
    let values = if fortran { from_fortran(values, &shape) } else { values };
    Ok(TensorData { shape, values, dtype: element.name() })
}

/// Header text and data.
pub(super) fn split(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let rest = bytes.strip_prefix(MAGIC)?;
    let version = *rest.first()?;
    let (len, start) = if version == 1 {
        (usize::from(u16::from_le_bytes(rest.get(2..4)?.try_into().ok()?)), 4)
    } else {
        (usize::try_from(u32::from_le_bytes(rest.get(2..6)?.try_into().ok()?)).ok()?, 6)
    };
    if len > MAX_HEADER {
        return None;
    }
    Some((rest.get(start..start + len)?, &rest[start + len..]))
}

/// What follows `'name':` in the header's dictionary.
pub(super) fn field<'a>(header: &'a str, name: &str) -> Option<&'a str> {
    let after = ['\'', '"'].iter().find_map(|quote| header.split_once(&format!("{quote}{name}{quote}")))?.1;
    Some(after.trim_start().strip_prefix(':')?.trim_start())
}

/// The string literal at the start of `text`.
pub(super) fn quoted(text: &str) -> Option<&str> {
    let quote = text.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
    text[1..].split_once(quote).map(|(inside, _)| inside)
}

/// The tuple of numbers at the start of `text`.
pub(super) fn tuple(text: &str) -> Option<Vec<usize>> {
    let (inside, _) = text.strip_prefix('(')?.split_once(')')?;
    let items: Vec<&str> = inside.split(',').map(str::trim).filter(|item| !item.is_empty()).collect();
    if items.len() > MAX_DIMS {
        return None;
    }
    // Python 2 wrote long integers with an L.
    items.into_iter().map(|item| item.trim_end_matches('L').parse().ok()).collect()
}

/// The type of an element and whether it is big-endian.
pub(super) fn element(descr: &str) -> Result<(Element, bool), String> {
    let (order, kind) = match descr.as_bytes().first() {
        Some(b'<' | b'>' | b'=' | b'|') => descr.split_at(1),
        _ => ("<", descr),
    };
    let element = match kind {
        "f2" => Element::F16,
        "f4" => Element::F32,
        "f8" => Element::F64,
        "i8" => Element::I64,
        "i4" => Element::I32,
        "i2" => Element::I16,
        "i1" => Element::I8,
        "u1" => Element::U8,
        "b1" => Element::Bool,
        _ => {
            let what = match kind.as_bytes().first() {
                Some(b'c') => "complex numbers",
                Some(b'i' | b'u') => "integers",
                Some(b'b') => "booleans",
                Some(b'O') => "pickled Python objects",
                _ => "no numbers we know",
            };
            return Err(format!("holds {what} (dtype '{descr}'), expected float16, float32 or float64"));
        }
    };
    Ok((element, order == ">"))
}

/// Column-major values in row-major order.
fn from_fortran(values: Vec<f32>, shape: &[usize]) -> Vec<f32> {
    let mut strides = Vec::with_capacity(shape.len());
    let mut stride = 1;
    for &len in shape {
        strides.push(stride);
        stride *= len;
    }
    gather(&values, 0, shape, &strides).unwrap_or_default()
}

/// Writes a float32 array in C order, version 1.
pub(super) fn write(out: &mut dyn Write, shape: &[usize], values: &[f32]) -> io::Result<()> {
    let shape = match shape {
        [one] => format!("({one},)"),
        _ => format!("({})", shape.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")),
    };
    let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}");
    // Magic, version, length, header and newline fill a multiple of 64 bytes.
    let whole = (MAGIC.len() + 4 + header.len() + 1).next_multiple_of(64);
    header.push_str(&" ".repeat(whole - MAGIC.len() - 4 - header.len() - 1));
    header.push('\n');
    let len = u16::try_from(header.len()).map_err(io::Error::other)?;
    out.write_all(MAGIC)?;
    out.write_all(&[1, 0])?;
    out.write_all(&len.to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    for piece in values.chunks(8192) {
        let bytes: Vec<u8> = piece.iter().flat_map(|v| v.to_le_bytes()).collect();
        out.write_all(&bytes)?;
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A file with any header.
    pub(crate) fn with_header(version: u8, header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = [MAGIC, &[version, 0]].concat();
        if version == 1 {
            bytes.extend((header.len() as u16).to_le_bytes());
        } else {
            bytes.extend((header.len() as u32).to_le_bytes());
        }
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    fn array(descr: &str, fortran: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let header = format!("{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}\n");
        with_header(1, &header, data)
    }

    #[test]
    fn what_we_write_we_read() {
        for shape in [vec![6], vec![2, 3], vec![1, 2, 3]] {
            let mut bytes = Vec::new();
            write(&mut bytes, &shape, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
            assert_eq!((bytes.len() - 24) % 64, 0);
            let read = parse(&bytes).unwrap();
            assert_eq!((read.shape, read.values), (shape, vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
        }
    }

    #[test]
    fn versions_orders_and_types() {
        let values = [1.5f32, -2.0, 0.25, 8.0, -0.5, 3.0];
        let f8_big: Vec<u8> = values.iter().flat_map(|&v| f64::from(v).to_be_bytes()).collect();
        let f2: Vec<u8> = values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect();
        let f2_big: Vec<u8> = values.iter().flat_map(|&v| half::f16::from_f32(v).to_be_bytes()).collect();
        let f4_big: Vec<u8> = values.iter().flat_map(|&v| v.to_be_bytes()).collect();
        for (descr, data) in [(">f8", &f8_big), ("<f2", &f2), (">f2", &f2_big), (">f4", &f4_big)] {
            assert_eq!(parse(&array(descr, "False", "(2, 3)", data)).unwrap().values, values);
            let fortran = parse(&array(descr, "True", "(2, 3)", data)).unwrap();
            assert_eq!(fortran.values, [1.5, 0.25, -0.5, -2.0, 8.0, 3.0], "{descr}");
        }
        for version in [2, 3] {
            let header = "{\"shape\": (2L, 3L), \"fortran_order\": False, \"descr\": \">f4\"}";
            assert_eq!(parse(&with_header(version, header, &f4_big)).unwrap().shape, [2, 3]);
        }
    }

    #[test]
    fn bad_files_say_why() {
        for (bytes, part) in [
            (array("<c8", "False", "(1,)", &[0; 8]), "complex numbers (dtype '<c8')"),
            (array("<u8", "False", "(1,)", &[0; 8]), "integers"),
            (array("|O", "False", "(1,)", &[0; 8]), "pickled"),
            (array("<f4", "False", "(2, 3)", &[0; 8]), "truncated: 8 of 24 bytes"),
            (array("<f4", "False", "(18446744073709551615, 3)", &[0; 8]), "out of range"),
            (array("<f4", "False", "(4294967296, 4294967296)", &[0; 8]), "out of range"),
            (array("<f4", "False", "(-1, 3)", &[0; 8]), "valid 'shape'"),
            (array("<f4", "Perhaps", "(1,)", &[0; 8]), "fortran_order"),
            (MAGIC.to_vec(), "truncated within its header"),
        ] {
            let problem = parse(&bytes).unwrap_err();
            assert!(problem.contains(part), "{problem}");
        }
    }
}
