//! The relay: passes sealed packets between laptops and agents, reads none.
//!
//! A party proves who it is on a control connection (QUIC, mutual TLS). The address or pipe that this connection comes
//! from is the party's authenticated *leg*: forwarded packets from there are the party's, and those for it go there.
//! From anywhere else nothing is forwarded, and QUIC answers with nothing bigger than what it got. There is no state
//! per flow: a relay that is killed takes nothing along.

use std::collections::HashMap;
use std::fmt;
use std::future::poll_fn;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use forkd_wire::ALPN_RELAY;
use forkd_wire::peer::PeerId;
use forkd_wire::relay::{Datagram, FORWARD_HEADER, FromRelay, Register, ToRelay, classify};
use quinn::{Connection, VarInt};
use quinn_udp::{BATCH_SIZE, RecvMeta};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::congestion::Generation;
use crate::endpoint::{EndpointError, endpoint_config};
use crate::identity::{Credentials, Identity, peer_identity};
use crate::path::MAX_PAYLOAD;
use crate::path::pipe::{Push, Queue};
use crate::path::udp::Udp;
use crate::relay_client::control_transport;
use crate::stream::{MessageReader, write_message};

mod pipes;
mod socket;
mod table;

use socket::{ControlSocket, Inbox};
use table::{Leg, Table};

/// Control handshakes in progress.
const HANDSHAKES: usize = 256;
/// How long a handshake, or the first word after it, may take; and how often a pipe must have somebody behind it.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a party's address is looked at besides: behind a NAT it changes without a word.
const ADDRESS_CHECK: Duration = Duration::from_secs(2);

/// Why a packet was not forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dropped {
    /// Neither a QUIC packet nor a forwarded one.
    UnknownFrame,
    /// Longer than any packet of ours.
    TooLong,
    /// From an address or pipe that no live control connection vouches for.
    Unauthenticated,
    /// From an address that stands for pipes inside this process: forged.
    ForgedSource,
    /// To nobody who is here.
    UnknownPeer,
    /// Not between a laptop and an agent that has registered it.
    NotAllowed,
    /// Its receiver has no address or pipe at the moment.
    NoLeg,
    /// Its receiver's pipe is slower than what comes for it.
    QueueFull,
    /// For the relay itself, which is flooded.
    ControlFull,
}

impl Dropped {
    /// All of them, in the order of the counters.
    pub const ALL: [Self; 9] = [
        Self::UnknownFrame,
        Self::TooLong,
        Self::Unauthenticated,
        Self::ForgedSource,
        Self::UnknownPeer,
        Self::NotAllowed,
        Self::NoLeg,
        Self::QueueFull,
        Self::ControlFull,
    ];

    /// Metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UnknownFrame => "unknown-frame",
            Self::TooLong => "too-long",
            Self::Unauthenticated => "unauthenticated",
            Self::ForgedSource => "forged-source",
            Self::UnknownPeer => "unknown-peer",
            Self::NotAllowed => "not-allowed",
            Self::NoLeg => "no-leg",
            Self::QueueFull => "queue-full",
            Self::ControlFull => "control-full",
        }
    }
}

/// A running relay. Dropping it stops it.
#[derive(Debug)]
pub struct Relay {
    shared: Arc<Shared>,
    endpoint: quinn::Endpoint,
    tasks: JoinSet<()>,
}

struct Shared {
    udp: Udp,
    table: RwLock<Table>,
    pipes: RwLock<HashMap<u64, Arc<Queue>>>,
    next_pipe: AtomicU64,
    inbox: Inbox,
    changes: watch::Sender<u64>,
    dropped: [AtomicU64; Dropped::ALL.len()],
    packets: AtomicU64,
    bytes: AtomicU64,
}

