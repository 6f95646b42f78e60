//! One laptop's connection to one cluster. Lives until `quit`, across sleep, roaming and restarts of anything in between.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use forkd_api::Laptop;
use forkd_tunnel::identity::Identity;
use jiff::Timestamp;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::claim::Claimant;
use crate::control::{Connected, Progress};
use crate::dataplane::{DataPlane, SharedPlane};
use crate::deliver::Targets;
use crate::failure::Failure;
use crate::helper::HelperClient;
use crate::intercept::Intercepts;
use crate::kubernetes::{self, Target};
use crate::network::{self, Network};
use crate::pipes::{self, Path, Report};
use crate::status::{self, Status};
use crate::{certificate, state};

/// What is wrong at the moment, by what it is about.
#[derive(Clone, Default)]
pub struct Problems(Arc<Mutex<BTreeMap<String, String>>>);

impl Problems {
    /// Something is wrong (or, with `None`, right again) with `about`.
    pub fn set(&self, about: &str, problem: Option<String>) {
        let mut problems = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match problem {
            Some(problem) => {
                if problems.insert(about.to_owned(), problem.clone()).as_ref() != Some(&problem) {
                    tracing::warn!(about, problem, "problem");
                }
            }
            None => drop(problems.remove(about)),
        }
    }

    fn all(&self) -> Vec<String> {
        let problems = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        problems.iter().map(|(about, problem)| format!("{about}: {problem}")).collect()
    }
}

/// See the module.
pub struct Session {
    target: Target,
    claimant: Claimant,
    since: Timestamp,
    /// Where short names are looked up.
    namespace: Mutex<String>,
    plane: SharedPlane,
    network: Arc<Network>,
    path: watch::Receiver<Path>,
    problems: Problems,
    /// What it holds.
    pub intercepts: Intercepts,
    /// Ended with the session.
    _tasks: JoinSet<()>,
}

impl Session {
    /// Starts a session, in this order: who the user is, a certificate, the port-forward to a relay, the gateway's
    /// description of the cluster, and last what changes the laptop: TUN, routes, resolver.
    ///
    /// # Errors
    /// [`Failure`] of the first step that fails; nothing is left behind then.
    pub async fn start(
        target: Target,
        helper: HelperClient,
        namespace: Option<String>,
        progress: &Progress,
    ) -> Result<Self, Failure> {
        progress.step(format!("connecting to {}", target.context));
        let client = target.client().await?;
        let user = kubernetes::whoami(&client, &target.server).await?;
        let id = state::laptop_id(&user)
            .map_err(|error| Failure::new("cannot tell this laptop's id").caused_by(&error))?;
        let credentials = certificate::obtain(&client, &id, &user, progress).await?;

        progress.step("opening the way to the cluster");
        let pipe = pipes::open(&client, 0).await?;
        let targets = Targets::default();
        let (path_changes, path) = watch::channel(Path::default());
        let (heard, reachable) = watch::channel(Vec::new());
        let report = Report { path: path_changes, reachable: heard };
        let plane = DataPlane::start(credentials.clone(), targets.clone(), reachable)
            .await
            .map(Arc::new)
            .map_err(|error| Failure::new("cannot start the session").caused_by(&error))?;
        let mut tasks = JoinSet::new();
        tasks.spawn(pipes::keep(client.clone(), plane.endpoint.clone(), pipe, report));
        tasks.spawn(certificate::keep(client.clone(), id.clone(), user.clone(), credentials));
        let (found, mut info) = watch::channel(None);
        tasks.spawn(network::follow_cluster(plane.connections(), found));
        let first = network::first_info(&mut info, || path.borrow().problem.clone()).await?;

        let namespace = namespace.unwrap_or_else(|| target.namespace.clone());
        let keep = api_server(&target.server).await;
        let network =
            Network::start(helper, plane.clone(), keep, first, &namespace, progress).await.map(Arc::new)?;
        let problems = Problems::default();
        tasks.spawn(follow_changes(network.clone(), info, problems.clone()));

        let host = nix::sys::utsname::uname()
            .map(|name| name.nodename().to_string_lossy().into_owned())
            .unwrap_or_default();
        let claimant = Claimant { client, owner: user, laptop: Laptop { id, host } };
        let intercepts = Intercepts::new(claimant.clone(), plane.clone(), targets, problems.clone());
        tracing::info!(context = target.context, user = claimant.owner, "session started");
        Ok(Self {
            target,
            claimant,
            since: Timestamp::now(),
            namespace: Mutex::new(namespace),
            plane,
            network,
            path,
            problems,
            intercepts,
            _tasks: tasks,
        })
    }

