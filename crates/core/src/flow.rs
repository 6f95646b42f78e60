//! TCP of the laptop's applications, ended in user space. Packets of the TUN go in, packets for the TUN come out, and
//! between them each connection is a **flow**: bytes in order, half-close and reset, in both directions.
//!
//! Expected sequence of a flow:
//!
//! 1. A SYN comes in ([`Flows::packet`]). It is held; [`Event::Opened`] asks the shell to dial.
//! 2. [`Flows::dialed`] tells how that went. Only then the SYN is answered: SYN-ACK, RST or ICMP unreachable, so that
//!    the application's `connect()` sees what it would have seen in the cluster.
//! 3. The shell moves bytes with [`Flows::read`] and [`Flows::write`], then [`Flows::flush`]. A call that could not go
//!    on is followed by [`Event::Ready`] as soon as it can.
//! 4. [`Flows::close`] sends FIN, [`Flows::abort`] RST. [`Flows::release`] ends the shell's part; the flow lives on
//!    until everything is acknowledged.
//!
//! smoltcp does the protocol: one `Interface` for each IP version, and for each flow a `SocketSet` of its own with one socket, so that a
//! packet finds its socket by one hash look-up.

mod device;
mod packet;
mod stack;
mod timers;
mod types;

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use forkd_wire::tunnel::Outcome;
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{RecvError, Socket, SocketBuffer, State};

pub use device::Sink;
pub use packet::{FRAME_MAX, HEADER, Pair};
use packet::{Parsed, Unreachable};
use stack::{Route, Stack};
use timers::Timers;
pub use types::{Config, Counters, DropReason, Event, FlowId, Gone, Read, Verdict};

/// Each flow's ring towards the cluster, and its ring from there, in bytes.
///
/// They bridge the TUN only (its round trip is some 50 µs: 256 KiB is the product of that and 40 Gbit/s); the path's
/// bandwidth-delay product belongs to QUIC's windows. Pages of a ring cost memory when first touched, and an empty
/// ring starts over at its first page, so an idle flow costs KiB.
pub const RING: usize = 256 * 1024;
/// Closed sockets that are kept for the next flow, so that a connection does not cost a system call for each ring.
const SPARE: usize = 32;
/// An application whose network went away without a word (a container's namespace) is asked for a sign of life.
const KEEP_ALIVE: Duration = Duration::from_secs(600);
/// ... and given up after this long without any.
const SILENCE: Duration = Duration::from_secs(3 * 600);
/// The same once the shell has let go of the flow: the kernel of this machine answers within milliseconds, or never.
const SILENCE_RELEASED: Duration = Duration::from_secs(60);
/// DNS questions that may be on their way at a time. Resolvers ask again after seconds; more than this is a flood.
const QUERIES: usize = 512;

