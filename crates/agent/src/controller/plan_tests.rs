use forkd_api::{ForkSpec, ForkTargetSpec, Laptop, TargetPort as ApiPort};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::super::view::{AgentView, ContainerView, PortView, TargetPort};
use super::*;

/// A namespace `shop` with Service `cart`, port 80 → container port named `http`.
struct Shop {
    pods: Vec<PodView>,
    services: Vec<ServiceView>,
    targets: Vec<ForkTarget>,
    forks: Vec<Fork>,
}

fn labels(app: &str) -> BTreeMap<String, String> {
    BTreeMap::from([("app".to_owned(), app.to_owned())])
}

fn pod(name: &str, app: &str, port: u16) -> PodView {
    PodView {
        namespace: "shop".to_owned(),
        name: name.to_owned(),
        uid: format!("uid-{name}"),
        labels: labels(app),
        ready: true,
        containers: vec![ContainerView {
            name: "app".to_owned(),
            ports: vec![PortView { name: "http".to_owned(), port }],
            ..ContainerView::default()
        }],
        ..PodView::default()
    }
}

fn service(name: &str, app: &str) -> ServiceView {
    let port = |port, protocol: &str, target| ServicePortView {
        name: String::new(),
        port,
        protocol: protocol.to_owned(),
        target,
    };
    ServiceView {
        namespace: "shop".to_owned(),
        name: name.to_owned(),
        selector: labels(app),
        ips: Vec::new(),
        ports: vec![
            port(80, "TCP", TargetPort::Name("http".to_owned())),
            port(53, "UDP", TargetPort::Number(53)),
            port(9090, "TCP", TargetPort::Number(9090)),
        ],
    }
}

fn fork(name: &str, owner: &str) -> Fork {
    Fork::new(name, ForkSpec { owner: owner.to_owned() })
}

/// Created at `second`, for laptop `l-OWNER`.
fn target(fork: &str, owner: &str, service: &str, second: i64) -> ForkTarget {
    let spec = ForkTargetSpec {
        fork: fork.to_owned(),
        owner: owner.to_owned(),
        service: service.to_owned(),
        ports: vec![ApiPort { port: 80, laptop_port: 8080 }],
        traffic: Traffic::Keyed,
        on_unavailable: OnUnavailable::Error,
        laptop: Laptop { id: format!("l-{owner}"), host: format!("host-{owner}") },
        environment_of: None,
    };
    let name = forkd_api::names::target(fork, service);
    let mut target = ForkTarget::new(&name, spec);
    target.metadata.uid = Some(format!("{fork}/{service}/{second}"));
    target.metadata.creation_timestamp = Some(Time(Timestamp::from_second(second).unwrap()));
    target
}

fn all(mut target: ForkTarget) -> ForkTarget {
    target.spec.traffic = Traffic::All;
    target
}

impl Shop {
    fn new(targets: Vec<ForkTarget>) -> Self {
        Self {
            pods: vec![pod("cart-1", "cart", 8080), pod("cart-2", "cart", 8081), pod("web-1", "web", 8080)],
            services: vec![service("cart", "cart"), service("web", "web"), service("empty", "nothing")],
            targets,
            forks: vec![fork("alice", "alice"), fork("bob", "bob")],
        }
    }

    fn plan(&self) -> Plan {
        plan(&Input {
            namespace: "shop",
            pods: self.pods.iter().cloned().map(Arc::new).collect(),
            services: &|name| {
                self.services.iter().find(|service| service.name == name).cloned().map(Arc::new)
            },
            targets: self.targets.iter().cloned().map(Arc::new).collect(),
            forks: &|name| {
                let named = |fork: &&Fork| fork.metadata.name.as_deref() == Some(name);
                self.forks.iter().find(named).cloned().map(Arc::new)
            },
        })
    }

    /// Reason per target, oldest first; "" if there is none.
    fn reasons(&self) -> Vec<&'static str> {
        self.plan()
            .targets
            .iter()
            .map(|target| target.problem.as_ref().map_or("", |problem| problem.reason))
            .collect()
    }
}

