//! core

pub mod http1;
pub mod key;

pub mod dns;
pub mod flow;
pub mod ranges;
