//! The socket beneath the relay's own QUIC endpoint: it is fed by the forwarder, which has told forwarded packets apart.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::{Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use futures::task::AtomicWaker;
use quinn::{AsyncUdpSocket, UdpPoller};
use quinn_udp::{RecvMeta, Transmit};

use super::table::Leg;
use super::{Dropped, Shared};
use crate::path::pipe::Push;

/// Control traffic is a trickle; this is a flood's worth.
const INBOX: usize = 1 << 20;

/// QUIC packets for the relay itself, with where they came from.
#[derive(Default)]
pub(super) struct Inbox {
    waiting: Mutex<Waiting>,
    receiver: AtomicWaker,
}

#[derive(Default)]
struct Waiting {
    packets: VecDeque<(SocketAddr, Box<[u8]>)>,
    bytes: usize,
}

impl Inbox {
    /// False when it is full.
    pub(super) fn push(&self, from: SocketAddr, packet: &[u8]) -> bool {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.bytes + packet.len() > INBOX {
            return false;
        }
        waiting.bytes += packet.len();
        waiting.packets.push_back((from, packet.into()));
        drop(waiting);
        self.receiver.wake();
        true
    }

    fn take(&self, bufs: &mut [IoSliceMut<'_>], metas: &mut [RecvMeta]) -> usize {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let mut count = 0;
        while count < bufs.len().min(metas.len()) {
            let Some((addr, packet)) = waiting.packets.pop_front() else { break };
            waiting.bytes -= packet.len();
            let len = packet.len();
            // Longer than any packet of ours: it would fail to decrypt.
            let Some(room) = bufs[count].get_mut(..len) else { continue };
            room.copy_from_slice(&packet);
            metas[count] = RecvMeta { addr, len, stride: len, ..Default::default() };
            count += 1;
        }
        count
    }
}

/// See the module.
pub(super) struct ControlSocket(pub(super) Arc<Shared>);

impl fmt::Debug for ControlSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ControlSocket")
    }
}

impl AsyncUdpSocket for ControlSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Poller { socket: self, writable: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let segment = transmit.segment_size.unwrap_or(transmit.contents.len());
        match super::leg_of(transmit.destination) {
            Leg::Udp(addr) => self.0.udp.try_send(addr, transmit.contents, segment).map(drop),
            Leg::Pipe(pipe) => {
                let pushed = self
                    .0
                    .pipe(pipe)
                    .map_or(Push::Closed, |queue| queue.push(None, transmit.contents, segment));
                match pushed {
                    Push::Taken => {}
                    Push::Full => self.0.count(Dropped::QueueFull, 1),
                    Push::Closed => self.0.count(Dropped::NoLeg, 1),
                }
                Ok(())
            }
        }
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.0.inbox.receiver.register(cx.waker());
        match self.0.inbox.take(bufs, metas) {
            0 => Poll::Pending,
            count => Poll::Ready(Ok(count)),
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        // Both families come in; QUIC asks only which one it may call, and the relay calls nobody.
        Ok((Ipv6Addr::UNSPECIFIED, self.0.udp.local_addr().port()).into())
    }

    fn may_fragment(&self) -> bool {
        self.0.udp.may_fragment()
    }
}

struct Poller {
    socket: Arc<ControlSocket>,
    writable: Option<Pin<Box<dyn Future<Output = io::Result<()>> + Send + Sync>>>,
}

impl UdpPoller for Poller {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let socket = self.socket.clone();
        let writable =
            self.writable.get_or_insert_with(|| Box::pin(async move { socket.0.udp.writable().await }));
        let done = ready!(writable.as_mut().poll(cx));
        self.writable = None;
        Poll::Ready(done)
    }
}

impl fmt::Debug for Poller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Poller")
    }
}
