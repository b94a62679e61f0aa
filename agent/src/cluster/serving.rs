//! Which of a Service's endpoints a client is given: by family, readiness, node and zone, as
//! kube-proxy chooses (Kubernetes: Virtual IPs and Service Proxies; Topology Aware Routing).

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::model::{Endpoint, Service, ServicePort, World};

impl World {
    /// The Service that a dialled address and port belong to. An external address is a Service's
    /// only on its ports: on others it is whatever is out there.
    pub fn service_at(&self, dialled: SocketAddr, protocol: u8) -> Option<&Arc<Service>> {
        let ip = dialled.ip().to_canonical();
        if let Some(name) = self.services_by_ip.get(&ip) {
            return self.services.get(name);
        }
        let claims = self.services_by_external_ip.get(&ip)?;
        claims.iter().filter_map(|name| self.services.get(name)).find(|service| {
            service.ports.iter().any(|p| p.port == dialled.port() && p.protocol == protocol)
        })
    }

    /// The endpoints of a Service's port that a client on `node` is given, when it dials `vip`.
    ///
    /// Of the address's own family, for the application may listen on one family only. With
    /// `internalTrafficPolicy: Local` those of the client's node, but behind an external address
    /// all: there that policy says nothing, and pods are not outside. Else those that are hinted
    /// for the node's zone, where every one has hints. Ready ones; with none, those that serve
    /// while terminating.
    pub fn endpoints_for<'a>(
        &self,
        service: &Service,
        port: &'a ServicePort,
        vip: IpAddr,
        node: Option<&str>,
    ) -> Vec<&'a Endpoint> {
        let vip = vip.to_canonical();
        let is_local = service.node_local && !service.external_ips.contains(&vip);
        let mut candidates: Vec<&Endpoint> = port
            .endpoints
            .iter()
            .filter(|endpoint| endpoint.ip.to_canonical().is_ipv4() == vip.is_ipv4())
            .filter(|endpoint| !is_local || (node.is_some() && endpoint.node.as_deref() == node))
            .collect();
        let wanted = candidates.iter().any(|endpoint| endpoint.ready);
        candidates.retain(|endpoint| if wanted { endpoint.ready } else { endpoint.serving });
        let zone = node.and_then(|node| self.zones.get(node));
        match zone {
            Some(zone) if !is_local => in_zone(candidates, zone),
            _ => candidates,
        }
    }
}

/// Those for the zone, unless one has no hint or the zone would have none.
fn in_zone<'a>(candidates: Vec<&'a Endpoint>, zone: &Arc<str>) -> Vec<&'a Endpoint> {
    if candidates.iter().any(|endpoint| endpoint.zones.is_empty()) {
        return candidates;
    }
    let near: Vec<_> = candidates.iter().filter(|e| e.zones.contains(zone)).copied().collect();
    if near.is_empty() { candidates } else { near }
}

