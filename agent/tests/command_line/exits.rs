//! Exit codes as the contract has them, help, completions and man pages.

use std::{
    fs,
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        process::ExitStatusExt,
    },
    process::{Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use super::{Node, allowed, binary, code, golden::hold, inputs, run, stderr, stdout};

/// What a shell shows as `$?`.
fn shown(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().expect("it ended by one or the other"))
}

#[tokio::test(flavor = "multi_thread")]
async fn each_exit_code_means_what_the_contract_says() {
    let node = Node::start(inputs("node-1"));
    let socket = node.socket();
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let broken = file("broken.yaml", "kind: [");
    let namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n";
    let no_policy = file("namespace.yaml", namespace);
    let fault = file("fault.yaml", "apiVersion: signet.dev/v1alpha1\nkind: IdentityPolicy\n");
    let gone = dir.path().join("gone.sock").display().to_string();
    let check = ["policy", "check", "--from", "shop/a", "--to", "shop/gone:1", "-f"];
    for (expected, args, says) in [
        (0, vec!["status", "--socket", &socket], ""),
        (0, vec!["--version"], ""),
        (1, vec!["endpoints", "shop/nobody", "--socket", &socket], "no pod shop/nobody"),
        (1, vec!["policy", "validate", &fault], ""),
        (2, vec!["flows", "--verdict", "maybe", "--socket", &socket], "--verdict"),
        (2, vec!["status", "--socket"], "--socket"),
        (2, vec!["rollout", "check", "shop", "--to", "stricter"], "stricter"),
        (3, vec!["policy", "validate", "/no/such/file"], "/no/such/file"),
        (3, vec!["policy", "diff", "-f", &broken, "--socket", &socket], "broken.yaml"),
        (3, vec!["policy", "diff", "-f", &no_policy, "--socket", &socket], "namespace.yaml:1"),
        (3, [&check[..], &[no_policy.as_str()]].concat(), "shop/gone"),
        (3, vec!["agent", "--node", "n", "--config", &broken], "broken.yaml"),
        (4, vec!["status", "--socket", &gone], "gone.sock"),
        (4, vec!["status", "--socket", &gone, "--socket", &socket], "gone.sock"),
        (4, vec!["endpoints", "--socket", &gone, "--socket", &socket], "gone.sock"),
        (4, vec!["policy", "list", "--socket", &gone, "--socket", &socket], "gone.sock"),
    ] {
        let output = run(&args).await;
        let said = stderr(&output);
        assert_eq!(code(&output), expected, "{args:?}: {said}");
        assert!(said.contains(says), "{args:?}: {said}");
        if expected > 1 {
            // One clear sentence, and usage or a remedy; no trace of the program.
            assert!(said.starts_with("error: ") || said.starts_with("warning: "), "{said}");
            assert!(!said.contains("panicked") && !said.contains("RUST_BACKTRACE"), "{said}");
        }
    }
    // Whoever may not open the socket: root may open everything, unless that is taken from it.
    let admin = std::path::Path::new(&socket).parent().unwrap().to_owned();
    let mode = |mode| fs::set_permissions(&admin, fs::Permissions::from_mode(mode)).unwrap();
    let is_root = fs::metadata("/proc/self").unwrap().uid() == 0;
    let status = || {
        let mut command = binary(&["status", "--socket", &socket]);
        if is_root {
            let program = command.get_program().to_owned();
            command = Command::new("setpriv");
            command.arg("--bounding-set=-dac_override,-dac_read_search").arg(program);
            command.args(["status", "--socket", &socket]);
        }
        command.output().unwrap()
    };
    let control = tokio::task::block_in_place(status);
    assert_eq!(code(&control), 0, "{}", stderr(&control));
    mode(0o000);
    let output = tokio::task::block_in_place(status);
    mode(0o700);
    assert_eq!(code(&output), 5, "{}", stderr(&output));
    assert!(stderr(&output).contains("the admin socket is for root only"), "{}", stderr(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_ends_what_follows() {
    let node = Node::start(inputs("node-1"));
    node.record([allowed()]).await;
    let socket = node.socket();
    tokio::task::block_in_place(|| {
        for args in [
            &["flows", "-f", "--last", "1"][..],
            &["top", "--interval", "1", "-o", "json"],
            &["ui"],
        ] {
            for (signal, expected) in [("-INT", 130), ("-TERM", 143)] {
                let mut child = binary(&[args, &["--socket", &socket]].concat())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::null())
                    .spawn()
                    .unwrap();
                // It runs once it has said something.
                let mut first = [0];
                std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut first).unwrap();
                let pid = child.id().to_string();
                assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
                let deadline = Instant::now() + Duration::from_secs(20);
                let status = loop {
                    if let Some(status) = child.try_wait().unwrap() {
                        break status;
                    }
                    if Instant::now() > deadline {
                        child.kill().unwrap();
                        panic!("{args:?} goes on after {signal}");
                    }
                    std::thread::sleep(Duration::from_millis(20));
                };
                assert_eq!(shown(status), expected, "{args:?} {signal}");
            }
        }
    });
}

/// Every command, by its man page's name: `signet-policy-check`.
fn pages() -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let output = binary(&["man", dir.path().to_str().unwrap()]).output().unwrap();
    assert_eq!(code(&output), 0, "{output:?}");
    let name = |entry: std::io::Result<fs::DirEntry>| {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(".TH ") && text.contains(".SH NAME"), "{}", path.display());
        path.file_stem().unwrap().to_str().unwrap().to_owned()
    };
    let mut pages: Vec<String> = fs::read_dir(dir.path()).unwrap().map(name).collect();
    pages.sort();
    pages
}

