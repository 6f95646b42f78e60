//! `forkd intercept` and `leave`: who gets which request, in every pod, from the first to the last.

use serde_json::Value;

use crate::harness::cluster::{self, SHOP, get, kubectl, pods_of, rolled_out, scale, target_ready, text};
use crate::harness::test::no_fork_is_left;
use crate::harness::wait::so;
use crate::harness::{eventually, inside, on_laptop};

#[test]
fn requests_with_the_key_reach_the_laptop_and_all_others_the_cluster() {
    on_laptop(|laptop| {
        laptop.connect();
        let cart = laptop.serve("cart", "laptop");
        let said = laptop.intercept("cart", cart.port(), &["--fork", "alice"]);
        assert_eq!(
            (&said["fork"], &said["service"], &said["all"]),
            (&"alice".into(), &"cart".into(), &false.into())
        );
        for client in [inside(), laptop.client()] {
            let keyed = client.http("cart:8080", "alice").fine();
            assert_eq!((keyed.from(), keyed.answer().key.as_str()), ("laptop", "alice"));
            assert!(!keyed.served_by.is_empty(), "nobody is to be fooled about who answered: {keyed:?}");
            let plain = client.http("cart:8080", "").fine();
            assert_eq!((plain.from(), plain.served_by.as_str()), ("cluster", ""));
            // A fork that does not intercept this service has the baseline here, and is told so.
            for key in ["bob", "alicex"] {
                let other = client.http("cart:8080", key).fine();
                assert_eq!(other.from(), "cluster", "key {key:?}");
                assert!(other.served_by.starts_with("baseline"), "{other:?}");
            }
        }
    });
}

#[test]
fn a_call_from_another_service_that_passes_the_key_on_reaches_the_laptop_which_calls_the_cluster() {
    on_laptop(|laptop| {
        // Connections that web keeps from before stay with the pod; a new web has none.
        kubectl(&["--namespace", SHOP, "rollout", "restart", "deployment/web"]).ok();
        rolled_out(SHOP, "deployment/web");
        scale("web", 1);
        laptop.connect();
        let cart = laptop.serve("cart", "laptop");
        laptop.intercept("cart", cart.port(), &["--fork", "alice"]);
        let keyed = inside().http("web:80", "alice").fine();
        let place = |service: &str| keyed.answer().find(service).map(|answer| answer.place.clone());
        let places = ["web", "cart", "price", "stock", "ledger"].map(place);
        assert_eq!(
            places.each_ref().map(|place| place.as_deref().unwrap_or("nowhere")),
            ["cluster", "laptop", "cluster", "cluster", "cluster"],
            "{keyed:?}"
        );
        assert_eq!(keyed.answer().errors(), [""; 0], "the process on the laptop calls by cluster names");
        let plain = inside().http("web:80", "").fine();
        assert_eq!(plain.answer().find("cart").map(|cart| cart.place.as_str()), Some("cluster"));
    });
}

#[test]
fn the_key_is_read_from_each_of_its_carriers_as_a_list_and_handed_on_in_all_of_them() {
    on_laptop(|laptop| {
        laptop.connect();
        let cart = laptop.serve("cart", "laptop");
        laptop.intercept("cart", cart.port(), &["--fork", "alice"]);
        for carrier in ["baggage", "tracestate", "x-forkd-id"] {
            // Without a traceparent, receivers ignore tracestate (W3C Trace Context §3.3).
            let parent = "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
            let asked = ["--key", "alice", "--carrier", carrier, "--path", "/headers", "--header", parent];
            let line = inside().one("http1", "cart:8080", &asked).fine();
            assert!(!line.served_by.is_empty(), "{carrier}: {line:?}");
            let headers = line.body["headers"].as_array().expect("a list").clone();
            let has = |name: &str, value: &str| {
                headers.iter().any(|header| {
                    text(&header[0]).eq_ignore_ascii_case(name) && text(&header[1]).contains(value)
                })
            };
            assert!(has("baggage", "forkd=alice"), "{carrier}: {headers:?}");
            assert!(has("x-forkd-id", "alice"), "{carrier}: {headers:?}");
            assert!(has("tracestate", "forkd=alice"), "{carrier}: {headers:?}");
        }
        for (header, from) in [
            ("baggage: a=1, forkd=alice;ttl=5 , b=2", "laptop"),
            ("baggage: forkd=%61lice", "laptop"),
            ("BAGGAGE: forkd = alice", "laptop"),
            ("tracestate: vendor=1,forkd=alice", "laptop"),
            ("baggage: notforkd=alice", "cluster"),
            ("baggage: a=forkd=alice", "cluster"),
            ("baggage: forkd=alice-2", "cluster"),
            ("x-forkd-id: alice2", "cluster"),
        ] {
            let line = inside().one("http1", "cart:8080", &["--header", header]).fine();
            assert_eq!(line.from(), from, "{header}");
        }
    });
}

