//! Flow records: what was decided, kept and merged.

pub mod record;
