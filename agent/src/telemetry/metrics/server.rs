//! `/metrics` for Prometheus and `/healthz/ready` for load balancers, over plain HTTP, on
//! addresses of the operator's choice.
//!
//! There is nothing secret in it, and no request changes anything. Connections, heads and the
//! time that a connection may take are bounded.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use tokio::{net::TcpListener, sync::Semaphore, time};

use super::Metrics;

/// A request's head must be there within this.
const HEAD: Duration = Duration::from_secs(5);
/// A connection is closed after this, whatever it does.
const CONNECTION: Duration = Duration::from_secs(60);
/// Connections at the same time; more wait.
const MAX_CONNECTIONS: usize = 16;
/// Between two tries to get the address.
const RETRY: Duration = Duration::from_secs(5);

/// Media type of OpenMetrics 1.0.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves on an address, as soon as it is to be had.
#[derive(Debug)]
pub struct PageServer {
    /// The configuration's key that asks for it.
    pub key: &'static str,
    /// Where.
    pub address: SocketAddr,
    /// What.
    pub page: Router,
}

/// The page of metrics.
pub fn metrics_page(metrics: Arc<Metrics>) -> Router {
    Router::new().route("/metrics", get(answer)).with_state(metrics)
}

/// The page of readiness, as Istio's proxies have it: 200, or 503 with the reason.
pub fn ready_page(
    ready: impl Fn() -> Result<String, String> + Clone + Send + Sync + 'static,
) -> Router {
    Router::new().route(
        "/healthz/ready",
        get(move || {
            let ready = ready();
            async {
                match ready {
                    Ok(why) => (StatusCode::OK, format!("{why}\n")),
                    Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
                }
            }
        }),
    )
}

impl PageServer {
    /// Serves until the task is dropped. An address that is taken is tried again: that nobody
    /// reads the page is no reason not to run. `told` hears what is wrong, and `None` when
    /// nothing is any more.
    pub async fn run(self, told: impl Fn(Option<String>)) {
        let Self { key, address, page } = self;
        let mut silent = false;
        loop {
            match TcpListener::bind(address).await {
                Ok(listener) => {
                    told(None);
                    tracing::info!(key, %address, "page served");
                    serve(listener, page).await;
                    return;
                }
                Err(error) => {
                    if !silent {
                        tracing::error!(key, %address, %error, "page not served; trying again");
                    }
                    silent = true;
                    told(Some(format!(
                        "{key}: {address}: {error}; choose another address or stop who has it"
                    )));
                }
            }
            time::sleep(RETRY).await;
        }
    }
}

/// Serves on a listener until the task is dropped.
pub async fn serve(listener: TcpListener, page: Router) {
    let service = TowerToHyperService::new(page);
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(turn) = Arc::clone(&room).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                pause(&error).await;
                continue;
            }
        };
        let service = service.clone();
        tokio::spawn(async move {
            let mut builder = Builder::new(TokioExecutor::new());
            builder
                .http1()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD)
                .max_buf_size(16 * 1024);
            let builder = builder.http1_only();
            let serving = builder.serve_connection(TokioIo::new(stream), service);
            if let Ok(Err(error)) = time::timeout(CONNECTION, serving).await {
                tracing::debug!(%error, "a connection for a page failed");
            }
            drop(turn);
        });
    }
}

/// Out of descriptors, or a client that went: neither ends the listener.
async fn pause(error: &io::Error) {
    tracing::warn!(%error, "a connection for a page was not accepted");
    time::sleep(Duration::from_millis(50)).await;
}

async fn answer(State(metrics): State<Arc<Metrics>>) -> Response {
    match metrics.text() {
        Ok(text) => ([(header::CONTENT_TYPE, OPENMETRICS)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "the metrics cannot be written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    use super::*;

    async fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        time::timeout(HEAD, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        answer
    }

    #[tokio::test]
    async fn only_get_metrics_is_answered() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, metrics_page(Metrics::default().shared())));
        let head = "Host: a\r\nConnection: close\r\n\r\n";
        let good = ask(address, &format!("GET /metrics HTTP/1.1\r\n{head}")).await;
        assert!(good.starts_with("HTTP/1.1 200") && good.contains(OPENMETRICS), "{good}");
        assert!(good.contains("signet_build_info") && good.ends_with("# EOF\n"), "{good}");
        for (request, code) in [("POST /metrics", "405"), ("GET /", "404"), ("GET /debug", "404")] {
            let answer = ask(address, &format!("{request} HTTP/1.1\r\n{head}")).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {code}")), "{request}: {answer}");
        }
        let long = format!("GET /{} HTTP/1.1\r\n{head}", "a".repeat(20_000));
        assert!(!ask(address, &long).await.contains("200 OK"));
    }

    #[tokio::test]
    async fn readiness_is_a_status_with_its_reason() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let is_ready = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let asked = is_ready.clone();
        let page = ready_page(move || match asked.load(std::sync::atomic::Ordering::Relaxed) {
            true => Ok("all is well".into()),
            false => Err("pods have not been read".into()),
        });
        tokio::spawn(serve(listener, page));
        let request = "GET /healthz/ready HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
        let answer = ask(address, request).await;
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        assert!(answer.ends_with("pods have not been read\n"), "{answer}");
        is_ready.store(true, std::sync::atomic::Ordering::Relaxed);
        let answer = ask(address, request).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.ends_with("all is well\n"), "{answer}");
    }

    #[tokio::test]
    async fn an_address_that_is_taken_is_told_and_tried_again() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = taken.local_addr().unwrap();
        let (sender, mut told) = tokio::sync::mpsc::unbounded_channel();
        let page = metrics_page(Metrics::default().shared());
        let server = PageServer { key: "metricsListen", address, page };
        tokio::spawn(server.run(move |problem| drop(sender.send(problem))));
        let problem = told.recv().await.unwrap().unwrap();
        assert!(problem.starts_with(&format!("metricsListen: {address}: ")), "{problem}");
        drop(taken);
        assert_eq!(time::timeout(RETRY * 3, told.recv()).await.unwrap(), Some(None));
        let good = ask(address, "GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        assert!(good.await.starts_with("HTTP/1.1 200"));
    }
}
