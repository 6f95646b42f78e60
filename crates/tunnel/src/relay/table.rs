//! Who is there, by which leg, and who may send to whom. No IO.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;

use forkd_wire::peer::PeerId;
use forkd_wire::relay::{Agent, Laptop, Register};

use super::Dropped;
use crate::identity::Identity;

/// Where packets of a party come from and go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Leg {
    Udp(SocketAddr),
    Pipe(u64),
}

#[derive(Debug, Default)]
pub(super) struct Table {
    parties: HashMap<PeerId, Party>,
    by_leg: HashMap<Leg, PeerId>,
    legs: u64,
}

#[derive(Debug)]
struct Party {
    identity: Identity,
    /// The control connection that speaks for the party; a newer one of the same party takes over.
    connection: u64,
    leg: Option<Leg>,
    /// Grows with each leg of any party.
    number: u64,
    /// Stays true for a moment after the leg is lost: pipes are re-attached.
    present: bool,
    any_laptop: bool,
    laptops: HashSet<String>,
}

impl Table {
    /// A control connection of this party is up. What an older one said holds until the new one says otherwise.
    pub(super) fn join(&mut self, identity: Identity, connection: u64) {
        let party = self.parties.entry(identity.peer_id()).or_insert_with(|| Party {
            identity: identity.clone(),
            connection,
            leg: None,
            number: 0,
            present: false,
            any_laptop: false,
            laptops: HashSet::new(),
        });
        party.identity = identity;
        party.connection = connection;
    }

    /// A control connection is gone; without a newer one, so is the party.
    pub(super) fn leave(&mut self, peer: PeerId, connection: u64) -> bool {
        if self.parties.get(&peer).is_none_or(|party| party.connection != connection) {
            return false;
        }
        if let Some(leg) = self.parties.remove(&peer).and_then(|party| party.leg) {
            self.by_leg.remove(&leg);
        }
        true
    }

    /// Packets of the party come from `leg`. Returns whether that is so afterwards, and whether it is news. It is
    /// refused while the leg is another's: an address may be forged for a moment, until QUIC has validated it.
    pub(super) fn set_leg(&mut self, peer: PeerId, connection: u64, leg: Leg) -> (bool, bool) {
        let taken = self.by_leg.get(&leg).is_some_and(|holder| *holder != peer);
        let Some(party) =
            self.parties.get_mut(&peer).filter(|party| party.connection == connection && !taken)
        else {
            return (false, false);
        };
        if party.leg == Some(leg) {
            return (true, false);
        }
        if let Some(before) = party.leg.replace(leg) {
            self.by_leg.remove(&before);
        }
        self.by_leg.insert(leg, peer);
        self.legs += 1;
        party.number = self.legs;
        party.present = true;
        (true, true)
    }

    /// A pipe is gone. Its party stays for [`Self::absent`] to end.
    pub(super) fn lose_leg(&mut self, leg: Leg) -> Option<(PeerId, u64)> {
        let peer = self.by_leg.remove(&leg)?;
        let party = self.parties.get_mut(&peer)?;
        party.leg = None;
        Some((peer, party.number))
    }

    /// The party has had no leg since the one with this number.
    pub(super) fn absent(&mut self, peer: PeerId, number: u64) -> bool {
        match self.parties.get_mut(&peer) {
            Some(party) if party.number == number && party.leg.is_none() => {
                std::mem::replace(&mut party.present, false)
            }
            _ => false,
        }
    }

    /// Who may send to an agent. Laptops have no say: false.
    pub(super) fn register(&mut self, peer: PeerId, connection: u64, register: Register) -> bool {
        let Some(party) = self.parties.get_mut(&peer).filter(|party| party.connection == connection) else {
            return false;
        };
        if !matches!(party.identity, Identity::Agent { .. }) {
            return false;
        }
        let laptops: HashSet<String> = register.laptops.into_iter().collect();
        let news = party.any_laptop != register.any_laptop || party.laptops != laptops;
        party.any_laptop = register.any_laptop;
        party.laptops = laptops;
        news
    }

    pub(super) fn is_authenticated(&self, leg: Leg) -> bool {
        self.by_leg.contains_key(&leg)
    }

