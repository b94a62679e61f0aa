//! Which methods are served over TCP, and that each call is somebody's who may.

use std::sync::Arc;

use axum::{
    Router,
    extract::{Request, State},
    middleware::{Next, from_fn_with_state},
    response::Response,
};
use http::header;
use jiff::Timestamp;
use tonic::{Status, service::Routes};

use super::{
    callers::{Callers, Refused},
    tls::Client,
};
use crate::spiffe::SpiffeId;

/// What is served over TCP: nothing of it changes anything. Everything else answers on the admin
/// socket only.
pub const READ_ONLY: &[&str] = &[
    "/grpc.health.v1.Health/Check",
    "/observer.Observer/GetFlows",
    "/observer.Observer/GetNamespaces",
    "/observer.Observer/GetNodes",
    "/observer.Observer/ServerStatus",
    "/peer.Peer/Notify",
    "/signet.admin.v1.Admin/CheckPolicy",
    "/signet.admin.v1.Admin/CheckRollout",
    "/signet.admin.v1.Admin/DiffPolicies",
    "/signet.admin.v1.Admin/Endpoints",
    "/signet.admin.v1.Admin/ListEdges",
    "/signet.admin.v1.Admin/ListIdentities",
    "/signet.admin.v1.Admin/ListPolicies",
    "/signet.admin.v1.Admin/ListServices",
    "/signet.admin.v1.Admin/ListSvids",
    "/signet.admin.v1.Admin/Probe",
    "/signet.admin.v1.Admin/Status",
    "/signet.admin.v1.Admin/TranslateNetworkPolicies",
];

/// What is served on the observer's listener: what Hubble's tools ask for, and nothing of
/// Signet's own.
pub const HUBBLE: &[&str] = &[
    "/grpc.health.v1.Health/Check",
    "/observer.Observer/GetFlows",
    "/observer.Observer/GetNamespaces",
    "/observer.Observer/GetNodes",
    "/observer.Observer/ServerStatus",
    "/peer.Peer/Notify",
];

/// Who is let in, and to what.
#[derive(Debug)]
pub struct Gate {
    /// The methods that are served.
    pub methods: &'static [&'static str],
    /// Judges tokens; `None` where there is no API server to ask.
    pub callers: Option<Arc<Callers>>,
    /// Whoever proves one of these identities needs no token.
    pub clients: Vec<SpiffeId>,
}

impl Gate {
    /// The services behind it. A request's [`Client`], if its connection has one, is among the
    /// request's extensions.
    pub fn guard(self, routes: Routes) -> Router {
        routes.into_axum_router().layer(from_fn_with_state(Arc::new(self), admit))
    }

    async fn judge(&self, client: Option<&Client>, token: Option<&str>) -> Result<(), Refused> {
        let proved = client.map(|client| client.identity(Timestamp::now())).transpose();
        if let Ok(Some(id)) = &proved
            && self.clients.contains(id)
        {
            return Ok(());
        }
        match (token, &self.callers) {
            (Some(token), Some(callers)) => callers.check(token).await.map(drop),
            (Some(_), None) => Err(Refused::NoReviews),
            // Nobody is asked about a call without a token.
            (None, callers) => Err(match proved {
                Ok(Some(id)) => Refused::NotListed(id),
                Ok(None) if callers.is_none() => Refused::NoCertificate,
                Ok(None) => Refused::NoToken,
                Err(error) => Refused::Certificate(error),
            }),
        }
    }
}

async fn admit(State(gate): State<Arc<Gate>>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    if !gate.methods.contains(&path) {
        let status =
            Status::permission_denied("this method is served on the node's admin socket only");
        return status.into_http();
    }
    let token = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "))
        .map(str::to_owned);
    let client = request.extensions().get::<Client>().cloned();
    match gate.judge(client.as_ref(), token.as_deref()).await {
        Ok(()) => next.run(request).await,
        Err(refused) => status(&refused).into_http(),
    }
}

fn status(refused: &Refused) -> Status {
    let message = refused.to_string();
    match refused {
        Refused::NoToken
        | Refused::NoCertificate
        | Refused::Malformed
        | Refused::Unknown
        | Refused::NoReviews
        | Refused::Certificate(_) => Status::unauthenticated(message),
        Refused::NotAllowed(_) | Refused::NotListed(_) => Status::permission_denied(message),
        Refused::TooMany => Status::resource_exhausted(message),
        Refused::NotReviewed(_) => Status::unavailable(message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Methods of a service as its .proto file has them.
    fn methods(service: &str, proto: &str) -> Vec<String> {
        let rpc = |line: &str| {
            let name = line.trim().strip_prefix("rpc ")?.split('(').next()?;
            Some(format!("/{service}/{name}"))
        };
        proto.lines().filter_map(rpc).collect()
    }

    /// Whoever adds a method decides here whether it is served over TCP.
    #[test]
    fn every_method_is_either_listed_or_local() {
        const LOCAL: &[&str] = &[
            "/observer.Observer/GetAgentEvents",
            "/observer.Observer/GetDebugEvents",
            // Who may see flows may not read the agent's log.
            "/signet.admin.v1.Admin/ListLogs",
        ];
        let mut all = methods("signet.admin.v1.Admin", include_str!("../../proto/admin.proto"));
        assert!(all.contains(&"/signet.admin.v1.Admin/Status".to_owned()), "{all:?}");
        all.extend(methods("observer.Observer", include_str!("../../proto/observer.proto")));
        all.extend(methods("peer.Peer", include_str!("../../proto/peer.proto")));
        for method in &all {
            let (listed, local) = (READ_ONLY.contains(&&**method), LOCAL.contains(&&**method));
            assert!(listed != local, "{method}: list it as READ_ONLY, or here as local");
        }
        for listed in READ_ONLY.iter().filter(|m| !m.starts_with("/grpc.")) {
            assert!(all.iter().any(|method| method == listed), "{listed} is no method");
        }
        // Nothing is served to Hubble's tools that is not to viewers.
        assert!(HUBBLE.iter().all(|method| READ_ONLY.contains(method)));
        assert!(!HUBBLE.iter().any(|method| method.contains("signet")));
    }
}
