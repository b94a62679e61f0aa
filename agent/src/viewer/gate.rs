//! Which methods are served over TCP, and that each call is somebody's who may.

use std::sync::Arc;

use axum::{
    Router,
    extract::{Request, State},
    middleware::{Next, from_fn_with_state},
    response::Response,
};
use http::header;
use tonic::{Status, service::Routes};

use super::callers::{Callers, Refused};

/// What is served over TCP: nothing of it changes anything. Everything else answers on the admin
/// socket only.
pub const READ_ONLY: &[&str] = &[
    "/grpc.health.v1.Health/Check",
    "/observer.Observer/GetFlows",
    "/observer.Observer/GetNamespaces",
    "/observer.Observer/GetNodes",
    "/observer.Observer/ServerStatus",
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

/// The services behind the gate.
pub fn guarded(routes: Routes, callers: Arc<Callers>) -> Router {
    routes.into_axum_router().layer(from_fn_with_state(callers, admit))
}

async fn admit(State(callers): State<Arc<Callers>>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    if !READ_ONLY.contains(&path) {
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
    match judge(&callers, token.as_deref()).await {
        Ok(()) => next.run(request).await,
        Err(status) => status.into_http(),
    }
}

async fn judge(callers: &Callers, token: Option<&str>) -> Result<(), Status> {
    // Nobody is asked about a call without a token.
    let result = match token {
        Some(token) => callers.check(token).await.map(drop),
        None => Err(Refused::NoToken),
    };
    result.map_err(|refused| {
        let message = refused.to_string();
        match refused {
            Refused::NoToken | Refused::Malformed | Refused::Unknown => {
                Status::unauthenticated(message)
            }
            Refused::NotAllowed(_) => Status::permission_denied(message),
            Refused::TooMany => Status::resource_exhausted(message),
            Refused::NotReviewed(_) => Status::unavailable(message),
        }
    })
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
        const LOCAL: &[&str] =
            &["/observer.Observer/GetAgentEvents", "/observer.Observer/GetDebugEvents"];
        let mut all = methods("signet.admin.v1.Admin", include_str!("../../proto/admin.proto"));
        assert!(all.contains(&"/signet.admin.v1.Admin/Status".to_owned()), "{all:?}");
        all.extend(methods("observer.Observer", include_str!("../../proto/observer.proto")));
        for method in &all {
            let (listed, local) = (READ_ONLY.contains(&&**method), LOCAL.contains(&&**method));
            assert!(listed != local, "{method}: list it as READ_ONLY, or here as local");
        }
        for listed in READ_ONLY.iter().filter(|m| !m.starts_with("/grpc.")) {
            assert!(all.iter().any(|method| method == listed), "{listed} is no method");
        }
    }
}
