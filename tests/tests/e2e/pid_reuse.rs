//! A pid is made to be another process's while its connection to the Workload API lives.
//!
//! The attack: a process of one pod connects, an accomplice keeps the connection, the process
//! ends; its pid becomes a process's of another pod, whose identity the accomplice then asks
//! for. clone3(2) lets root choose the pid (`set_tid`), so nothing is left to luck. Each process
//! is the first one of a pid namespace of its own, as a container's is.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::{ffi::OsStrExt, net::UnixStream},
    },
    path::Path,
    sync::Mutex,
};

use anyhow::{Context, Result, bail, ensure};
use hyper_util::rt::TokioIo;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use signet::proto::workload::{
    X509svidRequest, spiffe_workload_api_client::SpiffeWorkloadApiClient,
};
use signet_lab::{LabOptions, agent::Agent, cgroup, eventually};
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint},
};

use crate::mesh::{Mesh, TIMEOUT, with_logs};

const INTRUDER: &str = "spiffe://cluster.local/ns/shop/sa/intruder";
/// Others of the machine take pids too: the freed one may be gone when it is wanted.
const TRIES: usize = 50;

#[test]
fn who_takes_over_a_pid_gets_nothing_by_peer_pidfd() -> Result<()> {
    a_pid_changes_hands("")
}

#[test]
fn who_takes_over_a_pid_gets_nothing_where_the_kernel_tells_only_the_pid() -> Result<()> {
    a_pid_changes_hands("peer_pidfd")
}

fn a_pid_changes_hands(masked: &str) -> Result<()> {
    let mut options = LabOptions::default();
    if !masked.is_empty() {
        options.agent_env.push(("SIGNET_MASK_FEATURES".into(), masked.into()));
    }
    let mesh = Mesh::with(options, Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let agent = mesh.lab.agent("node-1")?;
        // The victim can be somebody: what is refused below is refused for the pid's sake.
        let (_victim, mut call) = Connected::start(mesh.frontend.place().cgroup.as_path(), agent)?;
        ensure!(call.identity()? == "spiffe://cluster.local/ns/shop/sa/frontend");
        between_accept_and_attestation(mesh, agent)?;
        between_connect_and_accept(mesh, agent)
    })
}

/// The agent has taken the connection in and answered on it; then the pid changes hands.
fn between_accept_and_attestation(mesh: &Mesh, agent: &Agent) -> Result<()> {
    let (heir, mut call) = take_over(mesh, || {
        let (caller, mut call) = Connected::start(&mesh.intruder.place().cgroup, agent)?;
        // The control: while the process lives, its connection is good, in whosever hands.
        ensure!(call.identity()? == INTRUDER, "the caller's own identity");
        Ok((caller, call))
    })?;
    let gone = || unattested(agent, "gone");
    let before = gone()?;
    let refused = call.refused()?;
    ensure!(gone()? == before + 1.0, "it is counted under another reason");
    ensure!(
        refused.code() == Code::PermissionDenied && refused.message() == "no identity issued",
        "{refused:?}"
    );
    drop(heir);
    Ok(())
}

/// The connection waits in the backlog of a stopped agent while the pid changes hands.
fn between_connect_and_accept(mesh: &Mesh, agent: &Agent) -> Result<()> {
    let cgroup = &mesh.intruder.place().cgroup;
    // The control: who waits and lives is served when the agent goes on.
    let stopped = Stopped::stop(agent)?;
    let (_caller, mut call) = Connected::start(cgroup, agent)?;
    drop(stopped);
    ensure!(call.identity()? == INTRUDER, "the caller's own identity");

    let gone = || unattested(agent, "gone");
    let before = gone()?;
    let stopped = Stopped::stop(agent)?;
    let (heir, mut call) = take_over(mesh, || Connected::start(cgroup, agent))?;
    drop(stopped);
    let refused = call.refused()?;
    // It is not even a connection on which something could be asked.
    ensure!(refused.code() != Code::Ok && refused.message() != "no identity issued", "{refused:?}");
    eventually("the agent says why", TIMEOUT, || Ok((gone()? == before + 1.0).then_some(())))?;
    drop(heir);
    Ok(())
}

/// How many callers were no workload, by reason.
fn unattested(agent: &Agent, reason: &str) -> Result<f64> {
    Ok(agent.metrics()?.sum("workload_api_unattested_total", &[("reason", reason)]))
}