#[test]
fn every_pod_of_the_service_gets_the_route_on_its_own_port() {
    let plan = Shop::new(vec![target("alice", "alice", "cart", 1)]).plan();
    let ports: Vec<_> = plan.routes.iter().map(|(id, routes)| (id.as_str(), routes[0].port)).collect();
    assert_eq!(ports, [("uid-cart-1", 8080), ("uid-cart-2", 8081)]);
    let route = &plan.routes["uid-cart-1"][0];
    assert_eq!(route.service, "shop/cart");
    assert_eq!(
        (route.fork.as_str(), route.owner.as_str(), route.laptop.as_str()),
        ("alice", "alice", "l-alice")
    );
    assert!(!route.all);
}

#[test]
fn what_stands_in_the_way_is_named() {
    let mut shop = Shop::new(vec![
        target("nobody", "alice", "cart", 1),
        target("bob", "alice", "cart", 2),
        target("alice", "alice", "none", 3),
        target("alice", "alice", "empty", 4),
    ]);
    assert_eq!(shop.reasons(), ["NoSuchFork", "NotYourFork", "NoSuchService", "NoPods"]);
    for (port, reason) in [(81, "NoSuchPort"), (53, "UnsupportedPort"), (-1, "NoSuchPort"), (9090, "")] {
        shop.targets = vec![target("alice", "alice", "cart", 1)];
        shop.targets[0].spec.ports[0].port = port;
        assert_eq!(shop.reasons(), [reason], "port {port}");
    }
    shop.targets = vec![target("alice", "alice", "cart", 1)];
    shop.services[0].selector.clear();
    assert_eq!(shop.reasons(), ["NoSelector"]);
    let plan = shop.plan();
    assert!(plan.routes.is_empty(), "no route for a target with a problem");
}

#[test]
fn a_pod_on_its_nodes_network_is_never_redirected() {
    let mut shop = Shop::new(vec![target("alice", "alice", "cart", 1)]);
    shop.pods[1].host_network = true;
    assert_eq!(shop.reasons(), ["HostNetwork"]);
    assert!(shop.plan().routes.is_empty());
}

#[test]
fn any_number_of_forks_share_a_service() {
    let shop = Shop::new(vec![target("alice", "alice", "cart", 1), target("bob", "bob", "cart", 2)]);
    assert_eq!(shop.reasons(), ["", ""]);
    let forks: Vec<_> = shop.plan().routes["uid-cart-1"].iter().map(|route| route.fork.clone()).collect();
    assert_eq!(forks, ["alice", "bob"]);
}

#[test]
fn the_older_claim_on_everything_wins_and_the_younger_hears_who_holds_it() {
    let shop =
        Shop::new(vec![all(target("bob", "bob", "cart", 2)), all(target("alice", "alice", "cart", 1))]);
    let plan = shop.plan();
    assert_eq!(shop.reasons(), ["", "Claimed"], "oldest first, whatever the order of listing");
    let message = &plan.targets[1].problem.as_ref().unwrap().message;
    assert!(message.contains("alice on laptop host-alice"), "{message}");
    assert_eq!(plan.routes["uid-cart-1"].len(), 1);
}

#[test]
fn everything_and_a_key_go_side_by_side() {
    let shop = Shop::new(vec![all(target("alice", "alice", "cart", 1)), target("bob", "bob", "cart", 2)]);
    assert_eq!(shop.reasons(), ["", ""]);
}

#[test]
fn a_second_object_for_the_same_service_of_a_fork_is_claimed_whatever_its_name() {
    let mut second = target("alice", "alice", "cart", 2);
    second.metadata.name = Some("another-name".to_owned());
    let shop = Shop::new(vec![second, target("alice", "alice", "cart", 1)]);
    assert_eq!(shop.reasons(), ["", "Claimed"]);
}

#[test]
fn two_services_of_the_same_pods_count_as_one() {
    let mut shop = Shop::new(vec![
        all(target("alice", "alice", "cart", 1)),
        all(target("bob", "bob", "also-cart", 2)),
        target("alice", "alice", "also-cart", 3),
    ]);
    shop.services.push(service("also-cart", "cart"));
    assert_eq!(shop.reasons(), ["", "Claimed", "Claimed"]);
    assert_eq!(shop.plan().routes["uid-cart-1"].len(), 1);
}

