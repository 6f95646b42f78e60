//! Connections that predate the redirect: NAT is decided when a connection begins, so they stay with the application.
//!
//! They are counted, and those that a sidecar keeps for reuse are closed while nothing moves on them, so that its next
//! request comes over a new connection. Everybody else's stay: cutting them would be an outage of our making.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use crate::netlink::{NLM_F_ACK, NLM_F_DUMP, Netlink, Requests, attribute, field};
use crate::proxy::OwnConnections;

/// Why the kernel did not tell about its sockets, or did not close one.
#[derive(Debug, thiserror::Error)]
pub enum SocketsError {
    /// Sockets may be listed, but not closed.
    #[error("may not close connections: the agent's container lacks the capability NET_ADMIN")]
    NoPermission,
    /// The kernel was built without the part that is needed.
    #[error(
        "the node's kernel cannot {what}: it lacks CONFIG_INET_DIAG or CONFIG_INET_DIAG_DESTROY ({source})"
    )]
    Unsupported {
        /// What was asked of it.
        what: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// Anything else.
    #[error("{what}: {source}")]
    Failed {
        /// What was asked of the kernel.
        what: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

/// What became of a sidecar's connections to a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pooled {
    /// Were idle, and are closed.
    pub closed: u32,
    /// Were in use, or had been a moment ago: worth another try.
    pub busy: u32,
}

// linux/sock_diag.h, inet_diag.h, tcp.h
const NETLINK_SOCK_DIAG: isize = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const INET_DIAG_INFO: u16 = 2;
const IPPROTO_TCP: u8 = 6;
const TCP_ESTABLISHED: u32 = 1;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// `inet_diag_msg` up to its attributes, and where the socket's id (`inet_diag_sockid`, 48 bytes) stands in it.
const MESSAGE: usize = 72;
const ID: std::ops::Range<usize> = 4..52;
/// Offsets of three times in `tcp_info`: milliseconds since bytes were sent, and since they came.
const LAST_DATA_SENT: usize = 44;
const LAST_DATA_RECEIVED: usize = 52;
const UNACKED: usize = 24;
const ENOENT: i32 = 2;
const EPERM: i32 = 1;
const EOPNOTSUPP: i32 = 95;
/// The user id of Istio's Envoy.
const ENVOY_UID: u32 = 1337;

/// Connections to the application on `port` that did not come through the agent, counted at the application's end.
/// Right after the redirect was set, these are all that predate it; their number only falls.
///
/// # Errors
/// [`SocketsError::Unsupported`] without CONFIG_INET_DIAG.
pub fn count(port: u16, own: &OwnConnections) -> Result<u32, SocketsError> {
    let sockets = established()?;
    let mut older: HashMap<(SocketAddr, SocketAddr), &Socket> = sockets
        .iter()
        .filter(|s| s.local.port() == port && !own.contains(s.remote))
        .map(|s| ((s.remote, s.local), s))
        .collect();
    // The agent's next connections are established before it knows their address: their inodes tell.
    let uid = nix::unistd::geteuid().as_raw();
    let callers: Vec<&Socket> =
        sockets.iter().filter(|s| s.uid == uid && older.contains_key(&(s.local, s.remote))).collect();
    if !callers.is_empty() {
        let inodes = own_inodes().map_err(failed("list the agent's own sockets"))?;
        for caller in callers.iter().filter(|s| inodes.contains(&s.inode)) {
            older.remove(&(caller.local, caller.remote));
        }
    }
    Ok(u32::try_from(older.len()).unwrap_or(u32::MAX))
}

/// The inodes of this process's sockets: `/proc/self/fd/N` is a link to `socket:[INODE]`.
fn own_inodes() -> io::Result<HashSet<u32>> {
    let mut inodes = HashSet::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        // A descriptor may be closed meanwhile, the one of this listing will be.
        let Ok(link) = std::fs::read_link(entry?.path()) else { continue };
        let inode: Option<u32> =
            link.to_str().and_then(|link| link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
        inodes.extend(inode);
    }
    Ok(inodes)
}

/// Closes connections to the application on `port` that a sidecar (Envoy: from 127.0.0.6 or ::6, or of user 1337 to
/// the loopback address) holds and that did not come through the agent, if nothing has moved on them for `idle_for`
/// and the application's bytes were the last. A response that pauses for longer looks the same: choose `idle_for` by
/// what the application does.
///
/// # Errors
/// [`SocketsError`]; connections closed before it stay closed.
pub fn close_pooled(port: u16, idle_for: Duration) -> Result<Pooled, SocketsError> {
    let mut diag = open()?;
    let mut pooled = Pooled::default();
    let sockets = established()?;
    // The sidecar's end of a redirected connection names the same port; the other end tells the two apart.
    let at_application: HashSet<SocketAddr> =
        sockets.iter().filter(|s| s.local.port() == port).map(|s| s.remote).collect();
    let older = |s: &&Socket| s.remote.port() == port && s.is_sidecars() && at_application.contains(&s.local);
    for socket in sockets.iter().filter(older) {
        if !socket.is_idle(idle_for) {
            pooled.busy += 1;
            continue;
        }
        let mut request = Requests::default();
        request.add(SOCK_DESTROY, NLM_F_ACK, &socket.request(), |_| {});
        let (_, refused) = diag.exchange(&request).map_err(failed("close a pooled connection"))?;
        match refused.map(|refused| (refused.error.raw_os_error(), refused.error)) {
            None => pooled.closed += 1,
            // It ended by itself meanwhile.
            Some((Some(ENOENT), _)) => {}
            Some((Some(EPERM), _)) => return Err(SocketsError::NoPermission),
            Some((Some(EOPNOTSUPP), source)) => {
                return Err(SocketsError::Unsupported { what: "close connections", source });
            }
            Some((_, source)) => return Err(failed("close a pooled connection")(source)),
        }
    }
    Ok(pooled)
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> SocketsError {
    move |source| SocketsError::Failed { what, source }
}

fn open() -> Result<Netlink, SocketsError> {
    Netlink::open(NETLINK_SOCK_DIAG)
        .map_err(|source| SocketsError::Unsupported { what: "tell about its sockets", source })
}

/// One end of a connection in this network namespace.
struct Socket {
    local: SocketAddr,
    remote: SocketAddr,
    uid: u32,
    inode: u32,
    family: u8,
    id: [u8; 48],
    queued: u32,
    unacked: u32,
    sent_ago: Duration,
    received_ago: Duration,
}

fn established() -> Result<Vec<Socket>, SocketsError> {
    let mut diag = open()?;
    let mut sockets = Vec::new();
    for family in [AF_INET, AF_INET6] {
        let mut request = Requests::default();
        request.add(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, &request_header(family, &[0; 48]), |_| {});
        let what = "list the connections of the pod";
        let (answers, refused) = diag.exchange(&request).map_err(failed(what))?;
        match refused.map(|refused| refused.error) {
            // No IPv6 in this kernel, so none of its connections; without inet_diag not even those of IPv4.
            Some(error) if error.raw_os_error() == Some(ENOENT) && family == AF_INET6 => {}
            Some(source) if source.raw_os_error() == Some(ENOENT) => {
                return Err(SocketsError::Unsupported { what, source });
            }
            Some(source) => return Err(failed(what)(source)),
            None => sockets.extend(answers.iter().filter_map(|(_, message)| Socket::read(message))),
        }
    }
    Ok(sockets)
}

/// `inet_diag_req_v2`.
fn request_header(family: u8, id: &[u8; 48]) -> Vec<u8> {
    let states: u32 = 1 << TCP_ESTABLISHED;
    let mut header = vec![family, IPPROTO_TCP, 1 << (INET_DIAG_INFO - 1), 0];
    header.extend_from_slice(&states.to_ne_bytes());
    header.extend_from_slice(id);
    header
}

impl Socket {
    /// `inet_diag_msg` with its attributes.
    fn read(message: &[u8]) -> Option<Self> {
        let family = *message.first()?;
        let id: [u8; 48] = field(message, ID.start)?;
        let address = |at: usize| -> Option<IpAddr> {
            let v6 = Ipv6Addr::from(field::<16>(&id, at)?);
            Some(match family {
                AF_INET => Ipv4Addr::from(field::<4>(&id, at)?).into(),
                // A dual-stack application sees IPv4 callers as mapped addresses.
                _ => v6.to_canonical(),
            })
        };
        let port = |at: usize| field(&id, at).map(u16::from_be_bytes);
        let info = attribute(message.get(MESSAGE..)?, INET_DIAG_INFO);
        let number = |at: usize| field(info.unwrap_or_default(), at).map_or(0, u32::from_ne_bytes);
        let queues = u64::from(u32::from_ne_bytes(field(message, 56)?))
            + u64::from(u32::from_ne_bytes(field(message, 60)?));
        Some(Self {
            local: (address(4)?, port(0)?).into(),
            remote: (address(20)?, port(2)?).into(),
            uid: u32::from_ne_bytes(field(message, 64)?),
            inode: u32::from_ne_bytes(field(message, 68)?),
            family,
            id,
            queued: u32::try_from(queues).unwrap_or(u32::MAX),
            unacked: number(UNACKED),
            sent_ago: Duration::from_millis(number(LAST_DATA_SENT).into()),
            received_ago: Duration::from_millis(number(LAST_DATA_RECEIVED).into()),
        })
    }

    fn request(&self) -> Vec<u8> {
        request_header(self.family, &self.id)
    }

    fn is_sidecars(&self) -> bool {
        let envoy_source: [IpAddr; 2] = [Ipv4Addr::new(127, 0, 0, 6).into(), Ipv6Addr::from(6).into()];
        envoy_source.contains(&self.local.ip()) || (self.uid == ENVOY_UID && self.remote.ip().is_loopback())
    }

    fn is_idle(&self, idle_for: Duration) -> bool {
        self.queued == 0
            && self.unacked == 0
            && self.received_ago >= idle_for
            && self.sent_ago >= idle_for
            // Otherwise a request is out and its answer is not.
            && self.received_ago <= self.sent_ago
    }
}