/// Lets a caller connect and end, and makes a process of the frontend's container with its pid.
fn take_over(mesh: &Mesh, connect: impl Fn() -> Result<(Cloned, Call)>) -> Result<(Cloned, Call)> {
    let victim = &mesh.frontend.place().cgroup;
    for _ in 0..TRIES {
        let (caller, call) = connect()?;
        let pid = caller.pid;
        drop(caller);
        let heir = match Cloned::start(victim, Some(pid), Act::LetGo(call.descriptor)) {
            Ok(heir) => heir,
            Err(error) if taken(&error) => continue,
            Err(error) => return Err(error),
        };
        // The pid is the victim's process now, to everybody who looks it up.
        let proc = fs::read_to_string(format!("/proc/{}/cgroup", pid.as_raw_pid()))?;
        let name = cgroup::path_below_mount(victim)?;
        ensure!(heir.pid == pid && proc.trim_end().ends_with(&name), "{proc} is not {name}");
        return Ok((heir, call));
    }
    bail!("the pid was taken by somebody else {TRIES} times")
}

fn taken(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.and_then(io::Error::raw_os_error) == Some(libc::EEXIST)
}

/// An agent that is stopped until this is dropped.
struct Stopped<'a>(&'a Agent);

impl<'a> Stopped<'a> {
    fn stop(agent: &'a Agent) -> Result<Self> {
        let stopped = Self(agent);
        agent.signal(Signal::STOP)?;
        let stat = format!("/proc/{}/stat", agent.pid()?);
        eventually("the agent is stopped", TIMEOUT, || {
            Ok(fs::read_to_string(&stat)?.contains(") T ").then_some(()))
        })?;
        Ok(stopped)
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.signal(Signal::CONT) {
            eprintln!("the agent stays stopped: {error:#}");
        }
    }
}

/// The accomplice's end of a connection that another process made.
struct Call {
    runtime: tokio::runtime::Runtime,
    stream: Option<UnixStream>,
    descriptor: RawFd,
    client: Option<SpiffeWorkloadApiClient<Channel>>,
}

/// A process that connects.
struct Connected;

impl Connected {
    /// A process of this cgroup that has connected to the agent's Workload API, and its
    /// connection.
    fn start(cgroup: &Path, agent: &Agent) -> Result<(Cloned, Call)> {
        // SAFETY: no memory is involved.
        let socket = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0) };
        ensure!(socket >= 0, io::Error::last_os_error());
        // SAFETY: it has just been made and is nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        let descriptor = socket.as_raw_fd();
        let address = address(&agent.workload_socket())?;
        let caller = Cloned::start(cgroup, None, Act::Connect(descriptor, &address))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let stream = Some(UnixStream::from(socket));
        Ok((caller, Call { runtime, stream, descriptor, client: None }))
    }
}

impl Call {
    /// The identity that the Workload API hands out on the connection.
    fn identity(&mut self) -> Result<String> {
        Ok(self.fetch()?)
    }

    /// How it refuses.
    fn refused(&mut self) -> Result<Status> {
        match self.fetch() {
            Ok(id) => bail!("the accomplice got {id}"),
            Err(status) => Ok(status),
        }
    }

    fn fetch(&mut self) -> Result<String, Status> {
        let internal = |error: &dyn std::fmt::Display| Status::internal(error.to_string());
        let Self { runtime, stream, client, .. } = self;
        runtime.block_on(async {
            if let Some(stream) = stream.take() {
                stream.set_nonblocking(true).map_err(|e| internal(&e))?;
                let stream =
                    tokio::net::UnixStream::from_std(stream).map_err(|e| internal(&e))?;
                let stream = Mutex::new(Some(TokioIo::new(stream)));
                let connect = tower::service_fn(move |_: tonic::transport::Uri| {
                    let stream = stream.lock().ok().and_then(|mut stream| stream.take());
                    async move { stream.ok_or(io::ErrorKind::NotConnected).map_err(io::Error::from) }
                });
                let channel = Endpoint::from_static("http://localhost")
                    .timeout(TIMEOUT)
                    .connect_with_connector(connect)
                    .await
                    .map_err(|e| Status::unavailable(e.to_string()))?;
                *client = Some(SpiffeWorkloadApiClient::new(channel));
            }
            let client = client.as_mut().ok_or_else(|| Status::unavailable("no connection"))?;
            let mut request = Request::new(X509svidRequest {});
            let header = tonic::metadata::MetadataValue::from_static("true");
            request.metadata_mut().insert("workload.spiffe.io", header);
            let mut messages = client.fetch_x509svid(request).await?.into_inner();
            let message = messages.message().await?;
            let first = message.and_then(|message| message.svids.into_iter().next());
            first.map(|svid| svid.spiffe_id).ok_or_else(|| Status::not_found("no SVID"))
        })
    }
}

