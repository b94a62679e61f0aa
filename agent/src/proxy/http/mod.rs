//! Layer 7: flows whose policies ask about HTTP requests, judged request by request.
//!
//! A flow comes here instead of being copied when the verdict depends on what is requested.
//! [`detect`] tells HTTP/1 from HTTP/2, [`framing`] lets only unambiguous messages in, [`head`]
//! checks and rewrites what is asked, [`path`] gives every path one spelling, and [`answer`]
//! refuses. The application is spoken to in the protocol that its client speaks, over one
//! connection a flow. `docs/layer7.md` says what is refused and why.

pub mod answer;
pub mod detect;
mod flow;
pub mod framing;
pub mod head;
mod judged;
pub mod path;
mod stream;

use std::{
    future::Future,
    io,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use bytes::BytesMut;
use hyper::{
    client::conn as client, server::conn as server, service::service_fn, upgrade::OnUpgrade,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use signet_ebpf::abi::Reason;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::TcpStream,
    time::timeout,
};
use tokio_util::task::TaskTracker;

use self::{
    answer::Open,
    detect::{Found, Protocol, detect},
    judged::{Judged, Sender},
    stream::{App, Begun, Client, Requests, Watched},
};
pub use self::{flow::Admitted, stream::Carrier};
use super::judge::Judgement;
use crate::tunnel::copy::{CopyError, Counts, end_on_close, reset_on_close};

/// How long a client may take to say anything by which its protocol is known, and how long a
/// head that has begun may take.
const FIRST_BYTES_WITHIN: Duration = Duration::from_secs(15);
/// As above, where policy admits what says nothing: its server may speak first.
const SERVER_FIRST_AFTER: Duration = Duration::from_secs(1);
/// How long the rest of a flow that has ended on this side is waited for.
const LINGER: Duration = Duration::from_secs(2);
/// Bytes that may wait between client and application, each way and stream.
const BUFFER: usize = 256 << 10;
/// HTTP/2 streams at once on one flow.
const STREAMS: u32 = 256;
/// HTTP/2 streams that were reset before they were looked at.
const RESET_STREAMS: usize = 32;
/// Header list of an HTTP/2 request, bytes.
const HEADER_LIST: u32 = 64 << 10;
/// HTTP/2 windows, bytes: of a stream and of a connection.
const WINDOWS: (u32, u32) = (1 << 20, 4 << 20);

/// How a judged flow ended.
#[derive(Debug)]
pub enum Ended {
    /// As a copied one does; with what carried it, when that may serve another flow.
    Carried(Result<(), CopyError>, Option<Carrier>),
    /// It was no HTTP, which policy does not admit, and nothing of it was delivered.
    NotHttp(Judgement),
    /// The client left before it was known what it speaks.
    Abandoned,
}

/// Carries a flow request by request until it ends, one side breaks or `stop` completes; then
/// what is open is reset. `begins` is called when the flow turns out to be HTTP. Without an
/// application, policy refuses whatever is requested, and each request is told so.
pub async fn carry(
    judged: Arc<Judged>,
    carrier: Carrier,
    app: Option<TcpStream>,
    counts: Arc<Counts>,
    tracker: &TaskTracker,
    begins: impl FnOnce(),
    stop: impl Future<Output = Reason>,
) -> Ended {
    if let Some(app) = &app {
        reset_on_close(app);
    }
    let mut client = Client::new(carrier, counts);
    let mut stop = pin!(stop);
    let mut said = BytesMut::new();
    // Policy may only want to report; then what is no HTTP, or where the server speaks first,
    // is copied.
    let unseen = judged.judge_unseen();
    let may_be_unseen = unseen.passes() && app.is_some();
    let within = if may_be_unseen { SERVER_FIRST_AFTER } else { FIRST_BYTES_WITHIN };
    let found = tokio::select! {
        found = timeout(within, first_bytes(&mut client, &mut said)) => found,
        reason = &mut stop => {
            client.reset(Some(reason)).await;
            return Ended::Abandoned;
        }
    };
    let protocol = match found {
        Ok(Ok(First::Speaks(protocol))) => Some(protocol),
        Ok(Ok(First::Other)) | Err(_) if may_be_unseen => None,
        Ok(Ok(First::Nothing) | Err(_)) => {
            // Nothing was asked and nothing delivered. The application sees a connection end,
            // as it would without us.
            if let Some(app) = &app {
                end_on_close(app);
            }
            client.reset(None).await;
            return Ended::Abandoned;
        }
        Ok(Ok(First::Other)) | Err(_) => {
            client.reset(Some(unseen.reason)).await;
            return Ended::NotHttp(unseen);
        }
    };
    begins();
    let flow = Flow { judged, client, app: app.map(App::new), tracker };
    match protocol {
        Some(Protocol::Http1) => flow.http1(said, stop).await,
        Some(Protocol::Http2) => flow.http2(said, stop).await,
        None => flow.unseen(said, stop).await,
    }
}

/// What a client said first.
enum First {
    Speaks(Protocol),
    Other,
    /// It ended without a word.
    Nothing,
}

/// Reads until it is known what the client speaks.
async fn first_bytes(client: &mut Client, said: &mut BytesMut) -> io::Result<First> {
    loop {
        if client.read_buf(said).await? == 0 {
            return Ok(if said.is_empty() { First::Nothing } else { First::Other });
        }
        match detect(said) {
            Found::Speaks(protocol) => return Ok(First::Speaks(protocol)),
            Found::Unsure => {}
            Found::Other => return Ok(First::Other),
        }
    }
}

/// The application's connection, driven until it ends.
type AppSide = Pin<Box<dyn Future<Output = hyper::Result<()>> + Send>>;

/// Both ends of a flow.
struct Flow<'a> {
    judged: Arc<Judged>,
    client: Client,
    app: Option<App>,
    tracker: &'a TaskTracker,
}

