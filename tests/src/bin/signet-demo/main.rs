//! The demo: two nodes on this machine, real agents, `manifests/examples` as the cluster.
//!
//! `cargo xtask demo` builds and runs it.
#![forbid(unsafe_code)]

mod report;
mod shop;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, Result};
use clap::Parser;

use crate::{report::Report, shop::Shop};

/// Shows Signet at work on two nodes made on this machine.
#[derive(Parser)]
struct Arguments {
    /// Leave everything up at the end, and tell how to look around.
    #[arg(long)]
    keep: bool,
    /// One JSON record an expectation.
    #[arg(long)]
    json: bool,
    /// The directory with the example manifests.
    #[arg(long)]
    examples: PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut report = Report::new(arguments.json);
    match run(&arguments, &mut report) {
        Ok(()) => {}
        // What prevents the demo from going on is an expectation that failed, too.
        Err(error) => report.expect("the demo runs to its end", Err(error)),
    }
    report.close();
    if report.all_met() { ExitCode::SUCCESS } else { ExitCode::from(1) }
}

fn run(arguments: &Arguments, report: &mut Report) -> Result<()> {
    report.scene("Two nodes, a shop, and a namespace that stays outside");
    let shop = Shop::open(&arguments.examples, report)?;
    let played = shop.play(report);
    if let Err(error) = &played {
        eprintln!("{error:#}\n{}", shop.lab.agent_logs(40));
    } else if !report.all_met() {
        eprintln!("{}", shop.lab.agent_logs(40));
    }
    if arguments.keep {
        look_around(shop, report)?;
    }
    played
}

/// Leaves the lab up and tells how to see what is in it.
fn look_around(shop: Shop, report: &Report) -> Result<()> {
    let lab = shop.lab;
    let signet = signet_lab::process::signet_binary()?;
    let worker = signet_lab::process::worker_binary()?;
    let mut lines = vec!["\nThe lab stays up. Look around:".to_owned()];
    let mut line = |what: &str, command: String| lines.push(format!("  # {what}\n  {command}"));
    let sockets: Vec<String> =
        lab.agents().iter().map(|agent| format!("--socket {}", agent.socket().display())).collect();
    let sockets = sockets.join(" ");
    for (what, command) in [
        ("both agents", "status"),
        ("their pods", "endpoints"),
        ("verdicts as they happen", "flows --follow"),
    ] {
        line(what, format!("{} {command} {sockets}", signet.display()));
    }
    if let Some(pod) = lab.pods().iter().find(|pod| pod.name() == "frontend") {
        line(
            "a call as the pod shop/frontend makes it (its cgroup, its network)",
            format!(
                "{} --cgroup {} --netns {} exec -- curl -s {}",
                worker.display(),
                pod.place().cgroup.display(),
                pod.netns().display(),
                shop.checkout.url("/"),
            ),
        );
    }
    line(
        "the cluster, as files: edit a label and watch",
        format!("ls {}", lab.cluster().path().display()),
    );
    line("remove it", format!("{} sweep", worker.display()));
    lab.keep().context("keeping the lab")?;
    report.say(&lines.join("\n"));
    Ok(())
}