    /// For a packet that came by `from` and wants to go to `to`: its sender, and the leg that it goes by.
    pub(super) fn forward(&self, from: Leg, to: PeerId) -> Result<(PeerId, Leg), Dropped> {
        let sender = *self.by_leg.get(&from).ok_or(Dropped::Unauthenticated)?;
        let source = self.parties.get(&sender).ok_or(Dropped::Unauthenticated)?;
        let destination = self.parties.get(&to).ok_or(Dropped::UnknownPeer)?;
        if !source.may_reach(destination) && !destination.may_reach(source) {
            return Err(Dropped::NotAllowed);
        }
        Ok((sender, destination.leg.ok_or(Dropped::NoLeg)?))
    }

    /// What a laptop is told: the agents that it may reach, sorted.
    pub(super) fn agents_for(&self, laptop: PeerId) -> Vec<Agent> {
        let Some(laptop) = self.parties.get(&laptop) else { return Vec::new() };
        let mut agents: Vec<Agent> = self
            .parties
            .values()
            .filter(|agent| agent.present && laptop.may_reach(agent))
            .map(|agent| Agent { uri: agent.identity.uri(), leg: agent.number })
            .collect();
        agents.sort_unstable_by(|a, b| a.uri.cmp(&b.uri));
        agents
    }

    /// What an agent is told: the laptops that may reach it and are there, sorted.
    pub(super) fn laptops_for(&self, agent: PeerId) -> Vec<Laptop> {
        let Some(agent) = self.parties.get(&agent) else { return Vec::new() };
        let mut laptops: Vec<Laptop> = self
            .parties
            .values()
            .filter(|laptop| laptop.present && laptop.may_reach(agent))
            .filter_map(|laptop| match &laptop.identity {
                Identity::Laptop { id, .. } => Some(Laptop { id: id.clone(), leg: laptop.number }),
                _ => None,
            })
            .collect();
        laptops.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        laptops
    }

    /// How many parties are there.
    pub(super) fn len(&self) -> usize {
        self.parties.len()
    }
}

