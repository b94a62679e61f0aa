//! `signet flows --follow` and `signet top` on a terminal while pods talk: what they show is
//! recorded, as somebody at the terminal sees it.

use std::{cell::Cell, path::PathBuf};

use anyhow::{Context, Result, ensure};
use signet_lab::{process::signet_binary, terminal::Terminal};

use crate::mesh::{Mesh, TCP, TIMEOUT, answered, answered_soon, dial, refused_soon, with_logs};

/// The line of a flow between two pods with a verdict, if it is on the screen whole.
fn line<'a>(screen: &'a str, client: &str, verdict: &str) -> Option<&'a str> {
    let (from, to) = (format!(" {client}:"), " -> shop/payments:".to_owned());
    screen.lines().find(|line| {
        line.contains(&from) && line.contains(&to) && line.contains(&format!(" {verdict} "))
    })
}

/// The cells of an identity's row in `signet top`.
fn row(screen: &str, identity: &str) -> Vec<String> {
    let line = screen.lines().find(|line| line.starts_with(&format!("{identity} ")));
    line.unwrap_or_default().split_whitespace().map(String::from).collect()
}

fn rate(row: &[String], column: usize) -> f64 {
    row.get(column).and_then(|cell| cell.parse().ok()).unwrap_or(0.0)
}

#[test]
fn flows_and_top_are_live_on_a_terminal() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let to = mesh.payments.at(TCP);
        mesh.allow_payments(&["frontend"])?;
        answered_soon(&mesh.frontend, to)?;
        refused_soon(&mesh.intruder, to)?;
        let program: PathBuf = signet_binary()?;
        let socket = |node| anyhow::Ok(mesh.lab.agent(node)?.socket().display().to_string());
        let (one, two) = (socket("node-1")?, socket("node-2")?);
        let asked = ["--socket", &one, "--socket", &two];
        let follow = [&["flows", "--follow"][..], &asked].concat();
        // Wide enough for a line: none is ever cut off.
        let mut flows = Terminal::start(&program, &follow, (250, 30))?;
        let watch = [&["top", "--interval", "1"][..], &asked].concat();
        let mut top = Terminal::start(&program, &watch, (110, 14))?;

        let tries = Cell::new(0u32);
        let traffic = || {
            tries.set(tries.get() + 1);
            answered(&mesh.frontend, to, "is shown")?;
            // Whatever the reason is in the moment of a change.
            ensure!(dial(&mesh.intruder, to, "is denied")?.refused(), "the intruder came in");
            Ok(())
        };
        let screen = flows.until("a denial", TIMEOUT, traffic, |screen| {
            line(screen, "shop/frontend", "FORWARDED").is_some()
                && line(screen, "shop/intruder", "DROPPED policy_no_match").is_some()
        })?;
        let denial = line(&screen, "shop/intruder", "DROPPED policy_no_match").context("a line")?;
        let names = "(shop/intruder,mtls) -> shop/payments:9000 (shop/payments,kernel) tcp mtls \
                     DROPPED policy_no_match IdentityPolicy/shop/payments-callers";
        ensure!(denial.contains(names) && denial.contains(" node-2 in "), "{denial}");
        let passed = line(&screen, "shop/frontend", "FORWARDED").context("a line")?;
        ensure!(passed.contains(" tcp mtls FORWARDED allowed "), "{passed}");
        // On a terminal verdicts have colours: 31 is red, 32 green (ECMA-48, SGR).
        let coloured = flows.screen(true)?;
        for (verdict, colour) in [("DROPPED", "31m"), ("FORWARDED", "32m")] {
            let before = coloured.split(verdict).next().unwrap_or_default();
            let escape = before.rsplit('\u{1b}').next().unwrap_or_default();
            ensure!(before.len() < coloured.len() && escape.ends_with(colour), "{coloured:?}");
        }
        flows.keep("lab-flows-follow")?;
        flows.press("C-c")?;
        flows.until("the end", TIMEOUT, || Ok(()), |screen| screen.contains("ended with 130"))?;

        let screen = top.until("rates", TIMEOUT, traffic, |screen| {
            let (frontend, intruder) = (row(screen, "shop/frontend"), row(screen, "shop/intruder"));
            rate(&frontend, 1) > 0.0
                && rate(&intruder, 3) > 0.0
                && frontend.get(6).is_some_and(|cell| cell != "-")
                && intruder.last().is_some_and(|reason| reason == "policy_no_match")
        })?;
        ensure!(screen.contains("  2 nodes  "), "{screen}");
        // Both came in at the server.
        let payments = row(&screen, "shop/payments");
        ensure!(rate(&payments, 2) > 0.0, "{screen}");
        top.press("d")?;
        let screen = top.until("the denied only", TIMEOUT, traffic, |screen| {
            screen.contains("denied only") && row(screen, "shop/frontend").is_empty()
        })?;
        ensure!(!row(&screen, "shop/intruder").is_empty(), "{screen}");
        let recording = top.keep("lab-top")?;
        top.press("q")?;
        top.until("the end", TIMEOUT, || Ok(()), |screen| screen.contains("ended with 0"))?;

        // What was recorded is what was seen, and the denial is among it.
        let recorded = std::fs::read_to_string(&recording)?;
        ensure!(recorded.matches("=== ").count() >= 2, "one screen only: {recorded}");
        ensure!(recorded.contains("policy_no_match"), "{recorded}");
        println!("{} rounds; the recordings are beside {}", tries.get(), recording.display());
        Ok(())
    })
}
