//! The last lines of the log, kept in memory for who helps from afar.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tracing_subscriber::fmt::MakeWriter;

use super::scrub::scrub;

/// Lines that are kept.
const MAX_LINES: usize = 2000;
/// Bytes of them together.
const MAX_BYTES: usize = 1 << 20;
/// Bytes of one line; the rest of a longer one is left out.
const MAX_LINE: usize = 8 << 10;

/// The last lines; clones share them. What looks like a key or a token is taken out before a line
/// is kept.
#[derive(Clone, Debug, Default)]
pub struct Recent(Arc<Mutex<Ring>>);

#[derive(Debug, Default)]
struct Ring {
    lines: VecDeque<Box<str>>,
    bytes: usize,
    /// How many there were that are no longer kept.
    gone: u64,
}

impl Recent {
    /// What is kept, oldest first, and how many lines there were before.
    pub fn lines(&self) -> (u64, Vec<String>) {
        let ring = self.ring();
        (ring.gone, ring.lines.iter().map(|line| line.to_string()).collect())
    }

    fn keep(&self, line: &str) {
        let line = line.trim_end_matches('\n');
        let end = (0..=line.len().min(MAX_LINE)).rev().find(|end| line.is_char_boundary(*end));
        let line = &line[..end.unwrap_or(0)];
        let line: Box<str> = scrub(line).into();
        let mut ring = self.ring();
        ring.bytes += line.len();
        ring.lines.push_back(line);
        while ring.lines.len() > MAX_LINES || ring.bytes > MAX_BYTES {
            let Some(oldest) = ring.lines.pop_front() else { break };
            ring.bytes -= oldest.len();
            ring.gone += 1;
        }
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        // Nothing in there is left half done by a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'a> MakeWriter<'a> for Recent {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line { to: self, bytes: Vec::new() }
    }
}

/// A line as it is written; kept when it is dropped.
#[derive(Debug)]
pub struct Line<'a> {
    to: &'a Recent,
    bytes: Vec<u8>,
}

impl io::Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // What goes beyond is of no use: a line of that length is cut.
        let room = (2 * MAX_LINE).saturating_sub(self.bytes.len());
        self.bytes.extend(bytes.iter().take(room));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        if !self.bytes.is_empty() {
            self.to.keep(&String::from_utf8_lossy(&self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn write(recent: &Recent, line: &str) {
        recent.make_writer().write_all(line.as_bytes()).unwrap();
    }

    #[test]
    fn the_last_lines_are_kept_and_the_others_counted() {
        let recent = Recent::default();
        assert_eq!(recent.lines(), (0, vec![]));
        for n in 0..MAX_LINES + 3 {
            write(&recent, &format!("line {n}\n"));
        }
        let (gone, lines) = recent.lines();
        assert_eq!((gone, lines.len()), (3, MAX_LINES));
        assert_eq!((&*lines[0], &*lines[MAX_LINES - 1]), ("line 3", "line 2002"));
    }

    #[test]
    fn memory_is_bounded_by_bytes_too() {
        let recent = Recent::default();
        for _ in 0..1000 {
            write(&recent, &"é".repeat(MAX_LINE));
        }
        let (gone, lines) = recent.lines();
        assert!(lines.iter().all(|line| line.len() <= MAX_LINE && line.chars().all(|c| c == 'é')));
        assert_eq!(lines.len(), MAX_BYTES / MAX_LINE);
        assert_eq!(gone, 1000 - lines.len() as u64);
    }

    #[test]
    fn secrets_are_not_kept() {
        let recent = Recent::default();
        write(&recent, "refused: authorization: Bearer 0123456789abcdef0123 was not taken\n");
        write(&recent, "-----BEGIN PRIVATE KEY-----\nMIGH\n-----END PRIVATE KEY-----\n");
        let (_, lines) = recent.lines();
        assert_eq!(lines, ["refused: authorization: [redacted] was not taken", "[redacted]"]);
    }

    #[test]
    fn the_log_writes_into_it() {
        use tracing_subscriber::layer::SubscriberExt;
        let recent = Recent::default();
        let layer = super::super::logging::recent_layer(&recent);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            tracing::warn!(pod = "shop/payments", "no cgroup");
            // Flows have their own place.
            tracing::info!(target: "access", "a flow");
        });
        let (gone, lines) = recent.lines();
        assert_eq!((gone, lines.len()), (0, 1), "{lines:?}");
        assert!(lines[0].contains("WARN") && lines[0].contains("no cgroup"), "{lines:?}");
        assert!(lines[0].contains("pod=\"shop/payments\""), "{lines:?}");
        assert!(!lines[0].contains('\u{1b}'), "{lines:?}");
    }
}
