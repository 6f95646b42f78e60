//! systemd-resolved, per link: it asks us for the cluster's names only, and forgets us with the TUN.

use std::net::IpAddr;
use std::time::Duration;

use zbus::Connection;

use super::netlink::Netlink;

const SERVICE: &str = "org.freedesktop.resolve1";
const OBJECT: &str = "/org/freedesktop/resolve1";
const MANAGER: &str = "org.freedesktop.resolve1.Manager";
/// Where its stub listens: a resolv.conf with one of these leads to it.
pub const STUBS: [&str; 2] = ["127.0.0.53", "127.0.0.54"];
/// The bus answers in milliseconds; a hung one must not hang us.
const PATIENCE: Duration = Duration::from_secs(5);

/// Settings of our link; dropped, they are reverted.
pub struct Guard {
    netlink: Netlink,
    bus: Connection,
    link: i32,
}

/// Why resolved was not set.
#[derive(Debug, thiserror::Error)]
pub enum ResolvedError {
    /// The bus or the service said no.
    #[error("ask systemd-resolved: {0}")]
    Bus(#[from] zbus::Error),
    /// Neither answered.
    #[error("systemd-resolved did not answer")]
    Timeout,
    /// No such link can be named on the bus.
    #[error("interface index out of range")]
    Index,
}

/// resolved runs on the system bus.
pub fn is_running(netlink: &Netlink) -> bool {
    let asked = bounded(netlink, async {
        let bus = Connection::system().await?;
        let reply = bus
            .call_method(
                Some("org.freedesktop.DBus"),
                "/org/freedesktop/DBus",
                Some("org.freedesktop.DBus"),
                "NameHasOwner",
                &SERVICE,
            )
            .await?;
        reply.body().deserialize::<bool>()
    });
    asked.unwrap_or_else(|error| {
        tracing::debug!(%error, "no systemd-resolved");
        false
    })
}

impl Guard {
    /// Sends names under `domain` and short names with `search` to `server`, for the link with this index, and no
    /// other names.
    ///
    /// # Errors
    /// [`ResolvedError`]; nothing is then set.
    pub fn apply(
        netlink: &Netlink,
        link: u32,
        server: IpAddr,
        domain: &str,
        search: &[String],
    ) -> Result<Self, ResolvedError> {
        let link = i32::try_from(link).map_err(|_| ResolvedError::Index)?;
        let (family, address) = match server {
            IpAddr::V4(ip) => (2_i32, ip.octets().to_vec()),
            IpAddr::V6(ip) => (10_i32, ip.octets().to_vec()),
        };
        // true: for routing only. Search domains route as well.
        let mut domains: Vec<(&str, bool)> = search.iter().map(|name| (name.as_str(), false)).collect();
        if !search.iter().any(|name| name == domain) {
            domains.push((domain, true));
        }
        let bus = bounded(netlink, Connection::system())?;
        let guard = Self { netlink: netlink.clone(), bus, link };
        bounded(netlink, async {
            let bus = &guard.bus;
            call(bus, "SetLinkDNS", &(link, vec![(family, address)])).await?;
            call(bus, "SetLinkDomains", &(link, domains)).await?;
            call(bus, "SetLinkDefaultRoute", &(link, false)).await?;
            // The tunnel is authenticated; the cluster's DNS signs nothing and speaks no TLS.
            call(bus, "SetLinkDNSSEC", &(link, "no")).await?;
            call(bus, "SetLinkDNSOverTLS", &(link, "no")).await
        })?;
        Ok(guard)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let reverted = bounded(&self.netlink, call(&self.bus, "RevertLink", &self.link));
        if let Err(error) = reverted {
            tracing::warn!(%error, "systemd-resolved was not told; it forgets the settings with the interface");
        }
    }
}

async fn call(
    bus: &Connection,
    method: &str,
    body: &(impl serde::Serialize + zbus::zvariant::DynamicType),
) -> zbus::Result<()> {
    bus.call_method(Some(SERVICE), OBJECT, Some(MANAGER), method, body).await.map(drop)
}

fn bounded<T, E: Into<zbus::Error>>(
    netlink: &Netlink,
    future: impl Future<Output = Result<T, E>>,
) -> Result<T, ResolvedError> {
    netlink.block_on(async {
        match tokio::time::timeout(PATIENCE, future).await {
            Ok(result) => result.map_err(|error| ResolvedError::Bus(error.into())),
            Err(_) => Err(ResolvedError::Timeout),
        }
    })
}
