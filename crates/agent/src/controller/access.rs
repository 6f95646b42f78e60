//! May this user do that? The API server's own RBAC answers (SubjectAccessReview); answers are kept for half a minute.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use forkd_wire::control::{Authorize, Authorized, User, Verdict, authorize};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::time::Instant;

use super::world::{Place, World};

/// How long a verdict counts.
const TTL: Duration = Duration::from_secs(30);
/// How long a verdict about a pod's address counts at the agent: the address may be another pod's soon.
const POD_TTL: Duration = Duration::from_secs(5);
/// How long it counts that nobody has an address: somebody may get it at any moment.
const NOBODY_TTL: Duration = Duration::from_secs(1);
/// Verdicts kept: users × namespaces that are dialed in half a minute. Beyond, all are asked for again.
const MAX_KEPT: usize = 10_000;

/// What may be asked for: a subresource of pods, with the verb `create`, in a namespace or (empty) in all.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Question {
    user: User,
    subresource: &'static str,
    namespace: String,
}

/// Asks, and remembers.
pub struct Access {
    client: Client,
    world: Arc<World>,
    kept: Mutex<HashMap<Question, (bool, Instant)>>,
}

impl Access {
    /// With the addresses of `world`.
    pub fn new(client: Client, world: Arc<World>) -> Self {
        Self { client, world, kept: Mutex::default() }
    }

    /// Answers a question of an agent in `namespace`. An address counts as the Service's or pod's that has it; one of a
    /// node (host network, kubelet, node ports) as everybody's: it takes `create pods/portforward` in all namespaces.
    pub async fn answer(&self, asked: &Authorize, namespace: &str) -> Authorized {
        let Some(user) = asked.user.clone().filter(|user| !user.name.is_empty()) else {
            return verdict(asked.id, Verdict::Denied, "the question names no user", TTL);
        };
        match &asked.action {
            Some(authorize::Action::Dial(ip)) => {
                let Some(ip) = address(ip) else {
                    return verdict(asked.id, Verdict::Denied, "this is no IP address", TTL);
                };
                let place = self.world.read().place(ip);
                let (namespace, ttl) = match place {
                    Some(Place::Service(namespace)) => (namespace, TTL),
                    Some(Place::Pod(namespace)) => (namespace, POD_TTL),
                    Some(Place::Node) => (String::new(), TTL),
                    None => {
                        let reason = format!("nothing in this cluster has the address {ip}");
                        return verdict(asked.id, Verdict::NoSuchAddress, &reason, NOBODY_TTL);
                    }
                };
                self.ask(asked.id, Question { user, subresource: "portforward", namespace }, ttl).await
            }
            Some(authorize::Action::Environment(_)) => {
                let namespace = namespace.to_owned();
                self.ask(asked.id, Question { user, subresource: "exec", namespace }, TTL).await
            }
            None => verdict(asked.id, Verdict::Denied, "the question is of an unknown kind", TTL),
        }
    }

    async fn ask(&self, id: u64, question: Question, ttl: Duration) -> Authorized {
        let known = {
            let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.get(&question).filter(|(_, until)| Instant::now() < *until).map(|(allowed, _)| *allowed)
        };
        let allowed = match known {
            Some(allowed) => allowed,
            None => match self.review(&question).await {
                Ok(allowed) => {
                    self.keep(question.clone(), allowed);
                    allowed
                }
                Err(error) => {
                    tracing::warn!(%error, "SubjectAccessReview failed");
                    let reason = format!("the API server could not be asked: {error}");
                    return verdict(id, Verdict::Denied, &reason, NOBODY_TTL);
                }
            },
        };
        if allowed {
            return verdict(id, Verdict::Allowed, "", ttl);
        }
        let Question { user, subresource, namespace } = question;
        let place = if namespace.is_empty() {
            "all namespaces (this is a node's address)".to_owned()
        } else {
            format!("namespace {namespace}")
        };
        verdict(
            id,
            Verdict::Denied,
            &format!("{} may not create pods/{subresource} in {place}", user.name),
            ttl,
        )
    }

    fn keep(&self, question: Question, allowed: bool) {
        let now = Instant::now();
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= MAX_KEPT {
            kept.retain(|_, (_, until)| now < *until);
        }
        if kept.len() >= MAX_KEPT {
            kept.clear();
        }
        kept.insert(question, (allowed, now + TTL));
    }

    async fn review(&self, question: &Question) -> Result<bool, kube::Error> {
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(question.user.name.clone()),
                groups: Some(question.user.groups.clone()),
                resource_attributes: Some(ResourceAttributes {
                    namespace: Some(question.namespace.clone()).filter(|namespace| !namespace.is_empty()),
                    verb: Some("create".to_owned()),
                    resource: Some("pods".to_owned()),
                    subresource: Some(question.subresource.to_owned()),
                    ..ResourceAttributes::default()
                }),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let answer = Api::all(self.client.clone()).create(&PostParams::default(), &review).await?;
        Ok(answer.status.is_some_and(|status| status.allowed && !status.denied.unwrap_or(false)))
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        // An IPv4 address in IPv6 clothes is the same address, and must not get around what is asked of it.
        16 => Some(IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical()),
        _ => None,
    }
}

fn verdict(id: u64, verdict: Verdict, reason: &str, ttl: Duration) -> Authorized {
    Authorized {
        id,
        verdict: verdict.into(),
        reason: reason.to_owned(),
        ttl_s: u32::try_from(ttl.as_secs()).unwrap_or(u32::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_4_or_16_bytes() {
        assert_eq!(address(&[10, 0, 0, 1]), Some("10.0.0.1".parse().unwrap()));
        let mapped: std::net::Ipv6Addr = "::ffff:10.0.0.1".parse().unwrap();
        assert_eq!(address(&mapped.octets()), Some("10.0.0.1".parse().unwrap()));
        assert_eq!(address(&[]), None);
        assert_eq!(address(&[1; 5]), None);
    }
}
