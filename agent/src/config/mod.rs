//! The agent's configuration: a file, below the environment, below flags.

pub mod yaml;
