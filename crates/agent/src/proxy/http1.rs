//! HTTP/1 on one caller's connection: each request goes where its key says, one after the other.
//!
//! Heads and bodies are passed on as the bytes they were; only a keyed request gets the carriers it lacks, and only
//! answers inside a fork get `forkd-served-by`. Upstream connections are kept for the connection's next requests.

mod exchange;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use forkd_core::http1::{self, Body, Framing, HeadEnd, Method, Request};
use forkd_wire::control::{OnUnavailable, Route};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::answer::{self, Failure, SERVED_BY};
use super::baseline::{Baseline, Upstream, reset_on_close};
use super::{Connection, Deliver, DeliverError, drained, pump, sniff};
use exchange::{Broken, Next};

/// What one read of heads takes; small bodies come with them.
const READ: usize = 16 * 1024;
/// Laptops whose connections one caller's connection keeps. A caller that mixes more forks dials more often.
const KEPT_LAPTOPS: usize = 8;
/// A caller that still sends when its connection is to be closed is read for this long and this much, so that the
/// answer is not lost to a reset (RFC 9112 §9.6).
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 1024 * 1024;

/// An upstream connection and what was read from it too early.
struct Lane<S> {
    io: Upstream<S>,
    received: BytesMut,
    /// A request went over it.
    used: bool,
}

impl<S> Lane<S> {
    fn new(io: Upstream<S>) -> Self {
        Self { io, received: BytesMut::new(), used: false }
    }
}

/// Where a request goes.
enum Way {
    Baseline,
    Laptop(Arc<Route>),
}

struct Http1<D: Deliver> {
    connection: Connection<D>,
    client: TcpStream,
    /// Bytes of the caller that are not passed on yet.
    sent: BytesMut,
    baseline: Option<Lane<D::Stream>>,
    laptops: Vec<(Arc<Route>, Lane<D::Stream>)>,
    requests: u64,
}

/// Serves a connection whose first line is HTTP/1. `sent` is what was read of it.
pub(super) async fn serve<D: Deliver>(
    connection: Connection<D>,
    client: TcpStream,
    sent: BytesMut,
    baseline: Option<Baseline>,
) {
    let baseline = baseline.map(|baseline| Lane::new(Upstream::Baseline(baseline)));
    let mut http = Http1 { connection, client, sent, baseline, laptops: Vec::new(), requests: 0 };
    let end = loop {
        match http.one().await {
            Ok(()) => http.requests += 1,
            Err(end) => break end,
        }
    };
    Box::pin(http.end(end)).await;
}

/// How a connection ends.
enum End<S> {
    /// Both sides are done.
    Closed,
    /// Our side is done; the caller may still send.
    Close,
    /// Something was reset, and so is the caller.
    Reset,
    /// Raw bytes from here on.
    Tunnel(Lane<S>),
    /// It is not HTTP that we understand: raw bytes to and from the application.
    Opaque,
}

impl<D: Deliver> Http1<D> {
    async fn end(mut self, end: End<D::Stream>) {
        match end {
            End::Closed => {}
            End::Close => linger(self.client).await,
            End::Reset => {
                reset_on_close(&self.client);
                let laptops = self.laptops.into_iter().map(|(_, lane)| lane);
                self.baseline.into_iter().chain(laptops).for_each(|lane| lane.io.reset());
            }
            End::Tunnel(lane) => pump::tunnel(self.client, lane.io, self.sent, lane.received).await,
            End::Opaque => match self.opaque_lane().await {
                Ok(lane) => pump::tunnel(self.client, lane.io, self.sent, lane.received).await,
                Err(_) => reset_on_close(&self.client),
            },
        }
    }

    /// One request and its answer.
    async fn one(&mut self) -> Result<(), End<D::Stream>> {
        let len = self.head().await?;
        let Ok(request) = http1::request(&self.sent[..len]) else {
            tracing::debug!(caller = %self.connection.caller, "ambiguous request: passed to the application");
            return Err(End::Opaque);
        };
        let head = self.sent.split_to(len);
        // Bytes of keyed requests change where a carrier is missing; all others stay.
        let head = match request.carried.key() {
            Some(_) => request.with_carriers(&head),
            None => head.to_vec(),
        };
        match self.way(&request) {
            Way::Baseline => self.ask_baseline(&head, &request).await,
            Way::Laptop(route) => self.ask_laptop(route, &head, &request).await,
        }
    }

