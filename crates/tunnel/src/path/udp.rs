//! One UDP socket with the kernel's segmentation offloads, on tokio.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::task::{Context, Poll, ready};

use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use tokio::io::Interest;
use tokio::net::UdpSocket;

/// Asked of the kernel for its own buffers; it gives what `net.core.rmem_max` allows. A burst of one round trip at
/// 1 Gbit/s and 20 ms is 2.5 MB.
const SOCKET_BUFFER: usize = 4 << 20;
/// A GSO send of more than one IP packet's worth is refused with EMSGSIZE, which quinn-udp takes for an MTU probe
/// and drops without a word.
const MAX_BATCH: usize = 65_000;

/// See the module.
#[derive(Debug)]
pub(crate) struct Udp {
    io: UdpSocket,
    state: UdpSocketState,
    local: SocketAddr,
}

impl Udp {
    pub(crate) fn new(socket: std::net::UdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        // The kernel's defaults do as well, only slower.
        if let Err(error) = state
            .set_send_buffer_size((&socket).into(), SOCKET_BUFFER)
            .and_then(|()| state.set_recv_buffer_size((&socket).into(), SOCKET_BUFFER))
        {
            tracing::debug!(%error, "cannot enlarge UDP buffers");
        }
        let local = socket.local_addr()?;
        Ok(Self { io: UdpSocket::from_std(socket)?, state, local })
    }

    pub(crate) fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Sends `bytes`, datagrams of `segment` bytes each but the last. Returns how many bytes were taken: less than
    /// all when the socket is full in between.
    ///
    /// # Errors
    /// `WouldBlock` if nothing was taken. Other errors of the network are logged by quinn-udp and count as sent.
    pub(crate) fn try_send(&self, to: SocketAddr, bytes: &[u8], segment: usize) -> io::Result<usize> {
        let destination = match (self.local, to.ip()) {
            (SocketAddr::V6(_), IpAddr::V4(ip)) => SocketAddr::new(ip.to_ipv6_mapped().into(), to.port()),
            _ => to,
        };
        let segment = segment.max(1);
        let mut taken = 0;
        while taken < bytes.len() {
            let segments = self.max_segments().min(MAX_BATCH / segment).max(1);
            let batch = &bytes[taken..(taken + segments * segment).min(bytes.len())];
            let transmit = Transmit {
                destination,
                ecn: None,
                contents: batch,
                segment_size: (batch.len() > segment).then_some(segment),
                src_ip: None,
            };
            let sent = self.io.try_io(Interest::WRITABLE, || self.state.send((&self.io).into(), &transmit));
            match sent {
                Ok(()) => taken += batch.len(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && taken > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(taken)
    }

    pub(crate) async fn writable(&self) -> io::Result<()> {
        self.io.writable().await
    }

    /// Receives batches; source addresses come without IPv4 mapping.
    pub(crate) fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.io.poll_recv_ready(cx))?;
            let received =
                self.io.try_io(Interest::READABLE, || self.state.recv((&self.io).into(), bufs, metas));
            match received {
                Ok(count) => {
                    for meta in &mut metas[..count] {
                        meta.addr = canonical(meta.addr);
                        meta.stride = meta.stride.max(1);
                    }
                    return Poll::Ready(Ok(count));
                }
                // Not ready after all, or an ICMP error of some earlier datagram: neither says anything about the next.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock
                            | io::ErrorKind::ConnectionReset
                            | io::ErrorKind::ConnectionRefused
                    ) => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Datagrams per send.
    pub(crate) fn max_segments(&self) -> usize {
        self.state.max_gso_segments().max(1)
    }

    /// Datagrams per receive buffer.
    pub(crate) fn gro_segments(&self) -> usize {
        self.state.gro_segments()
    }

    pub(crate) fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }
}

/// IPv4 as IPv4, though a dual-stack socket shows it as mapped IPv6.
pub(crate) fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}
