//! Which request goes where: the targets in this pod, replaced as a whole at any time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use forkd_core::key::Key;
use forkd_wire::control::Route;
use tokio::sync::watch;

/// The routes of this pod, shared by all connections. Clones are the same routes.
#[derive(Clone)]
pub struct Routes(watch::Sender<Arc<Table>>);

/// The routes at one moment.
#[derive(Default)]
pub(super) struct Table(BTreeMap<u16, Vec<Arc<Route>>>);

impl Default for Routes {
    fn default() -> Self {
        Self(watch::Sender::new(Arc::default()))
    }
}

impl Routes {
    /// Replaces all routes. Connections see it at their next request; requests that run stay where they are.
    /// Routes whose port is none (0, or above 65535) are left out.
    pub fn replace(&self, routes: impl IntoIterator<Item = Route>) {
        let mut table = Table::default();
        for route in routes {
            match u16::try_from(route.port) {
                Ok(port) if port != 0 => table.0.entry(port).or_default().push(Arc::new(route)),
                _ => {
                    tracing::error!(port = route.port, target = route.target, "route with an impossible port")
                }
            }
        }
        self.0.send_replace(Arc::new(table));
    }

    /// The ports that any route wants redirected.
    pub fn ports(&self) -> BTreeSet<u16> {
        self.0.borrow().0.keys().copied().collect()
    }

    pub(super) fn table(&self) -> Arc<Table> {
        self.0.borrow().clone()
    }
}

impl Table {
    /// The target of a request with this key: the fork's own, else the one that takes everything.
    pub(super) fn route(&self, port: u16, key: Option<&Key>) -> Option<&Arc<Route>> {
        let routes = self.0.get(&port)?;
        key.and_then(|key| routes.iter().find(|route| route.fork == key.as_str()))
            .or_else(|| routes.iter().find(|route| route.all))
    }

    /// The target of bytes that are no HTTP.
    pub(super) fn opaque(&self, port: u16) -> Option<&Arc<Route>> {
        self.route(port, None)
    }

    /// Any target of this port.
    pub(super) fn has(&self, port: u16) -> bool {
        self.0.contains_key(&port)
    }

    /// The kubelet probes this port by TCP.
    pub(super) fn tcp_probe(&self, port: u16) -> bool {
        self.0.get(&port).is_some_and(|routes| routes.iter().any(|route| route.tcp_probe))
    }

    /// The Service behind this port, for `forkd-served-by`.
    pub(super) fn service(&self, port: u16) -> Option<&str> {
        self.0.get(&port)?.first().map(|route| route.service.as_str())
    }

    /// A connection to this target made for `route` may still be used.
    pub(super) fn still_holds(&self, port: u16, route: &Route) -> bool {
        self.0.get(&port).is_some_and(|routes| {
            routes
                .iter()
                .any(|r| r.target == route.target && r.laptop == route.laptop && r.owner == route.owner)
        })
    }
}
