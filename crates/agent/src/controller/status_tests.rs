use std::collections::BTreeSet;
use std::sync::Arc;

use forkd_api::{ForkSpec, ForkTargetSpec, Laptop, TargetPort};

use super::super::view::PodView;
use super::*;

fn target() -> ForkTarget {
    let spec = ForkTargetSpec {
        fork: "alice".to_owned(),
        owner: "alice".to_owned(),
        service: "cart".to_owned(),
        ports: vec![TargetPort { port: 80, laptop_port: 8080 }],
        traffic: Default::default(),
        on_unavailable: Default::default(),
        laptop: Laptop { id: "l1".to_owned(), host: "thinkpad".to_owned() },
        environment_of: None,
    };
    let mut target = ForkTarget::new("alice-cart", spec);
    target.metadata.generation = Some(3);
    target
}

fn planned(pods: &[&str]) -> TargetPlan {
    let pod = |name: &&str| PodPlan {
        pod: Arc::new(PodView {
            namespace: "shop".to_owned(),
            name: (*name).to_owned(),
            uid: format!("uid-{name}"),
            ready: true,
            ..PodView::default()
        }),
        ports: vec![8080],
        container: "app".to_owned(),
        problem: None,
    };
    TargetPlan {
        target: Arc::new(target()),
        problem: None,
        pods: pods.iter().map(pod).collect(),
        environment: None,
    }
}

fn says(routed: bool, laptops: &[&str]) -> AgentInPod {
    AgentInPod::Says(Report {
        routed,
        laptops: laptops.iter().map(|laptop| (*laptop).to_owned()).collect::<BTreeSet<_>>(),
        ..Report::default()
    })
}

/// The status, given what is known of the agent in each pod by name.
fn status_at(
    planned: &TargetPlan,
    agents: &[(&str, AgentInPod)],
    laptops: &[&str],
    second: i64,
) -> ForkTargetStatus {
    let find = |name: &str| agents.iter().find(|(found, _)| *found == name).map(|(_, agent)| agent.clone());
    of_target(
        planned,
        &Facts {
            agents: &|in_pod| find(&in_pod.pod.name).expect("an agent for each pod"),
            environment: &|_| find("env").expect("an agent for the environment"),
            laptops: &laptops.iter().map(|laptop| (*laptop).to_owned()).collect(),
            now: Timestamp::from_second(second).unwrap(),
        },
    )
}

fn reasons(status: &ForkTargetStatus) -> Vec<(&str, &str, &str)> {
    status
        .conditions
        .iter()
        .map(|found| (found.type_.as_str(), found.status.as_str(), found.reason.as_str()))
        .collect()
}

#[test]
fn all_agents_routed_and_connected_is_ready() {
    let planned = planned(&["a", "b"]);
    let status =
        status_at(&planned, &[("a", says(true, &["l1"])), ("b", says(true, &["l1", "l2"]))], &["l1"], 10);
    assert_eq!(
        reasons(&status),
        [("Routed", "True", "Routed"), ("LaptopConnected", "True", "Connected"), ("Ready", "True", "Ready")]
    );
    assert_eq!(status.routed, "2/2");
    assert!(
        status.pods["a"].routed && status.pods["a"].laptop_connected && status.pods["a"].message.is_empty()
    );
    assert!(status.conditions.iter().all(|condition| condition.observed_generation == Some(3)));
}

#[test]
fn one_pod_that_is_not_routed_is_named_with_its_reason() {
    let planned = planned(&["a", "b"]);
    let stuck = AgentInPod::Absent(Life::Stuck("ErrImagePull: not found".to_owned()));
    let status = status_at(&planned, &[("a", says(true, &["l1"])), ("b", stuck)], &["l1"], 10);
    assert_eq!(status.routed, "1/2");
    assert_eq!(
        reasons(&status),
        [
            ("Routed", "False", "AgentFailed"),
            ("LaptopConnected", "True", "Connected"),
            ("Ready", "False", "AgentFailed")
        ]
    );
    assert_eq!(status.pods["b"].message, "the agent in pod b cannot start: ErrImagePull: not found");
    assert!(ready(&status.conditions).unwrap().message.contains("ErrImagePull"));
}

#[test]
fn what_needs_a_person_is_said_before_what_takes_time() {
    let planned = planned(&["a", "b"]);
    let forbidden = AgentInPod::Refused { forbidden: true, message: "violates PodSecurity".to_owned() };
    let status = status_at(&planned, &[("a", AgentInPod::Absent(Life::Starting)), ("b", forbidden)], &[], 10);
    assert_eq!(ready(&status.conditions).unwrap().reason, "AgentForbidden");
    assert!(ready(&status.conditions).unwrap().message.contains("violates PodSecurity"));
}

