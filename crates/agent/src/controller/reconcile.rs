//! Makes it so: adds agents, tells them what to do, writes what came of it.
//!
//! For a namespace, in this order:
//! 1. plan: claims, routes, environments ([`super::plan`]);
//! 2. tell connected agents what to do: who lost a target hears it first;
//! 3. add agents where there are none;
//! 4. bind targets to their forks by owner reference;
//! 5. write statuses, and events for what changed;
//! 6. free the claims of laptops that have been gone for too long;
//! 7. come back when a wait is over.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use forkd_api::{Fork, ForkTarget, ForkTargetStatus, SYSTEM_NAMESPACE};
use forkd_tunnel::identity::AgentRole;
use forkd_wire::control::Desired;
use futures::{FutureExt as _, StreamExt as _};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::runtime::events::{Event, EventType, Recorder};
use kube::{Api, Client, Resource as _, ResourceExt as _};
use serde_json::json;
use tokio::time::Instant;

use super::FIELD_MANAGER;
use super::cluster::{self, Resolv};
use super::hub::{Hub, LINGER};
use super::inject::{self, Addition, Life, Settings};
use super::memory::Memory;
use super::plan::{self, Environment, Plan, TargetPlan};
use super::queue::{Key, Queue};
use super::server::Server;
use super::status::{self, AgentInPod, Facts};
use super::view::{PodView, Purpose};
use super::world::World;

/// Namespaces and forks that are worked on at a time.
const MAX_PARALLEL: usize = 8;
/// Patches within a namespace at a time.
const MAX_PATCHES: usize = 8;
/// After an error of the API server, everything of the key is tried again so much later, or sooner if it changes.
pub const RETRY: Duration = Duration::from_secs(5);
/// What the controller was told at its start.
#[derive(Clone, Debug)]
pub struct Config {
    pub image: String,
    pub image_pull_policy: String,
    /// Address of the controller as pods reach it; without it, that of the Service.
    pub advertise: Option<String>,
    /// A laptop that has been gone for so long loses its claims.
    pub grace: Duration,
    pub resolv: Resolv,
}

/// Works the queue off.
pub struct Reconciler {
    pub client: Client,
    pub world: Arc<World>,
    pub hub: Arc<Hub>,
    pub queue: Arc<Queue>,
    pub server: Arc<Server>,
    pub recorder: Recorder,
    pub config: Config,
    memory: Mutex<HashMap<String, Memory>>,
}

impl Reconciler {
    /// With an empty memory.
    pub fn new(client: Client, server: Arc<Server>, recorder: Recorder, config: Config) -> Self {
        Self {
            client,
            world: Arc::clone(&server.world),
            hub: Arc::clone(&server.hub),
            queue: Arc::clone(&server.queue),
            server,
            recorder,
            config,
            memory: Mutex::default(),
        }
    }

    /// Works for ever. A key is worked on by one at a time; several keys at once.
    pub async fn run(&self) {
        let mut working: HashSet<Key> = HashSet::new();
        let mut work = futures::stream::FuturesUnordered::new();
        loop {
            tokio::select! {
                key = self.queue.next(|key| !working.contains(key)), if work.len() < MAX_PARALLEL => {
                    working.insert(key.clone());
                    work.push(self.one(key).boxed());
                }
                Some(key) = work.next(), if !work.is_empty() => {
                    working.remove(&key);
                }
            }
        }
    }

    async fn one(&self, key: Key) -> Key {
        let done = match &key {
            Key::Cluster => {
                self.tell_gateways();
                Ok(())
            }
            Key::Fork(name) => self.fork(name).await,
            Key::Namespace(name) => self.namespace(name).await,
        };
        if let Err(error) = done {
            tracing::warn!(?key, %error, "reconciliation failed, trying again");
            self.queue.mark_at(key.clone(), Instant::now() + RETRY);
        }
        key
    }

    fn tell_gateways(&self) {
        self.hub.forget();
        let (retiring, relays, info) = {
            let world = self.world.read();
            (world.retiring, cluster::relays(&world), cluster::info(&world, &self.config.resolv))
        };
        for (id, role) in self.hub.agents_in(SYSTEM_NAMESPACE) {
            if role == AgentRole::Gateway && !retiring {
                let desired =
                    Desired { relays: relays.clone(), cluster: Some(info.clone()), ..Desired::default() };
                self.hub.push(&id, desired);
            }
        }
        if retiring {
            // Also those in namespaces without any target: they only wait for their idle time to pass.
            for id in self.hub.pod_agents() {
                self.hub.retire(&id, "forkd is being uninstalled");
            }
        }
    }

