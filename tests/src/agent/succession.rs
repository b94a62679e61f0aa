//! One agent after another on a node, as an upgrade brings it.

use std::{
    path::PathBuf,
    process::{Command, ExitStatus},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;

use super::{Agent, Flow, READY_TIMEOUT, flows, lock};
use crate::{
    lab::eventually,
    process::{Output, Running, signet_binary, tail_of, without_own_variables},
};

/// One agent process of a node among two: asked over its own socket.
#[derive(Debug)]
pub struct Process {
    running: Running,
    socket: PathBuf,
}

impl Agent {
    /// Starts one more agent on the node, with these further flags; it gets ready to take the
    /// place of the one that serves.
    pub fn start_successor(&self, flags: &[&str]) -> Result<Process> {
        self.start_process(flags)
    }

    /// Makes a process the node's agent that is asked, stopped and killed from now on; returns
    /// the one before.
    pub fn promote(&self, process: Process) -> Option<Process> {
        lock(&self.running).replace(process)
    }

    /// Replaces the agent by a new one, as a surge does: the new one is started, becomes ready,
    /// and then the old one is told to end. Returns the old one.
    pub fn succeed(&self, flags: &[&str]) -> Result<Process> {
        let successor = self.start_successor(flags)?;
        successor.wait_ready().with_context(|| tail_of(&self.log(), 60))?;
        let old = self.promote(successor).context("no agent ran")?;
        old.signal(Signal::TERM)?;
        Ok(old)
    }
}

impl Process {
    pub(super) fn new(running: Running, socket: PathBuf) -> Self {
        Self { running, socket }
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.running.pid()
    }

    /// The exit status, when it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.running.ended()
    }

    /// The exit status once it has ended.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        self.running.wait(timeout)
    }

    /// `signet probe ready|live`, of this very process.
    pub fn probe(&self, kind: &str) -> Result<Output> {
        self.cli(&["probe", kind])
    }

    /// What it says of itself.
    pub fn status(&self) -> Result<Value> {
        let answer = self.cli(&["status", "-o", "json"])?;
        serde_json::from_str(answer.stdout.trim()).with_context(|| answer.stderr.clone())
    }

    /// Waits until it serves the node.
    pub fn wait_ready(&self) -> Result<()> {
        eventually("the successor is ready", READY_TIMEOUT, || {
            let answer = self.probe("ready")?;
            if answer.code() == 0 {
                return Ok(Some(()));
            }
            bail!("{} {}", answer.stdout.trim(), answer.stderr.trim())
        })
    }

    /// Waits until it is not ready and says why, with this text in it.
    pub fn wait_unready(&self, why: &str) -> Result<()> {
        eventually(&format!("not ready because of {why:?}"), READY_TIMEOUT, || {
            let answer = self.probe("ready")?;
            ensure!(answer.code() == 1, "{} {}", answer.stdout, answer.stderr);
            if answer.stdout.contains(why) {
                return Ok(Some(()));
            }
            bail!("{}", answer.stdout.trim())
        })
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.running.signal(signal)
    }

    /// `kill -9`.
    pub fn kill(mut self) {
        self.running.kill();
    }

    /// Recent flows that this very process has recorded.
    pub fn flows(&self, filters: &[&str]) -> Result<Vec<Flow>> {
        let mut arguments = vec!["flows", "-o", "json", "--last", "100000"];
        arguments.extend(filters);
        let answer = self.cli(&arguments)?;
        ensure!(answer.code() == 0, "signet flows: {} {}", answer.status, answer.stderr);
        flows::parse(&answer.stdout)
    }

    /// Runs `signet <arguments> --socket <its own socket>`.
    pub fn cli(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(signet_binary()?);
        without_own_variables(&mut command);
        let output = command
            .args(arguments)
            .arg("--socket")
            .arg(&self.socket)
            .output()
            .context("cannot run signet")?;
        Ok(Output {
            status: output.status,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }
}
