//! Forks and ForkTargets of this laptop: creating the object is the claim, deleting it gives the Service back.

use std::time::Duration;

use forkd_api::manifests::MANAGED_BY;
use forkd_api::{FORK_LABEL, Fork, ForkSpec, ForkTarget, ForkTargetSpec, Laptop, MANAGER, condition, names};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Client, Resource, ResourceExt};
use tokio::time::Instant;

use crate::control::Progress;
use crate::failure::Failure;
use crate::kubernetes::{self, WaitError, Watched};

/// Until everything is in place. Pulling the agent image onto a node for the first time is the longest part.
const READY: Duration = Duration::from_secs(120);
/// How often a fork that changes under our hands is looked at again before it is left.
const TRIES: usize = 8;
/// Until a deleted object is gone; the controller has no finaliser on it, so this is a matter of milliseconds.
const GONE: Duration = Duration::from_secs(30);
/// Until the controller has counted a target that is gone.
const COUNT: Duration = Duration::from_secs(5);

/// Who claims.
#[derive(Clone)]
pub struct Claimant {
    /// With the user's own credentials.
    pub client: Client,
    /// The user as the API server knows them.
    pub owner: String,
    /// This laptop.
    pub laptop: Laptop,
}

/// What a ForkTarget's conditions say about an intercept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// Everything is in place.
    Ready,
    /// Not yet; what is missing, for a person.
    Waiting(String),
    /// It will not become ready by waiting.
    Failed {
        /// The condition's reason.
        reason: String,
        /// Its message.
        message: String,
    },
}

/// Reasons of `Ready` that only a person can change.
const HOPELESS: &[&str] = &[
    "NoSuchFork",
    "NotOwner",
    "NoSuchService",
    "NoSelector",
    "NoPods",
    "NoSuchPort",
    "Claimed",
    "AgentForbidden",
];

/// Reads the condition `Ready`, if it is about the newest spec.
pub fn readiness(target: &ForkTarget) -> Readiness {
    let ready =
        target.status.iter().flat_map(|status| &status.conditions).find(|c| c.type_ == condition::READY);
    let Some(ready) =
        ready.filter(|c| c.observed_generation.is_none_or(|seen| Some(seen) == target.meta().generation))
    else {
        return Readiness::Waiting("waiting for the controller".to_owned());
    };
    if ready.status == "True" {
        return Readiness::Ready;
    }
    let message = if ready.message.is_empty() { &ready.reason } else { &ready.message };
    if HOPELESS.contains(&ready.reason.as_str()) {
        Readiness::Failed { reason: ready.reason.clone(), message: message.clone() }
    } else {
        Readiness::Waiting(message.clone())
    }
}

impl Claimant {
    /// The Fork of this id, and whether it is there for intercepts only: made by a daemon, at this moment or before.
    ///
    /// # Errors
    /// [`Failure`]: someone else's fork, or the API server.
    pub async fn fork(&self, id: &str) -> Result<(Fork, bool), Failure> {
        let api = Api::<Fork>::all(self.client.clone());
        let mut fork = Fork::new(id, ForkSpec { owner: self.owner.clone() });
        fork.labels_mut().insert(MANAGED_BY.to_owned(), MANAGER.to_owned());
        let cannot = || format!("cannot use the fork {id}");
        match api.create(&PostParams::default(), &fork).await {
            Ok(fork) => return Ok((fork, true)),
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => return Err(kubernetes::failure(cannot(), &error)),
        }
        let fork = api.get(id).await.map_err(|error| kubernetes::failure(cannot(), &error))?;
        if fork.spec.owner != self.owner {
            return Err(Failure::new(cannot())
                .because(format!("it belongs to {}", fork.spec.owner))
                .advice("choose another id with --fork"));
        }
        // A daemon that was killed made it and could not take it away.
        let made = fork.labels().get(MANAGED_BY).is_some_and(|by| by == MANAGER);
        Ok((fork, made))
    }

