//! The lives of pods that come and go, and what is known for certain of each.

use std::{
    net::SocketAddr,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread::{self, Scope, ScopedJoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use signet_lab::{
    Lab, eventually,
    pod::{Pod, PodBuilder},
    traffic::{
        Role, any,
        reports::{Call, FirstMomentReport},
        roles::{Caller, FirstMoment, TcpServer},
        unix_micros,
    },
};

use super::truth;
use crate::mesh::{Mesh, TCP};

/// What enforced pods say.
pub const SECRET: &str = "marker-5ec7e7";
/// What pods that are off say.
pub const CLEAR: &str = "marker-0c1ea7";
/// What the frontend says, which is strict and calls pods that are off, too.
pub const FRONTEND: &str = "marker-f407e0";
/// The servers' first port; a pod's own is this plus its number.
pub const FIRST_PORT: u16 = 10_000;
/// How many there are.
pub const PORTS: u16 = 200;
/// How many of them the pods take in turn: the same one comes again after 108 s.
const IN_TURN: u16 = 180;
/// Numbers from here on are of pods that come before and after the run, on ports of their own.
const ASIDE: u32 = 900_000;
/// The tag of the servers that stay.
pub const SERVER: u32 = 1_000_000;
/// After so many pods the kinds come again.
const KINDS: u32 = 15;

/// Addresses that the pods of a node share: few, so that they come again at once.
const HOSTS: std::ops::Range<u8> = 100..112;

/// Who a pod is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Strict, and allowed to call.
    Allowed,
    /// Strict, and denied by policy.
    Denied,
    /// Of a namespace that is not enrolled.
    Off,
}

/// How it lives and ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Course {
    /// Terminating for a moment, then gone: as it should be.
    Graceful,
    /// Its sandbox dies and is made anew, with another address.
    Remade,
    /// Its object is deleted while it runs on.
    Forgotten,
    /// Gone as soon as its containers run, before anybody may have heard of it.
    Short,
    /// Its sandbox goes first, its object later: the address is another's already.
    Late,
}

/// One pod with one sandbox.
#[derive(Clone, Debug)]
pub struct Life {
    pub number: u32,
    pub kind: Kind,
    /// `namespace/name`.
    pub name: String,
    pub addresses: Vec<std::net::IpAddr>,
    /// When its sandbox was made and when it was gone, microseconds since 1970.
    pub from: u64,
    pub to: u64,
    /// What its init container met.
    pub first: Option<FirstMomentReport>,
    /// What its main container did.
    pub calls: Vec<Call>,
}

/// What a pod's containers have said, while they are there.
struct Said {
    first: Option<FirstMomentReport>,
    calls: Vec<Call>,
}

impl Said {
    fn by(pod: &Pod) -> Self {
        let first = pod.with_container("init", |init| init.report(Duration::from_millis(1)));
        let calls = pod.printed("caller").unwrap_or_default();
        Self { first: first.ok(), calls: truth::calls(&calls) }
    }
}

impl Life {
    /// Calls that were answered.
    pub fn answered(&self) -> usize {
        self.calls.iter().filter(|call| call.outcome == "answered").count()
    }

    /// The identity that its pod has, where it is enrolled.
    pub fn identity(&self) -> Option<String> {
        let account = self.kind.account();
        (self.kind != Kind::Off).then(|| format!("spiffe://cluster.local/ns/shop/sa/{account}"))
    }

    /// The server's port that only this pod calls.
    pub fn port(&self) -> u16 {
        port(self.number)
    }
}

impl Kind {
    fn of(number: u32) -> Self {
        [Self::Allowed, Self::Denied, Self::Off][number as usize % 3]
    }

    fn account(self) -> &'static str {
        match self {
            Self::Allowed => "churn-a",
            Self::Denied => "churn-b",
            Self::Off => "default",
        }
    }

    fn namespace(self) -> &'static str {
        if self == Self::Off { "legacy" } else { "shop" }
    }
}

