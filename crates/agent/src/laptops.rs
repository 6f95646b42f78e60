//! The laptops that are connected to this agent, and how a caller's connection reaches one.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use forkd_tunnel::stream::{OpenError, code, open};
use forkd_wire::control::{Route, User};
use forkd_wire::tunnel::{Deliver as DeliverOpen, Open, Outcome, Reset, open as kind};
use quinn::{Connection, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::proxy::{Deliver, DeliverError};

/// A laptop that is there connects to its own localhost and says so within one round trip. One that says nothing
/// for this long is asleep or gone: the caller gets what `onUnavailable` says.
const ANSWER: Duration = Duration::from_secs(5);

/// How long a laptop counts as there after the last relay that knew it. When a relay dies, its laptops come back by
/// another within a second or so; their requests wait for that instead of failing.
const GRACE: Duration = Duration::from_secs(3);

/// The connected laptops. Clones are the same.
#[derive(Clone, Default)]
pub struct Laptops(Arc<Inner>);

#[derive(Default)]
struct Inner {
    connected: Mutex<HashMap<String, Connected>>,
    /// Laptops that a relay knows to be there, and those that it no longer knows, since when: a relay notices in a
    /// moment when one is gone, QUIC only after hours.
    there: Mutex<HashMap<String, Option<Instant>>>,
    changed: watch::Sender<()>,
}

struct Connected {
    user: User,
    connection: Connection,
}

impl Laptops {
    /// Counts a laptop in; a connection of the same laptop from before is closed.
    pub fn add(&self, id: &str, user: User, connection: Connection) {
        let before = self.connected().insert(id.to_owned(), Connected { user, connection });
        if let Some(before) = before {
            before.connection.close(code(Reset::Cancelled), b"the laptop connected anew");
        }
        self.0.changed.send_replace(());
    }

    /// Counts a laptop out, unless it has connected anew meanwhile.
    pub fn remove(&self, id: &str, connection: &Connection) {
        let mut connected = self.connected();
        if connected.get(id).is_some_and(|c| c.connection.stable_id() == connection.stable_id()) {
            connected.remove(id);
        }
        drop(connected);
        self.0.changed.send_replace(());
    }

    /// What the relays know: these laptops are there, no others.
    pub fn set_there(&self, there: BTreeSet<String>) {
        let mut known = self.there();
        let now = Instant::now();
        for (id, gone) in known.iter_mut() {
            if !there.contains(id) {
                gone.get_or_insert(now);
            }
        }
        known.extend(there.into_iter().map(|id| (id, None)));
        drop(known);
        self.0.changed.send_replace(());
    }

    /// Closes the connections of all laptops but these: what they held here is gone.
    pub fn keep(&self, ids: &BTreeSet<String>) {
        for (id, laptop) in self.connected().iter() {
            if !ids.contains(id) {
                laptop.connection.close(code(Reset::Cancelled), b"this laptop holds no target here");
            }
        }
    }

    /// Ids of the laptops that can be reached.
    pub fn reachable(&self) -> Vec<String> {
        let mut ids: Vec<_> = self.connected().keys().cloned().collect();
        let mut there = self.there();
        there.retain(|_, gone| gone.is_none_or(|since| since.elapsed() < GRACE));
        ids.retain(|id| there.contains_key(id));
        ids.sort();
        ids
    }

    /// Changes with [`Self::reachable`].
    pub fn changes(&self) -> watch::Receiver<()> {
        self.0.changed.subscribe()
    }

    fn of(&self, route: &Route) -> Result<Connection, DeliverError> {
        let connected = self.connected();
        let laptop = connected.get(&route.laptop).ok_or(DeliverError::LaptopGone)?;
        if laptop.user.name != route.owner {
            tracing::warn!(
                laptop = route.laptop,
                owner = route.owner,
                "the laptop is not its target's owner's"
            );
            return Err(DeliverError::LaptopGone);
        }
        let connection = laptop.connection.clone();
        drop(connected);
        match self.there().get(&route.laptop) {
            Some(None) => Ok(connection),
            Some(Some(since)) if since.elapsed() < GRACE => Ok(connection),
            _ => Err(DeliverError::LaptopGone),
        }
    }

    fn there(&self) -> MutexGuard<'_, HashMap<String, Option<Instant>>> {
        self.0.there.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connected(&self) -> MutexGuard<'_, HashMap<String, Connected>> {
        self.0.connected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Deliver for Laptops {
    type Stream = Delivered;

    async fn deliver(&self, route: &Route, caller: SocketAddr) -> Result<Delivered, DeliverError> {
        let connection = self.of(route)?;
        let deliver =
            DeliverOpen { target: route.target.clone(), port: route.port, caller: caller.to_string() };
        let open = open(&connection, Open { kind: Some(kind::Kind::Deliver(deliver)) });
        match timeout(ANSWER, open).await {
            Ok(Ok((send, recv))) => Ok(Delivered { send, recv, finished: false }),
            Ok(Err(OpenError::Refused { outcome: Outcome::Refused, reason })) => {
                Err(DeliverError::NotListening(reason))
            }
            Ok(Err(OpenError::Refused { reason, .. })) => Err(DeliverError::Unavailable(reason)),
            Ok(Err(OpenError::Connection(error))) => {
                tracing::debug!(%error, laptop = route.laptop, "deliver");
                Err(DeliverError::LaptopGone)
            }
            Ok(Err(error)) => Err(DeliverError::Unavailable(error.to_string())),
            Err(_) => Err(DeliverError::LaptopGone),
        }
    }
}

/// Raw bytes to and from the process on the laptop. Dropped before its shutdown, it resets the other end.
pub struct Delivered {
    send: SendStream,
    recv: RecvStream,
    finished: bool,
}

impl AsyncRead for Delivered {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        AsyncRead::poll_read(Pin::new(&mut self.recv), cx, buf)
    }
}

impl AsyncWrite for Delivered {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        AsyncWrite::poll_write(Pin::new(&mut self.send), cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.finished {
            ready!(AsyncWrite::poll_shutdown(Pin::new(&mut self.send), cx))?;
            self.finished = true;
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for Delivered {
    fn drop(&mut self) {
        if !self.finished {
            // Fails only if the stream is closed already.
            let _ = self.send.reset(code(Reset::ConnectionReset));
        }
    }
}
