//! What a target's and a fork's status say.

use std::collections::{BTreeMap, HashSet};

use forkd_api::{Fork, ForkStatus, ForkTarget, ForkTargetStatus, PodStatus, condition};
use forkd_tunnel::identity::{AgentRole, Identity};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

use super::hub::Report;
use super::inject::Life;
use super::plan::{Environment, PodPlan, Problem, TargetPlan};

/// What is known of a target's agent in one pod.
#[derive(Clone, Debug, PartialEq)]
pub enum AgentInPod {
    /// It says so itself.
    Says(Report),
    /// The controller has just started, and the agent has had no time to come back: what was true stays true.
    Unknown,
    /// It is not connected.
    Absent(Life),
    /// The API server did not let it in.
    Refused {
        /// By admission or RBAC, as opposed to some other error.
        forbidden: bool,
        /// What the API server said.
        message: String,
    },
}

/// Everything that a target's status is made of, beside the plan.
pub struct Facts<'a> {
    /// The agent of the target in a pod.
    pub agents: &'a dyn Fn(&PodPlan) -> AgentInPod,
    /// The agent that reads the environment.
    pub environment: &'a dyn Fn(&Environment) -> AgentInPod,
    /// Laptops that are connected to some agent, gateways included.
    pub laptops: &'a HashSet<String>,
    pub now: Timestamp,
}

/// A condition before it has times.
struct Verdict {
    kind: &'static str,
    /// The problem, or what to say when all is well.
    outcome: Result<Problem, Problem>,
}

fn said(reason: &'static str, message: String) -> Problem {
    Problem { reason, message }
}

/// The status of a target. Equal to the old one if nothing changed.
pub fn of_target(planned: &TargetPlan, facts: &Facts<'_>) -> ForkTargetStatus {
    let target = &planned.target;
    let old = target.status.clone().unwrap_or_default();
    let mut pods = BTreeMap::new();
    let mut trouble: Option<Problem> = None;
    let (mut ready, mut routed, mut connected) = (0u32, 0u32, 0u32);
    for in_pod in planned.pods.iter().filter(|in_pod| in_pod.pod.ready) {
        ready += 1;
        let (status, problem) = pod_status(planned, in_pod, &old, facts);
        routed += u32::from(status.routed);
        connected += u32::from(status.routed && status.laptop_connected);
        // The worst is said: what somebody has to act on comes before what passes by itself.
        if let Some(problem) = problem
            && trouble.as_ref().is_none_or(|trouble| severity(&problem) > severity(trouble))
        {
            trouble = Some(problem);
        }
        pods.insert(in_pod.pod.name.clone(), status);
    }
    let routed_verdict = match (&planned.problem, ready, trouble) {
        (Some(problem), _, _) => Err(problem.clone()),
        (None, 0, _) => Err(said("NoPods", format!("no pod of Service {} is ready", target.spec.service))),
        (None, _, None) => Ok(said("Routed", format!("{routed} of {ready} ready pods are routed"))),
        (None, _, Some(problem)) => Err(problem),
    };
    let laptop = &target.spec.laptop;
    let host = if laptop.host.is_empty() { &laptop.id } else { &laptop.host };
    let laptop_verdict = if planned.problem.is_none() && routed > 0 && connected == routed {
        Ok(said("Connected", format!("laptop {host} is connected to {connected} of {routed} agents")))
    } else if !facts.laptops.contains(&laptop.id) {
        Err(said("LaptopGone", format!("laptop {host} of {} is not connected", target.spec.owner)))
    } else {
        Err(said("LaptopConnecting", format!("laptop {host} is connected to {connected} of {routed} agents")))
    };
    let ready_verdict = match (&routed_verdict, &laptop_verdict) {
        (Err(problem), _) | (_, Err(problem)) => Err(problem.clone()),
        (Ok(_), Ok(_)) => Ok(said("Ready", format!("requests go to laptop {host}"))),
    };
    let mut verdicts = vec![
        Verdict { kind: condition::ROUTED, outcome: routed_verdict },
        Verdict { kind: condition::LAPTOP_CONNECTED, outcome: laptop_verdict },
        Verdict { kind: condition::READY, outcome: ready_verdict },
    ];
    let mut environment_agent = None;
    if target.spec.environment_of.is_some() {
        let outcome = environment(planned, &old, facts);
        environment_agent = outcome.as_ref().ok().map(|(uri, _)| uri.clone());
        verdicts.push(Verdict { kind: condition::ENVIRONMENT, outcome: outcome.map(|(_, said)| said) });
    }
    ForkTargetStatus {
        conditions: conditions(&old.conditions, verdicts, target.metadata.generation, facts.now),
        routed: format!("{routed}/{ready}"),
        pods,
        environment_agent,
    }
}

