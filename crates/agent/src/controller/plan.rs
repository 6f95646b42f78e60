//! What is to be in a namespace, given its pods, Services, targets and forks: claims, routes, agents. Decides only.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use forkd_api::{Fork, ForkTarget, OnUnavailable, Traffic};
use forkd_wire::control::{self, Route};
use k8s_openapi::jiff::Timestamp;

use super::view::{AgentState, AgentView, PodView, Purpose, ServicePortView, ServiceView};

/// What stands in the way of a target; becomes the reason and message of its conditions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// CamelCase, for programs.
    pub reason: &'static str,
    /// A sentence, for people.
    pub message: String,
}

fn problem(reason: &'static str, message: String) -> Problem {
    Problem { reason, message }
}

/// One target and the pods behind it.
#[derive(Clone, Debug)]
pub struct TargetPlan {
    pub target: Arc<ForkTarget>,
    /// If set, no pod gets a route for this target.
    pub problem: Option<Problem>,
    /// Pods that the Service selects and that are not finished, by name.
    pub pods: Vec<PodPlan>,
    /// Where the environment is read.
    pub environment: Option<Environment>,
}

/// A target in one pod.
#[derive(Clone, Debug)]
pub struct PodPlan {
    pub pod: Arc<PodView>,
    /// Container ports of the target.
    pub ports: Vec<u16>,
    /// The container that has the first of them.
    pub container: String,
    /// Why it has no route in this pod alone.
    pub problem: Option<Problem>,
}

/// The agent that reads an environment for a target.
#[derive(Clone, Debug)]
pub struct Environment {
    pub pod: Arc<PodView>,
    pub container: String,
}

/// Everything about a namespace.
#[derive(Debug, Default)]
pub struct Plan {
    /// Oldest first: the order in which claims count.
    pub targets: Vec<TargetPlan>,
    /// Routes by agent id.
    pub routes: BTreeMap<String, Vec<Route>>,
    /// Laptops that may ask an agent for an environment, by agent id.
    pub environment_for: BTreeMap<String, Vec<String>>,
}

/// What [`plan`] looks at.
pub struct Input<'a> {
    pub namespace: &'a str,
    pub pods: Vec<Arc<PodView>>,
    pub services: &'a dyn Fn(&str) -> Option<Arc<ServiceView>>,
    pub targets: Vec<Arc<ForkTarget>>,
    pub forks: &'a dyn Fn(&str) -> Option<Arc<Fork>>,
}

/// What only one target can have.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Claim {
    /// A Service in a fork.
    Fork(String, String),
    /// Everything that comes to a port of a Service.
    Everything(String, u16),
    /// A container port in a pod: a fork's requests, or (without a fork) everything. Two Services may share pods.
    Port(String, u16, Option<String>),
}

/// Decides. Total: whatever is in the objects, there is a plan.
pub fn plan(input: &Input<'_>) -> Plan {
    let mut targets: Vec<_> =
        input.targets.iter().filter(|target| target.metadata.deletion_timestamp.is_none()).collect();
    targets.sort_by_key(|target| (age(target), !holds(target), target.metadata.uid.clone()));
    let mut plan = Plan::default();
    let mut claims: HashMap<Claim, Arc<ForkTarget>> = HashMap::new();
    for target in targets {
        let mut planned = resolve(input, target);
        if planned.problem.is_none() {
            planned.problem = take_claims(&planned, &mut claims);
        }
        plan.targets.push(planned);
    }
    for target in &plan.targets {
        add_routes(input.namespace, target, &mut plan.routes);
    }
    place_environments(&mut plan);
    plan
}

fn age(target: &ForkTarget) -> Timestamp {
    target.metadata.creation_timestamp.as_ref().map_or(Timestamp::MAX, |time| time.0)
}

/// It has what it claims already. Creation times are whole seconds: of two claims of one second, the first keeps it.
fn holds(target: &ForkTarget) -> bool {
    let conditions = target.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
    conditions.iter().any(|c| c.type_ == forkd_api::condition::ROUTED && c.status == "True")
}

