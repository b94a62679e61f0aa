//! Exit codes, and failures that carry one.

use std::{
    fmt,
    io::{self, Write},
    process::ExitCode,
};

/// The exit codes of every command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// Done, or the answer is yes.
    Done,
    /// The answer is no.
    No,
    /// Usage.
    Usage,
    /// Input unreadable or malformed.
    Input,
    /// Agent, API server or authority unreachable, or some nodes missing from an answer.
    Unreachable,
    /// Not permitted.
    Denied,
    /// This host cannot.
    Host,
    /// A bug.
    Bug,
}

impl Exit {
    /// The number.
    pub const fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::No => 1,
            Self::Usage => 2,
            Self::Input => 3,
            Self::Unreachable => 4,
            Self::Denied => 5,
            Self::Host => 6,
            Self::Bug => 70,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// Why a command failed, and its exit code.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    error: anyhow::Error,
}

impl Failure {
    /// A failure of which there is only a sentence to say.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, error: anyhow::Error::msg(message.into()) }
    }

    /// A failure with its causes.
    pub fn caused(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Self { exit, error: error.into() }
    }

    /// An agent's refusal.
    pub fn refused(socket: &str, status: &tonic::Status) -> Self {
        use tonic::Code;
        let exit = match status.code() {
            Code::InvalidArgument => Exit::Usage,
            Code::PermissionDenied | Code::Unauthenticated => Exit::Denied,
            Code::Unimplemented => Exit::Host,
            // What the question names is not there.
            Code::FailedPrecondition => Exit::Input,
            Code::Internal | Code::Unknown => Exit::Bug,
            _ => Exit::Unreachable,
        };
        Self::new(exit, format!("the agent at {socket} answers: {}", status.message()))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // With every cause, in one line.
        write!(f, "{:#}", self.error)
    }
}

/// Writes to stdout; a reader that has gone away has seen enough.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut out = anstream::AutoStream::auto(io::stdout().lock());
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new(Exit::Input, format!("stdout: {e}")))
        }
        _ => Ok(()),
    }
}
