//! Which ports of a Service an intercept takes, and where on the laptop each goes. Pure: the Service is an argument.

use std::fmt;
use std::str::FromStr;

use k8s_openapi::api::core::v1::{Service, ServicePort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::{Deserialize, Serialize};

/// `LAPTOP[:REMOTE]` of `--port`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortSpec {
    /// The port on the laptop, 1 to 65535.
    pub laptop: u16,
    /// Which port of the Service; `None` for its only one.
    pub remote: Option<Remote>,
}

/// A port of a Service as a person names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Remote {
    /// By number.
    Number(u16),
    /// By name.
    Name(String),
}

impl fmt::Display for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl FromStr for PortSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (laptop, remote) = text.split_once(':').map_or((text, None), |(l, r)| (l, Some(r)));
        let number = |text: &str| text.parse::<u16>().ok().filter(|port| *port != 0);
        let laptop = number(laptop).ok_or_else(|| {
            format!("`{laptop}` is no port of the laptop (1 to 65535); the form is LAPTOP[:REMOTE]")
        })?;
        let remote = match remote {
            None => None,
            Some("") => return Err("nothing after the colon; the form is LAPTOP[:REMOTE]".to_owned()),
            Some(text) if text.bytes().all(|byte| byte.is_ascii_digit()) => Some(Remote::Number(
                number(text).ok_or_else(|| format!("`{text}` is no port of the Service (1 to 65535)"))?,
            )),
            Some(name) => Some(Remote::Name(name.to_owned())),
        };
        Ok(Self { laptop, remote })
    }
}

/// One port of a Service and where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The Service's port.
    pub port: u16,
    /// What the Service calls the container's port.
    pub target: TargetPort,
    /// The port on the laptop.
    pub laptop: u16,
    /// It speaks HTTP, as far as the Service says.
    pub http: bool,
}

/// A container's port as a Service names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetPort {
    /// By number.
    Number(u16),
    /// By name; each pod may have another number behind it.
    Name(String),
}

/// Why the ports cannot be taken.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    /// Nothing to take.
    #[error("the Service has no ports")]
    NoPorts,
    /// Several ports and no word on which.
    #[error("the Service has several ports: {listed}")]
    Ambiguous {
        /// All of them.
        listed: String,
    },
    /// There is no such port.
    #[error("the Service has no port {wanted}; it has {listed}")]
    NoSuchPort {
        /// As typed.
        wanted: String,
        /// All that there are.
        listed: String,
    },
    /// One port of the Service named twice.
    #[error("port {port} of the Service is named twice")]
    Twice {
        /// The Service's port.
        port: u16,
    },
    /// No key can be read there.
    #[error("port {port} speaks {protocol}, not HTTP: no request in it can carry the fork's key")]
    NotHttp {
        /// The Service's port, with its name.
        port: String,
        /// What it speaks.
        protocol: String,
    },
    /// Only TCP can be taken.
    #[error("port {port} is {protocol}, which cannot be intercepted yet")]
    NotTcp {
        /// The Service's port, with its name.
        port: String,
        /// UDP or SCTP.
        protocol: String,
    },
}

/// Which ports to take. Without a wish it is the Service's only port, and the same number on the laptop as in the
/// container.
///
/// # Errors
/// [`PortError`], with all ports that there are where that helps.
pub fn resolve(service: &Service, wanted: &[PortSpec], all: bool) -> Result<Vec<Mapping>, PortError> {
    let ports = service.spec.as_ref().and_then(|spec| spec.ports.as_deref()).unwrap_or_default();
    let listed = || ports.iter().map(describe).collect::<Vec<_>>().join(", ");
    let only = || match ports {
        [] => Err(PortError::NoPorts),
        [port] => Ok(port),
        _ => Err(PortError::Ambiguous { listed: listed() }),
    };
    if wanted.is_empty() {
        let port = only()?;
        let mut mapping = mapping(port, 0, all)?;
        mapping.laptop = match mapping.target {
            TargetPort::Number(number) => number,
            TargetPort::Name(_) => mapping.port,
        };
        return Ok(vec![mapping]);
    }
    let mut taken: Vec<Mapping> = Vec::with_capacity(wanted.len());
    for spec in wanted {
        let port = match &spec.remote {
            None => only()?,
            Some(remote) => ports
                .iter()
                .find(|port| is(port, remote))
                .ok_or_else(|| PortError::NoSuchPort { wanted: remote.to_string(), listed: listed() })?,
        };
        let mapping = mapping(port, spec.laptop, all)?;
        if taken.iter().any(|other| other.port == mapping.port) {
            return Err(PortError::Twice { port: mapping.port });
        }
        taken.push(mapping);
    }
    Ok(taken)
}