/// The order in which a client with affinity tries endpoints: by rendezvous hashing, so that it
/// keeps its endpoint while that is there, whatever becomes of the others.
pub fn by_affinity(candidates: &mut [&Endpoint], client: IpAddr) {
    candidates.sort_by_key(|endpoint| {
        // The same keys in every agent: a client that moves between them is no case.
        let mut hasher = DefaultHasher::new();
        (client, endpoint.ip, endpoint.port).hash(&mut hasher);
        hasher.finish()
    });
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::{cluster::model::ObjectName, spiffe::TrustDomain};

    const VIP: &str = "10.96.0.1";
    const BALANCED: &str = "203.0.113.9";

    fn endpoint(ip: &str, node: &str, zones: &[&str]) -> Endpoint {
        Endpoint {
            ip: ip.parse().unwrap(),
            port: 8080,
            ready: true,
            serving: true,
            node: Some(node.into()),
            zones: zones.iter().map(|zone| Arc::from(*zone)).collect(),
        }
    }

    fn service(endpoints: Vec<Endpoint>) -> Service {
        let port = ServicePort { name: "".into(), port: 80, protocol: 6, endpoints };
        Service {
            name: ObjectName { namespace: "shop".into(), name: "web".into() },
            cluster_ips: vec![VIP.parse().unwrap()],
            external_ips: vec![BALANCED.parse().unwrap()],
            node_local: false,
            sticky: false,
            ports: vec![port],
            is_resolver: false,
        }
    }

    fn world(service: &Service) -> World {
        let mut world = World::empty(TrustDomain::parse("cluster.local").unwrap());
        world.zones = [("n1".into(), "a".into()), ("n2".into(), "b".into())].into();
        world.services.insert(service.name.clone(), Arc::new(service.clone()));
        world.services_by_ip.insert(VIP.parse().unwrap(), service.name.clone());
        let claims = vec![service.name.clone()];
        world.services_by_external_ip.insert(BALANCED.parse().unwrap(), claims);
        world
    }

    fn given(service: &Service, vip: &str, node: Option<&str>) -> Vec<String> {
        let vip = vip.parse().unwrap();
        let endpoints = world(service);
        let found = endpoints.endpoints_for(service, &service.ports[0], vip, node);
        found.iter().map(|endpoint| endpoint.ip.to_string()).collect()
    }

    #[test]
    fn local_means_the_client_s_node_and_nothing_behind_external_addresses() {
        let mut web =
            service(vec![endpoint("10.0.0.1", "n1", &[]), endpoint("10.0.0.2", "n2", &[])]);
        assert_eq!(given(&web, VIP, Some("n1")), ["10.0.0.1", "10.0.0.2"]);
        web.node_local = true;
        assert_eq!(given(&web, VIP, Some("n1")), ["10.0.0.1"]);
        assert_eq!(given(&web, VIP, Some("n2")), ["10.0.0.2"]);
        assert!(given(&web, VIP, Some("n3")).is_empty());
        assert!(given(&web, VIP, None).is_empty());
        assert_eq!(given(&web, BALANCED, Some("n3")).len(), 2);
        // A local one that terminates goes before ready ones elsewhere: those are not for it.
        web.ports[0].endpoints[0].ready = false;
        assert_eq!(given(&web, VIP, Some("n1")), ["10.0.0.1"]);
        web.node_local = false;
        assert_eq!(given(&web, VIP, Some("n1")), ["10.0.0.2"]);
    }

    #[test]
    fn hints_hold_where_every_endpoint_has_some_and_the_zone_has_one() {
        let hinted = vec![endpoint("10.0.0.1", "n1", &["a"]), endpoint("10.0.0.2", "n2", &["b"])];
        let web = service(hinted.clone());
        assert_eq!(given(&web, VIP, Some("n1")), ["10.0.0.1"]);
        assert_eq!(given(&web, VIP, Some("n2")), ["10.0.0.2"]);
        assert_eq!(given(&web, VIP, Some("zoneless")).len(), 2);
        let with_one_more = |zones: &[&str]| {
            let more = endpoint("10.0.0.3", "n3", zones);
            service(hinted.iter().cloned().chain([more]).collect())
        };
        assert_eq!(given(&with_one_more(&[]), VIP, Some("n1")).len(), 3);
        assert_eq!(given(&with_one_more(&["a"]), VIP, Some("n1")), ["10.0.0.1", "10.0.0.3"]);
        let elsewhere = service(vec![endpoint("10.0.0.2", "n2", &["b"])]);
        assert_eq!(given(&elsewhere, VIP, Some("n1")), ["10.0.0.2"]);
    }

    #[test]
    fn an_external_address_is_a_service_s_on_its_ports_alone() {
        let web = service(vec![]);
        let world = world(&web);
        let at = |to: &str| world.service_at(to.parse().unwrap(), 6).map(|s| s.name.clone());
        assert_eq!(at("10.96.0.1:80"), Some(web.name.clone()));
        assert_eq!(at("10.96.0.1:81"), Some(web.name.clone()), "its own address, on every port");
        assert_eq!(at("203.0.113.9:80"), Some(web.name.clone()));
        assert_eq!(at("[::ffff:203.0.113.9]:80"), Some(web.name.clone()));
        assert_eq!(at("203.0.113.9:81"), None);
        assert_eq!(at("203.0.113.10:80"), None);
    }

    #[test]
    fn a_client_keeps_its_endpoint_while_others_come_and_go() {
        let all: Vec<Endpoint> =
            (1..=20).map(|i| endpoint(&format!("10.0.0.{i}"), "n1", &[])).collect();
        let first = |endpoints: &[&Endpoint], client: &str| {
            let mut order = endpoints.to_vec();
            by_affinity(&mut order, client.parse().unwrap());
            order[0].ip
        };
        let every: Vec<&Endpoint> = all.iter().collect();
        let mut chosen = BTreeSet::new();
        for client in (1..=40).map(|i| format!("10.1.0.{i}")) {
            let mine = first(&every, &client);
            chosen.insert(mine);
            // Any other goes: mine stays.
            for gone in all.iter().filter(|endpoint| endpoint.ip != mine) {
                let left: Vec<&Endpoint> = all.iter().filter(|e| e.ip != gone.ip).collect();
                assert_eq!(first(&left, &client), mine);
            }
        }
        assert!(chosen.len() > 8, "clients are spread: {chosen:?}");
    }
}
