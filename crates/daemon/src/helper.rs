//! The privileged helper: makes the TUN, its routes and the resolver's setting for one daemon, and undoes them the
//! moment that daemon's end of the socket closes.

mod client;
pub mod protocol;

pub use client::{HelperClient, HelperError, spawn_helper};
