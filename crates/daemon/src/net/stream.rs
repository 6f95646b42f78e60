//! What a flow is joined to: one stream with two halves, and who opens it.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use bytes::Bytes;
use forkd_wire::tunnel::{Outcome, Reset};
use futures::future::LocalBoxFuture;
use quinn::VarInt;

/// Opens streams into the cluster; implemented by the session over QUIC.
pub trait Dialer {
    /// Connects to `dst` in the cluster. The SYN of the flow stays unanswered until this is done, so it may take as
    /// long as the cluster takes; the future is dropped when nobody waits any more.
    fn dial(&self, dst: SocketAddr) -> LocalBoxFuture<'_, Result<Stream, Refused>>;

    /// Asks the cluster's own DNS: one message in, one out, neither with a length prefix.
    ///
    /// # Errors
    /// Words for the log; the application gets SERVFAIL.
    fn dns(&self, query: Bytes) -> LocalBoxFuture<'_, anyhow::Result<Bytes>>;
}

/// Why there is no stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{outcome:?}: {reason}")]
pub struct Refused {
    /// What the application shall see; never [`Outcome::Ok`].
    pub outcome: Outcome,
    /// For a person.
    pub reason: String,
}

/// An open stream.
pub struct Stream {
    /// Laptop → cluster.
    pub send: Box<dyn SendHalf>,
    /// Cluster → laptop.
    pub recv: Box<dyn RecvHalf>,
}

/// How a half ended before its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The other end reset or stopped it, with the code of [`Reset`] as it came.
    Reset(u64),
    /// The connection beneath is gone.
    Lost,
}

/// The half towards the cluster. A `Pending` always leaves the waker of `cx` registered.
pub trait SendHalf {
    /// Takes a beginning of `data` (which is not empty), at least one byte.
    fn poll_write(&mut self, cx: &mut Context<'_>, data: &[u8]) -> Poll<Result<usize, End>>;
    /// Sends FIN (once, however often it is called), ready when the other end has acknowledged everything.
    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>>;
    /// Ready when the other end wants no more.
    fn poll_stopped(&mut self, cx: &mut Context<'_>) -> Poll<End>;
    /// Gives up; what was not delivered yet may be lost.
    fn reset(&mut self, code: Reset);
}

/// The half from the cluster. A `Pending` always leaves the waker of `cx` registered.
pub trait RecvHalf {
    /// The next 1 to `max` bytes; `None` after FIN.
    fn poll_chunk(&mut self, cx: &mut Context<'_>, max: usize) -> Poll<Result<Option<Bytes>, End>>;
    /// Tells the other end to send no more.
    fn stop(&mut self, code: Reset);
}

impl Stream {
    /// A stream of a QUIC connection, after its `Opened`.
    pub fn quic(send: quinn::SendStream, recv: quinn::RecvStream) -> Self {
        Self {
            send: Box::new(QuicSend { stream: send, stopped: None, finished: false }),
            recv: Box::new(recv),
        }
    }
}

type Stopped = Pin<Box<dyn Future<Output = Result<Option<VarInt>, quinn::StoppedError>>>>;

struct QuicSend {
    stream: quinn::SendStream,
    /// Made when first asked for: most flows never need it.
    stopped: Option<Stopped>,
    finished: bool,
}

impl QuicSend {
    /// `Ok` once everything is acknowledged after FIN.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        let stream = &self.stream;
        let stopped = self.stopped.get_or_insert_with(|| Box::pin(stream.stopped()));
        stopped.as_mut().poll(cx).map(|end| match end {
            Ok(None) => Ok(()),
            Ok(Some(code)) => Err(End::Reset(code.into_inner())),
            Err(_) => Err(End::Lost),
        })
    }
}

impl SendHalf for QuicSend {
    fn poll_write(&mut self, cx: &mut Context<'_>, data: &[u8]) -> Poll<Result<usize, End>> {
        Pin::new(&mut self.stream).poll_write(cx, data).map_err(|error| match error {
            quinn::WriteError::Stopped(code) => End::Reset(code.into_inner()),
            _ => End::Lost,
        })
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        if !self.finished {
            self.finished = true;
            // `ClosedStream` means that the other end stopped it: `poll_end` says with which code.
            let _closed = self.stream.finish();
        }
        self.poll_end(cx)
    }

    fn poll_stopped(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        self.poll_end(cx).map(|end| end.err().unwrap_or(End::Lost))
    }

    fn reset(&mut self, code: Reset) {
        self.finished = true;
        // `ClosedStream`: it has ended already, there is nothing left to reset.
        let _closed = self.stream.reset(VarInt::from_u32(code as u32));
    }
}

impl RecvHalf for quinn::RecvStream {
    fn poll_chunk(&mut self, cx: &mut Context<'_>, max: usize) -> Poll<Result<Option<Bytes>, End>> {
        // Cancel-safe: the future holds nothing but a reference to the stream.
        pin!(self.read_chunk(max, true)).poll(cx).map(|read| match read {
            Ok(chunk) => Ok(chunk.map(|chunk| chunk.bytes)),
            Err(quinn::ReadError::Reset(code)) => Err(End::Reset(code.into_inner())),
            Err(_) => Err(End::Lost),
        })
    }

    fn stop(&mut self, code: Reset) {
        // `ClosedStream`: it has ended already, there is nothing left to stop.
        let _closed = quinn::RecvStream::stop(self, VarInt::from_u32(code as u32));
    }
}
