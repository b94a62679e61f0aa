//! The lab itself, without agents: what it promises to the tests that stand on it.

use std::{path::Path, time::Duration};

use anyhow::{Result, ensure};
use signet_lab::{
    Lab, LabOptions, cgroup,
    kubelet::{CgroupDriver, Qos},
    leftovers, netns,
    traffic::{
        Role, any,
        reports::{BulkReport, DialReport, HammerReport, TcpServerReport, UdpReport},
        roles::{Bulk, BulkDirection, Hammer, TcpServer, UdpClient},
    },
};

const TIMEOUT: Duration = Duration::from_secs(60);

#[test]
fn pods_talk_and_the_capture_finds_it() -> Result<()> {
    let lab = Lab::start()?;
    lab.namespace("plain", None)?;
    let server = lab
        .pod_on(lab.node("node-2")?, "plain", "server")
        .container("main", Role::http(8080))
        .container("tcp", Role::tcp(9000))
        .start()?;
    let client = lab.pod("plain", "client").start()?;
    let capture = lab.capture("link")?;
    for address in server.all_at(8080) {
        let answer = client.curl(&format!("http://{address}/marker-a81f"))?.success()?;
        let seen: serde_json::Value = serde_json::from_str(&answer)?;
        ensure!(seen["path"] == "/marker-a81f", "{seen}");
        let peer: std::net::SocketAddr = serde_json::from_value(seen["peer"].clone())?;
        ensure!(client.ips().contains(&peer.ip()), "{seen}");
    }
    for address in server.all_at(9000) {
        let report: DialReport = client.run(&Role::dial(address, "marker-b92e"), TIMEOUT)?;
        ensure!(report.answered() && report.peer == Some(address), "{report:?}");
    }
    let captured = capture.stop()?;
    captured.complete()?;
    let families = server.ips().len();
    // The request's path, and its echo in the answer.
    ensure!(
        captured.find("marker-a81f").len() >= 2 * families,
        "{:?}",
        captured.find("marker-a81f")
    );
    ensure!(captured.find("marker-b92e").len() >= 2 * families);
    ensure!(captured.find("marker-never").is_empty());
    ensure!(captured.only_tunnels_between(&client.ips(), &server.ips()).is_err());
    Ok(())
}

#[test]
fn services_reach_pods_and_the_outside_is_reachable() -> Result<()> {
    let lab = Lab::start()?;
    lab.namespace("plain", None)?;
    let service = lab.service("plain", "web", "server", &[("http", 80, "http".into())])?;
    let server = lab
        .pod_on(lab.node("node-2")?, "plain", "server")
        .container("main", Role::http(8080))
        .port("http", 8080)
        .start()?;
    let client = lab.pod("plain", "client").start()?;
    server.wait_published()?;
    for ip in service.addresses.all() {
        let url = format!("http://{}/x", std::net::SocketAddr::from((ip, 80)));
        // The endpoint is written after the pod's status.
        signet_lab::eventually("the Service has its endpoint", TIMEOUT, || {
            Ok(client.curl(&url)?.status.success().then_some(()))
        })?;
        client.curl(&url)?.success()?;
    }
    let outside = lab.outside().start_role("outside", &Role::http(80).argv()?)?;
    outside.wait_event("listening", TIMEOUT)?;
    for ip in lab.outside_addresses().all() {
        client.curl(&format!("http://{}/x", std::net::SocketAddr::from((ip, 80))))?.success()?;
    }
    ensure!(lab.node("node-2")?.probe(&server.url(8080, "/healthz"))?.status.success());
    Ok(())
}

