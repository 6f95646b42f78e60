//! Around every test: a clean laptop and cluster before, nothing left after, everything that explains a failure.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use nix::sys::signal::Signal;

use super::cluster::{self, SHOP, administrator, items, kubectl, script};
use super::install;
use super::laptop::{Laptop, Traces};
use super::process::Process;
use super::wait::{eventually, so};

/// The Kubernetes group of those who may use forkd and edit the shop.
pub const DEVELOPERS: &str = "developers";

/// A test of one developer, alice, on one laptop.
#[track_caller]
pub fn on_laptop(test: impl FnOnce(&Laptop)) {
    around(|| (vec![alice()], None), |laptops| test(&laptops[0]));
}

/// A test of two developers, alice and bob, each on a laptop of their own.
#[track_caller]
pub fn on_two_laptops(test: impl FnOnce(&Laptop, &Laptop)) {
    let make = || {
        let (second, pid) = SecondLaptop::start();
        let bob = Laptop::beside(cluster::user("bob", &[DEVELOPERS]), pid);
        (vec![alice(), bob], Some(second))
    };
    around(make, |laptops| test(&laptops[0], &laptops[1]));
}

fn alice() -> Laptop {
    Laptop::of(cluster::user("alice", &[DEVELOPERS]))
}

#[track_caller]
fn around(make: impl FnOnce() -> (Vec<Laptop>, Option<SecondLaptop>), test: impl FnOnce(&[Laptop])) {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    install::present();
    let (laptops, _second) = make();
    clear_cluster();
    let before: Vec<Traces> = laptops.iter().map(Laptop::traces).collect();
    assert!(
        before.iter().all(|traces| traces.processes == 0),
        "forkd runs on the laptop: is it used by someone?"
    );
    let result = catch_unwind(AssertUnwindSafe(|| {
        test(&laptops);
        for laptop in &laptops {
            let quit = laptop.forkd(&["quit"]);
            assert!(matches!(quit.code, 0 | 3), "this should have ended the session, or found none:\n{quit}");
        }
        for (laptop, before) in laptops.iter().zip(&before) {
            no_trace(laptop, before);
        }
        no_fork_is_left();
    }));
    if let Err(panic) = result {
        laptops.iter().for_each(explain_laptop);
        explain_cluster();
        for (laptop, before) in laptops.iter().zip(&before) {
            laptop.clear(before);
        }
        clear_cluster();
        resume_unwind(panic);
    }
}

/// Waits until the laptop is as it was.
#[track_caller]
pub fn no_trace(laptop: &Laptop, before: &Traces) {
    eventually("nothing is left on the laptop", || {
        let now = laptop.traces();
        so(now == *before, || format!("before:\n{before:#?}\nnow:\n{now:#?}"))
    });
}

/// Waits until the cluster has neither forks nor targets.
#[track_caller]
pub fn no_fork_is_left() {
    eventually("no Fork and no ForkTarget is left", || {
        let left = kubectl(&["get", "forks,forktargets", "--all-namespaces", "--output=name"]).ok();
        so(left.trim().is_empty(), || left)
    });
}

fn clear_cluster() {
    for kind in ["forktargets.forkd.dev", "forks.forkd.dev"] {
        kubectl(&["delete", kind, "--all", "--all-namespaces", "--ignore-not-found"]).ok();
    }
    no_fork_is_left();
}

/// A laptop beside the first: namespaces of its own, and its network behind the first one's.
struct SecondLaptop(Process);

impl SecondLaptop {
    /// It, and a process in it.
    #[track_caller]
    fn start() -> (Self, i32) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("second-laptop");
        let mut process = Process::start(script().args(["laptop", "--"]).arg(path));
        let line = process.says("ready ");
        let pid = line.trim_start_matches("ready ").trim().parse().expect("it says a process id");
        (Self(process), pid)
    }
}

impl Drop for SecondLaptop {
    fn drop(&mut self) {
        // It takes its wire away on SIGTERM.
        self.0.signal(Signal::SIGTERM);
        self.0.code();
    }
}

fn explain_laptop(laptop: &Laptop) {
    heading("forkd status");
    eprintln!("{}", laptop.forkd(&["status", "--output", "json"]));
    heading("the laptop");
    eprintln!("{:#?}", laptop.traces());
    heading("log of the daemon");
    eprintln!("{}", laptop.log());
}

fn explain_cluster() {
    heading("ForkTargets and Forks");
    eprintln!("{}", kubectl(&["get", "forktargets,forks", "--all-namespaces", "--output=yaml"]).stdout);
    heading("pods");
    eprintln!("{}", kubectl(&["get", "pods", "--all-namespaces", "--output=wide"]).stdout);
    for pod in items(&["pods", "--namespace", "forkd"]) {
        let name = pod["metadata"]["name"].as_str().unwrap_or_default();
        for previous in ["--previous=false", "--previous=true"] {
            let log = kubectl(&["logs", "--namespace", "forkd", name, "--tail=60", previous]);
            if log.code == 0 {
                heading(&format!("log of {name} ({previous})"));
                eprintln!("{}", log.stdout);
            }
        }
    }
    for pod in items(&["pods", "--namespace", SHOP]) {
        let name = pod["metadata"]["name"].as_str().unwrap_or_default();
        for container in pod["spec"]["ephemeralContainers"].as_array().into_iter().flatten() {
            let container = container["name"].as_str().unwrap_or_default();
            heading(&format!("log of {container} in {name}"));
            eprintln!(
                "{}",
                kubectl(&["logs", "--namespace", SHOP, name, "-c", container, "--tail=40"]).stdout
            );
        }
    }
    heading("events");
    eprintln!("{}", kubectl(&["get", "events", "--namespace", SHOP, "--sort-by=.lastTimestamp"]).stdout);
}

fn heading(text: &str) {
    eprintln!("\n──── {text}");
}

/// All that forkd's processes have logged in the cluster, for a search.
#[track_caller]
pub fn cluster_logs() -> String {
    let mut all = String::new();
    for namespace in ["forkd", SHOP] {
        for pod in items(&["pods", "--namespace", namespace]) {
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            let mut containers: Vec<&str> = pod["spec"]["ephemeralContainers"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|container| container["name"].as_str())
                .collect();
            if namespace == "forkd" {
                containers.extend(pod["spec"]["containers"][0]["name"].as_str());
            }
            for container in containers {
                // A container that never started has no log.
                all += &kubectl(&["logs", "--namespace", namespace, name, "-c", container]).stdout;
            }
        }
    }
    all
}

/// The administrator on alice's laptop.
pub fn as_administrator(laptop: &Laptop) -> Laptop {
    laptop.with_kubeconfig(&administrator())
}
