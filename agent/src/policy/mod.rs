//! Policies: sources to one model, evaluation, compilation for the kernel.

pub mod builtin;
pub mod compile;
pub mod evaluate;
pub mod explain;
pub mod istio;
pub mod model;
pub mod native;