    async fn fork(&self, name: &str) -> Result<(), kube::Error> {
        let (fork, targets) = {
            let world = self.world.read();
            let Some(fork) = world.forks.one("", name).cloned() else { return Ok(()) };
            let targets = world.targets.all().filter(|target| target.spec.fork == name).cloned();
            (fork, targets.collect::<Vec<_>>())
        };
        let new = status::of_fork(&fork, targets.iter().map(Arc::as_ref), Timestamp::now());
        if fork.status.as_ref() == Some(&new) {
            return Ok(());
        }
        let patch = json!({ "apiVersion": Fork::api_version(&()), "kind": Fork::kind(&()), "status": new });
        let api: Api<Fork> = Api::all(self.client.clone());
        let params = PatchParams::apply(FIELD_MANAGER).force();
        gone_is_fine(api.patch_status(name, &params, &Patch::Apply(patch)).await)
    }

    async fn namespace(&self, namespace: &str) -> Result<(), kube::Error> {
        let (plan, relays, retiring, controller) = self.look(namespace);
        for (id, role) in self.hub.agents_in(namespace) {
            if role == AgentRole::Gateway {
                continue;
            }
            if retiring {
                self.hub.retire(&id, "forkd is being uninstalled");
                continue;
            }
            let desired = Desired {
                relays: relays.clone(),
                routes: plan.routes.get(&id).cloned().unwrap_or_default(),
                environment_for: plan.environment_for.get(&id).cloned().unwrap_or_default(),
                ..Desired::default()
            };
            self.hub.push(&id, desired);
        }
        let mut memory = self.recall(namespace);
        memory.clean(&plan);
        if !retiring {
            self.add_agents(&plan, controller, &mut memory).await;
            self.bind_to_forks(&plan).await?;
        }
        let written = self.write_statuses(&plan, &memory).await;
        let freed = self.free_claims(&plan).await;
        self.come_back(namespace, &plan, &memory);
        self.remember(namespace, memory);
        written.and(freed)
    }

    /// Everything about a namespace at one moment.
    fn look(&self, namespace: &str) -> (Plan, Vec<String>, bool, Option<String>) {
        let world = self.world.read();
        let input = plan::Input {
            namespace,
            pods: world.pods.of(namespace).cloned().collect(),
            services: &|name| world.services.one(namespace, name).cloned(),
            targets: world.targets.of(namespace).cloned().collect(),
            forks: &|name| world.forks.one("", name).cloned(),
        };
        let service = world.services.one(SYSTEM_NAMESPACE, "forkd-controller");
        let address = service.and_then(|service| {
            let port = service.ports.first()?.port;
            Some(std::net::SocketAddr::new(*service.ips.first()?, port).to_string())
        });
        let controller = self.config.advertise.clone().or(address);
        (plan::plan(&input), cluster::relays(&world), world.retiring, controller)
    }

    fn recall(&self, namespace: &str) -> Memory {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        memory.remove(namespace).unwrap_or_default()
    }

    fn remember(&self, namespace: &str, memory: Memory) {
        if !memory.pending.is_empty() || !memory.refused.is_empty() {
            let mut all = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
            all.insert(namespace.to_owned(), memory);
        }
    }

    async fn add_agents(&self, plan: &Plan, controller: Option<String>, memory: &mut Memory) {
        let wanted = self.wanted(plan, memory);
        if wanted.is_empty() {
            return;
        }
        let Some(controller) = controller else {
            tracing::error!("there is no Service forkd-controller: agents would not find their way");
            return;
        };
        let settings = Settings {
            image: self.config.image.clone(),
            image_pull_policy: self.config.image_pull_policy.clone(),
            controller,
            authority: self.server.ca.authority.certificate_pem(),
        };
        let added = futures::stream::iter(wanted.into_values())
            .map(|(pod, additions)| self.add(pod, additions, &settings))
            .buffer_unordered(MAX_PATCHES);
        let outcomes: Vec<Outcome> = added.flat_map(futures::stream::iter).collect().await;
        for Outcome { pod, addition, result } in outcomes {
            memory.note(&pod, addition.purpose, addition.name, result);
        }
    }

