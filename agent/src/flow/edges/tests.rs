use std::fs;

use proptest::prelude::*;

use super::*;
use crate::flow::example::{allowed, as_source, at, denied, refused};

fn edges(records: &[FlowRecord]) -> Edges {
    let edges = Edges::default();
    records.iter().for_each(|record| edges.record(record));
    edges
}

fn all(edges: &Edges) -> Vec<(String, u64)> {
    let mut all: Vec<_> = edges
        .select(|_, _| true)
        .into_iter()
        .map(|(e, seen)| {
            let (verdict, reason) = (e.verdict, crate::telemetry::reason::name(e.reason));
            (
                format!("{} -> {}:{} {verdict:?} {reason}", e.source, e.destination, e.port),
                seen.count,
            )
        })
        .collect();
    all.sort();
    all
}

#[test]
fn flows_become_edges() {
    let later = FlowRecord { time: at(60_000), ..allowed() };
    let ended = FlowRecord {
        event: FlowEvent::End { sent: 1, received: 1, duration: std::time::Duration::ZERO },
        ..allowed()
    };
    let mut foreign = allowed();
    foreign.source.pod = None;
    foreign.source.identity = SpiffeId::parse("spiffe://other/x").ok();
    // An address says that it is the frontend's, the certificate that it is not.
    let mut misplaced = allowed();
    misplaced.source.identity = SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/other").ok();
    let edges = edges(&[
        later,
        allowed(),
        ended,
        denied(),
        refused(),
        as_source(&allowed()),
        foreign,
        misplaced,
    ]);
    assert_eq!(
        all(&edges),
        [
            ("10.9.0.0/24 -> shop/payments:8080 Dropped plaintext_refused".to_owned(), 1),
            ("shop/frontend -> shop/payments:8080 Forwarded allowed".to_owned(), 1),
            ("shop/frontend -> shop/payments:8080 Forwarded allowed".to_owned(), 2),
            ("shop/intruder -> shop/payments:8080 Dropped policy_no_match".to_owned(), 1),
            (
                "spiffe://cluster.local/ns/shop/sa/other -> shop/payments:8080 Forwarded allowed"
                    .to_owned(),
                1
            ),
            ("spiffe://other/x -> shop/payments:8080 Forwarded allowed".to_owned(), 1),
        ]
    );
    let twice = edges.select(|_, seen| seen.count == 2);
    assert_eq!((twice[0].1.first, twice[0].1.last), (at(4318), at(60_000)), "in whichever order");
}

#[test]
fn a_flood_of_one_workload_takes_no_room_from_others() {
    let edges = Edges::default();
    let scan = |port| {
        let mut record = as_source(&denied());
        record.destination.port = port;
        record
    };
    for port in 1..=5000 {
        edges.record(&scan(port));
    }
    edges.record(&scan(1));
    assert_eq!(edges.size(), (MOST_OF_ONE + 1, 0));
    let others = edges.select(|edge, _| edge.destination == End::Others);
    assert_eq!((others.len(), others[0].0.port, others[0].1.count), (1, 0, 4000));
    edges.record(&allowed());
    assert_eq!(edges.size().0, MOST_OF_ONE + 2, "another's edge has room");
    // A full table, by many workloads.
    for n in 0..100 {
        for port in 1..=400 {
            let mut record = scan(port);
            record.source.service_account = Some(format!("a{n}").into());
            record.source.identity = None;
            edges.record(&record);
        }
    }
    let named = edges.select(|edge, _| edge.has_name()).len();
    assert_eq!(named, MOST);
    assert!(edges.size().0 <= MOST_IN_ALL);
    let counted: u64 = edges.select(|_, _| true).iter().map(|(_, seen)| seen.count).sum();
    assert_eq!(counted, 5000 + 1 + 1 + 40_000, "every flow is somewhere");
}

#[test]
fn seven_days_after_the_last_flow_it_is_forgotten() {
    let edges = edges(&[allowed(), denied()]);
    edges.record(&FlowRecord { time: allowed().time + SignedDuration::from_hours(1), ..allowed() });
    let end = denied().time + RETENTION;
    edges.expire(end - SignedDuration::from_secs(1));
    assert_eq!(edges.size().0, 2);
    edges.expire(end);
    assert_eq!(edges.size().0, 1);
    edges.expire(end + SignedDuration::from_hours(1));
    assert_eq!(edges.size().0, 0);
    let table = edges.table();
    assert_eq!((table.named, table.of_one.len()), (0, 0), "and makes room");
    // What lies ahead, after a clock that went back, grows old from now on.
    let ahead = Edges::new(edges_of(&allowed()), at(0) - RETENTION);
    ahead.expire(at(0));
    assert_eq!(ahead.size().0, 0);
}

fn edges_of(record: &FlowRecord) -> Vec<(Edge, Seen)> {
    edges(std::slice::from_ref(record)).select(|_, _| true)
}

