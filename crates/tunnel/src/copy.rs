//! Bytes between a QUIC stream and a TCP connection, so that each end sees what the other did: FIN as FIN, in either
//! order, RST as RST, slow as slow.

use std::io::{self, IoSlice};

use bytes::{Buf, Bytes, BytesMut};
use forkd_wire::tunnel::Reset;
use quinn::{ConnectionError, ReadError, RecvStream, SendStream, VarInt, WriteError};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;

use crate::stream::code;

/// Chunks (of at most one packet each) that are taken off a stream at once, for one vectored write. Writing each by
/// itself costs a third of the throughput.
const CHUNKS: usize = 64;
/// Bounds of the buffer that a TCP connection is read into: small for an idle flow, large for a bulk one.
const BUFFER: std::ops::RangeInclusive<usize> = 4 * 1024..=128 * 1024;

/// A TCP connection, or something around one.
pub trait Connected: AsyncRead + AsyncWrite + Unpin {
    /// Makes that dropping it sends RST, not FIN.
    fn reset_on_drop(&mut self);
}

impl Connected for TcpStream {
    fn reset_on_drop(&mut self) {
        // Fails on a socket that is gone already: its peer has seen its end.
        let _ = self.set_zero_linger();
    }
}

/// What a copy did; enough for one line of an access log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copied {
    /// Bytes taken off the TCP connection and given to the stream.
    pub to_stream: u64,
    /// Bytes taken off the stream and written to the TCP connection.
    pub to_tcp: u64,
    /// How it ended.
    pub end: End,
}

/// How a copy ended. The other side has been told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// FIN both ways.
    Finished,
    /// The TCP connection was reset.
    TcpReset,
    /// The TCP connection failed otherwise.
    TcpFailed(io::ErrorKind),
    /// The peer reset the stream with this code ([`Reset`]).
    StreamReset(VarInt),
    /// The QUIC connection is gone.
    ConnectionLost(ConnectionError),
}

impl End {
    /// A word for logs and metrics.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::TcpReset => "tcp-reset",
            Self::TcpFailed(_) => "tcp-failed",
            Self::StreamReset(_) => "stream-reset",
            Self::ConnectionLost(_) => "connection-lost",
        }
    }
}

/// Copies both ways until both have ended, or either failed. Dropping the future resets both sides.
pub async fn copy<T: Connected>(tcp: T, send: SendStream, recv: RecvStream) -> Copied {
    let mut copy = Copy { tcp: Some(tokio::io::split(tcp)), send, recv, clean: false };
    let (mut to_stream, mut to_tcp) = (0, 0);
    let end = copy.run(&mut to_stream, &mut to_tcp).await;
    copy.finish(&end);
    Copied { to_stream, to_tcp, end }
}

struct Copy<T: Connected> {
    tcp: Option<(ReadHalf<T>, WriteHalf<T>)>,
    send: SendStream,
    recv: RecvStream,
    clean: bool,
}

impl<T: Connected> Copy<T> {
    async fn run(&mut self, to_stream: &mut u64, to_tcp: &mut u64) -> End {
        let Some((read, write)) = &mut self.tcp else { return End::Finished };
        let stopped = self.send.stopped();
        let up = tcp_to_stream(read, &mut self.send, to_stream);
        let down = stream_to_tcp(&mut self.recv, write, to_tcp);
        tokio::pin!(stopped, up, down);
        let (mut up_done, mut down_done) = (false, false);
        while !(up_done && down_done) {
            let ended = tokio::select! {
                ended = &mut up, if !up_done => { up_done = true; ended }
                ended = &mut down, if !down_done => { down_done = true; ended }
                // The peer can stop a stream that is idle: nothing but this would tell.
                Ok(Some(code)) = &mut stopped, if !up_done => Err(End::StreamReset(code)),
            };
            if let Err(end) = ended {
                return end;
            }
        }
        End::Finished
    }

