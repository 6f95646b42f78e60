//! One request and its answer over one upstream connection: both directions at once, because an answer may come
//! before the request's body is through (413, 100 Continue, echoes), and a caller may leave before the answer.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

use bytes::{Buf, BytesMut};
use forkd_core::http1::{self, Body, Framing, HeadEnd, Request};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};

use super::{Http1, Lane, READ, ends_connection};
use crate::proxy::Deliver;
use crate::proxy::baseline::Upstream;

/// What one read of a body takes.
const BODY_READ: usize = 64 * 1024;
/// How much of the caller's next requests is read while one is answered: enough to see that it left.
const READ_AHEAD: usize = 16 * 1024;

/// What becomes of the connections after an exchange.
pub(super) enum Next {
    /// Both can take the next request.
    Kept,
    /// The answer was the last one.
    Close,
    /// Raw bytes both ways.
    Tunnel,
}

/// Why an exchange did not come to its end.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("the caller left: {0}")]
    Caller(io::Error),
    #[error("reset upstream: {error}")]
    Upstream {
        error: io::Error,
        /// The caller has seen a part of the answer.
        answered: bool,
    },
    #[error("upstream ended before its answer did")]
    Ended { answered: bool },
    #[error("the request's body: {0}")]
    Body(#[from] http1::BodyError),
}

impl<D: Deliver> Http1<D> {
    /// Sends `head` and the body behind it, passes the answer on, with `line` added to its head.
    pub(super) async fn exchange(
        &mut self,
        mut lane: Lane<D::Stream>,
        head: &[u8],
        request: &Request,
        line: Option<String>,
    ) -> (Result<Next, Broken>, Lane<D::Stream>) {
        lane.used = true;
        let baseline = matches!(lane.io, Upstream::Baseline(_));
        let (caller_read, caller_write) = self.client.split();
        let (upstream_read, upstream_write) = tokio::io::split(&mut lane.io);
        let progress = Progress::default();
        let up = send(caller_read, upstream_write, &mut self.sent, head, request, baseline, &progress);
        let answer = Answer { request, line, baseline, progress: &progress };
        let down = answer.pass(upstream_read, caller_write, &mut lane.received);
        let result = both(up, down, request, &progress).await;
        (result, lane)
    }
}

/// What the two directions tell each other.
#[derive(Default)]
struct Progress {
    /// The whole request is with upstream.
    sent: Flag,
    /// Nobody can tell where the request ends: its bytes are passed on without end.
    raw: Flag,
    /// The caller has seen a part of the final answer.
    answered: Flag,
    /// The answer was malformed: it ends with its connection.
    malformed: Flag,
}

/// A `Cell<bool>` that a task may take to another thread.
#[derive(Default)]
struct Flag(AtomicBool);

impl Flag {
    fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn set(&self, value: bool) {
        self.0.store(value, Ordering::Relaxed);
    }
}

