//! The authority's arithmetic over rcgen: roots, intermediates, leaves, requests. Pure: no
//! files, no clock.

pub mod csr;
pub mod intermediate;
pub mod jwt_keys;
pub mod provided;
pub mod root;
mod sign;

pub use csr::{Csr, CsrError};
pub use intermediate::Intermediate;
pub use provided::Provided;
pub use root::{BACKDATE, CaError, Root};
