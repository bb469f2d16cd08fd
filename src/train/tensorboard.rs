//! TensorBoard event files with scalars.
//!
//! Our own page, for want of a crate to lean on (late 2026): `tboard` 0.1 needs `protoc` on the
//! machine that builds it, `tensorboard-rs` 0.5 is of 2022 and pins protobuf 2, `tfrecord` 0.15
//! brings several crates for one record type. The format is stable and small: TFRecord framing
//! (length, masked CRC-32C, `Event` message, masked CRC-32C), little-endian.
//! tensorflow `core/lib/io/record_writer.cc`, `core/util/event.proto`.

use crate::{Error, Result};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Writes scalars for TensorBoard.
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// A new event file in `folder` (created if need be); TensorBoard reads all files of a folder.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn create(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let path = folder.join(format!("events.out.tfevents.{:.6}.melglow", now()));
        let file = File::create(&path).map_err(Error::io("create", &path))?;
        let mut writer = Self { path, file };
        writer.event(0, |event| bytes_field(event, 3, b"brain.Event:2"))?;
        Ok(writer)
    }

    /// Writes one value of the curve `tag`.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn scalar(&mut self, tag: &str, step: usize, value: f64) -> Result<()> {
        let mut point = Vec::new();
        bytes_field(&mut point, 1, tag.as_bytes());
        point.push(2 << 3 | 5); // field 2, simple_value: 32 bits
        point.extend((value as f32).to_le_bytes());
        let mut summary = Vec::new();
        bytes_field(&mut summary, 1, &point);
        self.event(step as u64, |event| bytes_field(event, 5, &summary))
    }

    fn event(&mut self, step: u64, what: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        let mut event = vec![1 << 3 | 1]; // field 1, wall_time: 64 bits
        event.extend(now().to_le_bytes());
        event.push(2 << 3); // field 2, step: varint
        varint(&mut event, step);
        what(&mut event);
        self.file.write_all(&record(&event)).map_err(Error::io("write", &self.path))
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// A field of bytes, text or a message: tag, length, content.
fn bytes_field(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    out.push(field << 3 | 2);
    varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Length and content, each with its checksum.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked_crc(&length), data, &masked_crc(data)].concat()
}

/// TFRecord's masked CRC: rotated by 15 bits, plus a constant.
fn masked_crc(bytes: &[u8]) -> [u8; 4] {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// CRC-32C (Castagnoli, reflected), bit by bit: a few dozen bytes now and then.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_of_the_standard() {
        // RFC 3720, B.4, and the usual check value
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn numbers_in_seven_bits() {
        let mut out = Vec::new();
        varint(&mut out, 300);
        varint(&mut out, 5);
        assert_eq!(out, [0xac, 0x02, 0x05]);
    }
}
