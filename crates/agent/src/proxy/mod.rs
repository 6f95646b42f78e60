//! The pod's port: takes redirected connections, routes requests by key, leaves everything else as it was.
//!
//! A connection's way: [`Proxy::run`] accepts → `sniff` tells HTTP/1, HTTP/2 and other bytes apart → `http1` and
//! `http2` route each request, `pump` copies what is not HTTP. Upstream is the application in the pod (`baseline`)
//! or a laptop ([`Deliver`]).
//!
//! **Invariant** What carries no key reaches the application byte for byte, and no route change cuts a connection.
//! **Invariant** Bytes whose framing is ambiguous, and probes of the kubelet, never reach a laptop.
//! **Invariant** Buffers are bounded per connection (head 64 KiB, copies 128 KiB each way, HTTP/2 by its windows);
//! a slow reader slows its writer.

mod answer;
mod baseline;
mod deliver;
mod http1;
mod http2;
mod pump;
mod routes;
mod sniff;

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

pub use baseline::OwnConnections;
pub use deliver::{Deliver, DeliverError};
pub use routes::Routes;

/// The listener of an agent, with everything that its connections share.
pub struct Proxy<D> {
    listeners: Vec<TcpListener>,
    shared: Arc<Shared<D>>,
}

/// What the connections of one proxy share.
struct Shared<D> {
    routes: Routes,
    deliver: D,
    counters: Counters,
    /// The agent's own port.
    port: u16,
}

/// What the agent reports about its connections. Clones count the same.
#[derive(Clone, Default)]
pub struct Counters {
    opaque: Arc<Mutex<HashMap<u16, u32>>>,
    own: OwnConnections,
}

impl Counters {
    /// Connections to this port that were not HTTP while a keyed target wanted HTTP; since the start.
    pub fn opaque_connections(&self, port: u16) -> u32 {
        self.opaque.lock().unwrap_or_else(PoisonError::into_inner).get(&port).copied().unwrap_or_default()
    }

    /// The agent's open connections to the application, to tell them from everybody else's.
    pub fn own(&self) -> &OwnConnections {
        &self.own
    }

    fn count_opaque(&self, port: u16) {
        *self.opaque.lock().unwrap_or_else(PoisonError::into_inner).entry(port).or_default() += 1;
    }
}

impl<D: Deliver> Proxy<D> {
    /// Listens on a free port of every address of this network namespace, IPv4 and (where there is one) IPv6.
    ///
    /// # Errors
    /// No socket or no free port.
    pub async fn bind(routes: Routes, deliver: D) -> io::Result<Self> {
        let mut last = None;
        // The two families need the same port, because the redirect knows one.
        for _ in 0..16 {
            let v4 = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
            let port = v4.local_addr()?.port();
            match bind_v6(port) {
                Ok(v6) => return Ok(Self::with(vec![v4, v6], port, routes, deliver)),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = Some(error),
                Err(error) => {
                    tracing::info!(%error, "no IPv6 in this pod");
                    return Ok(Self::with(vec![v4], port, routes, deliver));
                }
            }
        }
        Err(last.unwrap_or_else(|| io::ErrorKind::AddrInUse.into()))
    }

    fn with(listeners: Vec<TcpListener>, port: u16, routes: Routes, deliver: D) -> Self {
        let shared = Shared { routes, deliver, counters: Counters::default(), port };
        Self { listeners, shared: Arc::new(shared) }
    }

    /// Where the redirect must point.
    pub fn port(&self) -> u16 {
        self.shared.port
    }

    /// What to report.
    pub fn counters(&self) -> Counters {
        self.shared.counters.clone()
    }

