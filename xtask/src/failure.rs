//! Why a chore ends with another exit code than 1.

use std::fmt;

/// A failure with the exit code that the command line promises for it.
#[derive(Debug)]
pub struct Failure {
    code: u8,
    message: String,
}

impl Failure {
    /// This host cannot do it (exit code 6); the message says what to do.
    pub fn host(message: impl Into<String>) -> anyhow::Error {
        Self { code: 6, message: message.into() }.into()
    }

    /// Another program ended with this code.
    pub fn of_code(code: u8, message: &str) -> anyhow::Error {
        Self { code, message: message.to_owned() }.into()
    }

    /// The exit code of an error: its own when it is a [`Failure`], else 1.
    pub fn code_of(error: &anyhow::Error) -> u8 {
        error.downcast_ref::<Self>().map_or(1, |failure| failure.code)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use anyhow::{Context as _, anyhow};

    use super::*;

    #[test]
    fn a_code_survives_context() {
        let wrapped = Err::<(), _>(Failure::host("no BPF")).context("setting up");
        assert_eq!(Failure::code_of(&wrapped.unwrap_err()), 6);
        assert_eq!(Failure::code_of(&anyhow!("anything else")), 1);
    }
}
