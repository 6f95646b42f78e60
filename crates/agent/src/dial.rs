//! Dialing on the pod's behalf, and what each refusal means.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use forkd_wire::tunnel::{Dial, Outcome};
use nix::errno::Errno;
use tokio::net::TcpStream;

/// The address in a [`Dial`], or `None` when it is none.
pub fn address(dial: &Dial) -> Option<SocketAddr> {
    let ip = match dial.ip.as_slice() {
        ip if ip.len() == 4 => IpAddr::from(<[u8; 4]>::try_from(ip).ok()?),
        ip => IpAddr::from(<[u8; 16]>::try_from(ip).ok()?),
    };
    let port = u16::try_from(dial.port).ok().filter(|port| *port != 0)?;
    Some(SocketAddr::new(ip, port))
}

/// Addresses that nobody dials through a tunnel: they would mean the agent's own pod or node, not a peer in the cluster.
pub fn is_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            ip.is_loopback()
                || ip.is_unspecified()
                || ip.is_link_local()
                || ip.is_multicast()
                || ip == Ipv4Addr::BROADCAST
        }
        IpAddr::V6(ip) => match ip.to_ipv4_mapped() {
            Some(v4) => is_local(IpAddr::V4(v4)),
            None => {
                ip == Ipv6Addr::LOCALHOST
                    || ip.is_unspecified()
                    || ip.is_unicast_link_local()
                    || ip.is_multicast()
            }
        },
    }
}

/// Connects, for as long as the kernel itself would try.
///
/// # Errors
/// What the kernel said, as an [`Outcome`], and in words.
pub async fn connect(to: SocketAddr) -> Result<TcpStream, (Outcome, String)> {
    match TcpStream::connect(to).await {
        Ok(stream) => {
            // Flows are written in whole chunks; waiting for more would only add latency.
            stream.set_nodelay(true).map_err(|error| (Outcome::Unavailable, error.to_string()))?;
            Ok(stream)
        }
        Err(error) => Err((outcome(&error), format!("{to}: {error}"))),
    }
}

/// The [`Outcome`] that tells the laptop what `connect()` said here (POSIX connect(3p), Linux tcp(7)).
pub fn outcome(error: &io::Error) -> Outcome {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ECONNREFUSED) => Outcome::Refused,
        Some(Errno::ENETUNREACH) => Outcome::NetworkUnreachable,
        Some(Errno::EHOSTUNREACH | Errno::EHOSTDOWN) => Outcome::HostUnreachable,
        Some(Errno::ETIMEDOUT) => Outcome::TimedOut,
        Some(Errno::ECONNRESET) => Outcome::Reset,
        Some(Errno::EACCES | Errno::EPERM) => Outcome::Forbidden,
        _ => Outcome::Unavailable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_addresses_with_a_port_are_dialed() {
        let dial = |ip: &[u8], port| address(&Dial { ip: ip.to_vec(), port });
        assert_eq!(dial(&[10, 0, 0, 1], 80), Some(([10, 0, 0, 1], 80).into()));
        assert_eq!(dial(&[0; 16], 80).map(|to| to.port()), Some(80));
        for (ip, port) in [(&[10, 0, 0][..], 80), (&[], 80), (&[10, 0, 0, 1], 0), (&[10, 0, 0, 1], 65536)] {
            assert_eq!(dial(ip, port), None, "{ip:?}:{port}");
        }
    }

    #[test]
    fn the_agents_own_addresses_are_not_for_laptops() {
        for ip in
            ["127.0.0.1", "0.0.0.0", "169.254.169.254", "::1", "::ffff:127.0.0.1", "fe80::1", "224.0.0.1"]
        {
            assert!(is_local(ip.parse().unwrap()), "{ip}");
        }
        assert!(!is_local("10.244.0.7".parse().unwrap()));
    }

    #[tokio::test]
    async fn a_closed_port_is_refused() {
        let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        assert_eq!(connect(free).await.unwrap_err().0, Outcome::Refused);
    }
}