/// Fork, Service, ports and pods of one target.
fn resolve(input: &Input<'_>, target: &Arc<ForkTarget>) -> TargetPlan {
    let mut planned =
        TargetPlan { target: Arc::clone(target), problem: None, pods: Vec::new(), environment: None };
    let spec = &target.spec;
    match (input.forks)(&spec.fork) {
        None => planned.problem = Some(problem("NoSuchFork", format!("there is no Fork {}", spec.fork))),
        Some(fork) if fork.metadata.deletion_timestamp.is_some() => {
            planned.problem = Some(problem("NoSuchFork", format!("Fork {} is being deleted", spec.fork)));
        }
        Some(fork) if fork.spec.owner != spec.owner => {
            let message =
                format!("Fork {} belongs to {}, this target to {}", spec.fork, fork.spec.owner, spec.owner);
            planned.problem = Some(problem("NotYourFork", message));
        }
        Some(_) => {}
    }
    if planned.problem.is_some() {
        return planned;
    }
    let Some(service) = (input.services)(&spec.service) else {
        let message = format!("there is no Service {} in namespace {}", spec.service, input.namespace);
        planned.problem = Some(problem("NoSuchService", message));
        return planned;
    };
    if service.selector.is_empty() {
        let message = format!("Service {} selects no pods, so there is nothing to take over", spec.service);
        planned.problem = Some(problem("NoSelector", message));
        return planned;
    }
    let ports = match service_ports(&service, target) {
        Ok(ports) => ports,
        Err(problem) => {
            planned.problem = Some(problem);
            return planned;
        }
    };
    let selected = input.pods.iter().filter(|pod| !pod.finished && pod.is_selected_by(&service.selector));
    planned.pods = selected.map(|pod| in_pod(pod, &ports)).collect();
    planned.pods.sort_by(|a, b| a.pod.name.cmp(&b.pod.name));
    planned.problem = pods_problem(&planned, &service);
    planned
}

fn service_ports(service: &ServiceView, target: &ForkTarget) -> Result<Vec<ServicePortView>, Problem> {
    let mut ports = Vec::new();
    for wanted in &target.spec.ports {
        let of_number = |port: &&ServicePortView| i32::from(port.port) == wanted.port;
        let mut found = service.ports.iter().filter(of_number).peekable();
        if found.peek().is_none() {
            let all: Vec<String> = service.ports.iter().map(|port| port.port.to_string()).collect();
            let message =
                format!("Service {} has no port {} (it has {})", service.name, wanted.port, all.join(", "));
            return Err(problem("NoSuchPort", message));
        }
        match found.find(|port| port.protocol == "TCP") {
            Some(port) => ports.push(port.clone()),
            None => {
                let message = format!("port {} of Service {} is not TCP", wanted.port, service.name);
                return Err(problem("UnsupportedPort", message));
            }
        }
    }
    if ports.is_empty() {
        return Err(problem("NoSuchPort", "the target names no port".to_owned()));
    }
    Ok(ports)
}

fn in_pod(pod: &Arc<PodView>, ports: &[ServicePortView]) -> PodPlan {
    let mut planned =
        PodPlan { pod: Arc::clone(pod), ports: Vec::new(), container: String::new(), problem: None };
    for port in ports {
        match pod.target_port(port) {
            Some((number, container)) => {
                if planned.container.is_empty() {
                    planned.container.clone_from(&container.name);
                }
                if !planned.ports.contains(&number) {
                    planned.ports.push(number);
                }
            }
            None => {
                let message = format!("pod {} has no port for port {} of the Service", pod.name, port.port);
                planned.problem = Some(problem("NoSuchPort", message));
            }
        }
    }
    planned
}

/// What is wrong with the pods as a whole.
fn pods_problem(target: &TargetPlan, service: &ServiceView) -> Option<Problem> {
    if let Some(on_host) = target.pods.iter().find(|planned| planned.pod.host_network) {
        // A redirect there would be one for the whole node.
        let message =
            format!("pod {} uses the network of its node, where forkd redirects nothing", on_host.pod.name);
        return Some(problem("HostNetwork", message));
    }
    if target.pods.is_empty() {
        return Some(problem("NoPods", format!("Service {} has no pods", service.name)));
    }
    let mut ready = target.pods.iter().filter(|planned| planned.pod.ready);
    match ready.next() {
        // Those that are not ready keep what they have; they may be in the middle of a restart.
        None => None,
        Some(first) => {
            let first = first.problem.clone()?;
            ready.all(|planned| planned.problem.is_some()).then_some(first)
        }
    }
}

