//! `forkd connect`: what the laptop reaches, and how it looks from a program.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;

use crate::harness::cluster::{cluster_ip, items, pods_of, text};
use crate::harness::test::no_trace;
use crate::harness::{Laptop, inside, on_laptop};

#[test]
fn services_and_pods_are_reached_by_every_name_and_address_that_a_pod_could_use() {
    on_laptop(|laptop| {
        laptop.connect();
        let (service, pod) = (cluster_ip("cart"), pods_of("cart")[0].ip.clone());
        let hosts = [
            "cart",
            "cart.shop",
            "cart.shop.svc",
            "cart.shop.svc.cluster.local",
            "cart.shop.svc.cluster.local.",
            &service,
            &pod,
        ];
        for host in hosts {
            let line = laptop.client().http(&format!("{host}:8080"), "").fine();
            assert_eq!((line.answer().service.as_str(), line.from()), ("cart", "cluster"), "{host}");
            assert_eq!(line.answer().errors(), [""; 0], "{host}");
        }
        // Another resolver than Go's: the C library's.
        for url in ["http://web/", "http://cart.shop:8080/"] {
            let answer =
                laptop.run("curl", &["--silent", "--show-error", "--fail", "--max-time", "10", url]).json();
            assert_eq!(answer["where"], "cluster", "{url}");
        }
        assert!(
            laptop
                .run("getent", &["hosts", "kube-dns.kube-system.svc.cluster.local"])
                .ok()
                .contains("10.96.0.10")
        );
    });
}

#[test]
fn names_outside_the_cluster_are_answered_as_if_there_were_no_session() {
    on_laptop(|laptop| {
        let ask = |name: &str| {
            let output = laptop.run("getent", &["ahosts", name]);
            (output.code, output.stdout)
        };
        let names =
            ["www.outside.test", "alias.outside.test", "www", "nothing.outside.test", "nothing.invalid"];
        let before = names.map(ask);
        assert!(before[0].1.contains("198.51.100.10"), "{before:?}");
        assert_ne!(before[3].0, 0, "{before:?}");
        laptop.connect();
        assert_eq!(names.map(ask), before);
        let text = dns(laptop, "text.outside.test", 16, Transport::Udp);
        assert!(text.contains("served by the laptop's own resolver"), "{text:?}");
    });
}

#[test]
fn every_type_of_record_is_answered_over_udp_and_tcp() {
    on_laptop(|laptop| {
        laptop.connect();
        for transport in [Transport::Udp, Transport::Tcp] {
            let srv = dns(laptop, "_http._tcp.cart.shop.svc.cluster.local", 33, transport);
            // Port 8080 is 0x1f 0x90, and the second is no UTF-8.
            assert!(srv.contains("\x1f\u{fffd}"), "{transport:?}: {srv:?}");
            let ip: Ipv4Addr = cluster_ip("cart").parse().expect("an address");
            let [a, b, c, d] = ip.octets();
            let ptr = dns(laptop, &format!("{d}.{c}.{b}.{a}.in-addr.arpa"), 12, transport);
            assert!(ptr.contains("cart") && ptr.contains("shop"), "{transport:?}: {ptr:?}");
        }
    });
}

#[test]
fn a_refused_port_is_refused_and_a_missing_pod_is_unreachable_at_connect_as_inside_the_cluster() {
    on_laptop(|laptop| {
        laptop.connect();
        let pod = pods_of("cart")[0].ip.clone();
        for addr in [format!("{pod}:9"), "queue:9".to_owned()] {
            let here = laptop.client().one("connect", &addr, &[]);
            assert_eq!(here.errno, "ECONNREFUSED", "{addr}: {here:?}");
            assert!(here.ms < 1000.0, "{addr}: {here:?}");
            assert_eq!(inside().one("connect", &addr, &[]).errno, here.errno, "{addr}");
        }
        let missing = format!("{}:80", free_pod_ip());
        let here = laptop.client().one("connect", &missing, &[]);
        assert_eq!(here.errno, "EHOSTUNREACH", "{here:?}");
        assert_eq!(inside().one("connect", &missing, &[]).errno, here.errno);
    });
}

#[test]
fn half_close_reset_and_large_transfers_pass_through() {
    on_laptop(|laptop| {
        laptop.connect();
        let client = laptop.client();
        let held = client.one("tcp-halfclose", "queue:7001", &["--bytes", "3000000"]).fine();
        assert_eq!((held.same, held.bytes), (Some(true), 3_000_000));
        assert_eq!(client.one("tcp-reset", "queue:7001", &[]).fine().errno, "ECONNRESET");
        let echoed = client.one("tcp-greets", "queue:7000", &["--bytes", "1000000", "--n", "20"]).fine();
        assert_eq!((echoed.same, echoed.bytes), (Some(true), 20_000_000));
        let parallel =
            client.ask("http1", "cart:8080", &["--path", "/healthz", "--n", "300", "--parallel", "50"]);
        assert_eq!(parallel.iter().filter(|line| line.status == 200).count(), 300);
    });
}