    /// Containers to add, by pod uid.
    fn wanted(&self, plan: &Plan, memory: &Memory) -> BTreeMap<String, (Arc<PodView>, Vec<Wanted>)> {
        let mut wanted: BTreeMap<String, (Arc<PodView>, Vec<Wanted>)> = BTreeMap::new();
        let mut want = |pod: &Arc<PodView>, purpose: Purpose, container: &str| {
            let of_pod = wanted.entry(pod.uid.clone()).or_insert_with(|| (Arc::clone(pod), Vec::new()));
            if of_pod.1.iter().any(|wanted| wanted.purpose == purpose) {
                return;
            }
            if let Some(number) = self.needs(pod, purpose, memory) {
                of_pod.1.push(Wanted { purpose, container: container.to_owned(), number });
            }
        };
        for target in plan.targets.iter().filter(|target| target.problem.is_none()) {
            let ready = target.pods.iter().filter(|planned| planned.pod.ready && planned.problem.is_none());
            ready.for_each(|planned| want(&planned.pod, Purpose::Pod, &planned.container));
            if let Some(Environment { pod, container }) = &target.environment {
                want(pod, Purpose::Env, container);
            }
        }
        wanted.retain(|_, (_, additions)| !additions.is_empty());
        wanted
    }

    /// The number of the container that a pod needs, if it needs one.
    fn needs(&self, pod: &PodView, purpose: Purpose, memory: &Memory) -> Option<usize> {
        if self.hub.is_connected(&purpose.agent_id(&pod.uid)) {
            return None;
        }
        let refusal = memory.refused.get(&(pod.uid.clone(), purpose));
        if refusal.is_some_and(|refusal| Instant::now() < refusal.until) {
            return None;
        }
        match self.life(pod, purpose, memory) {
            Life::Missing(number) => Some(number),
            _ => None,
        }
    }

    fn life(&self, pod: &PodView, purpose: Purpose, memory: &Memory) -> Life {
        let none = BTreeSet::new();
        let pending = memory.pending.get(&pod.uid).unwrap_or(&none);
        inject::life(pod, purpose, pending, &self.config.image, Timestamp::now())
    }