impl Party {
    /// Is this a laptop, and `agent` an agent that has registered it?
    fn may_reach(&self, agent: &Self) -> bool {
        match (&self.identity, &agent.identity) {
            (Identity::Laptop { id, .. }, Identity::Agent { .. }) => {
                agent.any_laptop || agent.laptops.contains(id)
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::AgentRole;

    fn laptop(id: &str) -> Identity {
        Identity::Laptop { id: id.to_owned(), user: "alice".to_owned(), groups: vec![] }
    }

    fn agent(uid: &str) -> Identity {
        let (namespace, pod) = ("shop".to_owned(), "cart".to_owned());
        Identity::Agent { pod_uid: uid.to_owned(), namespace, pod, role: AgentRole::Pod }
    }

    fn udp(n: u8) -> Leg {
        Leg::Udp(([10, 0, 0, n], 7).into())
    }

    fn only(laptops: &[&str]) -> Register {
        Register { laptops: laptops.iter().map(|&id| id.to_owned()).collect(), any_laptop: false }
    }

    /// Laptops l1 (pipe 1), l2 (pipe 2); agents a1 (for l1), a2 (for nobody).
    fn table() -> Table {
        let mut table = Table::default();
        for (n, (identity, leg)) in [
            (laptop("l1"), Leg::Pipe(1)),
            (laptop("l2"), Leg::Pipe(2)),
            (agent("a1"), udp(1)),
            (agent("a2"), udp(2)),
        ]
        .into_iter()
        .enumerate()
        {
            let peer = identity.peer_id();
            table.join(identity, n as u64);
            assert_eq!(table.set_leg(peer, n as u64, leg), (true, true));
        }
        assert!(table.register(agent("a1").peer_id(), 2, only(&["l1"])));
        table
    }

    #[test]
    fn only_a_registered_laptop_and_its_agent_reach_each_other() {
        let mut table = table();
        let (l1, l2, a1, a2) =
            (laptop("l1").peer_id(), laptop("l2").peer_id(), agent("a1").peer_id(), agent("a2").peer_id());
        assert_eq!(table.forward(Leg::Pipe(1), a1), Ok((l1, udp(1))));
        assert_eq!(table.forward(udp(1), l1), Ok((a1, Leg::Pipe(1))));
        assert_eq!(table.forward(Leg::Pipe(2), a1), Err(Dropped::NotAllowed));
        assert_eq!(table.forward(udp(1), l2), Err(Dropped::NotAllowed));
        assert_eq!(table.forward(Leg::Pipe(1), l2), Err(Dropped::NotAllowed), "laptop to laptop");
        assert_eq!(table.forward(udp(1), a2), Err(Dropped::NotAllowed), "agent to agent");
        assert_eq!(table.forward(Leg::Pipe(1), l1), Err(Dropped::NotAllowed), "to oneself");
        assert_eq!(table.forward(Leg::Pipe(1), PeerId([0; 8])), Err(Dropped::UnknownPeer));
        assert_eq!(table.forward(Leg::Pipe(9), a1), Err(Dropped::Unauthenticated));
        assert!(table.register(a2, 3, Register { any_laptop: true, laptops: vec![] }));
        assert_eq!(table.forward(Leg::Pipe(2), a2), Ok((l2, udp(2))));
        assert!(!table.register(l1, 0, only(&["l2"])), "a laptop registers nobody");
    }

    #[test]
    fn each_side_is_told_who_is_there() {
        let mut table = table();
        let (l1, a1) = (laptop("l1").peer_id(), agent("a1").peer_id());
        let [before] = &table.agents_for(l1)[..] else { panic!("one agent") };
        assert_eq!(before.uri, agent("a1").uri());
        table.join(agent("a1"), 9);
        assert_eq!(table.set_leg(a1, 9, udp(9)), (true, true));
        let [after] = &table.agents_for(l1)[..] else { panic!("one agent") };
        assert!(
            after.uri == before.uri && after.leg > before.leg,
            "a successor of the same name is told apart"
        );
        assert_eq!(table.agents_for(laptop("l2").peer_id()), []);
        let there = table.laptops_for(a1);
        assert_eq!(there.len(), 1);
        let (peer, number) = table.lose_leg(Leg::Pipe(1)).unwrap();
        assert_eq!(table.laptops_for(a1), there, "a moment's grace");
        assert_eq!(table.forward(udp(9), l1), Err(Dropped::NoLeg));
        assert!(table.absent(peer, number) && !table.absent(peer, number));
        assert_eq!(table.laptops_for(a1), []);
        assert_eq!(table.set_leg(l1, 0, Leg::Pipe(7)), (true, true));
        assert!(!table.absent(peer, number), "it came back");
        assert_ne!(table.laptops_for(a1), there, "by a new leg");
    }

    #[test]
    fn a_newer_connection_takes_over_and_the_older_has_no_say() {
        let mut table = table();
        let l1 = laptop("l1");
        table.join(l1.clone(), 50);
        assert_eq!(table.forward(Leg::Pipe(1), agent("a1").peer_id()), Ok((l1.peer_id(), udp(1))));
        assert_eq!(table.set_leg(l1.peer_id(), 0, Leg::Pipe(8)), (false, false));
        assert!(!table.leave(l1.peer_id(), 0));
        assert!(table.leave(l1.peer_id(), 50));
        assert_eq!(table.forward(Leg::Pipe(1), agent("a1").peer_id()), Err(Dropped::Unauthenticated));
        assert_eq!(table.len(), 3);
    }

    #[test]
    fn nobody_takes_a_leg_that_is_anothers() {
        let mut table = table();
        assert_eq!(table.set_leg(laptop("l2").peer_id(), 1, udp(1)), (false, false));
        assert_eq!(table.set_leg(laptop("l2").peer_id(), 1, Leg::Pipe(2)), (true, false));
        assert!(table.leave(agent("a1").peer_id(), 2));
        assert_eq!(table.set_leg(laptop("l2").peer_id(), 1, udp(1)), (true, true));
        assert!(!table.is_authenticated(Leg::Pipe(2)), "the leg before");
    }
}
