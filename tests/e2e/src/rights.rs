//! Rights: each verb that forkd needs, taken away alone, is named in the failure. forkd gives nobody more reach than
//! their own RBAC.

use serde_json::{Value, json};

use crate::harness::cluster::{self, SHOP, apply, kubectl};
use crate::harness::test::no_fork_is_left;
use crate::harness::wait::so;
use crate::harness::{Laptop, Output, eventually, on_laptop};

/// Where a right is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum In {
    Cluster,
    Forkd,
    Shop,
}

/// Everything that connecting and intercepting with a command ask for: place, API group, resource, verb.
const RIGHTS: &[(In, &str, &str, &str)] = &[
    (In::Cluster, "certificates.k8s.io", "certificatesigningrequests", "create"),
    (In::Cluster, "certificates.k8s.io", "certificatesigningrequests", "get"),
    (In::Cluster, "certificates.k8s.io", "certificatesigningrequests", "list"),
    (In::Cluster, "certificates.k8s.io", "certificatesigningrequests", "watch"),
    (In::Cluster, "forkd.dev", "forks", "create"),
    (In::Cluster, "forkd.dev", "forks", "get"),
    (In::Cluster, "forkd.dev", "forks", "list"),
    (In::Cluster, "forkd.dev", "forks", "watch"),
    (In::Cluster, "forkd.dev", "forks", "delete"),
    (In::Forkd, "", "pods", "get"),
    (In::Forkd, "", "pods/portforward", "create"),
    (In::Forkd, "", "pods/portforward", "get"),
    (In::Shop, "", "services", "get"),
    (In::Shop, "", "services", "list"),
    (In::Shop, "", "pods", "get"),
    (In::Shop, "", "pods", "list"),
    (In::Shop, "", "pods/portforward", "create"),
    (In::Shop, "", "pods/exec", "create"),
    (In::Shop, "forkd.dev", "forktargets", "create"),
    (In::Shop, "forkd.dev", "forktargets", "get"),
    (In::Shop, "forkd.dev", "forktargets", "list"),
    (In::Shop, "forkd.dev", "forktargets", "watch"),
    (In::Shop, "forkd.dev", "forktargets", "patch"),
    (In::Shop, "forkd.dev", "forktargets", "delete"),
];

/// Gives the user `carol` all of [`RIGHTS`] but those that `without` names.
#[track_caller]
fn give(without: &[(In, &str, &str)]) {
    let mut items = Vec::new();
    for (place, namespace) in [(In::Cluster, None), (In::Forkd, Some("forkd")), (In::Shop, Some(SHOP))] {
        let rules: Vec<Value> = RIGHTS
            .iter()
            .filter(|(at, _, resource, verb)| *at == place && !without.contains(&(*at, resource, verb)))
            .map(|(_, group, resource, verb)| json!({"apiGroups": [group], "resources": [resource], "verbs": [verb]}))
            .collect();
        let (kind, mut metadata) = match namespace {
            None => ("ClusterRole", json!({"name": "carol"})),
            Some(_) => ("Role", json!({"name": "carol"})),
        };
        if let Some(namespace) = namespace {
            metadata["namespace"] = namespace.into();
        }
        let rbac = "rbac.authorization.k8s.io";
        items.push(
            json!({"apiVersion": format!("{rbac}/v1"), "kind": kind, "metadata": metadata, "rules": rules}),
        );
        items.push(json!({
            "apiVersion": format!("{rbac}/v1"), "kind": format!("{kind}Binding"), "metadata": metadata,
            "roleRef": {"apiGroup": rbac, "kind": kind, "name": "carol"},
            "subjects": [{"apiGroup": rbac, "kind": "User", "name": "carol"}],
        }));
    }
    apply(&json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string());
}

fn carol(laptop: &Laptop) -> Laptop {
    laptop.with_kubeconfig(&cluster::user("carol", &[]))
}

fn intercept(laptop: &Laptop) -> Output {
    laptop.forkd(&[
        "intercept",
        "cart",
        "--namespace",
        SHOP,
        "--fork",
        "carol",
        "--port",
        "18082",
        "--",
        "true",
    ])
}