    /// Serves until `stop` is done, then waits up to `grace` for the open connections to end by themselves; HTTP/1
    /// ends at the next idle moment, HTTP/2 says GOAWAY. Redirect no ports before, and remove the redirect after:
    /// it carries the open connections. Gives the number of connections that were cut.
    pub async fn run(self, stop: impl Future<Output = ()>, grace: Duration) -> usize {
        let mut connections = JoinSet::new();
        let (draining, drain) = tokio::sync::watch::channel(false);
        let mut stop = std::pin::pin!(stop);
        loop {
            let accepted = tokio::select! {
                () = &mut stop => break,
                accepted = accept(&self.listeners) => accepted,
                Some(ended) = connections.join_next() => {
                    report(ended);
                    continue;
                }
            };
            match accepted {
                Ok((client, caller)) => {
                    let (shared, drain) = (self.shared.clone(), drain.clone());
                    connections.spawn(async move { Box::pin(serve(shared, client, caller, drain)).await });
                }
                // The caller is gone already, or this process has no file descriptor left: the next try may succeed,
                // and without a pause it would spin.
                Err(error) => {
                    tracing::warn!(%error, "accept a redirected connection");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        }
        drop(self.listeners);
        draining.send_replace(true);
        let all_ended = async {
            while let Some(ended) = connections.join_next().await {
                report(ended);
            }
        };
        if tokio::time::timeout(grace, all_ended).await.is_ok() {
            return 0;
        }
        let cut = connections.len();
        connections.shutdown().await;
        cut
    }
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a connection's task failed");
    }
}

fn bind_v6(port: u16) -> io::Result<TcpListener> {
    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrIn6, bind, listen, setsockopt, socket,
    };
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Inet6, SockType::Stream, flags, None)?;
    // Apart from IPv4, so that addresses are never mapped ones.
    setsockopt(&fd, sockopt::Ipv6V6Only, &true)?;
    let addr = std::net::SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0);
    bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &SockaddrIn6::from(addr))?;
    listen(&fd, Backlog::MAXCONN)?;
    TcpListener::from_std(fd.into())
}

async fn accept(listeners: &[TcpListener]) -> io::Result<(TcpStream, SocketAddr)> {
    std::future::poll_fn(|cx| {
        for listener in listeners {
            if let std::task::Poll::Ready(accepted) = listener.poll_accept(cx) {
                return std::task::Poll::Ready(accepted);
            }
        }
        std::task::Poll::Pending
    })
    .await
}

/// True once the proxy only waits for its connections to end.
type Draining = tokio::sync::watch::Receiver<bool>;

/// Done when the proxy stops; never, if it is gone without having said so.
async fn drained(draining: &mut Draining) {
    if draining.wait_for(|drain| *drain).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// One caller's connection.
struct Connection<D> {
    shared: Arc<Shared<D>>,
    caller: SocketAddr,
    /// Where the caller wanted to go: an address of this pod.
    original: SocketAddr,
    draining: Draining,
}

impl<D: Deliver> Connection<D> {
    fn port(&self) -> u16 {
        self.original.port()
    }

    fn table(&self) -> Arc<routes::Table> {
        self.shared.routes.table()
    }
}

async fn serve<D: Deliver>(
    shared: Arc<Shared<D>>,
    client: TcpStream,
    caller: SocketAddr,
    draining: Draining,
) {
    let original = match original_destination(&client) {
        Some(original) if original.port() != shared.port => original,
        // Somebody dialed the agent itself: there is nothing here for them.
        _ => return,
    };
    if let Err(error) = client.set_nodelay(true) {
        tracing::debug!(%error, "set TCP_NODELAY");
    }
    let connection = Connection { shared, caller, original, draining };
    sniff::serve(connection, client).await;
}

/// Where a connection went before it was redirected; `None` for one that was not.
fn original_destination(client: &TcpStream) -> Option<SocketAddr> {
    match client.local_addr().ok()? {
        SocketAddr::V4(_) => getsockopt(client, sockopt::OriginalDst).ok().map(|raw| {
            let ip = Ipv4Addr::from(u32::from_be(raw.sin_addr.s_addr));
            SocketAddr::from((ip, u16::from_be(raw.sin_port)))
        }),
        SocketAddr::V6(_) => getsockopt(client, sockopt::Ip6tOriginalDst).ok().map(|raw| {
            let ip = Ipv6Addr::from(raw.sin6_addr.s6_addr);
            let scope = raw.sin6_scope_id;
            std::net::SocketAddrV6::new(ip, u16::from_be(raw.sin6_port), 0, scope).into()
        }),
    }
}
