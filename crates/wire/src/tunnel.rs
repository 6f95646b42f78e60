//! Laptop ⇄ agent: every QUIC stream begins with one [`Open`] from the side that opened it, answered by one
//! [`Opened`]; after an `Opened` with outcome [`Outcome::Ok`] the stream carries raw bytes both ways. FIN is
//! half-close; RESET_STREAM and STOP_SENDING (RFC 9000 §2.4) carry a [`Reset`] code.

/// What a stream is for.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Open {
    /// Absent or unknown kinds are answered with [`Outcome::Unsupported`].
    #[prost(oneof = "open::Kind", tags = "1, 2, 3, 4, 5")]
    pub kind: Option<open::Kind>,
}

/// Kinds of [`Open`].
pub mod open {
    /// One stream is one of these.
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Kind {
        /// Laptop → agent: connect to an address in the cluster.
        #[prost(message, tag = "1")]
        Dial(super::Dial),
        /// Laptop → agent: raw bytes are DNS messages with two-byte lengths (RFC 1035 §4.2.2), any number of them,
        /// answered in any order by id.
        #[prost(message, tag = "2")]
        Dns(super::Dns),
        /// Laptop → agent: raw bytes towards the laptop are the `/proc/PID/environ` of the container, then FIN.
        #[prost(message, tag = "3")]
        Environment(super::Environment),
        /// Laptop → gateway: messages [`super::ClusterInfo`] follow, one at once and one per change.
        #[prost(message, tag = "4")]
        Cluster(super::Cluster),
        /// Agent → laptop: a connection for a target; raw bytes are what its caller sent.
        #[prost(message, tag = "5")]
        Deliver(super::Deliver),
    }
}

/// Connect by TCP from the agent. Refusals come back as [`Outcome`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct Dial {
    /// 4 or 16 bytes, network order.
    #[prost(bytes = "vec", tag = "1")]
    pub ip: Vec<u8>,
    /// 1 to 65535.
    #[prost(uint32, tag = "2")]
    pub port: u32,
}

/// Ask the cluster's own DNS.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Dns {}

/// Read the environment of the running container.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Environment {}

/// Tell what the cluster looks like.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Cluster {}

/// The cluster as a laptop needs to know it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ClusterInfo {
    /// Address of the cluster's DNS service, as text.
    #[prost(string, tag = "1")]
    pub dns_ip: String,
    /// E.g. `cluster.local`.
    #[prost(string, tag = "2")]
    pub domain: String,
    /// Ranges of Services, CIDR text.
    #[prost(string, repeated, tag = "3")]
    pub service_cidrs: Vec<String>,
    /// Ranges of pods, CIDR text.
    #[prost(string, repeated, tag = "4")]
    pub pod_cidrs: Vec<String>,
}

/// A caller's connection, handed to the laptop that holds the target.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Deliver {
    /// `metadata.uid` of the ForkTarget.
    #[prost(string, tag = "1")]
    pub target: String,
    /// The container's port that the caller reached.
    #[prost(uint32, tag = "2")]
    pub port: u32,
    /// The caller's socket address, as text; for logs.
    #[prost(string, tag = "3")]
    pub caller: String,
}

/// The answer to an [`Open`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct Opened {
    /// How it went.
    #[prost(enumeration = "Outcome", tag = "1")]
    pub outcome: i32,
    /// For a person; empty when all is well.
    #[prost(string, tag = "2")]
    pub reason: String,
}

/// How an [`Open`] went. The laptop turns each into what the application would have seen in the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Outcome {
    /// Raw bytes follow.
    Ok = 0,
    /// ECONNREFUSED: the other end said no. The laptop answers RST.
    Refused = 1,
    /// ENETUNREACH. ICMP network unreachable.
    NetworkUnreachable = 2,
    /// EHOSTUNREACH, or an address that nobody has. ICMP host unreachable.
    HostUnreachable = 3,
    /// ETIMEDOUT: nothing was said at all.
    TimedOut = 4,
    /// ECONNRESET during connect.
    Reset = 5,
    /// The user's own RBAC does not reach there. ICMP administratively prohibited.
    Forbidden = 6,
    /// This end does not know the kind, or has no such target.
    Unsupported = 7,
    /// This end is shutting down or out of resources; another agent may do better.
    Unavailable = 8,
}

/// Application error codes of RESET_STREAM and STOP_SENDING.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Reset {
    /// The TCP connection behind the stream was reset (RST).
    ConnectionReset = 1,
    /// Its owner no longer wants it; nothing failed.
    Cancelled = 2,
    /// The first bytes were no valid [`Open`] or [`Opened`].
    Protocol = 3,
}
