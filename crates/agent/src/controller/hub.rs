//! Who is connected, what they were told, and what they said last.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use forkd_tunnel::identity::{AgentRole, Identity};
use forkd_wire::control::{Desired, Route, Status};
use tokio::sync::watch;
use tokio::time::Instant;

/// How long what an agent said counts after its connection broke: it comes back within seconds, and goes on working
/// meanwhile.
pub const LINGER: Duration = Duration::from_secs(30);
/// An agent that was not heard of for so long is forgotten.
const FORGET: Duration = Duration::from_secs(600);

/// What an agent is to hear.
#[derive(Clone, Debug, PartialEq)]
pub enum Order {
    /// Nothing is decided yet.
    Wait,
    /// The desired state.
    Desired(Box<Desired>),
    /// To undo its redirects and end.
    Retire(String),
}

/// One agent, by its id.
struct Entry {
    /// Number and line of the connection it has.
    connection: Option<(u64, watch::Sender<Order>)>,
    identity: Identity,
    /// What it was told last.
    desired: Option<Desired>,
    /// The generation in which each of its routes came to be what it is.
    since: HashMap<(String, u32), u64>,
    status: Option<Status>,
    lost_at: Option<Instant>,
}

impl Entry {
    fn counts(&self, now: Instant) -> bool {
        self.connection.is_some() || self.lost_at.is_some_and(|at| now < at + LINGER)
    }
}

/// What an agent says of one target.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// All ports of the target are redirected, and the target is in effect.
    pub routed: bool,
    /// Laptops connected to the agent.
    pub laptops: BTreeSet<String>,
    /// Of the target's ports.
    pub older_connections: u32,
    /// Of the target's ports.
    pub opaque_connections: u32,
    /// What it says is wrong.
    pub error: String,
}

#[derive(Default)]
struct Inner {
    entries: HashMap<String, Entry>,
    /// When a laptop that is connected nowhere was seen last.
    last_seen: HashMap<String, Instant>,
    connections: u64,
}

/// All agents, gateways included. Never locked across an await.
pub struct Hub {
    inner: Mutex<Inner>,
    started: Instant,
}

/// A connection's line in the hub; closes with it.
pub struct Line {
    /// What to tell the agent.
    pub orders: watch::Receiver<Order>,
    /// For [`Hub::status`] and [`Hub::disconnect`].
    pub number: u64,
}

impl Default for Hub {
    fn default() -> Self {
        Self { inner: Mutex::default(), started: Instant::now() }
    }
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An agent is there. `fresh`: it has just started, so what an earlier one said of this pod is void. An older
    /// connection of the same agent is replaced: its line ends.
    pub fn connect(&self, id: &str, identity: &Identity, fresh: bool) -> Line {
        let mut inner = self.lock();
        inner.connections += 1;
        let number = inner.connections;
        let entry = inner.entries.entry(id.to_owned()).or_insert_with(|| Entry {
            connection: None,
            identity: identity.clone(),
            desired: None,
            since: HashMap::new(),
            status: None,
            lost_at: None,
        });
        if fresh {
            entry.status = None;
        }
        entry.identity = identity.clone();
        entry.lost_at = None;
        // What it was told before stays true until the next reconciliation, which this connection brings about.
        let first = entry.desired.clone().map_or(Order::Wait, |desired| Order::Desired(Box::new(desired)));
        let (sender, orders) = watch::channel(first);
        entry.connection = Some((number, sender));
        Line { orders, number }
    }

    /// The connection is gone. `false` if the agent has another by now.
    pub fn disconnect(&self, id: &str, number: u64) -> bool {
        let now = Instant::now();
        let mut inner = self.lock();
        let Some(entry) = inner.entries.get_mut(id) else { return false };
        if entry.connection.as_ref().is_none_or(|(current, _)| *current != number) {
            return false;
        }
        entry.connection = None;
        entry.lost_at = Some(now);
        let laptops = entry.status.as_ref().map(|status| status.laptops.clone()).unwrap_or_default();
        inner.last_seen.extend(laptops.into_iter().map(|laptop| (laptop, now)));
        true
    }

    /// An agent says how it is. Returns whether anything changed that matters to a target's status.
    pub fn status(&self, id: &str, number: u64, status: Status) -> bool {
        let now = Instant::now();
        let mut inner = self.lock();
        let Some(entry) = inner.entries.get_mut(id) else { return false };
        if entry.connection.as_ref().is_none_or(|(current, _)| *current != number) {
            return false;
        }
        let old = entry.status.replace(status.clone());
        let left = old.iter().flat_map(|old| &old.laptops).filter(|laptop| !status.laptops.contains(laptop));
        let left: Vec<_> = left.map(|laptop| (laptop.clone(), now)).collect();
        inner.last_seen.extend(left);
        old.as_ref() != Some(&status)
    }

