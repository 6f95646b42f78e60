//! How a stream between laptop and agent begins ([`open`], [`accept`]), and messages on any byte stream
//! ([`MessageReader`], [`write_message`]).

use std::io;
use std::marker::PhantomData;
use std::time::Duration;

use bytes::BytesMut;
use forkd_wire::tunnel::{Open, Opened, Outcome, Reset};
use forkd_wire::{DecodeError, MAX_MESSAGE, decode_delimited, encode_delimited};
use prost::Message;
use quinn::{Connection, ConnectionError, ReadError, RecvStream, SendStream, VarInt, WriteError};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// How long an opened stream may take to say what it is for. It takes one packet; only a broken or hostile peer
/// lets it come to this.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// Code of RESET_STREAM and STOP_SENDING as QUIC takes it.
pub fn code(reset: Reset) -> VarInt {
    VarInt::from_u32(reset as u32)
}

/// Why a stream could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The other end said so.
    #[error("{outcome:?}: {reason}")]
    Refused {
        /// Never [`Outcome::Ok`].
        outcome: Outcome,
        /// For a person.
        reason: String,
    },
    /// The other end gave up on the stream without an answer.
    #[error("the peer reset the stream (code {0})")]
    Reset(VarInt),
    /// The answer was no `Opened`.
    #[error("the peer's answer is no message of ours: {0}")]
    Protocol(String),
    /// The connection itself is gone.
    #[error("the connection is lost: {0}")]
    Connection(#[from] ConnectionError),
}

/// Why what a peer opened cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// It did not say what the stream is for in time.
    #[error("nothing was said about what the stream is for within {} s", OPEN_TIMEOUT.as_secs())]
    TimedOut,
    /// It gave up on the stream.
    #[error("the peer gave up on the stream")]
    Abandoned,
    /// The first bytes were no `Open`.
    #[error("the first bytes are no message of ours: {0}")]
    Protocol(String),
    /// The connection itself is gone.
    #[error("the connection is lost: {0}")]
    Connection(#[from] ConnectionError),
}

/// Opens a stream: sends `open`, waits for the answer for as long as the other end takes (a slow dial is a slow
/// connect), and returns the stream ready for raw bytes. Waits too while the peer allows no more streams.
///
/// Dropping the future before it ends resets the stream with [`Reset::Cancelled`], which
/// [`Accepting::cancelled`] sees.
///
/// # Errors
/// [`OpenError`]; after any of them nothing is left of the stream.
pub async fn open(connection: &Connection, open: Open) -> Result<(SendStream, RecvStream), OpenError> {
    let (send, recv) = connection.open_bi().await?;
    let mut pair = Pair::new(send, recv);
    let (send, recv) = pair.both();
    if let Err(error) = send.write_all(&encoded(&open)).await {
        // A peer may refuse before it has read everything: its answer counts then.
        if !matches!(error, WriteError::Stopped(_)) {
            return Err(write_error(error));
        }
    }
    let opened: Opened = read_message(recv).await.map_err(|error| match error {
        ExactError::Read(ReadError::Reset(code)) => OpenError::Reset(code),
        ExactError::Read(ReadError::ConnectionLost(error)) => OpenError::Connection(error),
        ExactError::Read(error) => OpenError::Protocol(error.to_string()),
        ExactError::Ended => OpenError::Protocol("the stream ended first".to_owned()),
        ExactError::Decode(error) => OpenError::Protocol(error.to_string()),
    })?;
    match opened.outcome() {
        Outcome::Ok if opened.outcome == Outcome::Ok as i32 => Ok(pair.keep()),
        // An outcome of a later version: prost reads it as the default, which is Ok; refused it is all the same.
        Outcome::Ok => Err(OpenError::Refused { outcome: Outcome::Unavailable, reason: opened.reason }),
        outcome => Err(OpenError::Refused { outcome, reason: opened.reason }),
    }
}

