//! Taking a Service's requests and giving them back.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use forkd_api::{ForkTarget, ForkTargetSpec, OnUnavailable, TargetPort as SpecPort, Traffic, names};
use forkd_tunnel::identity::Identity;
use forkd_tunnel::stream;
use forkd_wire::tunnel::{Environment, Open, open};
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::claim::{Claimant, Readiness, readiness};
use crate::control::{Intercept, Intercepted, InterceptedPort, Leave, LeftTarget, Progress};
use crate::dataplane::SharedPlane;
use crate::deliver::{self, Delivery, Targets};
use crate::failure::{Exit, Failure};
use crate::kubernetes::{self, Watched};
use crate::ports::{self, Mapping, PortError, TargetPort};
use crate::session::Problems;
use crate::status;

/// The agent that reads the environment is there and ready when the target is; the way to it takes a few packets.
const ENVIRONMENT: Duration = Duration::from_secs(20);
/// The kernel's bound for environment and arguments (ARG_MAX) is 2 MiB.
const MAX_ENVIRONMENT: usize = 2 * 1024 * 1024;
/// Between attempts to take back a claim that someone deleted.
const RECLAIM: Duration = Duration::from_secs(5);

/// Namespace, Service, fork.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    namespace: String,
    service: String,
    fork: String,
}

struct Held {
    /// Grows: the newest intercept's pods carry new flows.
    order: u64,
    uid: String,
    spec: ForkTargetSpec,
    ports: Vec<InterceptedPort>,
    delivery: Delivery,
    made_fork: bool,
    attached: bool,
    /// As last seen.
    seen: Option<ForkTarget>,
    /// Follows the object; ended with this.
    follow: Option<AbortHandle>,
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(follow) = &self.follow {
            follow.abort();
        }
    }
}

/// The intercepts of one session. Cheap to clone.
#[derive(Clone)]
pub struct Intercepts(Arc<Shared>);

struct Shared {
    claimant: Claimant,
    plane: SharedPlane,
    targets: Targets,
    problems: Problems,
    held: Mutex<BTreeMap<Key, Held>>,
}

impl Shared {
    fn held(&self) -> MutexGuard<'_, BTreeMap<Key, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of what the API server says about a held target.
    fn observe(&self, key: &Key, target: &ForkTarget) {
        let mut held = self.held();
        let Some(mine) = held.get_mut(key) else { return };
        mine.seen = Some(target.clone());
        let mut newest_first: Vec<&Held> = held.values().collect();
        newest_first.sort_unstable_by_key(|held| std::cmp::Reverse(held.order));
        let pods = newest_first
            .iter()
            .filter_map(|held| held.seen.as_ref()?.status.as_ref())
            .flat_map(|status| status.pods.values().map(|pod| pod.uid.clone()))
            .collect();
        drop(newest_first);
        drop(held);
        self.plane.prefer(pods);
    }

    fn forget(&self, key: &Key) -> Option<Held> {
        let held = self.held().remove(key)?;
        self.targets.remove(&held.uid);
        self.problems.set(&format!("{}.{}", key.service, key.namespace), None);
        Some(held)
    }
}

impl Intercepts {
    /// None yet.
    pub fn new(claimant: Claimant, plane: SharedPlane, targets: Targets, problems: Problems) -> Self {
        Self(Arc::new(Shared { claimant, plane, targets, problems, held: Mutex::default() }))
    }

    /// The fork's id: as wished, or made of the user's login, or of what the API server calls them.
    ///
    /// # Errors
    /// [`Failure`] for an id that is none.
    pub fn fork_id(&self, wished: Option<&str>) -> Result<String, Failure> {
        match wished {
            Some(id) if names::fork_id(id).as_deref() == Some(id) => Ok(id.to_owned()),
            Some(id) => {
                let failure = Failure::new(format!("`{id}` is no id of a fork"))
                    .because("an id is at most 40 characters: lower-case letters, digits, and hyphens between them")
                    .exit(Exit::Usage);
                Err(match names::fork_id(id) {
                    Some(near) => failure.advice(format!("--fork {near}")),
                    None => failure,
                })
            }
            None => std::env::var("USER")
                .ok()
                .and_then(|user| names::fork_id(&user))
                .or_else(|| names::fork_id(&self.0.claimant.owner))
                .ok_or_else(|| {
                    Failure::new("cannot make a fork id of your user name")
                        .advice("choose one with --fork")
                        .exit(Exit::Usage)
                }),
        }
    }

