//! Names of the parties, as they stand in certificates and in relay frames.

use std::fmt;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6};

use sha2::{Digest, Sha256};

/// Eight bytes that stand for a party in relay frames: the first eight of SHA-256 over its URI (without query).
/// Nobody can claim another's: the relay derives it from the certificate.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerId(pub [u8; 8]);

/// UDP port of the made-up socket addresses that QUIC sees; it never reaches a wire.
const SYNTHETIC_PORT: u16 = 1;

impl PeerId {
    /// The id of the party with this URI, e.g. `forkd://agent/6f1c…`. A query (`?user=…`) does not count.
    pub fn of_uri(uri: &str) -> Self {
        let name = uri.split_once('?').map_or(uri, |(name, _)| name);
        let digest = Sha256::digest(name.as_bytes());
        let mut id = [0; 8];
        id.copy_from_slice(&digest[..8]);
        Self(id)
    }

    /// The constant address under which QUIC knows this peer, whatever path its packets take:
    /// `fd66:6f72:6b64:0:` (a ULA, RFC 4193, that spells "fork d") followed by the id.
    pub fn synthetic_addr(self) -> SocketAddr {
        let mut octets = [0xfd, 0x66, 0x6f, 0x72, 0x6b, 0x64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        octets[8..].copy_from_slice(&self.0);
        SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::from(octets), SYNTHETIC_PORT, 0, 0))
    }

    /// The inverse of [`Self::synthetic_addr`]; `None` for a real address.
    pub fn from_synthetic(addr: SocketAddr) -> Option<Self> {
        let SocketAddr::V6(v6) = addr else { return None };
        let octets = v6.ip().octets();
        if octets[..8] != [0xfd, 0x66, 0x6f, 0x72, 0x6b, 0x64, 0, 0] || v6.port() != SYNTHETIC_PORT {
            return None;
        }
        let mut id = [0; 8];
        id.copy_from_slice(&octets[8..]);
        Some(Self(id))
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PeerId({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_synthetic_address_is_constant_and_reversible() {
        let id = PeerId::of_uri("forkd://agent/0b7e");
        assert_eq!(PeerId::from_synthetic(id.synthetic_addr()), Some(id));
        assert_eq!(PeerId::of_uri("forkd://agent/0b7e?namespace=shop"), id);
        assert_ne!(PeerId::of_uri("forkd://laptop/0b7e"), id);
        assert_eq!(PeerId::from_synthetic(([10, 0, 0, 1], 1).into()), None);
    }
}
