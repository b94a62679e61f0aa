//! One of the targets under libFuzzer: `SIGNET_FUZZ_TARGET` names it.

#![no_main]

use std::{fs, path::Path, sync::OnceLock};

use libfuzzer_sys::fuzz_target;
use signet_fuzz::{CORPUS_VARIABLE, TARGET_VARIABLE, Target, target};

fn chosen() -> &'static Target {
    static TARGET: OnceLock<&Target> = OnceLock::new();
    TARGET.get_or_init(|| {
        let name = std::env::var(TARGET_VARIABLE).unwrap_or_default();
        target(&name).unwrap_or_else(|| panic!("{TARGET_VARIABLE}={name}: no such target"))
    })
}

/// Before libFuzzer reads the corpus.
fn sow() {
    if let Some(directory) = std::env::var_os(CORPUS_VARIABLE) {
        for (i, seed) in chosen().seeds.iter().enumerate() {
            let path = Path::new(&directory).join(format!("seed-{i}"));
            fs::write(&path, seed).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        }
    }
}

fuzz_target!(
    init: sow(),
    |data: &[u8]| {
        (chosen().run)(data);
    }
);
