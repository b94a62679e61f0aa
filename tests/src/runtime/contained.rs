//! A container: created and started over CRI, its input and output two pipes in a directory that
//! it mounts.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::{fs::OpenOptionsExt, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::ExitStatus,
    sync::Arc,
};

use anyhow::{Context, Result};
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};
use serde_json::Value;

use super::{Runtime, Sandbox, cri::*, image};

/// Where a container finds its pipes.
const INSIDE: &str = "/stdio";

/// A container of a sandbox; ends with its handle.
#[derive(Debug)]
pub(crate) struct Contained {
    runtime: Arc<Runtime>,
    id: String,
    output: PathBuf,
    pid: u32,
}

impl Contained {
    /// Creates and starts a container that runs the helper with `arguments`; with it come its
    /// standard input and output.
    pub(crate) fn start(
        runtime: &Arc<Runtime>,
        sandbox: &Sandbox,
        name: &str,
        arguments: &[String],
    ) -> Result<(Self, File, PathBuf)> {
        let unique = uuid::Uuid::new_v4().simple().to_string();
        let stdio = runtime.directory.join("stdio").join(&unique[..12]);
        fs::create_dir(&stdio).with_context(|| stdio.display().to_string())?;
        let (input, output) = (stdio.join("in"), stdio.join("out"));
        for pipe in [&input, &output] {
            mknodat(CWD, pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
                .with_context(|| pipe.display().to_string())?;
        }
        // Open for both, or it would wait for the other end, which comes only later.
        let input =
            File::options().read(true).write(true).open(&input).context("the container's input")?;
        let command = [image::WORKER, "--stdio", INSIDE].map(str::to_owned);
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
            image: Some(ImageSpec { image: image::NAME.into() }),
            command: command.into_iter().chain(arguments.iter().cloned()).collect(),
            mounts: vec![Mount {
                container_path: INSIDE.into(),
                host_path: stdio.display().to_string(),
            }],
            log_path: format!("{unique}.log"),
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: sandbox
                        .config
                        .linux
                        .as_ref()
                        .and_then(|linux| linux.security_context.clone()?.namespace_options),
                }),
            }),
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: sandbox.id.clone(),
            config: Some(config),
            sandbox_config: Some(sandbox.config.clone()),
        };
        let answer: ContainerId =
            runtime.call("/runtime.v1.RuntimeService/CreateContainer", request)?;
        let mut contained =
            Self { runtime: Arc::clone(runtime), id: answer.container_id, output, pid: 0 };
        let request = ContainerId { container_id: contained.id.clone() };
        let _: Nothing = runtime.call("/runtime.v1.RuntimeService/StartContainer", request)?;
        contained.pid = contained.read_pid()?;
        let output = contained.output.clone();
        Ok((contained, input, output))
    }

    /// Its id, which is its cgroup directory's name.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// The pid of its first process, on the host; 0 when it ended before anybody asked.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// How it ended, once it has.
    pub(crate) fn ended(&self) -> Option<ExitStatus> {
        let status = self.status(false).ok()?.status?;
        (status.state == i32::from(ContainerState::Exited))
            .then(|| ExitStatus::from_raw(status.exit_code << 8))
    }

    /// SIGKILL, and removes it.
    pub(crate) fn kill(&self) {
        let request = StopContainerRequest { container_id: self.id.clone(), timeout: 0 };
        // Whose sandbox was ended is gone already.
        let _: Result<Nothing> =
            self.runtime.call("/runtime.v1.RuntimeService/StopContainer", request);
        let request = ContainerId { container_id: self.id.clone() };
        let _: Result<Nothing> =
            self.runtime.call("/runtime.v1.RuntimeService/RemoveContainer", request);
        // Whoever reads its output waits for somebody to write.
        let _ = writer(&self.output);
    }

    fn status(&self, verbose: bool) -> Result<ContainerStatusResponse> {
        let request = ContainerStatusRequest { container_id: self.id.clone(), verbose };
        self.runtime.call("/runtime.v1.RuntimeService/ContainerStatus", request)
    }

    fn read_pid(&self) -> Result<u32> {
        let answer = self.status(true)?;
        let info: Value = serde_json::from_str(answer.info.get("info").context("no info")?)?;
        Ok(info["pid"].as_u64().unwrap_or_default() as u32)
    }
}

/// Opens a pipe for writing without waiting for a reader.
fn writer(pipe: &Path) -> std::io::Result<File> {
    OpenOptions::new().write(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(pipe)
}
