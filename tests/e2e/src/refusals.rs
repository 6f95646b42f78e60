//! What cannot be done, and what forkd says about it: in three parts, with something to try.

use std::path::PathBuf;

use serde_json::Value;

use crate::harness::cluster::{SHOP, administrator, apply, kubectl};
use crate::harness::{Laptop, Output, on_laptop};

fn intercept(laptop: &Laptop, service: &str, more: &[&str]) -> Output {
    laptop.forkd(&[&["intercept", service, "--namespace", SHOP, "--fork", "alice"], more].concat())
}

/// A copy of alice's kubeconfig with some text replaced, where the laptop's user can read it.
#[track_caller]
fn kubeconfig_with(laptop: &Laptop, name: &str, change: impl FnOnce(String) -> String) -> PathBuf {
    let text = std::fs::read_to_string(laptop.kubeconfig()).expect("the kubeconfig is there");
    let path = PathBuf::from(format!("/home/dev/{name}.yaml"));
    let script = format!("cat >{} <<'END'\n{}\nEND\n", path.display(), change(text));
    laptop.run("sh", &["-c", &script]).ok();
    path
}

#[test]
fn a_kubeconfig_that_is_missing_or_broken_is_named() {
    on_laptop(|laptop| {
        laptop
            .forkd(&["connect", "--kubeconfig", "/no/such/file"])
            .fails(1, &["error:", "/no/such/file", "try:"]);
        laptop.forkd(&["connect", "--context", "nowhere"]).fails(1, &["error:", "nowhere", "try:"]);
        let broken = kubeconfig_with(laptop, "broken", |_| "clusters: {".to_owned());
        laptop.with_kubeconfig(&broken).forkd(&["connect"]).fails(1, &["error:", "broken.yaml"]);
    });
}

#[test]
fn an_api_server_that_cannot_be_reached_is_named_with_the_reason() {
    on_laptop(|laptop| {
        let closed = kubeconfig_with(laptop, "closed", |text| text.replace(":6443", ":1"));
        let closed = laptop.with_kubeconfig(&closed);
        closed.forkd(&["connect"]).fails(1, &["error:", "172.30.0.2:1", "refused", "try:"]);
        let missing = kubeconfig_with(laptop, "missing", |text| {
            text.replace("172.30.0.2", "no-such-host.outside.test")
        });
        laptop
            .with_kubeconfig(&missing)
            .forkd(&["connect"])
            .fails(1, &["error:", "no-such-host.outside.test"]);
    });
}

#[test]
fn a_user_whom_the_cluster_does_not_know_is_told_so() {
    on_laptop(|laptop| {
        let stranger = kubeconfig_with(laptop, "stranger", |text| {
            let mut config: Value = serde_yaml_ng::from_str(&text).expect("the kubeconfig is YAML");
            config["users"][0]["user"] = serde_json::json!({"token": "nobody"});
            config.to_string()
        });
        laptop.with_kubeconfig(&stranger).forkd(&["connect"]).fails(4, &["error:", "unauthorized", "try:"]);
    });
}

#[test]
fn a_service_that_is_not_there_is_told_with_those_of_similar_names() {
    on_laptop(|laptop| {
        laptop.connect();
        intercept(laptop, "carts", &[]).fails(1, &["error:", "carts", "try:", "cart"]);
        laptop.forkd(&["intercept", "cart", "--namespace", "nowhere"]).fails(4, &["error:", "nowhere"]);
    });
}

#[test]
fn a_service_without_pods_is_told_so() {
    on_laptop(|laptop| {
        laptop.connect();
        apply(
            "{apiVersion: v1, kind: List, items: [\
             {apiVersion: v1, kind: Service, metadata: {name: empty, namespace: shop}, spec: {selector: {app: nobody}, ports: [{port: 80}]}},\
             {apiVersion: v1, kind: Service, metadata: {name: external, namespace: shop}, spec: {ports: [{port: 80}]}}]}",
        );
        intercept(laptop, "empty", &[]).fails(1, &["error:", "empty", "no", "pod"]);
        intercept(laptop, "external", &[]).fails(1, &["error:", "external", "selector"]);
        kubectl(&["--namespace", SHOP, "delete", "service", "empty", "external"]).ok();
    });
}

#[test]
fn a_port_that_is_not_there_is_told_with_those_that_are() {
    on_laptop(|laptop| {
        laptop.connect();
        let refused = intercept(laptop, "cart", &["--port", "8080:9999"]);
        refused.clone().fails(refused.code, &["error:", "9999", "8080 (http)"]);
        assert!(matches!(refused.code, 1 | 2), "{refused}");
        let ambiguous = intercept(laptop, "queue", &["--all", "--port", "7000"]);
        ambiguous.clone().fails(ambiguous.code, &["7000 (greets)", "7001 (echo)"]);
        assert!(matches!(ambiguous.code, 1 | 2), "{ambiguous}");
    });
}

#[test]
fn a_fork_whose_id_is_no_name_is_refused_before_anything_happens() {
    on_laptop(|laptop| {
        laptop.connect();
        for id in ["Alice!", "a b", "-x", &"x".repeat(41)] {
            let refused = laptop.forkd(&["intercept", "cart", "--namespace", SHOP, "--fork", id]);
            assert!(matches!(refused.code, 1 | 2), "{id}: {refused}");
            refused.clone().fails(refused.code, &["error:", "fork"]);
        }
    });
}

#[test]
fn commands_that_need_a_session_say_how_to_get_one() {
    on_laptop(|laptop| {
        for args in [&["status"][..], &["list"], &["leave", "cart"]] {
            laptop.forkd(args).fails(3, &["error:", "try:", "forkd connect"]);
        }
        // The administrator's is another context of another kubeconfig: no session either.
        laptop.connect();
        laptop.with_kubeconfig(&administrator()).forkd(&["status"]).fails(3, &["--context"]);
    });
}

#[test]
fn an_intercept_whose_laptop_port_nobody_listens_on_is_noted() {
    on_laptop(|laptop| {
        laptop.connect();
        let noted = intercept(laptop, "cart", &["--port", "18081"]);
        assert_eq!(noted.code, 0, "{noted}");
        assert!(noted.stderr.contains("note:") && noted.stderr.contains("18081"), "{noted}");
    });
}