#[test]
fn roles_measure_what_they_say() -> Result<()> {
    let lab = Lab::start()?;
    lab.namespace("plain", None)?;
    let server = lab
        .pod_on(lab.node("node-2")?, "plain", "server")
        .container(
            "main",
            Role::TcpServer(TcpServer { listen: vec![any(9000)], tag: 7, ..Default::default() }),
        )
        .container("udp", Role::udp(9001))
        .start()?;
    let client = lab.pod("plain", "client").start()?;
    let to = server.at(9000);

    let hammer = |tag| {
        Role::Hammer(Hammer {
            to: vec![(to, tag)],
            count: 600,
            bind_every: 5,
            ..Default::default()
        })
    };
    let report: HammerReport = client.run(&hammer(7), TIMEOUT)?;
    ensure!(report.misdirected == 0 && report.failures.is_empty(), "{report:?}");
    ensure!(report.tried == 600 && report.answered + report.cut + report.port_in_use == 600);
    let before: TcpServerReport = server.report_of("main")?;
    ensure!(before.misdirected == 0 && before.nonces >= report.answered, "{before:?}");
    // A wrong expectation is noticed on both sides.
    let report: HammerReport = client.run(&hammer(8), TIMEOUT)?;
    ensure!(report.misdirected > 0 && report.answered == 0, "{report:?}");
    let after: TcpServerReport = server.report_of("main")?;
    ensure!(after.misdirected > 0, "{after:?}");

    for direction in [BulkDirection::Up, BulkDirection::Down, BulkDirection::Both] {
        let bulk = Bulk { to, bytes: 3_000_001, direction, ..Default::default() };
        let report: BulkReport = client.run(&Role::Bulk(bulk), TIMEOUT)?;
        ensure!(report.outcome == "complete", "{direction:?}: {report:?}");
        ensure!(report.up_equal != Some(false) && report.down_equal != Some(false), "{report:?}");
    }
    let cut = Bulk {
        to,
        bytes: 50_000_000,
        direction: BulkDirection::Down,
        server_aborts_after: 1_000_000,
        ..Default::default()
    };
    let report: BulkReport = client.run(&Role::Bulk(cut), TIMEOUT)?;
    ensure!(report.outcome == "read:ECONNRESET", "{report:?}");

    for connected in [false, true] {
        let role = UdpClient { to: server.at(9001), connected, count: 3, ..Default::default() };
        let report: UdpReport = client.run(&Role::UdpClient(role), TIMEOUT)?;
        ensure!(report.answered == 3 && report.strangers.is_empty(), "{report:?}");
    }
    let refused: DialReport = client.run(&Role::dial(server.at(9999), "x"), TIMEOUT)?;
    ensure!(refused.outcome == "connect:ECONNREFUSED" && refused.refused(), "{refused:?}");
    Ok(())
}

#[test]
fn cgroups_as_both_drivers_name_them() -> Result<()> {
    for driver in [CgroupDriver::Cgroupfs, CgroupDriver::Systemd] {
        let lab = Lab::with(LabOptions { nodes: 1, driver, ..Default::default() })?;
        lab.namespace("plain", None)?;
        for (name, qos) in [("a", Qos::Guaranteed), ("b", Qos::Burstable), ("c", Qos::BestEffort)] {
            let pod = lab.pod("plain", name).qos(qos).start()?;
            let uid = pod.uid().to_owned();
            let path = pod.cgroup().display().to_string();
            ensure!(path.contains(&uid) || path.contains(&uid.replace('-', "_")), "{path}");
            ensure!(pod.cgroup().starts_with(lab.nodes()[0].workloads()));
            // Two containers: pause and main, each with its process.
            let containers: Vec<_> = std::fs::read_dir(pod.cgroup())?
                .flatten()
                .filter(|e| e.path().is_dir())
                .map(|e| cgroup::processes(&e.path()).len())
                .collect();
            ensure!(containers == [1, 1], "{containers:?}");
        }
    }
    Ok(())
}

#[test]
fn the_api_learns_of_an_address_late_and_init_containers_run_before() -> Result<()> {
    let lab = Lab::with(LabOptions { nodes: 1, ..Default::default() })?;
    lab.namespace("plain", None)?;
    let pod = lab
        .pod("plain", "p")
        .init_container("init", Role::dial("127.0.0.1:9".parse()?, "x"))
        .container("main", Role::tcp(9000))
        .start()?;
    let printed = pod.printed("init")?;
    ensure!(printed.iter().any(|v| v["outcome"] == "connect:ECONNREFUSED"), "{printed:?}");
    let status = || lab.cluster().get(&pod.key()).map(|object| object["status"].clone());
    ensure!(status().is_some_and(|s| s["podIP"].is_null() && s["phase"] == "Pending"));
    pod.wait_published()?;
    ensure!(status().is_some_and(|s| s["podIP"] == pod.ip().to_string()));
    let file = lab.cluster().path().join("pod.plain.p.yaml");
    ensure!(file.exists());
    pod.remove()?;
    ensure!(!file.exists() && !pod.cgroup().exists() && !pod.netns().exists());
    Ok(())
}

