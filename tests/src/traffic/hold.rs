//! Connections that stay open, echo a byte now and then, and tell when they end.

use std::{
    io::{Read, Write},
    sync::{
        Barrier, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use serde_json::json;

use super::{
    dial, echo, emit,
    outcome::failed,
    reports::{Closed, HoldReport},
    roles::Hold,
    told_to_stop, unix_micros,
};

pub(super) fn play(role: &Hold) -> Result<()> {
    let stop = told_to_stop();
    let report = Mutex::new(HoldReport::default());
    // All are open before the first is told so.
    let all_open = Barrier::new(role.count + 1);
    thread::scope(|scope| -> Result<()> {
        for index in 0..role.count {
            let (report, stop, all_open) = (&report, &stop, &all_open);
            thread::Builder::new()
                .stack_size(256 << 10)
                .spawn_scoped(scope, move || {
                    let closed = hold(role, index, report, stop, all_open);
                    emit("closed", &closed);
                    report.lock().unwrap_or_else(PoisonError::into_inner).closed.push(closed);
                })
                .context("no thread for a connection")?;
        }
        all_open.wait();
        let opened = report.lock().unwrap_or_else(PoisonError::into_inner).opened;
        emit("open", &json!({"count": opened}));
        Ok(())
    })?;
    emit("report", &*report.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(())
}

fn hold(
    role: &Hold,
    index: usize,
    report: &Mutex<HoldReport>,
    stop: &AtomicBool,
    all_open: &Barrier,
) -> Closed {
    let mut echoed = 0;
    let opened =
        dial::connect(role.to, Duration::from_millis(role.timeout_ms)).and_then(|mut stream| {
            // One echo proves that the server was reached, not only a proxy before it.
            stream.write_all(&[echo::ECHO, b'.']).map_err(|e| failed("write", &e))?;
            stream.read_exact(&mut [0]).map_err(|e| failed("read", &e))?;
            Ok(stream)
        });
    if opened.is_ok() {
        report.lock().unwrap_or_else(PoisonError::into_inner).opened += 1;
    }
    all_open.wait();
    let outcome = opened.and_then(|mut stream| {
        while !stop.load(Ordering::Relaxed) {
            stream.write_all(b".").map_err(|e| failed("write", &e))?;
            stream.read_exact(&mut [0]).map_err(|e| failed("read", &e))?;
            echoed += 1;
            thread::sleep(Duration::from_millis(role.interval_ms));
        }
        Ok(())
    });
    let outcome = outcome.err().unwrap_or_else(|| "told".into());
    Closed { index, at: unix_micros(), outcome, echoed }
}
