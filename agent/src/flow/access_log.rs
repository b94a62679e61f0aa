//! The access log: one structured line a connection, with ztunnel's fields.
//!
//! A proxied connection is told when it ends (`connection complete`), one that was refused when
//! it was refused (`connection failed`), one that the kernel let pass in clear when it was let
//! pass, because nobody carries it and sees its end. Lines go to the agent's own log under the
//! target `access`. They are written by the task that keeps the records, never by the data path,
//! and only so many a second; what is left out is counted and told.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use signet_ebpf::abi::{Direction, Reason, TUNNEL_PORT, Verdict};
use tracing::field::display;

use super::record::{FlowEvent, FlowRecord, Party, Via};
use crate::{config::values::AccessLog as Mode, telemetry::reason};

/// What is told, and how much of it a second; may change at any time.
#[derive(Clone, Debug)]
pub struct AccessLogSettings(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    mode: AtomicU32,
    per_second: AtomicU32,
    left_out: AtomicU64,
}

impl AccessLogSettings {
    /// The settings at the start.
    pub fn new(mode: Mode, per_second: u32) -> Self {
        let shared = Shared {
            mode: AtomicU32::new(mode as u32),
            per_second: AtomicU32::new(per_second),
            left_out: AtomicU64::new(0),
        };
        Self(Arc::new(shared))
    }

    /// Changes them.
    pub fn set(&self, mode: Mode, per_second: u32) {
        self.0.mode.store(mode as u32, Ordering::Relaxed);
        self.0.per_second.store(per_second, Ordering::Relaxed);
    }

    /// Lines that were left out since the start, because there were too many in a second.
    pub fn left_out(&self) -> u64 {
        self.0.left_out.load(Ordering::Relaxed)
    }

    fn is(&self, mode: Mode) -> bool {
        self.0.mode.load(Ordering::Relaxed) == mode as u32
    }
}

impl Default for AccessLogSettings {
    fn default() -> Self {
        Self::new(Mode::Off, 0)
    }
}

/// Writes the lines.
#[derive(Debug)]
pub struct AccessLog {
    settings: AccessLogSettings,
    second: Instant,
    written: u32,
    /// Lines left out that have not been told.
    untold: u64,
}

/// What a record is a line about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Line {
    Complete,
    Passed,
    Failed,
    Audited,
}

impl Line {
    /// `None`: the record is no line of its own. `direct`: the kernel decided it, so that no
    /// end will be seen.
    fn of(record: &FlowRecord, direct: bool) -> Option<Self> {
        match (&record.event, record.verdict) {
            (FlowEvent::Verdict, Verdict::Dropped) => Some(Self::Failed),
            (FlowEvent::Verdict, Verdict::Audit) => Some(Self::Audited),
            // Its flow has a line; what was refused of it has one of its own.
            (FlowEvent::Verdict, Verdict::Forwarded) if record.http.is_some() => None,
            (FlowEvent::Verdict, Verdict::Forwarded) => direct.then_some(Self::Passed),
            (FlowEvent::End { .. }, _) => Some(Self::Complete),
        }
    }
}

impl AccessLog {
    /// A log under `settings`.
    pub fn new(settings: AccessLogSettings) -> Self {
        Self { settings, second: Instant::now(), written: 0, untold: 0 }
    }

    /// Tells of a record, if it is to be told.
    pub fn tell(&mut self, record: &FlowRecord, direct: bool, now: Instant) {
        if self.settings.is(Mode::Off) {
            return;
        }
        let Some(line) = Line::of(record, direct) else { return };
        let is_refusal = matches!(line, Line::Failed | Line::Audited);
        if !is_refusal && !self.settings.is(Mode::All) {
            return;
        }
        if !self.has_room(now) {
            self.untold += 1;
            self.settings.0.left_out.fetch_add(1, Ordering::Relaxed);
            return;
        }
        write(line, record);
    }

    fn has_room(&mut self, now: Instant) -> bool {
        if now.saturating_duration_since(self.second) >= Duration::from_secs(1) {
            (self.second, self.written) = (now, 0);
            let untold = std::mem::take(&mut self.untold);
            if untold > 0 {
                tracing::warn!(target: "access", lines = untold, "access log lines left out");
            }
        }
        let has_room = self.written < self.settings.0.per_second.load(Ordering::Relaxed);
        self.written += u32::from(has_room);
        has_room
    }
}

