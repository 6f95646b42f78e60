//! HTTP/2 on one caller's connection: each stream goes where its key says.
//!
//! The agent is the server of the caller and a client of the application and of laptops, with one upstream connection
//! to each of them. Windows pass backpressure from end to end, stream by stream; trailers and resets pass through.

mod lane;
mod stream;

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::baseline::Baseline;
use super::{Connection, Deliver, drained};
use lane::Lanes;

/// Bytes that one stream may hold in the agent, each way, before its sender has to wait.
const STREAM_WINDOW: u32 = 256 * 1024;
/// The same towards a laptop, which is far away: 1 MiB is 400 Mbit/s at 20 ms.
const LAPTOP_WINDOW: u32 = 1024 * 1024;
/// Streams of one caller at a time; more wait with the caller. Servers of gRPC often have no limit, and callers that
/// hold hundreds of streams open must not come to a halt.
const STREAMS: u32 = 1000;
/// Streams opened before the other end said how many it takes: the least that RFC 9113 §6.5.2 recommends.
const STREAMS_AT_FIRST: usize = 100;
/// Bytes that all streams of a connection may hold. So large that the windows of the streams are reached first: a laptop
/// that stops reading (a breakpoint) must not hold up what others send over the same connection.
const CONNECTION_WINDOW: u32 = 128 * 1024 * 1024;
/// The longest list of headers, bytes as RFC 9113 §6.5.2 counts them.
const MAX_HEADERS: u32 = forkd_core::http1::MAX_HEAD as u32;

/// Serves a connection that begins with HTTP/2's preface. `sent` is what was read of it.
pub(super) async fn serve<D: Deliver>(
    mut connection: Connection<D>,
    client: TcpStream,
    sent: BytesMut,
    baseline: Option<Baseline>,
) {
    let io = Prefixed { prefix: sent, io: client };
    let handshake = h2::server::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(MAX_HEADERS)
        .handshake::<_, bytes::Bytes>(io);
    let mut server = match handshake.await {
        Ok(server) => server,
        Err(error) => {
            tracing::debug!(%error, caller = %connection.caller, "HTTP/2 handshake");
            return;
        }
    };
    let mut draining = connection.draining.clone();
    connection.draining.mark_unchanged();
    let lanes = Arc::new(Lanes::new(connection, baseline));
    // Dropping it ends what still runs when the caller has gone, which resets the streams upstream.
    let mut streams = JoinSet::new();
    let mut leaving = false;
    loop {
        tokio::select! {
            accepted = server.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    let lanes = lanes.clone();
                    streams.spawn(async move { Box::pin(stream::serve(lanes, request, respond)).await });
                }
                Some(Err(error)) => {
                    tracing::debug!(%error, "a caller's HTTP/2 connection");
                    break;
                }
                None => break,
            },
            Some(ended) = streams.join_next() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "a stream's task failed");
                }
            }
            // The application closes (it may be about to stop): callers learn it as they would without us.
            () = lanes.baseline_closed(), if !leaving => {
                leaving = true;
                server.graceful_shutdown();
            }
            () = drained(&mut draining), if !leaving => {
                leaving = true;
                server.graceful_shutdown();
            }
        }
    }
}

/// A socket, and what was read of it before.
struct Prefixed {
    prefix: BytesMut,
    io: TcpStream,
}

impl AsyncRead for Prefixed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() {
            return Pin::new(&mut self.io).poll_read(cx, buf);
        }
        let part = self.prefix.len().min(buf.remaining());
        buf.put_slice(&self.prefix[..part]);
        self.prefix.advance(part);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Prefixed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