    /// Takes a Service's requests, in this order: what the Service is; the claim; the agents; the environment.
    ///
    /// # Errors
    /// [`Failure`] of the first step that fails. What was done until then is *not* undone: see [`Self::leave`].
    pub async fn intercept(
        &self,
        wanted: &Intercept,
        namespace: String,
        progress: &Progress,
    ) -> Result<Intercepted, Failure> {
        let shared = &self.0;
        let key =
            Key { namespace, service: wanted.service.clone(), fork: self.fork_id(wanted.fork.as_deref())? };
        let cannot = format!("cannot intercept {} in {}", key.service, key.namespace);
        if shared.held().get(&key).is_some_and(|held| held.attached) {
            return Err(Failure::new(cannot)
                .because(format!(
                    "another `forkd intercept` on this laptop serves it in the fork {}",
                    key.fork
                ))
                .advice("end that command, or choose another fork with --fork"));
        }
        progress.step(format!("{}: looking at the Service", key.service));
        let (mappings, container_ports) = self.resolve(&key, wanted, &cannot).await?;
        if !wanted.attached {
            warn_about_silent_ports(&mappings, progress).await;
        }

        let spec = ForkTargetSpec {
            fork: key.fork.clone(),
            owner: shared.claimant.owner.clone(),
            service: key.service.clone(),
            ports: mappings
                .iter()
                .map(|m| SpecPort { port: m.port.into(), laptop_port: m.laptop.into() })
                .collect(),
            traffic: if wanted.all { Traffic::All } else { Traffic::Keyed },
            on_unavailable: if wanted.baseline_when_gone {
                OnUnavailable::Baseline
            } else {
                OnUnavailable::Error
            },
            laptop: shared.claimant.laptop.clone(),
            environment_of: wanted.environment.then(String::new),
        };
        progress.step(format!("{}: claiming it for the fork {}", key.service, key.fork));
        let (fork, made_fork) =
            shared.claimant.fork(&key.fork).await.map_err(|failure| failure.while_doing(&cannot))?;
        let target = shared.claimant.claim(&key.namespace, &fork, spec.clone()).await?;
        let delivery = Delivery {
            namespace: key.namespace.clone(),
            service: key.service.clone(),
            ports: container_ports,
        };
        let ports: Vec<InterceptedPort> = mappings
            .iter()
            .map(|m| InterceptedPort { port: m.port, laptop_port: m.laptop, http: m.http })
            .collect();
        self.hold(&key, &target, spec, ports.clone(), delivery, made_fork, wanted.attached);

        let target =
            shared.claimant.ready(&key.namespace, &key.service, &target.name_any(), progress).await?;
        shared.observe(&key, &target);
        let environment = match wanted.environment {
            true => {
                self.environment(&target, progress).await.map_err(|failure| failure.while_doing(&cannot))?
            }
            false => Vec::new(),
        };
        say_what_stays(&target, progress).await;
        tracing::info!(service = key.service, namespace = key.namespace, fork = key.fork, "intercepted");
        Ok(Intercepted {
            fork: key.fork,
            namespace: key.namespace,
            service: key.service,
            ports,
            all: wanted.all,
            routed: target.status.map(|status| status.routed).unwrap_or_default(),
            environment,
        })
    }

