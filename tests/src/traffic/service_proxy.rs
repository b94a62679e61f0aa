//! The lab's kube-proxy: a Service's address, forwarded to a ready endpoint.
//!
//! A user-space one, as kube-proxy once was: endpoints see the node's address.

use std::{
    fs,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};

use super::{emit, hammer::reset, roles::ServiceProxy};

pub(super) fn play(role: &ServiceProxy) -> Result<()> {
    let kind = if role.udp { Type::DGRAM } else { Type::STREAM };
    let socket = Socket::new(Domain::for_address(role.listen), kind, None).context("socket")?;
    socket.set_reuse_address(true).context("reuse")?;
    // The Service's address is nobody's: a route to `lo` brings it here.
    if role.listen.is_ipv4() {
        socket.set_freebind_v4(true).context("freebind")?;
    } else {
        socket.set_freebind_v6(true).context("freebind")?;
    }
    socket.bind(&role.listen.into()).with_context(|| format!("cannot bind {}", role.listen))?;
    if role.udp {
        emit("listening", &json!({"on": [role.listen]}));
        return datagrams(role, &socket.into());
    }
    socket.listen(1024).context("listen")?;
    let listener: TcpListener = socket.into();
    emit("listening", &json!({"on": [role.listen]}));
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        loop {
            let Ok((client, _)) = listener.accept() else { continue };
            let next = &next;
            scope.spawn(move || {
                let server = endpoint(role, next)
                    .and_then(|to| TcpStream::connect_timeout(&to, Duration::from_secs(2)).ok());
                match server {
                    Some(server) => forward(&client, &server),
                    None => drop(reset(&client)),
                }
            });
        }
    })
}

fn forward(client: &TcpStream, server: &TcpStream) {
    thread::scope(|scope| {
        scope.spawn(|| copy(client, server));
        copy(server, client);
    });
}

fn copy(mut from: &TcpStream, mut to: &TcpStream) {
    if std::io::copy(&mut from, &mut to).is_err() {
        let _ = reset(to);
    }
    let _ = to.shutdown(std::net::Shutdown::Write);
}

fn datagrams(role: &ServiceProxy, socket: &UdpSocket) -> Result<()> {
    let next = AtomicUsize::new(0);
    let mut buffer = vec![0; 64 << 10];
    loop {
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        let Some(to) = endpoint(role, &next) else { continue };
        let (request, back) = (buffer[..length].to_vec(), socket.try_clone().context("socket")?);
        thread::spawn(move || -> std::io::Result<()> {
            let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let towards = UdpSocket::bind(any)?;
            towards.set_read_timeout(Some(Duration::from_secs(2)))?;
            towards.send_to(&request, to)?;
            let mut answer = vec![0; 64 << 10];
            let length = towards.recv(&mut answer)?;
            back.send_to(&answer[..length], from)?;
            Ok(())
        });
    }
}

/// A ready endpoint, in turn.
fn endpoint(role: &ServiceProxy, next: &AtomicUsize) -> Option<SocketAddr> {
    let slice: Value = serde_saphyr::from_str(&fs::read_to_string(&role.slice).ok()?).ok()?;
    let port = slice["ports"]
        .as_array()?
        .iter()
        .find(|port| port["name"].as_str().unwrap_or_default() == role.port_name)?["port"]
        .as_u64()?;
    let ready: Vec<&str> = slice["endpoints"]
        .as_array()?
        .iter()
        .filter(|endpoint| endpoint["conditions"]["ready"] == true)
        .filter_map(|endpoint| endpoint["addresses"][0].as_str())
        .collect();
    let chosen = ready.get(next.fetch_add(1, Ordering::Relaxed) % ready.len().max(1))?;
    Some((chosen.parse::<std::net::IpAddr>().ok()?, u16::try_from(port).ok()?).into())
}
