//! Verdicts that the kernel gave: from the ring buffer to a channel.

use std::path::Path;

use aya::maps::{Map, MapData, RingBuf};
use signet_ebpf::abi::Event;
use tokio::{io::unix::AsyncFd, sync::mpsc};

use super::KernelError;

/// Reads the ring and sends every event, until the receiver is gone.
///
/// Waiting on a full channel leaves events in the ring: what does not fit there is counted
/// by the programs as lost.
///
/// # Errors
/// Where the pinned ring cannot be opened or polled.
pub async fn run(pins: &Path, events: mpsc::Sender<Event>) -> Result<(), KernelError> {
    let failed = |action| move |source| KernelError::Map { map: "EVENTS", action, source };
    let ring = MapData::from_pin(pins.join("EVENTS"))
        .and_then(|data| RingBuf::try_from(Map::RingBuf(data)))
        .map_err(failed("open"))?;
    let io = |source| KernelError::Io { what: "the ring of events".into(), source };
    // SAFETY: the ring owns its map's descriptor, which stays open and the same one until the
    // ring is dropped, and `AsyncFd` owns the ring.
    let mut ring = unsafe { AsyncFd::register(ring) }.map_err(|error| io(error.into()))?;
    loop {
        let mut ready = ring.readable_mut().await.map_err(io)?;
        let ring = ready.get_inner_mut();
        // An item borrows the ring, so it is copied out before waiting for the channel.
        while let Some(event) = ring.next().map(|item| Event::from_bytes(&item)) {
            match event {
                Some(event) => {
                    if events.send(event).await.is_err() {
                        return Ok(());
                    }
                }
                None => tracing::error!("an event of another length is in the ring: ignored"),
            }
        }
        ready.clear_ready();
    }
}
