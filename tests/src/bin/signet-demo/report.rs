//! What the demo tells: scenes and expectations, for people or as NDJSON.

use std::time::Instant;

use anyhow::Result;
use serde_json::json;

/// The demo's voice, and its memory of what failed.
pub struct Report {
    json: bool,
    failed: usize,
    met: usize,
    begin: Instant,
}

impl Report {
    /// `json`: one record an expectation on standard output, everything else on standard error.
    pub fn new(json: bool) -> Self {
        Self { json, failed: 0, met: 0, begin: Instant::now() }
    }

    /// A heading.
    pub fn scene(&self, title: &str) {
        self.say(&format!("\n== {title}"));
    }

    /// A line of the story, or progress.
    pub fn say(&self, text: &str) {
        if self.json {
            eprintln!("{text}");
        } else {
            println!("{text}");
        }
    }

    /// Progress with the time since the beginning.
    pub fn progress(&self, text: &str) {
        self.say(&format!("   [{:5.1} s] {text}", self.begin.elapsed().as_secs_f64()));
    }

    /// Something expected: met with a detail, or failed with an error that says why.
    pub fn expect(&mut self, expectation: &str, outcome: Result<String>) {
        let (ok, detail) = match outcome {
            Ok(detail) => (true, detail),
            Err(error) => (false, format!("{error:#}")),
        };
        if ok {
            self.met += 1;
        } else {
            self.failed += 1;
        }
        if self.json {
            println!("{}", json!({"expectation": expectation, "ok": ok, "detail": detail}));
            return;
        }
        println!(" {}  {expectation}", if ok { "ok  " } else { "FAIL" });
        for line in detail.lines() {
            println!("       {line}");
        }
    }

    /// True when every expectation was met (and there was one).
    pub fn all_met(&self) -> bool {
        self.failed == 0 && self.met > 0
    }

    /// The closing line.
    pub fn close(&self) {
        self.say(&format!(
            "\n{} expectations met, {} failed, {:.0} s",
            self.met,
            self.failed,
            self.begin.elapsed().as_secs_f64()
        ));
    }
}
