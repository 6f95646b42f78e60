//! Deadlines of flows: a heap that is corrected when it is looked at, not whenever a deadline moves.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Instant;

use super::FlowId;

/// A flow has at most one entry that counts: its owner remembers the time, adds an entry only to be looked at earlier,
/// and asks the socket again when one falls due.
#[derive(Default)]
pub(super) struct Timers(BinaryHeap<Reverse<(Instant, FlowId)>>);

impl Timers {
    /// Look at the flow then.
    pub fn set(&mut self, at: Instant, id: FlowId) {
        self.0.push(Reverse((at, id)));
    }

    /// The earliest time to look at any flow.
    pub fn first(&self) -> Option<Instant> {
        self.0.peek().map(|Reverse((at, _))| *at)
    }

    /// Takes out one entry that is due by `now`: it counts if the flow remembers the same time.
    pub fn due(&mut self, now: Instant) -> Option<(Instant, FlowId)> {
        if self.first()? > now {
            return None;
        }
        self.0.pop().map(|Reverse(entry)| entry)
    }

    /// Entries, those included that no longer count.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Drops what does not count.
    pub fn retain(&mut self, mut counts: impl FnMut(Instant, FlowId) -> bool) {
        self.0.retain(|Reverse((at, id))| counts(*at, *id));
    }
}