impl Relay {
    /// Starts to serve: datagrams on `udp`, byte pipes on `tcp` (bound to loopback: only port-forwards reach it).
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`EndpointError::Socket`], [`EndpointError::Identity`].
    pub fn start(
        credentials: &Credentials,
        udp: std::net::UdpSocket,
        tcp: TcpListener,
    ) -> Result<Self, EndpointError> {
        let shared = Arc::new(Shared {
            udp: Udp::new(udp)?,
            table: RwLock::default(),
            pipes: RwLock::default(),
            next_pipe: AtomicU64::new(1),
            inbox: Inbox::default(),
            changes: watch::Sender::new(0),
            dropped: Default::default(),
            packets: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        });
        let mut config = credentials.quic_server_config(ALPN_RELAY)?;
        config.transport_config(control_transport(&Generation::default()));
        config.max_incoming(HANDSHAKES);
        let endpoint = quinn::Endpoint::new_with_abstract_socket(
            endpoint_config(),
            Some(config),
            Arc::new(ControlSocket(shared.clone())),
            Arc::new(quinn::TokioRuntime),
        )?;
        let mut tasks = JoinSet::new();
        tasks.spawn(serve_udp(shared.clone()));
        tasks.spawn(pipes::serve(shared.clone(), tcp));
        tasks.spawn(serve_control(shared.clone(), endpoint.clone()));
        Ok(Self { shared, endpoint, tasks })
    }

    /// Packets dropped for this reason so far.
    pub fn dropped(&self, reason: Dropped) -> u64 {
        self.shared.dropped[reason as usize].load(Ordering::Relaxed)
    }

    /// Packets and their bytes (with headers) that were passed on so far.
    pub fn forwarded(&self) -> (u64, u64) {
        (self.shared.packets.load(Ordering::Relaxed), self.shared.bytes.load(Ordering::Relaxed))
    }

    /// Laptops and agents that are here.
    pub fn parties(&self) -> usize {
        self.shared.table().len()
    }

    /// Real address of the UDP socket.
    pub fn udp_addr(&self) -> SocketAddr {
        self.shared.udp.local_addr()
    }

    /// Resolves when the relay no longer serves, which only a failure of its sockets brings about. Cancel safe.
    pub async fn ended(&mut self) {
        // Each task serves for ever: the first to end says that something is broken.
        self.tasks.join_next().await;
    }

    /// Tells all parties, a second at most, and stops.
    pub async fn close(mut self) {
        self.endpoint.close(VarInt::from_u32(0), b"the relay is shutting down");
        // Parties that cannot be reached are not waited for.
        let _ = tokio::time::timeout(Duration::from_secs(1), self.endpoint.wait_idle()).await;
        self.tasks.shutdown().await;
    }
}

impl Shared {
    fn table(&self) -> std::sync::RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn table_mut(&self) -> std::sync::RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.changes.send_modify(|version| *version += 1);
    }

    fn pipe(&self, pipe: u64) -> Option<Arc<Queue>> {
        self.pipes.read().unwrap_or_else(PoisonError::into_inner).get(&pipe).cloned()
    }

    fn count(&self, reason: Dropped, packets: usize) {
        self.dropped[reason as usize].fetch_add(packets as u64, Ordering::Relaxed);
    }

    /// Takes a packet for the relay itself.
    fn control(&self, from: Leg, packet: &[u8]) {
        if !self.inbox.push(addr_of(from), packet) {
            self.count(Dropped::ControlFull, 1);
        }
    }

    /// Passes on a run of forwarded packets for one receiver: `stride` bytes each but the last, with their headers,
    /// in which the sender's id takes the place of the receiver's.
    ///
    /// # Errors
    /// If the UDP socket is broken.
    async fn forward(&self, from: Leg, to: PeerId, run: &mut [u8], stride: usize) -> io::Result<()> {
        let packets = run.len().div_ceil(stride);
        // Bound first: the guard of the table must not live across an await.
        let verdict = self.table().forward(from, to);
        let (sender, leg) = match verdict {
            Ok(passed) => passed,
            Err(reason) => {
                self.count(reason, packets);
                return Ok(());
            }
        };
        for packet in run.chunks_mut(stride) {
            packet[1..FORWARD_HEADER].copy_from_slice(&sender.0);
        }
        match leg {
            Leg::Pipe(pipe) => {
                match self.pipe(pipe).map_or(Push::Closed, |queue| queue.push(None, run, stride)) {
                    Push::Taken => {}
                    Push::Full => {
                        self.count(Dropped::QueueFull, packets);
                        return Ok(());
                    }
                    Push::Closed => {
                        self.count(Dropped::NoLeg, packets);
                        return Ok(());
                    }
                }
            }
            Leg::Udp(addr) => {
                let mut sent = 0;
                while sent < run.len() {
                    match self.udp.try_send(addr, &run[sent..], stride) {
                        Ok(taken) => sent += taken,
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            self.udp.writable().await?
                        }
                        Err(error) => return Err(error),
                    }
                }
            }
        }
        self.packets.fetch_add(packets as u64, Ordering::Relaxed);
        self.bytes.fetch_add(run.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("udp", &self.udp).finish_non_exhaustive()
    }
}