    /// The Service's ports, and the numbers that they have in containers.
    async fn resolve(
        &self,
        key: &Key,
        wanted: &Intercept,
        cannot: &str,
    ) -> Result<(Vec<Mapping>, BTreeMap<u16, u16>), Failure> {
        let client = &self.0.claimant.client;
        let services = Api::<Service>::namespaced(client.clone(), &key.namespace);
        let service = match services.get_opt(&key.service).await {
            Ok(Some(service)) => service,
            Ok(None) => return Err(no_such_service(&services, key, cannot).await),
            Err(error) => return Err(kubernetes::failure(cannot, &error)),
        };
        let selector = service.spec.as_ref().and_then(|spec| spec.selector.clone()).unwrap_or_default();
        if selector.is_empty() {
            return Err(Failure::new(cannot)
                .because("the Service selects no pods (it has no selector), so there is no pod to act as")
                .advice("intercept the Service that its traffic goes to"));
        }
        let mappings = ports::resolve(&service, &wanted.ports, wanted.all).map_err(|error| {
            let failure = Failure::new(cannot).because(&error);
            match error {
                PortError::Ambiguous { .. } => {
                    failure.advice("say which: --port LAPTOP:REMOTE").exit(Exit::Usage)
                }
                PortError::NoSuchPort { .. } => {
                    failure.advice("--port LAPTOP:REMOTE with one of them").exit(Exit::Usage)
                }
                PortError::Twice { .. } => failure.exit(Exit::Usage),
                PortError::NotHttp { .. } => {
                    failure.advice("take everything that comes to it, of everybody: --all").exit(Exit::Usage)
                }
                PortError::NoPorts | PortError::NotTcp { .. } => failure,
            }
        })?;
        let labels: Vec<String> = selector.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let only = ListParams::default().labels(&labels.join(","));
        let pods = Api::<Pod>::namespaced(client.clone(), &key.namespace)
            .list(&only)
            .await
            .map_err(|error| kubernetes::failure(cannot, &error))?;
        if pods.items.is_empty() {
            return Err(Failure::new(cannot)
                .because(format!(
                    "no pod runs for it: nothing in {} has the labels {}",
                    key.namespace,
                    labels.join(",")
                ))
                .advice(format!(
                    "start one, e.g. `kubectl scale deployment -n {} --replicas=1 …`",
                    key.namespace
                )));
        }
        let container_ports = container_ports(&mappings, &pods.items);
        if container_ports.is_empty() {
            return Err(
                Failure::new(cannot).because("no container has a port of the name that the Service names")
            );
        }
        Ok((mappings, container_ports))
    }

    #[expect(clippy::too_many_arguments, reason = "one caller; a struct would be `Held` once more")]
    fn hold(
        &self,
        key: &Key,
        target: &ForkTarget,
        spec: ForkTargetSpec,
        ports: Vec<InterceptedPort>,
        delivery: Delivery,
        made_fork: bool,
        attached: bool,
    ) {
        let shared = &self.0;
        let uid = target.uid().unwrap_or_default();
        let before = shared.forget(key);
        shared.targets.put(uid.clone(), delivery.clone());
        let mut held = shared.held();
        let order = held.values().map(|held| held.order).max().unwrap_or_default() + 1;
        let follow = tokio::spawn(follow(Arc::downgrade(shared), key.clone(), target.name_any()));
        let made_fork = made_fork || before.is_some_and(|before| before.made_fork);
        let mine = Held {
            order,
            uid,
            spec,
            ports,
            delivery,
            made_fork,
            attached,
            seen: Some(target.clone()),
            follow: Some(follow.abort_handle()),
        };
        held.insert(key.clone(), mine);
    }