    /// Creates the ForkTarget, or takes over the one that this laptop left behind.
    ///
    /// # Errors
    /// [`Failure`]: another laptop holds it (with its holder, host and age), or the API server.
    pub async fn claim(
        &self,
        namespace: &str,
        fork: &Fork,
        spec: ForkTargetSpec,
    ) -> Result<ForkTarget, Failure> {
        let api = Api::<ForkTarget>::namespaced(self.client.clone(), namespace);
        let name = names::target(&spec.fork, &spec.service);
        let cannot = || format!("cannot intercept {} in {namespace}", spec.service);
        let owner = OwnerReference {
            // With `controller` unset: the Fork owns its targets, nobody reconciles them through it.
            block_owner_deletion: None,
            ..fork.owner_ref(&()).ok_or_else(|| Failure::new(cannot()).because("the fork has no uid"))?
        };
        let object = ForkTarget {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                labels: Some(
                    [(MANAGED_BY.to_owned(), MANAGER.to_owned()), (FORK_LABEL.to_owned(), spec.fork.clone())]
                        .into(),
                ),
                owner_references: Some(vec![owner]),
                ..ObjectMeta::default()
            },
            spec: spec.clone(),
            status: None,
        };
        // The holder may leave between our two requests; then it is ours to create.
        for _ in 0..3 {
            match api.create(&PostParams::default(), &object).await {
                Ok(target) => return Ok(target),
                Err(kube::Error::Api(status)) if status.code == 409 => {}
                Err(error) => return Err(kubernetes::failure(cannot(), &error)),
            }
            let held = api.get_opt(&name).await.map_err(|error| kubernetes::failure(cannot(), &error))?;
            match held {
                Some(held) if held.meta().deletion_timestamp.is_some() => {
                    self.gone(&api, &name, held.uid()).await?
                }
                Some(held) if self.is_ours(&held) => return self.replace(&api, &name, &spec).await,
                Some(held) => return Err(taken(&held, cannot())),
                None => {}
            }
        }
        Err(Failure::new(cannot()).because("it is claimed and released all the time").advice("try again"))
    }

    fn is_ours(&self, target: &ForkTarget) -> bool {
        target.spec.owner == self.owner && target.spec.laptop.id == self.laptop.id
    }

    async fn replace(
        &self,
        api: &Api<ForkTarget>,
        name: &str,
        spec: &ForkTargetSpec,
    ) -> Result<ForkTarget, Failure> {
        let mut patch = kubernetes::as_patch(spec)?;
        // Left out of the object when it is not wanted; a merge patch must say so (RFC 7396).
        if let Some(fields) = patch.as_object_mut() {
            fields.entry("environmentOf").or_insert(serde_json::Value::Null);
        }
        let patch = Patch::Merge(serde_json::json!({ "spec": patch }));
        api.patch(name, &PatchParams::default(), &patch).await.map_err(|error| {
            kubernetes::failure(format!("cannot take over the intercept of {}", spec.service), &error)
        })
    }

    /// Waits until the target is ready, and says what it waits for.
    ///
    /// # Errors
    /// [`Failure`] with the condition's message, or with what was missing when the time was up.
    pub async fn ready(
        &self,
        namespace: &str,
        service: &str,
        name: &str,
        progress: &Progress,
    ) -> Result<ForkTarget, Failure> {
        let api = Api::<ForkTarget>::namespaced(self.client.clone(), namespace);
        let cannot = || Failure::new(format!("cannot intercept {service} in {namespace}"));
        let mut said = String::new();
        let done = kubernetes::wait_for(&api, name, Instant::now() + READY, |target| {
            let Watched::Object(target) = target else {
                return Some(Err(cannot().because("someone deleted the ForkTarget")));
            };
            match readiness(target) {
                Readiness::Ready if target.spec.environment_of.is_none() => Some(Ok(target.clone())),
                Readiness::Ready if target.status.as_ref().is_some_and(|s| s.environment_agent.is_some()) => {
                    Some(Ok(target.clone()))
                }
                Readiness::Failed { reason, message } => {
                    Some(Err(cannot().because(message).advice(advice_for(&reason, namespace))))
                }
                other => {
                    let message = match other {
                        Readiness::Waiting(message) => message,
                        _ => "waiting for the agent that reads the container's environment".to_owned(),
                    };
                    if message != said {
                        progress.step(format!("{service}: {message}"));
                        said = message;
                    }
                    None
                }
            }
        })
        .await;
        match done {
            Ok(result) => result,
            Err(WaitError::Api(error)) => Err(kubernetes::failure(cannot().error, &error)),
            Err(WaitError::TimedOut) => Err(cannot()
                .because(format!("not ready after {} s: {said}", READY.as_secs()))
                .advice(if said == "waiting for the controller" {
                    "see whether forkd's controller runs: `kubectl get pods -n forkd`".to_owned()
                } else {
                    format!("`kubectl describe forktarget {name} -n {namespace}` says more")
                })),
        }
    }

    /// Deletes the ForkTarget if it is this laptop's, and waits until it is gone. With `and_fork` also the Fork, if
    /// nothing else is in it. Returns whether there was anything to delete.
    ///
    /// # Errors
    /// [`Failure`] from the API server.
    pub async fn release(
        &self,
        namespace: &str,
        service: &str,
        fork: &str,
        and_fork: bool,
    ) -> Result<bool, Failure> {
        let api = Api::<ForkTarget>::namespaced(self.client.clone(), namespace);
        let name = names::target(fork, service);
        let failed = |error: &kube::Error| {
            kubernetes::failure(format!("cannot leave {service} in {namespace}"), error)
        };
        let held = api.get_opt(&name).await.map_err(|error| failed(&error))?;
        let held = held.filter(|held| self.is_ours(held));
        if let Some(held) = &held {
            let only_this = Preconditions { uid: held.uid(), resource_version: None };
            match api.delete(&name, &DeleteParams::default().preconditions(only_this)).await {
                // 409: somebody else claimed it since; theirs is not ours to delete.
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
                Err(error) => return Err(failed(&error)),
                Ok(_) => self.gone(&api, &name, held.uid()).await?,
            }
        }
        if and_fork {
            self.drop_fork(fork).await?;
        }
        Ok(held.is_some())
    }

    /// Deletes the Fork if no target is left in it. Users who see only some namespaces cannot tell by looking; for them
    /// the controller counts.
    async fn drop_fork(&self, id: &str) -> Result<(), Failure> {
        let api = Api::<Fork>::all(self.client.clone());
        let failed = |error: &kube::Error| kubernetes::failure(format!("cannot delete the fork {id}"), error);
        let in_it = ListParams::default().labels(&format!("{FORK_LABEL}={id}")).limit(1);
        // Each status that the controller writes meanwhile makes a new version: look again.
        for _ in 0..TRIES {
            let version = match Api::<ForkTarget>::all(self.client.clone()).list(&in_it).await {
                Ok(rest) if !rest.items.is_empty() => return Ok(()),
                Ok(_) => None,
                Err(kube::Error::Api(status)) if status.code == 403 => match counted_empty(&api, id).await {
                    Ok(Some(version)) => Some(version),
                    Ok(None) => return Ok(()),
                    Err(error) => return Err(failed(&error)),
                },
                Err(error) => return Err(failed(&error)),
            };
            let as_seen = Preconditions { uid: None, resource_version: version };
            match api.delete(id, &DeleteParams::default().preconditions(as_seen)).await {
                Err(kube::Error::Api(status)) if status.code == 404 => return Ok(()),
                Err(kube::Error::Api(status)) if status.code == 409 => {}
                Err(error) => return Err(failed(&error)),
                Ok(_) => return Ok(()),
            }
        }
        Err(Failure::new(format!("cannot delete the fork {id}"))
            .because("it changes all the time")
            .advice(format!("kubectl delete fork {id}")))
    }

    /// Waits until the object with this uid is gone, whatever has its name then.
    async fn gone(&self, api: &Api<ForkTarget>, name: &str, uid: Option<String>) -> Result<(), Failure> {
        kubernetes::wait_for(api, name, Instant::now() + GONE, |target| match target {
            Watched::Object(target) if target.uid() == uid => None,
            _ => Some(()),
        })
        .await
        .map_err(|error| match error {
            WaitError::Api(error) => kubernetes::failure("cannot see whether it is gone", &error),
            WaitError::TimedOut => Failure::new(format!("the ForkTarget {name} does not go away"))
                .because("something holds it with a finaliser"),
        })
    }
}

