//! The cluster as the controller's watches see it.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use forkd_api::{Fork, ForkTarget, SYSTEM_NAMESPACE};

use super::queue::{Key, Queue};
use super::view::{NodeView, PodView, ServiceView};

/// Objects of one kind by namespace and name. Those without a namespace stand under "".
#[derive(Debug)]
pub struct Table<V>(HashMap<String, BTreeMap<String, Arc<V>>>);

impl<V> Default for Table<V> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<V> Table<V> {
    /// All of a namespace, by name.
    pub fn of(&self, namespace: &str) -> impl Iterator<Item = &Arc<V>> {
        self.0.get(namespace).into_iter().flat_map(BTreeMap::values)
    }

    /// One object.
    pub fn one(&self, namespace: &str, name: &str) -> Option<&Arc<V>> {
        self.0.get(namespace)?.get(name)
    }

    /// All of all namespaces.
    pub fn all(&self) -> impl Iterator<Item = &Arc<V>> {
        self.0.values().flat_map(BTreeMap::values)
    }

    fn set(&mut self, namespace: &str, name: &str, value: Option<Arc<V>>) -> Option<Arc<V>> {
        match value {
            Some(value) => self.0.entry(namespace.to_owned()).or_default().insert(name.to_owned(), value),
            None => {
                let names = self.0.get_mut(namespace)?;
                let old = names.remove(name);
                if names.is_empty() {
                    self.0.remove(namespace);
                }
                old
            }
        }
    }

    /// Namespace and name of all that are not in `seen`.
    fn missing_from(&self, seen: &HashSet<(String, String)>) -> Vec<(String, String)> {
        let all = self
            .0
            .iter()
            .flat_map(|(namespace, names)| names.keys().map(|name| (namespace.clone(), name.clone())));
        all.filter(|key| !seen.contains(key)).collect()
    }
}

/// Whose an address is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A cluster IP of a Service in this namespace.
    Service(String),
    /// A pod with an address of its own, in this namespace.
    Pod(String),
    /// A node: the host network, kubelet, node ports.
    Node,
}

/// Everything that is watched.
#[derive(Debug, Default)]
pub struct State {
    pub pods: Table<PodView>,
    pub services: Table<ServiceView>,
    pub nodes: Table<NodeView>,
    pub targets: Table<ForkTarget>,
    pub forks: Table<Fork>,
    /// Ranges of Services, by the name of their ServiceCIDR.
    pub service_cidrs: Table<Vec<String>>,
    /// `forkd uninstall` is at work: agents are to go, and none is to come.
    pub retiring: bool,
    pods_by_ip: HashMap<IpAddr, (String, String)>,
    services_by_ip: HashMap<IpAddr, String>,
}

impl State {
    /// Whose an address is; `None` if it is nobody's in this cluster.
    pub fn place(&self, ip: IpAddr) -> Option<Place> {
        if let Some(namespace) = self.services_by_ip.get(&ip) {
            return Some(Place::Service(namespace.clone()));
        }
        if let Some((namespace, _)) = self.pods_by_ip.get(&ip) {
            return Some(Place::Pod(namespace.clone()));
        }
        self.nodes.all().any(|node| node.ips.contains(&ip)).then_some(Place::Node)
    }

    /// The pods of one of forkd's own roles.
    pub fn own_pods<'a>(&'a self, role: &'a str) -> impl Iterator<Item = &'a Arc<PodView>> {
        self.pods.of(SYSTEM_NAMESPACE).filter(move |pod| is_own(pod, role))
    }

    fn has_targets(&self, namespace: &str) -> bool {
        self.targets.of(namespace).next().is_some()
    }

    /// Namespaces with targets.
    pub fn target_namespaces(&self) -> BTreeSet<String> {
        self.targets.all().filter_map(|target| target.metadata.namespace.clone()).collect()
    }
}

/// [`State`], shared, and the queue that hears of each change.
#[derive(Debug)]
pub struct World {
    state: RwLock<State>,
    queue: Arc<Queue>,
}

