//! One flow and its stream: bytes, half-close and reset, both ways, with backpressure from either end.

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::{Buf, Bytes};
use forkd_core::flow::{FlowId, Read};
use forkd_wire::tunnel::Reset;

use super::Plane;
use super::stream::{End, Stream};

/// Bytes that one flow may move in one turn before others get theirs.
const TURN: usize = 256 * 1024;
/// The most bytes taken from a stream at once.
const CHUNK: usize = 64 * 1024;

/// How a flow ended; the words of the access line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// FIN both ways.
    Closed,
    /// The application sent RST or vanished.
    ResetByApplication,
    /// The other end of the connection sent RST (or its agent gave up, see the code).
    ResetByPeer(u64),
    /// The tunnel is gone.
    Lost,
}

/// A finished flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Bytes from the application that the stream took.
    pub up: u64,
    /// Bytes from the stream that the flow took.
    pub down: u64,
    /// How.
    pub ended: Ended,
}

pub(super) struct Pump {
    plane: Rc<RefCell<Plane>>,
    id: FlowId,
    stream: Stream,
    /// What came from the stream and does not fit into the flow's ring yet.
    rest: Bytes,
    up: u64,
    down: u64,
    up_stage: UpStage,
    down_done: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum UpStage {
    Moving,
    /// The application has closed; FIN is under way.
    Finishing,
    Done,
}

/// One turn of one direction.
enum Turn {
    /// There may be more at once.
    Again,
    /// Waits; a waker is registered.
    Wait,
}

impl Pump {
    pub fn new(plane: Rc<RefCell<Plane>>, id: FlowId, stream: Stream) -> Self {
        Self {
            plane,
            id,
            stream,
            rest: Bytes::new(),
            up: 0,
            down: 0,
            up_stage: UpStage::Moving,
            down_done: false,
        }
    }

    /// Runs until both directions have ended.
    pub async fn run(mut self) -> Finished {
        let ended = poll_fn(|cx| self.poll(cx)).await;
        if ended != Ended::Closed {
            self.stream.send.reset(Reset::ConnectionReset);
            self.stream.recv.stop(Reset::ConnectionReset);
            let plane = &mut *self.plane.borrow_mut();
            plane.flows.abort(self.id);
        }
        Finished { up: self.up, down: self.down, ended }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        self.plane.borrow_mut().wake_by(self.id, cx.waker());
        let done = self.turns(cx);
        let plane = &mut *self.plane.borrow_mut();
        plane.flows.flush(self.id, Instant::now(), &mut plane.tun);
        plane.rearm();
        match done {
            Ok(Turn::Wait) if self.up_stage == UpStage::Done && self.down_done => Poll::Ready(Ended::Closed),
            Ok(Turn::Wait) => Poll::Pending,
            Ok(Turn::Again) => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Err(ended) => Poll::Ready(ended),
        }
    }

    fn turns(&mut self, cx: &mut Context<'_>) -> Result<Turn, Ended> {
        if self.plane.borrow_mut().flows.is_reset(self.id) {
            return Err(Ended::ResetByApplication);
        }
        let up = self.turn_up(cx)?;
        let down = self.turn_down(cx)?;
        Ok(if matches!((up, down), (Turn::Wait, Turn::Wait)) { Turn::Wait } else { Turn::Again })
    }

    fn turn_up(&mut self, cx: &mut Context<'_>) -> Result<Turn, Ended> {
        let mut moved = 0;
        while self.up_stage == UpStage::Moving {
            if moved >= TURN {
                return Ok(Turn::Again);
            }
            let send = &mut self.stream.send;
            // The ring's bytes go straight into the stream: the one copy of this direction beside the kernel's.
            let read =
                self.plane.borrow_mut().flows.read(self.id, |bytes| match send.poll_write(cx, bytes) {
                    Poll::Ready(Ok(taken)) => (taken, Poll::Ready(Ok(taken))),
                    other => (0, other),
                });
            match read {
                Read::Data(Poll::Ready(Ok(taken))) => {
                    moved += taken;
                    self.up += taken as u64;
                }
                Read::Data(Poll::Ready(Err(end))) => return Err(end.into()),
                // Nobody reads the flow while the stream is full: its window closes, the application waits.
                Read::Data(Poll::Pending) | Read::Blocked => return self.watch_stopped(cx),
                Read::Eof => self.up_stage = UpStage::Finishing,
                Read::Reset => return Err(Ended::ResetByApplication),
            }
        }
        if self.up_stage == UpStage::Finishing {
            match self.stream.send.poll_finish(cx) {
                Poll::Ready(Ok(())) => self.up_stage = UpStage::Done,
                Poll::Ready(Err(end)) => return Err(end.into()),
                Poll::Pending => {}
            }
        }
        Ok(Turn::Wait)
    }

    /// Once the other direction has ended, only this says that the connection behind the stream was reset.
    fn watch_stopped(&mut self, cx: &mut Context<'_>) -> Result<Turn, Ended> {
        if self.down_done
            && let Poll::Ready(end) = self.stream.send.poll_stopped(cx)
        {
            return Err(end.into());
        }
        Ok(Turn::Wait)
    }

    fn turn_down(&mut self, cx: &mut Context<'_>) -> Result<Turn, Ended> {
        let mut moved = 0;
        while !self.down_done {
            if moved >= TURN {
                return Ok(Turn::Again);
            }
            if self.rest.is_empty() {
                // Nothing is taken from the stream that the flow has no room for: its window closes, the cluster waits.
                let room = self.plane.borrow_mut().flows.room(self.id);
                if room == 0 {
                    return Ok(Turn::Wait);
                }
                match self.stream.recv.poll_chunk(cx, room.min(CHUNK)) {
                    Poll::Ready(Ok(Some(chunk))) => self.rest = chunk,
                    Poll::Ready(Ok(None)) => {
                        self.plane.borrow_mut().flows.close(self.id);
                        self.down_done = true;
                        // Looks for a reset that only the other half can tell now.
                        return Ok(Turn::Again);
                    }
                    Poll::Ready(Err(end)) => return Err(end.into()),
                    Poll::Pending => return Ok(Turn::Wait),
                }
            }
            let written = self.plane.borrow_mut().flows.write(self.id, &self.rest);
            let written = written.map_err(|_gone| Ended::ResetByApplication)?;
            if written == 0 {
                return Ok(Turn::Wait);
            }
            self.rest.advance(written);
            self.down += written as u64;
            moved += written;
        }
        Ok(Turn::Wait)
    }
}

impl From<End> for Ended {
    fn from(end: End) -> Self {
        match end {
            End::Reset(code) => Self::ResetByPeer(code),
            End::Lost => Self::Lost,
        }
    }
}
