//! core

pub mod http1;
pub mod key;

pub mod flow;
