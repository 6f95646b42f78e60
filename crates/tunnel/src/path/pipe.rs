//! Datagrams in a byte pipe: each preceded by its length, two bytes, network order, never zero.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::mem;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use bytes::{Buf, BufMut, BytesMut};
use forkd_wire::peer::PeerId;
use forkd_wire::relay::{FORWARD_HEADER, forward_header};
use futures::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bytes of a frame's length.
const LENGTH: usize = 2;
/// Read from a pipe at once.
const READ: usize = 64 * 1024;

/// Why a pipe is no more.
#[derive(Debug, thiserror::Error)]
pub enum PipeEnd {
    /// The other side closed it.
    #[error("the pipe was closed by the other side")]
    Closed,
    /// It failed.
    #[error("the pipe failed: {0}")]
    Io(#[from] io::Error),
    /// What came was no frame.
    #[error("a frame without content came through the pipe")]
    EmptyFrame,
    /// Another pipe to the same relay took its place, or this side has ended.
    #[error("the pipe was given up by this side")]
    GivenUp,
}

/// What became of a push.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Push {
    Taken,
    Full,
    Closed,
}

/// Frames on their way into a pipe. Bounded: at `limit` bytes it is full; the push that reaches the limit is taken
/// whole.
pub(crate) struct Queue {
    out: Mutex<Out>,
    writer: AtomicWaker,
    limit: usize,
}

#[derive(Default)]
struct Out {
    bytes: BytesMut,
    closed: bool,
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").field("bytes", &self.lock().bytes.len()).finish_non_exhaustive()
    }
}

impl Queue {
    pub(crate) fn new(limit: usize) -> Self {
        Self { out: Mutex::default(), writer: AtomicWaker::new(), limit }
    }

    /// Frames `contents`, datagrams of `segment` bytes each but the last; with `peer`, each as a forwarded packet.
    /// Datagrams too long for a frame cannot come up: QUIC's are below 64 KiB minus the header, by configuration.
    pub(crate) fn push(&self, peer: Option<PeerId>, contents: &[u8], segment: usize) -> Push {
        let mut out = self.lock();
        if out.closed {
            return Push::Closed;
        }
        if out.bytes.len() >= self.limit {
            return Push::Full;
        }
        let was_empty = out.bytes.is_empty();
        for datagram in contents.chunks(segment.max(1)) {
            let len = datagram.len() + if peer.is_some() { FORWARD_HEADER } else { 0 };
            let Ok(length) = u16::try_from(len) else { continue };
            out.bytes.reserve(LENGTH + len);
            out.bytes.put_u16(length);
            if let Some(peer) = peer {
                out.bytes.put_slice(&forward_header(peer));
            }
            out.bytes.put_slice(datagram);
        }
        drop(out);
        if was_empty {
            self.writer.wake();
        }
        Push::Taken
    }

    /// False for a closed one: whoever waits is woken by what replaces it.
    pub(crate) fn has_room(&self) -> bool {
        let out = self.lock();
        !out.closed && out.bytes.len() < self.limit
    }

    /// Nothing goes in any more, and the writer ends.
    pub(crate) fn close(&self) {
        let mut out = self.lock();
        out.closed = true;
        out.bytes = BytesMut::new();
        drop(out);
        self.writer.wake();
    }

    /// Writes frames as they come; `drained` is called whenever room came about.
    pub(crate) async fn write_to<W: AsyncWrite + Unpin>(&self, mut to: W, drained: impl Fn()) -> PipeEnd {
        let mut chunk = BytesMut::new();
        loop {
            chunk = match self.take(chunk).await {
                Some(chunk) => chunk,
                None => return PipeEnd::GivenUp,
            };
            drained();
            if let Err(error) = to.write_all(&chunk).await {
                return error.into();
            }
            if let Err(error) = to.flush().await {
                return error.into();
            }
            chunk.clear();
        }
    }

    /// All that is queued, in exchange for an empty buffer; waits while there is nothing.
    async fn take(&self, spare: BytesMut) -> Option<BytesMut> {
        let mut spare = Some(spare);
        poll_fn(|cx| {
            self.writer.register(cx.waker());
            let mut out = self.lock();
            if out.closed {
                Poll::Ready(None)
            } else if out.bytes.is_empty() {
                Poll::Pending
            } else {
                Poll::Ready(Some(mem::replace(&mut out.bytes, spare.take().unwrap_or_default())))
            }
        })
        .await
    }