/// What somebody has to act on is more severe than what only takes time.
fn severity(problem: &Problem) -> u8 {
    match problem.reason {
        "AgentStarting" => 0,
        "AgentUnreachable" => 1,
        "AgentFailed" => 2,
        _ => 3,
    }
}

fn pod_status(
    planned: &TargetPlan,
    in_pod: &PodPlan,
    old: &ForkTargetStatus,
    facts: &Facts<'_>,
) -> (PodStatus, Option<Problem>) {
    let name = &in_pod.pod.name;
    let mut status = PodStatus { uid: in_pod.pod.uid.clone(), ..PodStatus::default() };
    let problem = planned.problem.clone().or_else(|| in_pod.problem.clone());
    let problem = problem.or_else(|| match (facts.agents)(in_pod) {
        AgentInPod::Says(report) => {
            status.routed = report.routed;
            status.laptop_connected = report.laptops.contains(&planned.target.spec.laptop.id);
            status.older_connections = report.older_connections;
            status.opaque_connections = report.opaque_connections;
            match (report.routed, report.error.is_empty()) {
                (true, _) => None,
                (false, true) => {
                    Some(said("AgentStarting", format!("the agent in pod {name} is setting its redirect")))
                }
                (false, false) => {
                    Some(said("AgentFailed", format!("the agent in pod {name} says: {}", report.error)))
                }
            }
        }
        AgentInPod::Unknown => {
            let before = old.pods.get(name).filter(|pod| pod.uid == in_pod.pod.uid);
            status = before.cloned().unwrap_or(status.clone());
            (!status.routed).then(|| said("AgentStarting", format!("the agent in pod {name} is coming back")))
        }
        AgentInPod::Refused { forbidden, message } => Some(refused(name, forbidden, &message)),
        AgentInPod::Absent(life) => Some(absent(name, life)),
    });
    if status.routed {
        status.message.clear();
    } else {
        status.message = problem.as_ref().map(|problem| problem.message.clone()).unwrap_or_default();
    }
    (status, problem)
}

fn refused(pod: &str, forbidden: bool, message: &str) -> Problem {
    if forbidden {
        said("AgentForbidden", format!("an agent in pod {pod} was refused: {message}"))
    } else {
        said("AgentFailed", format!("adding an agent to pod {pod} failed: {message}"))
    }
}

/// What to say of an agent that is not connected.
fn absent(pod: &str, life: Life) -> Problem {
    match life {
        Life::Running => said(
            "AgentUnreachable",
            format!("the agent in pod {pod} runs, but is not connected to the controller"),
        ),
        Life::Missing(_) | Life::Starting => {
            said("AgentStarting", format!("the agent in pod {pod} is starting"))
        }
        Life::Stuck(why) => said("AgentFailed", format!("the agent in pod {pod} cannot start: {why}")),
        Life::BackOff(due, why) => {
            said("AgentFailed", format!("in pod {pod}: {why}; the next one starts at {due:.0}"))
        }
        Life::Exhausted(why) => said("AgentFailed", format!("in pod {pod}: {why}")),
    }
}

