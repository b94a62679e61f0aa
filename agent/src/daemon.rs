//! The node agent put together: what starts in which order, what ends it, how it ends.

mod cluster;
mod error;
mod events;
mod identity;
mod issuers;
mod picture;
mod succession;
mod viewers;

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::{
    admin::{self, Admin, IssuerFacts, Succession, socket::AdminSocket},
    cluster::{
        enrolment::EnrolmentBoard,
        model::{Ranges, World},
        source::ClusterSource,
    },
    config::{
        AgentConfig, ConfigError, ConfigSources, Loaded, values::LogFormat, watch::FileChanges,
    },
    endpoint::{
        reconcile::{self, Control, Start},
        state::{NodeState, NodeStatePublisher},
    },
    flow::{
        self,
        access_log::AccessLogSettings,
        edges::{EdgesFile, keep},
    },
    handover::{self, Give, Request},
    kernel::{self, Counters, FlowSockets, KernelConfig, Programs, cgroup::Hierarchy, features},
    netns::NetnsOpener,
    observer::{self, Observer, peers::Peers},
    proxy::{DataPlane, DataPlaneConfig, Dependencies},
    spiffe::TrustDomain,
    svid::{
        SvidManager, SvidParams,
        metrics::{Purpose, SvidMetrics},
    },
    telemetry::{
        logging,
        metrics::{Metrics, PageServer, metrics_page, ready_page},
    },
    trust::{Trust, follow},
    workload_api::{self, WorkloadApi, WorkloadApiDeps},
};

pub use self::error::{DaemonError, Fault};
use self::{
    events::{forward_events, record_closed},
    identity::Identity,
    picture::{Losses, Newest, Picture},
    succession::{Alone, Sockets, answer, hello, retire, take_place, task},
    viewers::{Hubble, Viewers},
};

/// Threads of the control plane; the data plane has its own, one a core.
const CONTROL_THREADS: usize = 2;

/// How long flows may go on after SIGTERM.
const DRAIN: Duration = Duration::from_secs(5);

/// Kernel events on their way to records.
const EVENTS: usize = 8192;

/// Runs the node agent until SIGTERM or SIGINT, then drains.
///
/// # Errors
/// The first thing that is wrong; what earlier agents left in the kernel stays as it was.
pub fn run(loaded: Loaded, sources: ConfigSources) -> Result<(), DaemonError> {
    let config = loaded.config;
    let levels = logging::init(&config.log_level, log_format(&config))?;
    let domain = TrustDomain::parse(&config.trust_domain).map_err(|source| {
        DaemonError::TrustDomain { value: config.trust_domain.clone(), source }
    })?;

    // Who cannot load programs is told so, not that some file belongs to root.
    kernel::check_permitted()?;
    // Inputs first: nothing is loaded into the kernel for a cluster that cannot be read.
    let (source, board) = cluster::open(&config, &domain)?;
    let trust = Trust::new();
    let identity = Identity::open(&config, &domain, &trust)?;
    let entries = workload_api::Entries::open(config.workload_entries.as_deref(), &domain)?;

    // Asked before anything is pinned or attached.
    let succeeds =
        in_passing(handover::is_served(&handover::path_in(&config.run_dir), &hello(&config)))??;

    // Before any socket is made: this may move the process into a cgroup of its own.
    let (programs, maps) = Programs::load(&kernel_config(&config, succeeds))?;

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CONTROL_THREADS)
        .thread_name("signet-control")
        .enable_all()
        .build()
        .map_err(|source| DaemonError::Start { what: "the control plane's runtime", source })?;
    let parts = Parts {
        config,
        levels,
        sources,
        domain,
        source,
        board,
        trust,
        identity,
        entries,
        programs,
        maps,
        succeeds,
    };
    runtime.block_on(serve(parts))
}

/// Waits for something short before there is a runtime.
fn in_passing<T>(question: impl Future<Output = T>) -> Result<T, DaemonError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| DaemonError::Start { what: "a runtime", source })?;
    Ok(runtime.block_on(question))
}

