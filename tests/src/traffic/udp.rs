//! Datagrams: a server that answers, a client that counts.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use serde_json::json;

use super::{
    emit,
    outcome::failed,
    report_when_asked,
    reports::{Change, UdpReport, UdpServerReport},
    roles::{UdpClient, UdpFlood, UdpServer},
    tcp_server::canonical,
    told_to_stop, unix_micros,
};

pub(super) fn serve(role: &UdpServer) -> Result<()> {
    let report = Arc::new(Mutex::new(UdpServerReport::default()));
    let asked = Arc::clone(&report);
    report_when_asked(move || emit("report", &*lock(&asked)));
    let mut threads = Vec::new();
    for at in &role.listen {
        let socket = UdpSocket::bind(at).with_context(|| format!("cannot listen on {at}"))?;
        let report = Arc::clone(&report);
        threads.push(thread::spawn(move || answer(&socket, &report)));
    }
    emit("listening", &json!({"on": role.listen}));
    for thread in threads {
        let _ = thread.join();
    }
    Ok(())
}

fn answer(socket: &UdpSocket, report: &Mutex<UdpServerReport>) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
        emit("datagram", &json!({"from": canonical(from), "text": text}));
        {
            let mut report = lock(report);
            report.received += 1;
            *report.sources.entry(canonical(from).ip().to_string()).or_default() += 1;
        }
        let _ = socket.send_to(&buffer[..length], from);
    }
}

pub(super) fn send(role: &UdpClient) -> Result<()> {
    let mut report = UdpReport::default();
    let stop = (role.count == 0).then(told_to_stop);
    let stopped = || stop.as_ref().is_some_and(|flag| flag.load(Ordering::Relaxed));
    match socket(role) {
        Ok(socket) => {
            let mut number = 0;
            while !stopped() && (role.count == 0 || number < role.count) {
                let outcome = match exchange(role, &socket, number, &mut report) {
                    Ok(()) => "answered".to_owned(),
                    Err(failure) => {
                        *report.failures.entry(failure.clone()).or_default() += 1;
                        failure
                    }
                };
                if report.changes.last().is_none_or(|last| last.outcome != outcome) {
                    let change = Change { at: unix_micros(), outcome };
                    emit("change", &change);
                    report.changes.push(change);
                }
                number += 1;
                thread::sleep(Duration::from_millis(role.interval_ms));
            }
        }
        Err(failure) => *report.failures.entry(failure).or_default() += 1,
    }
    emit("report", &report);
    Ok(())
}

/// One socket, a flow for each port. What is refused is refused at once (EPERM).
pub(super) fn flood(role: &UdpFlood) -> Result<()> {
    let mut report = UdpReport::default();
    let any: SocketAddr = match role.to.is_ipv4() {
        true => (Ipv4Addr::UNSPECIFIED, 0).into(),
        false => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).context("socket")?;
    for number in 0..role.count {
        let port = role.to.port().checked_add(number).context("ports end at 65535")?;
        match socket.send_to(b"flood", (role.to.ip(), port)) {
            Ok(_) => report.sent += 1,
            Err(error) => {
                *report.failures.entry(failed("send", &error)).or_default() += 1;
            }
        }
    }
    emit("report", &report);
    Ok(())
}

fn socket(role: &UdpClient) -> Result<UdpSocket, String> {
    let any: SocketAddr = if role.to.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let socket = UdpSocket::bind(any).map_err(|e| failed("socket", &e))?;
    let timeout = Some(Duration::from_millis(role.timeout_ms.max(1)));
    socket.set_read_timeout(timeout).map_err(|e| failed("socket", &e))?;
    if role.connected {
        socket.connect(role.to).map_err(|e| failed("connect", &e))?;
    }
    Ok(socket)
}

fn exchange(
    role: &UdpClient,
    socket: &UdpSocket,
    number: u64,
    report: &mut UdpReport,
) -> Result<(), String> {
    let text = format!("{} {number}", role.text);
    let sent = if role.connected {
        socket.send(text.as_bytes())
    } else {
        socket.send_to(text.as_bytes(), role.to)
    };
    sent.map_err(|e| failed("send", &e))?;
    report.sent += 1;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let (length, from) = socket.recv_from(&mut buffer).map_err(|e| failed("recv", &e))?;
        if canonical(from) != canonical(role.to) {
            report.strangers.push(from.to_string());
        }
        // A late answer to an earlier datagram is none to this one.
        if buffer[..length] == *text.as_bytes() {
            report.answered += 1;
            return Ok(());
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