    async fn environment(&self, target: &ForkTarget, progress: &Progress) -> Result<Vec<Vec<u8>>, Failure> {
        progress.step("reading the container's environment");
        let cannot = || Failure::new("cannot read the container's environment");
        let uri = target.status.as_ref().and_then(|status| status.environment_agent.clone());
        let uri = uri.ok_or_else(|| cannot().because("no agent reads it"))?;
        let agent = Identity::parse(&uri).map_err(|error| cannot().caused_by(&error))?;
        let mut connections = self.0.plane.connections();
        let found =
            async { connections.wait_for(|all| all.contains_key(&agent)).await.ok()?.get(&agent).cloned() };
        let connection = tokio::time::timeout(ENVIRONMENT, found).await.map_err(|_| {
            cannot()
                .because(format!("no way to {} within {} s", agent.short(), ENVIRONMENT.as_secs()))
                .advice("without it: --no-env")
        })?;
        let connection = connection.ok_or_else(|| cannot().because("the session ended"))?;
        let ask = Open { kind: Some(open::Kind::Environment(Environment {})) };
        let read = async {
            let (_send, mut recv) = stream::open(&connection, ask).await.map_err(|error| {
                cannot()
                    .caused_by(&error)
                    .advice("it needs `create pods/exec` in the namespace; without the environment: --no-env")
            })?;
            recv.read_to_end(MAX_ENVIRONMENT).await.map_err(|error| cannot().caused_by(&error))
        };
        let bytes = tokio::time::timeout(ENVIRONMENT, read)
            .await
            .map_err(|_| cannot().because("its agent does not answer").advice("without it: --no-env"))??;
        // `NAME=value`, each ended by a NUL (proc(5)).
        Ok(bytes.split(|byte| *byte == 0).filter(|entry| !entry.is_empty()).map(<[u8]>::to_vec).collect())
    }

    /// Gives a Service's requests back: all intercepts of it that match.
    ///
    /// # Errors
    /// [`Failure`]: there is none, or the API server.
    pub async fn leave(
        &self,
        leave: &Leave,
        namespace: String,
        progress: &Progress,
    ) -> Result<Vec<LeftTarget>, Failure> {
        let matching: Vec<Key> = {
            let held = self.0.held();
            let matches = |key: &&Key| {
                key.service == leave.service
                    && key.namespace == namespace
                    && leave.fork.as_ref().is_none_or(|fork| *fork == key.fork)
            };
            held.keys().filter(matches).cloned().collect()
        };
        if matching.is_empty() {
            return Err(Failure::new(format!(
                "{} in {namespace} is not intercepted by this laptop",
                leave.service
            ))
            .advice("`forkd list` shows what is"));
        }
        let mut left = Vec::new();
        for key in matching {
            left.push(self.give_back(&key, progress).await?);
        }
        Ok(left)
    }

    /// Gives all back. Goes on where one fails.
    ///
    /// # Errors
    /// The first [`Failure`].
    pub async fn leave_all(&self, progress: &Progress) -> (Vec<LeftTarget>, Option<Failure>) {
        let all: Vec<Key> = self.0.held().keys().cloned().collect();
        let (mut left, mut failed) = (Vec::new(), None);
        for key in all {
            match self.give_back(&key, progress).await {
                Ok(one) => left.push(one),
                Err(failure) => failed = failed.or(Some(failure)),
            }
        }
        (left, failed)
    }

    /// Undoes an intercept whose command went away, however far it had come.
    pub async fn abandon(&self, wanted: &Intercept, namespace: String) {
        let Ok(fork) = self.fork_id(wanted.fork.as_deref()) else { return };
        let key = Key { namespace, service: wanted.service.clone(), fork };
        // One that another command holds is not this one's to undo.
        if self.0.held().get(&key).is_some_and(|held| held.attached && !wanted.attached) {
            return;
        }
        tracing::info!(service = key.service, fork = key.fork, "the command is gone");
        let (progress, _unheard) = Progress::channel();
        if let Err(failure) = self.give_back(&key, &progress).await {
            self.0.problems.set(&format!("{}.{}", key.service, key.namespace), Some(failure.one_line()));
        }
    }

    async fn give_back(&self, key: &Key, progress: &Progress) -> Result<LeftTarget, Failure> {
        progress.step(format!("leaving {}", key.service));
        let made_fork = self.0.forget(key).is_some_and(|held| held.made_fork);
        let others = self.0.held().keys().any(|other| other.fork == key.fork);
        self.0.claimant.release(&key.namespace, &key.service, &key.fork, made_fork && !others).await?;
        tracing::info!(service = key.service, namespace = key.namespace, fork = key.fork, "left");
        Ok(LeftTarget {
            namespace: key.namespace.clone(),
            service: key.service.clone(),
            fork: key.fork.clone(),
        })
    }

