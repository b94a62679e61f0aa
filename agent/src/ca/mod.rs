//! The authority's arithmetic over rcgen: roots, leaves. Pure: no files, no clock.

pub mod root;

pub use root::{CaError, Root};
