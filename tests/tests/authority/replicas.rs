//! Replicas that share a store.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, File},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    process::Command,
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use signet::{
    api_server::ApiServer as Client,
    authority::store::{SecretStore, open_or_create},
    config::authority::ObjectPath,
    spiffe::TrustDomain,
};
use signet_lab::{
    api_server::ApiServer,
    authority::{self, Authority},
    eventually,
};

use crate::client::{Call, channel, populate, replica};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn three_that_start_at_once_on_an_empty_store_agree_a_hundred_times() -> Result<()> {
    let api = ApiServer::start()?;
    let domain = TrustDomain::parse("cluster.local")?;
    let kubeconfig = api.kubeconfig();
    let mut conflicts = 0;
    for round in 0..100 {
        let name = ObjectPath { namespace: "signet-system".into(), name: format!("root-{round}") };
        let start = Arc::new(tokio::sync::Barrier::new(3));
        let replicas: Vec<_> = (0..3)
            .map(|_| {
                let (name, start) = (name.clone(), start.clone());
                let (kubeconfig, domain) = (kubeconfig.clone(), domain.clone());
                tokio::spawn(async move {
                    let client = Client::connect(Some(&kubeconfig)).await?;
                    let store = SecretStore::new(client, name);
                    start.wait().await;
                    let now = jiff::Timestamp::now();
                    let (state, _) = open_or_create(&store, &domain, false, now).await?;
                    anyhow::Ok((state.signing().to_owned(), state.certificates()?))
                })
            })
            .collect();
        let mut roots = BTreeSet::new();
        for replica in replicas {
            let (signing, certificates) = replica.await??;
            ensure!(certificates.len() == 1);
            roots.insert(signing);
        }
        ensure!(roots.len() == 1, "round {round}: {roots:?}");
        conflicts = api.requests().get("POST secrets").copied().unwrap_or_default() - round - 1;
    }
    // The control: they did race. Without it the test would show nothing.
    ensure!(conflicts > 0, "no replica ever lost a race");
    Ok(())
}

/// Stores on which three processes start at once.
const RACES: usize = 100;

/// Starts three, lets them go on when `all_wait` returns, and holds what each made of the store
/// against the others.
fn race(api: &ApiServer, flags: &[&str], all_wait: impl FnOnce() -> Result<()>) -> Result<String> {
    const NAMES: [&str; 3] = ["one", "two", "three"];
    let replicas = thread::scope(|scope| {
        let starting = NAMES.map(|name| scope.spawn(move || replica(api, name, flags)));
        all_wait()?;
        let started = starting.map(|thread| thread.join().ok().context("a panic")?);
        started.into_iter().collect::<Result<Vec<_>>>()
    })?;
    let made = |replica: &Authority| {
        replica.lines().iter().filter(|line| line["message"] == "new root made").count()
    };
    let made: Vec<_> = replicas.iter().map(made).collect();
    ensure!(made.iter().sum::<usize>() == 1, "each made so many roots: {made:?}");
    let bundle = |name: &str| fs::read_to_string(api.directory().join(format!("{name}.pem")));
    let bundles = NAMES.iter().map(|name| bundle(name)).collect::<Result<BTreeSet<_>, _>>()?;
    let one = bundles.first().filter(|_| bundles.len() == 1).context("different roots")?;
    ensure!(one.matches("BEGIN CERTIFICATE").count() == 1, "{one}");
    Ok(one.clone())
}

#[test]
fn three_processes_that_start_at_once_on_an_empty_secret_agree() -> Result<()> {
    let api = ApiServer::start()?;
    populate(&api)?;
    // Each has seen that there is none, and writes, before anyone's is taken.
    api.gather("POST secrets", 3);
    let mut roots = BTreeSet::new();
    for round in 1..=RACES {
        roots.insert(race(&api, &[], || Ok(())).with_context(|| format!("round {round}"))?);
        let wrote = api.requests().get("POST secrets").copied().unwrap_or_default();
        ensure!(wrote == 3 * round && roots.len() == round, "round {round}: {wrote} writes");
        api.delete("secrets", "signet-system", "root")?;
    }
    Ok(())
}