/// All flows of a laptop's TUN. See the [module](self) for the sequence of calls.
pub struct Flows {
    config: Config,
    start: Instant,
    stack: Stack,
    table: HashMap<Pair, u32>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    spare: Vec<(SocketSet<'static>, SocketHandle)>,
    /// No socket at all: what is put in here is answered by RST.
    nobody: SocketSet<'static>,
    timers: Timers,
    events: VecDeque<Event>,
    queries: usize,
    counters: Counters,
}

#[derive(Default)]
struct Slot {
    generation: u32,
    flow: Option<Flow>,
}

struct Flow {
    pair: Pair,
    stage: Stage,
    marks: Marks,
    /// When the timer heap will next look at this flow.
    timer: Option<Instant>,
}

/// What is known of a flow beside its socket.
#[derive(Default)]
struct Marks {
    /// A read had to wait.
    wants_read: bool,
    /// A write had to wait.
    wants_write: bool,
    /// An [`Event::Ready`] is queued.
    announced: bool,
    /// We sent FIN (or will, after the data).
    closed: bool,
    /// The application sent FIN, and all its data is here.
    finished: bool,
    /// The shell is done with it.
    released: bool,
}

/// Whose a packet is that has the ports of a flow.
enum Meets {
    Socket,
    /// The SYN that is held already.
    Repeated,
    /// Another connection on the same ports.
    Successor,
    Stray,
}

impl Flow {
    fn state(&mut self) -> Option<State> {
        match &mut self.stage {
            Stage::Held { .. } => None,
            Stage::Open { set, handle, .. } => Some(set.get_mut::<Socket<'_>>(*handle).state()),
        }
    }

    fn is_reset(&mut self) -> bool {
        let orderly = self.marks.closed && self.marks.finished;
        !orderly && matches!(self.state(), Some(State::Closed | State::Listen))
    }

    fn meets(&mut self, opens: bool, resets: bool, seq: i32) -> Meets {
        let state = self.state();
        match (&self.stage, state) {
            (Stage::Held { seq: held, .. }, _) => match (opens, resets) {
                (true, _) if *held == seq => Meets::Repeated,
                (true, _) | (_, true) => Meets::Successor,
                (false, false) => Meets::Stray,
            },
            (_, Some(State::Closed | State::Listen | State::TimeWait)) if opens => Meets::Successor,
            _ => Meets::Socket,
        }
    }
}

enum Stage {
    /// The SYN waits for the dial.
    Held {
        syn: Box<[u8]>,
        seq: i32,
    },
    Open {
        set: SocketSet<'static>,
        handle: SocketHandle,
        route: Route,
    },
}

impl Flows {
    /// No flows yet.
    pub fn new(config: Config, now: Instant) -> Self {
        Self {
            config,
            start: now,
            stack: Stack::new(config.mtu, config.seed),
            table: HashMap::new(),
            slots: Vec::new(),
            free: Vec::new(),
            spare: Vec::new(),
            nobody: SocketSet::new(Vec::new()),
            timers: Timers::default(),
            events: VecDeque::new(),
            queries: 0,
            counters: Counters::default(),
        }
    }

    /// Takes in one frame from the TUN: virtio-net header ([`HEADER`] bytes) and IP packet.
    pub fn packet<S: Sink>(&mut self, frame: &[u8], now: Instant, sink: &mut S) -> Verdict {
        self.counters.received += 1;
        let verdict = self.take_in(frame, now, sink);
        if let Verdict::Dropped(reason) = verdict {
            self.counters.dropped[reason as usize] += 1;
        }
        verdict
    }

    /// The next thing for the shell to do.
    pub fn poll_event(&mut self) -> Option<Event> {
        let event = self.events.pop_front();
        if let Some(Event::Ready(id)) = event
            && let Some(flow) = self.flow(id)
        {
            flow.marks.announced = false;
        }
        event
    }

    /// When to call [`Self::timeout`], and what for.
    pub fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        self.timers.first().map(|at| (at, "retransmission, window probe or keep-alive of a flow"))
    }

    /// Does what is due.
    pub fn timeout<S: Sink>(&mut self, now: Instant, sink: &mut S) {
        while let Some((at, id)) = self.timers.due(now) {
            if let Some(flow) = self.flow(id)
                && flow.timer == Some(at)
            {
                flow.timer = None;
                self.flush(id, now, sink);
            }
        }
    }

    /// Answers the held SYN of a flow by what the dial came to. With any outcome but [`Outcome::Ok`] the flow is gone.
    /// `false` if it was gone before.
    pub fn dialed<S: Sink>(&mut self, id: FlowId, outcome: Outcome, now: Instant, sink: &mut S) -> bool {
        let Some(flow) = self.flow(id) else { return false };
        let Stage::Held { syn, .. } = &mut flow.stage else { return true };
        let (mut syn, pair) = (std::mem::take(syn), flow.pair);
        match outcome {
            Outcome::Ok => {
                let (mut set, handle) = self.socket();
                // A closed socket and a port above 0 (`packet::parse`): it cannot fail.
                let listening = set.get_mut::<Socket<'_>>(handle).listen(pair.dst);
                debug_assert!(listening.is_ok(), "{listening:?}");
                let route = self.stack.open_syn(pair, &mut syn);
                if let Some(flow) = self.flow(id) {
                    flow.stage = Stage::Open { set, handle, route };
                }
                self.ingress(id, &syn, now, sink);
                return true;
            }
            Outcome::Refused | Outcome::Reset => self.reject(&syn, pair, now, sink),
            Outcome::NetworkUnreachable => self.stack.unreachable(&syn, pair, Unreachable::Network, sink),
            Outcome::Forbidden => self.stack.unreachable(&syn, pair, Unreachable::Prohibited, sink),
            Outcome::HostUnreachable | Outcome::Unsupported | Outcome::Unavailable => {
                self.stack.unreachable(&syn, pair, Unreachable::Host, sink);
            }
            Outcome::TimedOut => self.counters.dropped[DropReason::DialTimedOut as usize] += 1,
        }
        self.remove(id);
        true
    }