/// The address under which the relay's QUIC endpoint knows a leg.
fn addr_of(leg: Leg) -> SocketAddr {
    match leg {
        Leg::Udp(addr) => addr,
        Leg::Pipe(pipe) => PeerId(pipe.to_be_bytes()).synthetic_addr(),
    }
}

fn leg_of(addr: SocketAddr) -> Leg {
    PeerId::from_synthetic(addr).map_or(Leg::Udp(addr), |id| Leg::Pipe(u64::from_be_bytes(id.0)))
}

/// What a party sent; nothing of it is answered with more than it has.
enum Sorted<'a> {
    Forward(PeerId),
    Control(&'a [u8]),
    Drop(Dropped),
}

fn sorted(datagram: &[u8]) -> Sorted<'_> {
    if datagram.len() > usize::from(MAX_PAYLOAD) {
        return Sorted::Drop(Dropped::TooLong);
    }
    match classify(datagram) {
        Datagram::Forward(to, _) => Sorted::Forward(to),
        Datagram::Quic(packet) => Sorted::Control(packet),
        Datagram::Unknown => Sorted::Drop(Dropped::UnknownFrame),
    }
}

async fn serve_udp(shared: Arc<Shared>) {
    let size = usize::from(MAX_PAYLOAD) * shared.udp.gro_segments();
    let mut memory = vec![0; size * BATCH_SIZE];
    loop {
        let mut metas = [RecvMeta::default(); BATCH_SIZE];
        let received = {
            let mut bufs: Vec<IoSliceMut<'_>> = memory.chunks_mut(size).map(IoSliceMut::new).collect();
            poll_fn(|cx| shared.udp.poll_recv(cx, &mut bufs, &mut metas)).await
        };
        let received = match received {
            Ok(received) => received,
            Err(error) => return tracing::error!(%error, "the relay's UDP socket failed"),
        };
        for (batch, meta) in memory.chunks_mut(size).zip(&metas[..received]) {
            if let Err(error) = sort(&shared, meta.addr, &mut batch[..meta.len], meta.stride).await {
                return tracing::error!(%error, "the relay's UDP socket failed");
            }
        }
    }
}

/// Sorts one received batch of datagrams, in runs for the same receiver.
async fn sort(shared: &Shared, addr: SocketAddr, batch: &mut [u8], stride: usize) -> io::Result<()> {
    if PeerId::from_synthetic(addr).is_some() {
        shared.count(Dropped::ForgedSource, batch.len().div_ceil(stride));
        return Ok(());
    }
    let from = Leg::Udp(addr);
    // Where the current run begins, and whom it is for.
    let mut run: Option<(usize, PeerId)> = None;
    for at in (0..batch.len()).step_by(stride) {
        let to = match sorted(&batch[at..(at + stride).min(batch.len())]) {
            Sorted::Forward(to) => Some(to),
            Sorted::Control(packet) => {
                shared.control(from, packet);
                None
            }
            Sorted::Drop(reason) => {
                shared.count(reason, 1);
                None
            }
        };
        match (run, to) {
            (Some((_, running)), Some(to)) if running == to => {}
            _ => {
                if let Some((start, running)) = run {
                    shared.forward(from, running, &mut batch[start..at], stride).await?;
                }
                run = to.map(|to| (at, to));
            }
        }
    }
    if let Some((start, running)) = run {
        shared.forward(from, running, &mut batch[start..], stride).await?;
    }
    Ok(())
}

