//! Flow records as people and programs read them.

use std::net::IpAddr;

use anstyle::{AnsiColor, Style};
use jiff::{Timestamp, tz::TimeZone};
use serde::Serialize;
use signet_ebpf::abi::Direction;

use super::table::printable;
use crate::{
    flow::{FlowEvent, FlowRecord, HttpRecord, Party},
    observer::decode::SeenFlow,
    telemetry::names,
};

/// Columns of `-o table`.
pub const TABLE: [&str; 8] =
    ["TIME", "SOURCE", "DESTINATION", "PROTO", "VIA", "VERDICT", "REASON", "POLICY"];
/// Columns that `-o wide` adds.
pub const WIDE: [&str; 8] =
    ["NODE", "REPORTER", "SOURCE-ID", "DEST-ID", "SENT", "RECEIVED", "DURATION", "REVISION"];
/// The column that is coloured.
pub const VERDICT_COLUMN: usize = 5;

/// How a verdict is coloured.
pub fn style(verdict: &str) -> Option<Style> {
    let style = Style::new();
    match verdict {
        "FORWARDED" => Some(style.fg_color(Some(AnsiColor::Green.into()))),
        "DROPPED" => Some(style.fg_color(Some(AnsiColor::Red.into())).bold()),
        "AUDIT" => Some(style.fg_color(Some(AnsiColor::Yellow.into()))),
        "END" => Some(style.dimmed()),
        _ => None,
    }
}

/// Whose side it is, as the history of flows names it: `shop/frontend`, or a SPIFFE ID; empty
/// where only an address is known.
pub fn workload(party: &Party) -> String {
    match (&party.pod, &party.service_account, &party.identity) {
        (Some((namespace, _)), Some(account), _) => format!("{namespace}/{account}"),
        (_, _, Some(identity)) => identity.to_string(),
        _ => String::new(),
    }
}

/// `-o compact`.
pub fn compact(seen: &SeenFlow) -> String {
    let r = &seen.record;
    let verdict = verdict(r);
    let (on, off) = match style(verdict) {
        Some(style) => (style.render().to_string(), style.render_reset().to_string()),
        None => Default::default(),
    };
    let mut line = format!(
        "{} {} {} {} ({},{}) -> {} ({},{}) {} {} {on}{verdict}{off} {} {}",
        time(r.time),
        printable(&r.node),
        match r.direction {
            Direction::Ingress => "in",
            Direction::Egress => "out",
        },
        with_port(&r.source),
        identity(&r.source, &seen.trust_domain),
        r.source.known_by.name(),
        with_port(&r.destination),
        identity(&r.destination, &seen.trust_domain),
        r.destination.known_by.name(),
        names::protocol(r.protocol),
        r.via.name(),
        printable(&seen.reason),
        policy(r, true),
    );
    if let FlowEvent::End { sent, received, duration } = r.event {
        let seconds = duration.as_secs_f64();
        line.push_str(&format!(" sent={sent} received={received} duration={seconds:.3}s"));
    }
    if let Some(http) = &r.http {
        line.push_str(&format!(" {}", request(http)));
    }
    for (key, value) in &seen.extra {
        line.push_str(&format!(" {}={}", printable(key), pair_value(value)));
    }
    line
}

/// A row of `-o table`, or of `-o wide`.
pub fn row(seen: &SeenFlow, wide: bool) -> Vec<String> {
    let r = &seen.record;
    let zoned = r.time.to_zoned(TimeZone::UTC);
    let mut row = vec![
        zoned.strftime("%H:%M:%S%.3f").to_string(),
        name(&r.source),
        with_port(&r.destination),
        names::protocol(r.protocol),
        r.via.name().into(),
        verdict(r).into(),
        match &r.http {
            Some(http) => format!("{}: {}", printable(&seen.reason), request(http)),
            None => printable(&seen.reason),
        },
        policy(r, false),
    ];
    if wide {
        let (sent, received, duration) = match r.event {
            FlowEvent::Verdict => ("-".into(), "-".into(), "-".into()),
            FlowEvent::End { sent, received, duration } => {
                (sent.to_string(), received.to_string(), format!("{:.3}s", duration.as_secs_f64()))
            }
        };
        row.extend([
            printable(&r.node),
            r.reporter.name().into(),
            identity(&r.source, &seen.trust_domain),
            identity(&r.destination, &seen.trust_domain),
            sent,
            received,
            duration,
            r.revision.to_string(),
        ]);
    }
    row
}

