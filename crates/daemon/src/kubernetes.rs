//! The cluster through its API server: kubeconfig, client, who the user is, and errors in words.

use std::path::PathBuf;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use kube::api::{PostParams, WatchEvent, WatchParams};
use kube::client::{Body, ClientBuilder, ConfigExt};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;
use tower::{BoxError, ServiceBuilder};

use crate::failure::{Exit, Failure, chain};

/// How long a dead connection to the API server may look alive: the kernel's keep-alive and user time-out (TCP(7)).
const API_SILENCE: Duration = Duration::from_secs(20);
/// A watch is opened anew after this long; the API server closes it after about as much on its own.
const WATCH_SECONDS: u32 = 240;

/// Which cluster, as typed: as `kubectl --kubeconfig --context`.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    /// `None` for `$KUBECONFIG` or `~/.kube/config`.
    pub kubeconfig: Option<PathBuf>,
    /// `None` for the kubeconfig's current one.
    pub context: Option<String>,
}

impl Choice {
    /// Which file is read, or which ones (the variable may list several), for messages.
    fn files(&self) -> String {
        match (&self.kubeconfig, std::env::var("KUBECONFIG").ok().filter(|files| !files.is_empty())) {
            (Some(path), _) => path.display().to_string(),
            (None, Some(files)) => files,
            (None, None) => "~/.kube/config".to_owned(),
        }
    }
}

/// A context of a kubeconfig, read without running anything in it.
#[derive(Clone, Debug)]
pub struct Target {
    kubeconfig: Kubeconfig,
    /// The context's name.
    pub context: String,
    /// Its namespace.
    pub namespace: String,
    /// URL of the API server.
    pub server: String,
    /// The kubeconfig's name for the user (not who the API server says it is).
    pub kube_user: String,
}

impl Target {
    /// Reads the kubeconfig and finds the context.
    ///
    /// # Errors
    /// [`Failure`] that names the file or the contexts that there are.
    pub fn read(choice: &Choice) -> Result<Self, Failure> {
        let failed = || Failure::new("cannot tell which cluster is meant");
        let kubeconfig = match &choice.kubeconfig {
            Some(path) => Kubeconfig::read_from(path),
            None => Kubeconfig::read(),
        }
        .map_err(|error| {
            let failure = failed().caused_by(&error);
            let files = choice.files();
            let named = failure.because.iter().any(|cause| cause.contains(&files));
            let failure = if named { failure } else { failure.because(format!("in {files}")) };
            failure.advice("check --kubeconfig or $KUBECONFIG; `kubectl config view` reads the same")
        })?;
        let known =
            || kubeconfig.contexts.iter().map(|context| context.name.as_str()).collect::<Vec<_>>().join(", ");
        let name = choice
            .context
            .clone()
            .or_else(|| kubeconfig.current_context.clone())
            .filter(|name| !name.is_empty());
        let Some(name) = name else {
            return Err(failed()
                .because("the kubeconfig has no current context")
                .advice(format!("add --context with one of: {}", known())));
        };
        let context = kubeconfig
            .contexts
            .iter()
            .find(|context| context.name == name)
            .and_then(|named| named.context.as_ref())
            .ok_or_else(|| {
                failed()
                    .because(format!("the kubeconfig has no context {name}"))
                    .advice(format!("add --context with one of: {}", known()))
            })?;
        let server = kubeconfig
            .clusters
            .iter()
            .find(|cluster| cluster.name == context.cluster)
            .and_then(|named| named.cluster.as_ref()?.server.clone())
            .ok_or_else(|| {
                failed().because(format!(
                    "context {name} names the cluster {}, which has no server",
                    context.cluster
                ))
            })?;
        Ok(Self {
            namespace: context.namespace.clone().unwrap_or_else(|| "default".to_owned()),
            kube_user: context.user.clone().unwrap_or_default(),
            context: name,
            server,
            kubeconfig,
        })
    }

    /// What one daemon serves: the same for two kubeconfig files that mean the same user of the same cluster.
    pub fn key(&self) -> String {
        format!("{}\n{}\n{}", self.server, self.context, self.kube_user)
    }

    /// A client with the user's own credentials; runs the kubeconfig's exec plugin, if it has one.
    ///
    /// # Errors
    /// [`Failure`] that says what is wrong with the credentials.
    pub async fn client(&self) -> Result<Client, Failure> {
        let failed = || Failure::new(format!("cannot use the context {}", self.context));
        let options = KubeConfigOptions { context: Some(self.context.clone()), ..Default::default() };
        let config =
            Config::from_custom_kubeconfig(self.kubeconfig.clone(), &options).await.map_err(|error| {
                failed().caused_by(&error).advice("see whether `kubectl get namespaces` works")
            })?;
        client(config).map_err(|error| {
            failed()
                .caused_by(&error)
                .advice("see whether `kubectl get namespaces` works")
                .exit(Exit::Refused)
        })
    }
}

