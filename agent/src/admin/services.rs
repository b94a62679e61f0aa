//! `signet services`, assembled: what this node knows of Services, and how its pods get there.

use super::inputs::StatusInputs;
use crate::{
    cluster::model::{Endpoint, Service, World},
    proto::admin::{
        KnownService, KnownServiceEndpoint, KnownServicePort, ListServicesRequest,
        ListServicesResponse,
    },
};

/// Services in one part; one has at most some thousands of endpoints.
const PART: usize = 32;

/// The answer for a moment, by name, in parts.
pub fn assemble(inputs: &StatusInputs, request: &ListServicesRequest) -> Vec<ListServicesResponse> {
    let Some(state) = &inputs.state else { return Vec::new() };
    let world = &state.world;
    let wanted = |asked: &str, is: &str| asked.is_empty() || asked == is;
    let found: Vec<&Service> = world
        .services
        .values()
        .map(|service| &**service)
        .filter(|s| wanted(&request.namespace, &s.name.namespace))
        .filter(|s| wanted(&request.service, &s.name.name))
        .collect();
    super::parted(&found, PART)
        .map(|part| ListServicesResponse {
            node: inputs.node.to_string(),
            revision: state.revision,
            services: part.iter().map(|service| known(world, service)).collect(),
        })
        .collect()
}

fn known(world: &World, service: &Service) -> KnownService {
    KnownService {
        namespace: service.name.namespace.to_string(),
        service: service.name.name.to_string(),
        addresses: service
            .cluster_ips
            .iter()
            .chain(&service.external_ips)
            .map(ToString::to_string)
            .collect(),
        ports: service
            .ports
            .iter()
            .map(|port| KnownServicePort {
                name: port.name.to_string(),
                port: port.port.into(),
                protocol: port.protocol.into(),
                endpoints: port.endpoints.iter().map(|e| endpoint(world, e)).collect(),
            })
            .collect(),
        is_resolver: service.is_resolver,
    }
}

fn endpoint(world: &World, endpoint: &Endpoint) -> KnownServiceEndpoint {
    let pod = world.pod_at(endpoint.ip);
    let way = match pod {
        Some(pod) if pod.is_ambient() => "tunnel",
        Some(pod) if pod.is_enrolled() && world.served.contains_key(&pod.uid) => "tunnel",
        Some(pod) if pod.is_enrolled() => "unserved",
        _ => "direct",
    };
    let name = pod.map(|pod| format!("{}/{}", pod.name.namespace, pod.name.name));
    let node = pod.and_then(|pod| pod.node.as_deref());
    KnownServiceEndpoint {
        address: endpoint.ip.to_string(),
        port: endpoint.port.into(),
        pod: name.unwrap_or_default(),
        node: node.unwrap_or_default().into(),
        state: match (endpoint.ready, endpoint.serving) {
            (true, _) => "ready",
            (false, true) => "terminating",
            (false, false) => "not-ready",
        }
        .into(),
        way: way.into(),
    }
}
