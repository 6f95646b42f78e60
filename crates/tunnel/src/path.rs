//! The socket beneath QUIC. QUIC knows every peer under one constant address ([`PeerId::synthetic_addr`]); here its
//! packets get a *leg*: datagrams to a relay's UDP address, or frames in a byte pipe to a relay. Legs come and go,
//! connections stay.
//!
//! Nothing is dropped for want of a leg or of room: the connection's task waits, holding one batch of packets, and
//! that batch is the first on the next leg. That is why a transfer resumes at once after an outage.
//!
//! `path/routes.rs` chooses the leg and does no IO: further kinds of path are candidates there.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::BytesMut;
use forkd_wire::peer::PeerId;
use forkd_wire::relay::{Datagram, FORWARD_HEADER, classify, forward_header};
use futures::task::AtomicWaker;
use quinn::{AsyncUdpSocket, UdpPoller};
use quinn_udp::{RecvMeta, Transmit};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, oneshot, watch};

use crate::congestion::Generation;

pub(crate) mod pipe;
mod routes;
pub(crate) mod udp;

pub use pipe::PipeEnd;
use pipe::{FrameReader, Push, Queue};
use routes::{Choice, Leg, Routes};
use udp::Udp;

/// Largest UDP payload that we send: an Ethernet frame's worth (1500 - 20 - 8), also as a forwarded packet.
pub(crate) const MAX_PAYLOAD: u16 = 1472;
/// Largest QUIC packet that fits, with the header of a forwarded one.
pub(crate) const MAX_PACKET: u16 = MAX_PAYLOAD - FORWARD_HEADER as u16;
/// Bytes that wait for a pipe's writer. At 1 Gbit/s this is a millisecond; more would only be a longer queue.
const PIPE_QUEUE: usize = 128 * 1024;
/// Bytes received from pipes that wait for QUIC; then the pipes wait.
const INBOX: usize = 512 * 1024;
/// quinn builds at most ten packets per batch (its MAX_TRANSMIT_SEGMENTS).
const PIPE_SEGMENTS: usize = 10;

/// Why a packet went no further here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dropped {
    /// Received from an address that is no relay's.
    UnknownSource,
    /// Received, but neither a QUIC packet nor a forwarded one.
    UnknownFrame,
    /// Received, longer than any packet that QUIC would take.
    TooLong,
    /// To be sent, but not to a peer of ours.
    NoPeer,
    /// A stateless answer (no connection's) while its leg was full or gone.
    StatelessAnswer,
}

impl Dropped {
    /// All of them, in the order of the counters.
    pub const ALL: [Self; 5] =
        [Self::UnknownSource, Self::UnknownFrame, Self::TooLong, Self::NoPeer, Self::StatelessAnswer];

    /// Metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UnknownSource => "unknown-source",
            Self::UnknownFrame => "unknown-frame",
            Self::TooLong => "too-long",
            Self::NoPeer => "no-peer",
            Self::StatelessAnswer => "stateless-answer",
        }
    }
}

/// See the module.
pub struct PathSocket {
    local: SocketAddr,
    udp: Option<Udp>,
    routes: Mutex<Routes>,
    inbox: Mutex<Inbox>,
    inbox_room: Notify,
    receiver: AtomicWaker,
    /// Tasks that wait for room or for a leg.
    senders: Mutex<Vec<Waker>>,
    scratch: Mutex<Vec<u8>>,
    udp_first: AtomicBool,
    generation: Generation,
    changes: watch::Sender<u64>,
    dropped: [AtomicU64; Dropped::ALL.len()],
}

#[derive(Default)]
struct Inbox {
    datagrams: VecDeque<(SocketAddr, BytesMut)>,
    bytes: usize,
}

