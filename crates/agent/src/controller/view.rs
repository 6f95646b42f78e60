//! What the controller remembers of pods, Services, nodes and forks: a few hundred bytes each instead of the whole
//! object, since every pod of the cluster is here.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use forkd_api::names;
use k8s_openapi::api::core::v1::{
    Container, ContainerState, EphemeralContainer, Node, Pod, Probe, SecurityContext, Service,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::Timestamp;

/// Ephemeral containers of agents begin with this.
pub const AGENT_PREFIX: &str = "forkd-agent";
/// Ephemeral containers that read an application's environment begin with this.
pub const ENV_PREFIX: &str = "forkd-env";

/// An agent that ran for so long had started well.
const LONG: Duration = Duration::from_secs(60);

/// What an ephemeral container of forkd is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Purpose {
    /// Takes the pod's ports.
    Pod,
    /// Reads the environment of a container.
    Env,
}

impl Purpose {
    /// Name of the `number`th such container in a pod: the same for whoever asks, so that two patches cannot make two.
    pub fn container_name(self, pod_uid: &str, number: usize) -> String {
        let prefix = match self {
            Self::Pod => AGENT_PREFIX,
            Self::Env => ENV_PREFIX,
        };
        names::hashed(prefix, &[pod_uid, &number.to_string()])
    }

    /// Whose name this is.
    pub fn of_name(name: &str) -> Option<Self> {
        let is = |prefix: &str| name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('-'));
        if is(AGENT_PREFIX) {
            Some(Self::Pod)
        } else if is(ENV_PREFIX) {
            Some(Self::Env)
        } else {
            None
        }
    }

    /// Id of the agent in its certificate (see the table in `crates/README.md`).
    pub fn agent_id(self, pod_uid: &str) -> String {
        match self {
            Self::Pod => pod_uid.to_owned(),
            Self::Env => format!("{pod_uid}.env"),
        }
    }
}

/// A pod.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PodView {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub labels: BTreeMap<String, String>,
    pub ips: Vec<IpAddr>,
    pub host_network: bool,
    /// Its Ready condition is true, and nobody has asked for its end.
    pub ready: bool,
    /// It has a deletion timestamp.
    pub terminating: bool,
    /// Succeeded or Failed: its address may be another's already.
    pub finished: bool,
    /// `runAsNonRoot` of the pod as a whole.
    pub non_root: bool,
    /// A user is set for the pod as a whole.
    pub has_user: bool,
    /// Those that run as long as the pod: also init containers that restart always (sidecars).
    pub containers: Vec<ContainerView>,
    /// forkd's own, in no particular order.
    pub agents: Vec<AgentView>,
}

/// A container of an application.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ContainerView {
    pub name: String,
    pub ports: Vec<PortView>,
    /// Ports that the kubelet probes by TCP.
    pub tcp_probes: Vec<u16>,
    pub security_context: Option<SecurityContext>,
    /// The user it runs as, where the kubelet tells.
    pub uid: Option<i64>,
}

/// A declared TCP port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortView {
    pub name: String,
    pub port: u16,
}

/// An ephemeral container of forkd.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentView {
    pub name: String,
    pub purpose: Purpose,
    pub image: String,
    pub target_container: String,
    pub state: AgentState,
}

/// How far it is.
#[derive(Clone, Debug, PartialEq)]
pub enum AgentState {
    /// Nothing is said yet, or it is on its way.
    Starting,
    /// The kubelet cannot start it, and says why: image, runtime.
    Stuck { reason: String, message: String },
    /// It runs.
    Running { since: Timestamp },
    /// It has ended, and will not be started again: ephemeral containers never are.
    Ended {
        code: i32,
        at: Option<Timestamp>,
        /// It had run for a while ([`LONG`]), so it was no failure to start.
        ran_long: bool,
        message: String,
    },
}