#[test]
fn the_daemon_is_the_users_and_only_the_helper_is_roots() {
    on_laptop(|laptop| {
        laptop.connect();
        let owner = |pid: i32| fs::metadata(format!("/proc/{pid}")).expect("the process is there").uid();
        let user: u32 = laptop.run("id", &["-u"]).ok().trim().parse().expect("a number");
        assert_ne!(user, 0);
        assert_eq!(owner(laptop.daemon()), user);
        assert!(laptop.helpers().into_iter().all(|helper| owner(helper) == 0));
    });
}

#[test]
fn root_has_a_session_as_well_and_leaves_as_little_behind() {
    on_laptop(|laptop| {
        let root = laptop.as_root();
        let before = laptop.traces();
        root.connect();
        assert_eq!(root.client().http("cart:8080", "").fine().from(), "cluster");
        root.forkd(&["quit"]).ok();
        no_trace(laptop, &before);
    });
}

#[test]
fn a_session_changes_routes_device_and_resolver_and_quit_takes_all_of_it_back() {
    on_laptop(|laptop| {
        let before = laptop.traces();
        laptop.connect();
        let during = laptop.traces();
        assert_eq!(during.links.len(), before.links.len() + 1, "{during:#?}");
        for range in ["10.96.0.0/16", "10.244.0.0/24"] {
            assert!(during.routes.iter().any(|route| route.starts_with(range)), "{during:#?}");
        }
        assert_ne!(during.resolver, before.resolver);
        assert_eq!(during.hosts, before.hosts, "nobody touches /etc/hosts");
        laptop.forkd(&["quit"]).ok();
        no_trace(laptop, &before);
        assert_eq!(laptop.forkd_json(&["quit"])["left"], serde_json::json!([]), "a second time is as good");
    });
}

#[test]
fn a_second_connect_finds_the_session_and_status_describes_it() {
    on_laptop(|laptop| {
        laptop.forkd(&["status"]).fails(3, &["error:", "try:", "forkd connect"]);
        let first = laptop.forkd_json(&["connect", "--namespace", "shop"]);
        assert_eq!((&first["already"], &first["user"]), (&false.into(), &"alice".into()));
        assert_eq!(laptop.forkd_json(&["connect"])["already"], true);
        let status = laptop.forkd_json(&["status"]);
        assert_eq!(status["namespace"], "shop");
        assert!(text(&status["path"]).contains("forkd-relay-"), "{status}");
        let agents = status["agents"].as_array().expect("a list");
        assert!(agents.iter().any(|agent| agent["role"] == "gateway"), "{status}");
        assert_eq!(status["problems"], serde_json::json!([]), "{status}");
        let words = laptop.forkd(&["status"]).ok();
        assert!(words.contains("alice") && words.contains("No intercepts."), "{words}");
    });
}

#[test]
fn the_namespace_of_short_names_follows_the_last_connect() {
    on_laptop(|laptop| {
        laptop.forkd(&["connect", "--namespace", "default"]).ok();
        assert_eq!(laptop.client().one("connect", "cart:8080", &[]).errno, "ENOTFOUND");
        laptop.connect();
        assert_eq!(laptop.client().http("cart:8080", "").fine().from(), "cluster");
    });
}

/// An address of the pods' range that no pod has.
fn free_pod_ip() -> String {
    let taken: Vec<String> = items(&["pods", "--all-namespaces"])
        .iter()
        .filter_map(|pod| pod["status"]["podIP"].as_str().map(str::to_owned))
        .collect();
    let cart = pods_of("cart").remove(0).ip;
    let (base, _) = cart.rsplit_once('.').expect("an IPv4 address");
    (100..250)
        .rev()
        .map(|last| format!("{base}.{last}"))
        .find(|ip| !taken.contains(ip))
        .expect("not all addresses are taken")
}

#[derive(Clone, Copy, Debug)]
enum Transport {
    Udp,
    Tcp,
}

/// Asks the session's own DNS address; the answer as text, with what is no UTF-8 replaced.
#[track_caller]
fn dns(laptop: &Laptop, name: &str, kind: u16, transport: Transport) -> String {
    let server = text(&laptop.forkd_json(&["status"])["dns"]["server"]);
    let server = server.split(':').next().expect("an address");
    // RFC 1035 §4.1: id, recursion desired, one question.
    let mut query = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(u8::try_from(label.len()).expect("labels are short"));
        query.extend(label.as_bytes());
    }
    query.push(0);
    query.extend(kind.to_be_bytes());
    query.extend([0, 1]);
    let protocol = match transport {
        Transport::Udp => "udp",
        Transport::Tcp => {
            let length = u16::try_from(query.len()).expect("a short query");
            query.splice(0..0, length.to_be_bytes());
            "tcp"
        }
    };
    let bytes: String = query.iter().map(|byte| format!("\\x{byte:02x}")).collect();
    let script = format!(
        "exec 3<>/dev/{protocol}/{server}/53; printf '{bytes}' >&3; timeout 5 dd bs=4096 count=1 <&3 2>/dev/null"
    );
    let answer = laptop.run("bash", &["-c", &script]).ok();
    assert!(answer.len() > query.len(), "{name}: the answer has no record: {answer:?}");
    answer
}
