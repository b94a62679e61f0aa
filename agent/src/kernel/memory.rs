//! Gives freed memory back to the kernel.
//!
//! glibc keeps what was freed in the arena of the thread that freed it, for the next
//! allocation. After a flood of handshakes an agent would hold megabytes that nobody uses,
//! on every node, for good. Other C libraries (musl) return memory by themselves.

use std::{io, thread, time::Duration};

use tokio_util::sync::CancellationToken;

/// Well below the ten seconds within which a flood's memory shall be gone; a turn costs
/// tens of microseconds when there is nothing to give back.
const EVERY: Duration = Duration::from_secs(4);

/// Gives freed memory back every few seconds, until told to stop, on a thread of its own: a
/// runtime's threads for blocking calls would never be idle for long enough to end.
///
/// # Errors
/// Where no thread can be made.
pub fn keep_giving_back(stop: CancellationToken) -> io::Result<()> {
    thread::Builder::new().name("memory".into()).spawn(move || {
        while !stop.is_cancelled() {
            give_back();
            thread::sleep(EVERY);
        }
    })?;
    Ok(())
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn give_back() {
    // SAFETY: malloc_trim(3) is thread-safe and touches only memory that nobody holds.
    unsafe { libc::malloc_trim(0) };
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn give_back() {}

#[cfg(all(test, target_os = "linux", target_env = "gnu"))]
mod tests {
    use super::*;

    /// The heap's resident pages in KiB (anonymous memory of this process).
    fn anonymous() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let row = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        row.split_whitespace().next().unwrap().parse().unwrap()
    }

    #[test]
    fn what_was_freed_between_things_in_use_goes_back() {
        // Small pieces in an arena, every sixteenth of them kept: the arena's top cannot shrink.
        let mut pieces: Vec<Vec<u8>> = (0..64_000).map(|_| vec![1; 1024]).collect();
        let full = anonymous();
        let mut n = 0;
        pieces.retain(|_| {
            n += 1;
            n % 16 == 0
        });
        let held = anonymous();
        // The control: without being told, the C library keeps it.
        assert!(full.saturating_sub(held) < 16 << 10, "{full} KiB, then {held} KiB");
        give_back();
        let left = anonymous();
        assert!(held.saturating_sub(left) > 24 << 10, "{held} KiB, then {left} KiB");
        assert_eq!(pieces.len(), 4_000);
    }
}
