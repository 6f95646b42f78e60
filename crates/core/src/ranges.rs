//! Which of the cluster's ranges can be routed into the TUN without taking anything from the host.
//!
//! The kernel sends a packet along the most specific route. So a route of the host *within* a range of the cluster
//! would take addresses from the cluster, and a range of the cluster *within* a route of the host (a VPN's, Docker's)
//! takes addresses from the host. Neither is done silently: each is a [`Conflict`] that names the choices.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

/// Routes this wide are the way to everywhere, and no claim to what the cluster has: the default route, or its halves
/// as VPNs set them (`0.0.0.0/1`, `128.0.0.0/1`; `2000::/3` is all of the IPv6 internet).
const EVERYWHERE_V4: u8 = 1;
const EVERYWHERE_V6: u8 = 3;
/// The widest range that is routed at all: a mistake beyond would take a good part of the internet.
const WIDEST_V4: u8 = 8;
const WIDEST_V6: u8 = 32;

/// A route of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostRoute {
    /// Where it leads.
    pub range: IpNet,
    /// By which interface, for messages.
    pub interface: String,
}

/// What must not end up in the TUN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The address.
    pub address: IpAddr,
    /// Whose it is, for messages: `the API server`.
    pub what: String,
}

/// A range that was not routed, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    /// The host has a route that covers the range; more specific ones may be added to it.
    #[error("{range} of the cluster lies within {route}, which this machine reaches by another way")]
    Within {
        /// Of the cluster.
        range: IpNet,
        /// Of the host.
        route: RouteName,
    },
    /// The host has a route to the same range, or to a part of it, which would win.
    #[error("{range} of the cluster covers {route}, which this machine reaches by another way")]
    Covers {
        /// Of the cluster.
        range: IpNet,
        /// Of the host.
        route: RouteName,
    },
    /// The range has an address that must stay reachable as it is.
    #[error("{range} of the cluster covers {address}, the address of {what}")]
    Keeps {
        /// Of the cluster.
        range: IpNet,
        /// The address.
        address: IpAddr,
        /// Whose.
        what: String,
    },
    /// Wider than any cluster needs.
    #[error("{range} is too wide to be a cluster's range")]
    TooWide {
        /// As given.
        range: IpNet,
    },
    /// Loopback, multicast, link-local: no such address is ever routed.
    #[error("{range} has addresses that are never routed")]
    NeverRouted {
        /// As given.
        range: IpNet,
    },
}

/// A route as messages name it: `10.0.0.0/8 (interface tun0)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteName(pub HostRoute);

impl fmt::Display for RouteName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (interface {})", self.0.range, self.0.interface)
    }
}

impl Conflict {
    /// What the user can do about it.
    pub fn choices(&self) -> String {
        match self {
            Self::Within { range, .. } => format!(
                "`forkd connect --take {range}` to send these addresses to the cluster while connected, \
                 `--skip {range}` to leave them alone, or disconnect the VPN that has them"
            ),
            Self::Covers { range, route } => format!(
                "`forkd connect --skip {range}` to leave these addresses alone, \
                 or remove the route to {} (a VPN or Docker network)",
                route.0.range
            ),
            Self::Keeps { range, .. } | Self::TooWide { range } | Self::NeverRouted { range } => {
                format!("`forkd connect --skip {range}` to leave these addresses alone")
            }
        }
    }
}

/// Ranges sorted into those to route and those that cannot be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// To be routed into the TUN: no two overlap.
    pub routes: Vec<IpNet>,
    /// Everything that stands against a range; one range may have several.
    pub conflicts: Vec<Conflict>,
}

/// Decides about `ranges`. `host`: routes of the host without those of our own TUN. `keep`: addresses that must not be
/// captured. `take`: ranges that the user wants in spite of a wider route of the host.
pub fn plan(ranges: &[IpNet], host: &[HostRoute], keep: &[Kept], take: &[IpNet]) -> Plan {
    let ranges: Vec<IpNet> = ranges.iter().map(IpNet::trunc).collect();
    let mut plan = Plan::default();
    for range in IpNet::aggregate(&ranges) {
        // Aggregation joins neighbours into ranges that nobody wrote: conflicts speak of what was written.
        let written = ranges.iter().filter(|written| range.contains(*written));
        let mut fine = true;
        for written in written {
            let against = conflicts(*written, host, keep, take);
            fine &= against.is_empty();
            plan.conflicts.extend(against);
        }
        if fine {
            plan.routes.push(range);
        } else {
            // What stands against one part is no reason to lose the neighbours.
            let parts = ranges.iter().filter(|part| range.contains(*part));
            let good: Vec<_> =
                parts.filter(|part| conflicts(**part, host, keep, take).is_empty()).copied().collect();
            plan.routes.extend(IpNet::aggregate(&good));
        }
    }
    plan.conflicts.dedup();
    plan
}