impl PodView {
    /// Takes what is needed of a pod.
    pub fn of(pod: &Pod) -> Self {
        let meta = &pod.metadata;
        let status = pod.status.as_ref();
        let spec = pod.spec.as_ref();
        let condition = |kind: &str| {
            status.and_then(|s| s.conditions.as_ref()).is_some_and(|conditions| {
                conditions.iter().any(|condition| condition.type_ == kind && condition.status == "True")
            })
        };
        let phase = status.and_then(|s| s.phase.as_deref()).unwrap_or_default();
        let terminating = meta.deletion_timestamp.is_some();
        let finished = matches!(phase, "Succeeded" | "Failed");
        let context = spec.and_then(|spec| spec.security_context.as_ref());
        Self {
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
            uid: meta.uid.clone().unwrap_or_default(),
            labels: meta.labels.clone().unwrap_or_default(),
            ips: pod_ips(pod),
            host_network: spec.and_then(|spec| spec.host_network).unwrap_or(false),
            ready: condition("Ready") && !terminating && !finished,
            terminating,
            finished,
            non_root: context.and_then(|context| context.run_as_non_root).unwrap_or(false),
            has_user: context.is_some_and(|context| context.run_as_user.is_some()),
            containers: containers(pod),
            agents: spec
                .and_then(|spec| spec.ephemeral_containers.as_ref())
                .into_iter()
                .flatten()
                .filter_map(|container| agent(pod, container))
                .collect(),
        }
    }

    /// Whether a selector picks it. An empty one picks nothing, as in a Service.
    pub fn is_selected_by(&self, selector: &BTreeMap<String, String>) -> bool {
        !selector.is_empty() && selector.iter().all(|(key, value)| self.labels.get(key) == Some(value))
    }

    /// The container port behind a Service's port, and the container that declares it (the first, if none does).
    pub fn target_port(&self, port: &ServicePortView) -> Option<(u16, &ContainerView)> {
        match &port.target {
            TargetPort::Number(number) => {
                let declares =
                    |container: &&ContainerView| container.ports.iter().any(|port| port.port == *number);
                let container = self.containers.iter().find(declares).or(self.containers.first())?;
                Some((*number, container))
            }
            TargetPort::Name(name) => self.containers.iter().find_map(|container| {
                let port = container.ports.iter().find(|port| port.name == *name)?;
                Some((port.port, container))
            }),
        }
    }
}

/// All addresses of a pod, the primary one first.
fn pod_ips(pod: &Pod) -> Vec<IpAddr> {
    let Some(status) = &pod.status else { return Vec::new() };
    let mut ips: Vec<IpAddr> = status.pod_ip.iter().filter_map(|ip| ip.parse().ok()).collect();
    for ip in status.pod_ips.iter().flatten().filter_map(|ip| ip.ip.parse().ok()) {
        if !ips.contains(&ip) {
            ips.push(ip);
        }
    }
    ips
}

fn containers(pod: &Pod) -> Vec<ContainerView> {
    let Some(spec) = &pod.spec else { return Vec::new() };
    let sidecars = spec
        .init_containers
        .iter()
        .flatten()
        .filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let uid = |name: &str| {
        let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
        let status = statuses.iter().find(|status| status.name == name)?;
        Some(status.user.as_ref()?.linux.as_ref()?.uid)
    };
    spec.containers
        .iter()
        .chain(sidecars)
        .map(|container| ContainerView {
            name: container.name.clone(),
            ports: tcp_ports(container),
            tcp_probes: tcp_probes(container),
            security_context: container.security_context.clone(),
            uid: uid(&container.name),
        })
        .collect()
}

fn tcp_ports(container: &Container) -> Vec<PortView> {
    let is_tcp = |protocol: Option<&str>| protocol.is_none_or(|protocol| protocol == "TCP");
    container
        .ports
        .iter()
        .flatten()
        .filter(|port| is_tcp(port.protocol.as_deref()))
        .filter_map(|port| {
            let number = u16::try_from(port.container_port).ok()?;
            Some(PortView { name: port.name.clone().unwrap_or_default(), port: number })
        })
        .collect()
}

fn tcp_probes(container: &Container) -> Vec<u16> {
    let probes = [&container.liveness_probe, &container.readiness_probe, &container.startup_probe];
    let number = |probe: &Probe| match &probe.tcp_socket.as_ref()?.port {
        IntOrString::Int(number) => u16::try_from(*number).ok(),
        IntOrString::String(name) => {
            let port = container.ports.iter().flatten().find(|port| port.name.as_ref() == Some(name))?;
            u16::try_from(port.container_port).ok()
        }
    };
    probes.into_iter().flatten().filter_map(number).collect()
}

fn agent(pod: &Pod, container: &EphemeralContainer) -> Option<AgentView> {
    let statuses = pod.status.as_ref().and_then(|status| status.ephemeral_container_statuses.as_ref());
    let status = statuses.into_iter().flatten().find(|status| status.name == container.name);
    Some(AgentView {
        name: container.name.clone(),
        purpose: Purpose::of_name(&container.name)?,
        image: container.image.clone().unwrap_or_default(),
        target_container: container.target_container_name.clone().unwrap_or_default(),
        state: state(status.and_then(|status| status.state.as_ref())),
    })
}

