//! Around the relay. A datagram between a party and a relay (a UDP payload, or one entry of a byte pipe) is one of:
//!
//! ```text
//! QUIC packet for the relay itself   first bit pattern x1xxxxxx (fixed bit, RFC 9000 §17; grease is off)
//! forwarded packet                   0x01 | peer id, 8 bytes | sealed QUIC packet
//! ```
//!
//! Towards the relay the peer id is the destination; the relay checks that the two may talk, overwrites it in
//! place with the sender's, and passes the packet on. It keeps no state of flows or connections between them.
//!
//! In a byte pipe (port-forward) every datagram is preceded by its length: two bytes, network order, never zero.
//!
//! Each party also keeps one QUIC connection with the relay (mutual TLS, ALPN [`crate::ALPN_RELAY`]): it proves who
//! is behind an address or pipe. The party opens one bidirectional stream and sends [`ToRelay`]; the relay answers
//! with [`FromRelay`] whenever something changes.

use crate::peer::PeerId;

/// First byte of a forwarded packet. Its fixed bit (0x40) is clear, so that no QUIC packet begins with it.
pub const FORWARD: u8 = 0x01;
/// Bytes that a forwarded packet has before the sealed packet.
pub const FORWARD_HEADER: usize = 9;
/// UDP port of the relay, and (on the pod's loopback only, for the port-forward) its TCP port.
pub const RELAY_PORT: u16 = 7844;

/// Writes the header of a packet for (or, rewritten by the relay, from) `peer`.
pub fn forward_header(peer: PeerId) -> [u8; FORWARD_HEADER] {
    let mut header = [FORWARD; FORWARD_HEADER];
    header[1..].copy_from_slice(&peer.0);
    header
}

/// A datagram, told apart by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Datagram<'a> {
    /// For the QUIC endpoint of whoever received it.
    Quic(&'a [u8]),
    /// A sealed packet and the peer it goes to (towards the relay) or comes from.
    Forward(PeerId, &'a [u8]),
    /// Neither: dropped.
    Unknown,
}

/// Tells a datagram apart. Total: any bytes give an answer.
pub fn classify(datagram: &[u8]) -> Datagram<'_> {
    match datagram {
        [FORWARD, rest @ ..] => match rest.split_first_chunk::<8>() {
            Some((id, packet)) if !packet.is_empty() => Datagram::Forward(PeerId(*id), packet),
            _ => Datagram::Unknown,
        },
        [first, ..] if first & 0x40 != 0 => Datagram::Quic(datagram),
        _ => Datagram::Unknown,
    }
}

/// From a laptop or an agent to the relay.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ToRelay {
    /// Who may send packets to the sender. A laptop leaves it empty: agents answer, they do not call first.
    #[prost(message, optional, tag = "1")]
    pub register: Option<Register>,
    /// Number of the sender's address or pipe, chosen by the sender, growing with each new one. The relay echoes it
    /// once packets from there are forwarded.
    #[prost(uint64, tag = "2")]
    pub leg: u64,
}

/// Who may reach an agent; each message replaces the one before.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Register {
    /// Laptop ids (see `Identity` in the tunnel crate) whose owners hold a target in this pod.
    #[prost(string, repeated, tag = "1")]
    pub laptops: Vec<String>,
    /// True for the gateway: every authenticated laptop may send packets (what it may *dial* is decided there).
    #[prost(bool, tag = "2")]
    pub any_laptop: bool,
}

/// From the relay: to each [`ToRelay`] one, and one per change.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FromRelay {
    /// To a laptop: all agents that it may reach at the moment.
    #[prost(message, repeated, tag = "1")]
    pub agents: Vec<Agent>,
    /// The newest [`ToRelay::leg`] that is in effect.
    #[prost(uint64, tag = "2")]
    pub leg: u64,
    /// To an agent: those laptops that may reach it and are there. How an agent learns that a laptop is gone long
    /// before QUIC would.
    #[prost(message, repeated, tag = "3")]
    pub laptops: Vec<Laptop>,
}

/// A laptop that is there.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Laptop {
    /// Its id.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The relay's number of the address or pipe that its packets come from. A new number tells the agent to send
    /// again at once what was lost meanwhile.
    #[prost(uint64, tag = "2")]
    pub leg: u64,
}

/// An agent that is there.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Agent {
    /// Its URI with query, as in its certificate: `forkd://agent/POD_UID?namespace=…&pod=…&role=…`.
    #[prost(string, tag = "1")]
    pub uri: String,
    /// The relay's number of the address that its packets come from. A new number tells the laptop to look whether
    /// this is still the agent that it is connected to: one that is killed has a successor of the same name.
    #[prost(uint64, tag = "2")]
    pub leg: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_datagram_is_told_apart_by_its_first_bytes() {
        let peer = PeerId([7; 8]);
        let mut packet = forward_header(peer).to_vec();
        assert_eq!(classify(&packet), Datagram::Unknown, "a header without a packet");
        packet.push(0xc0);
        assert_eq!(classify(&packet), Datagram::Forward(peer, &[0xc0]));
        assert_eq!(classify(&[0xc0, 1, 2]), Datagram::Quic(&[0xc0, 1, 2]), "long header");
        assert_eq!(classify(&[0x40]), Datagram::Quic(&[0x40]), "short header");
        assert_eq!(classify(&[]), Datagram::Unknown);
        assert_eq!(classify(&[0x00, 1]), Datagram::Unknown);
    }
}
