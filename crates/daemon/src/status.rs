//! What `forkd status` shows. The JSON of these types is a contract: fields may be added, none changes its meaning.

use serde::{Deserialize, Serialize};

/// One session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Of the daemon.
    pub version: String,
    /// The kubeconfig context.
    pub context: String,
    /// URL of the API server.
    pub server: String,
    /// Where short names are looked up.
    pub namespace: String,
    /// Who the API server says the user is.
    pub user: String,
    /// The laptop's id.
    pub laptop: String,
    /// When the session began (RFC 3339).
    pub since: String,
    /// How packets travel, e.g. "port-forward via forkd-relay-0"; empty while there is no way.
    pub path: String,
    /// What the laptop is connected to.
    pub agents: Vec<Agent>,
    /// What it holds.
    pub intercepts: Vec<Intercept>,
    /// What goes to the cluster, CIDR text.
    pub routes: Vec<String>,
    /// How names get there.
    pub dns: Option<Dns>,
    /// What is wrong, for a person.
    pub problems: Vec<String>,
    /// The daemon's log file.
    pub log: String,
}

/// An agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agent {
    /// `pod`, `env` or `gateway`.
    pub role: String,
    /// Of its pod.
    pub namespace: String,
    /// Its pod.
    pub pod: String,
    /// Round trip, microseconds.
    pub rtt_us: u64,
}

/// An intercept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intercept {
    /// The fork's id.
    pub fork: String,
    /// Of the Service.
    pub namespace: String,
    /// The Service.
    pub service: String,
    /// Which port goes where.
    pub ports: Vec<crate::control::InterceptedPort>,
    /// Everything, not only what carries the key.
    pub all: bool,
    /// It ends with its command.
    pub attached: bool,
    /// The condition `Ready`.
    pub ready: bool,
    /// What is missing, for a person; empty when ready.
    pub message: String,
    /// "2/2": pods that are routed, of pods that are ready.
    pub routed: String,
    /// Connections that predate the redirect and stay with the application.
    pub older_connections: u32,
}

/// How names get to the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// "systemd-resolved" or "resolv.conf".
    pub mode: String,
    /// The address that answers.
    pub server: String,
    /// The cluster's domain.
    pub domain: String,
    /// Suffixes for short names, best first.
    pub search: Vec<String>,
}
