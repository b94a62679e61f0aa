//! A small HTTP/1.1 server that answers with what it sees of the client.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
};

use anyhow::Result;
use serde_json::json;

use super::{
    emit, report_when_asked,
    reports::TcpServerReport,
    roles::HttpServer,
    tcp_server::{canonical, listen},
};

/// Longest request head that is read.
const HEAD_LIMIT: u64 = 64 << 10;

pub(super) fn play(role: &HttpServer) -> Result<()> {
    let listeners: Vec<TcpListener> =
        role.listen.iter().map(|at| listen(*at)).collect::<Result<_>>()?;
    let accepted = Arc::new(AtomicU64::new(0));
    let asked = Arc::clone(&accepted);
    report_when_asked(move || {
        emit("report", &TcpServerReport { accepted: asked.load(Relaxed), ..Default::default() });
    });
    let mut threads = Vec::new();
    for listener in listeners {
        let (name, count) = (role.name.clone(), Arc::clone(&accepted));
        threads.push(thread::spawn(move || {
            loop {
                let Ok((stream, from)) = listener.accept() else { continue };
                count.fetch_add(1, Relaxed);
                let name = name.clone();
                let _ = thread::Builder::new()
                    .stack_size(256 << 10)
                    .spawn(move || serve(&stream, from, &name));
            }
        }));
    }
    emit("listening", &json!({"on": role.listen}));
    for thread in threads {
        let _ = thread.join();
    }
    Ok(())
}

fn serve(stream: &TcpStream, from: SocketAddr, name: &str) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut head = Vec::new();
        let mut length = 0_u64;
        loop {
            let mut line = String::new();
            if (&mut reader).take(HEAD_LIMIT).read_line(&mut line)? == 0 {
                return Ok(());
            }
            let line = line.trim_end().to_owned();
            if line.is_empty() {
                break;
            }
            if let Some((key, value)) = line.split_once(':')
                && key.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().unwrap_or(0);
            }
            head.push(line);
        }
        std::io::copy(&mut (&mut reader).take(length), &mut std::io::sink())?;
        let request = head.first().map(String::as_str).unwrap_or_default();
        let path = request.split(' ').nth(1).unwrap_or_default();
        let seen = json!({
            "server": name,
            "path": path,
            "accepted": canonical(from),
            "peer": canonical(stream.peer_addr()?),
            "local": canonical(stream.local_addr()?),
            "headers": head.get(1..),
        });
        emit("request", &json!({"path": path, "from": canonical(from)}));
        let body = format!("{seen}\n");
        let answer = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut out = stream;
        out.write_all(answer.as_bytes())?;
    }
}
