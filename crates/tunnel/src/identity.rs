//! Who is who: the URI in a party's certificate, its key, and the TLS configurations made of them.

use std::fmt;
use std::fmt::Write as _;

use forkd_wire::peer::PeerId;
use rustls::pki_types::CertificateDer;
use x509_parser::extensions::{GeneralName, ParsedExtension};

mod authority;
mod credentials;
mod requested;

pub use authority::{Authority, Chain, KeyPair, Request};
pub use credentials::{ClientAuth, Credentials, joining_client_config};
pub use requested::requested;

/// Scheme and authority marker of every identity's URI.
const SCHEME: &str = "forkd://";
/// Domain of the DNS names in certificates. `.internal` is reserved for private use and never in the public DNS.
const DOMAIN: &str = "forkd.internal";
/// DNS name that every relay's certificate has besides its own: agents know relays by address only, and any relay of
/// the cluster will do.
pub const ANY_RELAY: &str = "relay.forkd.internal";
/// What tells the id of an environment agent from that of the pod's first agent.
const ENV_SUFFIX: &str = ".env";

/// A party: what its certificate says it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Identity {
    /// `forkd://laptop/ID?user=…&group=…`
    Laptop {
        /// Stable per user and machine.
        id: String,
        /// The Kubernetes user, as the API server told it in the certificate request.
        user: String,
        /// Their groups, in the API server's order.
        groups: Vec<String>,
    },
    /// `forkd://agent/POD_UID?namespace=…&pod=…&role=…`; with role `env` the id is `POD_UID.env`.
    Agent {
        /// `metadata.uid` of the pod.
        pod_uid: String,
        /// Namespace of the pod.
        namespace: String,
        /// Name of the pod.
        pod: String,
        /// What the agent is there for.
        role: AgentRole,
    },
    /// `forkd://relay/POD`
    Relay {
        /// Name of the relay's pod.
        name: String,
    },
    /// `forkd://controller/forkd`
    Controller,
}

/// What an agent is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum AgentRole {
    /// Takes ports of its pod, and dials on the pod's behalf.
    Pod,
    /// Reads the environment of the application's container.
    Env,
    /// Dials for laptops that have no target; knows the cluster.
    Gateway,
}

impl AgentRole {
    /// As in the URI.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pod => "pod",
            Self::Env => "env",
            Self::Gateway => "gateway",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::Pod, Self::Env, Self::Gateway].into_iter().find(|role| role.as_str() == text)
    }
}

