//! Agent, gateway and relay ⇄ controller: one TLS connection (ALPN [`crate::ALPN_CONTROL`]) of length-delimited
//! messages. It begins either with a client certificate or, without one, with a [`Join`] that earns one; from then on
//! the connection counts as the party's own.

/// Towards the controller.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ToController {
    /// Unknown kinds are skipped.
    #[prost(oneof = "to_controller::Kind", tags = "1, 2, 3, 4")]
    pub kind: Option<to_controller::Kind>,
}

/// Kinds of [`ToController`].
pub mod to_controller {
    /// One message is one of these.
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Kind {
        /// First message of a connection without client certificate.
        #[prost(message, tag = "1")]
        Join(super::Join),
        /// A new certificate, please: the old one is past two thirds of its life.
        #[prost(message, tag = "2")]
        Renew(super::Renew),
        /// What an agent did with the desired state.
        #[prost(message, tag = "3")]
        Status(super::Status),
        /// May this user reach this address?
        #[prost(message, tag = "4")]
        Authorize(super::Authorize),
    }
}

/// Proof of which pod is talking, and a request for a certificate.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Join {
    /// How the pod proves itself.
    #[prost(oneof = "join::Proof", tags = "1, 2")]
    pub proof: Option<join::Proof>,
    /// PKCS#10 request, DER. Only its public key is used: the controller decides what the certificate says.
    #[prost(bytes = "vec", tag = "3")]
    pub csr: Vec<u8>,
}

/// Proofs of [`Join`].
pub mod join {
    /// One of these.
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Proof {
        /// The one-time token in the environment of an agent's container.
        #[prost(string, tag = "1")]
        JoinToken(String),
        /// A projected service account token with audience `forkd` (relay and gateway).
        #[prost(string, tag = "2")]
        ServiceAccountToken(String),
    }
}

/// A request for a new certificate of the same identity.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Renew {
    /// PKCS#10 request, DER.
    #[prost(bytes = "vec", tag = "1")]
    pub csr: Vec<u8>,
}

/// What an agent did with [`Desired`]; sent after each change, and once a minute.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Status {
    /// The `generation` of the newest [`Desired`] that is in effect.
    #[prost(uint64, tag = "1")]
    pub generation: u64,
    /// Ports that are redirected to the agent at the moment.
    #[prost(message, repeated, tag = "2")]
    pub ports: Vec<PortStatus>,
    /// Laptop ids with a live QUIC connection to this agent.
    #[prost(string, repeated, tag = "3")]
    pub laptops: Vec<String>,
    /// Why the desired state is not in effect; empty when it is.
    #[prost(string, tag = "4")]
    pub error: String,
}

/// One redirected port.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PortStatus {
    /// Container port.
    #[prost(uint32, tag = "1")]
    pub port: u32,
    /// Connections to it that predate the redirect and are still open: they stay with the application.
    #[prost(uint32, tag = "2")]
    pub older_connections: u32,
    /// Connections on which this port's traffic turned out not to be HTTP while a keyed target wanted it.
    #[prost(uint32, tag = "3")]
    pub opaque_connections: u32,
}

/// May this user reach this address? Answered by [`Authorized`] with the same id.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Authorize {
    /// Chosen by the sender.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Who, from the laptop's certificate.
    #[prost(message, optional, tag = "2")]
    pub user: Option<User>,
    /// What for.
    #[prost(oneof = "authorize::Action", tags = "3, 4")]
    pub action: Option<authorize::Action>,
}

/// Actions of [`Authorize`].
pub mod authorize {
    /// One of these.
    #[derive(Clone, PartialEq, Eq, Hash, prost::Oneof)]
    pub enum Action {
        /// To dial this address (4 or 16 bytes): asks for `create pods/portforward` in the namespace that it belongs to.
        #[prost(bytes = "vec", tag = "3")]
        Dial(Vec<u8>),
        /// To read the environment of the sender's pod: asks for `create pods/exec` in its namespace.
        #[prost(message, tag = "4")]
        Environment(super::ReadEnvironment),
    }
}

/// See [`authorize::Action::Environment`].
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct ReadEnvironment {}