    fn way(&self, request: &Request) -> Way {
        if request.probe {
            return Way::Baseline;
        }
        let table = self.connection.table();
        match table.route(self.connection.port(), request.carried.key()) {
            Some(route) => Way::Laptop(route.clone()),
            None => Way::Baseline,
        }
    }

    /// Waits for a whole head at the front of `sent` and gives its length.
    async fn head(&mut self) -> Result<usize, End<D::Stream>> {
        let mut end = HeadEnd::default();
        loop {
            match end.find(&self.sent) {
                Ok(Some(len)) => return Ok(len),
                Ok(None) => {}
                Err(_) => return Err(End::Opaque),
            }
            if self.sent.is_empty() {
                // An idle connection holds no buffer.
                self.sent = BytesMut::new();
            }
            tokio::select! {
                biased;
                ready = self.client.readable() => {
                    ready.map_err(|_| End::Reset)?;
                    self.sent.reserve(READ);
                    match self.client.try_read_buf(&mut self.sent) {
                        Ok(0) if self.sent.is_empty() => return Err(End::Closed),
                        // Half a head and no more: the application may make of it what it likes.
                        Ok(0) => return Err(End::Opaque),
                        Ok(_) => {}
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        Err(_) => return Err(End::Reset),
                    }
                }
                spoke = unasked(&mut self.baseline) => match spoke {
                    // Between requests, and not an answer: the application closes, or says why it will (408).
                    Ok(0) | Err(_) if self.requests > 0 && !self.used_baseline() => self.baseline = None,
                    Ok(0) => return Err(End::Close),
                    Ok(_) => return Err(End::Opaque),
                    Err(_) => return Err(End::Reset),
                },
                () = drained(&mut self.connection.draining), if self.sent.is_empty() => return Err(End::Close),
            }
        }
    }

    fn used_baseline(&self) -> bool {
        self.baseline.as_ref().is_some_and(|lane| lane.used)
    }

    async fn ask_baseline(&mut self, head: &[u8], request: &Request) -> Result<(), End<D::Stream>> {
        let lane = self.baseline_lane().await.map_err(|error| {
            tracing::debug!(%error, to = %self.connection.original, "the application refused");
            End::Reset
        })?;
        let table = self.connection.table();
        let line = request.carried.key().map(|key| {
            let value = answer::by_baseline(table.service(self.connection.port()), key);
            format!("{SERVED_BY}: {value}\r\n")
        });
        match self.exchange(lane, head, request, line).await {
            (Ok(Next::Kept), lane) => {
                self.baseline = Some(lane);
                Ok(())
            }
            (Ok(Next::Close), _) => Err(End::Close),
            (Ok(Next::Tunnel), lane) => Err(End::Tunnel(lane)),
            (Err(Broken::Ended { .. }), _) => Err(End::Close),
            (Err(broken), lane) => {
                tracing::debug!(%broken, "a request to the application broke");
                lane.io.reset();
                Err(End::Reset)
            }
        }
    }

    async fn ask_laptop(
        &mut self,
        route: Arc<Route>,
        head: &[u8],
        request: &Request,
    ) -> Result<(), End<D::Stream>> {
        let lane = match self.laptop_lane(&route).await {
            Ok(lane) => lane,
            Err(error) => {
                let own = request.carried.key().is_some_and(|key| key.as_str() == route.fork);
                let gone = !matches!(error, DeliverError::NotListening(_));
                // Who did not ask for the laptop is not to suffer from its absence.
                if gone && (!own || route.on_unavailable == OnUnavailable::Baseline as i32) {
                    return self.ask_baseline(head, request).await;
                }
                return self.fail(&Failure::deliver(&route, &error), request).await;
            }
        };
        let line = format!("{SERVED_BY}: {}\r\n", answer::by_laptop(&route));
        match self.exchange(lane, head, request, Some(line)).await {
            (Ok(Next::Kept), lane) => {
                if self.laptops.len() == KEPT_LAPTOPS {
                    self.laptops.remove(0);
                }
                self.laptops.push((route, lane));
                Ok(())
            }
            (Ok(Next::Close), _) => Err(End::Close),
            (Ok(Next::Tunnel), lane) => Err(End::Tunnel(lane)),
            (Err(Broken::Ended { answered: false }), _) => {
                let failure = Failure::broken(&route, "it ended before an answer");
                self.fail_and_close(&failure, request).await
            }
            (Err(Broken::Upstream { error, answered: false }), _) => {
                self.fail_and_close(&Failure::broken(&route, &error.to_string()), request).await
            }
            (Err(Broken::Ended { answered: true }), _) => Err(End::Close),
            (Err(broken), lane) => {
                tracing::debug!(%broken, "a request to a laptop broke");
                lane.io.reset();
                Err(End::Reset)
            }
        }
    }