    /// As `forkd list` and `status` show them, newest last.
    pub fn list(&self) -> Vec<status::Intercept> {
        let held = self.0.held();
        let mut sorted: Vec<(&Key, &Held)> = held.iter().collect();
        sorted.sort_unstable_by_key(|(_, held)| held.order);
        sorted.into_iter().map(|(key, held)| describe(key, held)).collect()
    }
}

fn describe(key: &Key, held: &Held) -> status::Intercept {
    let status = held.seen.as_ref().and_then(|target| target.status.as_ref());
    let (ready, message) = match held.seen.as_ref().map(readiness) {
        Some(Readiness::Ready) => (true, String::new()),
        Some(Readiness::Waiting(message) | Readiness::Failed { message, .. }) => (false, message),
        None => (false, "someone deleted the ForkTarget; it is being made again".to_owned()),
    };
    status::Intercept {
        fork: key.fork.clone(),
        namespace: key.namespace.clone(),
        service: key.service.clone(),
        ports: held.ports.clone(),
        all: held.spec.traffic == Traffic::All,
        attached: held.attached,
        ready,
        message,
        routed: status.map(|status| status.routed.clone()).unwrap_or_default(),
        older_connections: status.iter().flat_map(|s| s.pods.values()).map(|pod| pod.older_connections).sum(),
    }
}

/// Follows the object of a held target; makes it again when someone deleted it, e.g. the controller while the laptop
/// slept.
async fn follow(shared: Weak<Shared>, key: Key, name: String) {
    // Long enough to be rare, short enough for tokio's timer; a watch is opened anew much more often.
    const LONG: Duration = Duration::from_secs(24 * 3600);
    loop {
        let Some(client) = shared.upgrade().map(|shared| shared.claimant.client.clone()) else { return };
        let api = Api::<ForkTarget>::namespaced(client, &key.namespace);
        let gone = kubernetes::wait_for(&api, &name, Instant::now() + LONG, |target| match target {
            Watched::Object(target) => {
                shared.upgrade()?.observe(&key, target);
                None
            }
            Watched::Deleted => Some(()),
        })
        .await;
        let Some(shared) = shared.upgrade() else { return };
        let about = format!("{}.{}", key.service, key.namespace);
        match gone {
            Ok(()) => {
                let failed = reclaim(&shared, &key).await.err();
                shared.problems.set(&about, failed.map(|failure| failure.one_line()));
            }
            Err(kubernetes::WaitError::TimedOut) => {}
            Err(kubernetes::WaitError::Api(error)) => {
                shared.problems.set(&about, Some(format!("cannot follow the ForkTarget: {error}")));
            }
        }
        drop(shared);
        tokio::time::sleep(RECLAIM).await;
    }
}

async fn reclaim(shared: &Shared, key: &Key) -> Result<(), Failure> {
    let Some(spec) = shared.held().get_mut(key).map(|held| {
        held.seen = None;
        held.spec.clone()
    }) else {
        return Ok(());
    };
    let (fork, made) = shared.claimant.fork(&key.fork).await?;
    let target = shared.claimant.claim(&key.namespace, &fork, spec).await?;
    let uid = target.uid().unwrap_or_default();
    let mut all = shared.held();
    let Some(held) = all.get_mut(key) else { return Ok(()) };
    shared.targets.remove(&held.uid);
    shared.targets.put(uid.clone(), held.delivery.clone());
    held.uid = uid;
    held.made_fork |= made;
    tracing::info!(service = key.service, fork = key.fork, "claimed again");
    Ok(())
}

/// Container port → laptop port. A name may stand for another number in each pod.
fn container_ports(mappings: &[Mapping], pods: &[Pod]) -> BTreeMap<u16, u16> {
    let mut ports = BTreeMap::new();
    for mapping in mappings {
        match &mapping.target {
            TargetPort::Number(number) => {
                ports.insert(*number, mapping.laptop);
            }
            TargetPort::Name(name) => {
                let containers = pods.iter().filter_map(|pod| pod.spec.as_ref()).flat_map(|spec| {
                    // A sidecar is an init container that goes on; it may have the port, too.
                    spec.containers.iter().chain(spec.init_containers.iter().flatten())
                });
                let named = containers
                    .flat_map(|container| container.ports.iter().flatten())
                    .filter(|port| port.name.as_deref() == Some(name))
                    .filter_map(|port| u16::try_from(port.container_port).ok());
                ports.extend(named.map(|number| (number, mapping.laptop)));
            }
        }
    }
    ports
}

