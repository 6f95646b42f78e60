//! The signer `forkd.dev/laptop`: who asks for a certificate is who the API server says they are.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use forkd_api::{ForkTarget, SIGNER};
use forkd_tunnel::identity::{Identity, requested};
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::server::Server;

/// Longest life of a laptop's certificate.
const MAX_LIFETIME: Duration = Duration::from_secs(12 * 3600);
/// Shortest; the API server allows no shorter `expirationSeconds` either.
const MIN_LIFETIME: Duration = Duration::from_secs(600);
/// Issued and refused requests stay for so long, so that the laptop can fetch the certificate.
const KEEP: Duration = Duration::from_secs(60);
/// Between two tries, when the API server fails.
const RETRY: Duration = Duration::from_secs(2);
/// Longest URI: user and all groups. A certificate of this size still goes through a handshake well.
const MAX_URI: usize = 12 * 1024;
/// Requests that wait for their removal at a time.
const MAX_WAITING: usize = 1000;
/// Ids that are remembered with their users.
const MAX_HOLDERS: usize = 10_000;

/// Signs laptops' requests.
pub struct Signer {
    client: Client,
    server: Arc<Server>,
    /// To whom a laptop id was issued, and until when that certificate lives.
    holders: Mutex<HashMap<String, (String, Instant)>>,
    waiting: Arc<Semaphore>,
    /// Uids of requests that were settled, until they are gone: the own writes come back as events, one by one, and the
    /// earlier of them look as if there were something left to do.
    settled: Mutex<HashSet<String>>,
}

impl Signer {
    /// With the authority of `server`.
    pub fn new(client: Client, server: Arc<Server>) -> Self {
        Self {
            client,
            server,
            holders: Mutex::default(),
            waiting: Arc::new(Semaphore::new(MAX_WAITING)),
            settled: Mutex::default(),
        }
    }

    /// Watches for requests, for ever.
    pub async fn run(self) {
        let api: Api<CertificateSigningRequest> = Api::all(self.client.clone());
        let config = watcher::Config::default().fields(&format!("spec.signerName={SIGNER}"));
        let mut events = watcher(api.clone(), config).default_backoff().boxed();
        // Names of requests that the API server did not let settle, after a wait.
        let mut again: FuturesUnordered<BoxFuture<'static, String>> = FuturesUnordered::new();
        loop {
            let request = tokio::select! {
                event = events.next() => match event {
                    Some(Ok(Event::Apply(request) | Event::InitApply(request))) => request,
                    // A listing shows what is; nothing of before counts.
                    Some(Ok(Event::Init)) => {
                        self.settled().clear();
                        continue;
                    }
                    Some(Ok(Event::Delete(request))) => {
                        self.settled().remove(&request.metadata.uid.unwrap_or_default());
                        continue;
                    }
                    Some(Ok(Event::InitDone)) => continue,
                    Some(Err(error)) => {
                        let kind = "CertificateSigningRequest";
                        tracing::warn!(kind, %error, "watch interrupted, trying again");
                        continue;
                    }
                    None => return,
                },
                Some(name) = again.next(), if !again.is_empty() => match api.get_opt(&name).await {
                    Ok(Some(request)) => request,
                    Ok(None) => continue,
                    Err(error) => {
                        tracing::warn!(name, %error, "a certificate request could not be read, trying again");
                        again.push(after_a_wait(name).boxed());
                        continue;
                    }
                },
            };
            if !self.settle(&api, &request).await && again.len() < MAX_WAITING {
                again.push(after_a_wait(request.name_any()).boxed());
            }
        }
    }

    /// Whether the request needs no more.
    async fn settle(
        &self,
        api: &Api<CertificateSigningRequest>,
        request: &CertificateSigningRequest,
    ) -> bool {
        let uid = request.metadata.uid.clone().unwrap_or_default();
        if self.settled().contains(&uid) {
            return true;
        }
        if !is_settled(request)
            && let Err(error) = self.decide(api, request).await
        {
            let name = request.name_any();
            tracing::warn!(name, %error, "a laptop's certificate request could not be settled, trying again");
            return false;
        }
        self.settled().insert(uid);
        self.clear_away(api.clone(), request);
        true
    }

