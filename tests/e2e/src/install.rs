//! `forkd install`, `uninstall`, `version`.

use crate::harness::cluster::{self, SHOP, get, kubectl, kubectl_as};
use crate::harness::install::{developers, image, install, installed};
use crate::harness::test::as_administrator;
use crate::harness::wait::so;
use crate::harness::{eventually, inside, on_laptop};

#[test]
fn print_gives_yaml_that_a_cluster_takes_and_dry_run_changes_nothing() {
    on_laptop(|laptop| {
        let administrator = as_administrator(laptop);
        let image = image();
        let yaml = administrator.forkd(&["install", "--print", "--image", &image]).ok();
        let kinds: Vec<_> = yaml.lines().filter_map(|line| line.strip_prefix("kind: ")).collect();
        for kind in [
            "CustomResourceDefinition",
            "Deployment",
            "StatefulSet",
            "ValidatingAdmissionPolicy",
            "ClusterRole",
        ] {
            assert!(kinds.contains(&kind), "{kinds:?}");
        }
        let args = ["apply", "--server-side", "--dry-run=server", "--force-conflicts", "--filename=-"];
        kubectl_as(administrator.kubeconfig(), &args, Some(&yaml)).ok();

        let generation = || {
            get(&["deployment", "forkd-controller", "--namespace", "forkd"])["metadata"]["generation"].clone()
        };
        let before = generation();
        install(&["--dry-run", "--relays", "3"]).ok();
        assert_eq!(generation(), before);
        let relays = get(&["statefulset", "forkd-relay", "--namespace", "forkd"]);
        assert_eq!(relays["spec"]["replicas"], 2);
    });
}

#[test]
fn to_install_again_is_to_change_nothing_and_sessions_go_on() {
    on_laptop(|laptop| {
        laptop.connect();
        let cart = laptop.serve("cart", "laptop");
        laptop.intercept("cart", cart.port(), &["--fork", "alice"]);
        let workloads = || kubectl(&["--namespace", "forkd", "get", "pods", "--output=name"]).ok();
        let before = workloads();
        install(&[]).ok();
        assert_eq!(workloads(), before);
        assert_eq!(inside().http("cart:8080", "alice").fine().from(), "laptop");
        let version = as_administrator(laptop).forkd_json(&["version"]);
        assert!(version.to_string().matches(env!("CARGO_PKG_VERSION")).count() >= 2, "both sides: {version}");
    });
}

#[test]
fn install_without_the_rights_names_what_is_missing() {
    on_laptop(|laptop| {
        laptop
            .forkd(&["install", "--yes", "--image-pull-policy", "Never"])
            .fails(4, &["error:", "because:", "customresourcedefinitions", "try:"]);
    });
}

#[test]
fn uninstall_gives_every_port_back_and_leaves_no_object() {
    on_laptop(|laptop| {
        let administrator = as_administrator(laptop);
        laptop.connect();
        let cart = laptop.serve("cart", "laptop");
        laptop.intercept("cart", cart.port(), &["--fork", "alice"]);
        assert_eq!(inside().http("cart:8080", "alice").fine().from(), "laptop");
        let mut others = inside().start("http1", "cart:8080", &["--n", "1200", "--path", "/slow?ms=5"]);

        administrator.forkd(&["uninstall", "--dry-run"]).ok();
        assert!(installed());
        administrator.forkd(&["uninstall", "--yes"]).ok();
        assert_eq!(objects_of_forkd(), "");
        assert_eq!(others.code(), 0, "requests without the key are answered throughout: {}", others.said());
        assert_eq!(inside().http("cart:8080", "alice").fine().from(), "cluster");
        let web = inside().http("web:80", "").fine();
        assert_eq!(web.answer().errors(), [""; 0], "the shop works");
        eventually("no agent runs", || {
            let agents = cluster::node_processes("/forkd-agent (agent|gateway|relay|controller).*");
            so(agents.is_empty(), || format!("{agents:?}"))
        });
        let quit = laptop.forkd(&["quit"]);
        assert!(matches!(quit.code, 0 | 3), "{quit}");
        laptop.forkd(&["connect"]).fails(4, &["error:", "try:", "forkd install"]);
        laptop.forkd(&["quit"]).ok();
        administrator.forkd(&["uninstall", "--yes"]).ok(); // nothing to do is no failure

        // What is not forkd's is not overwritten.
        kubectl(&["create", "clusterrole", "forkd-view", "--verb=get", "--resource=pods"]).ok();
        install(&[]).fails(4, &["error:", "forkd-view"]);
        kubectl(&["delete", "clusterrole", "forkd-view"]).ok();
        install(&[]).ok();
        developers();
        laptop.connect();
        laptop.intercept("cart", cart.port(), &["--fork", "alice"]);
        assert_eq!(inside().http("cart:8080", "alice").fine().from(), "laptop");
    });
}

/// Everything of any kind that bears forkd's label, name or API group.
#[track_caller]
fn objects_of_forkd() -> String {
    let kinds = kubectl(&["api-resources", "--verbs=list", "--output=name"]).ok();
    let kinds: Vec<&str> = kinds.lines().filter(|kind| !kind.starts_with("events")).collect();
    let of_the_group: Vec<_> = kinds.iter().filter(|kind| kind.ends_with(".forkd.dev")).collect();
    assert!(of_the_group.is_empty(), "{of_the_group:?}");
    let kinds = kinds.join(",");
    let labelled = kubectl(&[
        "get",
        &kinds,
        "--all-namespaces",
        "--selector=app.kubernetes.io/managed-by=forkd",
        "--output=name",
        "--ignore-not-found",
    ]);
    let all = kubectl(&["get", &kinds, "--all-namespaces", "--output=name", "--ignore-not-found"]).ok();
    let named = all.lines().filter(|name| name.contains("forkd")).collect::<Vec<_>>().join("\n");
    let signer = "--output=jsonpath={.items[?(@.spec.signerName==\"forkd.dev/laptop\")].metadata.name}";
    let requests = kubectl(&["get", "certificatesigningrequests", signer]).ok();
    let targets = cluster::items(&["pods", "--namespace", SHOP]);
    assert!(!targets.is_empty(), "the shop is there");
    labelled.ok() + &named + &requests
}
