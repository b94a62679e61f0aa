//! Very many short connections, each with a nonce for the destination that it dialled.

use std::{
    io::{Error, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use socket2::{Domain, Socket, Type};

use super::{
    echo::Nonce,
    emit,
    outcome::{failed, name},
    reports::HammerReport,
    roles::{Hammer, HammerKind},
};

pub(super) fn play(role: Hammer) -> Result<()> {
    ensure!(!role.to.is_empty() && !role.kinds.is_empty(), "no destination or no kind");
    let begin = Instant::now();
    let next = AtomicU64::new(0);
    let report = Mutex::new(HammerReport::default());
    thread::scope(|scope| {
        for _ in 0..role.parallel.max(1) {
            scope.spawn(|| {
                let mut own = HammerReport::default();
                loop {
                    let number = next.fetch_add(1, Relaxed);
                    if number >= role.count {
                        break;
                    }
                    connection(&role, number, &mut own);
                }
                add(&mut report.lock().unwrap_or_else(PoisonError::into_inner), own);
            });
        }
    });
    let mut report = report.into_inner().unwrap_or_else(PoisonError::into_inner);
    report.elapsed_ms = begin.elapsed().as_millis() as u64;
    emit("report", &report);
    Ok(())
}

fn connection(role: &Hammer, number: u64, report: &mut HammerReport) {
    let (to, tag) = role.to[(number / role.kinds.len() as u64) as usize % role.to.len()];
    let kind = role.kinds[number as usize % role.kinds.len()];
    let bind = (role.bind_every != 0 && number.is_multiple_of(role.bind_every)).then(|| {
        let span = u64::from(role.bind_span.max(1));
        role.bind_from + (number / role.bind_every % span) as u16
    });
    report.tried += 1;
    match one(role, to, tag, kind, bind) {
        Ok(End::Answered) => report.answered += 1,
        Ok(End::Misdirected) => report.misdirected += 1,
        Ok(End::Cut) => report.cut += 1,
        Ok(End::PortInUse) => report.port_in_use += 1,
        Err(failure) => *report.failures.entry(failure).or_default() += 1,
    }
}

enum End {
    Answered,
    Misdirected,
    Cut,
    PortInUse,
}

fn one(
    role: &Hammer,
    to: SocketAddr,
    tag: u32,
    kind: HammerKind,
    bind: Option<u16>,
) -> Result<End, String> {
    let timeout = Duration::from_millis(role.timeout_ms);
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)
        .map_err(|e| failed("socket", &e))?;
    if let Some(port) = bind {
        let any: IpAddr =
            if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        socket.set_reuse_address(true).map_err(|e| failed("bind", &e))?;
        if let Err(error) = socket.bind(&SocketAddr::from((any, port)).into()) {
            return in_use(&error).ok_or_else(|| failed("bind", &error));
        }
    }
    if let Err(error) = socket.connect_timeout(&to.into(), timeout) {
        let collision = bind.and_then(|_| in_use(&error));
        return collision.ok_or_else(|| failed("connect", &error));
    }
    let mut stream = TcpStream::from(socket);
    let nonce = Nonce { random: uuid::Uuid::new_v4().as_u128() as u64, tag, port: to.port() };
    let sent = stream.write_all(&nonce.to_bytes());
    match kind {
        HammerKind::Close => Ok(End::Cut),
        HammerKind::Reset => {
            reset(&stream).map_err(|e| failed("linger", &e))?;
            Ok(End::Cut)
        }
        HammerKind::Normal => {
            sent.map_err(|e| failed("write", &e))?;
            stream.set_read_timeout(Some(timeout)).map_err(|e| failed("socket", &e))?;
            let mut answer = [0; Nonce::LENGTH];
            stream.read_exact(&mut answer).map_err(|e| failed("read", &e))?;
            if bind.is_some() {
                // No TIME_WAIT, or the few ports would be used up at once.
                reset(&stream).map_err(|e| failed("linger", &e))?;
            }
            Ok(if answer == nonce.to_bytes() { End::Answered } else { End::Misdirected })
        }
    }
}

/// The close that follows is a reset.
pub(super) fn reset(stream: &TcpStream) -> std::io::Result<()> {
    socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO))
}

fn in_use(error: &Error) -> Option<End> {
    matches!(name(error).as_str(), "EADDRINUSE" | "EADDRNOTAVAIL").then_some(End::PortInUse)
}

fn add(sum: &mut HammerReport, own: HammerReport) {
    sum.tried += own.tried;
    sum.answered += own.answered;
    sum.misdirected += own.misdirected;
    sum.cut += own.cut;
    sum.port_in_use += own.port_in_use;
    for (failure, count) in own.failures {
        *sum.failures.entry(failure).or_default() += count;
    }
}