impl Course {
    fn of(number: u32) -> Self {
        // Five and three have no common divisor: every kind takes every course.
        [Self::Graceful, Self::Remade, Self::Forgotten, Self::Short, Self::Late]
            [number as usize % 5]
    }
}

fn port(number: u32) -> u16 {
    let offset = match number.checked_sub(ASIDE) {
        Some(aside) => u32::from(IN_TURN) + aside % u32::from(PORTS - IN_TURN),
        None => number % u32::from(IN_TURN),
    };
    FIRST_PORT + offset as u16
}

/// The pods that come and go.
pub struct Churn<'a> {
    lab: &'a Lab,
    ledger: &'a Pod,
    board: &'a Pod,
    /// Free addresses by node; the one that was freed last is taken first.
    free: [Mutex<Vec<u8>>; 2],
    lives: Mutex<Vec<Life>>,
    next: AtomicU32,
}

impl<'a> Churn<'a> {
    pub fn new(mesh: &'a Mesh, ledger: &'a Pod, board: &'a Pod) -> Self {
        let free = || Mutex::new(HOSTS.collect());
        Self {
            lab: &mesh.lab,
            ledger,
            board,
            free: [free(), free()],
            lives: Mutex::default(),
            next: AtomicU32::new(0),
        }
    }

    /// Every address that these pods may have, with a port.
    pub fn addresses(&self, port: u16) -> Vec<SocketAddr> {
        let of = |node, host| signet_lab::address::pod(self.lab.family(), node, host).all();
        HOSTS
            .flat_map(|host| [of(1, host), of(2, host)].concat())
            .map(|ip| (ip, port).into())
            .collect()
    }