fn is(port: &ServicePort, wanted: &Remote) -> bool {
    match wanted {
        Remote::Number(number) => port.port == i32::from(*number),
        Remote::Name(name) => port.name.as_deref() == Some(name),
    }
}

/// "8080 (http)".
fn describe(port: &ServicePort) -> String {
    let protocol = port.protocol.as_deref().filter(|protocol| *protocol != "TCP");
    match (port.name.as_deref().filter(|name| !name.is_empty()), protocol) {
        (Some(name), Some(protocol)) => format!("{} ({name}, {protocol})", port.port),
        (Some(name), None) => format!("{} ({name})", port.port),
        (None, Some(protocol)) => format!("{} ({protocol})", port.port),
        (None, None) => port.port.to_string(),
    }
}

fn mapping(port: &ServicePort, laptop: u16, all: bool) -> Result<Mapping, PortError> {
    let protocol = port.protocol.as_deref().unwrap_or("TCP");
    if protocol != "TCP" {
        return Err(PortError::NotTcp { port: describe(port), protocol: protocol.to_owned() });
    }
    let other = not_http(port);
    if let Some(protocol) = other.as_ref().filter(|_| !all) {
        return Err(PortError::NotHttp { port: describe(port), protocol: protocol.clone() });
    }
    let number = u16::try_from(port.port)
        .map_err(|_| PortError::NoSuchPort { wanted: port.port.to_string(), listed: describe(port) })?;
    let target = match &port.target_port {
        Some(IntOrString::String(name)) => TargetPort::Name(name.clone()),
        // Zero and absent both mean "as the Service's port" (API reference of ServicePort).
        Some(IntOrString::Int(0)) | None => TargetPort::Number(number),
        Some(IntOrString::Int(target)) => TargetPort::Number(
            u16::try_from(*target)
                .map_err(|_| PortError::NoSuchPort { wanted: target.to_string(), listed: describe(port) })?,
        ),
    };
    Ok(Mapping { port: number, target, laptop, http: other.is_none() })
}

/// Protocols that are no HTTP in the clear, as `appProtocol` or as the first word of a port's name (`redis-main`).
/// Anything else is taken for HTTP until the agent sees otherwise.
const NOT_HTTP: &[&str] = &[
    "tcp",
    "tls",
    "https",
    "redis",
    "mysql",
    "mariadb",
    "postgres",
    "postgresql",
    "mssql",
    "oracle",
    "mongo",
    "mongodb",
    "cassandra",
    "cql",
    "kafka",
    "amqp",
    "amqps",
    "rabbitmq",
    "memcache",
    "memcached",
    "nats",
    "mqtt",
    "ldap",
    "ldaps",
    "smtp",
    "imap",
    "ftp",
    "ssh",
    "dns",
    "etcd-peer",
    "zookeeper",
    "thrift",
    "wss",
];

