//! One dial, as an application makes it.

use std::{
    io::{BufRead, BufReader, Error, ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::Result;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::{
    emit,
    outcome::failed,
    reports::{DialReport, Seen},
    roles::Dial,
};

/// IPPROTO_MPTCP.
const MPTCP: i32 = 262;

pub(super) fn play(role: &Dial) -> Result<()> {
    emit("report", &dial(role));
    Ok(())
}

/// Dials and reports.
pub(super) fn dial(role: &Dial) -> DialReport {
    let begin = Instant::now();
    let mut report = DialReport {
        outcome: String::new(),
        connect_us: 0,
        total_us: 0,
        peer: None,
        local: None,
        seen: None,
    };
    report.outcome = match attempt(role, begin, &mut report) {
        Ok(()) => "answered".into(),
        Err(outcome) => outcome,
    };
    report.total_us = begin.elapsed().as_micros() as u64;
    report
}

fn attempt(role: &Dial, begin: Instant, report: &mut DialReport) -> Result<(), String> {
    let socket = socket(role)?;
    let timeout = Duration::from_millis(role.timeout_ms);
    let connected = socket.connect_timeout(&SockAddr::from(role.to), timeout);
    report.connect_us = begin.elapsed().as_micros() as u64;
    connected.map_err(|e| failed("connect", &e))?;
    let mut stream = TcpStream::from(socket);
    report.peer = stream.peer_addr().ok();
    report.local = stream.local_addr().ok();
    report.seen = Some(hello(&mut stream, &role.text, timeout)?);
    Ok(())
}

fn socket(role: &Dial) -> Result<Socket, String> {
    let protocol = if role.mptcp { Protocol::from(MPTCP) } else { Protocol::TCP };
    let socket = Socket::new(Domain::for_address(role.to), Type::STREAM, Some(protocol))
        .map_err(|e| failed("socket", &e))?;
    if role.transparent {
        transparent(&socket, role.to.ip()).map_err(|e| failed("transparent", &e))?;
    }
    if let Some(device) = &role.device {
        socket.bind_device(Some(device.as_bytes())).map_err(|e| failed("device", &e))?;
    }
    if let Some(bind) = role.bind {
        socket.set_reuse_address(true).map_err(|e| failed("bind", &e))?;
        socket.bind(&bind.into()).map_err(|e| failed("bind", &e))?;
    }
    Ok(socket)
}

fn transparent(socket: &Socket, towards: IpAddr) -> Result<(), Error> {
    match towards {
        IpAddr::V4(_) => socket.set_ip_transparent_v4(true),
        IpAddr::V6(_) => socket.set_freebind_v6(true),
    }
}

/// Says hello to a TCP server of the lab and reads what it sees.
pub(super) fn hello(stream: &mut TcpStream, text: &str, timeout: Duration) -> Result<Seen, String> {
    stream.set_read_timeout(Some(timeout)).map_err(|e| failed("socket", &e))?;
    stream.set_write_timeout(Some(timeout)).map_err(|e| failed("socket", &e))?;
    if text.is_empty() {
        let got = stream.read(&mut [0]).map_err(|e| failed("read", &e))?;
        return Err(if got == 0 { "read:EOF".into() } else { "read:unexpected".into() });
    }
    stream.write_all(format!("hello {text}\n").as_bytes()).map_err(|e| failed("write", &e))?;
    let mut line = String::new();
    BufReader::new(&*stream).read_line(&mut line).map_err(|e| failed("read", &e))?;
    if line.is_empty() {
        return Err(failed("read", &Error::from(ErrorKind::UnexpectedEof)));
    }
    serde_json::from_str(&line).map_err(|_| format!("read:not an answer: {}", line.trim()))
}

/// Connects plainly, with a limit.
pub(super) fn connect(to: SocketAddr, timeout: Duration) -> Result<TcpStream, String> {
    let stream = TcpStream::connect_timeout(&to, timeout).map_err(|e| failed("connect", &e))?;
    stream.set_read_timeout(Some(timeout)).map_err(|e| failed("socket", &e))?;
    stream.set_write_timeout(Some(timeout)).map_err(|e| failed("socket", &e))?;
    Ok(stream)
}
