//! The agent's ephemeral containers: whether a pod needs another one, and what it looks like.

use std::collections::BTreeSet;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Capabilities, EnvVar, EphemeralContainer, SeccompProfile, SecurityContext};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::view::{AgentState, AgentView, PodView, Purpose};

/// Wait after the second failure in a row; doubles each time. After the first there is none: a pod that was routed is to
/// be routed again at once.
const BACK_OFF: Duration = Duration::from_secs(1);
/// Longest wait.
const MAX_BACK_OFF: Duration = Duration::from_secs(600);
/// Ephemeral containers cannot be taken out of a pod again, and a pod may not grow for ever: each takes up to 4 KiB of
/// the 1.5 MiB that etcd allows an object.
const MAX_CONTAINERS: usize = 150;

/// How it stands with a pod's agent.
#[derive(Clone, Debug, PartialEq)]
pub enum Life {
    /// It runs; whether it is connected is the hub's matter.
    Running,
    /// It was asked for, and is on its way.
    Starting,
    /// The kubelet cannot start it.
    Stuck(String),
    /// There is none: one is to be added, with this number.
    Missing(usize),
    /// The last one failed; the next one is due at this time.
    BackOff(Timestamp, String),
    /// Too many have failed.
    Exhausted(String),
}

/// How it stands with the agents of one purpose in a pod. `pending`: containers that were asked for and that the
/// watch has not shown yet.
pub fn life(
    pod: &PodView,
    purpose: Purpose,
    pending: &BTreeSet<String>,
    image: &str,
    now: Timestamp,
) -> Life {
    let mut agents: Vec<&AgentView> = pod.agents.iter().filter(|agent| agent.purpose == purpose).collect();
    let unseen = |name: &String| {
        Purpose::of_name(name) == Some(purpose) && !agents.iter().any(|agent| agent.name == *name)
    };
    if pending.iter().any(unseen) {
        return Life::Starting;
    }
    // Their order in the pod says nothing: a patch puts new ones in front of old ones or behind them.
    let rank = |state: &AgentState| match state {
        AgentState::Running { .. } => (3, None),
        AgentState::Starting => (2, None),
        AgentState::Stuck { .. } => (1, None),
        AgentState::Ended { at, .. } => (0, Some(at.unwrap_or(Timestamp::MIN))),
    };
    agents.sort_by_key(|agent| rank(&agent.state));
    let Some(last) = agents.last() else { return Life::Missing(0) };
    let next = agents.len();
    match &last.state {
        AgentState::Running { .. } => Life::Running,
        AgentState::Starting => Life::Starting,
        // A stuck one stays as it is. If all are stuck with another image than ours, another one may do better.
        AgentState::Stuck { .. }
            if next < MAX_CONTAINERS
                && !agents.iter().any(|agent| is_stuck(agent) && agent.image == image) =>
        {
            Life::Missing(next)
        }
        AgentState::Stuck { reason, message } => Life::Stuck(join(reason, message)),
        AgentState::Ended { code, message, .. } if next >= MAX_CONTAINERS => Life::Exhausted(format!(
            "{next} agents have ended in this pod, the last one with code {code}{}; only a new pod can have another",
            if message.is_empty() { String::new() } else { format!(" ({message})") }
        )),
        // 0: it had nothing to do for a while, or was retired. Work has come back.
        AgentState::Ended { code: 0, .. } => Life::Missing(next),
        AgentState::Ended { code, at, message, .. } => {
            let failed = |agent: &&&AgentView| matches!(agent.state, AgentState::Ended { code, ran_long: false, .. } if code != 0);
            let before = agents.iter().rev().skip(1).take_while(failed).count();
            let failures = if failed(&last) { 1 + before } else { 1 };
            let wait = back_off(failures);
            let due = at.unwrap_or(now) + SignedDuration::try_from(wait).unwrap_or(SignedDuration::ZERO);
            if due <= now {
                return Life::Missing(next);
            }
            Life::BackOff(due, join(&format!("agent ended with code {code}"), message))
        }
    }
}