/// The version of the Fork in which the controller counts no targets; `None` while it counts some.
async fn counted_empty(api: &Api<Fork>, id: &str) -> Result<Option<String>, kube::Error> {
    let count = kubernetes::wait_for(api, id, Instant::now() + COUNT, |fork| match fork {
        Watched::Object(fork) if fork.status.as_ref().is_some_and(|status| status.targets > 0) => None,
        Watched::Object(fork) => Some(fork.resource_version()),
        Watched::Absent | Watched::Deleted => Some(None),
    })
    .await;
    match count {
        Ok(version) => Ok(version),
        Err(WaitError::TimedOut) => Ok(None),
        Err(WaitError::Api(error)) => Err(error),
    }
}

fn taken(held: &ForkTarget, cannot: String) -> Failure {
    let spec = &held.spec;
    let host = if spec.laptop.host.is_empty() { "an unnamed laptop" } else { &spec.laptop.host };
    let since = held.creation_timestamp().map(|at| format!(", since {}", age(at.0, Timestamp::now())));
    Failure::new(cannot)
        .because(format!(
            "{} holds it in the fork {} from {host}{}",
            spec.owner,
            spec.fork,
            since.unwrap_or_default()
        ))
        .advice("choose a fork of your own with --fork, or ask them to `forkd leave`")
}

