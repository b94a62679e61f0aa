//! The server of the lab's small protocol ([`super::echo`]).

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
};

use anyhow::{Context, Result};
use serde_json::json;
use socket2::{Domain, Socket, Type};

use super::{
    bulk,
    echo::{self, Nonce},
    emit, report_when_asked,
    reports::{Seen, TcpServerReport},
    roles::TcpServer,
    unix_micros,
};

#[derive(Default)]
struct Counts {
    accepted: AtomicU64,
    bytes: AtomicU64,
    nonces: AtomicU64,
    misdirected: AtomicU64,
    silent: AtomicU64,
    open: AtomicU64,
}

pub(super) fn play(role: &TcpServer) -> Result<()> {
    let counts = Arc::new(Counts::default());
    let listeners: Vec<TcpListener> =
        role.listen.iter().map(|at| listen(*at)).collect::<Result<_>>()?;
    let asked = Arc::clone(&counts);
    report_when_asked(move || emit("report", &asked.report()));
    let mut threads = Vec::new();
    for listener in listeners {
        let (counts, tag, verbose) = (Arc::clone(&counts), role.tag, role.verbose);
        threads.push(thread::spawn(move || serve(&listener, tag, verbose, &counts)));
    }
    emit("listening", &json!({"on": role.listen}));
    for thread in threads {
        let _ = thread.join();
    }
    Ok(())
}

/// Listens with a backlog that a storm of short connections does not overrun.
pub(super) fn listen(at: SocketAddr) -> Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, None).context("socket")?;
    socket.set_reuse_address(true).context("reuse")?;
    socket.bind(&at.into()).with_context(|| format!("cannot listen on {at}"))?;
    socket.listen(4096).context("listen")?;
    Ok(socket.into())
}

fn serve(listener: &TcpListener, tag: u32, verbose: bool, counts: &Arc<Counts>) {
    loop {
        let Ok((stream, accepted)) = listener.accept() else { continue };
        counts.accepted.fetch_add(1, Relaxed);
        counts.open.fetch_add(1, Relaxed);
        if verbose {
            emit("accepted", &json!({"from": canonical(accepted)}));
        }
        let counts = Arc::clone(counts);
        // Two thousand connections at once, a thread each: small stacks.
        let spawned = thread::Builder::new().stack_size(256 << 10).spawn(move || {
            let _ = answer(stream, accepted, tag, &counts);
            counts.open.fetch_sub(1, Relaxed);
        });
        if spawned.is_err() {
            emit("error", &json!({"error": "no thread for a connection"}));
        }
    }
}

fn answer(
    mut stream: TcpStream,
    accepted: SocketAddr,
    tag: u32,
    counts: &Counts,
) -> std::io::Result<()> {
    let mut first = [0];
    if stream.read(&mut first)? == 0 {
        counts.silent.fetch_add(1, Relaxed);
        return Ok(());
    }
    match first[0] {
        echo::NONCE => nonce(stream, tag, counts),
        echo::BULK => bulk::serve(stream),
        echo::ECHO => echo_all(stream),
        echo::HELLO => hello(stream, accepted, tag, counts),
        _ => {
            counts.bytes.fetch_add(1 + drain(stream), Relaxed);
            Ok(())
        }
    }
}

fn nonce(mut stream: TcpStream, tag: u32, counts: &Counts) -> std::io::Result<()> {
    let mut rest = [0; Nonce::LENGTH - 1];
    stream.read_exact(&mut rest)?;
    counts.bytes.fetch_add(Nonce::LENGTH as u64, Relaxed);
    counts.nonces.fetch_add(1, Relaxed);
    let meant = Nonce::from_rest(rest);
    let port = stream.local_addr()?.port();
    if (meant.tag, meant.port) != (tag, port) {
        counts.misdirected.fetch_add(1, Relaxed);
        emit("misdirected", &json!({"meant": [meant.tag, meant.port], "here": [tag, port]}));
    }
    stream.write_all(&Nonce { tag, port, ..meant }.to_bytes())?;
    // Its end comes from the client, so that the client's close is what is tested.
    drain(stream);
    Ok(())
}

fn hello(
    mut stream: TcpStream,
    accepted: SocketAddr,
    tag: u32,
    counts: &Counts,
) -> std::io::Result<()> {
    let mut line = String::new();
    let read = BufReader::new(&stream).take(64 << 10).read_line(&mut line)?;
    counts.bytes.fetch_add(read as u64 + 1, Relaxed);
    // The first byte, `h`, is gone already.
    let text = line.trim_end().strip_prefix("ello ").unwrap_or(&line).to_owned();
    let seen = Seen {
        accepted: canonical(accepted),
        peer: canonical(stream.peer_addr()?),
        local: canonical(stream.local_addr()?),
        text,
        tag,
        at: unix_micros(),
    };
    emit("hello", &seen);
    writeln!(stream, "{}", serde_json::to_string(&seen)?)?;
    drain(stream);
    Ok(())
}

fn echo_all(mut stream: TcpStream) -> std::io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        let read = stream.read(&mut buffer)?;
        if read == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..read])?;
    }
}

/// Reads to the end; the number of bytes.
fn drain(mut stream: TcpStream) -> u64 {
    let mut buffer = [0; 16 << 10];
    let mut all = 0;
    while let Ok(read @ 1..) = stream.read(&mut buffer) {
        all += read as u64;
    }
    all
}

/// An IPv4 client of a dual-stack listener is shown as IPv4.
pub(super) fn canonical(address: SocketAddr) -> SocketAddr {
    (address.ip().to_canonical(), address.port()).into()
}

impl Counts {
    fn report(&self) -> TcpServerReport {
        TcpServerReport {
            accepted: self.accepted.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            nonces: self.nonces.load(Relaxed),
            misdirected: self.misdirected.load(Relaxed),
            silent: self.silent.load(Relaxed),
            open: self.open.load(Relaxed),
        }
    }
}