/// Reads what a peer's stream is for. The answer goes through [`Accepting`].
///
/// # Errors
/// [`AcceptError`]; the stream is reset with [`Reset::Protocol`] where that was the reason, else with
/// [`Reset::Cancelled`].
pub async fn accept(send: SendStream, recv: RecvStream) -> Result<(Open, Accepting), AcceptError> {
    let mut pair = Pair::new(send, recv);
    let read = tokio::time::timeout(OPEN_TIMEOUT, read_message::<Open>(pair.both().1)).await;
    let error = match read {
        Ok(Ok(open)) => return Ok((open, Accepting { pair })),
        Err(_) => AcceptError::TimedOut,
        Ok(Err(ExactError::Read(ReadError::ConnectionLost(error)))) => AcceptError::Connection(error),
        Ok(Err(ExactError::Read(ReadError::Reset(_)))) => AcceptError::Abandoned,
        Ok(Err(ExactError::Read(error))) => AcceptError::Protocol(error.to_string()),
        Ok(Err(ExactError::Ended)) => AcceptError::Protocol("the stream ended first".to_owned()),
        Ok(Err(ExactError::Decode(error))) => AcceptError::Protocol(error.to_string()),
    };
    if matches!(error, AcceptError::Protocol(_) | AcceptError::TimedOut) {
        pair.code = code(Reset::Protocol);
    }
    Err(error)
}

/// A stream whose opener waits for an answer. Dropped without one, it is reset with [`Reset::Cancelled`].
#[derive(Debug)]
pub struct Accepting {
    pair: Pair,
}

impl Accepting {
    /// Says yes. Raw bytes may follow both ways.
    ///
    /// # Errors
    /// [`AcceptError::Abandoned`], [`AcceptError::Connection`] if the opener is no longer there.
    pub async fn ok(mut self) -> Result<(SendStream, RecvStream), AcceptError> {
        let yes = Opened { outcome: Outcome::Ok as i32, reason: String::new() };
        self.pair.both().0.write_all(&encoded(&yes)).await.map_err(accept_write_error)?;
        Ok(self.pair.keep())
    }

    /// Says no, and why. [`Outcome::Ok`] is not a way to say no and becomes [`Outcome::Unavailable`].
    ///
    /// # Errors
    /// [`AcceptError::Abandoned`], [`AcceptError::Connection`] if the opener is no longer there.
    pub async fn refuse(mut self, outcome: Outcome, reason: &str) -> Result<(), AcceptError> {
        let outcome = if outcome == Outcome::Ok { Outcome::Unavailable } else { outcome };
        let no = Opened { outcome: outcome as i32, reason: reason.to_owned() };
        self.pair.both().0.write_all(&encoded(&no)).await.map_err(accept_write_error)?;
        let (mut send, mut recv) = self.pair.keep();
        // Either fails only if the stream is closed already: the peer knows then.
        let _ = send.finish();
        let _ = recv.stop(code(Reset::Cancelled));
        Ok(())
    }

    /// Resolves when the opener no longer wants an answer, or is gone: a dial for it may end.
    pub async fn cancelled(&self) {
        if let Some((send, _)) = &self.pair.streams {
            // Both an answer and an error mean that nobody waits.
            let _ = send.stopped().await;
        }
    }
}

/// Both halves of a stream, reset on drop unless kept: quinn would finish the sending half, as if all were well.
#[derive(Debug)]
struct Pair {
    streams: Option<(SendStream, RecvStream)>,
    code: VarInt,
}

impl Pair {
    fn new(send: SendStream, recv: RecvStream) -> Self {
        Self { streams: Some((send, recv)), code: code(Reset::Cancelled) }
    }

    fn both(&mut self) -> (&mut SendStream, &mut RecvStream) {
        match &mut self.streams {
            Some((send, recv)) => (send, recv),
            None => unreachable!("only keep() takes the streams, and it consumes the pair"),
        }
    }

