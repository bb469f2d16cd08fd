//! Standard input that can be left while nothing arrives.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

/// Bytes that are asked for at a time.
const PIECE: usize = 1 << 16;
/// How often is looked whether to go on.
const TICK: Duration = Duration::from_millis(20);

/// Reads what another reader gives, and ends as soon as `stop` is set.
///
/// The other reader sits in a thread of its own, which ends with the reader or the program.
pub(super) struct LiveInput {
    pieces: Receiver<io::Result<Vec<u8>>>,
    piece: Vec<u8>,
    taken: usize,
    stop: Arc<AtomicBool>,
}

impl LiveInput {
    pub fn new(mut reader: impl Read + Send + 'static, stop: Arc<AtomicBool>) -> Self {
        // one piece ahead: whoever writes is to feel when we are slow
        let (sender, pieces) = sync_channel(1);
        std::thread::spawn(move || {
            loop {
                let mut piece = vec![0; PIECE];
                let read = reader.read(&mut piece);
                let over = match &read {
                    Ok(count) => *count == 0,
                    Err(error) => error.kind() != io::ErrorKind::Interrupted,
                };
                let piece = read.map(|count| {
                    piece.truncate(count);
                    piece
                });
                if sender.send(piece).is_err() || over {
                    break;
                }
            }
        });
        Self { pieces, piece: Vec::new(), taken: 0, stop }
    }
}

impl Read for LiveInput {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.taken == self.piece.len() {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(0);
            }
            match self.pieces.recv_timeout(TICK) {
                Ok(piece) => (self.piece, self.taken) = (piece?, 0),
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return Ok(0),
            }
            if self.piece.is_empty() {
                return Ok(0);
            }
        }
        let count = out.len().min(self.piece.len() - self.taken);
        out[..count].copy_from_slice(&self.piece[self.taken..][..count]);
        self.taken += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives a few bytes, and then nothing for ever.
    struct Silent(Option<Vec<u8>>);

    impl Read for Silent {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            let Some(bytes) = self.0.take() else {
                loop {
                    std::thread::park();
                }
            };
            out[..bytes.len()].copy_from_slice(&bytes);
            Ok(bytes.len())
        }
    }

    #[test]
    fn all_bytes_and_the_end_come_through() {
        let bytes: Vec<u8> = (0..200_000).map(|i| (i % 251) as u8).collect();
        let mut input = LiveInput::new(io::Cursor::new(bytes.clone()), Arc::default());
        let mut read = Vec::new();
        input.read_to_end(&mut read).unwrap();
        assert!(read == bytes);
        assert_eq!(input.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn it_can_be_left_while_nothing_arrives() {
        let stop = Arc::new(AtomicBool::new(false));
        let mut input = LiveInput::new(Silent(Some(vec![1, 2, 3])), stop.clone());
        let mut out = [0; 2];
        assert_eq!((input.read(&mut out).unwrap(), out), (2, [1, 2]));
        assert_eq!((input.read(&mut out).unwrap(), out[0]), (1, 3));
        let asked = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(30));
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(input.read(&mut out).unwrap(), 0);
        asked.join().unwrap();
    }
}