/// `-o json`, without the line's end.
pub fn json(seen: &SeenFlow) -> serde_json::Result<String> {
    let r = &seen.record;
    let (event, end) = match r.event {
        FlowEvent::Verdict => ("verdict", None),
        FlowEvent::End { sent, received, duration } => {
            ("end", Some(EndJson { sent, received, duration_seconds: duration.as_secs_f64() }))
        }
    };
    serde_json::to_string(&FlowJson {
        schema: "signet.dev/flow/v1",
        event,
        time: r.time.to_string(),
        uuid: r.uuid.to_string(),
        node: &r.node,
        reporter: r.reporter.name(),
        direction: names::direction(r.direction),
        protocol: names::protocol(r.protocol),
        via: r.via.name(),
        verdict: names::verdict(r.verdict),
        reason: &seen.reason,
        revision: r.revision,
        policy: r.policy.as_ref().map(|p| PolicyJson {
            kind: &p.kind,
            namespace: &p.namespace,
            name: &p.name,
        }),
        source: PartyJson::of(&r.source),
        destination: PartyJson::of(&r.destination),
        end,
        http: r.http.as_deref().map(|http| HttpJson {
            method: &http.method,
            path: &http.path,
            version: http.version,
            status: http.status,
            latency_seconds: http.latency.as_secs_f64(),
        }),
        extra: seen.extra.iter().map(|(k, v)| (k.clone(), v.clone().into())).collect(),
    })
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct FlowJson<'a> {
    schema: &'static str,
    event: &'static str,
    time: String,
    uuid: String,
    node: &'a str,
    reporter: &'static str,
    direction: &'static str,
    protocol: String,
    via: &'static str,
    verdict: &'static str,
    reason: &'a str,
    revision: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<PolicyJson<'a>>,
    source: PartyJson<'a>,
    destination: PartyJson<'a>,
    #[serde(flatten)]
    end: Option<EndJson>,
    #[serde(skip_serializing_if = "Option::is_none")]
    http: Option<HttpJson<'a>>,
    #[serde(skip_serializing_if = "serde_json::Map::is_empty")]
    extra: serde_json::Map<String, serde_json::Value>,
}

#[derive(Serialize)]
struct PolicyJson<'a> {
    kind: &'a str,
    namespace: &'a str,
    name: &'a str,
}

/// One HTTP request.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct HttpJson<'a> {
    method: &'a str,
    path: &'a str,
    version: &'static str,
    status: u16,
    latency_seconds: f64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct EndJson {
    sent: u64,
    received: u64,
    duration_seconds: f64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PartyJson<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pod: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    service: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    service_account: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    identity: Option<&'a str>,
    known_by: &'static str,
    ip: IpAddr,
    port: u16,
}

impl<'a> PartyJson<'a> {
    fn of(party: &'a Party) -> Self {
        let pod = party.pod.as_ref();
        Self {
            namespace: pod.map(|(namespace, _)| &**namespace),
            pod: pod.map(|(_, name)| &**name),
            service: party.service.as_deref(),
            service_account: party.service_account.as_deref(),
            identity: party.identity.as_ref().map(|i| i.as_str()),
            known_by: party.known_by.name(),
            ip: party.ip,
            port: party.port,
        }
    }
}

/// Milliseconds, UTC.
fn time(t: Timestamp) -> String {
    format!("{t:.3}")
}

fn verdict(record: &FlowRecord) -> &'static str {
    match record.event {
        FlowEvent::Verdict => names::verdict(record.verdict),
        FlowEvent::End { .. } => "END",
    }
}