fn state(state: Option<&ContainerState>) -> AgentState {
    let Some(state) = state else { return AgentState::Starting };
    if let Some(ended) = &state.terminated {
        // With FallbackToLogsOnError the message is the end of the log; its last line says what went wrong.
        let last = ended.message.as_deref().and_then(|message| message.trim().lines().last());
        let said = last.or(ended.reason.as_deref()).unwrap_or_default();
        let ran = match (&ended.started_at, &ended.finished_at) {
            (Some(from), Some(to)) => Duration::try_from(to.0.duration_since(from.0)).unwrap_or_default(),
            _ => Duration::ZERO,
        };
        return AgentState::Ended {
            code: ended.exit_code,
            ran_long: ran >= LONG,
            at: ended.finished_at.as_ref().map(|time| time.0),
            message: said.chars().take(300).collect(),
        };
    }
    if let Some(since) = state.running.as_ref().map(|running| running.started_at.as_ref()) {
        return AgentState::Running { since: since.map_or(Timestamp::UNIX_EPOCH, |time| time.0) };
    }
    match &state.waiting {
        // The two reasons of a container that is simply on its way.
        Some(waiting) => match waiting.reason.as_deref() {
            None | Some("ContainerCreating" | "PodInitializing") => AgentState::Starting,
            Some(reason) => AgentState::Stuck {
                reason: reason.to_owned(),
                message: waiting.message.clone().unwrap_or_default(),
            },
        },
        None => AgentState::Starting,
    }
}

/// A Service.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ServiceView {
    pub namespace: String,
    pub name: String,
    pub selector: BTreeMap<String, String>,
    /// Its cluster IPs; none for a headless one.
    pub ips: Vec<IpAddr>,
    pub ports: Vec<ServicePortView>,
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq)]
pub struct ServicePortView {
    pub name: String,
    pub port: u16,
    pub protocol: String,
    pub target: TargetPort,
}

/// Which port of a pod is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetPort {
    Number(u16),
    /// The name of a port of a container; may be another number in every pod.
    Name(String),
}

impl ServiceView {
    /// Takes what is needed of a Service.
    pub fn of(service: &Service) -> Self {
        let meta = &service.metadata;
        let spec = service.spec.as_ref();
        let ips = spec.and_then(|spec| spec.cluster_ips.clone()).unwrap_or_default();
        let external = spec.and_then(|spec| spec.type_.as_deref()) == Some("ExternalName");
        Self {
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
            // The selector of an ExternalName Service is ignored by everybody.
            selector: spec.filter(|_| !external).and_then(|spec| spec.selector.clone()).unwrap_or_default(),
            ips: ips.iter().filter_map(|ip| ip.parse().ok()).collect(),
            ports: spec
                .and_then(|spec| spec.ports.as_ref())
                .into_iter()
                .flatten()
                .filter_map(|port| {
                    let number = u16::try_from(port.port).ok()?;
                    let target = match &port.target_port {
                        None | Some(IntOrString::Int(0)) => TargetPort::Number(number),
                        Some(IntOrString::Int(target)) => TargetPort::Number(u16::try_from(*target).ok()?),
                        Some(IntOrString::String(name)) => TargetPort::Name(name.clone()),
                    };
                    Some(ServicePortView {
                        name: port.name.clone().unwrap_or_default(),
                        port: number,
                        protocol: port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()),
                        target,
                    })
                })
                .collect(),
        }
    }
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeView {
    pub name: String,
    pub ips: Vec<IpAddr>,
    /// Ranges of its pods, where the cluster assigns them (`spec.podCIDRs`).
    pub pod_cidrs: Vec<String>,
}

impl NodeView {
    /// Takes what is needed of a node.
    pub fn of(node: &Node) -> Self {
        let addresses = node.status.as_ref().and_then(|status| status.addresses.as_ref());
        Self {
            name: node.metadata.name.clone().unwrap_or_default(),
            ips: addresses.into_iter().flatten().filter_map(|address| address.address.parse().ok()).collect(),
            pod_cidrs: node.spec.as_ref().and_then(|spec| spec.pod_cidrs.clone()).unwrap_or_default(),
        }
    }
}
