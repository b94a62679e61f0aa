//! The `bpf(2)` calls that aya 0.14 lacks: link update, attach to any cgroup hook by link
//! with the plain errno, link information with the cgroup, queries, and one test run.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

/// Commands of `enum bpf_cmd`.
mod cmd {
    pub(super) const MAP_LOOKUP_ELEM: libc::c_long = 1;
    pub(super) const MAP_GET_NEXT_KEY: libc::c_long = 4;
    pub(super) const PROG_LOAD: libc::c_long = 5;
    pub(super) const OBJ_PIN: libc::c_long = 6;
    pub(super) const OBJ_GET: libc::c_long = 7;
    pub(super) const PROG_TEST_RUN: libc::c_long = 10;
    pub(super) const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
    pub(super) const PROG_QUERY: libc::c_long = 16;
    pub(super) const LINK_CREATE: libc::c_long = 28;
    pub(super) const LINK_UPDATE: libc::c_long = 29;
    pub(super) const LINK_DETACH: libc::c_long = 34;
}

/// Values of `enum bpf_attach_type`.
pub(super) mod attach {
    pub(crate) const CGROUP_INET_INGRESS: u32 = 0;
    pub(crate) const CGROUP_INET_EGRESS: u32 = 1;
    pub(crate) const CGROUP_SOCK_OPS: u32 = 3;
    pub(crate) const CGROUP_INET4_CONNECT: u32 = 10;
    pub(crate) const CGROUP_INET6_CONNECT: u32 = 11;
    pub(crate) const CGROUP_UDP4_SENDMSG: u32 = 14;
    pub(crate) const CGROUP_UDP6_SENDMSG: u32 = 15;
    pub(crate) const CGROUP_INET4_GETPEERNAME: u32 = 29;
    pub(crate) const CGROUP_INET6_GETPEERNAME: u32 = 30;
    pub(crate) const CGROUP_INET4_GETSOCKNAME: u32 = 31;
    pub(crate) const CGROUP_INET6_GETSOCKNAME: u32 = 32;
    pub(crate) const SK_LOOKUP: u32 = 36;
    pub(crate) const TCX_INGRESS: u32 = 46;
    pub(crate) const TCX_EGRESS: u32 = 47;
}

/// Flags of an attachment made without a link, as a query answers them.
pub(super) mod attach_flags {
    /// A child's program replaces this one's effect.
    pub(crate) const ALLOW_OVERRIDE: u32 = 1;
    /// Others may attach beside it (links always may).
    pub(crate) const ALLOW_MULTI: u32 = 2;
}

/// Calls `bpf(2)`; `attr` is the command's part of `union bpf_attr`, without padding.
///
/// # Safety
/// Pointers inside `attr` are valid for what the command does with them.
unsafe fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a live repr(C) struct of the size that is passed; the kernel takes
    // shorter attributes as zero-extended. Pointers inside are the caller's promise.
    let r = unsafe { libc::syscall(libc::SYS_bpf, command, attr as *mut T, size_of::<T>()) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r) }
}

/// Takes ownership of a descriptor that the kernel just returned.
fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).map_err(|_| io::ErrorKind::InvalidData)?;
    // SAFETY: bpf(2) returned it as new, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn path_of(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    // Descriptors are never negative.
    fd.as_raw_fd().unsigned_abs()
}

#[repr(C)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Opens a pinned object.
pub(super) fn object_get(path: &Path) -> io::Result<OwnedFd> {
    let path = path_of(path)?;
    let mut attr = Object { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: the path is NUL-terminated and outlives the call.
    owned(unsafe { bpf(cmd::OBJ_GET, &mut attr) }?)
}

/// Pins an object.
pub(super) fn object_pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = path_of(path)?;
    let mut attr = Object { path: path.as_ptr() as u64, fd: raw(fd), flags: 0 };
    // SAFETY: the path is NUL-terminated and outlives the call.
    unsafe { bpf(cmd::OBJ_PIN, &mut attr) }.map(drop)
}

/// The part of `union bpf_attr` that is about one element of a map.
#[repr(C)]
struct Element {
    map: u32,
    pad: u32,
    key: u64,
    /// The value, or the next key.
    value: u64,
    flags: u64,
}