impl World {
    /// Nothing is known yet.
    pub fn new(queue: Arc<Queue>) -> Self {
        Self { state: RwLock::default(), queue }
    }

    /// What is known. Held for short, never across an await.
    pub fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts in, replaces or (without a value) takes out one object.
    pub fn set<V: Watched>(&self, namespace: &str, name: &str, value: Option<V>) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if value.as_ref() == V::table(&mut state).one(namespace, name).map(Arc::as_ref) {
            return;
        }
        let new = value.map(Arc::new);
        let old = V::table(&mut state).set(namespace, name, new.clone());
        V::changed(&mut state, (namespace, name), old.as_deref(), new.as_deref(), &self.queue);
    }

    /// After a complete listing: takes out what it did not name.
    pub fn retain<V: Watched>(&self, seen: &HashSet<(String, String)>) {
        let missing = {
            let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
            V::table(&mut state).missing_from(seen)
        };
        for (namespace, name) in missing {
            self.set::<V>(&namespace, &name, None);
        }
    }

    /// Says that `forkd uninstall` is at work, or no longer.
    pub fn set_retiring(&self, retiring: bool) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if state.retiring != retiring {
            state.retiring = retiring;
            mark_all(&state, &self.queue);
        }
    }
}

/// A kind of object in [`State`], and what depends on it.
pub trait Watched: PartialEq + Sized {
    /// Where it is kept.
    fn table(state: &mut State) -> &mut Table<Self>;
    /// After a change: keeps the indices and says what is to be looked at again.
    fn changed(state: &mut State, key: (&str, &str), old: Option<&Self>, new: Option<&Self>, queue: &Queue);
}

impl Watched for PodView {
    fn table(state: &mut State) -> &mut Table<Self> {
        &mut state.pods
    }

    fn changed(state: &mut State, key: (&str, &str), old: Option<&Self>, new: Option<&Self>, queue: &Queue) {
        let (namespace, name) = key;
        let owner = (namespace.to_owned(), name.to_owned());
        for ip in old.into_iter().flat_map(|pod| &pod.ips) {
            if state.pods_by_ip.get(ip) == Some(&owner) {
                state.pods_by_ip.remove(ip);
            }
        }
        let holds = |pod: &&Self| !pod.host_network && !pod.finished;
        let mut new_range = false;
        for ip in new.filter(holds).into_iter().flat_map(|pod| &pod.ips) {
            state.pods_by_ip.insert(*ip, owner.clone());
            new_range |= !old.is_some_and(|old| old.ips.contains(ip));
        }
        if state.has_targets(namespace) {
            queue.mark(Key::Namespace(namespace.to_owned()));
        }
        if [old, new].into_iter().flatten().any(|pod| is_own(pod, "relay")) {
            mark_all(state, queue);
        } else if new_range {
            queue.mark(Key::Cluster);
        }
    }
}

impl Watched for ServiceView {
    fn table(state: &mut State) -> &mut Table<Self> {
        &mut state.services
    }

    fn changed(state: &mut State, key: (&str, &str), old: Option<&Self>, new: Option<&Self>, queue: &Queue) {
        old.into_iter().flat_map(|service| &service.ips).for_each(|ip| {
            state.services_by_ip.remove(ip);
        });
        for ip in new.into_iter().flat_map(|service| &service.ips) {
            state.services_by_ip.insert(*ip, key.0.to_owned());
        }
        if state.has_targets(key.0) {
            queue.mark(Key::Namespace(key.0.to_owned()));
        }
        if key.0 == "kube-system" {
            queue.mark(Key::Cluster);
        }
    }
}

impl Watched for NodeView {
    fn table(state: &mut State) -> &mut Table<Self> {
        &mut state.nodes
    }

    fn changed(_: &mut State, _: (&str, &str), _: Option<&Self>, _: Option<&Self>, queue: &Queue) {
        queue.mark(Key::Cluster);
    }
}

