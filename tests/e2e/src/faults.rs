//! What dies, and what goes on: the laptop is restored, the baseline answers, sessions survive.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::cluster::{
    SHOP, kill_on_node, kubectl, node_processes, pods_of, rolled_out, script, target_ready, text,
};
use crate::harness::process::run;
use crate::harness::shop::{Client, Server};
use crate::harness::test::no_trace;
use crate::harness::wait::so;
use crate::harness::{Laptop, Process, eventually, inside, on_laptop};

#[track_caller]
fn intercepted(laptop: &Laptop, more: &[&str]) -> Server {
    laptop.connect();
    let cart = laptop.serve("cart", "laptop");
    laptop.intercept("cart", cart.port(), &[&["--fork", "alice"], more].concat());
    assert_eq!(inside().http("cart:8080", "alice").fine().from(), "laptop");
    cart
}

fn end(pids: &[i32]) {
    for pid in pids {
        // One may have ended because of the one before.
        let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
    }
}

/// Waits until a keyed request gets an error that says why, and sees that all others get the cluster's answer.
#[track_caller]
fn answered(status: u16, says: &[&str]) {
    eventually("keyed requests get an error that says why", || {
        let line = inside().http("cart:8080", "alice");
        let body = line.body.to_string().to_lowercase();
        let told = line.status == status && says.iter().all(|word| body.contains(word));
        so(told && !line.served_by.is_empty(), || format!("{line:?}"))
    });
    assert_eq!(inside().http("cart:8080", "").fine().from(), "cluster");
}

/// After a daemon was killed: the same laptop takes the target again, and gives it back.
#[track_caller]
fn take_again_and_leave(laptop: &Laptop, cart: &Server) {
    laptop.connect();
    laptop.intercept("cart", cart.port(), &["--fork", "alice"]);
    assert_eq!(inside().http("cart:8080", "alice").fine().from(), "laptop");
    laptop.leave("cart");
}

#[test]
fn a_killed_daemon_leaves_the_laptop_as_it_was_and_its_fork_an_error_that_says_why() {
    on_laptop(|laptop| {
        let before = laptop.traces();
        let cart = intercepted(laptop, &[]);
        end(&[laptop.daemon()]);
        no_trace(laptop, &before);
        answered(503, &["laptop"]);
        take_again_and_leave(laptop, &cart);
    });
}

#[test]
fn with_on_unavailable_baseline_the_cluster_answers_for_a_laptop_that_is_gone() {
    on_laptop(|laptop| {
        let cart = intercepted(laptop, &["--on-unavailable", "baseline"]);
        end(&[laptop.daemon()]);
        eventually("keyed requests get the cluster's answer", || {
            let line = inside().http("cart:8080", "alice");
            so(line.from() == "cluster", || format!("{line:?}"))
        });
        take_again_and_leave(laptop, &cart);
    });
}

#[test]
fn whichever_process_of_the_helper_is_killed_routes_device_and_resolver_are_restored() {
    on_laptop(|laptop| {
        let before = laptop.traces();
        let count = {
            laptop.connect();
            let count = laptop.helpers().len();
            laptop.forkd(&["quit"]).ok();
            no_trace(laptop, &before);
            count
        };
        for which in 0..count {
            laptop.connect();
            let helper = laptop.helpers()[which];
            end(&[helper]);
            eventually("the laptop's network is as it was", || {
                let now = laptop.traces();
                let same = (&now.links, &now.routes, &now.routes6, &now.resolver, &now.resolver_file)
                    == (
                        &before.links,
                        &before.routes,
                        &before.routes6,
                        &before.resolver,
                        &before.resolver_file,
                    );
                so(same, || format!("helper process {which}: {now:#?}"))
            });
            let quit = laptop.forkd(&["quit"]);
            assert!(matches!(quit.code, 0 | 3), "{quit}");
            no_trace(laptop, &before);
        }
        laptop.connect();
        assert_eq!(laptop.client().http("cart:8080", "").fine().from(), "cluster", "a session starts again");
    });
}