/// The key that follows `key` in a map, the first one without; `None` behind the last one.
///
/// # Errors
/// The kernel's; `key`, if any, and keys of this map are `size` bytes long.
pub(super) fn next_key(
    map: BorrowedFd<'_>,
    key: Option<&[u8]>,
    size: usize,
) -> io::Result<Option<Vec<u8>>> {
    if key.is_some_and(|key| key.len() != size) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut next = vec![0u8; size];
    let mut attr = Element {
        map: raw(map),
        pad: 0,
        key: key.map_or(0, |key| key.as_ptr() as u64),
        value: next.as_mut_ptr() as u64,
        flags: 0,
    };
    // SAFETY: the kernel reads and writes as many bytes as the map's keys have, which the caller
    // gives as `size`; both buffers outlive the call.
    match unsafe { bpf(cmd::MAP_GET_NEXT_KEY, &mut attr) } {
        Ok(_) => Ok(Some(next)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The value of a key; `None` where there is none. `size` is what the kernel writes: the map's
/// value size, in maps of one value a CPU rounded up to 8 bytes and for each possible CPU.
pub(super) fn lookup(map: BorrowedFd<'_>, key: &[u8], size: usize) -> io::Result<Option<Vec<u8>>> {
    let mut value = vec![0u8; size];
    let mut attr = Element {
        map: raw(map),
        pad: 0,
        key: key.as_ptr() as u64,
        value: value.as_mut_ptr() as u64,
        flags: 0,
    };
    // SAFETY: the key is one of this map's, so it is as long as the kernel reads; the value's
    // buffer is as long as the kernel writes, by the caller's promise. Both outlive the call.
    match unsafe { bpf(cmd::MAP_LOOKUP_ELEM, &mut attr) } {
        Ok(_) => Ok(Some(value)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Attaches a program to a cgroup or a network namespace by a link.
pub(super) fn link_create(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    link_create_raw(program, raw(target), attach_type)
}

/// Attaches a program to a device of this process's network namespace by a tcx link.
pub(super) fn link_create_on_interface(
    program: BorrowedFd<'_>,
    interface: u32,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    link_create_raw(program, interface, attach_type)
}

fn link_create_raw(program: BorrowedFd<'_>, target: u32, attach_type: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        program: u32,
        target: u32,
        attach_type: u32,
        flags: u32,
    }
    let mut attr = Attr { program: raw(program), target, attach_type, flags: 0 };
    // SAFETY: no pointers.
    owned(unsafe { bpf(cmd::LINK_CREATE, &mut attr) }?)
}

/// Replaces a link's program at once: no packet or call meets neither or both.
pub(super) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        link: u32,
        program: u32,
        flags: u32,
        old_program: u32,
    }
    let mut attr = Attr { link: raw(link), program: raw(program), flags: 0, old_program: 0 };
    // SAFETY: no pointers.
    unsafe { bpf(cmd::LINK_UPDATE, &mut attr) }.map(drop)
}

/// Takes a link's program off its hook, whoever else holds the link.
pub(super) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        link: u32,
    }
    let mut attr = Attr { link: raw(link) };
    // SAFETY: no pointers.
    unsafe { bpf(cmd::LINK_DETACH, &mut attr) }.map(drop)
}

/// What a link is attached to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum LinkTarget {
    /// A cgroup's id; 0 once it is removed.
    Cgroup(u64),
    /// A network namespace's inode; 0 once it is gone.
    Netns(u32),
    /// A device's number; 0 once it is gone.
    Interface(u32),
    /// Something that Signet does not make.
    Other,
}

/// Reads what a link is attached to. Fails for descriptors of other objects.
pub(super) fn link_target(link: BorrowedFd<'_>) -> io::Result<LinkTarget> {
    /// The head of `struct bpf_link_info`.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        kind: u32,
        id: u32,
        program: u32,
        pad: u32,
        // cgroup: { id: u64, attach_type: u32 }, netns: { inode: u32, attach_type: u32 },
        // tcx: { interface: u32, attach_type: u32 }
        words: [u32; 4],
    }
    #[repr(C)]
    struct Attr {
        fd: u32,
        len: u32,
        info: u64,
    }
    let mut info = Info::default();
    let mut attr = Attr {
        fd: raw(link),
        len: size_of::<Info>() as u32,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    // SAFETY: `info` is as long as `len` says and outlives the call.
    unsafe { bpf(cmd::OBJ_GET_INFO_BY_FD, &mut attr) }?;
    const CGROUP: u32 = 3;
    const NETNS: u32 = 5;
    const TCX: u32 = 11;
    Ok(match info.kind {
        CGROUP => LinkTarget::Cgroup(u64::from_ne_bytes(
            [info.words[0].to_ne_bytes(), info.words[1].to_ne_bytes()]
                .concat()
                .try_into()
                .unwrap_or_default(),
        )),
        NETNS => LinkTarget::Netns(info.words[0]),
        TCX => LinkTarget::Interface(info.words[0]),
        _ => LinkTarget::Other,
    })
}

/// The programs of one hook of one cgroup, not its ancestors'.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Attached {
    /// [`attach_flags`].
    pub(super) flags: u32,
    /// Program ids.
    pub(super) programs: Vec<u32>,
}

