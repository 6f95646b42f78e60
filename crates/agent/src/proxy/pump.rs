//! Raw bytes both ways: half-close, reset and backpressure pass through.

use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::TcpStream;

use super::baseline::{Upstream, reset_on_close};

/// A copy begins with this much memory, bytes, and gives it back whenever it has to wait.
const SMALL: usize = 16 * 1024;
/// A copy whose reads fill the buffer grows to this much: fewer system calls for bulk.
const LARGE: usize = 128 * 1024;

/// Copies between `client` and `upstream` until both said they are done, or one fails; then the other is reset.
/// `sent` and `received` are bytes already read from the client and from upstream.
pub(super) async fn tunnel<S: AsyncRead + AsyncWrite + Unpin>(
    mut client: TcpStream,
    mut upstream: Upstream<S>,
    sent: BytesMut,
    received: BytesMut,
) {
    let (mut up, mut down) = (Pump::new(sent), Pump::new(received));
    let both = std::future::poll_fn(|cx| {
        let a = up.poll(cx, &mut client, &mut upstream)?;
        let b = down.poll(cx, &mut upstream, &mut client)?;
        if a.is_ready() && b.is_ready() { Poll::Ready(Ok::<_, io::Error>(())) } else { Poll::Pending }
    });
    if let Err(error) = both.await {
        tracing::debug!(%error, "a copied connection was reset");
        reset_on_close(&client);
        upstream.reset();
    }
}

/// One direction.
struct Pump {
    buffer: BytesMut,
    size: usize,
    ended: bool,
    flushed: bool,
    closed: bool,
}

impl Pump {
    fn new(buffer: BytesMut) -> Self {
        Self { buffer, size: SMALL, ended: false, flushed: true, closed: false }
    }

    fn poll<R, W>(&mut self, cx: &mut Context<'_>, from: &mut R, to: &mut W) -> Poll<io::Result<()>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        loop {
            if self.closed {
                return Poll::Ready(Ok(()));
            }
            while !self.buffer.is_empty() {
                let wrote = ready!(Pin::new(&mut *to).poll_write(cx, &self.buffer))?;
                if wrote == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                self.buffer.advance(wrote);
                self.flushed = false;
            }
            if self.ended {
                ready!(Pin::new(&mut *to).poll_shutdown(cx))?;
                self.closed = true;
                continue;
            }
            self.buffer.reserve(self.size);
            let read = poll_read(cx, from, &mut self.buffer);
            match read {
                Poll::Ready(Ok(0)) => self.ended = true,
                Poll::Ready(Ok(read)) if read >= self.size => self.size = LARGE,
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    self.buffer = BytesMut::new();
                    if !self.flushed {
                        ready!(Pin::new(&mut *to).poll_flush(cx))?;
                        self.flushed = true;
                    }
                    return Poll::Pending;
                }
            }
        }
    }
}

/// Reads into the spare capacity of `buffer`.
fn poll_read<R: AsyncRead + Unpin>(
    cx: &mut Context<'_>,
    from: &mut R,
    buffer: &mut BytesMut,
) -> Poll<io::Result<usize>> {
    // The future keeps no state between polls: one that is dropped while pending has read nothing.
    pin!(from.read_buf(buffer)).poll(cx)
}
