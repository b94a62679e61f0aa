//! `signet.v1.Authority`: the bundle, reports of it, JWT-SVIDs.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use tonic::{Request, Response, Status};

use super::{
    callers::Caller,
    keeper::Reports,
    listen::Peer,
    request::{Asked, Authority, Refusal, validity},
};
use crate::{
    ca::jwt_keys::LONGEST_TOKEN,
    proto::authority::{
        FetchJwtsvidRequest, FetchJwtsvidResponse, GetBundleRequest, GetBundleResponse,
        ReportBundleRequest, ReportBundleResponse,
        authority_server::{Authority as AuthorityService, AuthorityServer},
    },
    spiffe::{JwtClaims, SpiffeBundle, SpiffeId, jwt::MAX_AUDIENCES},
};

/// How long a token is valid when the request leaves it open.
const USUAL_TOKEN: Duration = Duration::from_secs(300);
/// The longest audience, in bytes.
const MAX_AUDIENCE: usize = 1024;
/// The longest request that is read, in bytes.
const MAX_REQUEST: usize = 128 * 1024;

/// The service.
pub struct OwnApi {
    authority: Arc<Authority>,
    reports: Arc<Reports>,
    refresh_hint: Duration,
    /// The claim `iss` of tokens, when OIDC is served.
    issuer: Option<String>,
}

impl OwnApi {
    /// Answers from `authority`; reports go to `reports`.
    pub fn new(
        authority: Arc<Authority>,
        reports: Arc<Reports>,
        refresh_hint: Duration,
        issuer: Option<String>,
    ) -> Self {
        Self { authority, reports, refresh_hint, issuer }
    }

    /// For a tonic server.
    pub fn into_service(self) -> AuthorityServer<Self> {
        AuthorityServer::new(self).max_decoding_message_size(MAX_REQUEST)
    }

    async fn token(
        &self,
        caller: &Caller,
        request: &FetchJwtsvidRequest,
    ) -> Result<(String, String, Timestamp), Refusal> {
        let id = SpiffeId::parse(&request.spiffe_id)?;
        let ttl = validity(request.validity_duration, USUAL_TOKEN, LONGEST_TOKEN)?;
        let audiences = &request.audience;
        let fits = |a: &String| (1..=MAX_AUDIENCE).contains(&a.len());
        if !(1..=MAX_AUDIENCES).contains(&audiences.len()) || !audiences.iter().all(fits) {
            return Err(Refusal::Request(format!(
                "1 to {MAX_AUDIENCES} audiences of 1 to {MAX_AUDIENCE} bytes are needed"
            )));
        }
        let pod = self.authority.authorize(caller, &id).await?;
        let now = Timestamp::now();
        let expires_at = now.saturating_add(ttl).unwrap_or(now);
        let claims = JwtClaims {
            id,
            audiences: audiences.clone(),
            issued_at: now,
            expires_at,
            issuer: self.issuer.clone(),
        };
        Ok((self.authority.signing.load().jwt.sign(&claims)?, pod, expires_at))
    }
}

fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    let caller = request.extensions().get::<Caller>().cloned();
    caller.ok_or_else(|| Status::internal("the caller is not known"))
}

#[tonic::async_trait]
impl AuthorityService for OwnApi {
    async fn get_bundle(
        &self,
        _: Request<GetBundleRequest>,
    ) -> Result<Response<GetBundleResponse>, Status> {
        let signing = self.authority.signing.load();
        let bundle = SpiffeBundle {
            x509: signing.bundle.clone(),
            jwt: signing.jwt_bundle.clone(),
            sequence: Some(signing.sequence),
            refresh_hint: Some(self.refresh_hint),
        };
        let jwks = bundle.encode().map_err(|e| Status::internal(e.to_string()))?;
        Ok(Response::new(GetBundleResponse {
            trust_domain: self.authority.domain.as_str().into(),
            x509_authorities: signing.bundle.certificates().map(|c| c.to_vec()).collect(),
            jwks: jwks.into_bytes(),
            sequence: signing.sequence,
            refresh_hint: u32::try_from(self.refresh_hint.as_secs()).unwrap_or(u32::MAX),
        }))
    }

    async fn report_bundle(
        &self,
        request: Request<ReportBundleRequest>,
    ) -> Result<Response<ReportBundleResponse>, Status> {
        let caller = caller(&request)?;
        let digest = <[u8; 32]>::try_from(&request.into_inner().digest[..])
            .map_err(|_| Status::invalid_argument("a bundle's digest has 32 bytes"))?;
        self.reports.note(&caller.node, digest);
        Ok(Response::new(ReportBundleResponse {}))
    }

    async fn fetch_jwtsvid(
        &self,
        request: Request<FetchJwtsvidRequest>,
    ) -> Result<Response<FetchJwtsvidResponse>, Status> {
        let peer = request.extensions().get::<Peer>().map(|p| p.0);
        let caller = caller(&request)?;
        let request = request.into_inner();
        let identity = &request.spiffe_id;
        let asked = Asked {
            authority: &self.authority,
            method: "FetchJWTSVID",
            caller: &caller,
            peer,
            identity,
        };
        match self.token(&caller, &request).await {
            Ok((token, pod, not_after)) => {
                asked.issued(&pod, not_after);
                Ok(Response::new(FetchJwtsvidResponse { token }))
            }
            Err(refusal) => Err(asked.refused(&refusal)),
        }
    }
}