    /// Where short names are looked up.
    pub fn namespace(&self) -> String {
        self.namespace.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Looks up short names in another namespace from here on.
    ///
    /// # Errors
    /// [`Failure`] of the helper; nothing has changed then.
    pub async fn set_namespace(&self, namespace: String) -> Result<(), Failure> {
        self.network.set_namespace(&namespace).await?;
        *self.namespace.lock().unwrap_or_else(PoisonError::into_inner) = namespace;
        Ok(())
    }

    /// What `forkd connect` answers.
    pub fn connected(&self, already: bool) -> Connected {
        Connected {
            context: self.target.context.clone(),
            namespace: self.namespace(),
            user: self.claimant.owner.clone(),
            routes: self.network.applied().routes.iter().map(ToString::to_string).collect(),
            already,
        }
    }

    /// What `forkd status` answers.
    pub async fn status(&self, log: &std::path::Path) -> Status {
        let path = self.path.borrow().clone();
        let applied = self.network.applied();
        let mut problems = self.problems.all();
        if let Some(problem) = path.problem {
            problems.push(problem);
        }
        problems.extend(self.plane.forbidden());
        let agents = self
            .plane
            .connections()
            .borrow()
            .iter()
            .filter_map(|(identity, connection)| match identity {
                Identity::Agent { namespace, pod, role, .. } => Some(status::Agent {
                    role: role.as_str().to_owned(),
                    namespace: namespace.clone(),
                    pod: pod.clone(),
                    rtt_us: u64::try_from(connection.rtt().as_micros()).unwrap_or(u64::MAX),
                }),
                _ => None,
            })
            .collect();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            context: self.target.context.clone(),
            server: self.target.server.clone(),
            namespace: self.namespace(),
            user: self.claimant.owner.clone(),
            laptop: self.claimant.laptop.id.clone(),
            since: self.since.round(jiff::Unit::Second).unwrap_or(self.since).to_string(),
            path: path.name,
            agents,
            intercepts: self.intercepts.list(),
            routes: applied.routes.iter().map(ToString::to_string).collect(),
            dns: applied.dns,
            problems,
            log: log.display().to_string(),
        }
    }

    /// Resolves with the reason when the session cannot go on: its helper or its data plane is gone.
    pub async fn broken(&self) -> &'static str {
        tokio::select! {
            () = self.network.helper_gone() => "the privileged helper is gone",
            () = self.plane.ended() => "the TUN is gone",
        }
    }

    /// Undoes what was done to the laptop, and waits until it is done.
    ///
    /// # Errors
    /// [`Failure`] of the helper.
    pub async fn stop(&self) -> Result<(), Failure> {
        self.network.stop().await
    }
}

async fn follow_changes(
    network: Arc<Network>,
    mut info: watch::Receiver<Option<forkd_wire::tunnel::ClusterInfo>>,
    problems: Problems,
) {
    while info.changed().await.is_ok() {
        let Some(changed) = info.borrow_and_update().clone() else { continue };
        let failed = network.set_cluster(changed).await.err();
        problems.set("network", failed.map(|failure| failure.one_line()));
        // A cluster that grows nodes changes often for a while; each change costs a few system calls.
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Addresses of the API server: packets to them carry the tunnel and must never go into it.
async fn api_server(server: &str) -> Vec<IpAddr> {
    let Ok(uri) = server.parse::<http::Uri>() else { return Vec::new() };
    let Some(host) = uri.host().map(|host| host.trim_matches(['[', ']'])) else { return Vec::new() };
    match tokio::net::lookup_host((host, uri.port_u16().unwrap_or(443))).await {
        Ok(found) => found.map(|addr| addr.ip()).collect(),
        // A proxy may resolve it for us; then its address is none of this machine's business.
        Err(error) => {
            tracing::info!(%error, host, "the API server's name does not resolve here");
            Vec::new()
        }
    }
}
