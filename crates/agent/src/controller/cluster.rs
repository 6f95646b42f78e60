//! What the cluster looks like from outside: ranges, DNS, relays.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use forkd_wire::relay::RELAY_PORT;
use forkd_wire::tunnel::ClusterInfo;

use super::world::{Place, State};

/// The DNS settings that the kubelet gave to the controller's pod: those that every pod gets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolv {
    pub nameserver: Option<IpAddr>,
    /// From the search list's `svc.DOMAIN`.
    pub domain: Option<String>,
}

impl Resolv {
    /// Reads resolv.conf(5).
    pub fn parse(text: &str) -> Self {
        let mut resolv = Self::default();
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("nameserver") => {
                    let ip = words.next().and_then(|ip| ip.parse().ok());
                    resolv.nameserver = resolv.nameserver.or(ip);
                }
                Some("search") => {
                    let domain = words.find_map(|word| word.strip_prefix("svc.")).map(str::to_owned);
                    resolv.domain = resolv.domain.or(domain);
                }
                _ => {}
            }
        }
        resolv
    }
}

/// What a laptop has to know.
pub fn info(state: &State, resolv: &Resolv) -> ClusterInfo {
    let is_service = |ip: &IpAddr| matches!(state.place(*ip), Some(Place::Service(_)));
    // A node-local cache is no address that a laptop could dial; the Service behind it is.
    let own = resolv.nameserver.filter(is_service);
    let known = ["kube-dns", "coredns"].iter().find_map(|name| state.services.one("kube-system", name));
    let dns = own.or_else(|| known.and_then(|service| service.ips.first().copied())).or(resolv.nameserver);
    ClusterInfo {
        dns_ip: dns.map(|ip| ip.to_string()).unwrap_or_default(),
        domain: resolv.domain.clone().unwrap_or_else(|| "cluster.local".to_owned()),
        service_cidrs: service_cidrs(state),
        pod_cidrs: pod_cidrs(state),
    }
}

/// Addresses of the relays that run, sorted.
pub fn relays(state: &State) -> Vec<String> {
    let ready = state.own_pods("relay").filter(|pod| pod.ready);
    let addresses: BTreeSet<String> = ready
        .filter_map(|pod| pod.ips.first())
        .map(|ip| SocketAddr::new(*ip, RELAY_PORT).to_string())
        .collect();
    addresses.into_iter().collect()
}

fn service_cidrs(state: &State) -> Vec<String> {
    let known: BTreeSet<String> = state.service_cidrs.all().flat_map(|cidrs| cidrs.iter().cloned()).collect();
    if !known.is_empty() {
        return known.into_iter().collect();
    }
    // No ServiceCIDR objects (before Kubernetes 1.33): the smallest range around all Services there are.
    let ips: Vec<IpAddr> = state.services.all().flat_map(|service| service.ips.iter().copied()).collect();
    let around = |v4: bool| around(&ips.iter().copied().filter(|ip| ip.is_ipv4() == v4).collect::<Vec<_>>());
    [around(true), around(false)].into_iter().flatten().map(|range| range.to_string()).collect()
}

/// What nodes say, and a range around each pod that is in none of these: not every network plugin assigns by node.
fn pod_cidrs(state: &State) -> Vec<String> {
    let mut ranges: BTreeSet<Range> = state
        .nodes
        .all()
        .flat_map(|node| node.pod_cidrs.iter())
        .filter_map(|cidr| Range::parse(cidr))
        .collect();
    let own = state.pods.all().filter(|pod| !pod.host_network && !pod.finished);
    for ip in own.flat_map(|pod| pod.ips.iter().copied()) {
        if !ranges.iter().any(|range| range.contains(ip)) {
            ranges.insert(Range::new(ip, if ip.is_ipv4() { 24 } else { 64 }));
        }
    }
    ranges.iter().map(Range::to_string).collect()
}

/// The smallest range around addresses of one family: at most a /24 or /112, so that the next Service fits in.
fn around(ips: &[IpAddr]) -> Option<Range> {
    let first = *ips.first()?;
    let common = ips.iter().map(|ip| (bits(*ip) ^ bits(first)).leading_zeros()).min()?;
    let length = u8::try_from(common).ok()?;
    Some(Range::new(first, if first.is_ipv4() { length.min(24) } else { length.min(112) }))
}

/// An address range. The bits beyond the length are zero.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Range {
    base: IpAddr,
    length: u8,
}