fn is_stuck(agent: &AgentView) -> bool {
    matches!(agent.state, AgentState::Stuck { .. })
}

/// The wait after so many failures in a row.
pub fn back_off(failures: usize) -> Duration {
    let Some(doublings) = failures.checked_sub(2) else { return Duration::ZERO };
    let doublings = u32::try_from(doublings).unwrap_or(u32::MAX).min(16);
    (BACK_OFF * 2u32.pow(doublings)).min(MAX_BACK_OFF)
}

fn join(reason: &str, message: &str) -> String {
    if message.is_empty() { reason.to_owned() } else { format!("{reason}: {message}") }
}

/// What all agents of an installation have in common.
#[derive(Clone, Debug)]
pub struct Settings {
    pub image: String,
    pub image_pull_policy: String,
    /// `IP:PORT` of the controller, as reached from pods.
    pub controller: String,
    /// Certificate of the authority, PEM.
    pub authority: String,
}

/// A container to add.
#[derive(Clone, Debug, PartialEq)]
pub struct Addition {
    pub purpose: Purpose,
    /// Name of the new container.
    pub name: String,
    /// The application's container whose processes it shares.
    pub target_container: String,
    /// Its join token.
    pub token: String,
}

/// The patch (strategic merge) for `pods/ephemeralcontainers`. It names the pod's uid, so that it cannot hit another pod
/// of the same name.
pub fn patch(pod: &PodView, additions: &[Addition], settings: &Settings) -> Value {
    let containers: Vec<EphemeralContainer> =
        additions.iter().map(|addition| container(pod, addition, settings)).collect();
    json!({
        "metadata": { "uid": pod.uid },
        "spec": { "ephemeralContainers": containers },
    })
}

fn container(pod: &PodView, addition: &Addition, settings: &Settings) -> EphemeralContainer {
    let env = |name: &str, value: &str| EnvVar {
        name: name.to_owned(),
        value: Some(value.to_owned()),
        ..EnvVar::default()
    };
    let mut args = vec!["agent".to_owned()];
    if addition.purpose == Purpose::Env {
        args.push("--env".to_owned());
    }
    EphemeralContainer {
        name: addition.name.clone(),
        image: Some(settings.image.clone()),
        image_pull_policy: Some(settings.image_pull_policy.clone()),
        args: Some(args),
        env: Some(vec![
            env("FORKD_TOKEN", &addition.token),
            env("FORKD_CONTROLLER", &settings.controller),
            env("FORKD_CA", &settings.authority),
            env("FORKD_POD_UID", &pod.uid),
            env("FORKD_POD_NAME", &pod.name),
            env("FORKD_POD_NAMESPACE", &pod.namespace),
        ]),
        target_container_name: Some(addition.target_container.clone()),
        security_context: Some(match addition.purpose {
            Purpose::Pod => agent_security(),
            Purpose::Env => env_security(pod, &addition.target_container),
        }),
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        ..EphemeralContainer::default()
    }
}

/// Root without any right but NET_ADMIN: it is the network namespace's nftables table that is needed, nothing else.
fn agent_security() -> SecurityContext {
    SecurityContext {
        run_as_user: Some(0),
        run_as_non_root: Some(false),
        capabilities: Some(Capabilities {
            drop: Some(vec!["ALL".to_owned()]),
            add: Some(vec!["NET_ADMIN".to_owned()]),
        }),
        read_only_root_filesystem: Some(true),
        allow_privilege_escalation: Some(false),
        seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), localhost_profile: None }),
        ..SecurityContext::default()
    }
}

/// The application's own security context: whoever is the same user with the same capabilities may read
/// `/proc/PID/environ` (ptrace(2), access mode checks), and has no more rights than the application.
fn env_security(pod: &PodView, container: &str) -> SecurityContext {
    let container = pod.containers.iter().find(|found| found.name == container);
    let mut context = container.and_then(|found| found.security_context.clone()).unwrap_or_default();
    if context.run_as_user.is_none() && !pod.has_user {
        // Nobody says which user: it is the one of the application's image, which is not ours. The kubelet may tell; if
        // it does not, an image without a user means root.
        let non_root = context.run_as_non_root.unwrap_or(pod.non_root);
        context.run_as_user = container.and_then(|found| found.uid).or((!non_root).then_some(0));
    }
    context
}

