//! Who looks from outside: signet's own command line, with the Kubernetes API, which says who may;
//! and Hubble's tools.

use std::{future::pending, net::SocketAddr, path::PathBuf, sync::Arc};

use tokio::sync::watch;
use tonic::service::Routes;

use super::DaemonError;
use crate::{
    api_server::ApiServer,
    config::AgentConfig,
    spiffe::{SpiffeId, SpiffeIdError, TrustDomain},
    svid::SvidHandle,
    trust::Trust,
    viewer::{
        HubbleServer, ViewerServer,
        callers::Callers,
        tls::{Files, Serving},
    },
};

/// What is served to viewers, and where; clones serve the same.
#[derive(Clone)]
pub(super) struct Viewers {
    /// `None`: nobody is let in.
    address: Option<SocketAddr>,
    kubeconfig: Option<PathBuf>,
    routes: Routes,
    /// Why nobody is let in, if that is not wanted.
    problem: watch::Sender<Option<String>>,
}

impl Viewers {
    pub(super) fn of(
        config: &AgentConfig,
        routes: Routes,
        problem: watch::Sender<Option<String>>,
    ) -> Self {
        // Standalone there is nobody to ask about tokens.
        let address = config.viewer_listen.filter(|_| config.cluster_dir.is_none());
        Self { address, kubeconfig: config.kubeconfig.clone(), routes, problem }
    }

    /// Serves; never ends by itself.
    pub(super) async fn serve(self) {
        let Self { address, kubeconfig, routes, problem } = self;
        let Some(address) = address else { return pending().await };
        match ApiServer::connect(kubeconfig.as_deref()).await {
            Ok(api) => {
                let callers = Arc::new(Callers::new(api));
                let server = ViewerServer { address, routes, callers };
                server.run(|message| drop(problem.send_replace(message))).await;
            }
            Err(error) => {
                problem.send_replace(Some(format!("nobody is let in: {error}")));
            }
        }
        pending().await
    }
}

/// What is served to Hubble's tools, and where; clones serve the same.
#[derive(Clone)]
pub(super) struct Hubble {
    /// `None`: it is off.
    listen: Option<Listen>,
    routes: Routes,
    trust: Arc<Trust>,
}

/// Where it is served, and to whom.
#[derive(Clone)]
struct Listen {
    address: SocketAddr,
    /// Whether there is an API server to ask about tokens.
    reviews: bool,
    kubeconfig: Option<PathBuf>,
    clients: Vec<SpiffeId>,
    certificate: Certificate,
}

/// Whose certificate it has.
#[derive(Clone)]
enum Certificate {
    Svid(SvidHandle, SpiffeId),
    Files(PathBuf, PathBuf),
}

impl Hubble {
    /// By the configuration; an SVID is asked for at once.
    pub(super) fn of(
        config: &AgentConfig,
        domain: &TrustDomain,
        trust: &Arc<Trust>,
        routes: Routes,
        svids: impl FnOnce() -> SvidHandle,
    ) -> Result<Self, DaemonError> {
        let off = Self { listen: None, routes, trust: trust.clone() };
        let Some(address) = config.observer_listen else { return Ok(off) };
        let missing = |key, remedy| DaemonError::Missing { key, remedy };
        let identity = |key, value: &str, parsed: Result<SpiffeId, SpiffeIdError>| {
            parsed.map_err(|source| DaemonError::SpiffeId { key, value: value.into(), source })
        };
        let clients = config
            .observer_clients
            .iter()
            .map(|id| identity("observerClients", id, SpiffeId::parse(id)))
            .collect::<Result<Vec<_>, _>>()?;
        // Standalone there is nobody to ask about tokens.
        let reviews = config.cluster_dir.is_none();
        if clients.is_empty() && !reviews {
            return Err(missing(
                "observerClients",
                "without the Kubernetes API only they are let in on observerListen: list SPIFFE \
                 IDs, or set observerListen to off",
            ));
        }
        let certificate = match (&config.observer_cert_file, &config.observer_key_file) {
            (Some(certificate), Some(key)) => Certificate::Files(certificate.clone(), key.clone()),
            (Some(_), None) => {
                return Err(missing("observerKeyFile", "give the key to observerCertFile"));
            }
            (None, Some(_)) => {
                return Err(missing("observerCertFile", "give the certificate to observerKeyFile"));
            }
            (None, None) => {
                let namespace = config.namespace.as_deref().unwrap_or("signet-system");
                let own = format!("{namespace}/signet-agent");
                let account = config.observer_account.as_deref().unwrap_or(&own);
                let (namespace, name) = account.split_once('/').unwrap_or((namespace, account));
                let id = SpiffeId::for_service_account(domain, namespace, name);
                let id = identity("observerAccount", account, id)?;
                let svids = svids();
                svids.want([id.clone()].into());
                Certificate::Svid(svids, id)
            }
        };
        let kubeconfig = config.kubeconfig.clone();
        Ok(Self {
            listen: Some(Listen { address, reviews, kubeconfig, clients, certificate }),
            ..off
        })
    }

    /// The state of its SVID, if it has one.
    pub(super) fn svids(&self) -> Option<SvidHandle> {
        match self.listen.as_ref().map(|listen| &listen.certificate) {
            Some(Certificate::Svid(svids, _)) => Some(svids.clone()),
            _ => None,
        }
    }

    /// Serves; never ends by itself.
    pub(super) async fn serve(self, told: impl Fn(Option<String>)) {
        let Some(listen) = self.listen else { return pending().await };
        let Listen { address, reviews, kubeconfig, clients, certificate } = listen;
        let callers = if reviews {
            match ApiServer::connect(kubeconfig.as_deref()).await {
                Ok(api) => Some(Arc::new(Callers::new(api))),
                Err(error) => {
                    told(Some(format!("observerListen: nobody is let in: {error}")));
                    return pending().await;
                }
            }
        } else {
            None
        };
        let serving = match certificate {
            Certificate::Svid(svids, id) => Serving::Svid(svids, id),
            Certificate::Files(certificate, key) => {
                Serving::Files(Box::new(Files::new(certificate, key)))
            }
        };
        let Self { routes, trust, .. } = self;
        HubbleServer { address, routes, callers, clients, serving, trust }.run(told).await;
    }
}
