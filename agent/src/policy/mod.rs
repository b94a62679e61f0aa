//! Policies: sources to one model, evaluation, compilation for the kernel.

pub mod model;
