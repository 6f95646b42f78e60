//! core

pub mod http1;
pub mod key;