impl Watched for Vec<String> {
    fn table(state: &mut State) -> &mut Table<Self> {
        &mut state.service_cidrs
    }

    fn changed(_: &mut State, _: (&str, &str), _: Option<&Self>, _: Option<&Self>, queue: &Queue) {
        queue.mark(Key::Cluster);
    }
}

impl Watched for ForkTarget {
    fn table(state: &mut State) -> &mut Table<Self> {
        &mut state.targets
    }

    fn changed(_: &mut State, key: (&str, &str), old: Option<&Self>, new: Option<&Self>, queue: &Queue) {
        queue.mark(Key::Namespace(key.0.to_owned()));
        for target in [old, new].into_iter().flatten() {
            queue.mark(Key::Fork(target.spec.fork.clone()));
        }
    }
}

impl Watched for Fork {
    fn table(state: &mut State) -> &mut Table<Self> {
        &mut state.forks
    }

    fn changed(state: &mut State, key: (&str, &str), _: Option<&Self>, _: Option<&Self>, queue: &Queue) {
        queue.mark(Key::Fork(key.1.to_owned()));
        for target in state.targets.all().filter(|target| target.spec.fork == key.1) {
            queue.mark(Key::Namespace(target.metadata.namespace.clone().unwrap_or_default()));
        }
    }
}

fn is_own(pod: &PodView, role: &str) -> bool {
    let label = |key: &str, value: &str| pod.labels.get(key).is_some_and(|found| found == value);
    pod.namespace == SYSTEM_NAMESPACE
        && label("app.kubernetes.io/name", "forkd")
        && label("app.kubernetes.io/component", role)
}

fn mark_all(state: &State, queue: &Queue) {
    queue.mark(Key::Cluster);
    state.target_namespaces().into_iter().for_each(|namespace| queue.mark(Key::Namespace(namespace)));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(namespace: &str, name: &str, ip: &str) -> PodView {
        PodView {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            ips: vec![ip.parse().unwrap()],
            ..PodView::default()
        }
    }

    #[test]
    fn an_address_belongs_to_the_pod_that_has_it_last() {
        let world = World::new(Arc::default());
        let ip = "10.244.0.7".parse().unwrap();
        world.set("a", "old", Some(pod("a", "old", "10.244.0.7")));
        assert_eq!(world.read().place(ip), Some(Place::Pod("a".to_owned())));
        world.set("a", "old", Some(PodView { finished: true, ..pod("a", "old", "10.244.0.7") }));
        assert_eq!(world.read().place(ip), None, "a finished pod has given it back");
        world.set("b", "new", Some(pod("b", "new", "10.244.0.7")));
        world.set::<PodView>("a", "old", None);
        assert_eq!(
            world.read().place(ip),
            Some(Place::Pod("b".to_owned())),
            "the old pod's end changes nothing"
        );
    }

    #[test]
    fn a_pod_of_the_host_network_has_no_address_of_its_own() {
        let world = World::new(Arc::default());
        let ip = "192.0.2.10".parse().unwrap();
        world.set(
            "kube-system",
            "proxy",
            Some(PodView { host_network: true, ..pod("kube-system", "proxy", "192.0.2.10") }),
        );
        assert_eq!(world.read().place(ip), None);
        world.set("", "node", Some(NodeView { ips: vec![ip], ..NodeView::default() }));
        assert_eq!(world.read().place(ip), Some(Place::Node));
    }

    #[test]
    fn what_a_new_listing_does_not_name_is_gone() {
        let world = World::new(Arc::default());
        world.set("a", "one", Some(pod("a", "one", "10.0.0.1")));
        world.set("a", "two", Some(pod("a", "two", "10.0.0.2")));
        world.retain::<PodView>(&HashSet::from([("a".to_owned(), "two".to_owned())]));
        assert_eq!(world.read().place("10.0.0.1".parse().unwrap()), None);
        assert!(world.read().place("10.0.0.2".parse().unwrap()).is_some());
    }
}