#[test]
fn a_request_without_the_key_arrives_as_it_was_sent() {
    on_laptop(|laptop| {
        laptop.connect();
        let asked =
            ["--path", "/headers", "--header", "X-OdD-cAsE:  two  words ", "--header", "baggage: a=1"];
        let headers = || {
            let mut body = inside().one("http1", "cart:8080", &asked).fine().body;
            body.as_object_mut().expect("an object").remove("remote");
            body
        };
        let before = headers();
        let cart = laptop.serve("cart", "laptop");
        laptop.intercept("cart", cart.port(), &["--fork", "alice"]);
        assert_eq!(headers(), before);
    });
}

#[test]
fn every_replica_delivers_and_so_does_one_that_comes_later() {
    on_laptop(|laptop| {
        scale("cart", 3);
        laptop.connect();
        let cart = laptop.serve("cart", "laptop");
        let said = laptop.intercept("cart", cart.port(), &["--fork", "alice"]);
        assert_eq!(said["routed"], "3/3");
        let each = |count: usize| {
            let pods = pods_of("cart");
            assert_eq!(pods.len(), count);
            for pod in pods {
                let addr = format!("{}:8080", pod.ip);
                assert_eq!(inside().http(&addr, "alice").fine().from(), "laptop", "{}", pod.name);
                let plain = inside().http(&addr, "").fine();
                assert_eq!((plain.from(), &plain.answer().pod), ("cluster", &pod.name));
            }
        };
        each(3);
        scale("cart", 4);
        eventually("the fourth pod is routed", || {
            let target = target_ready("cart");
            so(target["status"]["routed"] == "4/4", || target["status"].to_string())
        });
        each(4);
        scale("cart", 2);
        each(2);
    });
}

#[test]
fn a_rollout_goes_on_beneath_the_intercept_and_nobody_else_notices() {
    on_laptop(|laptop| {
        // An application that ends before kube-proxy has heard of it loses requests with or without forkd.
        let patient = r#"{"spec":{"template":{"spec":{"terminationGracePeriodSeconds":15,
            "containers":[{"name":"cart","lifecycle":{"preStop":{"sleep":{"seconds":5}}}}]}}}}"#;
        kubectl(&["--namespace", SHOP, "patch", "deployment", "cart", "--patch", patient]).ok();
        rolled_out(SHOP, "deployment/cart");
        scale("cart", 2);
        laptop.connect();
        let cart = laptop.serve("cart", "laptop");
        laptop.intercept("cart", cart.port(), &["--fork", "alice"]);
        let old: Vec<String> = pods_of("cart").into_iter().map(|pod| pod.name).collect();

        // A new connection for each request, all the time that the rollout takes.
        let asked = ["--path", "/slow?ms=20", "--n", "900", "--timeout", "30s"];
        let mut others = inside().start("http1", "cart:8080", &asked);
        kubectl(&["--namespace", SHOP, "rollout", "restart", "deployment/cart"]).ok();
        rolled_out(SHOP, "deployment/cart");
        scale("cart", 2);
        assert_eq!(others.code(), 0, "a request without the key failed:\n{}", failed_lines(&others.said()));
        assert!(
            !others.said().contains(r#""where":"laptop""#),
            "a request without the key reached the laptop"
        );

        target_ready("cart");
        let new = pods_of("cart");
        assert!(new.iter().all(|pod| !old.contains(&pod.name)), "{old:?} {new:?}");
        for pod in new {
            let addr = format!("{}:8080", pod.ip);
            eventually("the new pod is routed", || {
                let line = inside().http(&addr, "alice");
                so(line.from() == "laptop", || format!("{line:?}"))
            });
        }
    });
}

