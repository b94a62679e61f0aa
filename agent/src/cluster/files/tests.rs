use std::time::Duration;

use signet_ebpf::abi::Mode;

use super::*;
use crate::cluster::{enrolment::FilesBoard, model::ModeOrigin};
use crate::{cluster::enrolment::EnrolmentBoard as _, spiffe::TrustDomain};

struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().to_owned()
    }

    /// Replaces a file as writers should: by rename.
    fn put(&self, name: &str, text: &str) {
        let target = self.path().join(name);
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        let temporary = self.path().join(".tmp");
        fs::write(&temporary, text).unwrap();
        fs::rename(temporary, target).unwrap();
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.path().join(name)).unwrap();
    }
}

fn params() -> SourceParams {
    SourceParams::new(TrustDomain::parse("cluster.local").unwrap())
}

fn open(dir: &Dir) -> (Directory, Arc<World>) {
    Directory::open(dir.path(), params()).unwrap()
}

fn namespace(name: &str, mode: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}\n  labels:\n    \
         signet.dev/mode: {mode}\n---\n"
    )
}

fn pod(uid: &str, name: &str, node: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, uid: {uid}}}\nspec: \
         {{nodeName: {node}, containers: []}}\nstatus: {{phase: Running, podIPs: [{{ip: {ip}}}]}}\n\
         ---\n"
    )
}

fn policy(name: &str, action: &str) -> String {
    format!(
        "apiVersion: signet.dev/v1alpha1\nkind: IdentityPolicy\nmetadata: {{name: {name}, \
         namespace: shop}}\nspec: {{action: {action}, ingress: [{{}}]}}\n---\n"
    )
}

fn subjects(world: &World) -> Vec<String> {
    world.problems.iter().map(|p| format!("{}: {}", p.subject, p.message)).collect()
}

#[test]
fn a_change_is_one_revision_and_no_change_is_none() {
    let dir = Dir::new();
    dir.put("ns.yaml", &namespace("shop", "observe"));
    let (mut directory, first) = open(&dir);
    assert_eq!(first.revision, 1);
    assert!(first.problems.is_empty() && first.synced.pods && first.synced.policies);
    assert!(directory.refresh().is_none());
    // The same content in a new file says nothing new.
    dir.put("ns.yaml", &namespace("shop", "observe"));
    assert!(directory.refresh().is_none());
    dir.put("ns.yaml", &namespace("shop", "strict"));
    let second = directory.refresh().unwrap();
    assert_eq!((second.revision, second.namespaces["shop"].mode), (2, Mode::Strict));
    dir.put("pods.yaml", &pod("u1", "web", "n1", "10.0.0.1"));
    let third = directory.refresh().unwrap();
    assert_eq!(third.revision, 3);
    assert_eq!(third.pod_at("10.0.0.1".parse().unwrap()).unwrap().mode, Mode::Strict);
    dir.remove("pods.yaml");
    let fourth = directory.refresh().unwrap();
    assert!(fourth.pods.is_empty() && fourth.pods_by_ip.is_empty());
}

#[test]
fn a_file_that_breaks_keeps_what_it_said_and_heals() {
    let dir = Dir::new();
    dir.put("ns.yaml", &namespace("shop", "strict"));
    dir.put("policies.yaml", &(policy("a", "Deny") + &policy("b", "Allow")));
    let (mut directory, world) = open(&dir);
    assert_eq!(world.policies.policies.len(), 2);
    for (text, wanted) in [
        ("a: [\n", "not valid YAML: "),
        (
            &*policy("a", "Block"),
            "IdentityPolicy a: spec.action: \"Block\" is not an action; write Allow, Deny or Audit",
        ),
        ("apiVersion: v1\n", "kind: missing; this is not a Kubernetes object"),
    ] {
        // The first document alone would be fine: a file counts whole or not at all.
        dir.put("policies.yaml", &(policy("only", "Deny") + text));
        let broken = directory.refresh().unwrap();
        assert_eq!(broken.policies, world.policies);
        let [problem] = subjects(&broken).try_into().unwrap();
        assert!(problem.contains("policies.yaml:") && problem.contains(wanted), "{problem}");
    }
    dir.put("policies.yaml", &policy("c", "Audit"));
    let healed = directory.refresh().unwrap();
    assert_eq!(healed.policies.policies.len(), 1);
    assert!(healed.problems.is_empty());
    // Removing a broken file removes what it said.
    dir.put("policies.yaml", "a: [\n");
    directory.refresh().unwrap();
    dir.remove("policies.yaml");
    assert!(directory.refresh().unwrap().policies.policies.is_empty());
}

