//! What crosses a link: an AF_PACKET socket, a pcap file, and questions about it.
//!
//! "No clear text crossed" is only worth something if the same capture and the same search
//! find the text when it does cross, and if nothing was lost: see [`Captured::find`] and
//! [`Captured::complete`].

pub mod packet;
pub mod pcap;
pub mod streams;

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufWriter, ErrorKind, Read, Write},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, anyhow};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use self::packet::{Packet, Transport};
use crate::netns;

/// The port on which pods accept tunnels.
pub const TUNNEL_PORT: u16 = 15008;

/// `ETH_P_ALL` in network byte order.
const ALL_PROTOCOLS: i32 = (0x0003_u16).to_be() as i32;
/// Longest frame: a GSO packet of 64 KiB and its headers.
const FRAME: usize = 66 * 1024;
/// The socket's buffer: a burst that the thread needs time for must not be lost.
const BUFFER: usize = 64 << 20;

/// How many frames there were.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    /// In the file.
    captured: u64,
    /// Received by the switch's ports, by their own counters.
    received: u64,
}

/// A capture that runs.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Counts>>>,
    file: PathBuf,
    received_before: u64,
}

impl Capture {
    /// Captures every frame that any device of the namespace receives.
    pub(crate) fn start(namespace: &Path, file: &Path) -> Result<Self> {
        let socket = netns::inside(namespace, || {
            let socket =
                Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(ALL_PROTOCOLS)))
                    .context("AF_PACKET socket")?;
            let bridge = rustix::net::netdevice::name_to_index(&socket, "br0").context("br0")?;
            socket.attach_filter(&only_received_on_ports(bridge)).context("capture filter")?;
            Ok(socket)
        })?;
        rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER)
            .context("capture buffer")?;
        socket.set_read_timeout(Some(Duration::from_millis(50))).context("capture timeout")?;
        let received_before = received(namespace)?;
        let stop = Arc::new(AtomicBool::new(false));
        let writer =
            BufWriter::new(File::create(file).with_context(|| file.display().to_string())?);
        let (flag, place) = (Arc::clone(&stop), namespace.to_owned());
        let thread = std::thread::Builder::new()
            .name("capture".into())
            .spawn(move || record(socket, writer, &flag, &place))
            .context("capture thread")?;
        Ok(Self { stop, thread: Some(thread), file: file.to_owned(), received_before })
    }

    /// Ends the capture and reads it.
    pub fn stop(mut self) -> Result<Captured> {
        let Counts { captured, received } = self.end()?;
        let mut all = Captured::read(&self.file)?;
        all.lost = received.saturating_sub(self.received_before).saturating_sub(captured);
        Ok(all)
    }

    fn end(&mut self) -> Result<Counts> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take() {
            Some(thread) => thread.join().map_err(|_| anyhow!("the capture thread panicked"))?,
            None => Ok(Counts::default()),
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

/// Keeps frames that a port received; drops the copies that leave by another port and those
/// that the bridge hands to itself.
fn only_received_on_ports(bridge: u32) -> [SockFilter; 6] {
    // `BPF_LD | BPF_W | BPF_ABS`, `BPF_JMP | BPF_JEQ | BPF_K`, `BPF_RET | BPF_K`.
    const LOAD: u16 = 0x20;
    const JUMP_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    // `SKF_AD_OFF` and, from it, `SKF_AD_PKTTYPE` and `SKF_AD_IFINDEX`.
    const ANCILLARY: u32 = -0x1000_i32 as u32;
    const PACKET_TYPE: u32 = ANCILLARY + 4;
    const INTERFACE: u32 = ANCILLARY + 8;
    const OUTGOING: u32 = 4;
    [
        SockFilter::new(LOAD, 0, 0, PACKET_TYPE),
        SockFilter::new(JUMP_EQUAL, 2, 0, OUTGOING),
        SockFilter::new(LOAD, 0, 0, INTERFACE),
        SockFilter::new(JUMP_EQUAL, 0, 1, bridge),
        SockFilter::new(RETURN, 0, 0, 0),
        SockFilter::new(RETURN, 0, 0, 0x4_0000),
    ]
}

/// Frames that the namespace's switch ports have received.
fn received(namespace: &Path) -> Result<u64> {
    netns::inside(namespace, || {
        let table = std::fs::read_to_string("/proc/thread-self/net/dev").context("net/dev")?;
        Ok(table
            .lines()
            .filter_map(|line| line.trim().split_once(':'))
            .filter(|(device, _)| *device != "lo" && *device != "br0")
            .filter_map(|(_, counters)| counters.split_whitespace().nth(1)?.parse::<u64>().ok())
            .sum())
    })
}

fn record(
    mut socket: Socket,
    mut file: BufWriter<File>,
    stop: &AtomicBool,
    namespace: &Path,
) -> Result<Counts> {
    /// Rounds after which a switch that is never quiet is taken as it is.
    const ROUNDS: u32 = 40;
    let mut frame = vec![0; FRAME];
    let (mut captured, mut received_last, mut rounds) = (0, None, 0);
    pcap::write_header(&mut file).context("pcap header")?;
    loop {
        match socket.read(&mut frame) {
            Ok(length) => {
                pcap::write_packet(&mut file, SystemTime::now(), &frame[..length])
                    .context("pcap")?;
                captured += 1;
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if !stop.load(Ordering::Relaxed) {
                    continue;
                }
                // It ends when two looks at the counters, with an idle moment in between, are
                // the same: then whatever they count has been read, or is lost.
                let received = received(namespace)?;
                rounds += 1;
                if received_last == Some(received) || rounds == ROUNDS {
                    file.flush().context("pcap")?;
                    return Ok(Counts { captured, received: received_last.unwrap_or(received) });
                }
                received_last = Some(received);
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e).context("capture"),
        }
    }
}

/// A capture that has ended.
#[derive(Debug)]
pub struct Captured {
    /// The pcap file.
    pub file: PathBuf,
    /// Frames that crossed and are not in the file.
    pub lost: u64,
    /// Every IP packet, in order.
    pub packets: Vec<Packet>,
}

/// A place where a searched text was found.
#[derive(Clone, Debug)]
pub struct Hit {
    /// Sender.
    pub from: (IpAddr, u16),
    /// Receiver.
    pub to: (IpAddr, u16),
    /// `tcp`, `udp` or `ip`.
    pub protocol: &'static str,
}

impl Captured {
    /// Reads a pcap file.
    pub fn read(file: &Path) -> Result<Self> {
        let bytes = std::fs::read(file).with_context(|| file.display().to_string())?;
        let packets = pcap::frames(&bytes)
            .with_context(|| file.display().to_string())?
            .filter_map(|(time, frame)| Packet::parse(time, frame))
            .collect();
        Ok(Self { file: file.to_owned(), lost: 0, packets })
    }

    /// Errors when a frame is missing: then what was not found proves nothing.
    pub fn complete(&self) -> Result<&Self> {
        anyhow::ensure!(self.lost == 0, "the capture lost {} frames", self.lost);
        Ok(self)
    }

    /// Everywhere that `needle` crossed in clear: in one packet, or over several of a stream.
    pub fn find(&self, needle: &str) -> Vec<Hit> {
        let needle = needle.as_bytes();
        let mut hits: Vec<Hit> = self
            .packets
            .iter()
            .filter(|p| contains(p.payload(), needle))
            .map(|p| Hit { from: p.from(), to: p.to(), protocol: p.protocol_name() })
            .collect();
        for (key, stream) in self.tcp_streams() {
            let (from, to) = (key.from, key.to);
            let seen = |h: &Hit| h.from == from && h.to == to;
            if !hits.iter().any(seen) && stream.contains(needle) {
                hits.push(Hit { from, to, protocol: "tcp" });
            }
        }
        hits
    }

    /// Both directions of every TCP connection, put back in order.
    pub fn tcp_streams(&self) -> BTreeMap<streams::Key, streams::Stream> {
        streams::reassemble(&self.packets)
    }

    /// TCP packets between two sets of addresses, in either direction.
    pub fn tcp_between(&self, a: &[IpAddr], b: &[IpAddr]) -> Vec<&Packet> {
        self.packets
            .iter()
            .filter(|p| matches!(p.transport, Transport::Tcp { .. }))
            .filter(|p| {
                (a.contains(&p.source) && b.contains(&p.destination))
                    || (b.contains(&p.source) && a.contains(&p.destination))
            })
            .collect()
    }

    /// Errors unless all TCP between the two is TLS 1.3 on the tunnel port, and there is some.
    ///
    /// Packets without data (a refused SYN and its reset) to other ports are errors too: the
    /// client was not to dial at all. The returned number is that of TLS records seen.
    pub fn only_tunnels_between(&self, a: &[IpAddr], b: &[IpAddr]) -> Result<usize> {
        self.complete()?;
        let packets = self.tcp_between(a, b);
        for packet in &packets {
            let (from, to) = (packet.from(), packet.to());
            anyhow::ensure!(
                from.1 == TUNNEL_PORT || to.1 == TUNNEL_PORT,
                "TCP outside the tunnel: {}:{} -> {}:{} ({} bytes)",
                from.0,
                from.1,
                to.0,
                to.1,
                packet.payload().len()
            );
        }
        let mut records = 0;
        for (key, stream) in self.tcp_streams() {
            let within = (a.contains(&key.from.0) && b.contains(&key.to.0))
                || (b.contains(&key.from.0) && a.contains(&key.to.0));
            if within {
                records += stream
                    .tls13_records(key.from.1 == TUNNEL_PORT)
                    .with_context(|| format!("{:?} -> {:?}", key.from, key.to))?;
            }
        }
        anyhow::ensure!(records > 0, "no tunnel between {a:?} and {b:?} in the capture");
        Ok(records)
    }
}

/// True when `needle` occurs in `hay`.
pub(crate) fn contains(hay: &[u8], needle: &[u8]) -> bool {
    !needle.is_empty() && hay.windows(needle.len()).any(|w| w == needle)
}