    /// Lets `take` look at the next bytes in order, and consumes as many as it says.
    pub fn read<R>(&mut self, id: FlowId, take: impl FnOnce(&[u8]) -> (usize, R)) -> Read<R> {
        let Some((marks, socket)) = self.socket_of(id) else { return Read::Reset };
        if socket.state() == State::SynReceived {
            marks.wants_read = true;
            return Read::Blocked;
        }
        if socket.can_recv() {
            return match socket.recv(|bytes| {
                let (used, result) = take(bytes);
                (used.min(bytes.len()), result)
            }) {
                Ok(result) => Read::Data(result),
                Err(_) => Read::Reset,
            };
        }
        match socket.recv(|_| (0, ())) {
            Ok(()) => {
                marks.wants_read = true;
                Read::Blocked
            }
            Err(RecvError::Finished) => Read::Eof,
            Err(RecvError::InvalidState) => Read::Reset,
        }
    }

    /// How many bytes [`Self::write`] would take; 0 also for a flow that is gone. [`Event::Ready`] follows on 0.
    pub fn room(&mut self, id: FlowId) -> usize {
        let Some((marks, socket)) = self.socket_of(id) else { return 0 };
        let room = if socket.may_send() { socket.send_capacity() - socket.send_queue() } else { 0 };
        marks.wants_write |= room == 0;
        room
    }

    /// Queues as much of `data` as there is room for, and returns how much that was. [`Event::Ready`] follows unless
    /// it was all.
    ///
    /// # Errors
    /// [`Gone`].
    pub fn write(&mut self, id: FlowId, data: &[u8]) -> Result<usize, Gone> {
        let (marks, socket) = self.socket_of(id).ok_or(Gone)?;
        let taken = match socket.send_slice(data) {
            Ok(taken) => taken,
            Err(_) if socket.state() == State::SynReceived => 0,
            Err(_) => return Err(Gone),
        };
        marks.wants_write |= taken < data.len();
        Ok(taken)
    }

    /// Sends FIN after everything that was written.
    pub fn close(&mut self, id: FlowId) {
        if let Some((marks, socket)) = self.socket_of(id) {
            marks.closed = true;
            socket.close();
        }
    }

    /// Sends RST, at the next [`Self::flush`].
    pub fn abort(&mut self, id: FlowId) {
        if let Some((_, socket)) = self.socket_of(id) {
            socket.abort();
        }
    }

    /// The application reset the flow or vanished. `false` for a flow in good order, and for one closed by both sides.
    pub fn is_reset(&mut self, id: FlowId) -> bool {
        match self.flow(id) {
            None => true,
            Some(flow) => flow.is_reset(),
        }
    }

    /// The shell is done with the flow, whose id it will not use again. What was written is still delivered. A flow
    /// whose dial is not done is forgotten: its next SYN begins another.
    pub fn release<S: Sink>(&mut self, id: FlowId, now: Instant, sink: &mut S) {
        let Some(flow) = self.flow(id) else { return };
        if matches!(flow.stage, Stage::Held { .. }) {
            self.remove(id);
            return;
        }
        flow.marks.released = true;
        if let Some((_, socket)) = self.socket_of(id) {
            socket.set_timeout(Some(SILENCE_RELEASED.into()));
        }
        self.flush(id, now, sink);
    }

    /// Sends what reads, writes, close and abort have given cause to send.
    pub fn flush<S: Sink>(&mut self, id: FlowId, now: Instant, sink: &mut S) {
        let at = self.smoltcp_time(now);
        let Self { slots, stack, .. } = self;
        let Some(Flow { stage: Stage::Open { set, route, .. }, .. }) = slot(slots, id) else { return };
        stack.turn(None, set, *route, at, sink);
        self.settle(id, now);
    }

