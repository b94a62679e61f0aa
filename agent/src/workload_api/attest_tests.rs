use std::{path::PathBuf, process::Command};

use serde_json::json;
use tokio::net::UnixListener;

use super::*;
use crate::{kernel::test_host::Host, workload_api::tests::Process};

/// A pod's directory and a socket.
struct Scene {
    host: Host,
    hierarchy: Hierarchy,
    pod: PathBuf,
    name: PathBuf,
    socket: PathBuf,
    listener: UnixListener,
}

impl Scene {
    fn new(name: &str) -> Option<Self> {
        let host = Host::new(name)?;
        let pod = host.cgroup.join("kubepods/poduid");
        fs::create_dir(&pod).unwrap();
        let socket = host.dir.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let name = host.name.join("kubepods/poduid");
        Some(Self { hierarchy: Hierarchy::find().unwrap(), pod, name, socket, listener, host })
    }

    fn connected(&self) -> Process {
        let process = Process::start(&self.pod, &self.socket, &json!({"call": "hold"}));
        assert_eq!(process.next()["connected"], true);
        process
    }

    async fn accepted(&self) -> UnixStream {
        self.listener.accept().await.unwrap().0
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        for _ in 0..100 {
            if fs::remove_dir(&self.pod).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        eprintln!("{} stays", self.host.cgroup.display());
    }
}

fn methods() -> [Method; 2] {
    [Method::PeerPidfd, Method::PeerPid(NetnsOpener::start().unwrap())]
}

/// A process of this pid, once it is free. The kernel gives the next one after the last.
fn process_with_pid(pid: u32) -> std::process::Child {
    for _ in 0..200 {
        fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).unwrap();
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        if child.id() == pid {
            return child;
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    panic!("pid {pid} was not to be had");
}

#[tokio::test]
async fn a_live_caller_is_in_its_cgroup() {
    let Some(scene) = Scene::new("attest-live") else { return };
    for method in methods() {
        let mut process = scene.connected();
        let stream = scene.accepted().await;
        let caller = Caller::of(&stream, &method).await.unwrap();
        assert_eq!((caller.pid, caller.uid()), (process.pid(), 0));
        assert_eq!(caller.cgroup(&scene.hierarchy).unwrap().as_ref(), Some(&scene.name));
        process.end();
        let error = caller.cgroup(&scene.hierarchy).unwrap_err();
        assert!(matches!(error, AttestError::Gone), "{error}");
        let error = Caller::of(&stream, &method).await.unwrap_err();
        assert!(matches!(error, AttestError::Gone), "{error}");
    }
}

#[tokio::test]
async fn whoever_takes_over_a_pid_gets_nothing() {
    let Some(scene) = Scene::new("attest-pid") else { return };
    for method in methods() {
        // Between connect and accept.
        let mut process = scene.connected();
        let pid = process.pid();
        process.end();
        let mut heir = process_with_pid(pid);
        fs::write(scene.pod.join("cgroup.procs"), pid.to_string()).unwrap();
        let stream = scene.accepted().await;
        assert_eq!(peer_credentials(&stream).unwrap().pid.cast_unsigned(), pid, "as before");
        let error = Caller::of(&stream, &method).await.unwrap_err();
        assert!(matches!(error, AttestError::Gone), "{error}");
        heir.kill().unwrap();
        heir.wait().unwrap();

        // Between accept and attestation.
        let mut process = scene.connected();
        let pid = process.pid();
        let stream = scene.accepted().await;
        let caller = Caller::of(&stream, &method).await.unwrap();
        process.end();
        let mut heir = process_with_pid(pid);
        fs::write(scene.pod.join("cgroup.procs"), pid.to_string()).unwrap();
        let read = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        assert!(read.contains("poduid"), "the heir is in the pod: {read}");
        let error = caller.cgroup(&scene.hierarchy).unwrap_err();
        assert!(matches!(error, AttestError::Gone), "{error}");
        heir.kill().unwrap();
        heir.wait().unwrap();
    }
}

#[tokio::test]
async fn who_started_later_has_not_connected() {
    let now = clock_gettime(ClockId::Boottime);
    assert!(started_before(std::process::id(), now));
    let at_boot = Timespec { tv_sec: 0, tv_nsec: 0 };
    assert!(!started_before(std::process::id(), at_boot));
    assert!(!started_before(u32::MAX, now), "there is none");
    let fields = (3..=52).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
    assert_eq!(start_ticks(&format!("7 (a) S 1 (b) {fields}")), Some(22));
    assert_eq!(start_ticks("7 (sh"), None);
}