#[test]
fn with_exactly_these_rights_everything_works() {
    on_laptop(|laptop| {
        give(&[]);
        let carol = carol(laptop);
        carol.connect();
        // A refusal of a moment ago may be remembered.
        eventually("the cluster lets her", || {
            let line = carol.client().http("cart:8080", "");
            so(line.from() == "cluster", || format!("{line:?}"))
        });
        let output = intercept(&carol);
        assert_eq!(output.code, 0, "{output}");
        carol.forkd(&["quit"]).ok();
    });
}

#[test]
fn a_right_that_connecting_needs_is_named_when_it_is_missing() {
    on_laptop(|laptop| {
        let carol = carol(laptop);
        for (place, resource, verb) in [
            (In::Cluster, "certificatesigningrequests", "create"),
            (In::Cluster, "certificatesigningrequests", "get"),
            (In::Forkd, "pods/portforward", "create"),
        ] {
            // To watch one object is to list and watch with its name, or to get it: which of them is forkd's choice.
            let missing: &[(In, &str, &str)] = match verb {
                "get" => &[(place, resource, "get"), (place, resource, "list"), (place, resource, "watch")],
                _ => &[(place, resource, verb)],
            };
            give(missing);
            let refused = carol.forkd(&["connect", "--namespace", SHOP]);
            let named = missing.iter().any(|(_, _, verb)| refused.stderr.contains(verb));
            assert!(named, "one of {missing:?} should be named:\n{refused}");
            refused.fails(4, &["error:", "because:", resource, "try:", "forkd-user"]);
            carol.forkd(&["quit"]).ok();
        }
    });
}

#[test]
fn a_right_that_intercepting_needs_is_named_when_it_is_missing() {
    on_laptop(|laptop| {
        let carol = carol(laptop);
        give(&[]);
        carol.connect();
        for (place, resource, verb) in [
            (In::Shop, "services", "get"),
            (In::Cluster, "forks", "create"),
            (In::Shop, "forktargets", "create"),
            (In::Shop, "pods/exec", "create"),
        ] {
            give(&[(place, resource, verb)]);
            // The API server's authorizer reads its own cache: refusal begins when it has heard of the change.
            eventually("the right is gone", || {
                let can = kubectl(&[
                    "auth",
                    "can-i",
                    verb,
                    &resource.replace("forks", "forks.forkd.dev"),
                    "--namespace",
                    SHOP,
                    "--as=carol",
                ]);
                so(can.code != 0, || can.to_string())
            });
            let refused = intercept(&carol);
            refused.fails(4, &["error:", "because:", verb, resource, "try:"]);
            no_fork_is_left();
        }
        give(&[]);
        carol.forkd(&["quit"]).ok();
    });
}

#[test]
fn nobody_dials_where_they_may_not_forward_ports() {
    on_laptop(|laptop| {
        give(&[(In::Shop, "pods/portforward", "create")]);
        let carol = carol(laptop);
        carol.connect();
        for addr in ["cart:8080".to_owned(), format!("{}:8080", cluster::pods_of("cart")[0].ip)] {
            let line = carol.client().one("connect", &addr, &[]);
            assert!(matches!(line.errno.as_str(), "EHOSTUNREACH" | "EACCES" | "EPERM"), "{addr}: {line:?}");
        }
        let status = carol.forkd_json(&["status"]);
        let problems = status["problems"].to_string();
        assert!(problems.contains("pods/portforward") && problems.contains(SHOP), "{status}");
        carol.forkd(&["quit"]).ok();
        give(&[]);
    });
}

#[test]
fn the_environment_can_be_done_without() {
    on_laptop(|laptop| {
        give(&[(In::Shop, "pods/exec", "create")]);
        let carol = carol(laptop);
        carol.connect();
        let output = carol.forkd(&[
            "intercept",
            "cart",
            "--namespace",
            SHOP,
            "--fork",
            "carol",
            "--port",
            "18082",
            "--no-env",
            "--",
            "true",
        ]);
        assert_eq!(output.code, 0, "{output}");
        carol.forkd(&["quit"]).ok();
        give(&[]);
    });
}