/// `GET /path 403 0.4ms`; the status is `-` where the application gave none.
fn request(http: &HttpRecord) -> String {
    let status = if http.status == 0 { "-".to_owned() } else { http.status.to_string() };
    let milliseconds = http.latency.as_secs_f64() * 1e3;
    let (method, path) = (printable(&http.method), printable(&http.path));
    format!("{method} {path} {status} {milliseconds:.1}ms")
}

/// `namespace/pod`, else the address.
fn name(party: &Party) -> String {
    match &party.pod {
        Some((namespace, pod)) => printable(&format!("{namespace}/{pod}")),
        None => party.ip.to_string(),
    }
}

/// With the port, `-` where the kernel had not chosen one.
fn with_port(party: &Party) -> String {
    let host = match (&party.pod, party.ip) {
        (None, IpAddr::V6(ip)) => format!("[{ip}]"),
        _ => name(party),
    };
    match party.port {
        0 => format!("{host}:-"),
        port => format!("{host}:{port}"),
    }
}

/// `namespace/account` of the agent's own trust domain, else the whole SPIFFE ID.
fn identity(party: &Party, trust_domain: &str) -> String {
    let Some(identity) = &party.identity else { return "-".into() };
    let whole = identity.as_str();
    whole
        .strip_prefix("spiffe://")
        .and_then(|rest| rest.strip_prefix(trust_domain))
        .and_then(|path| path.strip_prefix("/ns/"))
        .and_then(|rest| rest.split_once("/sa/"))
        .filter(|(namespace, account)| !namespace.contains('/') && !account.contains('/'))
        .map_or_else(|| printable(whole), |(n, a)| printable(&format!("{n}/{a}")))
}

fn policy(record: &FlowRecord, with_kind: bool) -> String {
    let Some(p) = &record.policy else { return "-".into() };
    let mut parts = Vec::new();
    if with_kind {
        parts.push(&*p.kind);
    }
    if !p.namespace.is_empty() {
        parts.push(&*p.namespace);
    }
    parts.push(&*p.name);
    printable(&parts.join("/"))
}

