//! The cluster, as its administrator sees it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use serde_json::Value;

use super::process::{Output, run};
use super::wait::{eventually, so};

/// Where the shop is.
pub const SHOP: &str = "shop";

/// `scripts/cluster`.
pub fn script() -> Command {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/cluster");
    Command::new(path)
}

/// kubectl with all rights.
#[track_caller]
pub fn kubectl(args: &[&str]) -> Output {
    run(script().arg("kubectl").args(args), None)
}

/// kubectl as someone else, by their kubeconfig.
#[track_caller]
pub fn kubectl_as(kubeconfig: &Path, args: &[&str], input: Option<&str>) -> Output {
    run(script().arg("kubectl").arg("--kubeconfig").arg(kubeconfig).args(args), input)
}

/// An object, or a list of them.
#[track_caller]
pub fn get(args: &[&str]) -> Value {
    kubectl(&[&["get", "--output=json"], args].concat()).json()
}

/// The objects of a list.
#[track_caller]
pub fn items(args: &[&str]) -> Vec<Value> {
    get(args)["items"].as_array().expect("a list has items").clone()
}

/// Applies YAML.
#[track_caller]
pub fn apply(yaml: &str) {
    run(script().args(["kubectl", "apply", "--filename=-"]), Some(yaml)).ok();
}

/// Waits for a rollout.
#[track_caller]
pub fn rolled_out(namespace: &str, workload: &str) {
    kubectl(&["--namespace", namespace, "rollout", "status", workload, "--timeout=120s"]).ok();
}

/// A Kubernetes user without any right of their own; the path of their kubeconfig.
#[track_caller]
pub fn user(name: &str, groups: &[&str]) -> PathBuf {
    static MADE: Mutex<Option<HashMap<String, PathBuf>>> = Mutex::new(None);
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    made.get_or_insert_default()
        .entry(name.to_owned())
        .or_insert_with(|| {
            let path = run(script().args(["user", name]).args(groups), None).ok();
            PathBuf::from(path.trim())
        })
        .clone()
}

/// The administrator's kubeconfig.
#[track_caller]
pub fn administrator() -> PathBuf {
    PathBuf::from(run(script().arg("kubeconfig"), None).ok().trim())
}

/// A pod that is ready.
#[derive(Clone, Debug)]
pub struct Pod {
    pub name: String,
    pub ip: String,
}

/// The ready pods of one of the shop's services. Those that are being deleted do not count.
#[track_caller]
pub fn pods_of(service: &str) -> Vec<Pod> {
    items(&["pods", "--namespace", SHOP, "--selector", &format!("app={service}")])
        .iter()
        .filter(|pod| {
            pod["metadata"]["deletionTimestamp"].is_null() && condition(pod, "Ready") == Some("True")
        })
        .map(|pod| Pod { name: text(&pod["metadata"]["name"]), ip: text(&pod["status"]["podIP"]) })
        .collect()
}

/// Scales one of the shop's services and waits until exactly so many pods are ready and no other is left.
#[track_caller]
pub fn scale(service: &str, replicas: usize) {
    let count = format!("--replicas={replicas}");
    kubectl(&["--namespace", SHOP, "scale", "deployment", service, &count]).ok();
    eventually(&format!("{service} has {replicas} pods"), || {
        let all = items(&["pods", "--namespace", SHOP, "--selector", &format!("app={service}")]).len();
        let ready = pods_of(service).len();
        so(all == replicas && ready == replicas, || format!("{all} pods, {ready} ready"))
    });
}

/// A Service's ClusterIP.
#[track_caller]
pub fn cluster_ip(service: &str) -> String {
    text(&get(&["service", service, "--namespace", SHOP])["spec"]["clusterIP"])
}

/// Status of one of an object's conditions.
pub fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a str> {
    object["status"]["conditions"].as_array()?.iter().find(|each| each["type"] == kind)?["status"].as_str()
}

/// All ForkTargets.
#[track_caller]
pub fn targets() -> Vec<Value> {
    items(&["forktargets.forkd.dev", "--all-namespaces"])
}

/// Waits until the target of this Service is ready, and gives it.
#[track_caller]
pub fn target_ready(service: &str) -> Value {
    eventually(&format!("the target of {service} is Ready"), || {
        let all = targets();
        let found = all.iter().find(|target| target["spec"]["service"] == service);
        match found {
            Some(target) if condition(target, "Ready") == Some("True") => Ok(target.clone()),
            Some(target) => Err(target["status"].to_string()),
            None => Err("there is no such target".to_owned()),
        }
    })
}

/// A JSON string as text.
#[track_caller]
pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} should be a string")).to_owned()
}

/// The node's processes with exactly this command line (a pattern). The node numbers its processes by itself.
#[track_caller]
pub fn node_processes(pattern: &str) -> Vec<String> {
    let found = run(script().args(["node", "pgrep", "--full", "--exact", pattern]), None);
    assert!(matches!(found.code, 0 | 1), "{found}");
    found.stdout.lines().map(str::to_owned).collect()
}

/// Kills processes of the node.
#[track_caller]
pub fn kill_on_node(pids: &[String]) {
    run(script().args(["node", "kill", "-9"]).args(pids), None).ok();
}
