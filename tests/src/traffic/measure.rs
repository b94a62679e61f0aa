//! Traffic as fast as it goes, for benchmarks: a server of three kinds, and a client that counts.

use std::{
    future::Future,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::timeout,
};

use super::{
    emit,
    reports::MeasureReport,
    roles::{Measure, MeasureKind, MeasureServer},
    told_to_stop,
};

/// Added to the server's port: takes bytes until their end.
const BULK: u16 = 0;
/// Added to the server's port: answers HTTP requests on connections that stay.
const HTTP: u16 = 1;
/// Added to the server's port: answers one byte and closes.
const BYTE: u16 = 2;

/// Bytes of one write or read.
const BLOCK: usize = 256 << 10;
/// A step that takes longer has failed.
const STEP: Duration = Duration::from_secs(20);
const REQUEST: &[u8] = b"GET /v1/item HTTP/1.1\r\nhost: server\r\nuser-agent: measure\r\n\r\n";
const BODY: &[u8] = b"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 64\r\n\r\n\
    0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("runtime")
}

pub(super) fn serve(role: &MeasureServer) -> Result<()> {
    runtime()?.block_on(async {
        let mut listeners = Vec::new();
        for add in [BULK, HTTP, BYTE] {
            let at = SocketAddr::new(role.listen.ip(), role.listen.port() + add);
            let socket = if at.is_ipv4() {
                tokio::net::TcpSocket::new_v4()
            } else {
                tokio::net::TcpSocket::new_v6()
            }?;
            socket.set_reuseaddr(true)?;
            socket.bind(at).with_context(|| at.to_string())?;
            listeners.push((add, socket.listen(4096)?));
        }
        emit("listening", &());
        let mut serving = JoinSet::new();
        for (kind, listener) in listeners {
            serving.spawn(accept(kind, listener));
        }
        while let Some(ended) = serving.join_next().await {
            ended.context("a listener ended")?;
        }
        Ok(())
    })
}

async fn accept(kind: u16, listener: TcpListener) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        // Fails only on a socket that is gone already.
        let _ = stream.set_nodelay(true);
        tokio::spawn(async move {
            // A client that leaves is the client's affair: it counts what it got.
            let _ = match kind {
                BULK => take(stream).await,
                HTTP => answer(stream).await,
                _ => byte(stream).await,
            };
        });
    }
}

async fn take(mut stream: TcpStream) -> std::io::Result<()> {
    let mut block = vec![0; BLOCK];
    while stream.read(&mut block).await? > 0 {}
    stream.shutdown().await
}

async fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    let mut block = vec![0; 4 << 10];
    let mut held = 0;
    loop {
        let n = stream.read(&mut block[held..]).await?;
        if n == 0 {
            return Ok(());
        }
        held += n;
        // Requests are of one length and come one at a time.
        if held >= REQUEST.len() {
            held = 0;
            stream.write_all(ANSWER).await?;
        }
    }
}

async fn byte(mut stream: TcpStream) -> std::io::Result<()> {
    let mut byte = [0];
    stream.read_exact(&mut byte).await?;
    stream.write_all(&byte).await?;
    stream.shutdown().await?;
    // The client closes first or has closed: no port waits on the server's side.
    stream.read(&mut byte).await.map(drop)
}

/// What all connections of a client count.
#[derive(Default)]
struct Counts {
    done: AtomicU64,
    bytes: AtomicU64,
}