fn write(line: Line, record: &FlowRecord) {
    let FlowRecord { source, destination, .. } = record;
    let (sent, received, duration) = match &record.event {
        FlowEvent::Verdict => (None, None, None),
        FlowEvent::End { sent, received, duration } => {
            (Some(*sent), Some(*received), Some(format!("{}ms", duration.as_millis())))
        }
    };
    let address = |party: &Party| SocketAddr::new(party.ip, party.port);
    let workload = |party: &Party| party.pod.as_ref().map(|(_, name)| display(name.clone()));
    let namespace = |party: &Party| party.pod.as_ref().map(|(space, _)| display(space.clone()));
    let identity = |party: &Party| party.identity.as_ref().map(|id| display(id.clone()));
    let tunnel =
        (record.via == Via::Mtls).then(|| display(SocketAddr::new(destination.ip, TUNNEL_PORT)));
    let direction = match record.direction {
        Direction::Ingress => "inbound",
        Direction::Egress => "outbound",
    };
    let error = (record.reason != Reason::Allowed).then(|| display(reason::name(record.reason)));
    let policy =
        record.policy.as_ref().map(|p| display(format!("{}/{}/{}", p.kind, p.namespace, p.name)));
    macro_rules! line {
        ($level:ident, $message:literal) => {
            tracing::event!(
                target: "access",
                tracing::Level::$level,
                {
                    src.addr = %address(source),
                    src.workload = workload(source),
                    src.namespace = namespace(source),
                    src.identity = identity(source),
                    dst.addr = %address(destination),
                    dst.hbone_addr = tunnel,
                    dst.service = destination.service.as_deref(),
                    dst.workload = workload(destination),
                    dst.namespace = namespace(destination),
                    dst.identity = identity(destination),
                    direction = direction,
                    bytes_sent = sent,
                    bytes_recv = received,
                    duration = duration,
                    error = error,
                    policy = policy,
                    uuid = %record.uuid
                },
                $message
            )
        };
    }
    match line {
        Line::Complete => line!(INFO, "connection complete"),
        Line::Passed => line!(INFO, "connection passed"),
        Line::Failed => line!(WARN, "connection failed"),
        Line::Audited => line!(WARN, "connection would have failed"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use serde_json::Value;

    use super::*;
    use crate::flow::example::{allowed, denied, ended, refused};

    /// The lines that `tell` writes, as JSON.
    fn lines(tell: impl FnOnce()) -> Vec<Value> {
        #[derive(Clone, Default)]
        struct Written(Arc<Mutex<Vec<u8>>>);
        impl std::io::Write for Written {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0.lock().unwrap().extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let written = Written::default();
        let writer = written.clone();
        let subscriber = tracing_subscriber::fmt()
            .json()
            .flatten_event(true)
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, tell);
        let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn told(mode: Mode) -> Vec<String> {
        let mut log = AccessLog::new(AccessLogSettings::new(mode, 100));
        let written = lines(|| {
            for (record, direct) in
                [(allowed(), false), (allowed(), true), (denied(), false), (ended(), false)]
            {
                log.tell(&record, direct, Instant::now());
            }
        });
        written.iter().map(|line| line["message"].as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn the_mode_says_what_is_told() {
        assert_eq!(told(Mode::Off), Vec::<String>::new());
        assert_eq!(told(Mode::Denied), ["connection failed"]);
        assert_eq!(
            told(Mode::All),
            ["connection passed", "connection failed", "connection complete"]
        );
    }

    #[test]
    fn a_line_has_ztunnels_fields() {
        let mut log = AccessLog::new(AccessLogSettings::new(Mode::All, 100));
        let written = lines(|| {
            for record in [ended(), denied(), refused()] {
                log.tell(&record, false, Instant::now());
            }
        });
        let [ended, denied, refused] = &written[..] else { panic!("{written:?}") };
        for (line, field, expected) in [
            (ended, "level", "INFO"),
            (ended, "target", "access"),
            (ended, "src.addr", "10.0.1.5:41872"),
            (ended, "src.workload", "frontend-7d9c"),
            (ended, "src.namespace", "shop"),
            (ended, "src.identity", "spiffe://cluster.local/ns/shop/sa/frontend"),
            (ended, "dst.addr", "10.0.2.7:8080"),
            (ended, "dst.hbone_addr", "10.0.2.7:15008"),
            (ended, "dst.service", "shop/payments"),
            (ended, "direction", "inbound"),
            (ended, "duration", "4802ms"),
            (denied, "level", "WARN"),
            (denied, "error", "policy_no_match"),
            (denied, "policy", "IdentityPolicy/shop/payments-callers"),
            (refused, "error", "plaintext_refused"),
        ] {
            assert_eq!(line[field], expected, "{field} of {line}");
        }
        assert_eq!((&ended["bytes_sent"], &ended["bytes_recv"]), (&1204.into(), &340.into()));
        for (line, field) in
            [(ended, "error"), (refused, "src.identity"), (refused, "dst.hbone_addr")]
        {
            assert_eq!(line.get(field), None, "{line}");
        }
    }

    #[test]
    fn so_many_a_second_and_what_is_left_out_is_told() {
        let settings = AccessLogSettings::new(Mode::Denied, 3);
        let mut log = AccessLog::new(settings.clone());
        let start = Instant::now();
        let written = lines(|| {
            for _ in 0..10 {
                log.tell(&denied(), false, start);
            }
            log.tell(&denied(), false, start + Duration::from_millis(1500));
        });
        let messages: Vec<_> = written.iter().map(|l| l["message"].as_str().unwrap()).collect();
        assert_eq!(
            messages,
            [
                "connection failed",
                "connection failed",
                "connection failed",
                "access log lines left out",
                "connection failed"
            ]
        );
        assert_eq!((written[3]["lines"].as_u64(), settings.left_out()), (Some(7), 7));
    }
}
