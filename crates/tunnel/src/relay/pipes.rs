//! The relay's byte pipes: port-forwards end here.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use forkd_wire::peer::PeerId;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::table::Leg;
use super::{PATIENCE, Shared, Sorted, sorted};
use crate::path::PipeEnd;
use crate::path::pipe::{FrameReader, Queue};

/// Bytes that wait for a slow pipe; beyond, the newest packets are dropped and QUIC sends them again.
const PIPE_QUEUE: usize = 1 << 20;
/// Pipes at once; each is a file descriptor and, when stuck, a queue.
const PIPES: usize = 4096;
/// How long a laptop whose pipe died still counts as there: pipes are re-attached within a moment.
const GRACE: Duration = Duration::from_secs(2);

pub(super) async fn serve(shared: Arc<Shared>, tcp: TcpListener) {
    let room = Arc::new(Semaphore::new(PIPES));
    let mut pipes = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = tcp.accept() => accepted,
            Some(_) = pipes.join_next() => continue,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, mostly: others will close.
                tracing::warn!(%error, "cannot accept a pipe");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(permit) = room.clone().try_acquire_owned() else {
            tracing::warn!(limit = PIPES, "too many pipes");
            continue;
        };
        let shared = shared.clone();
        pipes.spawn(async move {
            serve_pipe(shared, stream).await;
            drop(permit);
        });
    }
}

async fn serve_pipe(shared: Arc<Shared>, stream: TcpStream) {
    // Small frames must not wait for larger ones; fails on a dead socket only, which reading finds out.
    let _ = stream.set_nodelay(true);
    let pipe = shared.next_pipe.fetch_add(1, Ordering::Relaxed);
    let leg = Leg::Pipe(pipe);
    let queue = Arc::new(Queue::new(PIPE_QUEUE));
    shared.pipes.write().unwrap_or_else(PoisonError::into_inner).insert(pipe, queue.clone());
    let (read, write) = stream.into_split();
    let end = tokio::select! {
        end = read_pipe(&shared, leg, FrameReader::new(read)) => end.to_string(),
        end = queue.write_to(write, || ()) => end.to_string(),
        () = nobody(&shared, leg) => "nobody is behind it".to_owned(),
    };
    tracing::info!(pipe, %end, "a pipe ended");
    queue.close();
    shared.pipes.write().unwrap_or_else(PoisonError::into_inner).remove(&pipe);
    let lost = shared.table_mut().lose_leg(leg);
    if let Some((peer, number)) = lost {
        shared.changed();
        tokio::time::sleep(GRACE).await;
        if shared.table_mut().absent(peer, number) {
            shared.changed();
        }
    }
}

async fn read_pipe(
    shared: &Shared,
    leg: Leg,
    mut reader: FrameReader<tokio::net::tcp::OwnedReadHalf>,
) -> PipeEnd {
    let mut datagrams = Vec::new();
    let mut run = Run::default();
    loop {
        if let Err(end) = reader.read(&mut datagrams).await {
            return end;
        }
        for datagram in datagrams.drain(..) {
            match sorted(&datagram) {
                Sorted::Forward(to) => {
                    if !run.takes(to, datagram.len())
                        && let Err(error) = run.send(shared, leg).await
                    {
                        return error.into();
                    }
                    run.add(to, &datagram);
                }
                Sorted::Control(packet) => shared.control(leg, packet),
                Sorted::Drop(reason) => shared.count(reason, 1),
            }
        }
        if let Err(error) = run.send(shared, leg).await {
            return error.into();
        }
    }
}

/// Consecutive packets for one receiver, of one size but the last, put together for one send.
#[derive(Default)]
struct Run {
    bytes: BytesMut,
    to: Option<PeerId>,
    stride: usize,
    /// A shorter packet has ended it.
    ended: bool,
}

impl Run {
    fn takes(&self, to: PeerId, len: usize) -> bool {
        match self.to {
            None => true,
            Some(running) => {
                running == to
                    && !self.ended
                    && len <= self.stride
                    && self.bytes.len() + len <= usize::from(u16::MAX)
            }
        }
    }

    fn add(&mut self, to: PeerId, datagram: &[u8]) {
        if self.to.replace(to).is_none() {
            self.stride = datagram.len();
        }
        self.ended |= datagram.len() < self.stride;
        self.bytes.extend_from_slice(datagram);
    }

    async fn send(&mut self, shared: &Shared, from: Leg) -> io::Result<()> {
        if let Some(to) = self.to.take() {
            shared.forward(from, to, &mut self.bytes, self.stride).await?;
        }
        self.bytes.clear();
        self.ended = false;
        Ok(())
    }
}

/// Resolves when a pipe has had nobody behind it for a while.
async fn nobody(shared: &Shared, leg: Leg) {
    loop {
        tokio::time::sleep(PATIENCE).await;
        if !shared.table().is_authenticated(leg) {
            return;
        }
    }
}