fn address(path: &Path) -> Result<libc::sockaddr_un> {
    let bytes = path.as_os_str().as_bytes();
    let mut path = [0; 108];
    ensure!(bytes.len() < path.len(), "the socket's path is too long");
    for (to, from) in path.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    Ok(libc::sockaddr_un { sun_family: libc::AF_UNIX as libc::sa_family_t, sun_path: path })
}

/// What a process does, before it waits to be ended.
enum Act<'a> {
    /// Connects this socket: the kernel notes it as the one who did.
    Connect(RawFd, &'a libc::sockaddr_un),
    /// Closes its copy of this socket: it holds nothing of the connection.
    LetGo(RawFd),
}

/// A process that was cloned into a cgroup, the first of a pid namespace of its own. Killed and
/// waited for when dropped: its pid is free then.
struct Cloned {
    pid: Pid,
}

/// Flag of clone3(2) (linux/sched.h); libc's constant is too narrow.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// `struct clone_args` (linux/sched.h, since 5.7).
#[repr(C)]
#[derive(Default)]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

impl Cloned {
    /// A process with this pid, or any; its act is done when this returns.
    fn start(cgroup: &Path, pid: Option<Pid>, act: Act<'_>) -> Result<Self> {
        let directory = File::open(cgroup).with_context(|| cgroup.display().to_string())?;
        let (mut told, tell) = UnixStream::pair()?;
        // From the innermost namespace outwards: the first one of its own, and this one here.
        let pids = [1, Pid::as_raw(pid)];
        let arguments = CloneArguments {
            flags: libc::CLONE_NEWPID as u64 | CLONE_INTO_CGROUP,
            exit_signal: libc::SIGCHLD as u64,
            set_tid: if pid.is_some() { pids.as_ptr() as u64 } else { 0 },
            set_tid_size: if pid.is_some() { pids.len() as u64 } else { 0 },
            cgroup: directory.as_raw_fd() as u64,
            ..CloneArguments::default()
        };
        // SAFETY: without CLONE_VM the child is a copy of this process with one thread. It calls
        // nothing but the system: it takes no lock, allocates nothing and does not return.
        let cloned = unsafe {
            libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<CloneArguments>())
        };
        if cloned == 0 {
            // SAFETY: descriptors and the address are the copy's own.
            unsafe { play(&act, tell.as_raw_fd()) }
        }
        if cloned < 0 {
            return Err(io::Error::last_os_error().into());
        }
        let pid = i32::try_from(cloned).ok().and_then(Pid::from_raw).context("no pid")?;
        let child = Self { pid };
        drop(tell);
        ensure!(told.read(&mut [0; 1])? == 1, "the process could not act");
        Ok(child)
    }
}

/// The child: acts, tells, waits for its end.
///
/// # Safety
/// In a process that was just cloned, with a descriptor of a pipe.
unsafe fn play(act: &Act<'_>, tell: RawFd) -> ! {
    // SAFETY: system calls over descriptors and an address that live; see above.
    unsafe {
        let done = match *act {
            Act::Connect(socket, address) => libc::connect(
                socket,
                std::ptr::from_ref(address).cast(),
                size_of::<libc::sockaddr_un>() as libc::socklen_t,
            ),
            Act::LetGo(socket) => libc::close(socket),
        };
        if done != 0 || libc::write(tell, b"x".as_ptr().cast(), 1) != 1 {
            libc::_exit(1);
        }
        loop {
            libc::pause();
        }
    }
}

impl Drop for Cloned {
    fn drop(&mut self) {
        if kill_process(self.pid, Signal::KILL).is_ok() {
            let _ = waitpid(Some(self.pid), WaitOptions::empty());
        }
    }
}