#[test]
fn three_processes_that_start_at_once_on_an_empty_directory_agree() -> Result<()> {
    let api = ApiServer::start()?;
    populate(&api)?;
    let mut roots = BTreeSet::new();
    for round in 1..=RACES {
        let dir = api.directory().join(format!("store-{round}"));
        DirBuilder::new().mode(0o700).create(&dir)?;
        // Who has the lock is the first to write: nobody, until all three want to.
        let lock = File::create(dir.join(".lock"))?;
        lock.lock()?;
        let waiters = format!(":{} ", lock.metadata()?.ino());
        let flags = ["--store-dir", &dir.display().to_string()];
        let root = race(&api, &flags, || {
            eventually("three wait for the lock", Duration::from_secs(30), || {
                let locks = fs::read_to_string("/proc/locks")?;
                let waiting = |line: &&str| line.contains("->") && line.contains(&waiters);
                Ok((locks.lines().filter(waiting).count() == 3).then_some(()))
            })?;
            Ok(lock.unlock()?)
        });
        roots.insert(root.with_context(|| format!("round {round}"))?);
        ensure!(roots.len() == round, "round {round}: the root of another store");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_of_one_replica_is_good_at_the_others() -> Result<()> {
    let api = ApiServer::start()?;
    populate(&api)?;
    let replicas =
        [replica(&api, "one", &[])?, replica(&api, "two", &[])?, replica(&api, "three", &[])?];
    let token = api.token(
        "signet-system",
        "signet-agent",
        "signet-authority",
        Some("agent-node-1"),
        std::time::Duration::from_secs(600),
    )?;
    let mut intermediates = BTreeSet::new();
    let mut roots = BTreeSet::new();
    for replica in &replicas {
        // Each is reached by the bundle that another one wrote.
        let channel = channel(replica, &api.directory().join("two.pem")).await?;
        let chain = Call::good(&token).make(&channel).await?;
        intermediates.insert(chain[1].clone());
        roots.insert(chain[2].clone());
    }
    ensure!((intermediates.len(), roots.len()) == (3, 1), "an intermediate each, one root");
    Ok(())
}

#[test]
fn a_rotation_in_a_secret_waits_for_ready_nodes_and_names_them() -> Result<()> {
    let api = ApiServer::start()?;
    populate(&api)?;
    // A node that is not ready is not waited for.
    api.apply(serde_json::json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-3"},
        "status": {"conditions": [{"type": "Ready", "status": "Unknown"}]},
    }))?;
    let timing = ["--refresh-hint", "1s", "--svid-ttl", "10s", "--max-ttl", "10s"];
    let _one = replica(&api, "one", &timing)?;
    let _two = replica(&api, "two", &timing)?;
    let kubeconfig = api.kubeconfig().display().to_string();
    let rotate = |further: &[&str]| {
        let mut arguments = vec!["rotate-root", "--kubeconfig", &kubeconfig];
        arguments.extend(["--store-secret", "signet-system/root"]);
        arguments.extend(timing);
        arguments.extend(further);
        authority::command(&arguments)
    };
    let waiting = rotate(&["--timeout", "3s"])?;
    ensure!(
        waiting.code() == 1
            && waiting.stderr.contains("node-1, node-2")
            && !waiting.stderr.contains("node-3")
            && waiting.stderr.contains("--exclude-node"),
        "{} {}",
        waiting.stdout,
        waiting.stderr
    );
    let bundle = |name: &str| fs::read_to_string(api.directory().join(format!("{name}.pem")));
    let roots = |name: &str| bundle(name).map(|text| text.matches("BEGIN CERTIFICATE").count());
    eventually("both replicas publish both roots", Duration::from_secs(10), || {
        Ok((roots("one")? == 2 && roots("two")? == 2).then_some(()))
    })?;
    let done =
        rotate(&["--timeout", "60s", "--exclude-node", "node-1", "--exclude-node", "node-2"])?;
    ensure!(
        done.code() == 0 && done.stdout.contains("signing:"),
        "{} {}",
        done.stdout,
        done.stderr
    );
    eventually("both replicas publish the new root alone", Duration::from_secs(10), || {
        Ok((roots("one")? == 1 && bundle("one")? == bundle("two")?).then_some(()))
    })?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_provided_authority_signs_and_is_not_rotated_here() -> Result<()> {
    let api = ApiServer::start()?;
    populate(&api)?;
    let dir = tempfile::tempdir()?;
    let run = |arguments: &[&str]| {
        let output = Command::new("openssl").args(arguments).current_dir(dir.path()).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        anyhow::Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    // As Istio's guide makes them: an RSA root, and an intermediate that may have one below it.
    run(&[
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "30",
        "-subj",
        "/O=Org/CN=Root",
        "-keyout",
        "root-key.pem",
        "-out",
        "root-cert.pem",
    ])?;
    run(&[
        "req",
        "-new",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-subj",
        "/O=Org/CN=Intermediate",
        "-keyout",
        "ca-key.pem",
        "-out",
        "ca.csr",
    ])?;
    fs::write(
        dir.path().join("ext"),
        "basicConstraints=critical,CA:TRUE,pathlen:1\nkeyUsage=critical,keyCertSign\n\
         subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n",
    )?;
    run(&[
        "x509",
        "-req",
        "-in",
        "ca.csr",
        "-CA",
        "root-cert.pem",
        "-CAkey",
        "root-key.pem",
        "-days",
        "20",
        "-extfile",
        "ext",
        "-out",
        "ca-cert.pem",
    ])?;
    let chain = |names: [&str; 2]| -> Result<String> {
        Ok(names.map(|n| fs::read_to_string(dir.path().join(n)).unwrap_or_default()).concat())
    };
    fs::write(dir.path().join("cert-chain.pem"), chain(["ca-cert.pem", "root-cert.pem"])?)?;

    let ca_dir = dir.path().display().to_string();
    let replica = replica(&api, "one", &["--ca-dir", &ca_dir])?;
    let channel = channel(&replica, &dir.path().join("root-cert.pem")).await?;
    let token = api.token(
        "signet-system",
        "signet-agent",
        "signet-authority",
        Some("agent-node-1"),
        Duration::from_secs(600),
    )?;
    let answer = Call::good(&token).make(&channel).await?;
    ensure!(answer.len() == 4, "leaf, our own, the provided one, roots: {}", answer.len());
    fs::write(dir.path().join("leaf"), &answer[0])?;
    fs::write(dir.path().join("between"), answer[1..3].concat())?;
    let verified = run(&["verify", "-CAfile", "root-cert.pem", "-untrusted", "between", "leaf"])?;
    ensure!(verified.contains("leaf: OK"), "{verified}");

    let kubeconfig = api.kubeconfig().display().to_string();
    let refused = authority::command(&[
        "rotate-root",
        "--kubeconfig",
        &kubeconfig,
        "--store-secret",
        "signet-system/root",
        "--ca-dir",
        &ca_dir,
    ])?;
    ensure!(refused.code() == 3 && refused.stderr.contains("caDir"), "{}", refused.stderr);

    // A key that is another's is told before anything is served.
    fs::copy(dir.path().join("root-key.pem"), dir.path().join("ca-key.pem"))?;
    let wrong = authority::command(&[
        "--kubeconfig",
        &kubeconfig,
        "--store-secret",
        "signet-system/root",
        "--ca-dir",
        &ca_dir,
        "--listen",
        "127.0.0.1:0",
    ])
    .context("it ends by itself")?;
    ensure!(wrong.code() == 3 && wrong.stderr.contains("does not belong"), "{}", wrong.stderr);
    Ok(())
}
