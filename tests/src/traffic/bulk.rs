//! Bulk transfers with checksums, half-close and abrupt ends.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;

use super::{
    dial, echo, emit,
    hammer::reset,
    outcome::failed,
    reports::BulkReport,
    roles::{Bulk, BulkDirection},
};

const BLOCK: usize = 64 << 10;
const UP_SEED: u64 = 0x5157_e711_ab01;
const DOWN_SEED: u64 = 0x0d06_f00d_5eed;
/// Direction, bytes, bytes until the server aborts (0: never).
const HEADER: usize = 17;
/// Count and checksum of what the server received.
const RESULT: usize = 16;

pub(super) fn play(role: &Bulk) -> Result<()> {
    let begin = Instant::now();
    let mut report = BulkReport::default();
    report.outcome = match transfer(role, &mut report) {
        Ok(()) => "complete".into(),
        Err(outcome) => outcome,
    };
    report.elapsed_ms = begin.elapsed().as_millis() as u64;
    emit("report", &report);
    Ok(())
}

fn transfer(role: &Bulk, report: &mut BulkReport) -> Result<(), String> {
    let mut stream = dial::connect(role.to, Duration::from_millis(role.timeout_ms))?;
    let (up, down) = match role.direction {
        BulkDirection::Up => (true, false),
        BulkDirection::Down => (false, true),
        BulkDirection::Both => (true, true),
    };
    let mut header = [echo::BULK; HEADER + 1];
    header[1] = u8::from(up) | u8::from(down) << 1;
    header[2..10].copy_from_slice(&role.bytes.to_be_bytes());
    header[10..].copy_from_slice(&role.server_aborts_after.to_be_bytes());
    stream.write_all(&header).map_err(|e| failed("write", &e))?;
    let writer = stream.try_clone().map_err(|e| failed("socket", &e))?;
    let (sent, received) = thread::scope(|scope| {
        let sender = scope.spawn(move || send(role, &writer, up));
        let received = receive(role, &mut stream, down, up);
        let sent = sender.join().unwrap_or_else(|_| (0, Err("write:panic".into())));
        (sent, received)
    });
    report.sent = sent.0;
    report.received = received.count;
    report.down_equal = down.then_some(received.down_equal);
    report.up_equal = received.up_equal;
    sent.1.and(received.outcome)
}

fn send(role: &Bulk, stream: &TcpStream, up: bool) -> (u64, Result<(), String>) {
    if !up {
        if role.half_close_first {
            return (0, stream.shutdown(Shutdown::Write).map_err(|e| failed("shutdown", &e)));
        }
        return (0, Ok(()));
    }
    let limit = if role.client_aborts_after == 0 { role.bytes } else { role.client_aborts_after };
    let (sent, outcome) = write_generated(stream, UP_SEED, limit.min(role.bytes));
    if let Err(outcome) = outcome {
        return (sent, Err(outcome));
    }
    if role.client_aborts_after != 0 {
        let aborted = reset(stream).and_then(|()| stream.shutdown(Shutdown::Both));
        return (sent, aborted.map_err(|e| failed("linger", &e)).and(Err("aborted".into())));
    }
    // The server must see the end of the upload while it can still answer.
    (sent, stream.shutdown(Shutdown::Write).map_err(|e| failed("shutdown", &e)))
}

struct Received {
    count: u64,
    down_equal: bool,
    up_equal: Option<bool>,
    outcome: Result<(), String>,
}

/// Reads the download, then the server's result for the upload, then the end.
fn receive(role: &Bulk, stream: &mut TcpStream, down: bool, up: bool) -> Received {
    let mut received = Received { count: 0, down_equal: false, up_equal: None, outcome: Ok(()) };
    let expected = if down { role.bytes } else { 0 };
    let mut sum = Checksum::default();
    let mut tail = Vec::new();
    let mut buffer = vec![0; BLOCK];
    let begin = Instant::now();
    loop {
        let read = match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) => {
                received.outcome = Err(failed("read", &error));
                return received;
            }
        };
        let data = (expected - received.count).min(read as u64) as usize;
        sum.add(&buffer[..data]);
        tail.extend_from_slice(&buffer[data..read]);
        received.count += data as u64;
        if role.read_rate != 0 {
            let due = Duration::from_secs_f64(received.count as f64 / role.read_rate as f64);
            thread::sleep(due.saturating_sub(begin.elapsed()));
        }
    }
    if received.count < expected {
        // A clean end before all has come would be a truncation that nobody notices.
        received.outcome = Err("read:EOF".into());
        return received;
    }
    received.down_equal = sum.value() == generated_checksum(DOWN_SEED, expected);
    if up {
        received.up_equal = Some(
            tail.len() == RESULT && {
                let (count, value) = tail.split_at(8);
                count == role.bytes.to_be_bytes()
                    && value == generated_checksum(UP_SEED, role.bytes).to_be_bytes()
            },
        );
    }
    received
}

