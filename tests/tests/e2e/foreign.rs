//! Another tool's program on a cgroup, attached for itself alone: what Signet must name.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

use anyhow::{Context, Result};

// Facts of the kernel's UAPI (linux/bpf.h).
const PROG_LOAD: libc::c_long = 5;
const PROG_ATTACH: libc::c_long = 8;
const PROG_DETACH: libc::c_long = 9;
const PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;
const CGROUP_INET4_CONNECT: u32 = 10;

/// `r0 = 1; exit`: lets everything pass.
const PASS: [u64; 2] = [0x0000_0001_0000_00b7, 0x0000_0000_0000_0095];

/// A `cgroup/connect4` program that allows no other beside or below it; gone when dropped.
pub struct ForeignProgram {
    program: OwnedFd,
    cgroup: File,
}

/// The head of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
#[derive(Default)]
struct Load {
    kind: u32,
    instructions: u32,
    code: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach_type: u32,
}

/// The head of `union bpf_attr` for `BPF_PROG_ATTACH` and `BPF_PROG_DETACH`.
#[repr(C)]
#[derive(Default)]
struct Attach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

impl ForeignProgram {
    /// Attaches one to the cgroup, without `BPF_F_ALLOW_MULTI`.
    ///
    /// # Errors
    /// Where the kernel refuses, above all because there are others already.
    pub fn attach(cgroup: &Path) -> Result<Self> {
        let load = Load {
            kind: PROG_TYPE_CGROUP_SOCK_ADDR,
            instructions: PASS.len() as u32,
            code: PASS.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
            name: *b"othertool\0\0\0\0\0\0\0",
            expected_attach_type: CGROUP_INET4_CONNECT,
            ..Load::default()
        };
        let fd = bpf(PROG_LOAD, &load).context("cannot load the foreign program")?;
        // SAFETY: the kernel just returned it as new; nobody else knows it.
        let program = unsafe { OwnedFd::from_raw_fd(fd) };
        let cgroup = File::open(cgroup).with_context(|| cgroup.display().to_string())?;
        let foreign = Self { program, cgroup };
        bpf(PROG_ATTACH, &foreign.attachment()).context("cannot attach the foreign program")?;
        Ok(foreign)
    }

    fn attachment(&self) -> Attach {
        Attach {
            target: self.cgroup.as_raw_fd() as u32,
            program: self.program.as_raw_fd() as u32,
            kind: CGROUP_INET4_CONNECT,
            flags: 0,
        }
    }
}

impl Drop for ForeignProgram {
    fn drop(&mut self) {
        // The cgroup may be gone, and the program with it.
        let _ = bpf(PROG_DETACH, &self.attachment());
    }
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<i32> {
    // SAFETY: the attributes begin as the command's part of `union bpf_attr` does, their
    // pointers are to data that outlives the call, and the kernel takes the rest for zero.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>())
    };
    match i32::try_from(result) {
        Ok(value) if value >= 0 => Ok(value),
        _ => Err(io::Error::last_os_error()),
    }
}