#[test]
fn daemon_and_helper_killed_together_leave_a_working_resolver_and_the_next_start_sweeps() {
    on_laptop(|laptop| {
        let before = laptop.traces();
        laptop.connect();
        let mut all = laptop.processes(&["forkd", " helper"]);
        all.push(laptop.daemon());
        end(&all);
        eventually("all of them are gone", || so(laptop.traces().processes == 0, || format!("{all:?}")));
        assert!(laptop.run("getent", &["ahosts", "www.outside.test"]).ok().contains("198.51.100.10"));
        let between = laptop.traces();
        assert_eq!(
            (&between.links, &between.routes),
            (&before.links, &before.routes),
            "the device went with its holders"
        );
        laptop.connect();
        assert_eq!(laptop.client().http("cart:8080", "").fine().from(), "cluster");
        laptop.forkd(&["quit"]).ok();
        no_trace(laptop, &before);
    });
}

#[test]
fn a_laptop_on_which_nothing_listens_is_said_in_the_502() {
    on_laptop(|laptop| {
        drop(intercepted(laptop, &[]));
        answered(502, &["laptop", "nothing listens on port"]);
    });
}

#[test]
fn a_pod_that_is_deleted_has_a_successor_that_is_routed() {
    on_laptop(|laptop| {
        let _cart = intercepted(laptop, &[]);
        let victim = pods_of("cart").remove(0);
        kubectl(&["--namespace", SHOP, "delete", "pod", &victim.name]).ok();
        rolled_out(SHOP, "deployment/cart");
        eventually("all of the pods are routed", || {
            let target = target_ready("cart");
            let pods = target["status"]["pods"].as_object().cloned().unwrap_or_default();
            so(target["status"]["routed"] == "2/2" && !pods.contains_key(&victim.name), || target.to_string())
        });
        for pod in pods_of("cart") {
            assert_eq!(
                inside().http(&format!("{}:8080", pod.ip), "alice").fine().from(),
                "laptop",
                "{}",
                pod.name
            );
        }
    });
}

#[test]
fn an_agent_that_is_killed_takes_its_redirect_along_and_has_a_successor() {
    on_laptop(|laptop| {
        let _cart = intercepted(laptop, &[]);
        let agents = node_processes("/forkd-agent agent");
        assert!(agents.len() >= 2, "an agent for each pod of cart: {agents:?}");
        kill_on_node(&agents);
        eventually("the application answers by itself, or a new agent lets it", || {
            let line = inside().http("cart:8080", "");
            so(line.from() == "cluster", || format!("{line:?}"))
        });
        eventually("new agents deliver in every pod", || {
            let wrong: Vec<_> = pods_of("cart")
                .into_iter()
                .map(|pod| inside().http(&format!("{}:8080", pod.ip), "alice"))
                .filter(|line| line.from() != "laptop")
                .collect();
            so(wrong.is_empty(), || format!("{wrong:?}"))
        });
    });
}

#[test]
fn a_killed_controller_stops_nothing_and_the_next_one_serves_new_intercepts() {
    on_laptop(|laptop| {
        let _cart = intercepted(laptop, &[]);
        let mut load = inside().start(
            "http1",
            "cart:8080",
            &["--mixed", "alice,-", "--n", "1500", "--path", "/slow?ms=5"],
        );
        kill_pods("controller");
        let web = laptop.serve("web", "laptop-web");
        laptop.intercept("web", web.port(), &["--fork", "alice"]);
        assert_eq!(inside().http("web:80", "alice").fine().from(), "laptop-web");
        assert_eq!(load.code(), 0, "{}", load.said());
        laptop.leave("web");
        assert_eq!(inside().http("cart:8080", "alice").fine().from(), "laptop");
    });
}