/// A Kubernetes user, as the API server told it in the certificate request.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct User {
    /// User name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Groups.
    #[prost(string, repeated, tag = "2")]
    pub groups: Vec<String>,
}

/// From the controller.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FromController {
    /// Unknown kinds are skipped.
    #[prost(oneof = "from_controller::Kind", tags = "1, 2, 3, 4")]
    pub kind: Option<from_controller::Kind>,
}

/// Kinds of [`FromController`].
pub mod from_controller {
    /// One message is one of these.
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Kind {
        /// The answer to a join or renewal.
        #[prost(message, tag = "1")]
        Certificate(super::Certificate),
        /// What an agent is to do; each replaces the one before.
        #[prost(message, tag = "2")]
        Desired(super::Desired),
        /// The answer to an [`super::Authorize`].
        #[prost(message, tag = "3")]
        Authorized(super::Authorized),
        /// The receiver is to undo its redirects and exit 0.
        #[prost(message, tag = "4")]
        Retire(super::Retire),
    }
}

/// A certificate, or why there is none.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Certificate {
    /// DER, leaf first, authority last; empty on refusal.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub chain: Vec<Vec<u8>>,
    /// Why it was refused; empty otherwise.
    #[prost(string, tag = "2")]
    pub refused: String,
}

/// What an agent is to do.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Desired {
    /// Grows with each change for this agent.
    #[prost(uint64, tag = "1")]
    pub generation: u64,
    /// Socket addresses of all relays, as text.
    #[prost(string, repeated, tag = "2")]
    pub relays: Vec<String>,
    /// Targets in this pod; empty for a gateway. An agent whose list is empty removes its redirects.
    #[prost(message, repeated, tag = "3")]
    pub routes: Vec<Route>,
    /// For the gateway: what laptops are told.
    #[prost(message, optional, tag = "4")]
    pub cluster: Option<crate::tunnel::ClusterInfo>,
    /// Laptops (ids) for which this agent reads the environment of its target container.
    #[prost(string, repeated, tag = "5")]
    pub environment_for: Vec<String>,
}

/// One port of one target in this pod.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Route {
    /// `metadata.uid` of the ForkTarget.
    #[prost(string, tag = "1")]
    pub target: String,
    /// The fork's id: the value of the key.
    #[prost(string, tag = "2")]
    pub fork: String,
    /// `namespace/service`, for `forkd-served-by` and messages.
    #[prost(string, tag = "3")]
    pub service: String,
    /// The laptop that holds the target.
    #[prost(string, tag = "4")]
    pub laptop: String,
    /// The Kubernetes user who owns the target; the laptop's certificate must name it.
    #[prost(string, tag = "5")]
    pub owner: String,
    /// Container port.
    #[prost(uint32, tag = "6")]
    pub port: u32,
    /// Take everything, not only what carries the key.
    #[prost(bool, tag = "7")]
    pub all: bool,
    /// What keyed requests get while the laptop is gone.
    #[prost(enumeration = "OnUnavailable", tag = "8")]
    pub on_unavailable: i32,
    /// The kubelet probes this port by TCP: an empty connection is a probe, and stays in the pod.
    #[prost(bool, tag = "9")]
    pub tcp_probe: bool,
}

/// What a keyed request gets while its laptop cannot be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum OnUnavailable {
    /// A 503 that says why.
    Error = 0,
    /// The answer of the application in the pod.
    Baseline = 1,
}

/// The answer to an [`Authorize`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct Authorized {
    /// Of the question.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// The verdict.
    #[prost(enumeration = "Verdict", tag = "2")]
    pub verdict: i32,
    /// For a person: which verb on which resource is missing.
    #[prost(string, tag = "3")]
    pub reason: String,
    /// How long the answer may be reused, seconds.
    #[prost(uint32, tag = "4")]
    pub ttl_s: u32,
}

/// May they?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Verdict {
    /// No: their RBAC says so. (The default: a missing field never allows.)
    Denied = 0,
    /// Yes.
    Allowed = 1,
    /// Nothing in the cluster has this address.
    NoSuchAddress = 2,
}

/// Stop for good.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Retire {
    /// For the log.
    #[prost(string, tag = "1")]
    pub reason: String,
}
