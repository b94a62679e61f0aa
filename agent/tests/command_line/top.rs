//! `signet top`: rates, denials and durations by identity; printed, and on a terminal.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use serde_json::Value;
use signet::flow::FlowRecord;
use uuid::Uuid;

use super::{Node, allowed, as_source, code, denied, ended, inputs, run, stderr, stdout};

fn new(record: FlowRecord) -> FlowRecord {
    FlowRecord { time: Timestamp::now(), uuid: Uuid::new_v4(), ..record }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_turn_is_printed_as_a_table() {
    let node = Node::start(inputs("node-2"));
    node.record([allowed(), denied(), denied(), ended()]).await;
    let args = ["top", "--once", "--interval", "1", "--sort", "name", "--socket", &node.socket()];
    let output = run(&args).await;
    let text = stdout(&output);
    let (time, rest) = text.split_once(' ').unwrap();
    assert!(time.len() == 8 && time.matches(':').count() == 2, "{text}");
    // What happened before is in the history only.
    assert_eq!(
        rest,
        " 1 node  3 identities  0 flows/s  0 denied/s\n\
         IDENTITY       OUT/S  IN/S  DENIED/S  DENIED  AUDIT/S  P50  P99  REASON\n\
         shop/frontend  0      0     0         0       0        -    -    -\n\
         shop/intruder  0      0     0         2       0        -    -    policy_no_match\n\
         shop/payments  0      0     0         2       0        -    -    policy_no_match\n"
    );
    assert_eq!((stderr(&output), code(&output)), (String::new(), 0));
    // An agent that has seen nothing.
    let empty = Node::start(inputs("node-3"));
    let args = ["top", "--once", "--interval", "1", "--socket", &empty.socket()];
    let output = run(&args).await;
    let text = stdout(&output);
    assert!(
        text.contains(" 1 node  0 identities  0 flows/s  0 denied/s\nIDENTITY  OUT/S"),
        "{text}"
    );
    let output = run(&[&args[..], &["-o", "json"]].concat()).await;
    assert_eq!((stdout(&output), code(&output)), (String::new(), 0));
    let output = run(&["top", "--interval", "0"]).await;
    assert_eq!(code(&output), 2);
    assert!(stderr(&output).contains("--interval"), "{}", stderr(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn live_rates_are_json_lines_and_both_ends_reports_count_once() {
    let (client, server) = (Node::start(inputs("node-1")), Node::start(inputs("node-2")));
    let (first, second) = (client.socket(), server.socket());
    let args = ["top", "-o", "json", "--interval", "1", "--socket", &first, "--socket", &second];
    let mut child = super::binary(&args).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let reading = tokio::task::spawn_blocking(move || {
        // The rows of one turn, which may come in any order.
        let (mut turn, mut frontend, mut intruder) = (Value::Null, None, None);
        let rows = loop {
            let line = lines.next().expect("it goes on").unwrap();
            let row: Value = serde_json::from_str(&line).unwrap();
            if row["time"] != turn {
                (turn, frontend, intruder) = (row["time"].clone(), None, None);
            }
            let several = |key: &str| row[key].as_f64().is_some_and(|n| n >= 4.0);
            match row["identity"].as_str().unwrap() {
                "shop/frontend" if several("outPerSecond") && several("p50Seconds") => {
                    frontend = Some(row);
                }
                "shop/intruder" if several("deniedPerSecond") => intruder = Some(row),
                _ => {}
            }
            if let (Some(frontend), Some(intruder)) = (&frontend, &intruder) {
                break (Value::clone(frontend), Value::clone(intruder));
            }
        };
        child.kill().unwrap();
        child.wait().unwrap();
        rows
    });
    let deadline = Instant::now() + Duration::from_secs(60);
    while !reading.is_finished() {
        assert!(Instant::now() < deadline, "it shows no rates");
        let flow = new(allowed());
        client.record([as_source(flow.clone())]).await;
        server.record([flow, new(denied()), new(ended())]).await;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let (frontend, intruder) = reading.await.unwrap();
    assert_eq!(frontend["schema"], "signet.dev/top/v1");
    assert_eq!(frontend["isPartial"], false);
    assert_eq!(frontend["p50Seconds"], 4.802);
    assert_eq!(frontend["p99Seconds"], 4.802);
    assert_eq!((&frontend["deniedInAll"], &frontend["reason"]), (&0.into(), &Value::Null));
    assert_eq!(intruder["reason"], "policy_no_match");
    // One of each in a round: were the client's report counted too, there would be twice as many.
    let rate = |row: &Value, key: &str| row[key].as_f64().unwrap();
    let ratio = rate(&frontend, "outPerSecond") / rate(&intruder, "deniedPerSecond");
    assert!((0.5..1.5).contains(&ratio), "{frontend} {intruder}");
    assert_eq!(rate(&intruder, "outPerSecond"), rate(&intruder, "deniedPerSecond"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_missing_is_told() {
    let node = Node::start(inputs("node-2"));
    node.record([allowed()]).await;
    let gone = node.dir.path().join("gone.sock").display().to_string();
    let socket = node.socket();
    let args = ["top", "--once", "--interval", "1", "--socket", &socket, "--socket", &gone];
    let output = run(&args).await;
    assert_eq!(code(&output), 4);
    assert!(stderr(&output).contains("gone.sock"), "{}", stderr(&output));
    assert!(stdout(&output).contains("incomplete: some agents do not answer\n"));
    assert!(stdout(&output).contains("shop/frontend"));
    let output = run(&[&args[..], &["-o", "json"]].concat()).await;
    let row: Value = serde_json::from_str(stdout(&output).lines().next().unwrap()).unwrap();
    assert_eq!((code(&output), &row["isPartial"]), (4, &true.into()));
}

/// A terminal of its own.
struct Tmux {
    dir: tempfile::TempDir,
}

impl Drop for Tmux {
    fn drop(&mut self) {
        let _ = self.command(&["kill-server"]).output();
    }
}

impl Tmux {
    fn start(args: &[&str]) -> Self {
        let tmux = Self { dir: tempfile::tempdir().unwrap() };
        let program = env!("CARGO_BIN_EXE_signet");
        // What it leaves on the terminal is still seen when it has ended.
        let script = r#""$0" "$@"; echo "ended with $?"; exec sleep 600"#;
        let session = ["-f", "/dev/null", "new-session", "-d", "-x", "100", "-y", "12"];
        let mut command = tmux.command(&session);
        let output = command.args(["sh", "-c", script, program]).args(args).output();
        let output = output.expect("tmux: `cargo xtask setup` installs it");
        assert!(output.status.success(), "{}", stderr(&output));
        tmux
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("tmux");
        command.arg("-S").arg(self.dir.path().join("tmux.sock")).args(args);
        command.env_remove("TMUX").env_remove("SIGNET_SOCKET").env("LC_ALL", "C.UTF-8");
        command
    }

    fn press(&self, key: &str) {
        assert!(self.command(&["send-keys", key]).output().unwrap().status.success());
    }

    /// The screen, when it is as it should be.
    fn until(&self, what: &str, holds: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let output = self.command(&["capture-pane", "-p"]).output().unwrap();
            let screen = stdout(&output);
            if holds(&screen) {
                return screen;
            }
            assert!(Instant::now() < deadline, "{what} never comes:\n{screen}{}", stderr(&output));
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Kept for who looks at a run: `target/ui/<name>.txt`.
fn keep(name: &str, screen: &str) {
    let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("../ui");
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join(format!("{name}.txt")), screen).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_terminal_it_is_live_and_obeys_keys() {
    let node = Node::start(inputs("node-2"));
    node.record([allowed(), denied()]).await;
    let socket = node.socket();
    let watching = tokio::task::spawn_blocking(move || {
        let tmux = Tmux::start(&["top", "--interval", "1", "--socket", &socket]);
        let row = |screen: &str, name: &str| -> Vec<String> {
            let line = screen.lines().find(|line| line.starts_with(name)).unwrap_or_default();
            line.split_whitespace().map(String::from).collect()
        };
        let screen = tmux.until("a rate of denials", |screen| {
            let cells = row(screen, "shop/intruder");
            cells.len() == 9 && cells[3].parse::<f64>().is_ok_and(|n| n > 0.0)
        });
        assert!(screen.starts_with("signet top  "), "{screen}");
        assert!(screen.contains("IDENTITY       OUT/S"), "{screen}");
        assert!(screen.trim_end().ends_with("by flows"), "{screen}");
        assert!(!row(&screen, "shop/frontend").is_empty(), "{screen}");
        assert_eq!(row(&screen, "shop/intruder")[8], "policy_no_match");
        tmux.until("a duration", |screen| {
            row(screen, "shop/frontend").get(6).is_some_and(|cell| cell == "4.8s")
        });
        keep("top", &screen);
        tmux.press("d");
        let screen = tmux.until("the denied only", |s| s.trim_end().ends_with("denied only"));
        assert!(row(&screen, "shop/frontend").is_empty(), "{screen}");
        assert!(!row(&screen, "shop/intruder").is_empty(), "{screen}");
        keep("top-denied", &screen);
        // The terminal is as it was, and the shell has it back.
        tmux.press("q");
        let screen = tmux.until("the end", |screen| screen.contains("ended with"));
        assert_eq!(screen.trim(), "ended with 0");

        // So it is when it is told to end.
        let tmux = Tmux::start(&["top", "--interval", "1", "--socket", &socket]);
        tmux.until("the screen", |screen| screen.contains("shop/intruder"));
        let output = tmux.command(&["display-message", "-p", "#{pane_pid}"]).output().unwrap();
        let shell = stdout(&output).trim().to_owned();
        let children = format!("/proc/{shell}/task/{shell}/children");
        let child = fs::read_to_string(children).unwrap();
        let killed = Command::new("kill").args(["-TERM", child.trim()]).status().unwrap();
        assert!(killed.success());
        let screen = tmux.until("the end", |screen| screen.contains("ended with"));
        assert_eq!(screen.trim(), "ended with 143");
    });
    while !watching.is_finished() {
        node.record([new(allowed()), new(denied()), new(ended())]).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    watching.await.unwrap();
}