impl PathSocket {
    /// A socket of the party `local`, with UDP or with pipes only.
    ///
    /// # Errors
    /// If the UDP socket cannot be used.
    pub fn new(local: PeerId, udp: Option<std::net::UdpSocket>) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            local: local.synthetic_addr(),
            udp: udp.map(Udp::new).transpose()?,
            routes: Mutex::default(),
            inbox: Mutex::default(),
            inbox_room: Notify::new(),
            receiver: AtomicWaker::new(),
            senders: Mutex::default(),
            scratch: Mutex::default(),
            udp_first: AtomicBool::new(false),
            generation: Generation::default(),
            changes: watch::Sender::new(0),
            dropped: Default::default(),
        }))
    }

    /// Told to congestion control at each switch.
    pub fn generation(&self) -> &Generation {
        &self.generation
    }

    /// Changes whenever a leg came, went or was confirmed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Packets dropped for this reason so far.
    pub fn dropped(&self, reason: Dropped) -> u64 {
        self.dropped[reason as usize].load(Ordering::Relaxed)
    }

    /// Real address of the UDP socket.
    pub fn udp_addr(&self) -> Option<SocketAddr> {
        self.udp.as_ref().map(Udp::local_addr)
    }

    /// Reaches a relay by UDP.
    pub fn attach_udp(&self, relay: PeerId, addr: SocketAddr) {
        self.attach(relay, Leg::Udp(udp::canonical(addr)));
    }

    /// Reaches a relay through a byte pipe, in place of whatever reached it before. Connections wait for
    /// [`Self::confirm`]; only the relay's own packets pass at once.
    pub fn attach_pipe<I>(self: &Arc<Self>, relay: PeerId, io: I) -> PipeHandle
    where
        I: AsyncRead + AsyncWrite + Send + 'static,
    {
        let queue = Arc::new(Queue::new(PIPE_QUEUE));
        let number = self.attach(relay, Leg::Pipe(queue.clone()));
        let (tell, end) = oneshot::channel();
        let socket = self.clone();
        tokio::spawn({
            let queue = queue.clone();
            async move {
                let (read, write) = tokio::io::split(io);
                let end = tokio::select! {
                    end = socket.read_pipe(relay, read) => end,
                    end = queue.write_to(write, || socket.wake_senders()) => end,
                };
                queue.close();
                socket.detach(relay, number);
                // Nobody may be interested.
                let _ = tell.send(end);
            }
        });
        PipeHandle { end, queue }
    }

    /// Forgets a relay.
    pub fn remove(&self, relay: PeerId) {
        if let Some(Leg::Pipe(queue)) = self.routes().remove(relay) {
            queue.close();
        }
        self.changed();
    }

    /// Number of the leg that a relay is reached by, for [`Self::confirm`].
    pub fn leg_number(&self, relay: PeerId) -> Option<u64> {
        self.routes().leg_number(relay)
    }

    /// The relay forwards what comes from the leg with this number: packets for other peers may go there. True if
    /// this is news; then connections are worth a nudge (`Endpoint::rebind_abstract`).
    pub fn confirm(&self, relay: PeerId, number: u64) -> bool {
        let news = self.routes().confirm(relay, number);
        if news {
            self.changed();
        }
        news
    }

    fn attach(&self, relay: PeerId, leg: Leg) -> u64 {
        let (number, before) = self.routes().attach(relay, leg);
        if let Some(Leg::Pipe(queue)) = before {
            queue.close();
        }
        self.changed();
        number
    }

    fn detach(&self, relay: PeerId, number: u64) {
        if self.routes().detach(relay, number) {
            self.changed();
        }
    }

    fn changed(&self) {
        self.generation.bump();
        self.changes.send_modify(|version| *version += 1);
        self.wake_senders();
    }

    async fn read_pipe(&self, relay: PeerId, from: impl AsyncRead + Unpin) -> PipeEnd {
        let mut reader = FrameReader::new(from);
        let mut datagrams = Vec::new();
        loop {
            if let Err(end) = reader.read(&mut datagrams).await {
                return end;
            }
            self.receive(relay, &mut datagrams);
            loop {
                let room = self.inbox_room.notified();
                if self.inbox().bytes < INBOX {
                    break;
                }
                room.await;
            }
        }
    }

    /// Puts what came from a relay's pipe where QUIC finds it.
    fn receive(&self, relay: PeerId, datagrams: &mut Vec<BytesMut>) {
        let mut last = None;
        let mut inbox = self.inbox();
        for mut datagram in datagrams.drain(..) {
            let from = match classify(&datagram) {
                Datagram::Quic(_) => relay,
                Datagram::Forward(peer, _) => {
                    drop(datagram.split_to(FORWARD_HEADER));
                    if last.replace(peer) != Some(peer) {
                        self.routes().learn(peer, relay);
                    }
                    peer
                }
                Datagram::Unknown => {
                    self.count(Dropped::UnknownFrame);
                    continue;
                }
            };
            inbox.push(from.synthetic_addr(), datagram);
        }
        drop(inbox);
        self.receiver.wake();
    }

    /// Moves datagrams out of the inbox into QUIC's buffers, one each.
    fn take_inbox(&self, bufs: &mut [IoSliceMut<'_>], metas: &mut [RecvMeta]) -> usize {
        let mut inbox = self.inbox();
        let mut count = 0;
        while count < bufs.len().min(metas.len()) {
            let Some((addr, datagram)) = inbox.datagrams.pop_front() else { break };
            inbox.bytes -= datagram.len();
            let Some(room) = bufs[count].get_mut(..datagram.len()) else {
                self.count(Dropped::TooLong);
                continue;
            };
            room.copy_from_slice(&datagram);
            let len = datagram.len();
            metas[count] = RecvMeta { addr, len, stride: len, ..Default::default() };
            count += 1;
        }
        if count > 0 && inbox.bytes < INBOX {
            self.inbox_room.notify_waiters();
        }
        count
    }

    /// Rewrites received batches in place: real addresses become synthetic ones, headers go. What does not fit into
    /// its batch (another sender's datagrams) takes the way of the pipes.
    fn translate(&self, bufs: &mut [IoSliceMut<'_>], metas: &mut [RecvMeta]) {
        for (buf, meta) in bufs.iter_mut().zip(metas) {
            let (len, stride) = (std::mem::take(&mut meta.len), meta.stride);
            meta.dst_ip = None;
            meta.ecn = None;
            let Some(relay) = self.routes().relay_at(meta.addr) else {
                self.count_many(Dropped::UnknownSource, len.div_ceil(stride));
                continue;
            };
            let mut sender = None;
            let mut written = 0;
            for at in (0..len).step_by(stride) {
                let datagram = &buf[at..(at + stride).min(len)];
                let (from, skip) = match classify(datagram) {
                    Datagram::Quic(_) => (relay, 0),
                    Datagram::Forward(peer, _) => (peer, FORWARD_HEADER),
                    Datagram::Unknown => {
                        self.count(Dropped::UnknownFrame);
                        continue;
                    }
                };
                if sender.is_none() {
                    sender = Some(from);
                    meta.addr = from.synthetic_addr();
                    meta.stride = stride - skip;
                    if skip > 0 {
                        self.routes().learn(from, relay);
                    }
                }
                if sender == Some(from) {
                    let size = datagram.len() - skip;
                    buf.copy_within(at + skip..at + skip + size, written);
                    written += size;
                } else {
                    if skip > 0 {
                        self.routes().learn(from, relay);
                    }
                    self.inbox().push(from.synthetic_addr(), BytesMut::from(&datagram[skip..]));
                    // Whoever is receiving now comes back for it.
                    self.receiver.wake();
                }
            }
            meta.len = written;
        }
    }

    fn poll_udp(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let Some(udp) = &self.udp else { return Poll::Pending };
        let received = std::task::ready!(udp.poll_recv(cx, bufs, metas))?;
        self.translate(&mut bufs[..received], &mut metas[..received]);
        Poll::Ready(Ok(received))
    }

    fn send_udp(
        &self,
        udp: &Udp,
        to: SocketAddr,
        peer: Option<PeerId>,
        transmit: &Transmit<'_>,
    ) -> io::Result<()> {
        let segment = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
        let Some(peer) = peer else {
            return udp.try_send(to, transmit.contents, segment).map(drop);
        };
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        scratch.clear();
        for datagram in transmit.contents.chunks(segment) {
            scratch.extend_from_slice(&forward_header(peer));
            scratch.extend_from_slice(datagram);
        }
        // A batch that was taken in part counts as sent: sending it again would repeat packets, QUIC repairs the rest.
        udp.try_send(to, &scratch, segment + FORWARD_HEADER).map(drop)
    }

    fn count(&self, reason: Dropped) {
        self.count_many(reason, 1);
    }

    fn count_many(&self, reason: Dropped, packets: usize) {
        self.dropped[reason as usize].fetch_add(packets as u64, Ordering::Relaxed);
    }

    fn wake_senders(&self) {
        let senders = std::mem::take(&mut *self.senders.lock().unwrap_or_else(PoisonError::into_inner));
        senders.into_iter().for_each(Waker::wake);
    }

    fn register_sender(&self, waker: &Waker) {
        let mut senders = self.senders.lock().unwrap_or_else(PoisonError::into_inner);
        if !senders.iter().any(|known| known.will_wake(waker)) {
            senders.push(waker.clone());
        }
    }

    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inbox {
    fn push(&mut self, from: SocketAddr, datagram: BytesMut) {
        self.bytes += datagram.len();
        self.datagrams.push_back((from, datagram));
    }
}

impl fmt::Debug for PathSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PathSocket")
            .field("local", &self.local)
            .field("udp", &self.udp)
            .finish_non_exhaustive()
    }
}