#[test]
fn connections_that_were_open_before_are_not_cut_and_their_number_is_said() {
    on_laptop(|laptop| {
        laptop.connect();
        scale("cart", 1);
        let pod = pods_of("cart").remove(0);
        let open = |n: &str| {
            let path = format!("/stream?n={n}&ms=250");
            let asked = ["--path", &path, "--timeout", "60s"];
            inside().start("http1", "cart:8080", &asked)
        };
        let requests = || {
            let log = kubectl(&["--namespace", SHOP, "logs", &pod.name, "-c", "cart"]).ok();
            log.lines().filter(|line| line.contains("path=/stream")).count()
        };
        let before = requests();
        let mut held = open("40");
        eventually("the answer has begun", || so(requests() > before, || "no request yet".to_owned()));
        let cart = laptop.serve("cart", "laptop");
        let port = format!("{}", cart.port());
        let said =
            laptop.forkd(&["intercept", "cart", "--namespace", SHOP, "--port", &port, "--fork", "alice"]);
        let status = laptop.forkd_json(&["status"]);
        assert!(held.runs(), "it ended before the intercept was in place: {}", held.said());
        let older = status["intercepts"][0]["older_connections"].as_u64().expect("a number");
        assert!(older >= 1, "{status}");
        assert!(said.stderr.contains("from before the intercept"), "{said}");
        assert_eq!(held.code(), 0, "{}", held.said());
        let line: Value = serde_json::from_str(&held.said()).expect("one line of JSON");
        assert_eq!(line["status"], 200, "{line}");
        assert_eq!(inside().http("cart:8080", "alice").fine().from(), "laptop");

        // The same on the way out: what the agent carries is not cut when the intercept ends.
        let before = requests();
        let mut held = open("20");
        eventually("the answer has begun", || so(requests() > before, || "no request yet".to_owned()));
        laptop.leave("cart");
        assert_eq!(held.code(), 0, "{}", held.said());
        scale("cart", 2);
    });
}

#[test]
fn leaving_gives_the_port_back_to_the_application() {
    on_laptop(|laptop| {
        laptop.connect();
        let caller = text(
            &get(&["pods", "--namespace", SHOP, "--selector", "app=clock"])["items"][0]["status"]["podIP"],
        );
        let remote = || {
            let line = inside().one("http1", "cart:8080", &["--path", "/headers"]).fine();
            text(&line.body["remote"]).rsplit_once(':').expect("an address and a port").0.to_owned()
        };
        assert_eq!(remote(), caller);
        let cart = laptop.serve("cart", "laptop");
        laptop.intercept("cart", cart.port(), &["--fork", "alice"]);
        assert_ne!(remote(), caller, "the agent stands between");
        laptop.leave("cart");
        for pod in pods_of("cart") {
            let line = inside().http(&format!("{}:8080", pod.ip), "alice").fine();
            assert_eq!((line.from(), line.served_by.as_str()), ("cluster", ""), "{}", pod.name);
        }
        eventually("the application sees its callers again", || so(remote() == caller, remote));
        laptop.forkd(&["leave", "cart", "--namespace", SHOP]).fails(1, &["cart"]);
    });
}

#[test]
fn probes_stay_in_the_pod() {
    on_laptop(|laptop| {
        laptop.connect();
        for more in [&["--fork", "alice"][..], &["--fork", "alice", "--all"]] {
            let cart = laptop.serve("cart", "laptop");
            laptop.intercept("cart", cart.port(), more);
            let begin = probes("cart");
            eventually("the kubelet has probed three times more", || {
                let now = probes("cart");
                so(now >= begin + 3.0, || format!("{now} probes"))
            });
            let stats = format!("http://127.0.0.1:{}/stats", cart.port());
            assert_eq!(laptop.run("curl", &["--silent", &stats]).json()["probes"], 0, "{more:?}");
            assert_eq!(pods_of("cart").len(), 2, "the pods are ready");
            laptop.leave("cart");
        }
    });
}

#[test]
fn an_intercept_made_again_goes_to_the_new_port() {
    on_laptop(|laptop| {
        laptop.connect();
        let (first, second) = (laptop.serve("cart", "first"), laptop.serve("cart", "second"));
        laptop.intercept("cart", first.port(), &["--fork", "alice"]);
        assert_eq!(inside().http("cart:8080", "alice").fine().from(), "first");
        laptop.intercept("cart", second.port(), &["--fork", "alice"]);
        assert_eq!(inside().http("cart:8080", "alice").fine().from(), "second");
        assert_eq!(laptop.forkd_json(&["list"]).as_array().map(Vec::len), Some(1));
    });
}

#[test]
fn an_intercept_connects_first_where_there_is_no_session_and_prints_a_line_that_works() {
    on_laptop(|laptop| {
        let cart = laptop.serve("cart", "laptop");
        let port = cart.port().to_string();
        let said = laptop.forkd(&["intercept", "cart", "--namespace", SHOP, "--port", &port]).ok();
        let line =
            said.lines().find(|line| line.trim().starts_with("curl ")).expect("it prints a curl line").trim();
        assert!(line.contains("forkd=dev"), "the fork's id defaults to the user's name: {line}");
        let answer = laptop.run("sh", &["-c", &format!("{line} --silent --max-time 10")]).json();
        assert_eq!(answer["where"], "laptop");
    });
}

