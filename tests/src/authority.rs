//! `signet authority` under test: started with any flags, its log read line by line.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{
    lab::eventually,
    metrics::Metrics,
    process::{Output, Place, Running, signet_binary, without_own_variables},
};

/// How long an authority may take to start, on a busy machine.
const START: Duration = Duration::from_secs(30);

/// A running authority; killed when dropped.
#[derive(Debug)]
pub struct Authority {
    running: Running,
    place: Option<Place>,
    address: SocketAddr,
    /// Where its part of the log begins: an earlier one may have written to the same file.
    begins: usize,
}

impl Authority {
    /// Starts one, here or in a place of the lab, and waits until it listens. `flags` may leave
    /// out the address: then it is a free one of the loopback.
    pub fn start(name: &str, logs: &Path, place: Option<&Place>, flags: &[String]) -> Result<Self> {
        let mut arguments = vec!["authority".to_owned(), "--log-format".into(), "json".into()];
        if !flags.iter().any(|flag| flag == "--listen") {
            arguments.extend(["--listen".into(), "127.0.0.1:0".into()]);
        }
        arguments.extend(flags.iter().cloned());
        let binary = signet_binary()?;
        let log = logs.join(format!("{name}.log"));
        let begins = fs::read(&log).map_or(0, |text| text.len());
        let mut running = match place {
            Some(place) => {
                let binary = binary.display().to_string();
                let argv: Vec<&str> =
                    std::iter::once(&*binary).chain(arguments.iter().map(String::as_str)).collect();
                place.start_program(name, &argv)?
            }
            None => {
                let mut command = Command::new(binary);
                without_own_variables(&mut command);
                command.args(arguments);
                Running::start(command, name, logs)?
            }
        };
        let log = running.log().to_owned();
        let address = eventually("the authority listens", START, || {
            if let Some(status) = running.ended() {
                return Ok(Some(Err(status)));
            }
            let lines = lines_of(&log, begins);
            let started = lines.iter().find(|line| line["message"] == "authority started");
            let address = started.and_then(|line| line["address"].as_str()?.parse().ok());
            Ok(address.map(Ok))
        })?;
        match address {
            Ok(address) => Ok(Self { running, place: place.cloned(), address, begins }),
            Err(status) => bail!("{name} ended: {status}\n{}", running.said()),
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its metrics, where `--metrics-listen` was given.
    pub fn metrics(&self) -> Result<Metrics> {
        let lines = self.lines();
        let started = lines.iter().find(|line| line["message"] == "authority started");
        let address = started.and_then(|line| line["metrics"].as_str());
        Metrics::scrape(self.place.as_ref(), address.context("it serves no metrics")?)
    }

    /// Its log, one JSON object a line.
    pub fn lines(&self) -> Vec<Value> {
        lines_of(self.running.log(), self.begins)
    }

    /// Its audit lines.
    pub fn audit(&self) -> Vec<Value> {
        self.lines().into_iter().filter(|line| line["target"] == "signet::audit").collect()
    }

    /// What it printed and logged last, for messages.
    pub fn said(&self) -> String {
        self.running.said()
    }

    /// SIGTERM; its exit code.
    pub fn stop(mut self) -> Result<Option<i32>> {
        self.running.signal(rustix::process::Signal::TERM)?;
        Ok(self.running.wait(Duration::from_secs(20))?.code())
    }
}

fn lines_of(log: &Path, begins: usize) -> Vec<Value> {
    let text = fs::read(log).unwrap_or_default();
    String::from_utf8_lossy(text.get(begins..).unwrap_or_default())
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect()
}

/// Writes a node's token file as the authority wants it; the token.
pub fn node_token(directory: &Path, node: &str) -> Result<String> {
    fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    let token = format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple());
    let path: PathBuf = directory.join(node);
    fs::write(&path, &token).with_context(|| path.display().to_string())?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    Ok(token)
}

/// Runs `signet authority <arguments>` to its end.
pub fn command(arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(signet_binary()?);
    without_own_variables(&mut command);
    let output = command.arg("authority").args(arguments).output().context("cannot run signet")?;
    Ok(Output {
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
