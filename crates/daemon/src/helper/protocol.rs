//! All that can be asked of the helper: the whole interface between the user's daemon and root.
//!
//! One JSON message a packet over a SOCK_SEQPACKET pair, one reply to each, in order. The TUN's file descriptor comes
//! with [`Reply::Tun`] (SCM_RIGHTS). When the daemon's end closes, everything is undone.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// The most bytes a message may have: some hundred ranges fit, and a bug cannot fill memory.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// The most ranges of a request: a cluster has a handful; each costs a netlink round trip.
pub const MAX_RANGES: usize = 256;

/// Towards the helper.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Make the TUN (once per helper). The helper picks name and addresses, so that no request can take any.
    CreateTun {
        /// 1280 to 65535 bytes.
        mtu: u16,
    },
    /// Route exactly these ranges into the TUN; replaces the ones before.
    SetRoutes {
        /// What to route.
        ranges: Vec<IpNet>,
        /// Addresses that must stay outside: the API server's above all. The host's own and its resolvers are known.
        keep: Vec<IpAddr>,
        /// Ranges of `ranges` that the user took explicitly although a less specific route of the host covers them.
        take: Vec<IpNet>,
    },
    /// Send names of the cluster's domain to `server`; replaces the setting before.
    SetDns {
        /// The address in the TUN that answers.
        server: IpAddr,
        /// The cluster's domain, e.g. `cluster.local`.
        domain: String,
        /// Suffixes for short names, best first.
        search: Vec<String>,
    },
    /// Undo everything, and say when it is done.
    Undo,
}

/// From the helper.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Reply {
    /// The TUN; its file descriptor is attached.
    Tun(TunInfo),
    /// The ranges are routed.
    Routes,
    /// Names of the cluster come to `server`.
    Dns(DnsInfo),
    /// Nothing of ours is left.
    Undone,
    /// It was not done, and nothing of it was left half done.
    Failed(Failure),
}

/// The TUN as it was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunInfo {
    /// E.g. `forkd0`.
    pub name: String,
    /// Interface index.
    pub index: u32,
    /// As asked for.
    pub mtu: u16,
    /// Its addresses, /32 and /128: what the applications' packets come from. IPv6 only if the host has it switched on.
    pub addresses: Vec<IpAddr>,
}

/// How names get to us.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsInfo {
    /// Which of the two ways.
    pub mode: DnsMode,
    /// The resolvers that the host had before: where names that are not the cluster's go.
    pub upstream: Vec<SocketAddr>,
}

/// Ways to get at the host's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DnsMode {
    /// systemd-resolved asks us for the cluster's domain only.
    Resolved,
    /// /etc/resolv.conf names us first: every question comes to us.
    ResolvConf,
}

impl fmt::Display for DnsMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Resolved => "systemd-resolved",
            Self::ResolvConf => "/etc/resolv.conf",
        })
    }
}

/// Why something was not done, in the three parts that a user sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{error}: {because}")]
pub struct Failure {
    /// What failed.
    pub error: String,
    /// Why.
    pub because: String,
    /// What to do about it; may be empty.
    pub try_: String,
}
