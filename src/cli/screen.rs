//! The terminal while sound plays: keys, a line with position and level, messages between them.

use super::{say, watched};
use crossterm::event::{Event, KeyCode, KeyEventKind, KeyModifiers};
use crossterm::{event, terminal};
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

/// How often the line is drawn anew.
const REDRAW: Duration = Duration::from_millis(50);
/// What the level falls to between two drawings.
const FALL: f32 = 0.7;
/// Signs of the loudest level; each is 2 dB.
const SIGNS: f32 = 30.0;

/// What a person asks for.
pub(super) enum Key {
    /// Space.
    Pause,
    /// q or Escape.
    Leave,
    /// Ctrl-C.
    Interrupt,
}

/// Says something while the line may stand on the terminal, from any thread.
///
/// The terminal doesn't return at a line's end while it gives us keys one by one.
pub(super) fn say_beside_line(message: &str) {
    if watched() {
        let _ = write!(io::stderr().lock(), "\r\x1b[Kmelglow: {message}\r\n");
    } else {
        say(message);
    }
}

/// Keys and the line, where a person has them; the terminal is as before when this is gone.
pub(super) struct Screen {
    keys: bool,
    line: bool,
    drawn: Option<Instant>,
    level: f32,
}

impl Screen {
    /// Takes the terminal over; without keys if standard input is a terminal no person types at.
    pub fn open(keys: bool) -> Self {
        let keys = keys && io::stdin().is_terminal() && watched() && terminal::enable_raw_mode().is_ok();
        Self { keys, line: watched(), drawn: None, level: 0.0 }
    }

    /// Waits for a key until `time` has passed.
    pub fn key(&self, time: Duration) -> Option<Key> {
        if !self.keys {
            std::thread::sleep(time);
            return None;
        }
        match event::poll(time) {
            Ok(true) => {}
            Ok(false) => return None,
            Err(_) => {
                std::thread::sleep(time);
                return None;
            }
        }
        let Event::Key(key) = event::read().ok()? else { return None };
        match key.code {
            _ if key.kind == KeyEventKind::Release => None,
            KeyCode::Char(' ') => Some(Key::Pause),
            KeyCode::Char('q') | KeyCode::Esc => Some(Key::Leave),
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => Some(Key::Interrupt),
            _ => None,
        }
    }

    /// Draws the line anew, if it is time: seconds played of all there are, and the loudest sample
    /// since it was last asked for.
    pub fn draw(&mut self, position: f64, total: Option<f64>, peak: impl FnOnce() -> f32, paused: bool) {
        if !self.line || self.drawn.is_some_and(|at| at.elapsed() < REDRAW) {
            return;
        }
        self.drawn = Some(Instant::now());
        self.level = peak().max(FALL * self.level);
        let mut line = line(position, total, self.level, paused);
        // a line that is broken by the edge can't be drawn over
        if let Ok((columns @ 1.., _)) = terminal::size() {
            line.truncate(usize::from(columns) - 1);
        }
        let _ = write!(io::stderr().lock(), "\r{line}\x1b[K");
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        if self.line {
            let _ = write!(io::stderr().lock(), "\r\x1b[K");
        }
        if self.keys {
            let _ = terminal::disable_raw_mode();
        }
    }
}

fn line(position: f64, total: Option<f64>, level: f32, paused: bool) -> String {
    let clock = |seconds: f64| {
        let tenths = (seconds * 10.0) as u64;
        format!("{}:{:02}.{}", tenths / 600, tenths / 10 % 60, tenths % 10)
    };
    let signs = ((20.0 * level.max(1e-6).log10()) / 2.0 + SIGNS).clamp(0.0, SIGNS);
    let total = total.map(|seconds| format!(" / {}", clock(seconds))).unwrap_or_default();
    let state = if paused { "  paused" } else { "" };
    format!("{}{total}  [{:<30}]{state}", clock(position), "|".repeat(signs as usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_tells_position_level_and_pause() {
        assert_eq!(line(0.0, None, 0.0, false), format!("0:00.0  [{}]", " ".repeat(30)));
        assert_eq!(line(59.98, Some(3661.25), 1.0, false), format!("0:59.9 / 61:01.2  [{}]", "|".repeat(30)));
        let half = format!("{}{}", "|".repeat(15), " ".repeat(15));
        assert_eq!(line(61.0, Some(62.0), 0.0317, true), format!("1:01.0 / 1:02.0  [{half}]  paused"));
    }
}
