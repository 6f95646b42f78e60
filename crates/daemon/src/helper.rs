//! The privileged helper: makes the TUN, its routes and the resolver's setting for one daemon, and undoes them the
//! moment that daemon's end of the socket closes.

mod client;
mod guard;
mod journal;
pub mod protocol;
mod worker;

pub use client::{HelperClient, HelperError, spawn_helper};
pub use guard::main;
