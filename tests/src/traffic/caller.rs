//! Calls in turn, one connection each, and a record of every one.

use std::{sync::atomic::Ordering, thread, time::Duration};

use anyhow::{Result, ensure};
use serde_json::json;

use super::{
    dial, emit,
    reports::Call,
    roles::{Caller, Dial},
    told_to_stop, unix_micros,
};

pub(super) fn play(role: &Caller) -> Result<()> {
    ensure!(!role.to.is_empty(), "no destination");
    let stop = told_to_stop();
    let mut calls = 0_u64;
    for to in role.to.iter().cycle() {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let begin = unix_micros();
        let dialled = dial::dial(&Dial {
            to: *to,
            text: role.text.clone(),
            timeout_ms: role.timeout_ms,
            ..Dial::default()
        });
        let call = Call {
            begin,
            end: unix_micros(),
            to: *to,
            outcome: dialled.outcome,
            local: dialled.local,
            tag: dialled.seen.map(|seen| seen.tag),
        };
        emit("call", &call);
        calls += 1;
        thread::sleep(Duration::from_millis(role.interval_ms));
    }
    emit("report", &json!({"calls": calls}));
    Ok(())
}
