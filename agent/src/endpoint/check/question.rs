//! Questions as people write them.

use std::net::IpAddr;

use signet_ebpf::abi::proto;

use super::{From, Question};
use crate::{
    cluster::model::ObjectName,
    config::yaml::shorten,
    policy::native::is_dns_name,
    spiffe::{SpiffeId, TrustDomain},
};

impl Question {
    /// `NS/SA[@IP]`, `spiffe://…[@IP]` or `@IP`; `NS/POD:PORT`; `tcp` or `udp`.
    ///
    /// # Errors
    ///
    /// What is wrong, with the form that is wanted.
    pub fn parse(
        from: &str,
        to: &str,
        protocol: &str,
        plaintext: bool,
        domain: &TrustDomain,
    ) -> Result<Self, String> {
        let (to, port) = parse_to(to)?;
        let protocol = match protocol {
            "" | "tcp" => proto::TCP,
            "udp" => proto::UDP,
            other => return Err(format!("{:?} is not tcp or udp", shorten(other))),
        };
        Ok(Self { from: parse_from(from, domain)?, to, port, protocol, plaintext, request: None })
    }
}

fn parse_from(text: &str, domain: &TrustDomain) -> Result<From, String> {
    let wrong = || {
        format!(
            "{:?} is not a source; write NAMESPACE/ACCOUNT, NAMESPACE/ACCOUNT@ADDRESS, a SPIFFE \
             ID, or @ADDRESS",
            shorten(text)
        )
    };
    let (who, address) = match text.rsplit_once('@') {
        Some((who, address)) => {
            let ip: IpAddr = address.parse().map_err(|_| {
                format!("{:?} is not an address; write it like 10.0.0.1", shorten(address))
            })?;
            (who, Some(ip.to_canonical()))
        }
        None => (text, None),
    };
    let identity = if who.is_empty() {
        None
    } else if who.starts_with("spiffe://") {
        Some(SpiffeId::parse(who).map_err(|error| format!("{:?}: {error}", shorten(who)))?)
    } else {
        let (namespace, account) = who.split_once('/').ok_or_else(wrong)?;
        if !is_dns_name(namespace, 63) || !is_dns_name(account, 253) {
            return Err(wrong());
        }
        let id = SpiffeId::for_service_account(domain, namespace, account);
        Some(id.map_err(|error| error.to_string())?)
    };
    if identity.is_none() && address.is_none() {
        return Err(wrong());
    }
    Ok(From { identity, address })
}

fn parse_to(text: &str) -> Result<(ObjectName, u16), String> {
    let wrong = || format!("{:?} is not a destination; write NAMESPACE/POD:PORT", shorten(text));
    let (pod, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    let (namespace, name) = pod.split_once('/').ok_or_else(wrong)?;
    let port = port.parse::<u16>().ok().filter(|port| *port != 0).ok_or_else(wrong)?;
    if !is_dns_name(namespace, 63) || !is_dns_name(name, 253) {
        return Err(wrong());
    }
    Ok((ObjectName { namespace: namespace.into(), name: name.into() }, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(from: &str, to: &str, protocol: &str) -> Result<Question, String> {
        let domain = TrustDomain::parse("cluster.local").unwrap();
        Question::parse(from, to, protocol, false, &domain)
    }

    #[test]
    fn questions_are_read() {
        let question = parse("shop/front@::ffff:10.0.0.1", "shop/db-0:5432", "udp").unwrap();
        let id = question.from.identity.unwrap();
        assert_eq!(id.as_str(), "spiffe://cluster.local/ns/shop/sa/front");
        assert_eq!(question.from.address.unwrap().to_string(), "10.0.0.1");
        assert_eq!((question.port, question.protocol), (5432, proto::UDP));
        let foreign = parse("spiffe://partner.test/x@fd00::1", "shop/db:1", "tcp").unwrap();
        assert_eq!(foreign.from.identity.unwrap().as_str(), "spiffe://partner.test/x");
        assert!(parse("@192.0.2.1", "shop/db:1", "").unwrap().from.identity.is_none());
        for (from, to, protocol, wanted) in [
            ("front", "shop/db:1", "", "is not a source"),
            ("", "shop/db:1", "", "is not a source"),
            ("shop/Front", "shop/db:1", "", "is not a source"),
            ("shop/front@x", "shop/db:1", "", "is not an address"),
            ("spiffe://", "shop/db:1", "", "spiffe://"),
            ("shop/front", "shop/db", "", "is not a destination"),
            ("shop/front", "db:1", "", "is not a destination"),
            ("shop/front", "shop/db:0", "", "is not a destination"),
            ("shop/front", "shop/db:1", "icmp", "is not tcp or udp"),
        ] {
            let error = parse(from, to, protocol).unwrap_err();
            assert!(error.contains(wanted), "{error}");
        }
    }
}
