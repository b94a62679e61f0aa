//! A process that dials from its first microsecond on, as init containers do.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;

use super::{dial, emit, reports::FirstMomentReport, roles::FirstMoment};

pub(super) fn play(role: &FirstMoment) -> Result<()> {
    let begin = Instant::now();
    let mut report = FirstMomentReport::default();
    let limit = Duration::from_millis(role.for_ms);
    let step = limit.min(Duration::from_secs(1));
    report.first_dial_us = begin.elapsed().as_micros() as u64;
    while begin.elapsed() < limit {
        let outcome = dial::connect(role.to, step)
            .and_then(|mut stream| dial::hello(&mut stream, &role.text, step));
        let outcome = match outcome {
            Ok(_) => {
                report.answered_us.get_or_insert(begin.elapsed().as_micros() as u64);
                "answered".into()
            }
            Err(outcome) => outcome,
        };
        if report.outcomes.is_empty() {
            report.first_outcome.clone_from(&outcome);
        }
        *report.outcomes.entry(outcome).or_default() += 1;
        if role.until_answered && report.answered_us.is_some() {
            break;
        }
        thread::sleep(Duration::from_millis(role.interval_ms));
    }
    emit("report", &report);
    Ok(())
}
