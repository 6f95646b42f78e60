//! The TUN and its routes.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use forkd_core::ranges::HostRoute;
use ipnet::IpNet;
use tun_rs::{DeviceBuilder, SyncDevice};

use super::netlink::{Netlink, NetlinkError};

/// Names tried: more TUNs of ours than this on one machine are a leak, not a use.
const NAMES: u32 = 64;
/// Packets that wait for the daemon. Each may have 64 KiB, but TCP keeps far less under way; 500, the default, is
/// overrun by a few hundred connections that begin at once.
const QUEUE: u32 = 5000;

/// A TUN of ours. Dropped, it is gone for everyone, also for whoever was handed its descriptor.
pub struct Link {
    netlink: Netlink,
    device: Option<SyncDevice>,
    name: String,
    index: u32,
    addresses: Vec<IpAddr>,
    routes: Vec<IpNet>,
}

/// Why there is no TUN.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The kernel said no.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// /dev/net/tun said no.
    #[error("open /dev/net/tun: {0}")]
    Device(#[from] io::Error),
    /// The device works without virtio-net header.
    #[error("this kernel's TUN has no segmentation offload")]
    NoOffload,
    /// All names, or all addresses of 198.18.0.0/15, are taken.
    #[error("no free {0}")]
    Exhausted(&'static str),
}

impl Link {
    /// Makes a TUN. `claim` hears its name before it exists, and may object.
    ///
    /// # Errors
    /// [`LinkError`], or what `claim` said.
    pub fn apply<E: From<LinkError>>(
        netlink: &Netlink,
        mtu: u16,
        claim: impl FnOnce(&str) -> Result<(), E>,
    ) -> Result<Self, E> {
        let links = netlink.links().map_err(LinkError::from)?;
        let name = (0..NAMES)
            .map(|number| format!("forkd{number}"))
            .find(|name| links.iter().all(|(_, known)| known != name))
            .ok_or(LinkError::Exhausted("interface name"))?;
        let taken = netlink.addresses().map_err(LinkError::from)?;
        let routes = netlink.routes().map_err(LinkError::from)?;
        let (v4, v6) = free_addresses(&taken, &routes).ok_or(LinkError::Exhausted("address for the TUN"))?;
        claim(&name)?;
        let builder =
            DeviceBuilder::new().name(&name).mtu(mtu).offload(true).ipv4(v4, 32, None).tx_queue_len(QUEUE);
        let device = builder.build_sync().map_err(LinkError::from)?;
        if !device.tcp_gso() {
            return Err(LinkError::NoOffload.into());
        }
        let index = device.if_index().map_err(LinkError::from)?;
        let mut addresses = vec![IpAddr::V4(v4)];
        if has_ipv6() {
            netlink.add_address(v6, index).map_err(LinkError::from)?;
            addresses.push(IpAddr::V6(v6));
        }
        Ok(Self {
            netlink: netlink.clone(),
            device: Some(device),
            name,
            index,
            addresses,
            routes: Vec::new(),
        })
    }

    /// E.g. `forkd0`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Interface index.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Its addresses, one of each family that this host has.
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// The open device, until the link is dropped.
    pub fn device(&self) -> Option<&SyncDevice> {
        self.device.as_ref()
    }

    /// Ranges that are routed here.
    pub fn routes(&self) -> &[IpNet] {
        &self.routes
    }

    /// Routes exactly `wanted` here. Ranges of a family that the host has not switched on are left out, with a warning.
    ///
    /// # Errors
    /// [`NetlinkError`]; the routes are then as before as far as the kernel lets us.
    pub fn set_routes(&mut self, wanted: &[IpNet]) -> Result<(), NetlinkError> {
        let before = self.routes.clone();
        let result = self.change_routes(wanted);
        if result.is_err()
            && let Err(error) = self.change_routes(&before)
        {
            tracing::warn!(%error, "the former routes could not be put back");
        }
        result
    }

    fn change_routes(&mut self, wanted: &[IpNet]) -> Result<(), NetlinkError> {
        for gone in self.routes.clone().into_iter().filter(|range| !wanted.contains(range)) {
            self.netlink.delete_route(gone, self.index)?;
            self.routes.retain(|range| *range != gone);
        }
        for range in wanted {
            if self.routes.contains(range) {
                continue;
            }
            let same_family = |ip: &&IpAddr| ip.is_ipv4() == range.addr().is_ipv4();
            let Some(source) = self.addresses.iter().find(same_family) else {
                tracing::warn!(%range, "not routed: IPv6 is switched off on this machine");
                continue;
            };
            self.netlink.add_route(*range, self.index, *source)?;
            self.routes.push(*range);
        }
        Ok(())
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Closing our descriptor is not enough: the daemon may still hold its own.
        if let Err(error) = self.netlink.delete_link(&self.name) {
            tracing::error!(%error, name = self.name, "the TUN could not be deleted");
        }
        self.device = None;
    }
}

/// One address of 198.18.0.0/15 (RFC 2544: for measuring networks, so in use nowhere else) and one of a ULA prefix
/// (RFC 4193), that no interface has and no route covers.
fn free_addresses(taken: &[IpAddr], routes: &[HostRoute]) -> Option<(Ipv4Addr, Ipv6Addr)> {
    (1..=u16::MAX)
        .map(|number| {
            let [high, low] = number.to_be_bytes();
            (Ipv4Addr::new(198, 19, high, low), Ipv6Addr::new(0xfd66, 0x6f72, 0x6b64, 0, 0, 0, 0, number))
        })
        .find(|(v4, v6)| {
            let free = |ip: IpAddr| {
                !taken.contains(&ip)
                    && routes.iter().all(|route| route.range.prefix_len() <= 3 || !route.range.contains(&ip))
            };
            free((*v4).into()) && free((*v6).into())
        })
}

fn has_ipv6() -> bool {
    std::fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6").is_ok_and(|off| off.trim() == "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tuns_address_is_one_that_no_interface_and_no_route_has() {
        let route = |range: &str| HostRoute { range: range.parse().unwrap(), interface: "x".to_owned() };
        let (first, v6) = free_addresses(&[], &[route("0.0.0.0/1")]).unwrap();
        let (second, _) = free_addresses(&[first.into(), v6.into()], &[]).unwrap();
        assert_ne!(first, second);
        let (beyond, _) = free_addresses(&[], &[route("198.19.0.0/24")]).unwrap();
        assert_eq!(beyond, Ipv4Addr::new(198, 19, 1, 0));
        assert_eq!(free_addresses(&[], &[route("198.18.0.0/15")]), None);
    }
}
