//! Connections begun as fast as one thread can.

use std::{
    collections::BTreeMap,
    io,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use socket2::{Domain, SockAddr, Socket, Type};

use super::{emit, outcome::failed, reports::ConnectFloodReport, roles::ConnectFlood};

/// Between two looks at the clock.
const BATCH: u32 = 256;

pub(super) fn play(role: &ConnectFlood) -> Result<()> {
    let to = SockAddr::from(role.to);
    let start = Instant::now();
    let mut outcomes: BTreeMap<Option<i32>, u64> = BTreeMap::new();
    while start.elapsed() < Duration::from_millis(role.for_ms) {
        for _ in 0..BATCH {
            let socket =
                Socket::new(Domain::for_address(role.to), Type::STREAM.nonblocking(), None)
                    .context("socket")?;
            let errno = socket.connect(&to).err().and_then(|error| error.raw_os_error());
            *outcomes.entry(errno).or_default() += 1;
        }
    }
    let in_progress = rustix::io::Errno::INPROGRESS.raw_os_error();
    let mut report = ConnectFloodReport::default();
    for (errno, count) in outcomes {
        let name = match errno {
            Some(errno) if errno != in_progress => {
                failed("connect", &io::Error::from_raw_os_error(errno))
            }
            _ => "begun".to_owned(),
        };
        *report.outcomes.entry(name).or_default() += count;
    }
    report.took_ms = start.elapsed().as_millis().try_into().unwrap_or(u64::MAX);
    emit("report", &report);
    Ok(())
}
