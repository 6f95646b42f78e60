//! Which leg a packet takes. No IO: a table and a choice.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use forkd_wire::peer::PeerId;

use super::pipe::Queue;

/// Peers whose last relay is remembered. An agent has a handful of laptops, a gateway hundreds; relays introduce
/// nobody who has no certificate.
const MAX_PEERS: usize = 4096;

/// A way to a relay.
#[derive(Clone, Debug)]
pub(crate) enum Leg {
    /// Datagrams to this address.
    Udp(SocketAddr),
    /// Frames in a byte pipe.
    Pipe(Arc<Queue>),
}

/// The leg for a packet, and whether it needs the header of a forwarded one.
#[derive(Clone, Debug)]
pub(crate) struct Choice {
    pub(crate) leg: Leg,
    pub(crate) forward: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Routes {
    relays: HashMap<PeerId, Relay>,
    by_addr: HashMap<SocketAddr, PeerId>,
    /// The relay through which a peer's last packet came, and when (in packets).
    peers: HashMap<PeerId, (PeerId, u64)>,
    clock: u64,
    legs: u64,
}

#[derive(Debug)]
struct Relay {
    leg: Option<Leg>,
    /// Grows with each leg of any relay.
    number: u64,
    /// The relay has said that it forwards what comes from this leg.
    confirmed: bool,
}

impl Routes {
    /// Gives a relay a leg, in place of the one before, which is returned. The number of the new one comes along.
    pub(crate) fn attach(&mut self, relay: PeerId, leg: Leg) -> (u64, Option<Leg>) {
        self.legs += 1;
        self.by_addr.retain(|_, id| *id != relay);
        if let Leg::Udp(addr) = &leg {
            self.by_addr.insert(*addr, relay);
        }
        let number = self.legs;
        let before = self.relays.insert(relay, Relay { leg: Some(leg), number, confirmed: false });
        (number, before.and_then(|relay| relay.leg))
    }

    /// Forgets the leg with this number, if it is still that relay's.
    pub(crate) fn detach(&mut self, relay: PeerId, number: u64) -> bool {
        match self.relays.get_mut(&relay) {
            Some(entry) if entry.number == number => {
                entry.leg = None;
                entry.confirmed = false;
                true
            }
            _ => false,
        }
    }

    /// Forgets a relay; its leg is returned.
    pub(crate) fn remove(&mut self, relay: PeerId) -> Option<Leg> {
        self.by_addr.retain(|_, id| *id != relay);
        self.relays.remove(&relay).and_then(|entry| entry.leg)
    }

    /// The relay forwards what comes from the leg with this number. False if that is no longer its leg, or known.
    pub(crate) fn confirm(&mut self, relay: PeerId, number: u64) -> bool {
        match self.relays.get_mut(&relay) {
            Some(entry) if entry.number == number && entry.leg.is_some() && !entry.confirmed => {
                entry.confirmed = true;
                true
            }
            _ => false,
        }
    }

    /// Number of a relay's leg, if it has one.
    pub(crate) fn leg_number(&self, relay: PeerId) -> Option<u64> {
        self.relays.get(&relay).filter(|entry| entry.leg.is_some()).map(|entry| entry.number)
    }

    /// The relay that has this address.
    pub(crate) fn relay_at(&self, addr: SocketAddr) -> Option<PeerId> {
        self.by_addr.get(&addr).copied()
    }

    /// A packet of `peer` came through `relay`: answers go back there.
    pub(crate) fn learn(&mut self, peer: PeerId, relay: PeerId) {
        self.clock += 1;
        if self.peers.len() >= MAX_PEERS && !self.peers.contains_key(&peer) {
            let oldest = self.peers.iter().min_by_key(|(_, (_, at))| *at).map(|(peer, _)| *peer);
            oldest.and_then(|oldest| self.peers.remove(&oldest));
        }
        self.peers.insert(peer, (relay, self.clock));
    }

    /// The leg for a packet to `to`: a relay's own leg if it is one; else through the relay that its last packet came
    /// from, else through whichever relay was attached last. `None`: nothing leads there at the moment.
    pub(crate) fn choose(&self, to: PeerId) -> Option<Choice> {
        if let Some(relay) = self.relays.get(&to) {
            return relay.leg.clone().map(|leg| Choice { leg, forward: false });
        }
        let learned = self.peers.get(&to).and_then(|(relay, _)| self.relays.get(relay));
        learned
            .filter(|relay| relay.confirmed)
            .or_else(|| self.relays.values().filter(|relay| relay.confirmed).max_by_key(|relay| relay.number))
            .and_then(|relay| relay.leg.clone())
            .map(|leg| Choice { leg, forward: true })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const R1: PeerId = PeerId([1; 8]);
    const R2: PeerId = PeerId([2; 8]);
    const PEER: PeerId = PeerId([9; 8]);

    fn addr(n: u8) -> SocketAddr {
        ([10, 0, 0, n], 7844).into()
    }

    fn chosen(routes: &Routes, to: PeerId) -> Option<(SocketAddr, bool)> {
        routes.choose(to).map(|choice| match choice.leg {
            Leg::Udp(addr) => (addr, choice.forward),
            Leg::Pipe(_) => panic!("no pipes here"),
        })
    }

    #[test]
    fn peers_wait_for_a_confirmed_leg_and_relays_do_not() {
        let mut routes = Routes::default();
        assert_eq!(chosen(&routes, PEER), None);
        let (number, _) = routes.attach(R1, Leg::Udp(addr(1)));
        assert_eq!(chosen(&routes, R1), Some((addr(1), false)));
        assert_eq!(chosen(&routes, PEER), None);
        assert!(routes.confirm(R1, number) && !routes.confirm(R1, number));
        assert_eq!(chosen(&routes, PEER), Some((addr(1), true)));
        let (newer, _) = routes.attach(R1, Leg::Udp(addr(3)));
        assert_eq!(chosen(&routes, PEER), None, "the new leg is not confirmed");
        assert!(!routes.confirm(R1, number), "an answer about the old one");
        assert!(!routes.detach(R1, number) && routes.detach(R1, newer));
        assert_eq!(chosen(&routes, R1), None);
    }

    #[test]
    fn answers_go_back_through_the_relay_of_the_last_packet_while_it_lives() {
        let mut routes = Routes::default();
        for (relay, n) in [(R1, 1), (R2, 2)] {
            let (number, _) = routes.attach(relay, Leg::Udp(addr(n)));
            routes.confirm(relay, number);
        }
        assert_eq!(chosen(&routes, PEER), Some((addr(2), true)), "the newest");
        routes.learn(PEER, R1);
        assert_eq!(chosen(&routes, PEER), Some((addr(1), true)));
        routes.remove(R1);
        assert_eq!(chosen(&routes, PEER), Some((addr(2), true)));
        assert_eq!((routes.relay_at(addr(1)), routes.relay_at(addr(2))), (None, Some(R2)));
    }

    #[test]
    fn the_oldest_peer_is_forgotten_first() {
        let mut routes = Routes::default();
        for n in 0..=MAX_PEERS as u64 {
            routes.learn(PeerId(n.to_be_bytes()), R1);
        }
        assert_eq!(routes.peers.len(), MAX_PEERS);
        assert!(!routes.peers.contains_key(&PeerId(0u64.to_be_bytes())));
    }
}
