//! Who is it that wants a certificate?

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use forkd_api::SYSTEM_NAMESPACE;
use forkd_tunnel::identity::{AgentRole, Identity};
use forkd_wire::control::join::Proof;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::api::PostParams;
use kube::{Api, Client};

use super::token::{Claims, TokenError, Tokens};
use super::view::{AgentState, PodView, Purpose};
use super::world::World;

/// A join token counts for so long after its container started.
pub const AFTER_START: Duration = Duration::from_secs(60);
/// Audience of the tokens of relay and gateway.
const AUDIENCE: &str = "forkd";

/// Why somebody gets no certificate.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The token itself.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The token is genuine, but the pod is not there (any more).
    #[error("pod {0} of the join token does not exist")]
    NoSuchPod(String),
    /// The token is genuine, but this is not its pod.
    #[error("the join token is of a pod with another address than {0}")]
    WrongAddress(IpAddr),
    /// The token is genuine, but its container has started long ago, or ended.
    #[error("the join token's container {0}")]
    TooLate(&'static str),
    /// A token of something that is no container of forkd.
    #[error("the join token is of container {0}, which is none of forkd's")]
    WrongContainer(String),
    /// A service account's token that the API server does not take.
    #[error("the service account token is not valid: {0}")]
    ServiceAccount(String),
    /// A service account that is neither relay nor gateway.
    #[error("{0} is neither relay nor gateway")]
    NotOurs(String),
    /// The API server cannot be asked.
    #[error("asking the API server: {0}")]
    Api(#[from] kube::Error),
    /// The message has no proof.
    #[error("the join carries no proof")]
    NoProof,
}

/// Decides who joins.
pub struct Joins {
    pub client: Client,
    pub world: Arc<World>,
    pub tokens: Tokens,
}

impl Joins {
    /// Who it is, according to the proof. Uses a join token up.
    ///
    /// # Errors
    /// [`JoinError`]: no certificate then.
    pub async fn identify(&self, proof: Option<&Proof>, from: IpAddr) -> Result<Identity, JoinError> {
        match proof {
            Some(Proof::JoinToken(token)) => {
                let claims = self.tokens.read(token, SystemTime::now())?;
                let pod = self.world.read().pods.one(&claims.namespace, &claims.pod).cloned();
                let identity = agent(&claims, pod.as_deref(), from, Timestamp::now())?;
                self.tokens.spend(&claims, SystemTime::now())?;
                Ok(identity)
            }
            Some(Proof::ServiceAccountToken(token)) => self.service_account(token).await,
            None => Err(JoinError::NoProof),
        }
    }

    async fn service_account(&self, token: &str) -> Result<Identity, JoinError> {
        let review = TokenReview {
            spec: TokenReviewSpec { token: token.to_owned(), audiences: Some(vec![AUDIENCE.to_owned()]) },
            ..TokenReview::default()
        };
        let review = Api::all(self.client.clone()).create(&PostParams::default(), &review).await?;
        let status = review.status.unwrap_or_default();
        let for_us =
            status.audiences.as_deref().unwrap_or_default().iter().any(|audience| audience == AUDIENCE);
        match status.user {
            Some(user) if status.authenticated == Some(true) && for_us => own_role(&user),
            _ => {
                Err(JoinError::ServiceAccount(status.error.unwrap_or_else(|| "not authenticated".to_owned())))
            }
        }
    }
}

/// The agent of a join token, if its pod is there, it is the caller, and its container has just started.
fn agent(
    claims: &Claims,
    pod: Option<&PodView>,
    from: IpAddr,
    now: Timestamp,
) -> Result<Identity, JoinError> {
    let pod = pod
        .filter(|pod| pod.uid == claims.pod_uid)
        .ok_or_else(|| JoinError::NoSuchPod(format!("{}/{}", claims.namespace, claims.pod)))?;
    if !pod.ips.contains(&from.to_canonical()) {
        return Err(JoinError::WrongAddress(from));
    }
    // The watch may lag behind the container; then it has certainly not started long ago.
    match pod.agents.iter().find(|agent| agent.name == claims.container).map(|agent| &agent.state) {
        Some(AgentState::Ended { .. }) => return Err(JoinError::TooLate("has ended")),
        Some(AgentState::Running { since }) => {
            let age = now.duration_since(*since);
            if age > SignedDuration::try_from(AFTER_START).unwrap_or(SignedDuration::ZERO) {
                return Err(JoinError::TooLate("started too long ago"));
            }
        }
        Some(AgentState::Starting | AgentState::Stuck { .. }) | None => {}
    }
    let role = match Purpose::of_name(&claims.container) {
        Some(Purpose::Pod) => AgentRole::Pod,
        Some(Purpose::Env) => AgentRole::Env,
        None => return Err(JoinError::WrongContainer(claims.container.clone())),
    };
    Ok(Identity::Agent {
        pod_uid: pod.uid.clone(),
        namespace: pod.namespace.clone(),
        pod: pod.name.clone(),
        role,
    })
}

/// Relay or gateway, by the service account; which pod, by what the API server adds to a projected token.
fn own_role(user: &UserInfo) -> Result<Identity, JoinError> {
    let name = user.username.clone().unwrap_or_default();
    let extra = |key: &str| {
        let values = user.extra.as_ref()?.get(&format!("authentication.kubernetes.io/{key}"))?;
        values.first().cloned()
    };
    let (Some(pod), Some(uid)) = (extra("pod-name"), extra("pod-uid")) else {
        return Err(JoinError::ServiceAccount("it is bound to no pod".to_owned()));
    };
    match name.strip_prefix(&format!("system:serviceaccount:{SYSTEM_NAMESPACE}:")) {
        Some("forkd-relay") => Ok(Identity::Relay { name: pod }),
        Some("forkd-gateway") => Ok(Identity::Agent {
            pod_uid: uid,
            namespace: SYSTEM_NAMESPACE.to_owned(),
            pod,
            role: AgentRole::Gateway,
        }),
        _ => Err(JoinError::NotOurs(name)),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::view::AgentView;
    use super::*;

    fn claims() -> Claims {
        Claims {
            pod_uid: "uid".to_owned(),
            namespace: "shop".to_owned(),
            pod: "cart-1".to_owned(),
            container: "forkd-agent-0a".to_owned(),
            ..Claims::default()
        }
    }

    fn pod(state: Option<AgentState>) -> PodView {
        let agent = |state| AgentView {
            name: "forkd-agent-0a".to_owned(),
            purpose: Purpose::Pod,
            image: String::new(),
            target_container: String::new(),
            state,
        };
        PodView {
            namespace: "shop".to_owned(),
            name: "cart-1".to_owned(),
            uid: "uid".to_owned(),
            ips: vec!["10.244.0.7".parse().unwrap()],
            agents: state.into_iter().map(agent).collect(),
            ..PodView::default()
        }
    }

    fn join(pod: Option<&PodView>, from: &str, second: i64) -> Result<Identity, JoinError> {
        agent(&claims(), pod, from.parse().unwrap(), Timestamp::from_second(second).unwrap())
    }

    #[test]
    fn an_agent_joins_from_its_own_pod_while_its_container_is_young() {
        let since = Timestamp::from_second(100).unwrap();
        let young = pod(Some(AgentState::Running { since }));
        assert!(join(Some(&young), "10.244.0.7", 160).is_ok());
        assert!(
            join(Some(&young), "::ffff:10.244.0.7", 160).is_ok(),
            "the same address on a dual-stack socket"
        );
        assert!(matches!(join(Some(&young), "10.244.0.7", 161), Err(JoinError::TooLate(_))));
        assert!(matches!(join(Some(&young), "10.244.0.8", 160), Err(JoinError::WrongAddress(_))));
        assert!(join(Some(&pod(None)), "10.244.0.7", 160).is_ok(), "the watch has not shown it yet");
        let ended =
            pod(Some(AgentState::Ended { code: 1, at: None, ran_long: false, message: String::new() }));
        assert!(matches!(join(Some(&ended), "10.244.0.7", 160), Err(JoinError::TooLate(_))));
    }

    #[test]
    fn a_pod_of_the_same_name_is_another_pod() {
        assert!(matches!(join(None, "10.244.0.7", 0), Err(JoinError::NoSuchPod(_))));
        let other = PodView { uid: "other".to_owned(), ..pod(None) };
        assert!(matches!(join(Some(&other), "10.244.0.7", 0), Err(JoinError::NoSuchPod(_))));
    }

    #[test]
    fn the_service_account_decides_between_relay_and_gateway() {
        let user = |name: &str, bound: bool| UserInfo {
            username: Some(format!("system:serviceaccount:{name}")),
            extra: bound.then(|| {
                BTreeMap::from([
                    ("authentication.kubernetes.io/pod-name".to_owned(), vec!["pod-1".to_owned()]),
                    ("authentication.kubernetes.io/pod-uid".to_owned(), vec!["uid".to_owned()]),
                ])
            }),
            ..UserInfo::default()
        };
        assert_eq!(
            own_role(&user("forkd:forkd-relay", true)).unwrap(),
            Identity::Relay { name: "pod-1".to_owned() }
        );
        assert!(matches!(
            own_role(&user("forkd:forkd-gateway", true)),
            Ok(Identity::Agent { role: AgentRole::Gateway, .. })
        ));
        assert!(matches!(own_role(&user("other:forkd-relay", true)), Err(JoinError::NotOurs(_))));
        assert!(matches!(own_role(&user("forkd:forkd-controller", true)), Err(JoinError::NotOurs(_))));
        assert!(matches!(own_role(&user("forkd:forkd-relay", false)), Err(JoinError::ServiceAccount(_))));
    }
}