    fn settled(&self) -> MutexGuard<'_, HashSet<String>> {
        self.settled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn decide(
        &self,
        api: &Api<CertificateSigningRequest>,
        request: &CertificateSigningRequest,
    ) -> Result<(), kube::Error> {
        let name = request.name_any();
        let identity = match identify(request, |id| self.holder(id)) {
            Ok(identity) => identity,
            Err(reason) => return self.deny(api, &name, &reason).await,
        };
        let lifetime = lifetime(request);
        let chain = match self.server.ca.authority.sign(&request.spec.request.0, &identity, lifetime) {
            Ok(chain) => chain,
            Err(error) => return self.deny(api, &name, &error.to_string()).await,
        };
        if !has_condition(request, "Approved") {
            let message = "who the API server says it is may connect a laptop";
            let patch = condition("Approved", "SignerPolicy", message);
            api.patch_approval(&name, &PatchParams::default(), &Patch::Strategic(patch)).await?;
        }
        let certificate = json!({ "status": { "certificate": ByteString(chain.to_pem().into_bytes()) } });
        api.patch_status(&name, &PatchParams::default(), &Patch::Merge(certificate)).await?;
        if let Identity::Laptop { id, user, .. } = identity {
            tracing::info!(laptop = id, user, "issued a laptop's certificate");
            self.remember(id, user, lifetime);
        }
        Ok(())
    }

    async fn deny(
        &self,
        api: &Api<CertificateSigningRequest>,
        name: &str,
        reason: &str,
    ) -> Result<(), kube::Error> {
        tracing::info!(name, reason, "denied a laptop's certificate request");
        let patch = condition("Denied", "SignerPolicy", reason);
        api.patch_approval(name, &PatchParams::default(), &Patch::Strategic(patch)).await?;
        Ok(())
    }

    /// Removes a settled request a minute after its creation. If too many wait already, it is left to Kubernetes, which
    /// removes requests after an hour.
    fn clear_away(&self, api: Api<CertificateSigningRequest>, request: &CertificateSigningRequest) {
        let Ok(permit) = Arc::clone(&self.waiting).try_acquire_owned() else { return };
        let name = request.name_any();
        let created = request.metadata.creation_timestamp.as_ref().map_or(Timestamp::now(), |time| time.0);
        let age = Duration::try_from(Timestamp::now().duration_since(created)).unwrap_or_default();
        let preconditions = Preconditions { uid: request.metadata.uid.clone(), ..Preconditions::default() };
        let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        tokio::spawn(async move {
            tokio::time::sleep(KEEP.saturating_sub(age)).await;
            match api.delete(&name, &params).await {
                Ok(_) => {}
                // Gone already: each event of a settled request brings one of these.
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
                Err(error) => tracing::warn!(%name, %error, "removing a settled certificate request failed"),
            }
            drop(permit);
        });
    }

    /// Whose a laptop id is: of the owner of the oldest target that names it, or of whom it was issued to last. Another
    /// user cannot take it: relays know laptops by their id.
    fn holder(&self, id: &str) -> Option<String> {
        let of_target = {
            let world = self.server.world.read();
            let named = world.targets.all().filter(|target| target.spec.laptop.id == id);
            let created = |target: &&Arc<ForkTarget>| target.metadata.creation_timestamp.clone();
            named.min_by_key(created).map(|target| target.spec.owner.clone())
        };
        let holders = self.holders.lock().unwrap_or_else(PoisonError::into_inner);
        of_target.or_else(|| {
            holders.get(id).filter(|(_, until)| Instant::now() < *until).map(|(user, _)| user.clone())
        })
    }

    fn remember(&self, id: String, user: String, lifetime: Duration) {
        let now = Instant::now();
        let mut holders = self.holders.lock().unwrap_or_else(PoisonError::into_inner);
        if holders.len() >= MAX_HOLDERS {
            holders.retain(|_, (_, until)| now < *until);
        }
        if holders.len() < MAX_HOLDERS || holders.contains_key(&id) {
            holders.insert(id, (user, now + lifetime));
        }
    }
}

async fn after_a_wait(name: String) -> String {
    tokio::time::sleep(RETRY).await;
    name
}

fn is_settled(request: &CertificateSigningRequest) -> bool {
    let issued = request.status.as_ref().is_some_and(|status| status.certificate.is_some());
    issued || has_condition(request, "Denied") || has_condition(request, "Failed")
}

fn has_condition(request: &CertificateSigningRequest, kind: &str) -> bool {
    let conditions = request.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|condition| condition.type_ == kind && condition.status == "True")
}

fn condition(kind: &str, reason: &str, message: &str) -> serde_json::Value {
    json!({ "status": { "conditions": [{
        "type": kind,
        "status": "True",
        "reason": reason,
        "message": message,
        "lastUpdateTime": Timestamp::now().to_string(),
    }] } })
}

fn lifetime(request: &CertificateSigningRequest) -> Duration {
    let asked = request.spec.expiration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
    asked.map_or(MAX_LIFETIME, Duration::from_secs).clamp(MIN_LIFETIME, MAX_LIFETIME)
}

