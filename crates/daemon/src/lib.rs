//! forkd on the laptop.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`control`] | the protocol between the `forkd` command and the daemon |
//! | [`daemon`] | the daemon's process: socket, lock, log |
//! | [`session`] | one laptop's connection to one cluster |
//! | [`intercept`] | taking a Service's requests and giving them back |
//! | [`deliver`] | requests from agents to ports of the laptop |
//! | [`claim`] | the Fork and ForkTarget objects behind it |
//! | [`kubernetes`], [`certificate`], [`portforward`] | what the session asks of the API server |

pub mod certificate;
pub mod claim;
pub mod control;
pub mod daemon;
pub mod dataplane;
pub mod deliver;
pub mod failure;
pub mod helper;
pub mod host;
pub mod intercept;
pub mod kubernetes;
pub mod log;
pub mod net;
pub mod network;
pub mod pipes;
pub mod portforward;
pub mod ports;
pub mod questions;
pub mod service;
pub mod session;
pub mod state;
pub mod status;
pub mod tun;