async fn no_such_service(services: &Api<Service>, key: &Key, cannot: &str) -> Failure {
    let failure = Failure::new(cannot)
        .because(format!("there is no Service {} in the namespace {}", key.service, key.namespace));
    // Only to help: users who may not list get the message without it.
    let names: Vec<String> = match services.list(&ListParams::default()).await {
        Ok(list) => list.items.iter().map(ResourceExt::name_any).collect(),
        Err(_) => Vec::new(),
    };
    let near = similar(&key.service, &names);
    match (near.is_empty(), names.is_empty()) {
        (false, _) => failure.advice(format!("did you mean {}?", near.join(" or "))),
        (true, false) => failure.advice(format!("there are: {}; others with --namespace", names.join(", "))),
        (true, true) => failure.advice("name the Service's namespace with --namespace"),
    }
}

/// Names that a typing error or a left-out part may have come from, best first, three at most.
fn similar(wanted: &str, names: &[String]) -> Vec<String> {
    let mut near: Vec<(usize, &String)> = names
        .iter()
        .filter_map(|name| {
            let distance = edits(wanted, name);
            let part = name.contains(wanted) || wanted.contains(name.as_str());
            (part || distance <= wanted.len().div_ceil(3)).then_some((distance, name))
        })
        .collect();
    near.sort_unstable();
    near.into_iter().take(3).map(|(_, name)| name.clone()).collect()
}

/// Edits from one text to the other (Levenshtein), by bytes: names of Services are ASCII.
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let change = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// Without a command the process may come later; that it is not there yet is worth a word.
async fn warn_about_silent_ports(mappings: &[Mapping], progress: &Progress) {
    for mapping in mappings {
        if deliver::connect(mapping.laptop).await.is_err() {
            progress
                .note(format!(
                    "nothing listens on port {} of this laptop yet; requests fail until something does",
                    mapping.laptop
                ))
                .await;
        }
    }
}

async fn say_what_stays(target: &ForkTarget, progress: &Progress) {
    let Some(status) = &target.status else { return };
    let older: u32 = status.pods.values().map(|pod| pod.older_connections).sum();
    if older > 0 {
        progress
            .note(format!(
                "{older} connection{} from before the intercept stay{} with the pod; their requests do not come here until they close",
                if older == 1 { "" } else { "s" },
                if older == 1 { "s" } else { "" },
            ))
            .await;
    }
    if status.pods.values().any(|pod| pod.opaque_connections > 0) {
        progress
            .note("some connections turned out not to be HTTP: they stay with the pod (--all takes them)")
            .await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{Container, ContainerPort, PodSpec};

    fn pod(name: &str, number: i32) -> Pod {
        let port = ContainerPort { name: Some(name.into()), container_port: number, ..Default::default() };
        let container = Container { ports: Some(vec![port]), ..Default::default() };
        Pod {
            spec: Some(PodSpec { containers: vec![container], ..Default::default() }),
            ..Default::default()
        }
    }

    #[test]
    fn a_named_port_leads_to_the_laptop_by_every_number_it_has() {
        let mapping = Mapping { port: 80, target: TargetPort::Name("web".into()), laptop: 3000, http: true };
        let pods = [pod("web", 8080), pod("web", 9090), pod("admin", 1)];
        assert_eq!(container_ports(&[mapping], &pods), [(8080, 3000), (9090, 3000)].into());
    }

    #[test]
    fn a_typing_error_is_met_with_the_names_that_come_near() {
        let names = ["cart", "card", "price", "web", "cart-admin"].map(str::to_owned);
        assert_eq!(similar("crat", &names), ["card", "cart"]);
        assert_eq!(similar("cart-v2", &names), ["cart"]);
        assert!(similar("stock", &names).is_empty());
        assert_eq!((edits("", "abc"), edits("cart", "cart"), edits("kitten", "sitting")), (3, 0, 3));
    }
}