    fn keep(mut self) -> (SendStream, RecvStream) {
        match self.streams.take() {
            Some(streams) => streams,
            None => unreachable!("only keep() takes the streams, and it consumes the pair"),
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        if let Some((send, recv)) = &mut self.streams {
            // Either fails only if the stream is closed already.
            let _ = send.reset(self.code);
            let _ = recv.stop(self.code);
        }
    }
}

enum ExactError {
    Ended,
    Read(ReadError),
    Decode(DecodeError),
}

/// Reads exactly one message: not one byte beyond it, for raw bytes follow.
async fn read_message<M: Message + Default>(recv: &mut RecvStream) -> Result<M, ExactError> {
    let exact = |error| match error {
        quinn::ReadExactError::FinishedEarly(_) => ExactError::Ended,
        quinn::ReadExactError::ReadError(error) => ExactError::Read(error),
    };
    let mut bytes = BytesMut::new();
    loop {
        if let Some(message) = decode_delimited(&mut bytes).map_err(ExactError::Decode)? {
            return Ok(message);
        }
        let missing = missing(&bytes);
        let from = bytes.len();
        bytes.resize(from + missing, 0);
        recv.read_exact(&mut bytes[from..]).await.map_err(exact)?;
    }
}

/// How many bytes can be read without reading beyond the message: the rest of it once its length is known, else one.
fn missing(bytes: &[u8]) -> usize {
    let mut rest = bytes;
    match prost::encoding::decode_varint(&mut rest) {
        // decode_delimited has refused lengths beyond MAX_MESSAGE.
        Ok(len) => (len as usize).min(MAX_MESSAGE).saturating_sub(rest.len()).max(1),
        Err(_) => 1,
    }
}

fn encoded<M: Message>(message: &M) -> BytesMut {
    let mut bytes = BytesMut::new();
    encode_delimited(message, &mut bytes);
    bytes
}

fn write_error(error: WriteError) -> OpenError {
    match error {
        WriteError::Stopped(code) => OpenError::Reset(code),
        WriteError::ConnectionLost(error) => OpenError::Connection(error),
        other => OpenError::Protocol(other.to_string()),
    }
}

fn accept_write_error(error: WriteError) -> AcceptError {
    match error {
        WriteError::ConnectionLost(error) => AcceptError::Connection(error),
        _ => AcceptError::Abandoned,
    }
}

/// Why no further message comes.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// The stream failed.
    #[error("the stream failed: {0}")]
    Io(#[from] io::Error),
    /// The stream ended in the middle of a message.
    #[error("the stream ended within a message")]
    Truncated,
    /// The bytes are no message.
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

/// Messages of one type off any byte stream; at most [`MAX_MESSAGE`] bytes each.
#[derive(Debug)]
pub struct MessageReader<M, R> {
    from: R,
    bytes: BytesMut,
    message: PhantomData<fn() -> M>,
}

impl<M: Message + Default, R: AsyncRead + Unpin> MessageReader<M, R> {
    /// Reads from here.
    pub fn new(from: R) -> Self {
        Self { from, bytes: BytesMut::new(), message: PhantomData }
    }

    /// The next message; `None` when the stream has ended between two. Cancel safe.
    ///
    /// # Errors
    /// [`MessageError`]: the stream is of no further use.
    pub async fn next(&mut self) -> Result<Option<M>, MessageError> {
        loop {
            if let Some(message) = decode_delimited(&mut self.bytes)? {
                return Ok(Some(message));
            }
            self.bytes.reserve(1024);
            if self.from.read_buf(&mut self.bytes).await? == 0 {
                return if self.bytes.is_empty() { Ok(None) } else { Err(MessageError::Truncated) };
            }
        }
    }

    /// The stream and what was read beyond the last message.
    pub fn into_parts(self) -> (R, BytesMut) {
        (self.from, self.bytes)
    }
}

/// Writes one message and flushes. Not cancel safe: a dropped future may leave half a message.
///
/// # Errors
/// Those of the stream.
pub async fn write_message<M: Message, W: AsyncWrite + Unpin>(to: &mut W, message: &M) -> io::Result<()> {
    to.write_all(&encoded(message)).await?;
    to.flush().await
}
