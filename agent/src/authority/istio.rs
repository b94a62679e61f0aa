//! Istio's CA API: `CreateCertificate`.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use prost_types::value::Kind;
use tonic::{Request, Response, Status};

use super::{
    callers::Caller,
    listen::Peer,
    output::to_pem,
    request::{Asked, Authority, Refusal, validity},
};
use crate::{
    ca::{Csr, CsrError, csr::MAX_CSR_LEN},
    proto::istio_ca::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_server::{
            IstioCertificateService, IstioCertificateServiceServer,
        },
    },
    spiffe::{Bundle, SpiffeId},
};

/// The longest request that is read, in bytes: more than any that is signed, so that a caller
/// who is known gets the exact reason.
const MAX_REQUEST: usize = 1024 * 1024 + 64 * 1024;

/// The service.
pub struct IstioCa {
    authority: Arc<Authority>,
    usual: Duration,
    longest: Duration,
}

impl IstioCa {
    /// Signs for `usual` when the request leaves it open, for `longest` at most.
    pub fn new(authority: Arc<Authority>, usual: Duration, longest: Duration) -> Self {
        Self { authority, usual, longest }
    }

    /// For a tonic server.
    pub fn into_service(self) -> IstioCertificateServiceServer<Self> {
        IstioCertificateServiceServer::new(self).max_decoding_message_size(MAX_REQUEST)
    }

    async fn create(
        &self,
        caller: &Caller,
        identity: Option<&str>,
        request: &IstioCertificateRequest,
    ) -> Result<(Vec<String>, String, Timestamp), Refusal> {
        let identity = identity.ok_or_else(|| {
            Refusal::Request(
                "the metadata has no ImpersonatedIdentity: name the workload's SPIFFE ID".into(),
            )
        })?;
        let id = SpiffeId::parse(identity)?;
        let ttl = validity(request.validity_duration, self.usual, self.longest)?;
        let pod = self.authority.authorize(caller, &id).await?;
        if request.csr.len() > MAX_CSR_LEN {
            return Err(CsrError::TooLong(request.csr.len()).into());
        }
        let csr = Csr::read(request.csr.as_bytes(), &id)?;
        let signing = self.authority.signing.load_full();
        let now = Timestamp::now();
        let chain = signing.intermediate.issue(&id, &csr.public_key, now, ttl)?;
        let mut answer = Vec::with_capacity(chain.len() + 1);
        for certificate in &chain {
            answer.push(pem::encode(&pem::Pem::new("CERTIFICATE", certificate.to_vec())));
        }
        answer.push(roots(&signing.bundle));
        let not_after = now.saturating_add(ttl).unwrap_or(now);
        Ok((answer, pod, not_after.min(signing.intermediate.not_after())))
    }
}

/// The last element of the answer: every root.
fn roots(bundle: &Bundle) -> String {
    to_pem(bundle)
}

#[tonic::async_trait]
impl IstioCertificateService for IstioCa {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let peer = request.extensions().get::<Peer>().map(|p| p.0);
        let caller = request.extensions().get::<Caller>().cloned();
        let caller = caller.ok_or_else(|| Status::internal("the caller is not known"))?;
        let request = request.into_inner();
        let identity = impersonated(&request);
        let asked = Asked {
            authority: &self.authority,
            method: "CreateCertificate",
            caller: &caller,
            peer,
            identity: identity.unwrap_or_default(),
        };
        match self.create(&caller, identity, &request).await {
            Ok((cert_chain, pod, not_after)) => {
                asked.issued(&pod, not_after);
                Ok(Response::new(IstioCertificateResponse { cert_chain }))
            }
            Err(refusal) => Err(asked.refused(&refusal)),
        }
    }
}

fn impersonated(request: &IstioCertificateRequest) -> Option<&str> {
    match request.metadata.as_ref()?.fields.get("ImpersonatedIdentity")?.kind.as_ref()? {
        Kind::StringValue(text) if !text.is_empty() => Some(text),
        _ => None,
    }
}
