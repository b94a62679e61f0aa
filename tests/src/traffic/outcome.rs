//! Names of what came of a step.

use std::io::{Error, ErrorKind};

use rustix::io::Errno;

/// `<step>:<errno name>`.
pub(super) fn failed(step: &str, error: &Error) -> String {
    format!("{step}:{}", name(error))
}

/// The errno's name where it is one that matters here.
pub(super) fn name(error: &Error) -> String {
    const NAMES: [(Errno, &str); 19] = [
        (Errno::PERM, "EPERM"),
        (Errno::ACCESS, "EACCES"),
        (Errno::CONNREFUSED, "ECONNREFUSED"),
        (Errno::CONNRESET, "ECONNRESET"),
        (Errno::CONNABORTED, "ECONNABORTED"),
        (Errno::PIPE, "EPIPE"),
        (Errno::TIMEDOUT, "ETIMEDOUT"),
        (Errno::HOSTUNREACH, "EHOSTUNREACH"),
        (Errno::NETUNREACH, "ENETUNREACH"),
        (Errno::ADDRINUSE, "EADDRINUSE"),
        (Errno::ADDRNOTAVAIL, "EADDRNOTAVAIL"),
        (Errno::NOTCONN, "ENOTCONN"),
        (Errno::INVAL, "EINVAL"),
        (Errno::MFILE, "EMFILE"),
        (Errno::NOMEM, "ENOMEM"),
        (Errno::NOBUFS, "ENOBUFS"),
        (Errno::AFNOSUPPORT, "EAFNOSUPPORT"),
        (Errno::PROTO, "EPROTO"),
        (Errno::MSGSIZE, "EMSGSIZE"),
    ];
    if let Some(errno) = Errno::from_io_error(error)
        && errno != Errno::AGAIN
    {
        return NAMES
            .iter()
            .find(|(known, _)| *known == errno)
            .map_or_else(|| format!("errno {}", errno.raw_os_error()), |(_, n)| (*n).to_owned());
    }
    match error.kind() {
        // SO_RCVTIMEO and connect_timeout say it differently.
        ErrorKind::WouldBlock | ErrorKind::TimedOut => "ETIMEDOUT".into(),
        ErrorKind::UnexpectedEof => "EOF".into(),
        other => format!("{other:?}"),
    }
}