/// What ended the exchange of requests.
enum Over {
    /// The client's side, in order or not.
    Client(Result<(), hyper::Error>),
    /// The client's bytes broke off.
    Broken(io::Error),
    /// The application's side broke while nothing was being answered.
    App,
    /// The flow has to end.
    Stopped(Reason),
}

impl Flow<'_> {
    async fn http1(self, said: BytesMut, stop: impl Future<Output = Reason> + Unpin) -> Ended {
        let (open, requests) = (Open::default(), Requests::default());
        let (sender, app): (_, AppSide) = match &self.app {
            None => (Sender::Nobody, Box::pin(std::future::pending())),
            Some(app) => {
                let handshake = client::http1::Builder::new()
                    .preserve_header_case(true)
                    .max_headers(framing::MOST_FIELDS)
                    .max_buf_size(BUFFER)
                    .handshake(TokioIo::new(app.clone()));
                match handshake.await {
                    Ok((sender, app)) => (Sender::http1(sender), Box::pin(app.with_upgrades())),
                    Err(error) => {
                        return self.failed(CopyError::App(io::Error::other(error))).await;
                    }
                }
            }
        };
        let upgraded: Upgraded = Arc::default();
        let judged =
            self.judged.exchange(sender, open.clone(), Some(requests.clone()), upgraded.clone());
        let service = service_fn(move |request| judged.clone().answer(request));
        let watched = Watched::new(self.client.clone(), said, requests.clone(), FIRST_BYTES_WITHIN);
        let connection = server::http1::Builder::new()
            .half_close(true)
            .preserve_header_case(true)
            .auto_date_header(false)
            .max_headers(framing::MOST_FIELDS)
            // One more than a watched head, so that the watch is what refuses.
            .max_buf_size(framing::LARGEST_HEAD + BUFFER)
            .serve_connection(TokioIo::new(watched), service)
            .with_upgrades();
        let mut stop = stop;
        let over = {
            let mut connection = pin!(connection);
            let mut app = app;
            let draining = self.judged.draining();
            let mut draining = pin!(draining);
            let (mut app_over, mut is_draining) = (None, false);
            loop {
                tokio::select! {
                    biased;
                    over = &mut connection => {
                        if upgrade_of(&upgraded).is_some() && app_over.is_none() {
                            // The application's side hands its bytes over, too.
                            let _ = (&mut app).await;
                        }
                        break Over::Client(over);
                    }
                    over = &mut app, if app_over.is_none() => {
                        app_over = Some(over.is_ok());
                        connection.as_mut().graceful_shutdown();
                    }
                    () = open.none(), if app_over == Some(false) => break Over::App,
                    error = self.client.broken() => break Over::Broken(error),
                    reason = &mut stop => break Over::Stopped(reason),
                    () = &mut draining, if !is_draining => {
                        is_draining = true;
                        connection.as_mut().graceful_shutdown();
                    }
                }
            }
        };
        if let Some(fault) = requests.broken() {
            self.judged.refused_body(fault);
        }
        let switched = upgraded.lock().ok().and_then(|mut both| both.take());
        if let (Over::Client(Ok(())), Some((client, app))) = (&over, switched) {
            return self.switched(client, app, stop).await;
        }
        self.end(over).await
    }

    async fn http2(self, said: BytesMut, stop: impl Future<Output = Reason> + Unpin) -> Ended {
        let executor = Tasks(self.tracker.clone());
        let open = Open::default();
        let (sender, app): (_, AppSide) = match &self.app {
            None => (Sender::Nobody, Box::pin(std::future::pending())),
            Some(app) => {
                let handshake = client::http2::Builder::new(executor.clone())
                    .timer(TokioTimer::new())
                    .initial_stream_window_size(WINDOWS.0)
                    .initial_connection_window_size(WINDOWS.1)
                    .max_send_buf_size(BUFFER)
                    .max_header_list_size(HEADER_LIST)
                    .handshake(TokioIo::new(app.clone()));
                match handshake.await {
                    Ok((sender, app)) => (Sender::Http2(sender), Box::pin(app)),
                    Err(error) => {
                        return self.failed(CopyError::App(io::Error::other(error))).await;
                    }
                }
            }
        };
        let judged = self.judged.exchange(sender, open.clone(), None, Arc::default());
        let service = service_fn(move |request| judged.clone().answer(request));
        let connection = server::http2::Builder::new(executor)
            .timer(TokioTimer::new())
            .initial_stream_window_size(WINDOWS.0)
            .initial_connection_window_size(WINDOWS.1)
            .max_concurrent_streams(STREAMS)
            .max_pending_accept_reset_streams(RESET_STREAMS)
            .max_header_list_size(HEADER_LIST)
            .max_send_buf_size(BUFFER)
            .auto_date_header(false)
            .serve_connection(TokioIo::new(Begun::new(self.client.clone(), said)), service);
        let mut stop = stop;
        let over = {
            let mut connection = pin!(connection);
            let mut app = app;
            let draining = self.judged.draining();
            let mut draining = pin!(draining);
            let (mut app_over, mut is_draining) = (None, false);
            loop {
                tokio::select! {
                    biased;
                    over = &mut connection => break Over::Client(over),
                    over = &mut app, if app_over.is_none() => {
                        app_over = Some(over.is_ok());
                        connection.as_mut().graceful_shutdown();
                    }
                    () = open.none(), if app_over == Some(false) => break Over::App,
                    error = self.client.broken() => break Over::Broken(error),
                    reason = &mut stop => break Over::Stopped(reason),
                    () = &mut draining, if !is_draining => {
                        is_draining = true;
                        connection.as_mut().graceful_shutdown();
                    }
                }
            }
        };
        self.end(over).await
    }

    /// Copies what policy admits though it is no HTTP.
    async fn unseen(self, said: BytesMut, stop: impl Future<Output = Reason> + Unpin) -> Ended {
        let Some(app) = &self.app else {
            return self.failed(CopyError::Stopped).await;
        };
        let (mut client, mut app) = (Begun::new(self.client.clone(), said), app.clone());
        let over = tokio::select! {
            copied = copy_bidirectional(&mut client, &mut app) => match copied {
                Ok(_) => Over::Client(Ok(())),
                Err(error) => Over::Broken(error),
            },
            reason = stop => Over::Stopped(reason),
        };
        drop((client, app));
        self.end(over).await
    }

    /// Copies what is no HTTP any more.
    async fn switched(
        self,
        client: OnUpgrade,
        app: OnUpgrade,
        stop: impl Future<Output = Reason> + Unpin,
    ) -> Ended {
        let copying = async {
            let (client, app) = (client.await, app.await);
            let (client, app) = (client.map_err(io::Error::other)?, app.map_err(io::Error::other)?);
            let (mut client, mut app) = (TokioIo::new(client), TokioIo::new(app));
            copy_bidirectional(&mut client, &mut app).await.map(drop)
        };
        let over = tokio::select! {
            copied = copying => match copied {
                Ok(()) => Over::Client(Ok(())),
                Err(error) => Over::Broken(error),
            },
            reason = stop => Over::Stopped(reason),
        };
        self.end(over).await
    }

    async fn end(self, over: Over) -> Ended {
        let Self { judged: _, mut client, app, tracker: _ } = self;
        let error = match over {
            Over::Client(Ok(())) => {
                // Both FINs: what was answered must reach the client before its socket goes.
                let over = async {
                    // A refused upgrade leaves it to us; otherwise it is done already.
                    let _ = client.shutdown().await;
                    client.linger().await
                };
                let ended = timeout(LINGER, over).await.unwrap_or(false);
                if let Some(app) = app {
                    app.end_on_close();
                }
                let carrier = client.into_carrier().filter(|_| ended);
                return Ended::Carried(Ok(()), carrier);
            }
            Over::Client(Err(error)) if error.is_incomplete_message() || error.is_user() => {
                CopyError::App(io::Error::other(error))
            }
            Over::Client(Err(error)) => CopyError::Peer(io::Error::other(error)),
            Over::Broken(error) => CopyError::Peer(error),
            Over::App => CopyError::App(match app {
                Some(app) => app.error(),
                None => io::ErrorKind::NotConnected.into(),
            }),
            Over::Stopped(reason) => {
                client.reset(Some(reason)).await;
                return Ended::Carried(Err(CopyError::Stopped), None);
            }
        };
        client.reset(None).await;
        Ended::Carried(Err(error), None)
    }

    async fn failed(self, error: CopyError) -> Ended {
        self.client.reset(None).await;
        Ended::Carried(Err(error), None)
    }
}

/// Both sides of a connection that leaves HTTP.
type Upgraded = Arc<std::sync::Mutex<Option<(OnUpgrade, OnUpgrade)>>>;

fn upgrade_of(upgraded: &Upgraded) -> Option<()> {
    upgraded.lock().ok()?.as_ref().map(|_| ())
}

/// Runs HTTP/2's tasks among the core's.
#[derive(Clone, Debug)]
struct Tasks(TaskTracker);

impl<F> hyper::rt::Executor<F> for Tasks
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, task: F) {
        self.0.spawn(task);
    }
}