#[test]
fn a_laptop_that_nobody_sees_is_gone_and_one_that_some_agents_see_is_connecting() {
    let planned = planned(&["a", "b"]);
    let agents = [("a", says(true, &["l1"])), ("b", says(true, &[]))];
    let status = status_at(&planned, &agents, &["l1"], 10);
    assert_eq!(ready(&status.conditions).unwrap().reason, "LaptopConnecting");
    let agents = [("a", says(true, &[])), ("b", says(true, &[]))];
    let status = status_at(&planned, &agents, &[], 10);
    assert_eq!(ready(&status.conditions).unwrap().reason, "LaptopGone");
    assert!(ready(&status.conditions).unwrap().message.contains("thinkpad"));
}

#[test]
fn a_claimed_target_says_so_in_every_pod() {
    let mut planned = planned(&["a"]);
    planned.problem = Some(Problem { reason: "Claimed", message: "held by bob".to_owned() });
    let status = status_at(&planned, &[], &["l1"], 10);
    assert_eq!(ready(&status.conditions).unwrap().reason, "Claimed");
    assert_eq!((status.routed.as_str(), status.pods["a"].message.as_str()), ("0/1", "held by bob"));
}

#[test]
fn no_ready_pod_is_no_pods() {
    let mut planned = planned(&["a"]);
    Arc::make_mut(&mut planned.pods[0].pod).ready = false;
    let status = status_at(&planned, &[], &["l1"], 10);
    assert_eq!(ready(&status.conditions).unwrap().reason, "NoPods");
    assert!(status.pods.is_empty());
}

#[test]
fn nothing_changes_while_nothing_changes_and_times_are_those_of_the_last_change() {
    let mut planned = planned(&["a"]);
    let ready_agent = [("a", says(true, &["l1"]))];
    let first = status_at(&planned, &ready_agent, &["l1"], 10);
    Arc::make_mut(&mut planned.target).status = Some(first.clone());
    assert_eq!(status_at(&planned, &ready_agent, &["l1"], 99), first);
    let later = status_at(&planned, &[("a", says(true, &[]))], &["l1"], 50);
    let time = |status: &ForkTargetStatus, kind: &str| {
        let found = status.conditions.iter().find(|condition| condition.type_ == kind).unwrap();
        found.last_transition_time.0.as_second()
    };
    assert_eq!((time(&later, "Routed"), time(&later, "Ready")), (10, 50));
}

#[test]
fn a_restart_of_the_controller_leaves_what_was_true() {
    let mut planned = planned(&["a"]);
    let first = status_at(&planned, &[("a", says(true, &["l1"]))], &["l1"], 10);
    Arc::make_mut(&mut planned.target).status = Some(first.clone());
    assert_eq!(status_at(&planned, &[("a", AgentInPod::Unknown)], &[], 20), first);
    Arc::make_mut(&mut planned.pods[0].pod).uid = "another".to_owned();
    let other = status_at(&planned, &[("a", AgentInPod::Unknown)], &[], 20);
    assert!(!other.pods["a"].routed, "another pod of the same name");
}

#[test]
fn an_environment_has_a_condition_of_its_own() {
    let mut planned = planned(&["a"]);
    Arc::make_mut(&mut planned.target).spec.environment_of = Some(String::new());
    let agent = ("a", says(true, &["l1"]));
    let none = status_at(&planned, std::slice::from_ref(&agent), &["l1"], 10);
    assert_eq!(reasons(&none)[3], ("Environment", "False", "NoEnvironment"));
    planned.environment =
        Some(Environment { pod: Arc::clone(&planned.pods[0].pod), container: "app".to_owned() });
    let starting = ("env", AgentInPod::Absent(Life::Starting));
    let status = status_at(&planned, &[agent.clone(), starting], &["l1"], 10);
    assert_eq!(reasons(&status)[3], ("Environment", "False", "AgentStarting"));
    assert_eq!(ready(&status.conditions).unwrap().status, "True", "requests are routed all the same");
    let served = ("env", says(false, &[]));
    let status = status_at(&planned, &[agent, served], &["l1"], 10);
    assert_eq!(reasons(&status)[3], ("Environment", "True", "Served"));
    assert_eq!(
        status.environment_agent.as_deref(),
        Some("forkd://agent/uid-a.env?namespace=shop&pod=a&role=env")
    );
}

#[test]
fn a_fork_is_ready_when_its_targets_are() {
    let fork = Fork::new("alice", ForkSpec { owner: "alice".to_owned() });
    let now = Timestamp::UNIX_EPOCH;
    assert_eq!(of_fork(&fork, std::iter::empty(), now).conditions[0].status, "True");
    let planned = planned(&["a"]);
    let (mut done, mut waiting) = (target(), target());
    done.status = Some(status_at(&planned, &[("a", says(true, &["l1"]))], &["l1"], 10));
    waiting.metadata.namespace = Some("shop".to_owned());
    let status = of_fork(&fork, [&done, &waiting].into_iter(), now);
    assert_eq!((status.targets, status.conditions[0].status.as_str()), (2, "False"));
    assert_eq!(status.conditions[0].message, "not ready: shop/cart");
    assert_eq!(of_fork(&fork, [&done].into_iter(), now).conditions[0].reason, "TargetsReady");
}
