//! Decides, does no IO: time and packets are arguments, and nothing here reads a clock or opens a socket.
//!
//! On the laptop: [`flow`] ends TCP, [`dns`] tells whose a name is, [`ranges`] what may be routed into the tunnel.
//! In the pod: [`key`] finds the fork that a request belongs to, [`http1`] where requests begin and end.

pub mod dns;
pub mod flow;
pub mod http1;
pub mod key;
pub mod ranges;
