//! Signet's kernel side as a library: the ABI and the verdict, shared by the programs,
//! by user space and by tests. The programs themselves are this crate's binaries.
#![cfg_attr(not(feature = "user"), no_std)]
#![warn(missing_docs)]

pub mod abi;
pub mod decide;
pub mod guard;