#[test]
fn it_survives_on_disk_and_damage_is_set_aside() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("state");
    let file = EdgesFile::new(&dir);
    assert_eq!(file.load(at(0)).unwrap().size(), (0, 0), "there is none yet");
    let edges = edges(&[allowed(), denied(), refused()]);
    file.save(&edges).unwrap();
    assert_eq!(all(&file.load(at(10_000)).unwrap()), all(&edges));
    assert_eq!(file.load(refused().time + RETENTION).unwrap().size().0, 0, "too old by now");
    let path = dir.join("edges.ndjson");
    let whole = fs::read(&path).unwrap();
    use std::os::unix::fs::PermissionsExt as _;
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "nothing lies beside it");

    let cut = &whole[..whole.len() / 2];
    fs::write(&path, cut).unwrap();
    assert_eq!(file.load(at(10_000)).unwrap().size().0, 0);
    assert_eq!(fs::read(dir.join("edges.ndjson.damaged")).unwrap(), cut);
    assert!(!path.exists());
    file.save(&edges).unwrap();
    assert_eq!(file.load(at(10_000)).unwrap().size().0, 3, "and it goes on");

    // The file system refuses: told, and the old one is whole.
    let file = EdgesFile::new(&path);
    let error = file.save(&edges).unwrap_err().to_string();
    assert!(error.contains("edges.ndjson") && error.contains("in memory only"), "{error}");
}

#[test]
fn what_is_no_history_is_refused_with_its_line() {
    let good = String::from_utf8(write(&edges_of(&allowed())).unwrap()).unwrap();
    assert_eq!(parse(good.as_bytes()).unwrap(), edges_of(&allowed()));
    let line = good.lines().nth(1).unwrap();
    let with = |from: &str, to: &str| {
        assert!(good.contains(from), "{from} is not in {good}");
        good.replace(from, to)
    };
    for (bad, says) in [
        (String::new(), "line 1"),
        (good.trim_end().to_owned(), "the end is missing"),
        (with("edges/v1", "edges/v2"), "line 1: another schema"),
        (with("\"count\":1", "\"count\":0"), "line 2: count"),
        (with("\"port\":8080", "\"port\":80800"), "line 2: invalid value"),
        (with("\"via\":\"mtls\"", "\"via\":\"magic\""), "line 2: via"),
        (with("\"via\":\"mtls\"", "\"via\":\"mtls\",\"new\":1"), "unknown field"),
        (with("FORWARDED", "forwarded"), "line 2: verdict"),
        (with("\"allowed\"", "\"because\""), "line 2: reason"),
        (with("\"shop\"", "\"Shop\""), "line 2: source"),
        (with("\"last\":\"2026-", "\"last\":\"2025-"), "line 2: first"),
        (format!("{good}{line}\n"), "line 3: an edge that was there before"),
        (format!("{good}\n"), "line 3"),
        (format!("{good}{}\n", " ".repeat(9000)), "line 3: too long"),
    ] {
        let error = parse(bad.as_bytes()).unwrap_err().to_string();
        assert!(error.contains(says), "{says}: {error}");
    }
    let network = String::from_utf8(write(&edges_of(&refused())).unwrap()).unwrap();
    for wrong in ["10.9.0.1/24", "10.9.0.0/16", "10.9.0.0/33", "10.9.0.0"] {
        let bad = network.replace("10.9.0.0/24", wrong);
        assert!(parse(bad.as_bytes()).is_err(), "{wrong}");
    }
}

fn end() -> impl Strategy<Value = End> {
    prop_oneof![
        ("[a-z0-9][a-z0-9.-]{0,20}", "[a-z0-9][a-z0-9.-]{0,20}")
            .prop_map(|(n, a)| { End::Workload { namespace: n.into(), account: a.into() } }),
        "[a-z0-9]{1,8}(/[A-Za-z0-9_-]{1,8}){0,3}"
            .prop_map(|id| End::Identity(SpiffeId::parse(&format!("spiffe://{id}")).unwrap())),
        any::<IpAddr>().prop_map(|ip| End::Network(network_of(ip))),
        Just(End::Others),
    ]
}

fn edge() -> impl Strategy<Value = (Edge, Seen)> {
    let reporter = prop_oneof![Just(Reporter::Source), Just(Reporter::Destination)];
    let via = prop_oneof![Just(Via::Mtls), Just(Via::Kernel), Just(Via::Plaintext)];
    let verdict =
        prop_oneof![Just(Verdict::Forwarded), Just(Verdict::Dropped), Just(Verdict::Audit)];
    let reason = proptest::sample::select(Reason::ALL);
    let key = (reporter, end(), end(), any::<u16>(), any::<u8>(), via, verdict, reason);
    let seen = (1..u64::MAX, 0..2_000_000_000_000i64, 0..2_000_000_000_000i64);
    (key, seen).prop_map(|(key, (count, one, other))| {
        let (reporter, source, destination, port, protocol, via, verdict, reason) = key;
        let moment = |ms| Timestamp::from_millisecond(ms).unwrap();
        let (first, last) = (moment(one.min(other)), moment(one.max(other)));
        let edge = Edge { reporter, source, destination, port, protocol, via, verdict, reason };
        (edge, Seen { count, first, last })
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read_again(list in prop::collection::vec(edge(), 0..20)) {
        let unique: HashMap<Edge, Seen> = list.into_iter().collect();
        let list: Vec<_> = unique.into_iter().collect();
        prop_assert_eq!(parse(&write(&list).unwrap()).unwrap(), list);
    }

    #[test]
    fn no_bytes_make_it_panic(
        list in prop::collection::vec(edge(), 1..4),
        cut in any::<prop::sample::Index>(),
        byte in any::<u8>(),
    ) {
        let mut document = write(&list).unwrap();
        let at = cut.index(document.len());
        document[at] = byte;
        // What it takes all the same is written and read again the same.
        if let Ok(read) = parse(&document) {
            prop_assert_eq!(parse(&write(&read).unwrap()).unwrap(), read);
        }
    }
}