#[test]
fn at_start_bad_input_is_one_error() {
    let cases = [
        ("x.yaml", "a: [\n".to_owned(), "not valid YAML: "),
        (
            "x.yaml",
            namespace("shop", "strikt"),
            "/x.yaml:6: Namespace shop: metadata.labels[signet.dev/mode]: \"strikt\" is not a \
             mode; write off, observe, permissive or strict",
        ),
        (
            "x.yaml",
            policy("p", "Allow").replace("[{}]", "[{from: [{identities: [spiffe://A/b/]}]}]"),
            "/x.yaml:4: IdentityPolicy p: spec.ingress[0].from[0].identities[0]: ",
        ),
        (
            "ranges.yaml",
            "podRange: []\n".to_owned(),
            "/ranges.yaml:1: podRange: unknown field; did you mean podRanges?",
        ),
        (
            "x.yaml",
            namespace("shop", "off") + &namespace("shop", "strict"),
            "/x.yaml:8: Namespace shop: also in x.yaml:1, which stays in force; remove one",
        ),
    ];
    for (name, text, wanted) in cases {
        let dir = Dir::new();
        // Control: without the file it opens.
        open(&dir);
        dir.put(name, &text);
        let error = Directory::open(dir.path(), params()).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
        assert!(error.starts_with(dir.path().to_str().unwrap()), "{error}");
        assert_eq!(error.lines().count(), 1);
    }
    let error = Directory::open("/nonexistent/dir".into(), params()).unwrap_err().to_string();
    assert!(error.starts_with("cluster directory /nonexistent/dir: cannot be read"), "{error}");
    let dir = Dir::new();
    fs::write(dir.path().join("x.yaml"), [0xff, 0xfe, b'a']).unwrap();
    let error = Directory::open(dir.path(), params()).unwrap_err().to_string();
    assert!(error.ends_with("x.yaml: not UTF-8 text; write YAML"), "{error}");
}

#[test]
fn unknown_modes_later_follow_the_rules_of_labels() {
    let dir = Dir::new();
    dir.put("ns.yaml", &namespace("shop", "observe"));
    let (mut directory, _) = open(&dir);
    dir.put("ns.yaml", &(namespace("shop", "strikt") + &namespace("new", "strikt")));
    let world = directory.refresh().unwrap();
    assert_eq!(world.namespaces["shop"].mode, Mode::Observe);
    assert_eq!(world.namespaces["new"].mode, Mode::Strict);
    assert_eq!(
        subjects(&world),
        [
            "namespace new (ns.yaml:8): signet.dev/mode: \"strikt\" is not a mode; write off, \
             observe, permissive or strict",
            "namespace shop (ns.yaml:1): signet.dev/mode: \"strikt\" is not a mode; write off, \
             observe, permissive or strict",
        ]
    );
}

#[test]
fn a_looser_pod_label_is_ignored_and_reported() {
    let dir = Dir::new();
    dir.put("ns.yaml", &namespace("shop", "strict"));
    let loose = pod("u1", "web", "n1", "10.0.0.1")
        .replace("uid: u1", "uid: u1, labels: {signet.dev/mode: off}");
    dir.put("pod.yaml", &loose);
    let (_, world) = open(&dir);
    assert_eq!(world.pods["u1"].mode, Mode::Strict);
    assert_eq!(
        subjects(&world),
        ["pod shop/web (pod.yaml:1): signet.dev/mode: \"off\" is looser than the namespace's \
          \"strict\" and is ignored; label the Namespace signet.dev/allow-pod-override: \"true\" \
          to allow it"]
    );
}