/// What was opened before the runtime.
struct Parts {
    config: AgentConfig,
    levels: logging::Levels,
    sources: ConfigSources,
    domain: TrustDomain,
    source: Arc<dyn ClusterSource>,
    board: Box<dyn EnrolmentBoard>,
    trust: Arc<Trust>,
    identity: Identity,
    entries: workload_api::Entries,
    programs: Programs,
    maps: kernel::Maps,
    /// Another agent serves the node.
    succeeds: bool,
}

async fn serve(parts: Parts) -> Result<(), DaemonError> {
    let Parts {
        config,
        levels,
        sources,
        domain,
        source,
        mut board,
        trust,
        mut identity,
        entries,
        programs,
        maps,
        succeeds,
    } = parts;
    let started = jiff::Timestamp::now();
    let world = source.worlds();
    let start = |what| move |source| DaemonError::Start { what, source };
    let mut terminate = signal(SignalKind::terminate()).map_err(start("the signal handler"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(start("the signal handler"))?;
    let mut hangup = signal(SignalKind::hangup()).map_err(start("the signal handler"))?;

    // The sockets come before anything that would take part in traffic: a second agent on the
    // same run directory ends here, or takes the first one's place when it can.
    let sockets = if succeeds { None } else { Some(Sockets::bind_soon(&config).await?) };
    let own_socket = config.own_socket.as_deref().map(AdminSocket::bind_own).transpose()?;
    let (place, succession) = watch::channel(if succeeds {
        Succession::Waits("it has only begun to".into())
    } else {
        Succession::Serves
    });

    let history = EdgesFile::new(&config.state_dir);
    let edges = history.load(started).unwrap_or_else(|error| {
        tracing::error!(%error, "the history of flows is not read");
        flow::Edges::default()
    });
    let access_log = AccessLogSettings::new(config.access_log, config.access_log_per_second);
    let istio = flow::IstioMetrics::default();
    let sinks =
        flow::Sinks { edges: edges.clone(), access: access_log.clone(), istio: istio.clone() };
    let (recorder, collector) = flow::start(flow::Limits::default(), sinks);
    let log = recorder.log();
    let (stop, ended) = (CancellationToken::new(), CancellationToken::new());
    // Another agent serves in this one's place.
    let succeeded = CancellationToken::new();
    let mut following = identity.follow(stop.clone());
    let mut metrics = Metrics::default();
    istio.register(&mut metrics);
    let svid_metrics = SvidMetrics::register(&mut metrics);
    let svid_params =
        SvidParams { metrics: (svid_metrics.clone(), Purpose::Tunnel), ..SvidParams::default() };
    let svids = SvidManager::start(identity.issuer.clone(), svid_params.clone());
    let opener = NetnsOpener::start().map_err(start("the network namespaces' thread"))?;
    let pins = programs.pins().to_owned();
    let flow_sockets = Arc::new(FlowSockets::open(&pins)?);
    let counters = Counters::open(&pins)?;
    let losses = Arc::new(Losses::new(recorder.clone(), Counters::open(&pins)?));
    let any_errno = programs.features().has(features::Feature::SetRetval);
    let (listeners, commands) = mpsc::unbounded_channel();
    let (closed, closed_flows) = mpsc::unbounded_channel();
    let (surveys, asked) = mpsc::channel(4);
    let (publisher, state) = NodeStatePublisher::new(NodeState::empty(
        config.node.as_str().into(),
        world.borrow().clone(),
    ));
    let plane = DataPlane::start(
        data_plane_config(&config),
        Dependencies {
            state: state.clone(),
            opener: opener.clone(),
            flow_sockets,
            svids: svids.clone(),
            trust: trust.clone(),
            recorder: recorder.clone(),
            commands,
        },
    )
    .map_err(start("the data plane"))?;
    let plane = Arc::new(plane);
    let (workload_api, workloads) = WorkloadApi::new(
        WorkloadApiDeps {
            state: state.clone(),
            trust: trust.clone(),
            trust_domain: domain.clone(),
            hierarchy: Hierarchy::find()?,
            workloads_root: config.cgroup_root.clone().into(),
            entries: entries.clone(),
            issuer: identity.issuer.clone(),
            jwt_issuer: Some(identity.jwt_issuer.clone()),
            opener: opener.clone(),
            has_peer_pidfd: programs.features().has(features::Feature::PeerPidfd),
            limits: workload_api::Limits::default(),
        },
        svid_params,
    );
    let (federation_failures, foreign_bundles) = watch::channel(follow::Failures::new());
    let mut federating = tokio::spawn(federate(world.clone(), trust.clone(), federation_failures));
    let mut fetching =
        tokio::spawn(issuers::follow(state.clone(), trust.clone(), config.jwks_roots.clone()));
    let (report, kernel_report) = watch::channel(reconcile::KernelReport::default());
    let (config_changes, live_config) = watch::channel(Arc::new(config.clone()));
    let (page_problem, page_problems) = watch::channel(BTreeMap::new());
    let (viewer_problem, viewer_problems) = watch::channel(None);
    let pulse = reconcile::Pulse::default();
    let hubble_routes = Routes::new(
        Observer::new(log.clone(), config.node.as_str().into(), domain.as_str().into())
            .into_service(),
    )
    .add_service(
        Peers::new(world.clone(), config.observer_listen, &config.observer_server_name)
            .into_service(),
    )
    .add_service(observer::health().await);
    let hubble = Hubble::of(&config, &domain, &trust, hubble_routes.clone(), || {
        let metrics = (svid_metrics.clone(), Purpose::Observer);
        SvidManager::start(identity.issuer.clone(), SvidParams { metrics, ..SvidParams::default() })
    })?;
    let picture = Arc::new(Picture {
        node: config.node.as_str().into(),
        started,
        source: source.clone(),
        issuer: IssuerFacts {
            trust_domain: domain.as_str().into(),
            name: identity.name.as_str().into(),
            roots: Vec::new(),
        },
        trust,
        domain: domain.clone(),
        state: state.clone(),
        world: world.clone(),
        svids: svids.clone(),
        observer_svids: hubble.svids(),
        counters,
        plane: plane.clone(),
        report: kernel_report,
        losses: losses.clone(),
        log: log.clone(),
        edges: edges.clone(),
        workloads,
        foreign_bundles,
        pages: page_problems,
        istio,
        viewers: viewer_problems,
        pulse: pulse.clone(),
        succession,
        newest: Newest::new(started),
    });
    metrics.read({
        let picture = picture.clone();
        move || picture.readings()
    });
    let pages = [
        ("metricsListen", config.metrics_listen, metrics_page(metrics.shared())),
        (
            "readyListen",
            config.ready_listen,
            ready_page({
                let picture = picture.clone();
                move || admin::readiness(&picture.take())
            }),
        ),
    ];
    let counted = plane.clone();
    let (control, obeyed) = Control::new();
    let deps = reconcile::Deps {
        world,
        config: live_config,
        programs,
        maps,
        opener,
        svids: svids.clone(),
        listeners,
        announce: Box::new(move |served, revision| {
            let Some(served) = served else {
                board.fall_silent();
                return Ok(());
            };
            board
                .announce(served, revision, jiff::Timestamp::now())
                .map(drop)
                .map_err(|error| error.to_string())
        }),
        open_flows: Arc::new(move |key| counted.open_flows_of(key)),
        closed,
        state: publisher,
        report,
        pulse,
        start: if succeeds { Start::Waiting } else { Start::AtOnce },
        commands: obeyed,
    };

    let (event_sender, event_receiver) = mpsc::channel(EVENTS);
    let mut collector = tokio::spawn(collector.run());
    let mut forwarding = tokio::spawn(forward_events(
        event_receiver,
        state.clone(),
        recorder.clone(),
        losses,
        any_errno,
    ));
    let admin = Admin::new(Arc::new(move || picture.take()), log, edges.clone(), surveys)
        .with_logs(levels.recent().clone());
    let routes = hubble_routes.add_service(admin.into_service());
    let viewers = Viewers::of(&config, routes.clone(), viewer_problem);
    // It answers until the process ends, whoever serves the node.
    let own = own_socket.map(|socket| {
        let (never, end) = (CancellationToken::new(), ended.clone().cancelled_owned());
        tokio::spawn(socket.serve(routes.clone(), never, end))
    });
    let mut recording = tokio::spawn(record_closed(closed_flows, state.clone(), recorder.clone()));
    let mut reconciling = tokio::spawn(reconcile::run(deps, asked, stop.clone()));
    kernel::memory::keep_giving_back(ended.clone())
        .map_err(start("the thread that gives memory back"))?;
    let (sockets, predecessor) = match sockets {
        Some(sockets) => (sockets, None),
        None => {
            let before = async || {
                // What the old agent has counted since this one began.
                match history.load(jiff::Timestamp::now()) {
                    Ok(newer) => edges.replace(&newer),
                    Err(error) => tracing::error!(%error, "the history of flows is not read"),
                }
            };
            tokio::select! {
                taken = take_place(&config, &control, &place, before) => taken?,
                // The one that serves goes on.
                _ = terminate.recv() => return Ok(()),
                _ = interrupt.recv() => return Ok(()),
                ended = &mut reconciling => return Err(ended_as("the reconciler", flatten(ended))),
                () = svids.ended() => return Err(ended_as("the SVID manager", "its task is gone".into())),
                why = plane.failed() => return Err(ended_as("the data plane", why)),
            }
        }
    };
    if let Some(mut predecessor) = predecessor {
        let control = control.clone();
        tokio::spawn(async move {
            predecessor.closed().await;
            control.alone().await;
        });
    }
    let node_sockets = sockets.descriptors()?;
    let until = || (succeeded.clone(), ended.clone().cancelled_owned());
    let (gone, end) = until();
    // The sockets answer until the process ends, also while it drains.
    let mut serving = tokio::spawn(AdminSocket::of(sockets.admin).serve(routes, gone, end));
    let (gone, end) = until();
    let mut serving_workloads = tokio::spawn(workload_api.serve(sockets.workload, gone, end));
    let mut alone = Alone::start(|stop| {
        let (pins, events) = (pins.clone(), event_sender.clone());
        let reading = async move { flatten(Ok(kernel::events::run(&pins, events).await)) };
        let (edges, history, stopped) = (edges.clone(), history.clone(), stop.clone());
        let remembering = tokio::spawn(async move {
            keep(edges, history, stopped).await;
            "it returned".to_owned()
        });
        let mut tasks = vec![
            task("the reader of kernel events", stop, reading),
            // It writes once more when it is stopped.
            ("the history of flows", remembering),
        ];
        let viewing = viewers.clone().serve();
        tasks.push(task("the viewers' server", stop, async move {
            viewing.await;
            "it returned".to_owned()
        }));
        let problems = page_problem.clone();
        let looking =
            hubble.clone().serve(move |problem| tell(&problems, "observerListen", problem));
        tasks.push(task("the observer's server", stop, async move {
            looking.await;
            "it returned".to_owned()
        }));
        let measuring = serve_pages(pages.clone(), page_problem.clone());
        tasks.push(task("the servers of metrics and readiness", stop, async move {
            measuring.await;
            "one of them has panicked".to_owned()
        }));
        tasks
    });
    let (process, mut requests) = mpsc::channel(1);
    let give = Give { own: hello(&config), control: control.clone(), process };
    let mut giving = tokio::spawn(give.run(sockets.handover));
    let (name, location) = (source.name(), source.location());
    tracing::info!(node = %config.node, source = name, location, "agent started");

    let file_changes = FileChanges::of(sources.file.as_deref());
    let mut applied = config;
    let result = loop {
        tokio::select! {
            _ = terminate.recv() => break Ok(None),
            _ = interrupt.recv() => break Ok(None),
            Some(()) = hangup.recv() => {}
            () = file_changes.changed() => {}
            ended = &mut reconciling => break Err(ended_as("the reconciler", flatten(ended))),
            ended = &mut serving => break Err(ended_as("the admin socket", flatten(ended))),
            ended = &mut serving_workloads => break Err(ended_as("the Workload API", flatten(ended))),
            (part, why) = alone.ended() => break Err(ended_as(part, why)),
            ended = &mut giving => match ended {
                Ok(successor) => break Ok(Some(successor)),
                Err(error) => break Err(ended_as("the hand-over's socket", error.to_string())),
            },
            Some(request) = requests.recv() => {
                match request {
                    Request::Pause(reply) => {
                        alone.pause().await;
                        answer(reply, &node_sockets);
                    }
                    Request::Continue => alone.go_on(),
                }
                continue;
            }
            ended = &mut forwarding => break Err(ended_as("the recorder of kernel events", joined(ended))),
            ended = &mut federating => break Err(ended_as("the follower of foreign bundles", joined(ended))),
            ended = &mut fetching => break Err(ended_as("the fetcher of issuers' keys", joined(ended))),
            ended = &mut recording => break Err(ended_as("the recorder of closed flows", joined(ended))),
            ended = &mut collector => break Err(ended_as("the flow log", joined(ended))),
            ended = &mut following => break Err(ended_as("the authority's follower", joined(ended))),
            () = svids.ended() => break Err(ended_as("the SVID manager", "its task is gone".into())),
            why = plane.failed() => break Err(ended_as("the data plane", why)),
        }
        if let Err(error) = entries.reload(applied.workload_entries.as_deref(), &domain) {
            tracing::error!(%error, "workload entries not read again; those in force stay");
        }
        match reload(&applied, &sources) {
            Ok(newer) => {
                plane.set_limits(newer.limits);
                access_log.set(newer.access_log, newer.access_log_per_second);
                if let Err(error) = levels.set(&newer.log_level) {
                    tracing::error!(%error, "the log's levels stay");
                }
                config_changes.send_replace(Arc::new(newer.clone()));
                applied = newer;
            }
            Err(error) => {
                tracing::error!(%error, "configuration not reloaded; the one in force stays");
            }
        }
    };
    if let Ok(Some(_successor)) = &result {
        let within = applied.drain_deadline;
        tracing::info!(?within, "another agent serves the node: open flows are finished here");
        place.send_replace(Succession::Succeeded);
        // The sockets are left to it, with their files.
        succeeded.cancel();
        let blind = async || {
            if !reconciling.is_finished() {
                let _ = (&mut reconciling).await;
            }
        };
        retire(&plane, within, &mut terminate, &mut interrupt, blind).await;
    }
    // Who comes now begins as at any start, once this process has ended.
    giving.abort();
    // Un-announced first: peers stop dialling. Whatever was enforced stays enforced:
    // programs and maps are pinned, and listeners that are gone refuse.
    stop.cancel();
    if !reconciling.is_finished() {
        let _ = tokio::time::timeout(DRAIN, &mut reconciling).await;
    }
    if matches!(result, Ok(None)) {
        tracing::info!(within = ?DRAIN, "draining");
        plane.drain(DRAIN).await;
    }
    ended.cancel();
    alone.pause().await;
    if !serving.is_finished() {
        let _ = tokio::time::timeout(DRAIN, &mut serving).await;
    }
    if !serving_workloads.is_finished() {
        let _ = tokio::time::timeout(DRAIN, &mut serving_workloads).await;
    }
    if let Some(own) = own {
        let _ = tokio::time::timeout(DRAIN, own).await;
    }
    result.map(drop)
}

/// Follows the foreign bundles that the world names, until the world ends.
async fn federate(
    mut world: watch::Receiver<Arc<World>>,
    trust: Arc<Trust>,
    failures: watch::Sender<follow::Failures>,
) {
    let (sender, federation) = watch::channel(world.borrow_and_update().federation.clone());
    let telling = async {
        while world.changed().await.is_ok() {
            let newer = world.borrow_and_update().federation.clone();
            sender.send_if_modified(|old| {
                let changed = *old != newer;
                *old = newer;
                changed
            });
        }
    };
    tokio::select! {
        () = telling => {}
        () = follow::run(trust, federation, failures) => {}
    }
}

/// Reads the configuration again; only its live keys take effect.
fn reload(applied: &AgentConfig, sources: &ConfigSources) -> Result<AgentConfig, ConfigError> {
    let newer = sources.load()?.config;
    for (key, apply) in applied.changes(&newer) {
        tracing::info!(key = key.name, ?apply, "configuration changed");
    }
    Ok(applied.with_live_keys_of(&newer))
}

fn ended_as(part: &'static str, why: String) -> DaemonError {
    DaemonError::Ended { part, why }
}

fn flatten<E: std::fmt::Display>(ended: Result<Result<(), E>, tokio::task::JoinError>) -> String {
    match ended {
        Ok(Ok(())) => "it returned".into(),
        Ok(Err(error)) => error.to_string(),
        Err(error) => error.to_string(),
    }
}

fn joined(ended: Result<(), tokio::task::JoinError>) -> String {
    ended.err().map_or_else(|| "it returned".into(), |error| error.to_string())
}

fn log_format(config: &AgentConfig) -> logging::Format {
    match config.log_format {
        LogFormat::Text => logging::Format::Text,
        LogFormat::Json => logging::Format::Json,
    }
}

fn ranges(config: &AgentConfig) -> Ranges {
    Ranges {
        pods: config.pod_ranges.clone(),
        services: config.service_ranges.clone(),
        outside: config.outside_ranges.clone(),
    }
}

fn kernel_config(config: &AgentConfig, succeeds: bool) -> KernelConfig {
    KernelConfig {
        bpffs: config.bpffs.clone(),
        instance: config.instance.clone(),
        workloads: config.cgroup_root.clone().into(),
        node: config.node_cgroup.clone().unwrap_or_else(|| "/".into()).into(),
        mask_features: std::env::var(features::MASK_VARIABLE).ok(),
        succeeds,
    }
}

fn data_plane_config(config: &AgentConfig) -> DataPlaneConfig {
    let mut plane = DataPlaneConfig::new(config.limits, config.strict_grace);
    plane.wires = config.tunnel;
    if let Some(cores) = config.cores {
        plane.cores = cores.max(1);
    }
    plane
}

/// Says why what a key asks for is not served, or that it is.
fn tell(
    problems: &watch::Sender<BTreeMap<&'static str, String>>,
    key: &'static str,
    problem: Option<String>,
) {
    problems.send_modify(|all| match problem {
        Some(problem) => drop(all.insert(key, problem)),
        None => drop(all.remove(key)),
    });
}

/// Serves the pages that are asked for, each on its address; `problems` holds why one is not.
async fn serve_pages<const N: usize>(
    pages: [(&'static str, Option<SocketAddr>, axum::Router); N],
    problems: watch::Sender<BTreeMap<&'static str, String>>,
) {
    let mut serving = tokio::task::JoinSet::new();
    for (key, address, page) in pages {
        let Some(address) = address else { continue };
        let problems = problems.clone();
        let told = move |problem| tell(&problems, key, problem);
        serving.spawn(PageServer { key, address, page }.run(told));
    }
    // Without a page there is nothing to end; one that ends has panicked.
    match serving.join_next().await {
        Some(_) => {}
        None => std::future::pending().await,
    }
}
