//! QUIC from end to end between laptop and agent: certificates, endpoints, the paths beneath, and the relay.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`identity`] | who is who: URIs, keys, certificates, TLS configurations |
//! | [`endpoint`] | the QUIC endpoints of laptop and agent |
//! | [`stream`] | `Open` and `Opened` on streams; messages on any byte stream |
//! | [`copy`] | bytes between a QUIC stream and a TCP connection |
//! | [`path`] | the socket beneath QUIC: UDP and byte pipes under one constant address |
//! | [`congestion`] | how much may be in flight |
//! | [`relay`] | passes sealed packets between laptops and agents |
//! | [`relay_client`] | the control connection that a laptop or an agent keeps with a relay |

pub mod congestion;
pub mod copy;
pub mod endpoint;
pub mod identity;
pub mod path;
pub mod relay;
pub mod relay_client;
pub mod stream;
