//! Everything of Signet's goes from a node: programs, links, pins, filters, sockets; the state
//! on disk when asked for.

use std::{
    fs, io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use super::LifecycleError;
use crate::{
    config::AgentConfig,
    endpoint::released::Released,
    handover,
    kernel::{Pinned, Removed, cgroup::Hierarchy},
};

/// What was removed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Outcome {
    /// The kernel's side; `None` where nothing was pinned.
    pub kernel: Option<Removed>,
    /// Files and directories.
    pub files: Vec<PathBuf>,
}

/// Removes this instance from the node. Pods' connections that went through a tunnel are over;
/// all others do not notice.
///
/// `state` removes the state directory, too: the history of flows, and the embedded
/// authority's root with its key.
///
/// # Errors
/// Where an agent runs (nothing is changed then), or something cannot be removed.
pub fn uninstall(config: &AgentConfig, state: bool) -> Result<Outcome, LifecycleError> {
    let socket = config.admin_socket();
    if UnixStream::connect(&socket).is_ok() {
        return Err(LifecycleError::AgentRuns { socket });
    }
    let mut outcome = Outcome {
        kernel: Pinned::find(&config.bpffs, &config.instance).map(Pinned::remove).transpose()?,
        files: Vec::new(),
    };
    outcome.remove_empty(&config.bpffs)?;

    let handover = handover::path_in(&config.run_dir);
    let sockets = [handover, socket, config.workload_socket()].into_iter();
    for socket in sockets.chain(config.own_socket.clone()) {
        outcome.remove_file(&socket)?;
        if let Some(directory) = socket.parent() {
            outcome.remove_empty(directory)?;
        }
    }
    outcome.remove_empty(&config.run_dir)?;

    // Whoever installs again starts with everything enforced.
    outcome.remove_file(&Released::path(&config.state_dir))?;
    if state && config.state_dir.exists() {
        fs::remove_dir_all(&config.state_dir).map_err(failed("remove", &config.state_dir))?;
        outcome.files.push(config.state_dir.clone());
    }
    if let Ok(hierarchy) = Hierarchy::find()
        && let Some(path) = hierarchy.agents_own(Path::new(&config.cgroup_root))
    {
        // Not while a process is in it: then it is no leftover.
        outcome.remove_empty(&path)?;
    }
    Ok(outcome)
}

impl Outcome {
    fn remove_file(&mut self, path: &Path) -> Result<(), LifecycleError> {
        match fs::remove_file(path) {
            Ok(()) => self.files.push(path.to_owned()),
            Err(error) if is_absent(&error) => {}
            Err(error) => return Err(failed("remove", path)(error)),
        }
        Ok(())
    }

    /// Removes a directory that is empty; others', mount points and missing ones stay.
    fn remove_empty(&mut self, path: &Path) -> Result<(), LifecycleError> {
        match fs::remove_dir(path) {
            Ok(()) => self.files.push(path.to_owned()),
            Err(error)
                if is_absent(&error)
                    || matches!(
                        error.kind(),
                        io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::ResourceBusy
                    ) => {}
            Err(error) => return Err(failed("remove", path)(error)),
        }
        Ok(())
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn failed<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> LifecycleError + 'a {
    move |source| LifecycleError::Io { action, path: path.to_owned(), source }
}
