//! Taking a Service's requests and giving them back.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use forkd_api::{
    ForkTarget, ForkTargetSpec, OnUnavailable, TargetPort as SpecPort, Traffic, condition, names,
};
use forkd_tunnel::identity::Identity;
use forkd_tunnel::stream::{self, OpenError};
use forkd_wire::tunnel::{Environment, Open, Outcome, open};
use kube::{Api, ResourceExt};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::claim::{Claimant, Readiness, readiness};
use crate::control::{Intercept, Intercepted, InterceptedPort, Leave, LeftTarget, Progress};
use crate::dataplane::SharedPlane;
use crate::deliver::{self, Delivery, Targets};
use crate::failure::{Exit, Failure};
use crate::kubernetes::{self, Watched};
use crate::ports::Mapping;
use crate::service;
use crate::session::Problems;
use crate::status;

/// The agent that reads the environment is there and ready when the target is; the way to it takes a few packets.
const ENVIRONMENT: Duration = Duration::from_secs(20);
/// The kernel's bound for environment and arguments (ARG_MAX) is 2 MiB.
const MAX_ENVIRONMENT: usize = 2 * 1024 * 1024;
/// Between attempts to take back a claim that has gone.
const RECLAIM: Duration = Duration::from_secs(5);
/// The controller frees no claim of a laptop that it saw more recently than this; its own grace is longer.
const FREED_AFTER: Duration = Duration::from_secs(60);

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
    /// Until when the controller said that this laptop is connected to the target's agents, if it no longer does. By
    /// the wall clock, which goes on while the laptop sleeps.
    connected_until: Option<SystemTime>,
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
        if mine.seen.as_ref().is_some_and(says_connected) {
            mine.connected_until = Some(SystemTime::now());
        }
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

    /// Whether this laptop was connected to the target's agents a moment ago: then it was not the controller that freed
    /// the claim. The moment is long enough for a Fork whose target says so first and goes away next.
    fn was_connected(&self, key: &Key) -> bool {
        let held = self.held();
        let Some(mine) = held.get(key) else { return false };
        mine.seen.as_ref().is_some_and(says_connected)
            || mine.connected_until.is_some_and(|at| at.elapsed().is_ok_and(|since| since < FREED_AFTER))
    }

    /// Whether the fork goes with this intercept, which is forgotten: it goes with the last one, whichever made it.
    fn fork_goes(&self, key: &Key, made: bool) -> bool {
        match self.held().iter_mut().find(|(other, _)| other.fork == key.fork) {
            Some((_, heir)) => {
                heir.made_fork |= made;
                false
            }
            None => made,
        }
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
    /// [`Failure`] of the first step that fails; what was done until then has been undone. So it is when this is dropped.
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
        let mut undo = Undo { intercepts: self.clone(), key: key.clone(), armed: false, made_fork: false };
        let result = self.steps(&key, wanted, &cannot, &mut undo, progress).await;
        match &result {
            Ok(_) => undo.armed = false,
            Err(_) => undo.now(progress).await,
        }
        result
    }

    /// See [`Self::intercept`]. Arms `undo` as soon as there is something to undo.
    async fn steps(
        &self,
        key: &Key,
        wanted: &Intercept,
        cannot: &str,
        undo: &mut Undo,
        progress: &Progress,
    ) -> Result<Intercepted, Failure> {
        let shared = &self.0;
        progress.step(format!("{}: looking at the Service", key.service));
        let (mappings, container_ports) =
            service::resolve(&shared.claimant.client, &key.namespace, wanted, cannot).await?;
        if !wanted.attached {
            warn_about_silent_ports(&mappings, progress).await;
        }
        progress.step(format!("{}: claiming it for the fork {}", key.service, key.fork));
        undo.armed = true;
        let (fork, made_fork) =
            shared.claimant.fork(&key.fork).await.map_err(|failure| failure.while_doing(cannot))?;
        undo.made_fork = made_fork;
        let spec = self.spec(key, wanted, &mappings);
        let target = shared.claimant.claim(&key.namespace, &fork, spec.clone()).await?;
        let ports: Vec<InterceptedPort> = mappings
            .iter()
            .map(|m| InterceptedPort { port: m.port, laptop_port: m.laptop, http: m.http })
            .collect();
        let delivery = Delivery {
            namespace: key.namespace.clone(),
            service: key.service.clone(),
            ports: container_ports,
        };
        self.hold(
            key,
            Held {
                order: 0,
                uid: target.uid().unwrap_or_default(),
                spec,
                ports: ports.clone(),
                delivery,
                made_fork,
                attached: wanted.attached,
                seen: Some(target.clone()),
                connected_until: None,
                follow: None,
            },
        );
        let target =
            shared.claimant.ready(&key.namespace, &key.service, &target.name_any(), progress).await?;
        shared.observe(key, &target);
        let environment = match wanted.environment {
            true => {
                self.environment(&target, progress).await.map_err(|failure| failure.while_doing(cannot))?
            }
            false => Vec::new(),
        };
        say_what_stays(&target, progress).await;
        tracing::info!(service = key.service, namespace = key.namespace, fork = key.fork, "intercepted");
        Ok(Intercepted {
            fork: key.fork.clone(),
            namespace: key.namespace.clone(),
            service: key.service.clone(),
            ports,
            all: wanted.all,
            routed: target.status.map(|status| status.routed).unwrap_or_default(),
            environment,
        })
    }

    fn spec(&self, key: &Key, wanted: &Intercept, mappings: &[Mapping]) -> ForkTargetSpec {
        let claimant = &self.0.claimant;
        ForkTargetSpec {
            fork: key.fork.clone(),
            owner: claimant.owner.clone(),
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
            laptop: claimant.laptop.clone(),
            environment_of: wanted.environment.then(String::new),
        }
    }

    /// Serves and follows a target from here on; in place of what this laptop held before under the same key.
    fn hold(&self, key: &Key, mut mine: Held) {
        let shared = &self.0;
        let before = shared.forget(key);
        mine.made_fork |= before.is_some_and(|before| before.made_fork);
        shared.targets.put(mine.uid.clone(), mine.delivery.clone());
        let name = names::target(&key.fork, &key.service);
        mine.follow = Some(tokio::spawn(follow(Arc::downgrade(shared), key.clone(), name)).abort_handle());
        let mut held = shared.held();
        mine.order = held.values().map(|held| held.order).max().unwrap_or_default() + 1;
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
                let forbidden = matches!(&error, OpenError::Refused { outcome: Outcome::Forbidden, .. });
                cannot()
                    .caused_by(&error)
                    .advice("it needs `create pods/exec` in the namespace; without the environment: --no-env")
                    .exit(if forbidden { Exit::Refused } else { Exit::Failed })
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
            left.push(self.give_back(&key, false, progress).await?);
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
            match self.give_back(&key, false, progress).await {
                Ok(one) => left.push(one),
                Err(failure) => failed = failed.or(Some(failure)),
            }
        }
        (left, failed)
    }

    /// Gives back an intercept that was to last as long as its command's connection.
    pub async fn abandon(&self, wanted: &Intercept, namespace: String) {
        let Ok(fork) = self.fork_id(wanted.fork.as_deref()) else { return };
        let key = Key { namespace, service: wanted.service.clone(), fork };
        // It may have been left by `forkd leave`, and taken anew without a command.
        if self.0.held().get(&key).is_some_and(|held| held.attached) {
            tracing::info!(service = key.service, fork = key.fork, "the command is gone");
            self.give_back_unheard(&key, false).await;
        }
    }

    /// Gives back where nobody waits for the answer.
    async fn give_back_unheard(&self, key: &Key, made_fork: bool) {
        if let Err(failure) = self.give_back(key, made_fork, &Progress::channel().0).await {
            self.0.problems.set(&format!("{}.{}", key.service, key.namespace), Some(failure.one_line()));
        }
    }

    async fn give_back(
        &self,
        key: &Key,
        made_fork: bool,
        progress: &Progress,
    ) -> Result<LeftTarget, Failure> {
        progress.step(format!("leaving {}", key.service));
        let made_fork = self.0.forget(key).is_some_and(|held| held.made_fork) || made_fork;
        let and_fork = self.0.fork_goes(key, made_fork);
        self.0.claimant.release(&key.namespace, &key.service, &key.fork, and_fork).await?;
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

/// Gives back an intercept that failed, or whose command went away while it was being made.
struct Undo {
    intercepts: Intercepts,
    key: Key,
    armed: bool,
    made_fork: bool,
}

impl Undo {
    async fn now(&mut self, progress: &Progress) {
        if self.armed {
            if let Err(failure) = self.intercepts.give_back(&self.key, self.made_fork, progress).await {
                progress.note(format!("not undone: {}", failure.one_line())).await;
            }
            self.armed = false;
        }
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        if self.armed {
            let (intercepts, key, made_fork) = (self.intercepts.clone(), self.key.clone(), self.made_fork);
            tokio::spawn(async move { intercepts.give_back_unheard(&key, made_fork).await });
        }
    }
}

fn describe(key: &Key, held: &Held) -> status::Intercept {
    let status = held.seen.as_ref().and_then(|target| target.status.as_ref());
    let (ready, message) = match held.seen.as_ref().map(readiness) {
        Some(Readiness::Ready) => (true, String::new()),
        Some(Readiness::Waiting(message) | Readiness::Failed { message, .. }) => (false, message),
        None => (false, "its ForkTarget is gone; it is being made again".to_owned()),
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

/// Follows the object of a held target. Makes it again when it has gone while the laptop was not there: the controller
/// frees the claims of laptops that sleep for long.
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
            Watched::Absent => Some(Gone::Before),
            Watched::Deleted => Some(Gone::Now),
        })
        .await;
        let Some(shared) = shared.upgrade() else { return };
        let about = format!("{}.{}", key.service, key.namespace);
        match gone {
            Ok(Gone::Now) if shared.was_connected(&key) => return evicted(&shared, &key, &about).await,
            Ok(_) => {
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

fn says_connected(target: &ForkTarget) -> bool {
    let conditions = target.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
    conditions.iter().any(|each| each.type_ == condition::LAPTOP_CONNECTED && each.status == "True")
}

/// When a ForkTarget went away.
enum Gone {
    /// While nobody here looked.
    Before,
    /// Before our eyes.
    Now,
}

/// Someone took the target from a laptop that was there: they are to have their way.
async fn evicted(shared: &Shared, key: &Key, about: &str) {
    let Some(mut held) = shared.forget(key) else { return };
    // It is this task, which has something left to do.
    held.follow = None;
    shared
        .problems
        .set(about, Some("someone deleted its ForkTarget: it is not intercepted any more".to_owned()));
    let and_fork = shared.fork_goes(key, held.made_fork);
    if let Err(failure) = shared.claimant.release(&key.namespace, &key.service, &key.fork, and_fork).await {
        tracing::warn!(fork = key.fork, error = failure.one_line(), "the fork stays");
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
                "connections from before the intercept that stay with the pod until they close: {older}; \
                 requests in them do not come here"
            ))
            .await;
    }
    if status.pods.values().any(|pod| pod.opaque_connections > 0) {
        progress
            .note("some connections turned out not to be HTTP: they stay with the pod (--all takes them)")
            .await;
    }
}