#[test]
fn manifests_start_pods() -> Result<()> {
    let lab = Lab::start()?;
    let pods = lab.apply_yaml(
        r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {signet.dev/mode: "off"}}
---
apiVersion: v1
kind: Service
metadata: {name: payments, namespace: shop}
spec:
  selector: {app: payments}
  ports: [{port: 80, targetPort: http}]
---
apiVersion: v1
kind: Pod
metadata: {name: payments, namespace: shop, labels: {app: payments}}
spec:
  serviceAccountName: payments
  nodeName: node-2
  containers:
  - name: main
    image: signet-lab
    args: [http-server, --listen, "[::]:8080", --name, payments]
    ports: [{name: http, containerPort: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: frontend, namespace: shop}
spec:
  nodeName: node-1
  containers:
  - {name: main, image: busybox, command: [sleep, infinity]}
"#,
    )?;
    let [payments, frontend] = &pods[..] else { anyhow::bail!("{} pods", pods.len()) };
    payments.wait_published()?;
    let vip =
        lab.cluster().get(&signet_lab::cluster_dir::ObjectKey::new("Service", "shop", "payments"));
    let vip = vip.and_then(|s| s["spec"]["clusterIP"].as_str().map(str::to_owned));
    let vip: std::net::IpAddr = vip.unwrap_or_default().parse()?;
    let answer = frontend
        .curl(&format!("http://{}/hi", std::net::SocketAddr::from((vip, 80))))?
        .success()?;
    ensure!(answer.contains(r#""server":"payments""#), "{answer}");
    Ok(())
}

/// Everything of a lab's that outlives it: nothing may.
fn leftovers_of(id: &str) -> Vec<String> {
    let mut found = netns::named_with_prefix(id);
    let cgroups = cgroup::mount_point().map(|root| root.join(id));
    found.extend(cgroups.into_iter().filter(|p| p.exists()).map(|p| p.display().to_string()));
    let directory = leftovers::base_directory().join(id);
    if directory.exists() {
        found.push(directory.display().to_string());
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    found.extend(mounts.lines().filter(|l| l.contains(id)).map(str::to_owned));
    found
}

#[test]
fn nothing_stays_even_after_a_panic() -> Result<()> {
    let seen = std::sync::Mutex::new(String::new());
    let outcome = std::panic::catch_unwind(|| {
        let lab = Lab::start().unwrap();
        *seen.lock().unwrap() = lab.id().as_str().to_owned();
        lab.namespace("plain", None).unwrap();
        let _pod = lab.pod("plain", "p").container("main", Role::http(80)).start().unwrap();
        assert!(!leftovers_of(lab.id().as_str()).is_empty());
        panic!("on purpose");
    });
    ensure!(outcome.is_err());
    let id = seen.lock().map(|id| id.clone()).unwrap_or_default();
    let left = leftovers_of(&id);
    ensure!(!id.is_empty() && left.is_empty(), "{left:?}");
    Ok(())
}

#[test]
fn parts_of_a_dead_run_are_swept_and_those_of_a_living_one_are_not() -> Result<()> {
    let living = Lab::with(LabOptions { nodes: 1, ..Default::default() })?;
    // A lab whose maker cannot be alive: pid 1 with another start time.
    let dead = "signet-lab-1-999999999-0";
    let directory = leftovers::base_directory().join(dead);
    std::fs::create_dir_all(directory.join("logs"))?;
    // Until it is removed this keeps the sweeps of labs that start meanwhile away.
    std::fs::write(directory.join("keep"), "")?;
    netns::create(&format!("{dead}-switch"))?;
    cgroup::create(&cgroup::mount_point()?.join(dead).join("node-1/kubepods"))?;
    leftovers::sweep(false)?;
    ensure!(leftovers_of(dead).len() >= 3, "{:?}", leftovers_of(dead));
    std::fs::remove_file(directory.join("keep"))?;
    leftovers::sweep(false)?;
    ensure!(leftovers_of(dead).is_empty(), "{:?}", leftovers_of(dead));
    ensure!(Path::new(living.directory()).exists());
    ensure!(!leftovers_of(living.id().as_str()).is_empty());
    Ok(())
}