#[test]
fn of_two_files_with_one_object_the_older_stays() {
    let dir = Dir::new();
    dir.put("m.yaml", &namespace("shop", "strict"));
    let (mut directory, _) = open(&dir);
    dir.put("a.yaml", &namespace("shop", "off"));
    let world = directory.refresh().unwrap();
    assert_eq!(world.namespaces["shop"].mode, Mode::Strict);
    let [problem] = subjects(&world).try_into().unwrap();
    assert!(problem.contains("a.yaml:1: Namespace shop: also in m.yaml:1"), "{problem}");
    dir.remove("m.yaml");
    let world = directory.refresh().unwrap();
    assert_eq!(world.namespaces["shop"].mode, Mode::Off);
    assert!(world.problems.is_empty());
}

#[test]
fn the_board_counts_for_pods_of_the_speaking_node_only() {
    let dir = Dir::new();
    dir.put("ns.yaml", &namespace("shop", "strict"));
    let pods = pod("u1", "web", "n1", "10.0.0.1") + &pod("u2", "db", "n2", "10.0.0.2");
    dir.put("pods.yaml", &pods);
    let (mut directory, world) = open(&dir);
    assert!(world.served.is_empty());
    let mut board = FilesBoard::open(&dir.path(), "n1").unwrap();
    let claims = [
        ("u1".into(), "shop/web".into()),
        ("u2".into(), "shop/db".into()),
        ("gone".into(), "shop/x".into()),
    ];
    board.announce(&claims.into(), 1, jiff::Timestamp::now()).unwrap();
    let world = directory.refresh().unwrap();
    assert_eq!(world.served, HashMap::from([("u1".into(), "n1".into())]));
    assert_eq!(
        subjects(&world),
        ["status of node n1: served: claims pod shop/db, which is bound to n2; ignored"]
    );
    // Its own node's word counts although another claims the pod too.
    let mut other = FilesBoard::open(&dir.path(), "n2").unwrap();
    other.announce(&[("u2".into(), "shop/db".into())].into(), 1, jiff::Timestamp::now()).unwrap();
    let world = directory.refresh().unwrap();
    assert_eq!(world.served.len(), 2);
    assert_eq!(world.served["u2"].as_ref(), "n2");
    // Only a newer revision of the writer: nothing new for readers.
    let own = [("u2".into(), "shop/db".into())].into();
    assert!(other.announce(&own, 2, jiff::Timestamp::now()).unwrap());
    assert!(directory.refresh().is_none());
    // Garbage keeps the last word; a file that is gone takes it away.
    dir.put("status/n2.yaml", "node: [\n");
    let world = directory.refresh().unwrap();
    assert_eq!(world.served.len(), 2);
    dir.remove("status/n2.yaml");
    assert_eq!(directory.refresh().unwrap().served.len(), 1);
}

#[test]
fn ranges_come_from_configuration_then_file_then_nodes() {
    let dir = Dir::new();
    let node = "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\nspec: {podCIDRs: [10.1.0.0/24, \
                'fd00:1::/64']}\nstatus: {addresses: [{type: InternalIP, address: 192.0.2.1}, \
                {type: Hostname, address: n1}]}\n";
    dir.put("node.yaml", node);
    let (mut directory, world) = open(&dir);
    assert_eq!(world.ranges.pods.len(), 2);
    assert_eq!(world.nodes["n1"], ["192.0.2.1".parse::<std::net::IpAddr>().unwrap()]);
    dir.put("ranges.yaml", "podRanges: [10.2.0.0/16]\nserviceRanges: [10.96.0.0/12]\n");
    let world = directory.refresh().unwrap();
    assert_eq!(world.ranges.pods, ["10.2.0.0/16".parse().unwrap()]);
    assert_eq!(world.ranges.services, ["10.96.0.0/12".parse().unwrap()]);
    let mut configured = params();
    configured.ranges.pods = vec!["10.3.0.0/16".parse().unwrap()];
    let (_, world) = Directory::open(dir.path(), configured).unwrap();
    assert_eq!(world.ranges.pods, ["10.3.0.0/16".parse().unwrap()]);
    assert_eq!(world.ranges.services.len(), 1);
}