/// What a port speaks, if the Service says that it is no HTTP. `appProtocol` outweighs the name (KEP-1507).
fn not_http(port: &ServicePort) -> Option<String> {
    let said = match port.app_protocol.as_deref().filter(|protocol| !protocol.is_empty()) {
        // "kubernetes.io/h2c", "example.com/redis"
        Some(protocol) => protocol.rsplit('/').next().unwrap_or(protocol),
        None => port.name.as_deref()?.split('-').next()?,
    };
    let said = said.to_ascii_lowercase();
    NOT_HTTP.contains(&said.as_str()).then_some(said)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::ServiceSpec;

    fn port(name: &str, number: i32) -> ServicePort {
        ServicePort { name: Some(name.to_owned()), port: number, ..Default::default() }
    }

    fn service(ports: Vec<ServicePort>) -> Service {
        Service { spec: Some(ServiceSpec { ports: Some(ports), ..Default::default() }), ..Default::default() }
    }

    fn spec(text: &str) -> PortSpec {
        text.parse().unwrap()
    }

    #[test]
    fn a_port_is_a_number_with_an_optional_number_or_name_behind_a_colon() {
        assert_eq!(spec("8080"), PortSpec { laptop: 8080, remote: None });
        assert_eq!(spec("8080:80"), PortSpec { laptop: 8080, remote: Some(Remote::Number(80)) });
        assert_eq!(spec("8080:http"), PortSpec { laptop: 8080, remote: Some(Remote::Name("http".into())) });
        for wrong in ["", "0", "70000", "http", "8080:", "8080:0", "8080:99999", ":80"] {
            assert!(wrong.parse::<PortSpec>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_only_port_needs_no_name_and_keeps_the_containers_number() {
        let mut only = port("http", 80);
        only.target_port = Some(IntOrString::Int(8080));
        let mapping = resolve(&service(vec![only.clone()]), &[], false).unwrap();
        assert_eq!((mapping[0].port, mapping[0].laptop), (80, 8080));
        only.target_port = Some(IntOrString::String("web".into()));
        let mapping = resolve(&service(vec![only]), &[spec("3000")], false).unwrap();
        assert_eq!((&mapping[0].target, mapping[0].laptop), (&TargetPort::Name("web".into()), 3000));
    }

    #[test]
    fn several_ports_without_a_name_are_listed() {
        let two = service(vec![port("http", 80), port("grpc", 9000)]);
        let error = resolve(&two, &[spec("8080")], false).unwrap_err();
        assert_eq!(error.to_string(), "the Service has several ports: 80 (http), 9000 (grpc)");
        let error = resolve(&two, &[spec("8080:admin")], false).unwrap_err();
        assert_eq!(error.to_string(), "the Service has no port admin; it has 80 (http), 9000 (grpc)");
        let both = resolve(&two, &[spec("8080:80"), spec("9000:grpc")], false).unwrap();
        assert_eq!(both.iter().map(|m| (m.port, m.laptop)).collect::<Vec<_>>(), [(80, 8080), (9000, 9000)]);
        assert_eq!(resolve(&two, &[spec("1:80"), spec("2:http")], false), Err(PortError::Twice { port: 80 }));
    }

    #[test]
    fn a_port_that_says_it_is_no_http_needs_all() {
        let redis = service(vec![port("redis-main", 6379)]);
        assert!(
            matches!(resolve(&redis, &[], false), Err(PortError::NotHttp { protocol, .. }) if protocol == "redis")
        );
        assert!(!resolve(&redis, &[], true).unwrap()[0].http);
        let mut said = port("http", 5432);
        said.app_protocol = Some("postgresql".into());
        assert!(resolve(&service(vec![said.clone()]), &[], false).is_err(), "appProtocol outweighs the name");
        said.app_protocol = Some("kubernetes.io/h2c".into());
        assert!(resolve(&service(vec![said]), &[], false).is_ok());
        assert!(resolve(&service(vec![port("api", 80)]), &[], false).is_ok(), "unknown is taken for HTTP");
    }

    #[test]
    fn udp_is_refused_even_with_all() {
        let mut udp = port("dns", 53);
        udp.protocol = Some("UDP".into());
        assert!(matches!(resolve(&service(vec![udp]), &[], true), Err(PortError::NotTcp { .. })));
        assert_eq!(resolve(&service(vec![]), &[], true), Err(PortError::NoPorts));
    }
}
