//! HTTPS beside HTTP: kubectl and others expect it.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, OnceLock},
};

use anyhow::{Context, Result};
use rcgen::{CertificateParams, KeyPair};
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

/// A certificate of the server, which is its own authority.
pub(super) struct Identity {
    /// PEM, for clients.
    pub(super) certificate: String,
    config: Arc<ServerConfig>,
}

impl Identity {
    /// The one that all test API servers of this process have.
    pub(super) fn shared() -> Result<&'static Self> {
        static SHARED: OnceLock<Identity> = OnceLock::new();
        if let Some(known) = SHARED.get() {
            return Ok(known);
        }
        let made = Self::make()?;
        Ok(SHARED.get_or_init(|| made))
    }

    fn make() -> Result<Self> {
        let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
        let key = KeyPair::generate().context("a key")?;
        let params = CertificateParams::new(names).context("a certificate")?;
        let certificate = params.self_signed(&key).context("a certificate")?;
        let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], private)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { certificate: certificate.pem(), config: Arc::new(config) })
    }
}

/// Connections whose handshake is done.
pub(super) struct Handshaken {
    address: SocketAddr,
    connections: mpsc::Receiver<(TlsStream<TcpStream>, SocketAddr)>,
}

impl Handshaken {
    /// Accepts on a listener; no handshake holds up another.
    pub(super) fn on(listener: TcpListener, identity: &Identity) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let acceptor = TlsAcceptor::from(identity.config.clone());
        let (sender, connections) = mpsc::channel(64);
        tokio::spawn(async move {
            while !sender.is_closed() {
                let Ok((stream, from)) = listener.accept().await else { continue };
                let (acceptor, sender) = (acceptor.clone(), sender.clone());
                tokio::spawn(async move {
                    // Who cannot do TLS is none of ours.
                    if let Ok(stream) = acceptor.accept(stream).await {
                        let _ = sender.send((stream, from)).await;
                    }
                });
            }
        });
        Ok(Self { address, connections })
    }
}

impl axum::serve::Listener for Handshaken {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.connections.recv().await {
            Some(connection) => connection,
            // The server ends.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Ok(self.address)
    }
}
