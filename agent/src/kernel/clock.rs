//! The kernel's clock.

/// `CLOCK_MONOTONIC` in nanoseconds: what `bpf_ktime_get_ns` answers.
pub fn monotonic() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // Both parts are never negative for this clock.
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}