/// The server's side, after the first byte.
pub(super) fn serve(mut stream: TcpStream) -> std::io::Result<()> {
    let mut header = [0; HEADER];
    stream.read_exact(&mut header)?;
    let number = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&header[at..at + 8]);
        u64::from_be_bytes(bytes)
    };
    let (up, down) = (header[0] & 1 != 0, header[0] & 2 != 0);
    let (bytes, aborts_after) = (number(1), number(9));
    let writer = stream.try_clone()?;
    let (uploaded, downloaded) = thread::scope(|scope| {
        let sender = down.then(|| {
            let limit = if aborts_after == 0 { bytes } else { aborts_after.min(bytes) };
            let writer = &writer;
            scope.spawn(move || write_generated(writer, DOWN_SEED, limit))
        });
        let uploaded = up.then(|| read_all(&mut stream, aborts_after));
        (uploaded, sender.map(std::thread::ScopedJoinHandle::join))
    });
    drop(downloaded);
    if aborts_after != 0 {
        return reset(&stream);
    }
    if let Some((count, sum)) = uploaded {
        let mut result = [0; RESULT];
        result[..8].copy_from_slice(&count.to_be_bytes());
        result[8..].copy_from_slice(&sum.to_be_bytes());
        stream.write_all(&result)?;
    }
    stream.shutdown(Shutdown::Write)
}

fn read_all(stream: &mut TcpStream, limit: u64) -> (u64, u64) {
    let (mut count, mut sum, mut buffer) = (0, Checksum::default(), vec![0; BLOCK]);
    while let Ok(read @ 1..) = stream.read(&mut buffer) {
        sum.add(&buffer[..read]);
        count += read as u64;
        if limit != 0 && count >= limit {
            break;
        }
    }
    (count, sum.value())
}

fn write_generated(mut stream: &TcpStream, seed: u64, bytes: u64) -> (u64, Result<(), String>) {
    let mut generator = Generator(seed);
    let mut block = vec![0; BLOCK];
    let mut sent = 0;
    while sent < bytes {
        generator.fill(&mut block);
        let now = (bytes - sent).min(BLOCK as u64) as usize;
        if let Err(error) = stream.write_all(&block[..now]) {
            return (sent, Err(failed("write", &error)));
        }
        sent += now as u64;
    }
    (sent, Ok(()))
}

fn generated_checksum(seed: u64, bytes: u64) -> u64 {
    let (mut generator, mut block) = (Generator(seed), vec![0; BLOCK]);
    let (mut sum, mut left) = (Checksum::default(), bytes);
    while left > 0 {
        generator.fill(&mut block);
        let now = left.min(BLOCK as u64) as usize;
        sum.add(&block[..now]);
        left -= now as u64;
    }
    sum.value()
}

/// xorshift64: bytes that neither repeat nor compress.
struct Generator(u64);

impl Generator {
    fn fill(&mut self, block: &mut [u8]) {
        for word in block.chunks_exact_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            word.copy_from_slice(&self.0.to_le_bytes());
        }
    }
}

/// A checksum of a byte stream, however it is cut into pieces.
#[derive(Default)]
struct Checksum {
    sum: u64,
    partial: [u8; 8],
    filled: usize,
    count: u64,
}

impl Checksum {
    fn add(&mut self, mut bytes: &[u8]) {
        self.count += bytes.len() as u64;
        if self.filled > 0 {
            let take = (8 - self.filled).min(bytes.len());
            self.partial[self.filled..self.filled + take].copy_from_slice(&bytes[..take]);
            self.filled += take;
            bytes = &bytes[take..];
            if self.filled < 8 {
                return;
            }
            self.word(self.partial);
            self.filled = 0;
        }
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.word(*word);
        }
        self.partial[..rest.len()].copy_from_slice(rest);
        self.filled = rest.len();
    }

    fn word(&mut self, word: [u8; 8]) {
        self.sum = (self.sum ^ u64::from_le_bytes(word)).wrapping_mul(0x0100_0000_01b3);
        self.sum = self.sum.rotate_left(23);
    }

    fn value(&self) -> u64 {
        let mut sum = self.sum;
        for byte in &self.partial[..self.filled] {
            sum = (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
        sum ^ self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_depends_on_content_and_order_but_not_on_the_cuts() {
        let mut bytes = vec![0; 4096];
        Generator(1).fill(&mut bytes);
        let whole = |bytes: &[u8]| {
            let mut sum = Checksum::default();
            sum.add(bytes);
            sum.value()
        };
        let mut cut = Checksum::default();
        for piece in bytes.chunks(7) {
            cut.add(piece);
        }
        assert_eq!(cut.value(), whole(&bytes));
        let mut swapped = bytes.clone();
        swapped.swap(100, 3000);
        assert_ne!(whole(&swapped), whole(&bytes));
        assert_ne!(whole(&bytes[..4095]), whole(&bytes));
    }
}