/// Asks which programs a cgroup itself has at a hook.
pub(super) fn query(cgroup: BorrowedFd<'_>, attach_type: u32) -> io::Result<Attached> {
    #[repr(C)]
    struct Attr {
        target: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        programs: u64,
        count: u32,
        pad: u32,
    }
    let mut programs = vec![0u32; 64];
    let mut attr = Attr {
        target: raw(cgroup),
        attach_type,
        query_flags: 0,
        attach_flags: 0,
        programs: programs.as_mut_ptr() as u64,
        count: programs.len() as u32,
        pad: 0,
    };
    // SAFETY: `programs` has room for `count` ids and outlives the call.
    unsafe { bpf(cmd::PROG_QUERY, &mut attr) }?;
    programs.truncate(attr.count as usize);
    Ok(Attached { flags: attr.attach_flags, programs })
}

/// The calling task's ancestor cgroup at `level` (0 is the real root, whatever the cgroup
/// namespace shows), 0 where it has none.
///
/// Cgroup namespaces hide how deep a directory really is, and the programs count from the
/// real root: so a program is asked, run once by this thread (`BPF_PROG_TYPE_SYSCALL`, 5.14).
pub(super) fn own_ancestor_cgroup(level: u32) -> io::Result<u64> {
    #[repr(C)]
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
    }
    #[repr(C)]
    struct Run {
        program: u32,
        result: u32,
        data_in_len: u32,
        data_out_len: u32,
        data_in: u64,
        data_out: u64,
        repeat: u32,
        duration: u32,
        context_in_len: u32,
        context_out_len: u32,
        context_in: u64,
        context_out: u64,
    }
    const SYSCALL: u32 = 31;
    const SLEEPABLE: u32 = 1 << 4;
    /// `bpf_get_current_ancestor_cgroup_id`.
    const HELPER: i32 = 123;
    const fn instruction(code: u8, registers: u8, offset: i16, immediate: i32) -> u64 {
        code as u64
            | (registers as u64) << 8
            | (offset as u16 as u64) << 16
            | (immediate as u32 as u64) << 32
    }
    let code = [
        instruction(0xbf, 0x16, 0, 0),      // r6 = r1 (the context)
        instruction(0x79, 0x61, 0, 0),      // r1 = *(u64 *)(r6 + 0)
        instruction(0x85, 0x00, 0, HELPER), // r0 = ancestor(r1)
        instruction(0x7b, 0x06, 0, 0),      // *(u64 *)(r6 + 0) = r0
        instruction(0xb7, 0x00, 0, 0),      // r0 = 0
        instruction(0x95, 0x00, 0, 0),      // exit
    ];
    let license = c"Dual MIT/GPL";
    let mut load = Load {
        kind: SYSCALL,
        instructions: code.len() as u32,
        code: code.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: SLEEPABLE,
    };
    // SAFETY: code and licence outlive the call and are as long as said.
    let program = owned(unsafe { bpf(cmd::PROG_LOAD, &mut load) }?)?;
    let mut context = u64::from(level);
    let at = std::ptr::from_mut(&mut context) as u64;
    let mut run = Run {
        program: program.as_raw_fd().unsigned_abs(),
        result: 0,
        data_in_len: 0,
        data_out_len: 0,
        data_in: 0,
        data_out: 0,
        repeat: 0,
        duration: 0,
        context_in_len: size_of::<u64>() as u32,
        context_out_len: 0,
        context_in: at,
        context_out: 0,
    };
    // SAFETY: the context is a u64, read and (for this program type) written back.
    unsafe { bpf(cmd::PROG_TEST_RUN, &mut run) }?;
    // SAFETY: the kernel wrote through a pointer that the compiler does not see.
    Ok(unsafe { std::ptr::read_volatile(&raw const context) })
}

/// True when the kernel answers queries of a device's tcx programs.
pub(super) fn has_tcx() -> bool {
    const LOOPBACK: u32 = 1;
    #[repr(C)]
    struct Attr {
        interface: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        programs: u64,
        count: u32,
        pad: u32,
    }
    let mut attr = Attr {
        interface: LOOPBACK,
        attach_type: attach::TCX_INGRESS,
        query_flags: 0,
        attach_flags: 0,
        programs: 0,
        count: 0,
        pad: 0,
    };
    // SAFETY: no room for ids is offered, so none are written.
    match unsafe { bpf(cmd::PROG_QUERY, &mut attr) } {
        Ok(_) => true,
        // Known hook without any program.
        Err(error) => error.raw_os_error() == Some(libc::ENOENT),
    }
}

/// Attaches (or detaches) a program the old way, without a link and for itself alone: what
/// other tools may have done, for tests.
#[cfg(test)]
pub(super) fn attach_exclusively(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    attach_type: u32,
    attach: bool,
) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        target: u32,
        program: u32,
        attach_type: u32,
        flags: u32,
    }
    let mut attr = Attr { target: raw(target), program: raw(program), attach_type, flags: 0 };
    // SAFETY: no pointers.
    unsafe { bpf(if attach { 8 } else { 9 }, &mut attr) }.map(drop)
}