/// "5 min".
fn age(since: Timestamp, now: Timestamp) -> String {
    match now.duration_since(since).as_secs().max(0) {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

fn advice_for(reason: &str, namespace: &str) -> String {
    match reason {
        "AgentForbidden" => format!(
            "the namespace {namespace} admits no container with NET_ADMIN (Pod Security baseline or restricted?): ask whoever runs the cluster"
        ),
        "Claimed" => {
            "only one intercept with --all per Service: leave out --all, or ask its holder".to_owned()
        }
        "NoPods" => format!("wait until a pod is ready: `kubectl get pods -n {namespace}`"),
        "NoSuchPort" => "name a port that the Service and its pods have: --port LAPTOP:REMOTE".to_owned(),
        _ => format!("`kubectl get forktargets -n {namespace} -o wide` says more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkd_api::{ForkTargetStatus, OnUnavailable, TargetPort, Traffic};
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

    fn target(status: &str, reason: &str, generation: i64) -> ForkTarget {
        let spec = ForkTargetSpec {
            fork: "alice".into(),
            owner: "alice@example.com".into(),
            service: "cart".into(),
            ports: vec![TargetPort { port: 80, laptop_port: 8080 }],
            traffic: Traffic::Keyed,
            on_unavailable: OnUnavailable::Error,
            laptop: Laptop { id: "l1".into(), host: "alices-laptop".into() },
            environment_of: None,
        };
        let mut target = ForkTarget::new("alice-cart", spec);
        target.meta_mut().generation = Some(2);
        target.status = Some(ForkTargetStatus {
            conditions: vec![Condition {
                type_: "Ready".into(),
                status: status.into(),
                reason: reason.into(),
                message: format!("{reason} it is"),
                observed_generation: Some(generation),
                last_transition_time: Time(Timestamp::UNIX_EPOCH),
            }],
            ..Default::default()
        });
        target
    }

    #[test]
    fn a_condition_about_an_older_spec_does_not_count() {
        assert_eq!(readiness(&target("True", "Ready", 2)), Readiness::Ready);
        assert!(matches!(readiness(&target("True", "Ready", 1)), Readiness::Waiting(_)));
    }

    #[test]
    fn what_only_a_person_can_change_is_not_waited_for() {
        assert!(matches!(readiness(&target("False", "AgentForbidden", 2)), Readiness::Failed { .. }));
        assert_eq!(
            readiness(&target("False", "AgentStarting", 2)),
            Readiness::Waiting("AgentStarting it is".into())
        );
    }

    #[test]
    fn the_second_claimant_is_told_holder_laptop_and_age() {
        let mut held = target("True", "Ready", 2);
        held.meta_mut().creation_timestamp = Some(Time(Timestamp::now()));
        let failure = taken(&held, "cannot intercept cart in shop".into());
        assert_eq!(
            failure.because[0],
            "alice@example.com holds it in the fork alice from alices-laptop, since 0 s"
        );
        let at = |seconds| age(Timestamp::UNIX_EPOCH, Timestamp::from_second(seconds).unwrap());
        assert_eq!([at(90), at(600), at(10_800), at(400_000)], ["90 s", "10 min", "3 h", "4 days"]);
    }
}
