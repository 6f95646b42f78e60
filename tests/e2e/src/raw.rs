//! Ports that speak no HTTP: `--all`.

use crate::harness::cluster::{SHOP, apply, kubectl, pods_of};
use crate::harness::shop::Server;
use crate::harness::wait::so;
use crate::harness::{Laptop, eventually, inside, on_laptop};

#[track_caller]
fn taken(laptop: &Laptop) -> Server {
    laptop.connect();
    let queue = laptop.serve("queue", "laptop");
    let (greets, echo) = (format!("{}:greets", queue.ports[0]), format!("{}:7001", queue.ports[1]));
    let args = ["--all", "--fork", "alice", "--port", &greets, "--port", &echo];
    let said = laptop.intercept("queue", 0, &args);
    assert_eq!(said["all"], true);
    queue
}

#[test]
fn raw_connections_reach_the_laptop_whoever_speaks_first() {
    on_laptop(|laptop| {
        let _queue = taken(laptop);
        let client = inside();
        for (kind, addr) in [("tcp-greets", "queue:7000"), ("tcp", "queue:7001")] {
            let line = client.one(kind, addr, &["--n", "5", "--bytes", "300000"]).fine();
            assert_eq!((line.from(), line.messages, line.same), ("laptop", 5, Some(true)), "{addr}");
        }
        let held = client.one("tcp-halfclose", "queue:7001", &["--bytes", "2000000"]).fine();
        assert_eq!((held.from(), held.bytes, held.same), ("laptop", 2_000_000, Some(true)));
        assert_eq!(client.one("tcp-reset", "queue:7001", &[]).fine().errno, "ECONNRESET");
        laptop.leave("queue");
        assert_eq!(client.one("tcp-greets", "queue:7000", &[]).fine().from(), "cluster");
    });
}

#[test]
fn the_pod_stays_ready_although_its_probed_port_is_taken() {
    on_laptop(|laptop| {
        let queue = taken(laptop);
        let restarts = || {
            let path = "--output=jsonpath={.items[*].status.containerStatuses[*].restartCount}";
            kubectl(&["--namespace", SHOP, "get", "pods", "--selector=app=queue", path]).ok()
        };
        let before = restarts();
        // Probes answered by the pod itself: even a laptop that serves nothing does not make it unready.
        drop(queue);
        let node = kubectl(&["get", "nodes", "--output=jsonpath={.items[0].metadata.name}"]).ok();
        let probes = || {
            let metrics =
                kubectl(&["get", "--raw", &format!("/api/v1/nodes/{node}/proxy/metrics/probes")]).ok();
            metrics
                .lines()
                .filter(|line| line.contains("container=\"queue\"") && line.starts_with("prober_probe_total"))
                .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
                .sum::<f64>()
        };
        let begin = probes();
        eventually("the kubelet has probed four times more", || {
            so(probes() >= begin + 4.0, || "not yet".to_owned())
        });
        assert_eq!((pods_of("queue").len(), restarts()), (1, before));
    });
}

#[test]
fn with_all_every_http_request_reaches_the_laptop() {
    on_laptop(|laptop| {
        laptop.connect();
        let cart = laptop.serve("cart", "laptop");
        laptop.intercept("cart", cart.port(), &["--all", "--fork", "alice"]);
        for key in ["", "alice", "bob"] {
            assert_eq!(inside().http("cart:8080", key).fine().from(), "laptop", "{key:?}");
        }
    });
}

#[test]
fn a_port_that_is_known_to_speak_no_http_needs_all_and_udp_is_not_there_yet() {
    on_laptop(|laptop| {
        laptop.connect();
        apply(
            "{apiVersion: v1, kind: Service, metadata: {name: redis, namespace: shop}, spec: {selector: {app: queue}, \
             ports: [{name: redis, port: 6379, targetPort: 7001}]}}",
        );
        let intercept = |service: &str, more: &[&str]| {
            laptop.forkd(&[&["intercept", service, "--namespace", SHOP, "--port", "6379"], more].concat())
        };
        let refused = intercept("redis", &[]);
        assert!(refused.code == 1 || refused.code == 2, "{refused}");
        let refused = refused.clone().fails(refused.code, &["error:", "redis", "try:", "--all"]);
        assert!(!refused.stderr.contains("panicked"), "{refused}");
        let queue = laptop.serve("queue", "laptop");
        let port = queue.ports[1].to_string();
        laptop.forkd(&["intercept", "redis", "--namespace", SHOP, "--all", "--port", &port]).ok();
        assert_eq!(inside().one("tcp", "redis:6379", &[]).fine().from(), "laptop");
        laptop.leave("redis");
        kubectl(&["--namespace", SHOP, "delete", "service", "redis"]).ok();
        let udp = intercept("clock", &["--all"]);
        assert!(udp.code == 1 || udp.code == 2, "{udp}");
        udp.clone().fails(udp.code, &["udp"]);
    });
}

#[test]
fn what_is_no_http_on_a_keyed_port_goes_to_the_application_byte_for_byte() {
    on_laptop(|laptop| {
        laptop.connect();
        let queue = laptop.serve("queue", "laptop");
        // Nothing says what this port speaks, so a keyed intercept of it is allowed.
        let spec = format!("{}:7001", queue.ports[1]);
        laptop.intercept("queue", 0, &["--port", &spec, "--fork", "alice"]);
        let line = inside().one("tcp", "queue:7001", &["--n", "3", "--bytes", "200000"]).fine();
        assert_eq!((line.from(), line.same), ("cluster", Some(true)));
        let held = inside().one("tcp-halfclose", "queue:7001", &["--bytes", "1000000"]).fine();
        assert_eq!((held.from(), held.same), ("cluster", Some(true)));
    });
}
