//! PING while a connection lives: a peer that is gone is noticed in half a minute, not
//! when TCP gives up.

use std::{future::poll_fn, time::Duration};

use h2::{Ping, PingPong};
use tokio::time::{sleep, timeout};

use super::{HboneError, Settings};

/// Sends PINGs for ever; returns why the connection is dead.
pub(super) async fn keepalive(ping_pong: Option<PingPong>, settings: Settings) -> HboneError {
    let Some(mut ping_pong) = ping_pong else {
        // Taken already: only one keepalive a connection is ever started.
        return std::future::pending().await;
    };
    loop {
        sleep(settings.ping_every).await;
        if let Err(error) = once(&mut ping_pong, settings.ping_timeout).await {
            return error;
        }
    }
}

async fn once(ping_pong: &mut PingPong, limit: Duration) -> Result<(), HboneError> {
    ping_pong.send_ping(Ping::opaque())?;
    match timeout(limit, poll_fn(|cx| ping_pong.poll_pong(cx))).await {
        Ok(pong) => pong.map(drop).map_err(HboneError::Http2),
        Err(_) => Err(HboneError::PingTimeout(limit)),
    }
}
