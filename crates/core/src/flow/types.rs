//! What goes into and comes out of [`Flows`](super::Flows).

use std::net::SocketAddr;

use super::Pair;

/// Settings of [`Flows`](super::Flows).
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// MTU of the TUN, bytes; 1280 to 65535.
    pub mtu: u16,
    /// Bytes of each flow's two rings, see [`RING`](super::RING).
    pub ring: usize,
    /// Flows at a time; a SYN beyond is dropped, and comes again when the application's kernel retries.
    pub max_flows: usize,
    /// Where DNS is answered (UDP; over TCP it is a flow like any other).
    pub dns: Option<SocketAddr>,
    /// Seed of initial sequence numbers.
    pub seed: u64,
}

/// Names a flow; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowId {
    pub(super) index: u32,
    pub(super) generation: u32,
}

/// What the shell is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Dial `pair.dst`, then tell by [`Flows::dialed`](super::Flows::dialed).
    Opened(FlowId, Pair),
    /// A read or write that had to wait may go on, or the flow was reset.
    Ready(FlowId),
    /// Answer the DNS message by [`Flows::answer`](super::Flows::answer), or say [`Flows::no_answer`](super::Flows::no_answer).
    Query(Pair, Vec<u8>),
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// A flow has it.
    Delivered,
    /// A SYN that waits for the dial.
    Held,
    /// Nobody's: it was answered by RST.
    Answered,
    /// A DNS question, now an event.
    Query,
    /// It is gone.
    Dropped(DropReason),
}

/// Why a packet was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum DropReason {
    /// No valid IP, TCP or UDP packet.
    Malformed,
    /// A fragment: the kernel reassembles before it routes, and TCP does not fragment.
    Fragment,
    /// To or from an address that no single host has.
    NotUnicast,
    /// The checksum is wrong, and nobody vouched for it.
    BadChecksum,
    /// The SYN is already held: its dial goes on.
    SynRepeated,
    /// Anything but a SYN of a connection whose SYN is not answered yet.
    OutOfState,
    /// A reset of nothing.
    StrayReset,
    /// [`Config::max_flows`] are open.
    TooManyFlows,
    /// Too many DNS questions are on their way.
    TooManyQueries,
    /// The dial met silence, so silence is the answer.
    DialTimedOut,
    /// UDP to anything but DNS.
    UdpNotYet,
    /// ICMP, multicast listener reports.
    IcmpNotYet,
    /// Another IP protocol.
    OtherProtocol,
}

impl DropReason {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 13] = [
        Self::Malformed,
        Self::Fragment,
        Self::NotUnicast,
        Self::BadChecksum,
        Self::SynRepeated,
        Self::OutOfState,
        Self::StrayReset,
        Self::TooManyFlows,
        Self::TooManyQueries,
        Self::DialTimedOut,
        Self::UdpNotYet,
        Self::IcmpNotYet,
        Self::OtherProtocol,
    ];
}

/// Packets counted by what became of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets that came in.
    pub received: u64,
    /// Packets that went out.
    pub sent: u64,
    pub(super) dropped: [u64; DropReason::ALL.len()],
}

impl Counters {
    /// Packets dropped for this reason.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.dropped[reason as usize]
    }
}

/// What [`Flows::read`](super::Flows::read) met.
#[derive(Debug, PartialEq, Eq)]
pub enum Read<R> {
    /// Bytes, and what the caller made of them.
    Data(R),
    /// None yet; [`Event::Ready`] follows.
    Blocked,
    /// The application has closed its side, and everything was read.
    Eof,
    /// The flow is gone.
    Reset,
}

/// The flow is gone: the application reset it, or vanished.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the flow was reset")]
pub struct Gone;