    fn finish(&mut self, end: &End) {
        self.clean = *end == End::Finished;
        if !self.clean {
            let reset = match end {
                End::TcpReset | End::TcpFailed(_) => Reset::ConnectionReset,
                _ => Reset::Cancelled,
            };
            self.abort(reset);
        }
    }

    fn abort(&mut self, reset: Reset) {
        // Either fails only if that half is closed already.
        let _ = self.send.reset(code(reset));
        let _ = self.recv.stop(code(reset));
        if let Some((read, write)) = self.tcp.take() {
            read.unsplit(write).reset_on_drop();
        }
    }
}

impl<T: Connected> Drop for Copy<T> {
    fn drop(&mut self) {
        if !self.clean {
            self.abort(Reset::Cancelled);
        }
    }
}

async fn tcp_to_stream<T: Connected>(
    tcp: &mut ReadHalf<T>,
    send: &mut SendStream,
    count: &mut u64,
) -> Result<(), End> {
    let mut bytes = BytesMut::new();
    let mut room = *BUFFER.start();
    loop {
        bytes.reserve(room);
        let read = tcp.read_buf(&mut bytes).await.map_err(tcp_end)?;
        if read == 0 {
            // Fails only if the peer has stopped the stream: `stopped` tells.
            let _ = send.finish();
            return Ok(());
        }
        // Twice what came last, so that a full buffer grows and a trickle shrinks it.
        room = (read * 2).next_power_of_two().clamp(*BUFFER.start(), *BUFFER.end());
        send.write_chunk(bytes.split().freeze()).await.map_err(|error| match error {
            WriteError::Stopped(code) => End::StreamReset(code),
            WriteError::ConnectionLost(error) => End::ConnectionLost(error),
            WriteError::ClosedStream | WriteError::ZeroRttRejected => {
                End::StreamReset(code(Reset::Cancelled))
            }
        })?;
        *count += read as u64;
    }
}

async fn stream_to_tcp<T: Connected>(
    recv: &mut RecvStream,
    tcp: &mut WriteHalf<T>,
    count: &mut u64,
) -> Result<(), End> {
    let mut chunks: [Bytes; CHUNKS] = [const { Bytes::new() }; CHUNKS];
    loop {
        let read = recv.read_chunks(&mut chunks).await.map_err(|error| match error {
            ReadError::Reset(code) => End::StreamReset(code),
            ReadError::ConnectionLost(error) => End::ConnectionLost(error),
            _ => End::StreamReset(code(Reset::Cancelled)),
        })?;
        let Some(read) = read else {
            // The other end may have closed for good: then there is nobody to say FIN to, and reading finds it out.
            return match tcp.shutdown().await {
                Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(tcp_end(error)),
                _ => Ok(()),
            };
        };
        write_all(tcp, &mut chunks[..read], count).await.map_err(tcp_end)?;
    }
}

/// Writes all of `chunks`, as many at once as the connection takes.
async fn write_all<W: AsyncWrite + Unpin>(
    tcp: &mut W,
    mut chunks: &mut [Bytes],
    count: &mut u64,
) -> io::Result<()> {
    while !chunks.is_empty() {
        let mut slices = [IoSlice::new(&[]); CHUNKS];
        for (slice, chunk) in slices.iter_mut().zip(chunks.iter()) {
            *slice = IoSlice::new(chunk);
        }
        let mut written = tcp.write_vectored(&slices[..chunks.len()]).await?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        *count += written as u64;
        while let Some(first) = chunks.first_mut() {
            if written < first.len() {
                first.advance(written);
                break;
            }
            written -= first.len();
            // Lets go of the packet's memory.
            *first = Bytes::new();
            chunks = &mut chunks[1..];
        }
    }
    tcp.flush().await
}

fn tcp_end(error: io::Error) -> End {
    match error.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionAborted => {
            End::TcpReset
        }
        kind => End::TcpFailed(kind),
    }
}