/// What the certificate will say: the laptop id is the request's wish, user and groups are what the API server wrote.
fn identify(
    request: &CertificateSigningRequest,
    holder: impl Fn(&str) -> Option<String>,
) -> Result<Identity, String> {
    let spec = &request.spec;
    let user = spec.username.clone().unwrap_or_default();
    if user.is_empty() || user == "system:anonymous" {
        return Err("anonymous users cannot connect a laptop".to_owned());
    }
    let Identity::Laptop { id, .. } = requested(&spec.request.0).map_err(|error| error.to_string())? else {
        return Err("the request is not that of a laptop: its URI has to be forkd://laptop/ID".to_owned());
    };
    let is_label = (1..=63).contains(&id.len())
        && id.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
        && !id.starts_with('-')
        && !id.ends_with('-');
    if !is_label {
        return Err(format!("`{id}` is no laptop id: 1 to 63 lower-case letters, digits and inner hyphens"));
    }
    if holder(&id).is_some_and(|holder| holder != user) {
        return Err(format!("laptop id {id} is another user's"));
    }
    let mut groups = spec.groups.clone().unwrap_or_default();
    groups.retain(|group| !group.is_empty());
    let identity = Identity::Laptop { id, user, groups };
    let length = identity.uri().len();
    if length > MAX_URI {
        return Err(format!(
            "user and groups take {length} bytes, more than the {MAX_URI} that fit a certificate"
        ));
    }
    Ok(identity)
}

#[cfg(test)]
mod tests {
    use forkd_tunnel::identity::KeyPair;
    use k8s_openapi::api::certificates::v1::CertificateSigningRequestSpec;

    use super::*;

    fn request(wish: &Identity, user: &str, groups: &[&str]) -> CertificateSigningRequest {
        let pem = KeyPair::generate().unwrap().request(wish).unwrap().pem;
        CertificateSigningRequest {
            spec: CertificateSigningRequestSpec {
                request: ByteString(pem.into_bytes()),
                signer_name: SIGNER.to_owned(),
                username: Some(user.to_owned()),
                groups: Some(groups.iter().map(|group| (*group).to_owned()).collect()),
                ..CertificateSigningRequestSpec::default()
            },
            ..CertificateSigningRequest::default()
        }
    }

    fn laptop(id: &str) -> Identity {
        Identity::Laptop {
            id: id.to_owned(),
            user: "root".to_owned(),
            groups: vec!["system:masters".to_owned()],
        }
    }

    #[test]
    fn user_and_groups_are_what_the_api_server_says_not_what_is_asked_for() {
        let identity = identify(&request(&laptop("l1"), "alice", &["dev"]), |_| None).unwrap();
        let expected = Identity::Laptop {
            id: "l1".to_owned(),
            user: "alice".to_owned(),
            groups: vec!["dev".to_owned()],
        };
        assert_eq!(identity, expected);
    }

    #[test]
    fn nobody_gets_the_certificate_of_another_kind_or_of_another_users_laptop() {
        assert!(
            identify(&request(&Identity::Controller, "alice", &[]), |_| None)
                .unwrap_err()
                .contains("not that of a laptop")
        );
        let held = |_: &str| Some("bob".to_owned());
        assert!(
            identify(&request(&laptop("l1"), "alice", &[]), held).unwrap_err().contains("another user's")
        );
        assert!(identify(&request(&laptop("l1"), "bob", &[]), held).is_ok());
        assert!(identify(&request(&laptop("l1"), "system:anonymous", &[]), |_| None).is_err());
        for id in ["L1", "a/b", "-a", "a.env", "é"] {
            assert!(identify(&request(&laptop(id), "alice", &[]), |_| None).is_err(), "{id}");
        }
        let mut broken = request(&laptop("l1"), "alice", &[]);
        broken.spec.request = ByteString(b"-----BEGIN CERTIFICATE REQUEST-----".to_vec());
        assert!(identify(&broken, |_| None).is_err());
    }

    #[test]
    fn more_groups_than_fit_are_refused_with_the_number() {
        let groups: Vec<String> = (0..1000).map(|number| format!("group-number-{number}")).collect();
        let groups: Vec<&str> = groups.iter().map(String::as_str).collect();
        assert!(identify(&request(&laptop("l1"), "alice", &groups), |_| None).unwrap_err().contains("bytes"));
    }

    #[test]
    fn a_certificate_lives_hours_whatever_is_asked_for() {
        let mut asks = request(&laptop("l1"), "alice", &[]);
        assert_eq!(lifetime(&asks), MAX_LIFETIME);
        for (seconds, hours) in [(3600, 1), (i32::MAX, 12)] {
            asks.spec.expiration_seconds = Some(seconds);
            assert_eq!(lifetime(&asks), Duration::from_secs(hours * 3600));
        }
        asks.spec.expiration_seconds = Some(-1);
        assert_eq!(lifetime(&asks), MAX_LIFETIME);
    }
}