    /// Answers in the agent's own name.
    async fn fail(&mut self, failure: &Failure, request: &Request) -> Result<(), End<D::Stream>> {
        // The connection is kept if the whole body is here already, so that nothing of it can be read as a request.
        let mut body = Body::new(request.framing);
        let whole = body.advance(&self.sent).ok().filter(|_| body.is_done() && request.keep_alive);
        let Some(body) = whole else { return self.fail_and_close(failure, request).await };
        self.sent.advance(body);
        let response = failure.http1(request.accepts_json, request.method == Method::Head, true);
        self.client.write_all(&response).await.map_err(|_| End::Reset)
    }

    async fn fail_and_close(&mut self, failure: &Failure, request: &Request) -> Result<(), End<D::Stream>> {
        let response = failure.http1(request.accepts_json, request.method == Method::Head, false);
        self.client.write_all(&response).await.map_err(|_| End::Reset)?;
        Err(End::Close)
    }

    /// The connection to the application: the kept one while it is open, else a new one.
    async fn baseline_lane(&mut self) -> io::Result<Lane<D::Stream>> {
        if let Some(mut lane) = self.baseline.take()
            && quiet(&mut lane).await
        {
            return Ok(lane);
        }
        let baseline = self.connection.shared.counters.own.dial(self.connection.original).await?;
        Ok(Lane::new(Upstream::Baseline(baseline)))
    }

    /// The same, but what the application said unasked is kept: nobody reads it as an answer any more.
    async fn opaque_lane(&mut self) -> io::Result<Lane<D::Stream>> {
        match self.baseline.take_if(|lane| !lane.received.is_empty()) {
            Some(lane) => Ok(lane),
            None => self.baseline_lane().await,
        }
    }

    /// The connection to a laptop. Those to targets that are gone are closed on the way.
    async fn laptop_lane(&mut self, route: &Arc<Route>) -> Result<Lane<D::Stream>, DeliverError> {
        let table = self.connection.table();
        let port = self.connection.port();
        self.laptops.retain(|(kept, _)| table.still_holds(port, kept));
        let kept = self.laptops.iter().position(|(kept, _)| {
            kept.target == route.target && kept.laptop == route.laptop && kept.owner == route.owner
        });
        if let Some(at) = kept {
            let (_, mut lane) = self.laptops.remove(at);
            if quiet(&mut lane).await {
                return Ok(lane);
            }
        }
        let stream = sniff::deliver(&self.connection, route).await?;
        Ok(Lane::new(Upstream::Laptop(stream)))
    }
}

/// True if this kept connection is open and has said nothing that nobody asked for.
async fn quiet<S: tokio::io::AsyncRead + Unpin>(lane: &mut Lane<S>) -> bool {
    if !lane.received.is_empty() {
        return false;
    }
    let mut byte = [0; 1];
    let mut probe = tokio::io::ReadBuf::new(&mut byte);
    std::future::poll_fn(|cx| {
        let read = std::pin::Pin::new(&mut lane.io);
        std::task::Poll::Ready(tokio::io::AsyncRead::poll_read(read, cx, &mut probe).is_pending())
    })
    .await
}

/// Done when the application says something between two requests: how many bytes, 0 for its end.
async fn unasked<S>(lane: &mut Option<Lane<S>>) -> io::Result<usize> {
    let Some(Lane { io: Upstream::Baseline(baseline), received, .. }) = lane else {
        return std::future::pending().await;
    };
    loop {
        baseline.io.readable().await?;
        received.reserve(1024);
        match baseline.io.try_read_buf(received) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            read => return read,
        }
    }
}

/// Ends our half, then reads the caller's rest for a while.
async fn linger(mut client: TcpStream) {
    let rest = async {
        client.shutdown().await?;
        let (mut scratch, mut read) = (vec![0; 4096], 0);
        while read < LINGER_BYTES {
            match client.read(&mut scratch).await? {
                0 => break,
                n => read += n,
            }
        }
        Ok::<_, io::Error>(())
    };
    // Neither outcome changes anything: the connection is closed next.
    match tokio::time::timeout(LINGER, rest).await {
        Ok(Ok(())) | Err(_) => {}
        Ok(Err(error)) => tracing::trace!(%error, "linger"),
    }
}

/// True if nothing can follow this framing on the same connection.
fn ends_connection(framing: Framing) -> bool {
    matches!(framing, Framing::UntilClose)
}