async fn both(
    up: impl Future<Output = Result<(), Broken>>,
    down: impl Future<Output = Result<(Framing, bool), Broken>>,
    request: &Request,
    progress: &Progress,
) -> Result<Next, Broken> {
    let (mut up, mut down) = (pin!(up), pin!(down));
    let mut sending = true;
    let (framing, keep_alive) = loop {
        tokio::select! {
            biased;
            answer = &mut down => break answer?,
            sent = &mut up, if sending => match sent {
                // Upstream takes no more of the body: it may have answered already (RFC 9112 §9.3).
                Ok(()) | Err(Broken::Upstream { .. }) => sending = false,
                Err(broken) => return Err(broken),
            },
        }
    };
    if framing == Framing::Tunnel || progress.raw.get() {
        return Ok(Next::Tunnel);
    }
    if !keep_alive || !request.keep_alive || ends_connection(framing) || (!sending && !progress.sent.get()) {
        return Ok(Next::Close);
    }
    // The answer came before the end of the request: upstream still reads, so the rest is owed to it.
    std::future::poll_fn(|cx| {
        if progress.sent.get() {
            return Poll::Ready(Ok(Next::Kept));
        }
        match up.as_mut().poll(cx) {
            Poll::Ready(Ok(()) | Err(Broken::Upstream { .. })) => Poll::Ready(Ok(Next::Close)),
            Poll::Ready(Err(broken)) => Poll::Ready(Err(broken)),
            Poll::Pending if progress.sent.get() => Poll::Ready(Ok(Next::Kept)),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// Caller → upstream: the head, the body, and then the caller's end, should it come before the answer.
async fn send<W: AsyncWrite + Unpin>(
    mut from: ReadHalf<'_>,
    mut to: W,
    buffer: &mut BytesMut,
    head: &[u8],
    request: &Request,
    baseline: bool,
    progress: &Progress,
) -> Result<(), Broken> {
    let upstream = |error| Broken::Upstream { error, answered: progress.answered.get() };
    let mut body = Body::new(request.framing);
    let mut first = Some(head);
    loop {
        let part = if progress.raw.get() {
            buffer.len()
        } else {
            match body.advance(buffer) {
                Ok(part) => part,
                // The application may know better where it ends; a laptop is not asked.
                Err(_) if baseline => {
                    progress.raw.set(true);
                    buffer.len()
                }
                Err(error) => return Err(error.into()),
            }
        };
        match first.take() {
            // Head and first part of the body in one piece: one packet, not two.
            Some(head) if part > 0 && part <= READ => {
                to.write_all(&[head, &buffer[..part]].concat()).await.map_err(upstream)?;
                buffer.advance(part);
            }
            Some(head) => {
                to.write_all(head).await.map_err(upstream)?;
                write(&mut to, buffer, part).await.map_err(upstream)?;
            }
            None => write(&mut to, buffer, part).await.map_err(upstream)?,
        }
        if body.is_done() && !progress.raw.get() {
            break;
        }
        to.flush().await.map_err(upstream)?;
        buffer.reserve(BODY_READ);
        if from.read_buf(buffer).await.map_err(Broken::Caller)? == 0 {
            // Half a body: upstream sees the end where the caller put it.
            to.shutdown().await.map_err(upstream)?;
            return std::future::pending().await;
        }
    }
    to.flush().await.map_err(upstream)?;
    progress.sent.set(true);
    while buffer.len() < READ_AHEAD {
        from.readable().await.map_err(Broken::Caller)?;
        buffer.reserve(READ_AHEAD);
        match from.try_read_buf(buffer) {
            Ok(0) => {
                to.shutdown().await.map_err(upstream)?;
                break;
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(Broken::Caller(error)),
        }
    }
    std::future::pending().await
}

/// Writes the first `part` bytes of `buffer` and takes them off; what is left after a cancellation is what is not
/// written.
async fn write<W: AsyncWrite + Unpin>(to: &mut W, buffer: &mut BytesMut, mut part: usize) -> io::Result<()> {
    while part > 0 {
        let wrote = to.write(&buffer[..part]).await?;
        if wrote == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        buffer.advance(wrote);
        part -= wrote;
    }
    Ok(())
}

/// Upstream → caller.
struct Answer<'a> {
    request: &'a Request,
    line: Option<String>,
    baseline: bool,
    progress: &'a Progress,
}

impl Answer<'_> {
    /// Passes interim answers and the answer proper; gives its framing and whether upstream stays open.
    async fn pass<R: AsyncRead + Unpin>(
        self,
        mut from: R,
        mut to: WriteHalf<'_>,
        buffer: &mut BytesMut,
    ) -> Result<(Framing, bool), Broken> {
        loop {
            let head = self.head(&mut from, buffer).await?;
            let parsed =
                head.and_then(|len| http1::response(&buffer[..len], self.request.method).ok().zip(Some(len)));
            let Some((response, len)) = parsed else {
                // No HTTP that we understand. The caller may; and for a laptop's answer, that is the last one.
                self.progress.answered.set(true);
                if self.baseline {
                    return Ok((Framing::Tunnel, false));
                }
                self.body(&mut from, &mut to, buffer, Body::new(Framing::UntilClose)).await?;
                return Ok((Framing::UntilClose, false));
            };
            if response.is_interim() {
                to.write_all(&buffer[..len]).await.map_err(Broken::Caller)?;
                buffer.advance(len);
                continue;
            }
            self.progress.answered.set(true);
            if let Some(line) = &self.line {
                let head = buffer.split_to(len);
                let mut changed = BytesMut::from(&http1::with_lines(&head, line)[..]);
                if response.framing == Framing::Tunnel || buffer.len() > BODY_READ {
                    to.write_all(&changed).await.map_err(Broken::Caller)?;
                } else {
                    // Head and what is there of the body in one piece.
                    let mut body = Body::new(response.framing);
                    let part = self.advance(&mut body, buffer)?;
                    changed.extend_from_slice(&buffer[..part]);
                    buffer.advance(part);
                    to.write_all(&changed).await.map_err(Broken::Caller)?;
                    self.body(&mut from, &mut to, buffer, body).await?;
                }
            } else if response.framing == Framing::Tunnel {
                to.write_all(&buffer[..len]).await.map_err(Broken::Caller)?;
                buffer.advance(len);
            } else {
                let mut body = Body::new(response.framing);
                let part = len + self.advance(&mut body, &buffer[len..])?;
                to.write_all(&buffer[..part]).await.map_err(Broken::Caller)?;
                buffer.advance(part);
                self.body(&mut from, &mut to, buffer, body).await?;
            }
            return Ok((response.framing, response.keep_alive && !self.progress.malformed.get()));
        }
    }

    /// Waits for a whole head; `None` if it is too long to be one.
    async fn head<R: AsyncRead + Unpin>(
        &self,
        from: &mut R,
        buffer: &mut BytesMut,
    ) -> Result<Option<usize>, Broken> {
        let mut end = HeadEnd::default();
        loop {
            match end.find(buffer) {
                Ok(Some(len)) => return Ok(Some(len)),
                Ok(None) => {}
                Err(_) => return Ok(None),
            }
            buffer.reserve(READ);
            match from.read_buf(buffer).await {
                // What came instead of a head is the caller's to see.
                Ok(0) if !buffer.is_empty() => return Ok(None),
                Ok(0) => return Err(Broken::Ended { answered: self.progress.answered.get() }),
                Ok(_) => {}
                Err(error) => return Err(self.upstream(error)),
            }
        }
    }

    async fn body<R: AsyncRead + Unpin>(
        &self,
        from: &mut R,
        to: &mut WriteHalf<'_>,
        buffer: &mut BytesMut,
        mut body: Body,
    ) -> Result<(), Broken> {
        loop {
            let part = self.advance(&mut body, buffer)?;
            write(to, buffer, part).await.map_err(Broken::Caller)?;
            if body.is_done() {
                return Ok(());
            }
            buffer.reserve(BODY_READ);
            match from.read_buf(buffer).await {
                Ok(0) if body.may_end_here() => return Ok(()),
                Ok(0) => return Err(Broken::Ended { answered: true }),
                Ok(_) => {}
                Err(error) => return Err(self.upstream(error)),
            }
        }
    }

    /// A malformed answer is passed on as it is, until its connection ends.
    fn advance(&self, body: &mut Body, bytes: &[u8]) -> Result<usize, Broken> {
        Ok(body.advance(bytes).unwrap_or_else(|error| {
            tracing::debug!(%error, "an answer's body");
            self.progress.malformed.set(true);
            *body = Body::new(Framing::UntilClose);
            bytes.len()
        }))
    }

    fn upstream(&self, error: io::Error) -> Broken {
        Broken::Upstream { error, answered: self.progress.answered.get() }
    }
}