/// An address, left-aligned in 128 bits.
fn bits(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(u32::from(ip)) << 96,
        IpAddr::V6(ip) => u128::from(ip),
    }
}

impl Range {
    fn new(ip: IpAddr, length: u8) -> Self {
        let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
        let base = bits(ip) & mask;
        let base = match ip {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::from((base >> 96) as u32)),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::from(base)),
        };
        Self { base, length }
    }

    fn parse(text: &str) -> Option<Self> {
        let (ip, length) = text.split_once('/')?;
        let (ip, length): (IpAddr, u8) = (ip.parse().ok()?, length.parse().ok()?);
        (length <= if ip.is_ipv4() { 32 } else { 128 }).then(|| Self::new(ip, length))
    }

    fn contains(&self, ip: IpAddr) -> bool {
        self.base.is_ipv4() == ip.is_ipv4() && Self::new(ip, self.length) == *self
    }
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.base, self.length)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::view::{NodeView, PodView, ServiceView};
    use super::super::world::World;
    use super::*;

    fn service(world: &World, namespace: &str, name: &str, ip: &str) {
        let view = ServiceView {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            ips: vec![ip.parse().unwrap()],
            ..ServiceView::default()
        };
        world.set(namespace, name, Some(view));
    }

    #[test]
    fn the_nameserver_of_pods_is_the_one_to_ask_unless_it_is_local_to_a_node() {
        let world = World::new(Arc::default());
        service(&world, "kube-system", "kube-dns", "10.96.0.10");
        service(&world, "dns", "own", "10.96.7.7");
        let resolv = |ip: &str| {
            Resolv::parse(&format!(
                "search forkd.svc.corp.example svc.corp.example corp.example\nnameserver {ip}\noptions ndots:5\n"
            ))
        };
        let own = info(&world.read(), &resolv("10.96.7.7"));
        assert_eq!((own.dns_ip.as_str(), own.domain.as_str()), ("10.96.7.7", "corp.example"));
        assert_eq!(info(&world.read(), &resolv("169.254.20.10")).dns_ip, "10.96.0.10");
        assert_eq!(info(&world.read(), &Resolv::default()).domain, "cluster.local");
    }

    #[test]
    fn ranges_of_services_are_those_of_the_api_or_around_all_there_are() {
        let world = World::new(Arc::default());
        service(&world, "a", "a", "10.96.0.1");
        assert_eq!(info(&world.read(), &Resolv::default()).service_cidrs, ["10.96.0.0/24"]);
        service(&world, "a", "b", "10.103.4.5");
        service(&world, "a", "c", "fd00::5");
        assert_eq!(info(&world.read(), &Resolv::default()).service_cidrs, ["10.96.0.0/13", "fd00::/112"]);
        world.set("", "kubernetes", Some(vec!["10.96.0.0/12".to_owned()]));
        assert_eq!(info(&world.read(), &Resolv::default()).service_cidrs, ["10.96.0.0/12"]);
    }

    #[test]
    fn a_pod_outside_of_its_nodes_range_adds_one() {
        let world = World::new(Arc::default());
        world.set(
            "",
            "node",
            Some(NodeView { pod_cidrs: vec!["10.244.0.0/24".to_owned()], ..NodeView::default() }),
        );
        let pod = |name: &str, ip: &str, host_network| {
            let view = PodView { ips: vec![ip.parse().unwrap()], host_network, ..PodView::default() };
            world.set("a", name, Some(view));
        };
        pod("in", "10.244.0.9", false);
        pod("host", "192.0.2.1", true);
        assert_eq!(info(&world.read(), &Resolv::default()).pod_cidrs, ["10.244.0.0/24"]);
        pod("out", "10.1.2.3", false);
        assert_eq!(info(&world.read(), &Resolv::default()).pod_cidrs, ["10.1.2.0/24", "10.244.0.0/24"]);
    }

    #[test]
    fn garbage_is_no_range() {
        for text in ["", "10.0.0.0", "10.0.0.0/33", "x/8", "10.0.0.0/-1"] {
            assert!(Range::parse(text).is_none(), "{text}");
        }
        assert_eq!(Range::parse("10.9.8.7/0").unwrap().to_string(), "0.0.0.0/0");
        assert!(Range::parse("10.0.0.0/8").unwrap().contains("10.255.0.1".parse().unwrap()));
        assert!(!Range::parse("10.0.0.0/8").unwrap().contains("::".parse().unwrap()));
    }
}
