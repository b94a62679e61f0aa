//! Who looks from outside: with the Kubernetes API, which says who may.

use std::{future::pending, net::SocketAddr, path::PathBuf, sync::Arc};

use tokio::sync::watch;
use tonic::service::Routes;

use crate::{
    api_server::ApiServer,
    config::AgentConfig,
    viewer::{ViewerServer, callers::Callers},
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