/// The URI of the agent that reads the environment, or why there is none.
fn environment(
    planned: &TargetPlan,
    old: &ForkTargetStatus,
    facts: &Facts<'_>,
) -> Result<(String, Problem), Problem> {
    if let Some(problem) = &planned.problem {
        return Err(problem.clone());
    }
    let Some(place) = &planned.environment else {
        let asked = planned.target.spec.environment_of.as_deref().unwrap_or_default();
        let container = if asked.is_empty() { String::new() } else { format!(" with a container {asked}") };
        let message =
            format!("no ready pod{container} whose environment is not read for another container already");
        return Err(said("NoEnvironment", message));
    };
    let pod = &place.pod;
    let identity = Identity::Agent {
        pod_uid: pod.uid.clone(),
        namespace: pod.namespace.clone(),
        pod: pod.name.clone(),
        role: AgentRole::Env,
    };
    let uri = identity.uri();
    let served = || said("Served", format!("of container {} in pod {}", place.container, pod.name));
    match (facts.environment)(place) {
        AgentInPod::Says(report) if report.error.is_empty() => Ok((uri, served())),
        AgentInPod::Says(report) => {
            Err(said("AgentFailed", format!("the agent in pod {} says: {}", pod.name, report.error)))
        }
        AgentInPod::Unknown if old.environment_agent.as_ref() == Some(&uri) => Ok((uri, served())),
        AgentInPod::Unknown => Err(absent(&pod.name, Life::Starting)),
        AgentInPod::Refused { forbidden, message } => Err(refused(&pod.name, forbidden, &message)),
        AgentInPod::Absent(life) => Err(absent(&pod.name, life)),
    }
}

/// Gives each verdict its time: that of its last change of status (API conventions).
fn conditions(
    old: &[Condition],
    verdicts: Vec<Verdict>,
    generation: Option<i64>,
    now: Timestamp,
) -> Vec<Condition> {
    let condition = |verdict: Verdict| {
        let (status, said) = match verdict.outcome {
            Ok(said) => ("True", said),
            Err(said) => ("False", said),
        };
        let before =
            old.iter().find(|condition| condition.type_ == verdict.kind && condition.status == status);
        Condition {
            type_: verdict.kind.to_owned(),
            status: status.to_owned(),
            reason: said.reason.to_owned(),
            message: said.message,
            observed_generation: generation,
            last_transition_time: before
                .map_or_else(|| now_in_seconds(now), |before| before.last_transition_time.clone()),
        }
    };
    verdicts.into_iter().map(condition).collect()
}

/// The API server keeps whole seconds; what is written is then what is read, and nothing seems to have changed.
fn now_in_seconds(now: Timestamp) -> Time {
    Time(Timestamp::from_second(now.as_second()).unwrap_or(now))
}

/// The Ready condition of a target, as it stands in its status.
pub fn ready(conditions: &[Condition]) -> Option<&Condition> {
    conditions.iter().find(|found| found.type_ == condition::READY)
}

/// The status of a fork, from those of its targets.
pub fn of_fork<'a>(fork: &Fork, targets: impl Iterator<Item = &'a ForkTarget>, now: Timestamp) -> ForkStatus {
    let old = fork.status.clone().unwrap_or_default();
    let (mut count, mut waiting) = (0, Vec::new());
    for target in targets {
        count += 1;
        let is_ready = target
            .status
            .as_ref()
            .and_then(|status| ready(&status.conditions))
            .is_some_and(|ready| ready.status == "True");
        if !is_ready {
            waiting.push(format!(
                "{}/{}",
                target.metadata.namespace.as_deref().unwrap_or_default(),
                target.spec.service
            ));
        }
    }
    waiting.sort();
    let outcome = match (count, waiting.is_empty()) {
        (0, _) => Ok(said("NoTargets", "this fork has no targets".to_owned())),
        (_, true) => Ok(said("TargetsReady", format!("{count} of {count} targets are ready"))),
        (_, false) => Err(said("TargetsNotReady", format!("not ready: {}", waiting.join(", ")))),
    };
    let verdict = vec![Verdict { kind: condition::READY, outcome }];
    ForkStatus {
        targets: count,
        conditions: conditions(&old.conditions, verdict, fork.metadata.generation, now),
    }
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