/// kube's own client but for the connector: without TCP_NODELAY two small writes in a row wait 40 ms for an
/// acknowledgement, and without keep-alive a connection that sleep or roaming killed looks alive for hours.
fn client(config: Config) -> Result<Client, kube::Error> {
    if config.proxy_url.is_some() {
        return Client::try_from(config);
    }
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_connect_timeout(config.connect_timeout);
    connector.set_keepalive(Some(API_SILENCE / 4));
    connector.set_keepalive_interval(Some(API_SILENCE / 4));
    connector.set_tcp_user_timeout(Some(API_SILENCE));
    let https = config.rustls_https_connector_with_connector(connector)?;
    let http = hyper_util::client::legacy::Builder::new(TokioExecutor::new()).build::<_, Body>(https);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(http);
    Ok(ClientBuilder::new(service, config.default_namespace).build())
}

/// Who the API server (at `server`, for messages) says the user is.
///
/// # Errors
/// [`Failure`]: this is the first request of a session, so it also says when the API server cannot be reached.
pub async fn whoami(client: &Client, server: &str) -> Result<String, Failure> {
    let review = Api::<SelfSubjectReview>::all(client.clone())
        .create(&PostParams::default(), &SelfSubjectReview::default())
        .await
        .map_err(|error| match &error {
            kube::Error::Api(_) | kube::Error::Auth(_) => {
                failure("cannot ask the API server who you are", &error)
            }
            _ => failure(format!("cannot reach the API server at {server}"), &error),
        })?;
    review
        .status
        .and_then(|status| status.user_info?.username)
        .filter(|name| !name.is_empty())
        .ok_or_else(|| Failure::new("the API server did not say who you are"))
}

/// An error of the API server in three parts.
pub fn failure(doing: impl Into<String>, error: &kube::Error) -> Failure {
    let failure = Failure::new(doing);
    let status = match error {
        kube::Error::Api(status) => status,
        kube::Error::Auth(_) => {
            return failure
                .caused_by(error)
                .advice("log in to the cluster again; `kubectl get namespaces` needs the same")
                .exit(Exit::Refused);
        }
        other => {
            // The wrapper says nothing that what is in it does not.
            let failure = match other {
                kube::Error::Service(inner) => failure.caused_by(inner.as_ref()),
                _ => failure.caused_by(error),
            };
            return failure
                .advice("see whether `kubectl get namespaces` works: the API server did not answer");
        }
    };
    let failure = failure.because(&status.message);
    match status.code {
        401 => failure
            .advice("log in to the cluster again; `kubectl get namespaces` needs the same")
            .exit(Exit::Refused),
        403 if status.message.contains(" cannot ") => {
            failure.advice(role_that_allows(&status.message)).exit(Exit::Refused)
        }
        403 | 422 if status.message.contains("denied") => failure
            .advice("the cluster's admission refuses it: ask whoever runs the cluster")
            .exit(Exit::Refused),
        403 => failure.exit(Exit::Refused),
        404 if status.message.contains("could not find the requested resource")
            || status.message.contains("page not found") =>
        {
            failure.advice("forkd is not installed in this cluster: `forkd install`")
        }
        _ => failure,
    }
}

/// Which of forkd's roles has the verb that is missing.
fn role_that_allows(message: &str) -> String {
    // RBAC names bindings to a role that is not there: somebody bound it, and forkd has been uninstalled since.
    if message.contains("\"forkd-user\" not found") {
        return "forkd is not installed there (any more): `forkd install`, as an administrator".to_owned();
    }
    let resource =
        message.split("resource \"").nth(1).and_then(|rest| rest.split('"').next()).unwrap_or_default();
    match resource {
        "forktargets" => "ask for the ClusterRole `edit` (or `forkd-edit`) in the Service's namespace",
        "forks" | "certificatesigningrequests" => "ask for the ClusterRole `forkd-user`",
        "pods/portforward" | "pods" if message.contains("namespace \"forkd\"") => {
            "ask for the Role `forkd-user` in the namespace forkd"
        }
        _ => "ask whoever runs the cluster for that verb on that resource",
    }
    .to_owned()
}

/// What a watched object came to.
pub enum Watched<T> {
    /// Changed, or as it was at the start.
    Object(T),
    /// It is not there, and may have been gone for long.
    Absent,
    /// It has been deleted just now.
    Deleted,
}

/// Why a wait ended without an answer.
pub enum WaitError {
    /// The time was up.
    TimedOut,
    /// The API server.
    Api(kube::Error),
}