/// A pipe in use. Resolves when the pipe is no more, with the reason. Dropping it gives the pipe up.
#[derive(Debug)]
#[must_use = "dropping it gives the pipe up"]
pub struct PipeHandle {
    end: oneshot::Receiver<PipeEnd>,
    queue: Arc<Queue>,
}

impl Future for PipeHandle {
    type Output = PipeEnd;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<PipeEnd> {
        // The task cannot end without a word, unless the runtime ends.
        Pin::new(&mut self.end).poll(cx).map(|end| end.unwrap_or(PipeEnd::GivenUp))
    }
}

impl Drop for PipeHandle {
    fn drop(&mut self) {
        self.queue.close();
    }
}

thread_local! {
    /// The poller that said "writable" last on this thread. quinn's connection driver calls `poll_writable` and
    /// `try_send` one right after the other, without an await between; so a `try_send` that finds its leg full can
    /// tell that very poller what to wait for. `UdpPoller` alone does not know where the packet goes, and one full pipe
    /// must not stop connections over other legs.
    static CURRENT: RefCell<Option<Arc<Mutex<Option<PeerId>>>>> = const { RefCell::new(None) };
}

impl AsyncUdpSocket for PathSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Poller { socket: self, waits_for: Arc::default(), udp: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let caller = CURRENT.take();
        let Some(to) = PeerId::from_synthetic(transmit.destination) else {
            self.count(Dropped::NoPeer);
            return Ok(());
        };
        // Bound first: the guard of the table would live as long as the match.
        let choice = self.routes().choose(to);
        let taken = match (choice, &self.udp) {
            (Some(Choice { leg: Leg::Pipe(queue), forward }), _) => {
                let segment = transmit.segment_size.unwrap_or(transmit.contents.len());
                queue.push(forward.then_some(to), transmit.contents, segment) == Push::Taken
            }
            (Some(Choice { leg: Leg::Udp(addr), forward }), Some(udp)) => {
                match self.send_udp(udp, addr, forward.then_some(to), transmit) {
                    Ok(()) => true,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
                    Err(error) => return Err(error),
                }
            }
            (Some(Choice { leg: Leg::Udp(_), .. }), None) | (None, _) => false,
        };
        if taken {
            return Ok(());
        }
        match caller {
            Some(waits_for) => *waits_for.lock().unwrap_or_else(PoisonError::into_inner) = Some(to),
            None => self.count(Dropped::StatelessAnswer),
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.receiver.register(cx.waker());
        // In turns, so that neither starves the other.
        let udp_first = self.udp_first.fetch_xor(true, Ordering::Relaxed);
        if udp_first && let Poll::Ready(received) = self.poll_udp(cx, bufs, metas) {
            return Poll::Ready(received);
        }
        match self.take_inbox(bufs, metas) {
            0 if udp_first => Poll::Pending,
            0 => self.poll_udp(cx, bufs, metas),
            count => Poll::Ready(Ok(count)),
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.local)
    }

