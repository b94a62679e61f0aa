//! Processes of the lab: each runs in a given cgroup and network namespace.
//!
//! The lab itself never forks with code in between: it starts `signet-lab-worker`, which joins
//! the cgroup, enters the namespace and then plays its role or executes the program. So a
//! process has no socket before it is where it belongs.

use std::{
    ffi::OsString,
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::runtime::Contained;

/// Where a process runs.
#[derive(Clone, Debug)]
pub struct Place {
    /// The cgroup's directory.
    pub cgroup: PathBuf,
    /// The network namespace's file.
    pub netns: PathBuf,
    /// The node's network namespace, for a pod's processes: a runtime's child joins the pod's
    /// cgroup while it is still there.
    pub runtime_netns: Option<PathBuf>,
    /// Standard error of everything that runs here goes to files in this directory.
    pub logs: PathBuf,
}

/// What a command printed and how it ended.
#[derive(Debug)]
pub struct Output {
    /// Exit status.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// Standard output of a command that succeeded.
    pub fn success(self) -> Result<String> {
        if self.status.success() {
            return Ok(self.stdout);
        }
        bail!("{}: {} {}", self.status, self.stdout.trim(), self.stderr.trim())
    }

    /// The exit code, 128 + signal when it was killed.
    pub fn code(&self) -> i32 {
        use std::os::unix::process::ExitStatusExt;
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }
}

impl Place {
    /// A command that will run `program` here.
    pub fn command(&self, program: impl Into<OsString>) -> Result<Command> {
        let mut command = self.worker()?;
        command.arg("exec").arg("--").arg(program.into());
        Ok(command)
    }

    /// Runs a command here to its end.
    pub fn run(&self, argv: &[&str]) -> Result<Output> {
        let (program, arguments) = argv.split_first().context("an empty command")?;
        let output = self
            .command(program)?
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("cannot run {program}"))?;
        Ok(Output {
            status: output.status,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Starts a worker role here. `name` names its log file.
    pub fn start_role<S: AsRef<str>>(&self, name: &str, role: &[S]) -> Result<Running> {
        let mut command = self.worker()?;
        command.args(role.iter().map(AsRef::as_ref));
        Running::start(command, name, &self.logs)
    }

    /// Starts any program here.
    pub fn start_program(&self, name: &str, argv: &[&str]) -> Result<Running> {
        let (program, arguments) = argv.split_first().context("an empty command")?;
        let mut command = self.command(program)?;
        command.args(arguments);
        Running::start(command, name, &self.logs)
    }

    fn worker(&self) -> Result<Command> {
        let mut command = Command::new(worker_binary()?);
        without_own_variables(&mut command);
        if let Some(runtime) = &self.runtime_netns {
            command.arg("--runtime-netns").arg(runtime);
        }
        command.arg("--cgroup").arg(&self.cgroup).arg("--netns").arg(&self.netns);
        Ok(command)
    }
}

/// A process that runs; killed when dropped. Its JSON lines are read as they come.
#[derive(Debug)]
pub struct Running {
    name: String,
    pid: u32,
    body: Body,
    stdin: Option<File>,
    printed: Arc<Printed>,
    log: PathBuf,
}

/// What it is to those who end it.
#[derive(Debug)]
enum Body {
    /// A child of this process.
    Child(Child),
    /// A container of a runtime, and how it ended, once that was asked.
    Contained(Contained, Option<ExitStatus>),
}

#[derive(Debug, Default)]
struct Printed {
    lines: Mutex<Lines>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Lines {
    values: Vec<Value>,
    ended: bool,
}

impl Printed {
    /// Reads lines, on a thread of its own, from what `open` opens there.
    fn read_from<R: Read>(
        name: &str,
        open: impl FnOnce() -> std::io::Result<R> + Send + 'static,
    ) -> Result<Arc<Self>> {
        let printed = Arc::new(Self::default());
        let reader = Arc::clone(&printed);
        thread::Builder::new()
            .name(format!("read {name}"))
            .spawn(move || {
                let lines = open().into_iter().flat_map(|source| BufReader::new(source).lines());
                for line in lines.map_while(Result::ok) {
                    let value = serde_json::from_str(&line).unwrap_or(Value::String(line));
                    lock(&reader.lines).values.push(value);
                    reader.more.notify_all();
                }
                lock(&reader.lines).ended = true;
                reader.more.notify_all();
            })
            .context("cannot start a reader thread")?;
        Ok(printed)
    }
}

impl Running {
    /// Starts a command as it is; `name` names its log file in `logs`.
    pub(crate) fn start(mut command: Command, name: &str, logs: &Path) -> Result<Self> {
        std::fs::create_dir_all(logs).with_context(|| logs.display().to_string())?;
        let log = logs.join(format!("{name}.log"));
        let stderr = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| log.display().to_string())?;
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let stdin = child.stdin.take().map(|stdin| File::from(OwnedFd::from(stdin)));
        let stdout = child.stdout.take().context("no stdout")?;
        let printed = Printed::read_from(name, move || Ok(stdout))?;
        let pid = child.id();
        Ok(Self { name: name.to_owned(), pid, body: Body::Child(child), stdin, printed, log })
    }

    /// A container that was started, with the writing end of its input and the pipe of its output.
    pub(crate) fn contained(
        contained: Contained,
        input: File,
        output: PathBuf,
        name: &str,
        logs: &Path,
    ) -> Result<Self> {
        // It opens when the container has it open, too.
        let printed = Printed::read_from(name, move || File::open(&output))?;
        Ok(Self {
            name: name.to_owned(),
            pid: contained.pid(),
            body: Body::Contained(contained, None),
            stdin: Some(input),
            printed,
            log: logs.join(format!("{name}.log")),
        })
    }

    /// Its pid; 0 of a container that ended at once.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The file that receives its standard error.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Sends a line to its standard input.
    pub fn send(&mut self, line: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().with_context(|| format!("{}: stdin closed", self.name))?;
        writeln!(stdin, "{line}").with_context(|| format!("{}: stdin", self.name))
    }

    /// Closes its standard input: roles that run until then finish and report.
    pub fn finish(&mut self) {
        self.stdin = None;
    }

    /// Everything that it has printed so far.
    pub fn printed(&self) -> Vec<Value> {
        lock(&self.printed.lines).values.clone()
    }

    /// Waits for the first printed record whose `event` is `event`.
    pub fn wait_event(&self, event: &str, timeout: Duration) -> Result<Value> {
        self.wait_for(event, timeout, |v| v["event"] == event)
    }

    /// Waits for the first printed record that satisfies `wanted`.
    pub fn wait_for(
        &self,
        what: &str,
        timeout: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let deadline = Instant::now() + timeout;
        let mut lines = lock(&self.printed.lines);
        let mut seen = 0;
        loop {
            if let Some(value) = lines.values[seen..].iter().find(|v| wanted(v)) {
                return Ok(value.clone());
            }
            seen = lines.values.len();
            let left = deadline.saturating_duration_since(Instant::now());
            if lines.ended || left.is_zero() {
                let why = if lines.ended { "ended" } else { "did not get there in time" };
                drop(lines);
                bail!("{} {why} before `{what}`; it said:\n{}", self.name, self.said());
            }
            lines = self
                .printed
                .more
                .wait_timeout(lines, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits for its `report` record, the end of every role that measures, and parses it.
    pub fn report<T: DeserializeOwned>(&self, timeout: Duration) -> Result<T> {
        let value = self.wait_event("report", timeout)?;
        serde_json::from_value(value.clone())
            .with_context(|| format!("{}: unexpected report {value}", self.name))
    }

    /// Finishes the role and takes its report.
    pub fn finish_and_report<T: DeserializeOwned>(&mut self, timeout: Duration) -> Result<T> {
        self.finish();
        self.report(timeout)
    }

    /// The exit status once it has ended.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.ended() {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("{} still runs after {timeout:?}:\n{}", self.name, self.said());
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The exit status, when it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        match &mut self.body {
            Body::Child(child) => child.try_wait().ok().flatten(),
            Body::Contained(contained, ended) => {
                if ended.is_none() {
                    *ended = contained.ended();
                }
                *ended
            }
        }
    }

    /// Sends a signal to it alone.
    pub fn signal(&self, signal: rustix::process::Signal) -> Result<()> {
        let pid = rustix::process::Pid::from_raw(self.pid as i32)
            .ok_or_else(|| anyhow!("{}: no pid", self.name))?;
        rustix::process::kill_process(pid, signal).with_context(|| self.name.clone())
    }

    /// Kills it (SIGKILL) and waits.
    pub fn kill(&mut self) {
        match &mut self.body {
            Body::Child(child) => {
                let _ = child.kill();
                let _ = child.wait();
            }
            Body::Contained(contained, _) => contained.kill(),
        }
    }

    /// What it printed and logged last, for messages.
    pub fn said(&self) -> String {
        let printed = self.printed();
        let tail: Vec<String> =
            printed.iter().rev().take(20).rev().map(|v| format!("  {v}")).collect();
        format!("{}\n{}", tail.join("\n"), tail_of(&self.log, 20))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The last lines of a log file, indented.
pub fn tail_of(log: &Path, lines: usize) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    let from = all.len().saturating_sub(lines);
    all[from..].iter().map(|l| format!("  | {l}\n")).collect()
}

/// Takes the lab's own variables from what a command will inherit: they are none of the agent's,
/// which refuses unknown ones.
pub fn without_own_variables(command: &mut Command) {
    for (key, _) in std::env::vars_os() {
        let name = key.to_string_lossy();
        let for_agents = ["SIGNET_MASK_FEATURES", "SIGNET_TUNNEL"];
        if name.starts_with("SIGNET_") && !for_agents.contains(&&*name) {
            command.env_remove(&key);
        }
    }
}

/// The helper that plays the roles: `SIGNET_LAB_WORKER`, or beside this executable.
pub fn worker_binary() -> Result<PathBuf> {
    binary("SIGNET_LAB_WORKER", "signet-lab-worker")
}

/// The program under test: `SIGNET_BIN`, or beside this executable.
pub fn signet_binary() -> Result<PathBuf> {
    binary("SIGNET_BIN", "signet")
}

/// The workload that uses others' SPIFFE libraries: `SIGNET_LAB_SPIFFE`, or beside this
/// executable.
pub fn spiffe_binary() -> Result<PathBuf> {
    binary("SIGNET_LAB_SPIFFE", "signet-lab-spiffe")
}

/// Prometheus: `SIGNET_LAB_PROMETHEUS`, where `cargo xtask setup` unpacks it, or the system's.
pub fn prometheus_binary() -> Result<PathBuf> {
    if let Ok(path) = binary("SIGNET_LAB_PROMETHEUS", "prometheus/usr/bin/prometheus") {
        return Ok(path);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|directory| directory.join("prometheus"))
        .find(|candidate| candidate.is_file())
        .context("no `prometheus`: `cargo xtask setup` unpacks it into the build directory")
}

fn binary(variable: &str, name: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        let path = PathBuf::from(path);
        if path.is_file() {
            return Ok(path);
        }
        bail!("{variable}={} is not a file", path.display());
    }
    let own = std::env::current_exe().context("the path of this executable")?;
    // Test executables live in `deps/`, programs one above, what set-up brings two above.
    for directory in own.ancestors().skip(1).take(3) {
        let candidate = directory.join(name);
        if candidate.is_file() {
            return Ok(candidate);
        }
    }
    bail!("no `{name}` beside {}: run `cargo build`, or set {variable}", own.display())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
