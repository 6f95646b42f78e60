//! Connections to the application in the pod, and what a request's upstream is.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// The local addresses of the agent's own connections to the application. Clones are the same set.
#[derive(Clone, Default)]
pub struct OwnConnections(Arc<Mutex<HashSet<SocketAddr>>>);

impl OwnConnections {
    /// True if the agent holds a connection from this address to the application.
    pub fn contains(&self, local: SocketAddr) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(&local)
    }

    /// Connects to the application. The rules catch only what comes from outside, so this cannot loop.
    pub(super) async fn dial(&self, to: SocketAddr) -> io::Result<Baseline> {
        let io = TcpStream::connect(to).await?;
        io.set_nodelay(true)?;
        let local = io.local_addr()?;
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(local);
        Ok(Baseline { io, early: BytesMut::new(), local, own: self.clone() })
    }
}

/// A connection to the application.
pub(super) struct Baseline {
    pub(super) io: TcpStream,
    /// What it said while it was not yet known what the connection speaks; read before anything else.
    pub(super) early: BytesMut,
    local: SocketAddr,
    own: OwnConnections,
}

impl Drop for Baseline {
    fn drop(&mut self) {
        self.own.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.local);
    }
}

/// Who answers: the application in the pod, or a laptop.
pub(super) enum Upstream<S> {
    Baseline(Baseline),
    Laptop(S),
}

impl<S> Upstream<S> {
    /// Closes with a reset instead of an end.
    pub(super) fn reset(self) {
        if let Self::Baseline(baseline) = &self {
            reset_on_close(&baseline.io);
        }
        // A laptop's stream is reset by being dropped.
    }
}

/// Makes dropping this socket a RST.
pub(super) fn reset_on_close(socket: &TcpStream) {
    if let Err(error) = socket.set_zero_linger() {
        tracing::debug!(%error, "set SO_LINGER");
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Upstream<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Baseline(baseline) if !baseline.early.is_empty() => {
                let part = baseline.early.len().min(buf.remaining());
                buf.put_slice(&baseline.early[..part]);
                baseline.early.advance(part);
                Poll::Ready(Ok(()))
            }
            Self::Baseline(baseline) => Pin::new(&mut baseline.io).poll_read(cx, buf),
            Self::Laptop(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Upstream<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Baseline(baseline) => Pin::new(&mut baseline.io).poll_write(cx, buf),
            Self::Laptop(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Baseline(baseline) => Pin::new(&mut baseline.io).poll_flush(cx),
            Self::Laptop(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Baseline(baseline) => Pin::new(&mut baseline.io).poll_shutdown(cx),
            Self::Laptop(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