/// Takes all claims of a target, or none if somebody has one of them.
fn take_claims(target: &TargetPlan, claims: &mut HashMap<Claim, Arc<ForkTarget>>) -> Option<Problem> {
    let spec = &target.target.spec;
    let all = spec.traffic == Traffic::All;
    let mut wanted = vec![Claim::Fork(spec.fork.clone(), spec.service.clone())];
    if all {
        let port = |port: &forkd_api::TargetPort| u16::try_from(port.port).ok();
        wanted.extend(
            spec.ports.iter().filter_map(port).map(|port| Claim::Everything(spec.service.clone(), port)),
        );
    }
    for planned in &target.pods {
        for port in &planned.ports {
            wanted.push(Claim::Port(planned.pod.uid.clone(), *port, Some(spec.fork.clone())));
            if all {
                wanted.push(Claim::Port(planned.pod.uid.clone(), *port, None));
            }
        }
    }
    let taken = wanted.iter().find_map(|claim| Some((claim, claims.get(claim)?)));
    if let Some((claim, holder)) = taken {
        let what = match claim {
            Claim::Fork(..) | Claim::Port(_, _, Some(_)) => format!("requests of fork {}", spec.fork),
            Claim::Everything(..) | Claim::Port(_, _, None) => "all requests".to_owned(),
        };
        let message = format!("{what} to Service {} are held by {}", spec.service, describe(holder));
        return Some(problem("Claimed", message));
    }
    for claim in wanted {
        claims.insert(claim, Arc::clone(&target.target));
    }
    None
}

/// Who holds a target, for the one who would like to have it.
fn describe(holder: &ForkTarget) -> String {
    let spec = &holder.spec;
    let host = if spec.laptop.host.is_empty() { &spec.laptop.id } else { &spec.laptop.host };
    let since = holder
        .metadata
        .creation_timestamp
        .as_ref()
        .map_or_else(String::new, |time| format!(" since {}", time.0));
    format!(
        "{} on laptop {host} (fork {}, Service {}, ForkTarget {}){since}",
        spec.owner,
        spec.fork,
        spec.service,
        holder.metadata.name.as_deref().unwrap_or_default()
    )
}

fn add_routes(namespace: &str, target: &TargetPlan, routes: &mut BTreeMap<String, Vec<Route>>) {
    if target.problem.is_some() {
        return;
    }
    let spec = &target.target.spec;
    for planned in target.pods.iter().filter(|planned| planned.problem.is_none()) {
        let of_pod = routes.entry(Purpose::Pod.agent_id(&planned.pod.uid)).or_default();
        for port in &planned.ports {
            let probes = |container: &super::view::ContainerView| container.tcp_probes.contains(port);
            of_pod.push(Route {
                target: target.target.metadata.uid.clone().unwrap_or_default(),
                fork: spec.fork.clone(),
                service: format!("{namespace}/{}", spec.service),
                laptop: spec.laptop.id.clone(),
                owner: spec.owner.clone(),
                port: u32::from(*port),
                all: spec.traffic == Traffic::All,
                on_unavailable: match spec.on_unavailable {
                    OnUnavailable::Error => control::OnUnavailable::Error.into(),
                    OnUnavailable::Baseline => control::OnUnavailable::Baseline.into(),
                },
                tcp_probe: planned.pod.containers.iter().any(probes),
            });
        }
    }
}

/// Gives each target that asks for an environment one ready pod. A pod has one such agent, for one container; one that
/// is already there is preferred, so that nothing moves without need.
fn place_environments(plan: &mut Plan) {
    let mut placed: HashMap<String, String> = HashMap::new();
    for target in plan.targets.iter_mut().filter(|target| target.problem.is_none()) {
        let Some(asked) = &target.target.spec.environment_of else { continue };
        let mut best: Option<(u8, Environment)> = None;
        for planned in target.pods.iter().filter(|planned| planned.pod.ready && planned.problem.is_none()) {
            let container = if asked.is_empty() { &planned.container } else { asked };
            if !planned.pod.containers.iter().any(|found| found.name == *container) {
                continue;
            }
            let there = placed.get(&planned.pod.uid).cloned().or_else(|| live_environment(&planned.pod));
            let rank = match there {
                Some(there) if there == *container => 0,
                None => 1,
                Some(_) => continue,
            };
            if best.as_ref().is_none_or(|(best, _)| rank < *best) {
                best =
                    Some((rank, Environment { pod: Arc::clone(&planned.pod), container: container.clone() }));
            }
        }
        let Some((_, environment)) = best else { continue };
        placed.insert(environment.pod.uid.clone(), environment.container.clone());
        let laptops = plan.environment_for.entry(Purpose::Env.agent_id(&environment.pod.uid)).or_default();
        let laptop = &target.target.spec.laptop.id;
        if !laptops.contains(laptop) {
            laptops.push(laptop.clone());
        }
        target.environment = Some(environment);
    }
}

/// The container whose environment an agent in the pod reads, or is about to.
fn live_environment(pod: &PodView) -> Option<String> {
    let live = |state: &AgentState| !matches!(state, AgentState::Ended { .. });
    let env = |agent: &&AgentView| agent.purpose == Purpose::Env && live(&agent.state);
    pod.agents.iter().find(env).map(|agent| agent.target_container.clone())
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
