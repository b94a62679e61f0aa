//! HTTP requests at an interval, each on a connection of its own.

use std::{
    io::{Read, Write},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::Result;

use super::{
    dial, emit,
    outcome::failed,
    reports::{Change, LoadReport},
    roles::Load,
    told_to_stop, unix_micros,
};

pub(super) fn play(role: &Load) -> Result<()> {
    let report = Arc::new(Mutex::new(LoadReport::default()));
    let stop = if role.count == 0 { told_to_stop() } else { Arc::new(AtomicBool::new(false)) };
    thread::scope(|scope| {
        for _ in 0..role.parallel.max(1) {
            scope.spawn(|| requests(role, &report, &stop));
        }
    });
    let report = report.lock().unwrap_or_else(PoisonError::into_inner);
    emit("report", &*report);
    Ok(())
}

fn requests(role: &Load, report: &Mutex<LoadReport>, stop: &AtomicBool) {
    let mut done = 0;
    while !stop.load(Ordering::Relaxed) && (role.count == 0 || done < role.count) {
        let outcome = match request(role) {
            Ok(200) => "answered".to_owned(),
            Ok(status) => format!("status:{status}"),
            Err(outcome) => outcome,
        };
        note(report, outcome);
        done += 1;
        thread::sleep(Duration::from_millis(role.interval_ms));
    }
}

fn note(report: &Mutex<LoadReport>, outcome: String) {
    let mut report = report.lock().unwrap_or_else(PoisonError::into_inner);
    *report.outcomes.entry(outcome.clone()).or_default() += 1;
    if report.changes.last().is_none_or(|last| last.outcome != outcome) {
        let change = Change { at: unix_micros(), outcome };
        emit("change", &change);
        report.changes.push(change);
    }
}

/// The status of one request.
fn request(role: &Load) -> Result<u16, String> {
    let mut stream = dial::connect(role.to, Duration::from_millis(role.timeout_ms))?;
    let request =
        format!("GET {} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n", role.path, role.to);
    stream.write_all(request.as_bytes()).map_err(|e| failed("write", &e))?;
    stream.shutdown(std::net::Shutdown::Write).map_err(|e| failed("shutdown", &e))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(|e| failed("read", &e))?;
    if answer.is_empty() {
        return Err("read:EOF".into());
    }
    answer
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .ok_or_else(|| "read:not HTTP".into())
}
