//! What laptop, agent, relay and controller say to each other.
//!
//! Three conversations, three modules:
//!
//! | module | between | carried by |
//! | --- | --- | --- |
//! | [`tunnel`] | laptop ⇄ agent | one QUIC connection; every stream begins with an [`tunnel::Open`] |
//! | [`relay`] | laptop ⇄ relay ⇄ agent | frames around sealed packets, and one control stream per leg |
//! | [`control`] | agent, relay ⇄ controller | one TLS connection of length-delimited messages |
//!
//! Messages are protobuf: fields may be added, unknown ones are skipped. A message on a stream is preceded by its
//! length as a varint (the "length-delimited" form of protobuf) and is at most [`MAX_MESSAGE`] bytes long.
//!
//! **Version.** The wire version is what TLS ALPN (RFC 7301) agrees on: the client offers every version it speaks,
//! best first, the server picks. A laptop and a cluster one minor version apart therefore share at least one.

pub mod control;
pub mod peer;
pub mod relay;
pub mod tunnel;

mod frame;
pub use frame::{DecodeError, MAX_MESSAGE, decode_delimited, encode_delimited};

/// ALPN identifiers of the laptop ⇄ agent protocol, best first.
pub const ALPN_TUNNEL: &[&[u8]] = &[b"forkd/1"];
/// ALPN identifiers of the control connection a laptop or an agent keeps with a relay, best first.
pub const ALPN_RELAY: &[&[u8]] = &[b"forkd-relay/1"];
/// ALPN identifiers of the control channel to the controller, best first.
pub const ALPN_CONTROL: &[&[u8]] = &[b"forkd-control/1"];