    /// Answers a DNS question.
    pub fn answer<S: Sink>(&mut self, pair: Pair, message: &[u8], sink: &mut S) {
        self.no_answer();
        self.stack.udp(pair, message, sink);
    }

    /// A DNS question will get no answer from here.
    pub fn no_answer(&mut self) {
        self.queries = self.queries.saturating_sub(1);
    }

    /// Packets so far.
    pub fn counters(&self) -> Counters {
        Counters { sent: self.stack.sent, ..self.counters.clone() }
    }

    /// Flows at the moment.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// No flow at the moment.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    fn take_in<S: Sink>(&mut self, frame: &[u8], now: Instant, sink: &mut S) -> Verdict {
        let (packet, parsed) = match packet::parse(frame) {
            Ok(parsed) => parsed,
            Err(reason) => return Verdict::Dropped(reason),
        };
        let (pair, opens, resets, seq) = match parsed {
            Parsed::Udp { pair, payload } => return self.take_in_udp(pair, payload),
            Parsed::Tcp { pair, opens, resets, seq } => (pair, opens, resets, seq),
        };
        let known = self
            .table
            .get(&pair)
            .copied()
            .map(|index| FlowId { index, generation: self.slots[index as usize].generation });
        if let Some(id) = known {
            match self.flow(id).map(|flow| flow.meets(opens, resets, seq)) {
                Some(Meets::Socket) => {
                    self.ingress(id, packet, now, sink);
                    return Verdict::Delivered;
                }
                Some(Meets::Repeated) => return Verdict::Dropped(DropReason::SynRepeated),
                Some(Meets::Stray) => return Verdict::Dropped(DropReason::OutOfState),
                Some(Meets::Successor) | None => self.remove(id),
            }
        }
        if opens {
            return self.hold(pair, packet, seq);
        }
        if resets {
            return Verdict::Dropped(DropReason::StrayReset);
        }
        self.reject(packet, pair, now, sink);
        Verdict::Answered
    }

    fn take_in_udp(&mut self, pair: Pair, payload: &[u8]) -> Verdict {
        if Some(pair.dst) != self.config.dns {
            return Verdict::Dropped(DropReason::UdpNotYet);
        }
        if self.queries >= QUERIES {
            return Verdict::Dropped(DropReason::TooManyQueries);
        }
        self.queries += 1;
        self.events.push_back(Event::Query(pair, payload.to_vec()));
        Verdict::Query
    }