#[cfg(test)]
mod tests {
    use super::super::view::ContainerView;
    use super::*;

    fn pod(states: Vec<AgentState>) -> PodView {
        let agent = |(number, state)| AgentView {
            name: Purpose::Pod.container_name("uid", number),
            purpose: Purpose::Pod,
            image: "image:1".to_owned(),
            target_container: "app".to_owned(),
            state,
        };
        PodView {
            uid: "uid".to_owned(),
            name: "cart-1".to_owned(),
            namespace: "shop".to_owned(),
            containers: vec![ContainerView { name: "app".to_owned(), ..ContainerView::default() }],
            agents: states.into_iter().enumerate().map(agent).collect(),
            ..PodView::default()
        }
    }

    fn ended(code: i32, at: i64) -> AgentState {
        AgentState::Ended {
            code,
            at: Some(Timestamp::from_second(at).unwrap()),
            ran_long: false,
            message: String::new(),
        }
    }

    fn life_at(pod: &PodView, second: i64) -> Life {
        life(pod, Purpose::Pod, &BTreeSet::new(), "image:1", Timestamp::from_second(second).unwrap())
    }

    #[test]
    fn a_pod_without_an_agent_gets_one_and_only_one() {
        let now = Timestamp::UNIX_EPOCH;
        assert_eq!(life_at(&pod(vec![]), 0), Life::Missing(0));
        let pending = BTreeSet::from([Purpose::Pod.container_name("uid", 0)]);
        assert_eq!(life(&pod(vec![]), Purpose::Pod, &pending, "image:1", now), Life::Starting);
        assert_eq!(life(&pod(vec![]), Purpose::Env, &pending, "image:1", now), Life::Missing(0));
        assert_eq!(
            life(&pod(vec![ended(0, 0)]), Purpose::Pod, &pending, "image:1", now),
            Life::Missing(1),
            "seen by now"
        );
        assert_eq!(life_at(&pod(vec![AgentState::Starting]), 0), Life::Starting);
        assert_eq!(life_at(&pod(vec![ended(1, 0), AgentState::Running { since: now }]), 0), Life::Running);
    }

    #[test]
    fn a_failed_agent_gets_a_successor_after_a_growing_wait() {
        assert_eq!(life_at(&pod(vec![ended(1, 100)]), 100), Life::Missing(1), "at once after the first");
        let two = pod(vec![ended(1, 90), ended(1, 100)]);
        assert!(matches!(life_at(&two, 100), Life::BackOff(due, _) if due.as_second() == 101));
        assert_eq!(life_at(&two, 101), Life::Missing(2));
        let four = pod(vec![ended(0, 50), ended(1, 70), ended(1, 80), ended(1, 90), ended(1, 100)]);
        assert!(matches!(life_at(&four, 103), Life::BackOff(due, _) if due.as_second() == 104));
        let mut ran_well = four;
        if let AgentState::Ended { ran_long, .. } = &mut ran_well.agents[4].state {
            *ran_long = true;
        }
        assert_eq!(life_at(&ran_well, 100), Life::Missing(5), "what ran for long is no failure to start");
        assert_eq!(back_off(1000), MAX_BACK_OFF);
        let idle = pod(vec![ended(1, 80), ended(0, 100)]);
        assert_eq!(life_at(&idle, 100), Life::Missing(2), "one that ended by itself is no failure");
        let many = pod((0..MAX_CONTAINERS).map(|_| ended(1, 0)).collect());
        assert!(matches!(life_at(&many, 1_000_000), Life::Exhausted(_)));
    }

