//! Policies: sources to one model, evaluation, compilation for the kernel.

pub mod asked;
pub mod builtin;
pub mod compile;
pub mod end_user;
pub mod evaluate;
pub mod explain;
pub mod istio;
pub mod model;
pub mod native;
pub mod request;