    /// Tells an agent what to do. The generation is the receiver's own; it grows only if something changed. An agent
    /// that is not connected hears it when it is.
    pub fn push(&self, id: &str, mut desired: Desired) {
        let mut inner = self.lock();
        let Some(entry) = inner.entries.get_mut(id) else { return };
        let old = entry.desired.take();
        let generation = old.as_ref().map_or(0, |old| old.generation);
        desired.generation = generation;
        let unchanged = old.as_ref() == Some(&desired);
        if !unchanged {
            // Wall-clock milliseconds: greater than whatever an earlier controller told it.
            desired.generation = unix_ms().max(generation + 1);
            let is_old = |route: &Route| old.as_ref().is_some_and(|old| old.routes.contains(route));
            entry.since = desired
                .routes
                .iter()
                .map(|route| {
                    let key = (route.target.clone(), route.port);
                    let known = entry.since.get(&key).copied().filter(|_| is_old(route));
                    (key, known.unwrap_or(desired.generation))
                })
                .collect();
        }
        entry.desired = Some(desired.clone());
        if let Some((_, line)) = &entry.connection {
            line.send_if_modified(|order| {
                let new = Order::Desired(Box::new(desired));
                let modified = *order != new;
                *order = new;
                modified
            });
        }
    }

    /// Tells an agent to undo its redirects and end.
    pub fn retire(&self, id: &str, reason: &str) {
        if let Some(Entry { connection: Some((_, line)), .. }) = self.lock().entries.get(id) {
            line.send_replace(Order::Retire(reason.to_owned()));
        }
    }

    /// What an agent says of a target's ports; `None` if it is not there, or has said nothing yet.
    pub fn report(&self, id: &str, target: &str, ports: &[u16]) -> Option<Report> {
        let inner = self.lock();
        let entry = inner.entries.get(id).filter(|entry| entry.counts(Instant::now()))?;
        let status = entry.status.as_ref()?;
        let mut report = Report {
            routed: status.error.is_empty() && !ports.is_empty(),
            laptops: status.laptops.iter().cloned().collect(),
            error: status.error.clone(),
            ..Report::default()
        };
        for port in ports.iter().map(|port| u32::from(*port)) {
            let since = entry.since.get(&(target.to_owned(), port));
            report.routed &= since.is_some_and(|since| *since <= status.generation);
            match status.ports.iter().find(|status| status.port == port) {
                Some(status) => {
                    report.older_connections += status.older_connections;
                    report.opaque_connections += status.opaque_connections;
                }
                None => report.routed = false,
            }
        }
        Some(report)
    }

    /// Is there a connection?
    pub fn is_connected(&self, id: &str) -> bool {
        self.lock().entries.get(id).is_some_and(|entry| entry.connection.is_some())
    }

    /// Agents in a namespace, connected or not: id and role.
    pub fn agents_in(&self, namespace: &str) -> Vec<(String, AgentRole)> {
        let inner = self.lock();
        let of = |(id, entry): (&String, &Entry)| match &entry.identity {
            Identity::Agent { namespace: found, role, .. } if found == namespace => Some((id.clone(), *role)),
            _ => None,
        };
        inner.entries.iter().filter_map(of).collect()
    }

    /// Ids of all agents in pods of applications.
    pub fn pod_agents(&self) -> Vec<String> {
        let inner = self.lock();
        let is_pod = |entry: &Entry| {
            matches!(entry.identity, Identity::Agent { role: AgentRole::Pod | AgentRole::Env, .. })
        };
        inner.entries.iter().filter(|(_, entry)| is_pod(entry)).map(|(id, _)| id.clone()).collect()
    }

    /// When the next agent that has lost its connection ceases to count.
    pub fn next_linger_end(&self) -> Option<Instant> {
        let now = Instant::now();
        let inner = self.lock();
        inner
            .entries
            .values()
            .filter_map(|entry| entry.lost_at)
            .map(|at| at + LINGER)
            .filter(|end| *end > now)
            .min()
    }

    /// Laptops that are connected to some agent.
    pub fn laptops(&self) -> HashSet<String> {
        let (inner, now) = (self.lock(), Instant::now());
        let here = inner.entries.values().filter(|entry| entry.counts(now));
        here.filter_map(|entry| entry.status.as_ref())
            .flat_map(|status| status.laptops.iter().cloned())
            .collect()
    }

    /// Since when a laptop that is connected nowhere is gone. One that was never seen counts from the start.
    pub fn gone_since(&self, laptop: &str) -> Instant {
        self.lock().last_seen.get(laptop).copied().unwrap_or(self.started)
    }

    /// How long this hub has been there: agents need a moment to come back after a restart of the controller.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// Forgets agents that have long been gone.
    pub fn forget(&self) {
        let now = Instant::now();
        let mut inner = self.lock();
        inner.entries.retain(|_, entry| entry.lost_at.is_none_or(|at| now < at + FORGET));
        // A laptop's claim is freed long before.
        inner.last_seen.retain(|_, at| now < *at + Duration::from_secs(86_400));
    }
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use forkd_wire::control::PortStatus;