    /// Adds containers to a pod by one patch; if that is refused, the agent alone: it is what routes, and the other one
    /// carries an application's security context that a policy may have its own opinion of.
    async fn add(&self, pod: Arc<PodView>, wanted: Vec<Wanted>, settings: &Settings) -> Vec<Outcome> {
        let additions =
            match wanted.iter().map(|wanted| self.addition(&pod, wanted)).collect::<Result<Vec<_>, _>>() {
                Ok(additions) => additions,
                Err(error) => {
                    tracing::error!(%error, "making a join token failed");
                    return Vec::new();
                }
            };
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &pod.namespace);
        let patch = async |additions: &[Addition]| {
            let patch = Patch::Strategic(inject::patch(&pod, additions, settings));
            api.patch_ephemeral_containers(&pod.name, &PatchParams::default(), &patch).await.map(|_| ())
        };
        let mut outcomes = Vec::new();
        match patch(&additions).await {
            Ok(()) => {
                for addition in additions {
                    tracing::info!(
                        namespace = pod.namespace,
                        pod = pod.name,
                        container = addition.name,
                        "added an agent"
                    );
                    outcomes.push(Outcome { pod: Arc::clone(&pod), addition, result: Ok(()) });
                }
            }
            Err(kube::Error::Api(status)) if additions.len() > 1 => {
                for addition in additions {
                    let result = match addition.purpose {
                        Purpose::Pod => patch(std::slice::from_ref(&addition)).await,
                        Purpose::Env => Err(kube::Error::Api(status.clone())),
                    };
                    outcomes.push(Outcome { pod: Arc::clone(&pod), addition, result });
                }
            }
            Err(error) => {
                if let Some(addition) = additions.into_iter().next() {
                    outcomes.push(Outcome { pod: Arc::clone(&pod), addition, result: Err(error) });
                }
            }
        }
        outcomes
    }

    fn addition(&self, pod: &PodView, wanted: &Wanted) -> Result<Addition, super::token::TokenError> {
        let name = wanted.purpose.container_name(&pod.uid, wanted.number);
        let of_pod = (pod.namespace.as_str(), pod.name.as_str(), pod.uid.as_str());
        let token = self.server.joins.tokens.issue(of_pod, &name, SystemTime::now())?;
        Ok(Addition { purpose: wanted.purpose, name, target_container: wanted.container.clone(), token })
    }

    /// A target goes with its fork: by owner reference, so that Kubernetes sees to it whoever is alive.
    async fn bind_to_forks(&self, plan: &Plan) -> Result<(), kube::Error> {
        for planned in &plan.targets {
            let target = &planned.target;
            let fork = self.world.read().forks.one("", &target.spec.fork).cloned();
            let Some(fork) = fork.filter(|fork| fork.spec.owner == target.spec.owner) else { continue };
            let owners = target.metadata.owner_references.as_ref();
            if owners.into_iter().flatten().any(|owner| Some(&owner.uid) == fork.metadata.uid.as_ref()) {
                continue;
            }
            let Some(owner) = fork.owner_ref(&()) else { continue };
            let patch = json!({
                "apiVersion": ForkTarget::api_version(&()),
                "kind": ForkTarget::kind(&()),
                "metadata": { "uid": target.metadata.uid, "ownerReferences": [owner] },
            });
            let params = PatchParams::apply(FIELD_MANAGER).force();
            gone_is_fine(
                self.targets_of(target).patch(&target.name_any(), &params, &Patch::Apply(patch)).await,
            )?;
        }
        Ok(())
    }

    async fn write_statuses(&self, plan: &Plan, memory: &Memory) -> Result<(), kube::Error> {
        let laptops = self.hub.laptops();
        let mut first_error = Ok(());
        for planned in &plan.targets {
            let target = &planned.target;
            let new = self.status(planned, &laptops, memory);
            if target.status.as_ref() == Some(&new) {
                continue;
            }
            let patch = json!({
                "apiVersion": ForkTarget::api_version(&()),
                "kind": ForkTarget::kind(&()),
                "metadata": { "uid": target.metadata.uid },
                "status": new,
            });
            let params = PatchParams::apply(FIELD_MANAGER).force();
            let api = self.targets_of(target);
            let written =
                gone_is_fine(api.patch_status(&target.name_any(), &params, &Patch::Apply(patch)).await);
            if written.is_ok() {
                self.announce(target, &new).await;
            }
            first_error = first_error.and(written);
        }
        first_error
    }

    fn status(&self, planned: &TargetPlan, laptops: &HashSet<String>, memory: &Memory) -> ForkTargetStatus {
        let uid = planned.target.metadata.uid.as_deref().unwrap_or_default();
        let facts = Facts {
            agents: &|in_pod| self.agent(&in_pod.pod, Purpose::Pod, uid, &in_pod.ports, memory),
            environment: &|place| self.agent(&place.pod, Purpose::Env, uid, &[], memory),
            laptops,
            now: Timestamp::now(),
        };
        status::of_target(planned, &facts)
    }

    /// What is known of an agent.
    fn agent(
        &self,
        pod: &PodView,
        purpose: Purpose,
        target: &str,
        ports: &[u16],
        memory: &Memory,
    ) -> AgentInPod {
        let id = purpose.agent_id(&pod.uid);
        let connected = self.hub.is_connected(&id);
        let life = self.life(pod, purpose, memory);
        // This controller has just started: agents come back, and hear again what they have long been doing.
        let warming_up = self.hub.age() < LINGER;
        // What an agent said counts while it runs, also when its connection has just broken; not after its end.
        if (connected || life == Life::Running)
            && let Some(report) = self.hub.report(&id, target, ports)
            && (report.routed || ports.is_empty() || !report.error.is_empty() || !warming_up)
        {
            return AgentInPod::Says(report);
        }
        if let Some(refusal) = memory.refused.get(&(pod.uid.clone(), purpose)) {
            return AgentInPod::Refused { forbidden: refusal.forbidden, message: refusal.message.clone() };
        }
        match life {
            Life::Running if warming_up => AgentInPod::Unknown,
            // Connected, and has said nothing yet.
            Life::Running if connected => AgentInPod::Absent(Life::Starting),
            life => AgentInPod::Absent(life),
        }
    }

    /// An event for each change of what a user would want to know.
    async fn announce(&self, target: &ForkTarget, new: &ForkTargetStatus) {
        let old = target.status.as_ref().and_then(|status| status::ready(&status.conditions));
        let Some(now) = status::ready(&new.conditions) else { return };
        if old.is_some_and(|old| old.status == now.status && old.reason == now.reason) {
            return;
        }
        // Steps on the way, of which the next one is told in a second.
        if matches!(now.reason.as_str(), "AgentStarting" | "LaptopConnecting") {
            return;
        }
        let (type_, reason) = if now.status == "True" {
            (EventType::Normal, "Routed")
        } else {
            (EventType::Warning, now.reason.as_str())
        };
        self.publish(target, type_, reason, &now.message).await;
    }

    async fn publish(&self, target: &ForkTarget, type_: EventType, reason: &str, note: &str) {
        let event = Event {
            type_,
            reason: reason.to_owned(),
            note: Some(note.chars().take(1000).collect()),
            action: "Route".to_owned(),
            secondary: None,
        };
        if let Err(error) = self.recorder.publish(&event, &target.object_ref(&())).await {
            tracing::warn!(%error, reason, "publishing an event failed");
        }
    }

    /// Deletes targets whose laptop nobody has seen for the grace.
    async fn free_claims(&self, plan: &Plan) -> Result<(), kube::Error> {
        let (laptops, now) = (self.hub.laptops(), Instant::now());
        for planned in &plan.targets {
            let target = &planned.target;
            if laptops.contains(&target.spec.laptop.id) || now < self.free_at(target, now) {
                continue;
            }
            let preconditions =
                Preconditions { uid: target.metadata.uid.clone(), ..Preconditions::default() };
            let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
            match self.targets_of(target).delete(&target.name_any(), &params).await {
                Ok(_) => {}
                // The watch has not shown yet that it is gone.
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => continue,
                Err(error) => return Err(error),
            }
            let (owner, grace) = (&target.spec.owner, self.config.grace.as_secs());
            tracing::info!(
                target = target.name_any(),
                namespace = target.namespace(),
                owner,
                "freed a claim"
            );
            let note = format!("the laptop of {owner} was gone for {grace} s: its claim is free again");
            self.publish(target, EventType::Warning, "LaptopGone", &note).await;
        }
        Ok(())
    }

    /// When a target's claim is freed unless its laptop comes back. A target younger than the laptop's absence counts
    /// from its own creation.
    fn free_at(&self, target: &ForkTarget, now: Instant) -> Instant {
        let created = target.metadata.creation_timestamp.as_ref().map_or(Timestamp::now(), |time| time.0);
        let age = Duration::try_from(Timestamp::now().duration_since(created)).unwrap_or_default();
        let left = self.config.grace.saturating_sub(age);
        (self.hub.gone_since(&target.spec.laptop.id) + self.config.grace).max(now + left)
    }

    /// Marks the namespace for when the next wait is over.
    fn come_back(&self, namespace: &str, plan: &Plan, memory: &Memory) {
        let key = Key::Namespace(namespace.to_owned());
        let now = Instant::now();
        let at = |when: Instant| self.queue.mark_at(key.clone(), when.max(now + Duration::from_millis(100)));
        memory.refused.values().for_each(|refusal| at(refusal.until));
        if plan.targets.is_empty() {
            return;
        }
        if self.hub.age() < LINGER {
            at(now + LINGER.saturating_sub(self.hub.age()));
        }
        if let Some(end) = self.hub.next_linger_end() {
            at(end);
        }
        let laptops = self.hub.laptops();
        for planned in &plan.targets {
            if !laptops.contains(&planned.target.spec.laptop.id) {
                at(self.free_at(&planned.target, now));
            }
            for in_pod in &planned.pods {
                for purpose in [Purpose::Pod, Purpose::Env] {
                    if let Life::BackOff(due, _) = self.life(&in_pod.pod, purpose, memory) {
                        let wait =
                            Duration::try_from(due.duration_since(Timestamp::now())).unwrap_or_default();
                        at(now + wait + Duration::from_millis(50));
                    }
                }
            }
        }
    }

    fn targets_of(&self, target: &ForkTarget) -> Api<ForkTarget> {
        Api::namespaced(self.client.clone(), target.metadata.namespace.as_deref().unwrap_or_default())
    }
}

/// A container that a pod needs.
struct Wanted {
    purpose: Purpose,
    container: String,
    number: usize,
}

/// What came of adding a container.
struct Outcome {
    pod: Arc<PodView>,
    addition: Addition,
    result: Result<(), kube::Error>,
}

/// An object that is gone, or was replaced by another one, needs no writing any more: its watch brings what follows.
fn gone_is_fine<T>(outcome: Result<T, kube::Error>) -> Result<(), kube::Error> {
    match outcome {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        Err(error) => Err(error),
    }
}
