//! A client of Hubble's API, generated from the tests' own description of it (`tests/proto`).

use std::{
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use tonic::{
    Request, Status,
    metadata::MetadataValue,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Uri},
};

use self::observer::{GetFlowsRequest, get_flows_response::ResponseTypes};
use crate::netns;

macro_rules! package {
    ($(#[$doc:meta])* $module:ident = $name:literal) => {
        $(#[$doc])*
        #[allow(
            missing_docs,
            clippy::all,
            clippy::allow_attributes_without_reason,
            reason = "generated code"
        )]
        pub mod $module {
            tonic::include_proto!($name);
        }
    };
}

package! {
    /// Flows and filters.
    flow = "flow"
}
package! {
    /// The observer.
    observer = "observer"
}
package! {
    /// The peers.
    peer = "peer"
}
package! {
    /// Whether it is well.
    health = "grpc.health.v1"
}

/// As whom a client comes, and whom it takes for the server.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Roots of the server's certificate, PEM.
    pub roots: String,
    /// The server's name.
    pub server_name: String,
    /// The client's own certificate and key in one PEM text, if it has them.
    pub identity: Option<String>,
}

/// A connection to an observer.
#[derive(Clone, Debug)]
pub struct Hubble {
    channel: Channel,
    token: Option<String>,
}

impl Hubble {
    /// Dials from inside a network namespace.
    pub async fn dial(netns: &Path, to: SocketAddr, caller: &Caller) -> Result<Self> {
        let netns: PathBuf = netns.to_owned();
        let connector = tower::service_fn(move |_: Uri| {
            let netns = netns.clone();
            async move {
                let stream = netns::inside(&netns, || {
                    let stream = TcpStream::connect(to).context("connect")?;
                    stream.set_nonblocking(true)?;
                    Ok(stream)
                });
                let stream = stream.map_err(std::io::Error::other)?;
                let stream = tokio::net::TcpStream::from_std(stream)?;
                std::io::Result::Ok(hyper_util::rt::TokioIo::new(stream))
            }
        });
        let mut tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&caller.roots))
            .domain_name(&caller.server_name);
        if let Some(identity) = &caller.identity {
            tls = tls.identity(Identity::from_pem(identity, identity));
        }
        let endpoint = Endpoint::from_static("https://node").tls_config(tls)?;
        let channel = endpoint.connect_with_connector(connector).await?;
        Ok(Self { channel, token: None })
    }

    /// The same connection with a bearer token at each call.
    pub fn with_token(&self, token: &str) -> Self {
        Self { token: Some(token.into()), ..self.clone() }
    }

    /// A request as this caller makes it.
    pub fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let value = self
            .token
            .as_ref()
            .and_then(|token| MetadataValue::try_from(format!("Bearer {token}")).ok());
        if let Some(value) = value {
            request.metadata_mut().insert("authorization", value);
        }
        request
    }

    /// The observer's client.
    pub fn observer(&self) -> observer::observer_client::ObserverClient<Channel> {
        observer::observer_client::ObserverClient::new(self.channel.clone())
    }

    /// The peers' client.
    pub fn peers(&self) -> peer::peer_client::PeerClient<Channel> {
        peer::peer_client::PeerClient::new(self.channel.clone())
    }

    /// The health service's client.
    pub fn health(&self) -> health::health_client::HealthClient<Channel> {
        health::health_client::HealthClient::new(self.channel.clone())
    }

    /// A stream of flows.
    ///
    /// # Errors
    /// The server's refusal.
    pub async fn follow(
        &self,
        request: GetFlowsRequest,
    ) -> Result<tonic::Streaming<observer::GetFlowsResponse>, Status> {
        Ok(self.observer().get_flows(self.request(request)).await?.into_inner())
    }

    /// The flows of a request that ends.
    ///
    /// # Errors
    /// The server's refusal.
    pub async fn flows(&self, request: GetFlowsRequest) -> Result<Vec<flow::Flow>, Status> {
        let mut stream = self.follow(request).await?;
        let mut flows = Vec::new();
        while let Some(response) = stream.message().await? {
            if let Some(ResponseTypes::Flow(flow)) = response.response_types {
                flows.push(flow);
            }
        }
        Ok(flows)
    }
}