async fn serve_control(shared: Arc<Shared>, endpoint: quinn::Endpoint) {
    let mut parties = JoinSet::new();
    loop {
        let incoming = tokio::select! {
            incoming = endpoint.accept() => incoming,
            Some(_) = parties.join_next() => continue,
        };
        let Some(incoming) = incoming else { return };
        let is_udp = matches!(leg_of(incoming.remote_address()), Leg::Udp(_));
        if is_udp && !incoming.remote_address_validated() && incoming.may_retry() {
            // One small packet back, and no state, until the address is proved (RFC 9000 §8.1.2).
            if incoming.retry().is_err() {
                tracing::debug!("cannot ask a caller to prove its address");
            }
            continue;
        }
        let shared = shared.clone();
        parties.spawn(async move {
            let connection = match tokio::time::timeout(PATIENCE, incoming).await {
                Ok(Ok(connection)) => connection,
                Ok(Err(error)) => return tracing::info!(%error, "a handshake failed"),
                Err(_) => return tracing::info!("a handshake took too long"),
            };
            serve_party(&shared, connection).await;
        });
    }
}

async fn serve_party(shared: &Shared, connection: Connection) {
    let identity = match peer_identity(&connection) {
        Ok(identity @ (Identity::Laptop { .. } | Identity::Agent { .. })) => identity,
        Ok(identity) => {
            tracing::warn!(party = %identity.short(), "refused: neither laptop nor agent");
            return connection.close(VarInt::from_u32(0), b"only laptops and agents");
        }
        Err(error) => {
            tracing::warn!(%error, "refused");
            return connection.close(VarInt::from_u32(0), b"certificate of no use");
        }
    };
    let (peer, name) = (identity.peer_id(), identity.short());
    let number = connection.stable_id() as u64;
    tracing::info!(party = %name, "is here");
    shared.table_mut().join(identity.clone(), number);
    let ended = talk(shared, &connection, &identity, number).await;
    tracing::info!(party = %name, %ended, "left");
    connection.close(VarInt::from_u32(0), b"");
    if shared.table_mut().leave(peer, number) {
        shared.changed();
    }
}

/// Hears what a party says and tells it what changes, until it is gone; then why.
async fn talk(shared: &Shared, connection: &Connection, identity: &Identity, number: u64) -> String {
    let peer = identity.peer_id();
    let (mut send, recv) = match tokio::time::timeout(PATIENCE, connection.accept_bi()).await {
        Ok(Ok(streams)) => streams,
        Ok(Err(error)) => return error.to_string(),
        Err(_) => return "it said nothing".to_owned(),
    };
    let mut reader = MessageReader::<ToRelay, _>::new(recv);
    let mut changes = shared.changes.subscribe();
    let mut check = tokio::time::interval(ADDRESS_CHECK);
    check.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut told: Option<FromRelay> = None;
    let mut leg = 0;
    loop {
        let mut answer = false;
        tokio::select! {
            message = reader.next() => match message {
                Ok(Some(message)) => {
                    let mut table = shared.table_mut();
                    let (in_effect, moved) = table.set_leg(peer, number, leg_of(connection.remote_address()));
                    let registered = match message.register {
                        Some(register) => table.register(peer, number, register),
                        None => table.register(peer, number, Register::default()),
                    };
                    drop(table);
                    if in_effect {
                        leg = message.leg;
                    }
                    if moved || registered {
                        shared.changed();
                    }
                    answer = true;
                }
                Ok(None) => return "it ended its stream".to_owned(),
                Err(error) => return error.to_string(),
            },
            _ = changes.changed() => {}
            _ = check.tick() => {
                // Only where it spoke from before: a pipe that is new must be spoken of.
                if told.is_some() {
                    let moved = shared.table_mut().set_leg(peer, number, leg_of(connection.remote_address())).1;
                    if moved {
                        shared.changed();
                    }
                }
                continue;
            }
        }
        let news = {
            let table = shared.table();
            match identity {
                Identity::Laptop { .. } => {
                    FromRelay { agents: table.agents_for(peer), leg, laptops: Vec::new() }
                }
                _ => FromRelay { agents: Vec::new(), leg, laptops: table.laptops_for(peer) },
            }
        };
        if answer || (told.is_some() && told.as_ref() != Some(&news)) {
            if let Err(error) = write_message(&mut send, &news).await {
                return error.to_string();
            }
            told = Some(news);
        }
    }
}

#[cfg(test)]
mod tests;