    fn lock(&self) -> MutexGuard<'_, Out> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes frames out of a pipe.
pub(crate) struct FrameReader<R> {
    from: R,
    bytes: BytesMut,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub(crate) fn new(from: R) -> Self {
        Self { from, bytes: BytesMut::new() }
    }

    /// Appends at least one datagram to `datagrams`: all that are complete after one read. Cancel safe.
    pub(crate) async fn read(&mut self, datagrams: &mut Vec<BytesMut>) -> Result<(), PipeEnd> {
        loop {
            self.bytes.reserve(READ);
            if self.from.read_buf(&mut self.bytes).await? == 0 {
                return Err(PipeEnd::Closed);
            }
            let before = datagrams.len();
            while let Some(length) = self.bytes.first_chunk::<LENGTH>() {
                let length = usize::from(u16::from_be_bytes(*length));
                if length == 0 {
                    return Err(PipeEnd::EmptyFrame);
                }
                if self.bytes.len() < LENGTH + length {
                    break;
                }
                self.bytes.advance(LENGTH);
                datagrams.push(self.bytes.split_to(length));
            }
            if datagrams.len() > before {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    /// A small deterministic generator (xorshift64*, Vigna 2016), so that a failure can be replayed by its seed.
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: usize) -> usize {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound
        }
    }

    #[tokio::test]
    async fn datagrams_cut_anywhere_come_out_as_they_went_in() {
        for seed in 1..40 {
            let mut random = Random(seed);
            let mut size = || {
                let bound = [3, 1500, 65_535][random.below(3)];
                1 + random.below(bound)
            };
            let sizes: Vec<usize> = (0..200).map(|_| size()).collect();
            let (near, mut far) = tokio::io::duplex(1 + random.below(70_000));
            let (step, expected) = (1 + random.below(9_000), sizes.clone());
            let writer = tokio::spawn(async move {
                let mut bytes = Vec::new();
                for (at, size) in sizes.iter().enumerate() {
                    bytes.extend_from_slice(&u16::try_from(*size).unwrap().to_be_bytes());
                    bytes.resize(bytes.len() + size, at as u8);
                }
                for piece in bytes.chunks(step) {
                    far.write_all(piece).await.unwrap();
                }
            });
            let (mut reader, mut got) = (FrameReader::new(near), Vec::new());
            while reader.read(&mut got).await.is_ok() {}
            writer.await.unwrap();
            assert_eq!(got.iter().map(BytesMut::len).collect::<Vec<_>>(), expected, "seed {seed}");
            for (at, datagram) in got.iter().enumerate() {
                assert!(datagram.iter().all(|byte| *byte == at as u8), "seed {seed}");
            }
        }
    }

    #[tokio::test]
    async fn any_bytes_are_frames_or_the_end_of_the_pipe() {
        for seed in 1..200 {
            let mut random = Random(seed);
            let noise: Vec<u8> = (0..random.below(4000)).map(|_| random.below(256) as u8).collect();
            let mut reader = FrameReader::new(noise.as_slice());
            let mut got = Vec::new();
            let end = loop {
                if let Err(end) = reader.read(&mut got).await {
                    break end;
                }
            };
            assert!(matches!(end, PipeEnd::Closed | PipeEnd::EmptyFrame), "seed {seed}: {end}");
            assert!(got.iter().all(|datagram| !datagram.is_empty()), "seed {seed}");
            assert!(got.iter().map(|datagram| datagram.len() + LENGTH).sum::<usize>() <= noise.len());
        }
    }

    #[tokio::test]
    async fn a_full_queue_takes_nothing_until_the_pipe_has() {
        let queue = Arc::new(Queue::new(100));
        assert_eq!(queue.push(Some(PeerId([1; 8])), &[7; 150], 60), Push::Taken, "whole, beyond the limit");
        assert_eq!(queue.push(None, &[1], 1), Push::Full);
        assert!(!queue.has_room());
        let (near, far) = tokio::io::duplex(1 << 16);
        let writer = tokio::spawn({
            let queue = queue.clone();
            async move { queue.write_to(near, || ()).await }
        });
        let (mut reader, mut got) = (FrameReader::new(far), Vec::new());
        while got.len() < 3 {
            reader.read(&mut got).await.unwrap();
        }
        assert_eq!(got.iter().map(BytesMut::len).collect::<Vec<_>>(), [69, 69, 39]);
        assert_eq!(got[0][..FORWARD_HEADER], forward_header(PeerId([1; 8])));
        assert!(queue.has_room());
        queue.close();
        assert!(matches!(writer.await.unwrap(), PipeEnd::GivenUp));
        assert_eq!(queue.push(None, &[1], 1), Push::Closed);
    }
}