    fn hold(&mut self, pair: Pair, syn: &[u8], seq: i32) -> Verdict {
        if self.table.len() >= self.config.max_flows {
            return Verdict::Dropped(DropReason::TooManyFlows);
        }
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            (self.slots.len() - 1) as u32
        });
        let slot = &mut self.slots[index as usize];
        slot.generation = slot.generation.wrapping_add(1);
        slot.flow = Some(Flow {
            pair,
            stage: Stage::Held { syn: syn.into(), seq },
            marks: Marks::default(),
            timer: None,
        });
        let id = FlowId { index, generation: slot.generation };
        self.table.insert(pair, index);
        self.events.push_back(Event::Opened(id, pair));
        Verdict::Held
    }

    /// A fresh socket, alone in its set.
    fn socket(&mut self) -> (SocketSet<'static>, SocketHandle) {
        let (mut set, handle) = self.spare.pop().unwrap_or_else(|| {
            let ring = || SocketBuffer::new(vec![0; self.config.ring]);
            let mut set = SocketSet::new(Vec::with_capacity(1));
            let handle = set.add(Socket::new(ring(), ring()));
            (set, handle)
        });
        let socket = set.get_mut::<Socket<'_>>(handle);
        socket.set_ack_delay(None);
        socket.set_nagle_enabled(false);
        socket.set_keep_alive(Some(KEEP_ALIVE.into()));
        socket.set_timeout(Some(SILENCE.into()));
        (set, handle)
    }

    /// Hands a packet to the flow's socket, and sends what that gives cause to send.
    fn ingress<S: Sink>(&mut self, id: FlowId, packet: &[u8], now: Instant, sink: &mut S) {
        let at = self.smoltcp_time(now);
        let Self { slots, stack, .. } = self;
        let Some(Flow { stage: Stage::Open { set, route, .. }, .. }) = slot(slots, id) else { return };
        stack.turn(Some(packet), set, *route, at, sink);
        self.settle(id, now);
    }

    /// Answers a packet by RST.
    fn reject<S: Sink>(&mut self, packet: &[u8], pair: Pair, now: Instant, sink: &mut S) {
        let at = self.smoltcp_time(now);
        let route = Route { v6: pair.dst.is_ipv6(), split: None };
        self.stack.turn(Some(packet), &mut self.nobody, route, at, sink);
    }

    /// After each turn of a flow's socket: announces, sets the timer, buries.
    fn settle(&mut self, id: FlowId, now: Instant) {
        let at = self.smoltcp_time(now);
        let Self { slots, stack, timers, events, start, .. } = self;
        let Some(Flow { stage: Stage::Open { set, handle, route }, marks, timer, .. }) = slot(slots, id)
        else {
            return;
        };
        let socket = set.get_mut::<Socket<'_>>(*handle);
        let state = socket.state();
        // RST during the handshake puts a listening socket back to Listen: for a flow, that is the end.
        let over = matches!(state, State::Closed | State::Listen);
        marks.finished |=
            matches!(state, State::CloseWait | State::LastAck | State::Closing | State::TimeWait);
        if marks.released && (over || state == State::TimeWait) {
            // No packet of this TUN arrives late, so nothing is left to wait for.
            self.remove(id);
            return;
        }
        let room = socket.send_capacity() - socket.send_queue();
        let readable =
            marks.wants_read && state != State::SynReceived && (socket.can_recv() || !socket.may_recv());
        // A quarter of the ring at once: many small writes would make many small packets.
        let writable = marks.wants_write
            && state != State::SynReceived
            && (!socket.may_send() || room >= socket.send_capacity() / 4);
        if (readable || writable || over) && !marks.announced && !marks.released {
            marks.announced = true;
            marks.wants_read &= !readable;
            marks.wants_write &= !writable;
            events.push_back(Event::Ready(id));
        }
        if let Some(due) = stack.poll_at(set, *route, at) {
            // `poll_egress` has just run dry: whatever says "at once" can wait for a clock tick.
            let due = *start + Duration::from_micros(due.total_micros().max(at.total_micros() + 1000) as u64);
            if timer.is_none_or(|timer| due < timer) {
                *timer = Some(due);
                timers.set(due, id);
            }
        }
        // At most as many entries that do not count as flows that do: each is removed once for one that was added.
        if self.timers.len() > 2 * self.table.len() + 64 {
            let slots = &mut self.slots;
            self.timers.retain(|at, id| slot(slots, id).is_some_and(|flow| flow.timer == Some(at)));
        }
    }

    fn remove(&mut self, id: FlowId) {
        let Some(slot) = self.slots.get_mut(id.index as usize) else { return };
        if slot.generation != id.generation {
            return;
        }
        let Some(flow) = slot.flow.take() else { return };
        self.table.remove(&flow.pair);
        self.free.push(id.index);
        if let Stage::Open { mut set, handle, .. } = flow.stage
            && self.spare.len() < SPARE
        {
            set.get_mut::<Socket<'_>>(handle).abort();
            self.spare.push((set, handle));
        }
    }

    fn flow(&mut self, id: FlowId) -> Option<&mut Flow> {
        slot(&mut self.slots, id)
    }

    fn socket_of(&mut self, id: FlowId) -> Option<(&mut Marks, &mut Socket<'static>)> {
        let Flow { stage, marks, .. } = slot(&mut self.slots, id)?;
        let Stage::Open { set, handle, .. } = stage else { return None };
        Some((marks, set.get_mut(*handle)))
    }

    fn smoltcp_time(&self, now: Instant) -> smoltcp::time::Instant {
        smoltcp::time::Instant::from_micros(now.saturating_duration_since(self.start).as_micros() as i64)
    }
}

fn slot(slots: &mut [Slot], id: FlowId) -> Option<&mut Flow> {
    slots.get_mut(id.index as usize).filter(|slot| slot.generation == id.generation)?.flow.as_mut()
}

#[cfg(test)]
mod tests;