    use super::*;

    fn agent() -> Identity {
        Identity::Agent {
            pod_uid: "uid".to_owned(),
            namespace: "shop".to_owned(),
            pod: "cart-1".to_owned(),
            role: AgentRole::Pod,
        }
    }

    fn route(target: &str, port: u32) -> Route {
        Route { target: target.to_owned(), port, ..Route::default() }
    }

    fn desired(routes: Vec<Route>) -> Desired {
        Desired { routes, ..Desired::default() }
    }

    fn told(line: &Line) -> Desired {
        match &*line.orders.borrow() {
            Order::Desired(desired) => (**desired).clone(),
            other => panic!("{other:?}"),
        }
    }

    fn status(generation: u64, ports: &[u32], laptops: &[&str]) -> Status {
        Status {
            generation,
            ports: ports.iter().map(|port| PortStatus { port: *port, ..PortStatus::default() }).collect(),
            laptops: laptops.iter().map(|laptop| (*laptop).to_owned()).collect(),
            error: String::new(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_target_stays_routed_while_another_one_is_added() {
        let hub = Hub::default();
        let line = hub.connect("uid", &agent(), true);
        hub.push("uid", desired(vec![route("one", 80)]));
        let first = told(&line).generation;
        assert!(!hub.report("uid", "one", &[80]).is_some_and(|report| report.routed), "nothing is said yet");
        hub.status("uid", line.number, status(first, &[80], &[]));
        assert!(hub.report("uid", "one", &[80]).unwrap().routed);
        hub.push("uid", desired(vec![route("one", 80), route("two", 80)]));
        assert!(told(&line).generation > first);
        assert!(hub.report("uid", "one", &[80]).unwrap().routed);
        assert!(!hub.report("uid", "two", &[80]).unwrap().routed, "not in effect yet");
        hub.status("uid", line.number, status(told(&line).generation, &[80], &[]));
        assert!(hub.report("uid", "two", &[80]).unwrap().routed);
    }

    #[tokio::test(start_paused = true)]
    async fn the_generation_grows_only_with_a_change() {
        let hub = Hub::default();
        let line = hub.connect("uid", &agent(), true);
        hub.push("uid", desired(vec![route("one", 80)]));
        let first = told(&line).generation;
        hub.push("uid", desired(vec![route("one", 80)]));
        assert_eq!(told(&line).generation, first);
        hub.push("uid", desired(vec![]));
        assert!(told(&line).generation > first);
    }

    #[tokio::test(start_paused = true)]
    async fn a_broken_connection_counts_for_a_moment_and_a_new_agent_starts_afresh() {
        let hub = Hub::default();
        let line = hub.connect("uid", &agent(), true);
        hub.push("uid", desired(vec![route("one", 80)]));
        hub.status("uid", line.number, status(u64::MAX, &[80], &["laptop"]));
        assert!(hub.disconnect("uid", line.number));
        assert!(hub.report("uid", "one", &[80]).unwrap().routed);
        assert!(hub.laptops().contains("laptop"));
        let back = hub.connect("uid", &agent(), false);
        assert!(hub.report("uid", "one", &[80]).unwrap().routed, "the same agent again");
        assert!(!hub.disconnect("uid", line.number), "the old connection's end is not the new one's");
        hub.disconnect("uid", back.number);
        tokio::time::advance(LINGER).await;
        assert_eq!(hub.report("uid", "one", &[80]), None);
        assert!(hub.laptops().is_empty());
        let _line = hub.connect("uid", &agent(), true);
        assert_eq!(hub.report("uid", "one", &[80]), None, "a successor has said nothing yet");
    }

    #[tokio::test(start_paused = true)]
    async fn an_older_connection_cannot_speak_for_the_agent() {
        let hub = Hub::default();
        let old = hub.connect("uid", &agent(), true);
        let mut orders = old.orders.clone();
        let _new = hub.connect("uid", &agent(), false);
        assert!(!hub.status("uid", old.number, status(1, &[], &["laptop"])));
        assert!(orders.changed().await.is_err(), "its line ends");
    }

    #[tokio::test(start_paused = true)]
    async fn a_laptop_is_gone_since_it_was_seen_last() {
        let hub = Hub::default();
        let line = hub.connect("uid", &agent(), true);
        assert_eq!(hub.gone_since("laptop"), Instant::now());
        tokio::time::advance(Duration::from_secs(100)).await;
        hub.status("uid", line.number, status(1, &[], &["laptop"]));
        tokio::time::advance(Duration::from_secs(100)).await;
        hub.status("uid", line.number, status(1, &[], &[]));
        assert_eq!(hub.gone_since("laptop"), Instant::now());
        assert!(!hub.laptops().contains("laptop"));
    }
}