#[test]
fn live_flows_go_on_when_a_relay_or_the_api_server_dies() {
    on_laptop(|laptop| {
        let _cart = intercepted(laptop, &[]);
        let service = crate::harness::cluster::get(&["service", "cart", "--namespace", SHOP]);
        let cart_address = format!("{}:8080", text(&service["spec"]["clusterIP"]));
        // Out of the laptop and into it: each a request that is answered for ten seconds.
        let flows = || {
            let args = ["--path", "/stream?n=50&ms=200", "--timeout", "60s"];
            let inward = [&["--key", "alice"][..], &args].concat();
            let out = laptop.client().hold("http1", "stock:8080", &args);
            // From the node: what a pod's client says would be lost with the API server.
            let inward = Client::Node.hold("http1", &cart_address, &inward);
            (out, inward)
        };
        let fine = |process: &mut Process| {
            assert_eq!(process.code(), 0, "{}", process.said());
            let line: serde_json::Value = serde_json::from_str(&process.said()).expect("one line of JSON");
            // Fifty lines that say who answered.
            assert!(line["bytes"].as_u64() > Some(50 * 40), "{line}");
        };
        let (mut out, mut inward) = flows();
        let path = text(&laptop.forkd_json(&["status"])["path"]);
        let relay = path
            .split_whitespace()
            .find(|word| word.starts_with("forkd-relay-"))
            .expect("a relay's name")
            .to_owned();
        kubectl(&[
            "--namespace",
            "forkd",
            "delete",
            "pod",
            relay.trim_end_matches(','),
            "--grace-period=0",
            "--force",
        ])
        .ok();
        fine(&mut out);
        fine(&mut inward);

        let (mut out, mut inward) = flows();
        run(script().args(["restart", "kube-apiserver"]), None).ok();
        fine(&mut out);
        fine(&mut inward);
        rolled_out("forkd", "statefulset/forkd-relay");
        target_ready("cart");
        assert_eq!(inside().http("cart:8080", "alice").fine().from(), "laptop");
    });
}

#[test]
fn a_killed_gateway_is_replaced_and_the_session_goes_on() {
    on_laptop(|laptop| {
        laptop.connect();
        kill_pods("gateway");
        eventually("new flows and names reach the cluster again", || {
            let line = laptop.client().http("cart.shop.svc.cluster.local:8080", "");
            so(line.from() == "cluster", || format!("{line:?}"))
        });
        eventually("status has no problem", || {
            let status = laptop.forkd_json(&["status"]);
            so(status["problems"] == serde_json::json!([]), || status.to_string())
        });
    });
}

#[test]
fn a_daemon_that_is_told_to_end_leaves_nothing() {
    on_laptop(|laptop| {
        let before = laptop.traces();
        let cart = intercepted(laptop, &[]);
        kill(Pid::from_raw(laptop.daemon()), Signal::SIGTERM).expect("the daemon is there");
        no_trace(laptop, &before);
        crate::harness::test::no_fork_is_left();
        drop(cart);
    });
}

#[test]
fn the_session_survives_a_network_that_goes_away_and_comes_back() {
    on_laptop(|laptop| {
        let _cart = intercepted(laptop, &[]);
        let root = laptop.as_root();
        root.run("ip", &["link", "set", "eth0", "down"]).ok();
        let mut later = laptop.client().start("http1", "stock:8080", &["--timeout", "60s"]);
        assert!(later.runs());
        root.run("ip", &["link", "set", "eth0", "up"]).ok();
        assert_eq!(later.code(), 0, "{}", later.said());
        eventually("keyed requests reach the laptop", || {
            let line = inside().http("cart:8080", "alice");
            so(line.from() == "laptop", || format!("{line:?}"))
        });
    });
}

/// Kills forkd's pods of a component, without grace, and waits for their successors.
#[track_caller]
fn kill_pods(component: &str) {
    let selector = format!("--selector=app.kubernetes.io/component={component}");
    kubectl(&["--namespace", "forkd", "delete", "pods", &selector, "--grace-period=0", "--force"]).ok();
    rolled_out("forkd", &format!("deployment/forkd-{component}"));
}