#[test]
fn only_changed_files_are_read_again() {
    let dir = Dir::new();
    let mut read = std::cell::RefCell::new(Vec::new());
    let mut followed = Followeds::new();
    let mut age = 0;
    for name in ["a.yaml", "b.yaml"] {
        dir.put(name, "x");
    }
    let mut pass = || {
        let listed = list(&dir.path()).unwrap();
        update(&mut followed, &dir.path(), listed, &mut age, |name, _| {
            read.borrow_mut().push(name.to_owned());
            Ok(())
        });
        for file in followed.values_mut() {
            // As if a second had gone by.
            file.young = false;
        }
        read.get_mut().drain(..).collect::<Vec<_>>()
    };
    assert_eq!(pass(), ["a.yaml", "b.yaml"]);
    assert!(pass().is_empty());
    dir.put("b.yaml", "x");
    assert_eq!(pass(), ["b.yaml"]);
    fs::write(dir.path().join("a.yaml"), "longer").unwrap();
    assert_eq!(pass(), ["a.yaml"]);
}

#[test]
fn other_directories_and_hidden_files_are_not_followed() {
    let dir = Dir::new();
    dir.put("sub/ns.yaml", "a: [\n");
    dir.put(".hidden.yaml", "a: [\n");
    dir.put("notes.txt", "a: [\n");
    let (_, world) = open(&dir);
    assert!(world.problems.is_empty());
}

/// Waits for a World that satisfies `wanted`, at most five seconds.
async fn wait(receiver: &mut watch::Receiver<Arc<World>>, wanted: impl FnMut(&Arc<World>) -> bool) {
    tokio::time::timeout(Duration::from_secs(5), receiver.wait_for(wanted))
        .await
        .expect("no such World within five seconds")
        .unwrap();
}

#[tokio::test]
async fn changes_are_followed_live() {
    let dir = Dir::new();
    dir.put("ns.yaml", &namespace("shop", "off"));
    let mut worlds = FilesSource::start(dir.path(), params()).unwrap().worlds();
    assert_eq!(worlds.borrow().revision, 1);
    dir.put("ns.yaml", &namespace("shop", "strict"));
    wait(&mut worlds, |w| w.namespaces["shop"].mode == Mode::Strict).await;
    // In place, too.
    fs::write(dir.path().join("ns.yaml"), namespace("shop", "observe")).unwrap();
    wait(&mut worlds, |w| w.namespaces["shop"].mode == Mode::Observe).await;
    // The board's directory appears later.
    dir.put("pods.yaml", &pod("u1", "web", "n1", "10.0.0.1"));
    wait(&mut worlds, |w| w.pods.contains_key("u1")).await;
    let mut board = FilesBoard::open(&dir.path(), "n1").unwrap();
    wait(&mut worlds, |w| w.pods.contains_key("u1")).await;
    board.announce(&[("u1".into(), "shop/web".into())].into(), 1, jiff::Timestamp::now()).unwrap();
    wait(&mut worlds, |w| w.served.contains_key("u1")).await;
    board.announce(&BTreeMap::new(), 2, jiff::Timestamp::now()).unwrap();
    wait(&mut worlds, |w| w.served.is_empty()).await;
    dir.remove("pods.yaml");
    wait(&mut worlds, |w| w.pods.is_empty()).await;
}

#[tokio::test]
async fn a_mounted_config_map_is_followed_through_its_links() {
    let dir = Dir::new();
    dir.put("..v1/ns.yaml", &namespace("shop", "off"));
    dir.put("..v2/ns.yaml", &namespace("shop", "strict"));
    let link = |target: &str, name: &str| {
        let temporary = dir.path().join("..tmp");
        std::os::unix::fs::symlink(target, &temporary).unwrap();
        fs::rename(temporary, dir.path().join(name)).unwrap();
    };
    link("..v1", "..data");
    link("..data/ns.yaml", "ns.yaml");
    let mut worlds = FilesSource::start(dir.path(), params()).unwrap().worlds();
    assert_eq!(worlds.borrow().namespaces["shop"].mode, Mode::Off);
    link("..v2", "..data");
    wait(&mut worlds, |w| w.namespaces["shop"].mode == Mode::Strict).await;
}

