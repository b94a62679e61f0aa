//! The main promises; run in every variant.

mod calls;
mod modes;
mod refusals;
mod restart;
mod rights;
mod udp;