#[test]
fn a_port_is_chosen_by_name_or_number() {
    on_laptop(|laptop| {
        laptop.connect();
        let cart = laptop.serve("cart", "laptop");
        for remote in ["http", "8080"] {
            let spec = format!("{}:{remote}", cart.port());
            laptop.intercept("cart", 0, &["--port", &spec, "--fork", "alice"]);
            assert_eq!(inside().http("cart:8080", "alice").fine().from(), "laptop");
            laptop.leave("cart");
        }
    });
}

#[test]
fn intercepts_of_several_services_live_side_by_side_and_quit_ends_all() {
    on_laptop(|laptop| {
        laptop.connect();
        let (cart, web) = (laptop.serve("cart", "laptop-cart"), laptop.serve("web", "laptop-web"));
        laptop.intercept("cart", cart.port(), &["--fork", "alice"]);
        laptop.intercept("web", web.port(), &["--fork", "alice"]);
        let line = inside().http("web:80", "alice").fine();
        let place = |service: &str| line.answer().find(service).map(|answer| answer.place.clone());
        assert_eq!(
            (place("web").as_deref(), place("cart").as_deref()),
            (Some("laptop-web"), Some("laptop-cart"))
        );
        let left = laptop.forkd_json(&["quit"]);
        assert_eq!(left["left"].as_array().map(Vec::len), Some(2), "{left}");
        let line = inside().http("web:80", "alice").fine();
        assert_eq!(line.answer().find("cart").map(|cart| cart.place.as_str()), Some("cluster"));
    });
}

#[test]
fn the_objects_in_the_cluster_say_what_is_going_on() {
    on_laptop(|laptop| {
        laptop.connect();
        let cart = laptop.serve("cart", "laptop");
        laptop.intercept("cart", cart.port(), &["--fork", "alice"]);
        let target = target_ready("cart");
        assert!(text(&target["metadata"]["name"]).starts_with("alice-cart-"), "{target}");
        assert_eq!((&target["spec"]["owner"], &target["status"]["routed"]), (&"alice".into(), &"2/2".into()));
        for kind in ["Routed", "LaptopConnected", "Ready"] {
            assert_eq!(cluster::condition(&target, kind), Some("True"), "{target}");
        }
        let fork = eventually("the fork counts its target", || {
            let fork = get(&["fork", "alice"]);
            so(fork["status"]["targets"] == 1, || fork.to_string()).map(|()| fork)
        });
        assert_eq!(
            (&fork["spec"]["owner"], cluster::condition(&fork, "Ready")),
            (&"alice".into(), Some("True"))
        );
        let table = kubectl(&["get", "forks,forktargets", "--all-namespaces"]).ok();
        for word in ["alice", "cart", "Keyed", "2/2", "True"] {
            assert!(table.contains(word), "{table}");
        }
    });
}

#[test]
fn whoever_deletes_the_fork_or_the_target_by_plain_kubectl_ends_the_intercept() {
    on_laptop(|laptop| {
        laptop.connect();
        let cart = laptop.serve("cart", "laptop");
        for object in [["fork", "alice"].as_slice(), &["forktargets", "--all", "--namespace", SHOP]] {
            laptop.intercept("cart", cart.port(), &["--fork", "alice"]);
            assert_eq!(inside().http("cart:8080", "alice").fine().from(), "laptop");
            kubectl(&[&["delete"], object].concat()).ok();
            eventually("the laptop gets nothing more", || {
                let line = inside().http("cart:8080", "alice");
                so(line.from() == "cluster", || format!("{line:?}"))
            });
            let status = laptop.forkd_json(&["status"]);
            assert_eq!(status["intercepts"], serde_json::json!([]), "{status}");
            assert!(status["problems"].to_string().contains("cart.shop"), "{status}");
            no_fork_is_left();
        }
    });
}

/// How many probes of this service's containers the kubelet counts.
#[track_caller]
fn probes(service: &str) -> f64 {
    let node = text(&get(&["nodes"])["items"][0]["metadata"]["name"]);
    let metrics = kubectl(&["get", "--raw", &format!("/api/v1/nodes/{node}/proxy/metrics/probes")]).ok();
    let of = format!("container=\"{service}\"");
    metrics
        .lines()
        .filter(|line| {
            line.starts_with("prober_probe_total") && line.contains(&of) && line.contains("successful")
        })
        .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
        .sum()
}

fn failed_lines(said: &str) -> String {
    said.lines()
        .filter(|line| line.contains(r#""error""#) || !line.starts_with('{'))
        .collect::<Vec<_>>()
        .join("\n")
}