#[test]
fn commands_and_flags_are_those_that_are_written_down() {
    let mut text = String::new();
    for page in pages() {
        // Commands whose own names have a dash.
        let dashed = ["support-bundle", "rotate-root"];
        let name =
            dashed.iter().fold(page.clone(), |p, name| p.replace(name, &name.replace('-', "_")));
        let words: Vec<String> = name.split('-').skip(1).map(|w| w.replace('_', "-")).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let output = binary(&[&words[..], &["--help"]].concat()).output().unwrap();
        assert_eq!(code(&output), 0, "{page}: {output:?}");
        let help = stdout(&output);
        let usage = help.lines().find(|line| line.contains("Usage: ")).unwrap_or_default();
        text.push_str(&format!("{}\n", usage.trim().trim_start_matches("Usage: ")));
        for line in help.lines().map(str::trim_start) {
            // `-o, --output <form>`, without what it does.
            if line.starts_with("--") || (line.starts_with('-') && line.contains(", --")) {
                let flag = line.split("  ").next().unwrap_or(line);
                text.push_str(&format!("    {flag}\n"));
            }
        }
    }
    hold("flags.txt", &text);
}

#[test]
fn a_shell_completes_commands_flags_and_values() {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("signet.bash");
    fs::write(&script, binary(&["completion", "bash"]).output().unwrap().stdout).unwrap();
    let completed = |words: &[&str]| -> Vec<String> {
        // As bash calls it: the command, the word, the one before it.
        let asking = r#"source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1));
            _signet signet "${@: -1}" "${@: -2:1}"; printf '%s\n' "${COMPREPLY[@]}""#;
        let output = Command::new("bash").args(["-c", asking]).arg(&script).args(words).output();
        let output = output.unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        stdout(&output).lines().map(str::to_owned).collect()
    };
    assert_eq!(completed(&["signet", "flo"]), ["flows"]);
    assert_eq!(completed(&["signet", "policy", "val"]), ["validate"]);
    assert_eq!(completed(&["signet", "flows", "--aggr"]), ["--aggregate"]);
    let forms = completed(&["signet", "flows", "-o", ""]);
    assert_eq!(forms, ["compact", "table", "wide", "json", "jsonpb"]);
    assert_eq!(completed(&["signet", "rollout", "check", "--to", "s"]), ["strict"]);
}