/// Why a certificate, key or URI cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The URI is not that of a party.
    #[error("`{uri}` names no party of forkd: {why}")]
    Uri {
        /// As found.
        uri: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The other side has shown no certificate.
    #[error("the peer has shown no certificate")]
    NoCertificate,
    /// The certificate cannot be read, or does not say who it is for.
    #[error("unusable certificate: {0}")]
    Certificate(String),
    /// The certificate request cannot be read, or its signature is wrong.
    #[error("unusable certificate request: {0}")]
    Request(String),
    /// The private key cannot be read or does not belong to the certificate.
    #[error("unusable private key: {0}")]
    Key(String),
    /// The peer is somebody, but not the one that was called.
    #[error("expected {expected}, found {found}")]
    WrongPeer {
        /// URI of the one that was called.
        expected: String,
        /// URI of the one that answered.
        found: String,
    },
    /// TLS does not take the configuration.
    #[error("TLS configuration: {0}")]
    Tls(#[from] rustls::Error),
}

impl Identity {
    /// The URI SAN of this party's certificates. Canonical: every character beyond `A-Za-z0-9-._~` is percent-encoded.
    pub fn uri(&self) -> String {
        let mut uri = self.name_uri();
        let mut separator = '?';
        let mut add = |key: &str, value: &str| {
            uri.push(separator);
            separator = '&';
            uri.push_str(key);
            uri.push('=');
            percent_encode(value, &mut uri);
        };
        match self {
            Self::Laptop { user, groups, .. } => {
                add("user", user);
                groups.iter().for_each(|group| add("group", group));
            }
            Self::Agent { namespace, pod, role, .. } => {
                add("namespace", namespace);
                add("pod", pod);
                add("role", role.as_str());
            }
            Self::Relay { .. } | Self::Controller => {}
        }
        uri
    }

    /// Reads a URI. Unknown query keys are skipped, so that later versions may add some.
    ///
    /// # Errors
    /// [`IdentityError::Uri`] if it is not exactly one party with all its parts.
    pub fn parse(uri: &str) -> Result<Self, IdentityError> {
        let fail = |why| IdentityError::Uri { uri: uri.chars().take(200).collect(), why };
        let rest = uri.strip_prefix(SCHEME).ok_or(fail("it does not begin with forkd://"))?;
        let (name, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (kind, id) = name.split_once('/').ok_or(fail("it has no id"))?;
        let id = percent_decode(id).ok_or(fail("its id is not percent-encoded UTF-8"))?;
        if id.is_empty() {
            return Err(fail("its id is empty"));
        }
        let mut pairs = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').ok_or(fail("a query part has no value"))?;
            let value = percent_decode(value).ok_or(fail("a query value is not percent-encoded UTF-8"))?;
            pairs.push((key, value));
        }
        let one = |key: &str| {
            let mut values = pairs.iter().filter(|(k, _)| *k == key).map(|(_, value)| value.clone());
            match (values.next(), values.next()) {
                (Some(value), None) if !value.is_empty() => Ok(value),
                _ => Err(fail("a part is missing, empty or twice there")),
            }
        };
        match kind {
            "laptop" => Ok(Self::Laptop {
                id,
                user: one("user")?,
                groups: pairs
                    .iter()
                    .filter(|(key, _)| *key == "group")
                    .map(|(_, value)| value.clone())
                    .collect(),
            }),
            "agent" => {
                let role = AgentRole::parse(&one("role")?).ok_or(fail("its role is unknown"))?;
                let pod_uid = match (role, id.strip_suffix(ENV_SUFFIX)) {
                    (AgentRole::Env, Some(uid)) if !uid.is_empty() => uid.to_owned(),
                    (AgentRole::Pod | AgentRole::Gateway, None) => id,
                    _ => return Err(fail("its id and its role do not belong together")),
                };
                Ok(Self::Agent { pod_uid, namespace: one("namespace")?, pod: one("pod")?, role })
            }
            "relay" => Ok(Self::Relay { name: id }),
            "controller" if id == "forkd" => Ok(Self::Controller),
            _ => Err(fail("its kind is unknown")),
        }
    }

    /// Eight bytes that stand for this party in relay frames.
    pub fn peer_id(&self) -> PeerId {
        PeerId::of_uri(&self.name_uri())
    }

    /// The DNS SAN, which TLS checks when this party is called: `ID.KIND.forkd.internal`. An id that is no DNS label
    /// (RFC 1123) is replaced by `x-` and its peer id in hex.
    pub fn dns_name(&self) -> String {
        let (kind, id) = self.kind_and_id();
        let is_label = (1..=63).contains(&id.len())
            && id.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
            && !id.starts_with('-')
            && !id.ends_with('-')
            && !id.starts_with("x-");
        if is_label {
            format!("{id}.{kind}.{DOMAIN}")
        } else {
            format!("x-{}.{kind}.{DOMAIN}", self.peer_id())
        }
    }

    /// For logs: kind and id, without the query.
    pub fn short(&self) -> String {
        let (kind, id) = self.kind_and_id();
        format!("{kind}/{id}")
    }

    /// Checks that a peer is this party; user, groups, namespace and role count too.
    ///
    /// # Errors
    /// [`IdentityError::WrongPeer`] with both URIs.
    pub fn expect(&self, found: &Self) -> Result<(), IdentityError> {
        if self == found {
            return Ok(());
        }
        Err(IdentityError::WrongPeer { expected: self.uri(), found: found.uri() })
    }

    /// The URI without query: what the peer id is made of.
    fn name_uri(&self) -> String {
        let (kind, id) = self.kind_and_id();
        let mut uri = format!("{SCHEME}{kind}/");
        percent_encode(&id, &mut uri);
        uri
    }

    fn kind_and_id(&self) -> (&'static str, String) {
        match self {
            Self::Laptop { id, .. } => ("laptop", id.clone()),
            Self::Agent { pod_uid, role: AgentRole::Env, .. } => ("agent", format!("{pod_uid}{ENV_SUFFIX}")),
            Self::Agent { pod_uid, .. } => ("agent", pod_uid.clone()),
            Self::Relay { name } => ("relay", name.clone()),
            Self::Controller => ("controller", "forkd".to_owned()),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri())
    }
}

/// Who a certificate is for. Says nothing about whether the certificate is to be trusted: that is TLS's part.
///
/// # Errors
/// [`IdentityError::Certificate`] unless it has exactly one URI SAN, [`IdentityError::Uri`] if that is no party.
pub fn identity_of(certificate: &CertificateDer<'_>) -> Result<Identity, IdentityError> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate)
        .map_err(|error| IdentityError::Certificate(error.to_string()))?;
    let mut uris = parsed.extensions().iter().flat_map(|extension| match extension.parsed_extension() {
        ParsedExtension::SubjectAlternativeName(san) => san.general_names.as_slice(),
        _ => &[],
    });
    let mut found = None;
    for name in &mut uris {
        if let GeneralName::URI(uri) = name
            && found.replace(*uri).is_some()
        {
            return Err(IdentityError::Certificate("it has more than one URI".to_owned()));
        }
    }
    Identity::parse(found.ok_or_else(|| IdentityError::Certificate("it has no URI".to_owned()))?)
}

/// Who is at the other end of a TLS connection: `peer_certificates()` of rustls.
///
/// # Errors
/// [`IdentityError::NoCertificate`] if the peer has shown none; else as [`identity_of`].
pub fn identity_of_chain(chain: Option<&[CertificateDer<'_>]>) -> Result<Identity, IdentityError> {
    identity_of(chain.and_then(<[_]>::first).ok_or(IdentityError::NoCertificate)?)
}

/// Who is at the other end of a QUIC connection.
///
/// # Errors
/// As [`identity_of_chain`].
pub fn peer_identity(connection: &quinn::Connection) -> Result<Identity, IdentityError> {
    let chain =
        connection.peer_identity().and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
    identity_of_chain(chain.as_deref().map(Vec::as_slice))
}

/// Appends `text`, with all but RFC 3986's unreserved characters as `%XX`.
fn percent_encode(text: &str, to: &mut String) {
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => to.push(char::from(byte)),
            // Writing to a String cannot fail.
            _ => drop(write!(to, "%{byte:02X}")),
        }
    }
}

/// The inverse of [`percent_encode`]; `None` for broken escapes and what is not UTF-8.
fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let (digits, tail) = rest.split_first_chunk::<2>()?;
        let digit = |at: usize| char::from(digits[at]).to_digit(16);
        bytes.push(u8::try_from(digit(0)? * 16 + digit(1)?).ok()?);
        rest = tail;
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests;