pub(super) fn play(role: &Measure) -> Result<()> {
    let stop = (role.kind == MeasureKind::Hold).then(told_to_stop);
    runtime()?.block_on(async {
        let counts = Arc::new(Counts::default());
        let begin = Instant::now();
        let until = begin + Duration::from_millis(role.millis);
        let mut running: JoinSet<Result<Vec<u32>>> = JoinSet::new();
        let at = |add: u16| SocketAddr::new(role.to.ip(), role.to.port() + add);
        for _ in 0..role.parallel {
            let counts = counts.clone();
            match role.kind {
                MeasureKind::Bulk => running.spawn(bulk(at(BULK), until, counts)),
                MeasureKind::Http => running.spawn(http(at(HTTP), until, counts)),
                MeasureKind::Connect => running.spawn(connects(at(BYTE), until, counts)),
                MeasureKind::Hold => running.spawn(async move { bail!("held apart") }),
            };
        }
        if let Some(stop) = stop {
            running.abort_all();
            return hold(at(HTTP), role.parallel, || stop.load(Ordering::Relaxed)).await;
        }
        let mut micros = Vec::new();
        while let Some(ended) = running.join_next().await {
            micros.extend(ended.context("a connection's task")??);
        }
        let seconds = begin.elapsed().as_secs_f64();
        micros.sort_unstable();
        let quantile = |q: usize| micros.get(micros.len() * q / 100).copied().unwrap_or_default();
        emit(
            "report",
            &MeasureReport {
                done: counts.done.load(Ordering::Relaxed),
                bytes: counts.bytes.load(Ordering::Relaxed),
                seconds,
                p50_us: quantile(50),
                p99_us: quantile(99),
            },
        );
        Ok(())
    })
}

async fn step<T>(what: &str, io: impl Future<Output = std::io::Result<T>>) -> Result<T> {
    timeout(STEP, io)
        .await
        .with_context(|| format!("{what}: too slow"))?
        .with_context(|| what.to_owned())
}

async fn dial(to: SocketAddr) -> Result<TcpStream> {
    let stream = step("connect", TcpStream::connect(to)).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn bulk(to: SocketAddr, until: Instant, counts: Arc<Counts>) -> Result<Vec<u32>> {
    let mut stream = dial(to).await?;
    let block = vec![0x5a; BLOCK];
    while Instant::now() < until {
        step("write", stream.write_all(&block)).await?;
        counts.bytes.fetch_add(BLOCK as u64, Ordering::Relaxed);
    }
    stream.shutdown().await?;
    // The server closes when it has everything.
    let n = step("the end", stream.read(&mut [0; 8])).await?;
    ensure!(n == 0, "a byte that nobody sent");
    counts.done.fetch_add(1, Ordering::Relaxed);
    Ok(Vec::new())
}

async fn request(stream: &mut TcpStream) -> Result<()> {
    step("write", stream.write_all(REQUEST)).await?;
    // What is between may add a header; the body is the answer's end.
    let (mut answer, mut held) = ([0; 1024], 0);
    loop {
        let n = step("read", stream.read(&mut answer[held..])).await?;
        held += n;
        ensure!(n > 0 && answer.starts_with(b"HTTP/1.1 200 "), "another answer");
        if answer[..held].ends_with(BODY) {
            return Ok(());
        }
    }
}

async fn http(to: SocketAddr, until: Instant, counts: Arc<Counts>) -> Result<Vec<u32>> {
    let mut stream = dial(to).await?;
    let mut micros = Vec::new();
    while Instant::now() < until {
        let begin = Instant::now();
        request(&mut stream).await?;
        micros.push(u32::try_from(begin.elapsed().as_micros()).unwrap_or(u32::MAX));
        counts.done.fetch_add(1, Ordering::Relaxed);
    }
    Ok(micros)
}

async fn connects(to: SocketAddr, until: Instant, counts: Arc<Counts>) -> Result<Vec<u32>> {
    let mut micros = Vec::new();
    while Instant::now() < until {
        let begin = Instant::now();
        let mut stream = dial(to).await?;
        step("write", stream.write_all(b"?")).await?;
        let mut byte = [0];
        step("read", stream.read_exact(&mut byte)).await?;
        ensure!(&byte == b"?", "another byte");
        micros.push(u32::try_from(begin.elapsed().as_micros()).unwrap_or(u32::MAX));
        counts.done.fetch_add(1, Ordering::Relaxed);
    }
    Ok(micros)
}

/// Holds connections, each after one request, until told to stop.
async fn hold(to: SocketAddr, count: usize, stop: impl Fn() -> bool) -> Result<()> {
    let mut held = Vec::with_capacity(count);
    for _ in 0..count {
        let mut stream = dial(to).await?;
        request(&mut stream).await?;
        held.push(stream);
    }
    emit("held", &());
    while !stop() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    emit("report", &MeasureReport { done: held.len() as u64, ..MeasureReport::default() });
    Ok(())
}