#[tokio::test]
async fn a_directory_that_goes_keeps_the_last_world_and_comes_back() {
    let outer = Dir::new();
    outer.put("cluster/ns.yaml", &namespace("shop", "strict"));
    let path = outer.path().join("cluster");
    let mut worlds = FilesSource::start(&path, params()).unwrap().worlds();
    fs::rename(&path, outer.path().join("away")).unwrap();
    // Nothing tells of it until something changes; the World stays.
    wait(&mut worlds, |w| !w.problems.is_empty()).await;
    assert_eq!(worlds.borrow().namespaces["shop"].mode, Mode::Strict);
    outer.put("cluster/ns.yaml", &namespace("shop", "permissive"));
    wait(&mut worlds, |w| w.problems.is_empty() && w.namespaces["shop"].mode == Mode::Permissive)
        .await;
}

#[test]
fn istio_s_objects_are_followed_as_our_own() {
    let dir = Dir::new();
    dir.put("ns.yaml", &(namespace("shop", "permissive") + &pod("u1", "web", "n1", "10.0.0.1")));
    let (mut directory, world) = open(&dir);
    assert!(world.policies.policies.is_empty());
    let object = |kind: &str, spec: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{name: a, namespace: \
             shop}}\nspec: {spec}\n---\n"
        )
    };
    dir.put(
        "istio.yaml",
        &(object("AuthorizationPolicy", "{}")
            + &object("PeerAuthentication", "{mtls: {mode: STRICT}}")
            + &object("RequestAuthentication", "{}")),
    );
    let world = directory.refresh().unwrap();
    assert_eq!(world.policies.policies[0].name.to_string(), "AuthorizationPolicy/shop/a");
    assert_eq!(world.peer_authentications.len(), 1);
    let web = world.pod_at("10.0.0.1".parse().unwrap()).unwrap();
    assert_eq!((web.mode, web.mode_origin), (Mode::Strict, ModeOrigin::PeerAuthentication));
    // A fault keeps what the file said.
    dir.put("istio.yaml", &object("PeerAuthentication", "{mtls: {mode: STRIKT}}"));
    let broken = directory.refresh().unwrap();
    assert_eq!(broken.policies, world.policies);
    let [problem] = subjects(&broken).try_into().unwrap();
    assert!(
        problem.ends_with(
            "PeerAuthentication a: spec.mtls.mode: \"STRIKT\" is not a mode; write UNSET, DISABLE, \
             PERMISSIVE or STRICT"
        ),
        "{problem}"
    );
    dir.remove("istio.yaml");
    let gone = directory.refresh().unwrap();
    assert!(gone.policies.policies.is_empty() && gone.peer_authentications.is_empty());
    assert_eq!(gone.pod_at("10.0.0.1".parse().unwrap()).unwrap().mode, Mode::Permissive);
}

#[test]
fn the_override_of_enforcement_is_followed_and_keeps_its_last_word() {
    let dir = Dir::new();
    dir.put("ns.yaml", &namespace("shop", "strict"));
    // One that nobody can read keeps no agent from starting.
    dir.put(ENFORCEMENT_FILE, "enforcement: maybe\n");
    let (mut directory, world) = open(&dir);
    assert_eq!(world.enforcement, Override::Unreadable);
    let [problem] = subjects(&world).try_into().unwrap();
    assert!(
        problem.contains("enforcement.yaml:1: enforcement: \"maybe\" is not one of"),
        "{problem}"
    );
    dir.put(ENFORCEMENT_FILE, "enforcement: audit\n");
    let world = directory.refresh().unwrap();
    assert_eq!(world.enforcement, Override::Is(Enforcement::Audit));
    assert!(world.problems.is_empty());
    dir.put(ENFORCEMENT_FILE, "enforcement: [\n");
    let broken = directory.refresh().unwrap();
    assert_eq!(broken.enforcement, Override::Is(Enforcement::Audit));
    assert_eq!(broken.problems.len(), 1);
    dir.remove(ENFORCEMENT_FILE);
    assert_eq!(directory.refresh().unwrap().enforcement, Override::Absent);
}
