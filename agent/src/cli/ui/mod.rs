//! `signet ui`: a local page with who talks to whom, how it travels, what is denied and why, and
//! what a stricter mode would break. Served by the command itself, streamed from the agents.

mod graph;
mod live;
mod server;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use jiff::Timestamp;
use tokio::net::TcpListener;

use super::{
    exit::{Exit, Failure},
    flows::parse_time,
    sockets::{self, SocketArgs},
};

/// Arguments of `signet ui`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  signet ui
  signet ui --since 1h --listen 127.0.0.1:8088

It prints an address with a secret in it: only who has that sees the page. The page loads nothing
from elsewhere, and nothing can be changed with it. It ends with Ctrl-C.")]
pub struct UiArgs {
    #[command(flatten)]
    sockets: SocketArgs,
    /// Where the page is served: a loopback address; port 0 takes a free one
    #[arg(long, value_name = "address:port", default_value_t = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0), value_parser = loopback)]
    listen: SocketAddr,
    /// Show what was seen since then (10m, 24h, or a time) [default: seven days]
    #[arg(long, value_name = "time", value_parser = parse_time)]
    since: Option<Timestamp>,
}

fn loopback(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr =
        text.parse().map_err(|_| "not an address with a port, like 127.0.0.1:8088".to_owned())?;
    match address.ip().is_loopback() {
        true => Ok(address),
        false => Err("others would see the page: give a loopback address and forward to it".into()),
    }
}

/// Serves until it is interrupted.
pub async fn run(args: UiArgs) -> Result<Exit, Failure> {
    let (agents, is_complete) = sockets::connect_all(&args.sockets).await?;
    let listener = TcpListener::bind(args.listen).await.map_err(|error| {
        Failure::new(Exit::Usage, format!("--listen {}: {error}; choose another", args.listen))
    })?;
    let address = listener.local_addr().map_err(|e| Failure::caused(Exit::Bug, e))?;
    let token = uuid::Uuid::new_v4().simple().to_string();
    anstream::println!("http://{address}/?token={token}");
    let feed = live::Feed::start(agents, is_complete, args.since);
    let page = server::page(address, &token, feed, args.sockets);
    let served = server::serve(listener, page).await;
    served.map_err(|e| Failure::new(Exit::Host, format!("{address}: {e}")))?;
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_for_this_host_only() {
        assert_eq!(loopback("127.0.0.1:8088"), Ok("127.0.0.1:8088".parse().unwrap()));
        assert_eq!(loopback("[::1]:0"), Ok("[::1]:0".parse().unwrap()));
        for bad in ["0.0.0.0:80", "[::]:80", "10.0.0.1:80", "localhost:80", "80"] {
            assert!(loopback(bad).is_err(), "{bad}");
        }
    }
}