    fn max_transmit_segments(&self) -> usize {
        self.udp.as_ref().map_or(PIPE_SEGMENTS, Udp::max_segments)
    }

    fn max_receive_segments(&self) -> usize {
        self.udp.as_ref().map_or(1, Udp::gro_segments)
    }

    fn may_fragment(&self) -> bool {
        self.udp.as_ref().is_some_and(Udp::may_fragment)
    }
}

/// One connection's way to wait. See [`CURRENT`].
struct Poller {
    socket: Arc<PathSocket>,
    waits_for: Arc<Mutex<Option<PeerId>>>,
    udp: Option<Pin<Box<dyn Future<Output = ()> + Send + Sync>>>,
}

impl UdpPoller for Poller {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let waits_for = *self.waits_for.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(to) = waits_for {
            // Before looking, so that a change in between is not missed.
            self.socket.register_sender(cx.waker());
            let choice = self.socket.routes().choose(to);
            match choice.map(|choice| choice.leg) {
                Some(Leg::Pipe(queue)) if queue.has_room() => {}
                Some(Leg::Udp(_)) if self.socket.udp.is_some() => {
                    let socket = self.socket.clone();
                    let writable = self.udp.get_or_insert_with(|| {
                        Box::pin(async move {
                            if let Some(udp) = &socket.udp {
                                // An error shows again when sending.
                                let _ = udp.writable().await;
                            }
                        })
                    });
                    std::task::ready!(writable.as_mut().poll(cx));
                }
                _ => return Poll::Pending,
            }
            self.udp = None;
            *self.waits_for.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        CURRENT.set(Some(self.waits_for.clone()));
        Poll::Ready(Ok(()))
    }
}

impl fmt::Debug for Poller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Poller").finish_non_exhaustive()
    }
}
