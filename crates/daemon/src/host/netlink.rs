//! Routes, addresses and links of this network namespace, one blocking call each: the helper has nothing else to do.

use std::io;
use std::net::IpAddr;
use std::rc::Rc;

use forkd_core::ranges::HostRoute;
use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags};
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use rtnetlink::{Handle, RouteMessageBuilder};
use tokio::runtime::Runtime;

/// The kernel's own table of addresses of this host: `addresses()` says the same.
const TABLE_LOCAL: u32 = 255;

/// A netlink socket. Clones share it.
#[derive(Clone)]
pub struct Netlink {
    runtime: Rc<Runtime>,
    handle: Handle,
}

/// Why a netlink request failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket could not be made.
    #[error("open a netlink socket: {0}")]
    Socket(#[from] io::Error),
    /// The kernel said no.
    #[error(transparent)]
    Kernel(#[from] rtnetlink::Error),
}

impl NetlinkError {
    /// The error number, positive, if the kernel gave one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Kernel(rtnetlink::Error::NetlinkError(message)) => message.code.map(|code| -code.get()),
            _ => None,
        }
    }
}

impl Netlink {
    /// Opens a socket in the current network namespace.
    ///
    /// # Errors
    /// [`NetlinkError::Socket`].
    pub fn open() -> Result<Self, NetlinkError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = {
            let _inside = runtime.enter();
            let (connection, handle, _messages) = rtnetlink::new_connection()?;
            runtime.spawn(connection);
            handle
        };
        Ok(Self { runtime: Rc::new(runtime), handle })
    }

    /// Runs a future of the helper to its end.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    /// Routes of all tables but the kernel's own, with the interfaces' names.
    ///
    /// # Errors
    /// [`NetlinkError`].
    pub fn routes(&self) -> Result<Vec<HostRoute>, NetlinkError> {
        let links = self.links()?;
        let name = |index: u32| {
            links
                .iter()
                .find(|(known, _)| *known == index)
                .map_or_else(|| format!("#{index}"), |(_, name)| name.clone())
        };
        let mut routes = Vec::new();
        for query in [
            RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
            RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
        ] {
            let found: Vec<RouteMessage> =
                self.block_on(self.handle.route().get(query).execute().try_collect())?;
            routes.extend(found.iter().filter_map(|route| {
                let (range, index) = describe(route)?;
                Some(HostRoute { range, interface: index.map_or_else(|| "none".to_owned(), name) })
            }));
        }
        Ok(routes)
    }

    /// Addresses of all interfaces.
    ///
    /// # Errors
    /// [`NetlinkError`].
    pub fn addresses(&self) -> Result<Vec<IpAddr>, NetlinkError> {
        let found: Vec<_> = self.block_on(self.handle.address().get().execute().try_collect())?;
        let addresses = found.iter().flat_map(|message| &message.attributes).filter_map(|attribute| {
            // For a point-to-point link `Address` is the peer's, `Local` ours.
            match attribute {
                AddressAttribute::Address(ip) | AddressAttribute::Local(ip) => Some(*ip),
                _ => None,
            }
        });
        Ok(addresses.collect())
    }

    /// Index and name of all interfaces.
    ///
    /// # Errors
    /// [`NetlinkError`].
    pub fn links(&self) -> Result<Vec<(u32, String)>, NetlinkError> {
        let found: Vec<_> = self.block_on(self.handle.link().get().execute().try_collect())?;
        let links = found.iter().filter_map(|link| {
            let name = link.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name.clone()),
                _ => None,
            })?;
            Some((link.header.index, name))
        });
        Ok(links.collect())
    }

    /// Gives an interface an address of its own, usable at once: nobody else is on a TUN who could have it too.
    ///
    /// # Errors
    /// [`NetlinkError`].
    pub fn add_address(&self, address: std::net::Ipv6Addr, interface: u32) -> Result<(), NetlinkError> {
        let mut request = self.handle.address().add(interface, address.into(), 128);
        request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        Ok(self.block_on(request.execute())?)
    }

    /// Routes `range` to the interface; `source` is the address that packets without one get.
    ///
    /// # Errors
    /// [`NetlinkError`]; a route of the same range in the main table is never replaced.
    pub fn add_route(&self, range: IpNet, interface: u32, source: IpAddr) -> Result<(), NetlinkError> {
        let message = route_message(range, interface, Some(source));
        Ok(self.block_on(self.handle.route().add(message).execute())?)
    }

    /// Takes back what [`Self::add_route`] did.
    ///
    /// # Errors
    /// [`NetlinkError`].
    pub fn delete_route(&self, range: IpNet, interface: u32) -> Result<(), NetlinkError> {
        let message = route_message(range, interface, None);
        Ok(self.block_on(self.handle.route().del(message).execute())?)
    }

    /// Deletes an interface, with its addresses and routes, whoever holds it open. One that is not there is fine.
    ///
    /// # Errors
    /// [`NetlinkError`].
    pub fn delete_link(&self, name: &str) -> Result<(), NetlinkError> {
        let Some((index, _)) = self.links()?.into_iter().find(|(_, known)| known == name) else {
            return Ok(());
        };
        Ok(self.block_on(self.handle.link().del(index).execute())?)
    }
}

fn route_message(range: IpNet, interface: u32, source: Option<IpAddr>) -> RouteMessage {
    match (range, source) {
        (IpNet::V4(range), source) => {
            let route = RouteMessageBuilder::<std::net::Ipv4Addr>::new()
                .destination_prefix(range.network(), range.prefix_len())
                .output_interface(interface);
            match source {
                Some(IpAddr::V4(source)) => route.pref_source(source).build(),
                _ => route.build(),
            }
        }
        (IpNet::V6(range), source) => {
            let route = RouteMessageBuilder::<std::net::Ipv6Addr>::new()
                .destination_prefix(range.network(), range.prefix_len())
                .output_interface(interface);
            match source {
                Some(IpAddr::V6(source)) => route.pref_source(source).build(),
                _ => route.build(),
            }
        }
    }
}

/// Range and interface of a route that claims addresses.
fn describe(route: &RouteMessage) -> Option<(IpNet, Option<u32>)> {
    let mut table = u32::from(route.header.table);
    let (mut destination, mut interface) = (None, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Table(wide) => table = *wide,
            RouteAttribute::Oif(index) => interface = Some(*index),
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => destination = Some(IpAddr::V4(*ip)),
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => destination = Some(IpAddr::V6(*ip)),
            _ => {}
        }
    }
    let claims = matches!(
        route.header.kind,
        RouteType::Unicast | RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit
    );
    // No destination: the default route, which claims nothing that the cluster could have.
    let range = IpNet::new(destination?, route.header.destination_prefix_length).ok()?;
    (claims && table != TABLE_LOCAL).then_some((range, interface))
}