    #[test]
    fn a_successor_counts_wherever_it_stands_in_the_pod() {
        let since = Timestamp::UNIX_EPOCH;
        for live in [AgentState::Starting, AgentState::Running { since }] {
            let first = life_at(&pod(vec![live.clone(), ended(1, 0)]), 1_000);
            let last = life_at(&pod(vec![ended(1, 0), live]), 1_000);
            assert_eq!(first, last);
            assert!(matches!(first, Life::Starting | Life::Running));
        }
        let newest_first = pod(vec![ended(0, 100), ended(1, 80)]);
        assert_eq!(life_at(&newest_first, 100), Life::Missing(2), "the last to end was no failure");
    }

    #[test]
    fn a_stuck_agent_is_replaced_only_if_another_image_is_to_be_used() {
        let stuck = AgentState::Stuck { reason: "ErrImagePull".to_owned(), message: "not found".to_owned() };
        let pod = pod(vec![stuck]);
        assert_eq!(life_at(&pod, 0), Life::Stuck("ErrImagePull: not found".to_owned()));
        assert_eq!(
            life(&pod, Purpose::Pod, &BTreeSet::new(), "image:2", Timestamp::UNIX_EPOCH),
            Life::Missing(1)
        );
    }

    fn settings() -> Settings {
        Settings {
            image: "image:1".to_owned(),
            image_pull_policy: "Never".to_owned(),
            controller: "10.96.0.9:9443".to_owned(),
            authority: "PEM".to_owned(),
        }
    }

    fn addition(purpose: Purpose) -> Addition {
        Addition {
            purpose,
            name: purpose.container_name("uid", 0),
            target_container: "app".to_owned(),
            token: "token".to_owned(),
        }
    }

    #[test]
    fn the_agent_has_net_admin_and_nothing_else() {
        let patch = patch(&pod(vec![]), &[addition(Purpose::Pod)], &settings());
        let container = &patch["spec"]["ephemeralContainers"][0];
        assert_eq!(patch["metadata"]["uid"], "uid");
        assert_eq!(container["args"], json!(["agent"]));
        assert_eq!(container["targetContainerName"], "app");
        assert_eq!(
            container["securityContext"],
            json!({
                "runAsUser": 0, "runAsNonRoot": false, "readOnlyRootFilesystem": true, "allowPrivilegeEscalation": false,
                "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN"]}, "seccompProfile": {"type": "RuntimeDefault"}
            })
        );
        let env = container["env"].as_array().unwrap();
        assert!(env.contains(&json!({"name": "FORKD_TOKEN", "value": "token"})));
        assert!(env.contains(&json!({"name": "FORKD_CONTROLLER", "value": "10.96.0.9:9443"})));
        assert!(env.contains(&json!({"name": "FORKD_CA", "value": "PEM"})));
    }

    #[test]
    fn who_reads_an_environment_is_who_has_it() {
        let user = |pod: &PodView| {
            let patch = patch(pod, &[addition(Purpose::Env)], &settings());
            assert_eq!(patch["spec"]["ephemeralContainers"][0]["args"], json!(["agent", "--env"]));
            patch["spec"]["ephemeralContainers"][0]["securityContext"].clone()
        };
        let mut pod = pod(vec![]);
        assert_eq!(user(&pod), json!({"runAsUser": 0}), "an image without a user is root's");
        pod.containers[0].uid = Some(1000);
        assert_eq!(user(&pod), json!({"runAsUser": 1000}), "the kubelet knows better");
        pod.containers[0].security_context = Some(SecurityContext {
            run_as_user: Some(7),
            privileged: Some(false),
            ..SecurityContext::default()
        });
        assert_eq!(user(&pod), json!({"runAsUser": 7, "privileged": false}));
        pod.containers[0] = ContainerView { name: "app".to_owned(), ..ContainerView::default() };
        pod.non_root = true;
        assert_eq!(user(&pod), json!({}), "root would not be let in");
        pod.has_user = true;
        assert_eq!(user(&pod), json!({}), "the pod's own user counts");
    }
}