    /// A pod every `period`, each on a thread of its own; returns their number.
    pub fn run<'s>(
        &'s self,
        scope: &'s Scope<'s, '_>,
        period: Duration,
        duration: Duration,
    ) -> Result<u32> {
        let begin = Instant::now();
        let mut living: Vec<ScopedJoinHandle<'s, Result<()>>> = Vec::new();
        let mut started = 0;
        while begin.elapsed() < duration {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            living.push(scope.spawn(move || self.live(number, number)));
            started += 1;
            let due = period * started;
            thread::sleep(due.saturating_sub(begin.elapsed()));
        }
        living.into_iter().try_for_each(ended)?;
        Ok(started)
    }

    /// A pod of every kind with every course, beside each other.
    pub fn one_of_each(&self) -> Result<()> {
        thread::scope(|scope| {
            let living: Vec<_> = (0..KINDS)
                .map(|model| scope.spawn(move || self.live(ASIDE + model, model)))
                .collect();
            living.into_iter().try_for_each(ended)
        })
    }

    /// A pod that is allowed and lives as it should.
    pub fn one(&self) -> Result<()> {
        let number = ASIDE + KINDS + self.next.fetch_add(1, Ordering::Relaxed);
        self.live(number, 0)
    }

    /// One pod from its first to its last moment, in the manner of `model`.
    fn live(&self, number: u32, model: u32) -> Result<()> {
        let kind = Kind::of(model);
        let course = Course::of(model);
        let name = format!("c{number}-{model}");
        self.course(number, kind, course, model as usize % 2, &name)
            .with_context(|| format!("pod {name}: {kind:?} {course:?}"))
    }

    fn course(
        &self,
        number: u32,
        kind: Kind,
        course: Course,
        node: usize,
        name: &str,
    ) -> Result<()> {
        let pause = |millis| thread::sleep(Duration::from_millis(millis));
        let builder = || self.builder(number, kind, node, name);
        let (pod, host, from) =
            self.begin(node, builder(), course != Course::Short, number, kind)?;
        let end = |pod: &Pod, from, host| {
            let said = Said::by(pod);
            pod.dismantle();
            self.note(number, kind, pod, from, said);
            self.give_back(node, host);
        };
        match course {
            Course::Graceful => {
                pause(3000);
                pod.mark_terminating()?;
                pause(500);
                end(&pod, from, host);
                pod.forget()
            }
            Course::Remade => {
                pause(1500);
                let said = Said::by(&pod);
                pod.end_sandbox();
                self.note(number, kind, &pod, from, said);
                // Another pod may have the address before this one has its next.
                self.give_back(node, host);
                pause(200);
                let builder = builder().remake(&pod);
                let (pod, host, from) = self.begin(node, builder, true, number, kind)?;
                pause(2000);
                pod.mark_terminating()?;
                end(&pod, from, host);
                pod.forget()
            }
            Course::Forgotten => {
                pause(1500);
                pod.forget()?;
                pause(700);
                end(&pod, from, host);
                Ok(())
            }
            Course::Short => {
                end(&pod, from, host);
                pause(100);
                pod.forget()
            }
            Course::Late => {
                pause(2500);
                pod.mark_terminating()?;
                end(&pod, from, host);
                pause(800);
                pod.forget()
            }
        }
    }

    /// Starts a pod on the address that was freed last.
    fn begin(
        &self,
        node: usize,
        builder: PodBuilder,
        has_init: bool,
        number: u32,
        kind: Kind,
    ) -> Result<(Pod, u8, u64)> {
        let host = eventually("a free address", Duration::from_secs(30), || {
            Ok(lock(&self.free[node]).pop())
        })?;
        let from = unix_micros();
        let to = self.target(number, kind);
        let text = format!("{} {}", kind.word(), kind.account());
        let mut builder = builder.host_number(host);
        if has_init {
            let role = FirstMoment {
                to,
                text: text.clone(),
                for_ms: if kind == Kind::Denied { 300 } else { 3000 },
                interval_ms: 1,
                until_answered: true,
            };
            builder = builder.init_container("init", Role::FirstMoment(role));
        }
        let caller = Caller { to: vec![to], text, interval_ms: 25, timeout_ms: 1000 };
        let server = TcpServer { listen: vec![any(TCP)], tag: number, ..Default::default() };
        let started = builder
            .container("main", Role::TcpServer(server))
            .container("caller", Role::Caller(caller))
            .start();
        match started {
            Ok(pod) => Ok((pod, host, from)),
            Err(error) => {
                self.give_back(node, host);
                Err(error)
            }
        }
    }

    fn builder(&self, number: u32, kind: Kind, node: usize, name: &str) -> PodBuilder {
        let node = &self.lab.nodes()[node];
        let builder = self.lab.pod_on(node, kind.namespace(), name).service_account(kind.account());
        // The API hears of the address at once or late.
        let delay = [20, 200, 600, 1500][number as usize % 4];
        builder.publish_after(Duration::from_millis(delay))
    }

    fn target(&self, number: u32, kind: Kind) -> SocketAddr {
        let server = if kind == Kind::Off { self.board } else { self.ledger };
        let all = server.all_at(port(number));
        all[number as usize / 7 % all.len()]
    }

    fn note(&self, number: u32, kind: Kind, pod: &Pod, from: u64, said: Said) {
        lock(&self.lives).push(Life {
            number,
            kind,
            name: pod.full_name(),
            addresses: pod.ips(),
            from,
            to: unix_micros(),
            first: said.first,
            calls: said.calls,
        });
    }

    fn give_back(&self, node: usize, host: u8) {
        lock(&self.free[node]).push(host);
    }

    /// The lives that have ended, and forgets them.
    pub fn take_all(&self) -> Vec<Life> {
        std::mem::take(&mut *lock(&self.lives))
    }
}

fn ended(life: ScopedJoinHandle<'_, Result<()>>) -> Result<()> {
    life.join().map_err(|_| anyhow!("a pod's thread panicked"))?
}

impl Kind {
    fn word(self) -> &'static str {
        if self == Self::Off { CLEAR } else { SECRET }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