/// Follows one object until `answer` has one. Asks for `get` and `watch`, not for `list`.
///
/// # Errors
/// [`WaitError`]. Lost connections and expired watches are no errors until the deadline.
pub async fn wait_for<T, A>(
    api: &Api<T>,
    name: &str,
    deadline: Instant,
    mut answer: impl FnMut(Watched<&T>) -> Option<A>,
) -> Result<A, WaitError>
where
    T: Resource + Clone + std::fmt::Debug + DeserializeOwned,
    T::DynamicType: Default,
{
    let follow = async {
        loop {
            let version = match api.get_opt(name).await {
                Ok(Some(object)) => {
                    if let Some(answer) = answer(Watched::Object(&object)) {
                        return Ok(answer);
                    }
                    object.resource_version().unwrap_or_default()
                }
                Ok(None) => {
                    if let Some(answer) = answer(Watched::Absent) {
                        return Ok(answer);
                    }
                    "0".to_owned()
                }
                Err(error) if transient(&error) => {
                    tracing::debug!(error = chain(&error).join(": "), name, "watch interrupted");
                    tokio::time::sleep(Duration::from_millis(250)).await;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let only = WatchParams::default().fields(&format!("metadata.name={name}")).timeout(WATCH_SECONDS);
            let mut events = match api.watch(&only, &version).await {
                Ok(events) => events.boxed(),
                Err(error) if transient(&error) => continue,
                Err(error) => return Err(error),
            };
            // An interrupted watch begins again with a get.
            while let Ok(Some(event)) = events.try_next().await {
                let answer = match &event {
                    WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                        answer(Watched::Object(object))
                    }
                    WatchEvent::Deleted(_) => answer(Watched::Deleted),
                    WatchEvent::Bookmark(_) => None,
                    WatchEvent::Error(_) => break,
                };
                if let Some(answer) = answer {
                    return Ok(answer);
                }
            }
        }
    };
    match tokio::time::timeout_at(deadline, follow).await {
        Ok(result) => result.map_err(WaitError::Api),
        Err(_) => Err(WaitError::TimedOut),
    }
}

/// An error that the next try may not meet.
pub fn transient(error: &kube::Error) -> bool {
    match error {
        kube::Error::Api(status) => matches!(status.code, 410 | 429 | 500..=599),
        kube::Error::HyperError(_) | kube::Error::Service(_) | kube::Error::ReadEvents(_) => true,
        _ => false,
    }
}

/// An object as JSON for a merge patch; a failure here is a defect of the type.
pub fn as_patch(spec: &impl Serialize) -> Result<serde_json::Value, Failure> {
    serde_json::to_value(spec)
        .map_err(|error| Failure::new("cannot write the object as JSON").caused_by(&error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::Status;

    fn refused(code: u16, message: &str) -> Failure {
        let status = Status { code, message: message.to_owned(), ..Status::default() };
        failure("cannot claim cart", &kube::Error::Api(status.boxed()))
    }

    #[test]
    fn a_missing_verb_is_named_together_with_the_role_that_has_it() {
        let failure = refused(
            403,
            r#"forktargets.forkd.dev is forbidden: User "bob" cannot create resource "forktargets" in API group "forkd.dev" in the namespace "shop""#,
        );
        assert_eq!(failure.exit, Exit::Refused);
        assert!(failure.because[0].contains("cannot create"));
        assert!(failure.advice.unwrap().contains("forkd-edit"));
        let failure = refused(
            403,
            r#"pods "forkd-relay-0" is forbidden: User "bob" cannot get resource "pods/portforward" in API group "" in the namespace "forkd""#,
        );
        assert!(failure.advice.unwrap().contains("Role `forkd-user` in the namespace forkd"));
    }

    #[test]
    fn a_cluster_without_forkd_leads_to_install() {
        let failure = refused(404, "the server could not find the requested resource");
        assert_eq!(
            (failure.exit, failure.advice.as_deref().unwrap().contains("forkd install")),
            (Exit::Failed, true)
        );
    }

    #[test]
    fn admission_counts_as_refusal() {
        let failure = refused(
            422,
            "ValidatingAdmissionPolicy 'forkd-owner' with binding 'forkd-owner' denied request: owner",
        );
        assert_eq!(failure.exit, Exit::Refused);
        assert_eq!(refused(409, "already exists").exit, Exit::Failed);
    }

    fn write(text: &str) -> Choice {
        let path =
            std::env::temp_dir().join(format!("forkd-kubeconfig-{}", crate::state::random_hex().unwrap()));
        std::fs::write(&path, text).unwrap();
        Choice { kubeconfig: Some(path), context: None }
    }

    #[test]
    fn a_context_that_is_not_there_is_answered_with_those_that_are() {
        let mut choice = write(
            "apiVersion: v1\nkind: Config\ncurrent-context: one\nclusters:\n- name: c\n  cluster: {server: 'https://api:6443'}\ncontexts:\n- name: one\n  context: {cluster: c, user: alice, namespace: shop}\n- name: two\n  context: {cluster: none, user: alice}\nusers: []\n",
        );
        let target = Target::read(&choice).unwrap();
        assert_eq!((target.context.as_str(), target.namespace.as_str()), ("one", "shop"));
        choice.context = Some("three".into());
        let failure = Target::read(&choice).unwrap_err();
        assert_eq!(failure.advice.as_deref(), Some("add --context with one of: one, two"));
        choice.context = Some("two".into());
        assert!(Target::read(&choice).unwrap_err().because[0].contains("has no server"));
        std::fs::remove_file(choice.kubeconfig.unwrap()).unwrap();
    }
}
