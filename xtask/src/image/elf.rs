//! What an ELF binary asks the dynamic linker for: the interpreter and the needed libraries.

use anyhow::Context as _;
use object::{
    Endianness,
    elf::{DT_NEEDED, FileHeader64, PT_INTERP},
    read::elf::{Dyn as _, FileHeader as _, ProgramHeader as _},
};

/// What a binary needs; both empty for a static one.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Needs {
    /// Path of the dynamic linker.
    pub interpreter: Option<String>,
    /// Names of libraries (`DT_NEEDED`).
    pub libraries: Vec<String>,
}

/// Reads them.
pub fn needs(bytes: &[u8]) -> anyhow::Result<Needs> {
    let header = FileHeader64::<Endianness>::parse(bytes).context("no 64-bit ELF file")?;
    let endian = header.endian()?;
    let mut needs = Needs::default();
    for segment in header.program_headers(endian, bytes)? {
        if segment.p_type(endian) == PT_INTERP
            && let Some(path) = segment.interpreter(endian, bytes)?
        {
            needs.interpreter = Some(String::from_utf8(path.to_vec())?);
        }
    }
    let sections = header.sections(endian, bytes)?;
    if let Some((entries, link)) = sections.dynamic(endian, bytes)? {
        let strings = sections.strings(endian, bytes, link)?;
        for entry in entries {
            if entry.tag32(endian).map(i64::from) == Some(DT_NEEDED) {
                let name = entry.string(endian, strings)?;
                needs.libraries.push(String::from_utf8(name.to_vec())?);
            }
        }
    }
    Ok(needs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_program_s_needs_are_read() {
        let own = std::fs::read("/proc/self/exe").unwrap();
        let needs = needs(&own).unwrap();
        assert!(needs.interpreter.unwrap().contains("ld-linux"));
        assert!(needs.libraries.iter().any(|name| name.starts_with("libc.so")));
        assert!(super::needs(b"#!/bin/sh\n").is_err());
    }
}
