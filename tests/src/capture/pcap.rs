//! The pcap file format (nanoseconds, Ethernet), so that people can look with their tools.

use std::{
    io::{self, Write},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Result, ensure};

const MAGIC_NANOSECONDS: u32 = 0xa1b2_3c4d;
const ETHERNET: u32 = 1;
const LONGEST: u32 = 0x4_0000;

/// Writes the file's header.
pub fn write_header(file: &mut impl Write) -> io::Result<()> {
    file.write_all(&MAGIC_NANOSECONDS.to_le_bytes())?;
    for half in [2_u16, 4] {
        file.write_all(&half.to_le_bytes())?;
    }
    for word in [0, 0, LONGEST, ETHERNET] {
        file.write_all(&u32::to_le_bytes(word))?;
    }
    Ok(())
}

/// Writes one frame.
pub fn write_packet(file: &mut impl Write, time: SystemTime, frame: &[u8]) -> io::Result<()> {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let length = frame.len() as u32;
    for word in [since.as_secs() as u32, since.subsec_nanos(), length, length] {
        file.write_all(&word.to_le_bytes())?;
    }
    file.write_all(frame)
}

/// The frames of a file that [`write_header`] began, with the time of each.
pub fn frames(file: &[u8]) -> Result<impl Iterator<Item = (SystemTime, &[u8])>> {
    ensure!(file.len() >= 24 && word(file, 0) == MAGIC_NANOSECONDS, "not a pcap file of ours");
    let mut rest = &file[24..];
    Ok(std::iter::from_fn(move || {
        if rest.len() < 16 {
            return None;
        }
        let length = word(rest, 8) as usize;
        let time = UNIX_EPOCH + Duration::new(word(rest, 0).into(), word(rest, 4));
        let frame = rest.get(16..16 + length)?;
        rest = &rest[16 + length..];
        Some((time, frame))
    }))
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read() {
        let mut file = Vec::new();
        write_header(&mut file).unwrap();
        write_packet(&mut file, UNIX_EPOCH + Duration::new(5, 6), b"abc").unwrap();
        write_packet(&mut file, UNIX_EPOCH + Duration::new(7, 8), b"").unwrap();
        let read: Vec<_> = frames(&file).unwrap().collect();
        assert_eq!(
            read,
            [
                (UNIX_EPOCH + Duration::new(5, 6), &b"abc"[..]),
                (UNIX_EPOCH + Duration::new(7, 8), &b""[..])
            ]
        );
        assert!(frames(b"something else, which is long enough").is_err());
    }
}
