//! Damages checkpoints at random and imports them: nothing may panic, hang or take much memory.
//!
//! ```sh
//! cargo run --release --example fuzz_import -- MINUTES [SEED] -- CHECKPOINT...
//! ```
//!
//! Small checkpoints make good seeds: `.pt` of either format and `.safetensors`. An archive's pickle
//! is damaged and packed again, so that its checksum doesn't stop the damage at the door. The input
//! under test lies in a temporary file, whose name a panic leaves on the screen.

use melglow::import::{self, Options};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::error::Error;
use std::io::{Cursor, Read, Write};
use std::time::{Duration, Instant};

/// Longest that one input may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Opcodes of pickles, to be thrown in.
const OPCODES: &[u8] =
    b".()0123NIJKLMFGXBCTUSVabcdeghijlopqrstuPQR\x80\x81\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8e\x8f\x90\x91\x92\x93\x94\x95\x96";

/// A file to be damaged: its bytes, or an archive's pickle and its other entries.
enum Seed {
    Plain(Vec<u8>),
    Archive { name: String, pickle: Vec<u8>, rest: Vec<(String, Vec<u8>)> },
}

impl Seed {
    fn read(path: &str) -> Result<Self, Box<dyn Error>> {
        let bytes = std::fs::read(path)?;
        if !bytes.starts_with(b"PK") {
            return Ok(Self::Plain(bytes));
        }
        let mut archive = melglow::torch::open_archive(Cursor::new(bytes))?;
        let (mut found, mut rest) = (None, Vec::new());
        for index in 0..archive.len() {
            let mut entry = archive.by_index(index)?;
            let (name, mut bytes) = (entry.name()?.into_owned(), Vec::new());
            entry.read_to_end(&mut bytes)?;
            if name.ends_with("data.pkl") {
                found = Some((name, bytes));
            } else {
                rest.push((name, bytes));
            }
        }
        let (name, pickle) = found.ok_or("an archive without data.pkl")?;
        Ok(Self::Archive { name, pickle, rest })
    }

    fn damaged(&self, rng: &mut ChaCha8Rng) -> Result<Vec<u8>, Box<dyn Error>> {
        match self {
            Self::Plain(bytes) => Ok(damage(bytes, rng)),
            Self::Archive { name, pickle, rest } => {
                let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
                let stored =
                    zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
                writer.start_file(name.as_str(), stored)?;
                writer.write_all(&damage(pickle, rng))?;
                for (name, bytes) in rest {
                    // now and then a storage is short
                    let keep = if rng.next_u32().is_multiple_of(500) { bytes.len() / 2 } else { bytes.len() };
                    writer.start_file(name.as_str(), stored)?;
                    writer.write_all(&bytes[..keep])?;
                }
                let bytes = writer.finish()?.into_inner();
                // and now and then the archive itself is damaged
                Ok(if rng.next_u32().is_multiple_of(8) { damage(&bytes, rng) } else { bytes })
            }
        }
    }
}

/// A few random edits. Headers and pickles stand near the start: most edits, too.
fn damage(bytes: &[u8], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..1 + rng.next_u32() % 6 {
        if bytes.is_empty() {
            break;
        }
        let mut below = |n: usize| rng.next_u64() as usize % n;
        let reach = [64, 1024, 16_384, usize::MAX][below(4)].min(bytes.len());
        let (at, other) = (below(reach), below(reach));
        let end = (at + 1 + below(40)).min(bytes.len());
        match below(9) {
            0 => bytes[at] = below(256) as u8,
            1 => bytes[at] ^= 1 << below(8),
            2 => bytes[at] = OPCODES[below(OPCODES.len())],
            3 => bytes.insert(at, OPCODES[below(OPCODES.len())]),
            4 => drop(bytes.drain(at..end)),
            5 => {
                let piece = bytes[at..end].repeat([1, 2, 100, 20_000][below(4)]);
                drop(bytes.splice(other..other, piece));
            }
            // a number at its limits
            6 => {
                let extreme = [0, u64::MAX, 1 << 62, 1 << 31, u64::from(u32::MAX)][below(5)].to_le_bytes();
                let width = [1, 2, 4, 8][below(4)].min(bytes.len() - at);
                bytes[at..][..width].copy_from_slice(&extreme[..width]);
            }
            7 => bytes.truncate(at),
            _ => {
                let width = (end - at).min(bytes.len() - other);
                bytes.copy_within(at..at + width, other);
            }
        }
    }
    bytes
}

/// The most memory that this process ever held, MB; nothing where the system doesn't say.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kb| kb / 1024)
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let usage = "usage: fuzz_import MINUTES [SEED] -- CHECKPOINT...";
    let split = args.iter().position(|arg| arg == "--").ok_or(usage)?;
    let minutes: f64 = args.first().ok_or(usage)?.parse()?;
    let seed: u64 = if split > 1 { args[1].parse()? } else { 0 };
    let seeds = args[split + 1..].iter().map(|path| Seed::read(path)).collect::<Result<Vec<_>, _>>()?;
    if seeds.is_empty() {
        return Err(usage.into());
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let file = tempfile::NamedTempFile::new()?;
    println!("input under test: {}", file.path().display());
    let (begun, mut slowest) = (Instant::now(), Duration::ZERO);
    let (mut inputs, mut imported, mut said) = (0u64, 0u64, std::collections::BTreeSet::new());
    while begun.elapsed().as_secs_f64() < 60.0 * minutes {
        let bytes = seeds[rng.next_u32() as usize % seeds.len()].damaged(&mut rng)?;
        std::fs::write(file.path(), &bytes)?;
        let now = Instant::now();
        match import::import(file.path(), "fuzz", &Options::default()) {
            Ok(_) => imported += 1,
            Err(error) => {
                let line = error.to_string();
                assert!(!line.contains('\n'), "more than one line: {line:?}");
                // the kind of message: its words without names and numbers
                let words = line.rsplit("/").next().unwrap_or_default().split(' ').skip(1).take(4);
                said.insert(words.filter(|word| word.chars().all(char::is_alphabetic)).collect::<Vec<_>>().join(" "));
            }
        }
        let _ = import::describe(file.path());
        slowest = slowest.max(now.elapsed());
        assert!(now.elapsed() < PATIENCE, "{:?} for one input", now.elapsed());
        inputs += 1;
    }
    let kinds = said.len();
    let memory = peak_memory().map_or_else(String::new, |mb| format!(", {mb} MB of memory at most"));
    println!(
        "{inputs} inputs, {imported} imported all the same, {kinds} kinds of refusal, slowest {slowest:?}{memory}"
    );
    Ok(())
}
