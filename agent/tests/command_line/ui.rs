//! `signet ui` in a browser: what is seen, with a keyboard, in both colours, at 500 workloads; and
//! who is not let in.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::PathBuf,
    process::{Child, Stdio},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use serde_json::json;
use signet::{
    flow::{FlowRecord, KnownBy, Party, Via},
    spiffe::SpiffeId,
};
use signet_ebpf::abi::{Reason, Verdict};
use uuid::Uuid;

use super::{Node, allowed, binary, browser::Browser, inputs, party};

/// `signet ui`, until it is dropped.
struct Ui {
    child: Child,
    url: String,
}

impl Drop for Ui {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ui {
    fn start(socket: &str) -> Self {
        let mut child = binary(&["ui", "--socket", socket])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut url = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut url).unwrap();
        Self { child, url: url.trim().to_owned() }
    }

    fn origin(&self) -> &str {
        self.url.split("/?").next().unwrap()
    }

    /// Status line and head of the answer to a request with these header lines.
    fn ask(&self, path: &str, headers: &str) -> String {
        let address = self.origin().strip_prefix("http://").unwrap();
        let mut stream = TcpStream::connect(address).unwrap();
        let request = format!("GET {path} HTTP/1.1\r\n{headers}Connection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

fn denied() -> FlowRecord {
    FlowRecord {
        time: Timestamp::now(),
        uuid: Uuid::new_v4(),
        verdict: Verdict::Dropped,
        reason: Reason::PolicyNoMatch,
        source: party("intruder-x2", KnownBy::Mtls, "10.0.1.9:51544"),
        ..allowed()
    }
}

fn now(record: FlowRecord) -> FlowRecord {
    FlowRecord { time: Timestamp::now(), uuid: Uuid::new_v4(), ..record }
}

/// Kept for who looks at a run: `target/ui/<name>.png`.
fn keep(browser: &mut Browser, name: &str) {
    let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("../ui");
    fs::create_dir_all(&directory).unwrap();
    let picture = STANDARD.decode(browser.screenshot()).unwrap();
    assert!(picture.starts_with(b"\x89PNG"));
    fs::write(directory.join(format!("{name}.png")), picture).unwrap();
}

fn colours(browser: &mut Browser, scheme: &str) {
    let features = json!([{"name": "prefers-color-scheme", "value": scheme}]);
    browser.ask("Emulation.setEmulatedMedia", json!({"features": features}));
    browser.until(&format!("document.documentElement.dataset.theme === '{scheme}'"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_shows_who_talks_to_whom_and_why_not() {
    let node = Node::start(inputs("node-2"));
    let clear = FlowRecord {
        via: Via::Plaintext,
        source: Party { identity: None, ..party("legacy-1", KnownBy::Address, "10.0.1.8:40000") },
        ..now(allowed())
    };
    node.record([now(allowed()), now(allowed()), denied(), clear]).await;
    let ui = Ui::start(&node.socket());
    let browser = tokio::task::spawn_blocking({
        let (url, origin) = (ui.url.clone(), ui.origin().to_owned());
        move || {
            let mut browser = Browser::start();
            browser.open(&url);
            browser.until("$('workloads').children.length >= 4");
            assert_eq!(browser.evaluate("location.href"), format!("{origin}/"), "no secret in it");
            let summary = browser.evaluate("$('summary').textContent");
            let summary = summary.as_str().unwrap();
            for part in ["2 flows tunnelled", "1 flows in clear", "1 flows denied"] {
                assert!(summary.contains(part), "{summary}");
            }
            colours(&mut browser, "light");
            keep(&mut browser, "map-light");

            // By keyboard alone: to the workload, to its edge, to the flows and the policy.
            browser.evaluate("$('workloads').focus()");
            browser.until("document.activeElement.id === 'workloads'");
            for _ in 0..8 {
                if browser.evaluate("state.selected") == "shop/intruder" {
                    break;
                }
                browser.press("ArrowDown");
            }
            assert_eq!(browser.evaluate("state.selected"), "shop/intruder");
            browser.until("!$('details').hidden");
            browser.press("Enter");
            browser.until("document.activeElement.closest('#edges')");
            browser.press("Enter");
            browser.until("$('flows').innerText.includes('Decided by')");
            let text = browser.evaluate("$('flows').innerText");
            let text = text.as_str().unwrap();
            assert!(text.contains("DROPPED policy_no_match"), "{text}");
            assert!(text.contains("IdentityPolicy/shop/payments-callers"), "{text}");
            assert!(text.contains("intruder-x2"), "{text}");
            colours(&mut browser, "dark");
            keep(&mut browser, "details-dark");
            browser.press("Escape");
            browser.until("$('details').hidden");

            // The roll-out view says what `signet rollout check` does.
            browser.evaluate("$('tab-map').focus()");
            browser.press("ArrowRight");
            browser.until("!$('rollout').hidden && document.activeElement.id === 'tab-rollout'");
            browser.until("$('namespaces').tBodies[0].rows.length > 0");
            keep(&mut browser, "rollout-dark");
            browser
        }
    })
    .await
    .unwrap();
    // A flow that comes now is seen now.
    node.record([denied()]).await;
    let mut browser = tokio::task::spawn_blocking(move || {
        let mut browser = browser;
        browser.until("$('summary').textContent.includes('2 flows denied')");
        browser
    })
    .await
    .unwrap();
    assert_eq!(browser.complaints, Vec::<String>::new());
    browser.requests.retain(|url| !url.starts_with(ui.origin()));
    assert_eq!(browser.requests, Vec::<String>::new(), "something was asked of somebody else");
}

#[tokio::test(flavor = "multi_thread")]
async fn five_hundred_workloads_do_not_stutter() {
    let node = Node::start(inputs("node-2"));
    let workload = |n: usize| Party {
        pod: Some((format!("team-{}", n % 25).into(), format!("pod-{n}").into())),
        service_account: Some(format!("service-{n}").into()),
        identity: SpiffeId::parse(&format!(
            "spiffe://cluster.local/ns/team-{}/sa/service-{n}",
            n % 25
        ))
        .ok(),
        ..party("x-1", KnownBy::Mtls, "10.0.1.1:40000")
    };
    for n in 0..500 {
        let flow = |step: usize| FlowRecord {
            source: workload(n),
            destination: workload((n + step) % 500),
            verdict: if step == 91 { Verdict::Dropped } else { Verdict::Forwarded },
            via: if step == 13 { Via::Plaintext } else { Via::Mtls },
            ..now(allowed())
        };
        node.record([1, 7, 13, 91].map(flow)).await;
    }
    let ui = Ui::start(&node.socket());
    let url = ui.url.clone();
    tokio::task::spawn_blocking(move || {
        let mut browser = Browser::start();
        browser.open(&url);
        browser.until("state.graph.workloads.length >= 500");
        let edges = browser.evaluate("state.graph.edges.length").as_u64().unwrap();
        assert!(edges >= 2000, "{edges}");
        let mut median = |change: &str| {
            let measured = browser.evaluate(&format!(
                "(async () => {{
                    painting.length = 0;
                    for (let n = 0; n < 60; n++) {{
                        {change};
                        await new Promise(requestAnimationFrame);
                    }}
                    return painting.sort((a, b) => a - b)[Math.floor(painting.length / 2)];
                }})()"
            ));
            measured.as_f64().unwrap()
        };
        let moved = median("state.view.x += 1; state.view.scale *= 1.001; move()");
        let anew = median("repaint()");
        println!(
            "500 workloads, {edges} edges: a frame takes {moved:.1} ms while it is moved, \
             {anew:.1} ms when it is painted anew"
        );
        browser.evaluate("state.view.touched = false; fit()");
        browser.until("!stale");
        keep(&mut browser, "500-workloads");
        // Sixty frames a second, drawn in software, on a machine that may build beside it.
        assert!(moved < 16.7 && anew < 200.0, "{moved} ms, {anew} ms");
        // And it is found and opened by a few keys.
        browser.evaluate("$('search').focus()");
        browser.ask("Input.insertText", json!({"text": "service-499"}));
        browser.until("$('workloads').children.length === 1");
        browser.evaluate("$('workloads').focus()");
        browser.press("ArrowDown");
        browser.until("!$('details').hidden && $('edges').children.length === 8");
        assert_eq!(browser.complaints, Vec::<String>::new());
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_has_the_secret_is_let_in() {
    let node = Node::start(inputs("node-2"));
    let ui = Ui::start(&node.socket());
    tokio::task::spawn_blocking(move || {
        let host = format!("Host: {}\r\n", ui.origin().strip_prefix("http://").unwrap());
        let secret = ui.url.split("token=").nth(1).unwrap().to_owned();
        let cookie = format!("Cookie: signet-ui={secret}\r\n");

        let entered = ui.ask(&format!("/?token={secret}"), &host);
        assert!(entered.starts_with("HTTP/1.1 303"), "{entered}");
        assert!(entered.to_lowercase().contains("httponly; samesite=strict"), "{entered}");
        for path in ["/", "/app.js", "/style.css", "/api/policies"] {
            let answer = ui.ask(path, &format!("{host}{cookie}"));
            assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
            assert!(answer.contains("content-security-policy: default-src 'none'"), "{answer}");
        }
        let wrong = format!("Cookie: signet-ui={}\r\n", "0".repeat(32));
        let elsewhere = "Host: evil.example:80\r\n";
        for (path, headers, why) in [
            ("/", host.clone(), "has a secret in it"),
            ("/api/flows?from=a&to=b", host.clone(), "has a secret in it"),
            ("/?token=0", host.clone(), "has a secret in it"),
            ("/", format!("{host}{wrong}"), "has a secret in it"),
            // A name that was made to point here carries no right, even with the cookie.
            ("/", format!("{elsewhere}{cookie}"), "not the address"),
            (&*format!("/?token={secret}"), elsewhere.to_owned(), "not the address"),
        ] {
            let answer = ui.ask(path, &headers);
            assert!(answer.starts_with("HTTP/1.1 403"), "{path} {headers}: {answer}");
            assert!(answer.contains(why), "{answer}");
        }
    })
    .await
    .unwrap();
}