/// A value that stays one word.
fn pair_value(value: &str) -> String {
    let is_word = !value.is_empty() && !value.contains(|c: char| c.is_whitespace() || c == '"');
    let value = printable(value);
    if is_word { value } else { format!("{value:?}") }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use uuid::Uuid;

    use super::*;
    use crate::{
        cli::table::Table,
        flow::{
            KnownBy,
            example::{allowed, denied, ended, refused},
        },
        observer::{decode, encode},
        spiffe::SpiffeId,
    };

    /// As the command line gets it: through the wire's messages.
    fn seen(record: &FlowRecord) -> SeenFlow {
        decode::decode(&encode::encode(record, "cluster.local")).unwrap()
    }

    fn compact_plain(record: &FlowRecord) -> String {
        anstream::adapter::strip_str(&compact(&seen(record))).to_string()
    }

    #[test]
    fn compact_lines_are_those_of_the_contract() {
        assert_eq!(
            compact_plain(&allowed()),
            "2026-08-06T10:12:04.318Z node-2 in shop/frontend-7d9c:41872 (shop/frontend,mtls) -> \
             shop/payments-5b7f:8080 (shop/payments,kernel) tcp mtls FORWARDED allowed \
             IdentityPolicy/shop/payments-callers"
        );
        assert_eq!(
            compact_plain(&denied()),
            "2026-08-06T10:12:05.002Z node-2 in shop/intruder-x2:51544 (shop/intruder,mtls) -> \
             shop/payments-5b7f:8080 (shop/payments,kernel) tcp mtls DROPPED policy_no_match \
             IdentityPolicy/shop/payments-callers"
        );
        assert_eq!(
            compact_plain(&refused()),
            "2026-08-06T10:12:06.777Z node-2 in 10.9.0.7:39990 (-,unknown) -> \
             shop/payments-5b7f:8080 (shop/payments,kernel) tcp plaintext DROPPED \
             plaintext_refused - mode=strict"
        );
        assert_eq!(
            compact_plain(&ended()),
            "2026-08-06T10:12:09.120Z node-2 in shop/frontend-7d9c:41872 (shop/frontend,mtls) -> \
             shop/payments-5b7f:8080 (shop/payments,kernel) tcp mtls END allowed - sent=1204 \
             received=340 duration=4.802s"
        );
    }

    #[test]
    fn a_foreign_identity_is_shown_whole_and_ipv6_in_brackets() {
        let id = "spiffe://elsewhere.example/ns/shop/sa/frontend";
        let mut record = allowed();
        record.direction = Direction::Egress;
        record.source = Party {
            identity: Some(SpiffeId::parse(id).unwrap()),
            known_by: KnownBy::Mtls,
            ..Party::unknown("[fd00::5]:0".parse().unwrap())
        };
        let line = compact_plain(&record);
        assert!(line.contains(&format!("node-2 out [fd00::5]:- ({id},mtls) -> ")), "{line}");
    }

    #[test]
    fn nothing_from_outside_reaches_the_terminal_raw() {
        let mut record = refused();
        record.extra.push(("detail", "a b\x1b[31m\"".into()));
        let line = compact(&seen(&record));
        assert!(line.ends_with("mode=strict detail=\"a b\u{fffd}[31m\\\"\""), "{line}");
    }

    #[test]
    fn tables_are_those_of_the_contract() {
        let mut rows = vec![TABLE.map(String::from).to_vec()];
        rows.push(row(&seen(&allowed()), false));
        rows.push(row(&seen(&refused()), false));
        assert_eq!(
            Table::plain(&rows),
            [
                "TIME          SOURCE              DESTINATION              PROTO  VIA        VERDICT    REASON             POLICY",
                "10:12:04.318  shop/frontend-7d9c  shop/payments-5b7f:8080  tcp    mtls       FORWARDED  allowed            shop/payments-callers",
                "10:12:06.777  10.9.0.7            shop/payments-5b7f:8080  tcp    plaintext  DROPPED    plaintext_refused  -",
            ]
        );
        let wide = row(&seen(&ended()), true);
        assert_eq!(wide.len(), TABLE.len() + WIDE.len());
        assert_eq!(
            wide[8..],
            [
                "node-2",
                "destination",
                "shop/frontend",
                "shop/payments",
                "1204",
                "340",
                "4.802s",
                "118"
            ]
        );
        assert_eq!(wide[VERDICT_COLUMN], "END");
    }

    #[test]
    fn json_is_that_of_the_contract() {
        let uuid = Uuid::from_u128(7);
        assert_eq!(
            json(&seen(&allowed())).unwrap(),
            format!(
                r#"{{"schema":"signet.dev/flow/v1","event":"verdict","time":"2026-08-06T10:12:04.318Z","uuid":"{uuid}","node":"node-2","reporter":"destination","direction":"ingress","protocol":"tcp","via":"mtls","verdict":"FORWARDED","reason":"allowed","revision":118,"policy":{{"kind":"IdentityPolicy","namespace":"shop","name":"payments-callers"}},"source":{{"namespace":"shop","pod":"frontend-7d9c","serviceAccount":"frontend","identity":"spiffe://cluster.local/ns/shop/sa/frontend","knownBy":"mtls","ip":"10.0.1.5","port":41872}},"destination":{{"namespace":"shop","pod":"payments-5b7f","service":"shop/payments","serviceAccount":"payments","identity":"spiffe://cluster.local/ns/shop/sa/payments","knownBy":"kernel","ip":"10.0.2.7","port":8080}}}}"#
            )
        );
        let end = json(&seen(&ended())).unwrap();
        assert!(end.ends_with(r#","sent":1204,"received":340,"durationSeconds":4.802}"#), "{end}");
        let refused = json(&seen(&refused())).unwrap();
        assert!(refused.ends_with(r#","extra":{"mode":"strict"}}"#), "{refused}");
    }

    #[test]
    fn records_survive_the_wire() {
        for record in [allowed(), denied(), refused(), ended()] {
            let seen = seen(&record);
            let extra: Vec<_> =
                record.extra.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect();
            assert_eq!(seen.extra, extra);
            assert_eq!(seen.trust_domain, Arc::from("cluster.local"));
            assert_eq!(seen.record, FlowRecord { extra: vec![], ..record });
        }
    }
}