fn conflicts(range: IpNet, host: &[HostRoute], keep: &[Kept], take: &[IpNet]) -> Vec<Conflict> {
    let widest = if range.addr().is_ipv4() { WIDEST_V4 } else { WIDEST_V6 };
    if range.prefix_len() < widest {
        return vec![Conflict::TooWide { range }];
    }
    if never_routed(range) {
        return vec![Conflict::NeverRouted { range }];
    }
    let mut found = Vec::new();
    for route in host {
        let everywhere = if route.range.addr().is_ipv4() { EVERYWHERE_V4 } else { EVERYWHERE_V6 };
        let name = || RouteName(route.clone());
        if route.range.prefix_len() <= everywhere {
            continue;
        }
        if range.contains(&route.range) {
            found.push(Conflict::Covers { range, route: name() });
        } else if route.range.contains(&range) && !take.iter().any(|taken| taken.trunc() == range) {
            found.push(Conflict::Within { range, route: name() });
        }
    }
    for kept in keep.iter().filter(|kept| range.contains(&kept.address)) {
        found.push(Conflict::Keeps { range, address: kept.address, what: kept.what.clone() });
    }
    found
}

fn never_routed(range: IpNet) -> bool {
    match (range.network(), range.broadcast()) {
        (IpAddr::V4(first), IpAddr::V4(last)) => [first, last].iter().any(|ip| {
            ip.is_loopback()
                || ip.is_multicast()
                || ip.is_link_local()
                || ip.is_broadcast()
                || ip.octets()[0] == 0
        }),
        (IpAddr::V6(first), IpAddr::V6(last)) => [first, last].iter().any(|ip| {
            ip.is_loopback() || ip.is_multicast() || ip.is_unicast_link_local() || ip.is_unspecified()
        }),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn route(range: &str, interface: &str) -> HostRoute {
        HostRoute { range: net(range), interface: interface.to_owned() }
    }

    #[test]
    fn ranges_that_nobody_has_are_routed_beside_any_default_route() {
        let host = [
            route("0.0.0.0/0", "wlan0"),
            route("0.0.0.0/1", "tun0"),
            route("128.0.0.0/1", "tun0"),
            route("::/0", "wlan0"),
            route("192.168.1.0/24", "wlan0"),
        ];
        let plan = plan(&[net("10.96.0.0/12"), net("10.244.0.0/16"), net("fd10::/112")], &host, &[], &[]);
        assert_eq!(plan.routes, [net("10.96.0.0/12"), net("10.244.0.0/16"), net("fd10::/112")]);
        assert_eq!(plan.conflicts, []);
    }

    #[test]
    fn overlaps_of_any_kind_are_conflicts_and_leave_the_other_ranges_alone() {
        let ranges = [net("10.96.0.0/12"), net("172.17.0.0/16")];
        for (host, routed) in [
            (route("172.17.0.0/16", "docker0"), "10.96.0.0/12"),
            (route("172.17.9.0/24", "docker0"), "10.96.0.0/12"),
            (route("10.0.0.0/8", "vpn"), "172.17.0.0/16"),
            (route("10.100.0.1/32", "vpn"), "172.17.0.0/16"),
        ] {
            let plan = plan(&ranges, std::slice::from_ref(&host), &[], &[]);
            assert_eq!(plan.routes, [net(routed)], "{host:?}");
            assert_eq!(plan.conflicts.len(), 1, "{host:?}");
            let text = plan.conflicts[0].to_string();
            assert!(text.contains(&host.interface) && text.contains(&host.range.to_string()), "{text}");
        }
    }

    #[test]
    fn a_range_within_a_wider_route_can_be_taken_and_one_with_a_narrower_route_cannot() {
        let taken = [net("10.96.0.0/12")];
        let wider = plan(&taken, &[route("10.0.0.0/8", "vpn")], &[], &taken);
        assert_eq!((wider.routes.as_slice(), wider.conflicts.len()), (&taken[..], 0));
        let narrower = plan(&taken, &[route("10.100.0.0/16", "vpn")], &[], &taken);
        assert_eq!((narrower.routes.len(), narrower.conflicts.len()), (0, 1));
        assert!(wider_choices().contains("--take 10.96.0.0/12"));
        assert!(!narrower.conflicts[0].choices().contains("--take"));
    }

    fn wider_choices() -> String {
        plan(&[net("10.96.0.0/12")], &[route("10.0.0.0/8", "vpn")], &[], &[]).conflicts[0].choices()
    }

    #[test]
    fn the_api_servers_address_is_never_captured() {
        let kept = Kept { address: "10.96.0.1".parse().unwrap(), what: "the API server".to_owned() };
        let plan = plan(&[net("10.96.0.0/12")], &[], &[kept], &[net("10.96.0.0/12")]);
        assert!(plan.routes.is_empty());
        assert!(plan.conflicts[0].to_string().contains("the API server"));
    }

    #[test]
    fn what_is_too_wide_or_never_routed_is_refused_even_when_taken() {
        for range in [
            "0.0.0.0/0",
            "10.0.0.0/7",
            "::/0",
            "fd00::/8",
            "127.0.0.0/8",
            "224.0.0.0/8",
            "169.254.0.0/16",
            "fe80::/64",
        ] {
            let plan = plan(&[net(range)], &[], &[], &[net(range)]);
            assert!(plan.routes.is_empty() && plan.conflicts.len() == 1, "{range}");
        }
    }

    #[test]
    fn ranges_with_host_bits_neighbours_and_repetitions_become_one_route() {
        let plan = plan(&[net("10.244.1.7/24"), net("10.244.0.0/24"), net("10.244.1.0/24")], &[], &[], &[]);
        assert_eq!(plan.routes, [net("10.244.0.0/23")]);
    }
}