#[test]
fn a_claim_ends_with_its_holder() {
    let mut shop =
        Shop::new(vec![all(target("alice", "alice", "cart", 1)), all(target("bob", "bob", "cart", 2))]);
    shop.targets[0].metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
    assert_eq!(shop.reasons(), [""], "one that is being deleted holds nothing");
    assert_eq!(shop.plan().routes["uid-cart-1"][0].fork, "bob");
}

#[test]
fn a_finished_pod_has_no_route_and_one_that_is_not_ready_keeps_its_own() {
    let mut shop = Shop::new(vec![target("alice", "alice", "cart", 1)]);
    shop.pods[0].finished = true;
    shop.pods[1].ready = false;
    let plan = shop.plan();
    assert_eq!(plan.routes.keys().collect::<Vec<_>>(), ["uid-cart-2"]);
}

#[test]
fn a_port_that_one_pod_lacks_is_that_pods_problem_and_one_that_all_lack_is_the_targets() {
    let mut shop = Shop::new(vec![target("alice", "alice", "cart", 1)]);
    shop.pods[0].containers[0].ports.clear();
    let plan = shop.plan();
    assert!(plan.targets[0].problem.is_none());
    assert_eq!(plan.targets[0].pods[0].problem.as_ref().unwrap().reason, "NoSuchPort");
    assert_eq!(plan.routes.keys().collect::<Vec<_>>(), ["uid-cart-2"]);
    shop.pods[1].containers[0].ports.clear();
    assert_eq!(shop.reasons(), ["NoSuchPort"]);
}

#[test]
fn a_port_that_the_kubelet_probes_by_tcp_is_marked() {
    let mut shop = Shop::new(vec![target("alice", "alice", "cart", 1)]);
    shop.pods[0].containers[0].tcp_probes = vec![8080];
    let plan = shop.plan();
    assert!(plan.routes["uid-cart-1"][0].tcp_probe);
    assert!(!plan.routes["uid-cart-2"][0].tcp_probe);
}

#[test]
fn an_environment_is_read_in_one_pod_for_all_who_ask_for_the_same_container() {
    let mut shop = Shop::new(vec![target("alice", "alice", "cart", 1), target("bob", "bob", "cart", 2)]);
    shop.targets[0].spec.environment_of = Some(String::new());
    shop.targets[1].spec.environment_of = Some("app".to_owned());
    let plan = shop.plan();
    assert_eq!(plan.environment_for.len(), 1);
    assert_eq!(plan.environment_for["uid-cart-1.env"], ["l-alice", "l-bob"]);
    shop.pods[1].agents = vec![AgentView {
        name: Purpose::Env.container_name("uid-cart-2", 0),
        purpose: Purpose::Env,
        image: String::new(),
        target_container: "app".to_owned(),
        state: AgentState::Starting,
    }];
    let plan = shop.plan();
    assert_eq!(plan.environment_for["uid-cart-2.env"], ["l-alice", "l-bob"], "where one is already");
}

#[test]
fn environments_of_two_containers_are_read_in_two_pods() {
    let mut shop = Shop::new(vec![target("alice", "alice", "cart", 1), target("bob", "bob", "cart", 2)]);
    for pod in &mut shop.pods {
        pod.containers.push(ContainerView { name: "other".to_owned(), ..ContainerView::default() });
    }
    shop.targets[0].spec.environment_of = Some("app".to_owned());
    shop.targets[1].spec.environment_of = Some("other".to_owned());
    let plan = shop.plan();
    assert_eq!(plan.environment_for["uid-cart-1.env"], ["l-alice"]);
    assert_eq!(plan.environment_for["uid-cart-2.env"], ["l-bob"]);
    shop.targets[1].spec.environment_of = Some("none".to_owned());
    assert!(shop.plan().targets[1].environment.is_none());
}
