//! Several developers on one cluster: no traffic crosses, nobody acts in another's name.

use crate::harness::cluster::{SHOP, kubectl_as};
use crate::harness::wait::so;
use crate::harness::{Laptop, Output, eventually, inside, on_two_laptops};

fn intercept(laptop: &Laptop, service: &str, port: u16, more: &[&str]) -> Output {
    let port = port.to_string();
    laptop.forkd(&[&["intercept", service, "--namespace", SHOP, "--port", &port], more].concat())
}

#[test]
fn two_forks_of_one_service_never_cross_in_a_thousand_mixed_requests() {
    on_two_laptops(|alice, bob| {
        alice.connect();
        bob.connect();
        let (hers, his) = (alice.serve("cart", "alices"), bob.serve("cart", "bobs"));
        alice.intercept("cart", hers.port(), &["--fork", "alice"]);
        bob.intercept("cart", his.port(), &["--fork", "bob"]);
        let mut seen = 0;
        for (kind, more) in [
            ("http1", &["--parallel", "10"][..]),
            ("http1", &["--keepalive"]),
            ("h2c", &["--keepalive", "--parallel", "10"]),
            ("h2c", &["--parallel", "5"]),
        ] {
            let args = [&["--mixed", "alice,bob,-,bob,alice", "--n", "250"], more].concat();
            for line in inside().ask(kind, "cart:8080", &args) {
                let line = line.fine();
                let from = match line.key.as_str() {
                    "alice" => "alices",
                    "bob" => "bobs",
                    _ => "cluster",
                };
                assert_eq!(line.from(), from, "{kind}: {line:?}");
                seen += 1;
            }
        }
        assert_eq!(seen, 1000);
        // One leaves, the other does not notice.
        alice.leave("cart");
        assert_eq!(inside().http("cart:8080", "bob").fine().from(), "bobs");
        assert_eq!(inside().http("cart:8080", "alice").fine().from(), "cluster");
    });
}

#[test]
fn a_second_claim_of_the_same_target_is_refused_with_the_holders_name() {
    on_two_laptops(|alice, bob| {
        alice.connect();
        let cart = alice.serve("cart", "first");
        alice.intercept("cart", cart.port(), &["--fork", "alice"]);
        // The same user on a second laptop.
        let again = bob.with_kubeconfig(alice.kubeconfig());
        again.connect();
        let host = alice.run("hostname", &[]).ok();
        let refused = intercept(&again, "cart", 1, &["--fork", "alice"]);
        refused.fails(1, &["error:", "alice", host.trim(), "try:"]);
        // The first goes on, and lets go when it wants to.
        assert_eq!(inside().http("cart:8080", "alice").fine().from(), "first");
        alice.leave("cart");
        let cart = again.serve("cart", "second");
        again.intercept("cart", cart.port(), &["--fork", "alice"]);
        assert_eq!(inside().http("cart:8080", "alice").fine().from(), "second");
        again.forkd(&["quit"]).ok();
    });
}

#[test]
fn another_users_fork_is_refused_with_its_owners_name() {
    on_two_laptops(|alice, bob| {
        alice.connect();
        bob.connect();
        let cart = alice.serve("cart", "alices");
        alice.intercept("cart", cart.port(), &["--fork", "shared"]);
        intercept(bob, "cart", 1, &["--fork", "shared"]).fails(1, &["alice", "try:", "--fork"]);
        intercept(bob, "web", 1, &["--fork", "shared"]).fails(1, &["alice"]);
    });
}

#[test]
fn only_one_laptop_at_a_time_takes_everything() {
    on_two_laptops(|alice, bob| {
        alice.connect();
        bob.connect();
        let (hers, his) = (alice.serve("cart", "alices"), bob.serve("cart", "bobs"));
        alice.intercept("cart", hers.port(), &["--all", "--fork", "alice"]);
        intercept(bob, "cart", his.port(), &["--all", "--fork", "bob"]).fails(1, &["alice"]);
        assert_eq!(inside().http("cart:8080", "").fine().from(), "alices");
        // His own key still leads to him: personal beats everything.
        bob.intercept("cart", his.port(), &["--fork", "bob"]);
        assert_eq!(inside().http("cart:8080", "bob").fine().from(), "bobs");
        assert_eq!(inside().http("cart:8080", "").fine().from(), "alices");
    });
}

#[test]
fn nobody_acts_in_another_users_name_by_plain_kubectl() {
    on_two_laptops(|alice, bob| {
        let fork = |name: &str, owner: &str| {
            format!(
                "{{apiVersion: forkd.dev/v1alpha1, kind: Fork, metadata: {{name: {name}}}, spec: {{owner: {owner}}}}}"
            )
        };
        let target = |owner: &str| {
            format!(
                "{{apiVersion: forkd.dev/v1alpha1, kind: ForkTarget, metadata: {{name: x, namespace: shop}}, spec: {{\
                 fork: hers, owner: {owner}, service: cart, ports: [{{port: 8080, laptopPort: 1}}], laptop: {{id: x}}}}}}"
            )
        };
        let create =
            |laptop: &Laptop, yaml: &str| kubectl_as(laptop.kubeconfig(), &["create", "-f", "-"], Some(yaml));
        create(bob, &fork("hers", "alice")).fails(1, &["forbidden", "spec.owner", "alice", "bob"]);
        create(bob, &target("alice")).fails(1, &["forbidden", "spec.owner", "alice", "bob"]);
        create(alice, &fork("hers", "alice")).ok();
        let as_bob = |args: &[&str]| kubectl_as(bob.kubeconfig(), args, None);
        as_bob(&["delete", "fork", "hers"]).fails(1, &["forbidden"]);
        let steal = r#"{"spec":{"owner":"bob"}}"#;
        as_bob(&["patch", "fork", "hers", "--type=merge", "--patch", steal]).fails(1, &["forbidden"]);

        // A target of his own in her fork: it exists, but nothing is routed to it.
        create(bob, &target("bob")).ok();
        eventually("the target is refused", || {
            let target = crate::harness::cluster::get(&["forktarget", "x", "--namespace", SHOP]);
            let ready = crate::harness::cluster::condition(&target, "Ready").map(str::to_owned);
            so(ready.as_deref() == Some("False"), || target.to_string())
        });
        as_bob(&["delete", "forktarget", "x", "--namespace", SHOP]).ok();
        kubectl_as(alice.kubeconfig(), &["delete", "fork", "hers"], None).ok();
    });
}
