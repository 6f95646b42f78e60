//! The roles `agent` and `gateway`: joined to the controller, reachable through the relays, serving laptops.
//!
//! What an agent does with each new [`Desired`], in this order: the relays learn which laptops may call, requests learn
//! their routes, only then is a port redirected; on the way out the redirect goes first. So a request that is redirected
//! always finds its route.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use forkd_tunnel::endpoint::AgentEndpoint;
use forkd_tunnel::identity::{AgentRole, Identity};
use forkd_wire::control::{Desired, PortStatus, Status, User};
use forkd_wire::relay::Register;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::dns::Resolver;
use crate::laptops::Laptops;
use crate::link::{Config, Link, State};
use crate::nft::Redirect;
use crate::older;
use crate::proxy::{Counters, Proxy, Routes};
use crate::serve::Service;

/// An agent without targets stays for the next intercept, which then needs no new container, and ends after this.
const IDLE: Duration = Duration::from_secs(600);
/// The environment is read once per intercept; its reader has nothing else to wait for.
const IDLE_ENVIRONMENT: Duration = Duration::from_secs(60);
/// How often the counts in the status are looked at.
const COUNT: Duration = Duration::from_secs(5);
/// A sidecar's pooled connection on which nothing has moved for this long is closed, so that its next request comes by
/// the redirect; a response that pauses for longer in the middle is rare.
const POOLED_IDLE: Duration = Duration::from_secs(1);
/// How long open connections may go on after the end was decided. Within the kubelet's own 30 s.
const GRACE: Duration = Duration::from_secs(20);

/// What this process is, of the roles that serve laptops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// In somebody's pod.
    Pod,
    /// In somebody's pod, with the application's rights.
    Environment,
    /// In a pod of forkd's own.
    Gateway,
}

/// Runs until told to stop, by signal or by the controller.
///
/// # Errors
/// It could not start, or was refused.
pub async fn run(role: Role, config: Config) -> anyhow::Result<()> {
    let link = Arc::new(Link::join(config).await?);
    check_identity(role, link.credentials.identity())?;
    let udp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).context("bind a UDP socket")?;
    let endpoint =
        Arc::new(AgentEndpoint::new(link.credentials.clone(), udp).context("start the QUIC endpoint")?);
    let resolver = match Resolver::of_this_pod() {
        Ok(resolver) => Some(Arc::new(resolver)),
        Err(error) => {
            tracing::warn!("this pod cannot ask the cluster's DNS: {error:#}");
            None
        }
    };
    let service = Service { link: link.clone(), resolver, reads_environment: role == Role::Environment };
    let agent = Agent {
        role,
        laptops: Laptops::default(),
        routes: Routes::default(),
        takeover: None,
        service: Arc::new(service),
        endpoint,
        link,
    };
    agent.run().await
}

fn check_identity(role: Role, identity: &Identity) -> anyhow::Result<()> {
    let fits = match identity {
        Identity::Agent { role: AgentRole::Pod, .. } => role == Role::Pod,
        Identity::Agent { role: AgentRole::Env, .. } => role == Role::Environment,
        Identity::Agent { role: AgentRole::Gateway, .. } => role == Role::Gateway,
        _ => false,
    };
    anyhow::ensure!(fits, "the controller took this {role:?} for {}", identity.uri());
    Ok(())
}

struct Agent {
    role: Role,
    link: Arc<Link>,
    endpoint: Arc<AgentEndpoint>,
    service: Arc<Service>,
    laptops: Laptops,
    routes: Routes,
    takeover: Option<Takeover>,
}

/// The pod's ports, taken over.
struct Takeover {
    redirect: Redirect,
    counters: Counters,
    stop: oneshot::Sender<()>,
    proxy: JoinHandle<usize>,
}

impl Agent {
    async fn run(mut self) -> anyhow::Result<()> {
        let mut desired = self.link.desired.clone();
        let mut state = self.link.state.clone();
        let mut changes = self.laptops.changes();
        let mut there = self.endpoint.laptops();
        let mut count = interval(COUNT);
        count.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        let mut interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
        let mut idle_since = Instant::now();
        let why = loop {
            let idle = match self.role {
                Role::Gateway => None,
                Role::Pod => Some(IDLE),
                Role::Environment => Some(IDLE_ENVIRONMENT),
            };
            let idle = idle.filter(|_| self.is_idle(&desired.borrow())).map(|idle| idle_since + idle);
            tokio::select! {
                // The link's task is the only sender; it ends by saying why in `state`.
                Ok(()) = desired.changed() => {
                    let now = desired.borrow_and_update().clone();
                    self.apply(&now).await;
                    idle_since = Instant::now();
                }
                Ok(()) = state.changed() => match *state.borrow_and_update() {
                    State::Joined => {}
                    State::Retired => break "retired by the controller",
                    State::Lost => break "the controller is gone for good",
                },
                Some((connection, identity)) = self.endpoint.accept() => self.admit(connection, identity),
                Ok(()) = there.changed() => {
                    let now = there.borrow_and_update().clone();
                    self.laptops.set_there(now);
                }
                Ok(()) = changes.changed() => self.report(),
                _ = count.tick() => {
                    self.count();
                    self.report();
                }
                _ = terminate.recv() => break "terminated",
                _ = interrupt.recv() => break "interrupted",
                () = sleep_until(idle.unwrap_or_else(far)), if idle.is_some() => break "idle",
            }
        };
        tracing::info!(why, "the end");
        if let Some(takeover) = self.takeover.take() {
            takeover.end().await;
        }
        self.endpoint.close("the agent ends").await;
        Ok(())
    }

    fn is_idle(&self, desired: &Desired) -> bool {
        desired.routes.is_empty() && desired.environment_for.is_empty()
    }

    async fn apply(&mut self, desired: &Desired) {
        let relays: Vec<SocketAddr> = desired
            .relays
            .iter()
            .filter_map(|addr| {
                addr.parse().inspect_err(|_| tracing::error!(addr, "no socket address of a relay")).ok()
            })
            .collect();
        if let Err(error) = self.endpoint.set_relays(&relays) {
            tracing::error!(%error, "reach the relays");
        }
        let laptops = allowed(desired);
        self.endpoint.register(Register {
            laptops: laptops.iter().cloned().collect(),
            any_laptop: self.role == Role::Gateway,
        });
        if self.role != Role::Gateway {
            self.laptops.keep(&laptops);
        }
        let error = match self.take(desired).await {
            Ok(()) => String::new(),
            Err(error) => {
                tracing::error!("take the ports: {error:#}");
                format!("{error:#}")
            }
        };
        self.link.report.send_modify(|status| {
            status.generation = desired.generation;
            status.error = error;
        });
        self.count();
        self.report();
    }

    /// Routes before redirects, so that whatever is redirected finds its route.
    async fn take(&mut self, desired: &Desired) -> anyhow::Result<()> {
        if self.role != Role::Pod {
            return Ok(());
        }
        self.routes.replace(desired.routes.iter().cloned());
        let ports = self.routes.ports();
        if self.takeover.is_none() && !ports.is_empty() {
            self.takeover = Some(Takeover::begin(self.routes.clone(), self.laptops.clone()).await?);
        }
        if let Some(takeover) = &mut self.takeover {
            let before = takeover.redirect.ports().clone();
            takeover.redirect.apply(&ports).context("redirect the ports")?;
            if before != ports {
                tracing::info!(?ports, "redirected");
            }
            takeover.close_pooled();
        }
        Ok(())
    }

    fn admit(&self, connection: quinn::Connection, identity: Identity) {
        let Identity::Laptop { id, user, groups } = identity else {
            tracing::warn!(identity = identity.uri(), "only laptops are served");
            connection.close(0u8.into(), b"only laptops are served");
            return;
        };
        if self.role != Role::Gateway && !allowed(&self.link.desired.borrow()).contains(&id) {
            tracing::warn!(laptop = id, user, "this laptop holds no target here");
            connection.close(0u8.into(), b"this laptop holds no target here");
            return;
        }
        tracing::info!(laptop = id, user, "laptop connected");
        let user = User { name: user, groups };
        self.laptops.add(&id, user.clone(), connection.clone());
        let (service, laptops) = (self.service.clone(), self.laptops.clone());
        tokio::spawn(async move {
            service.laptop(id.clone(), user, connection.clone()).await;
            laptops.remove(&id, &connection);
        });
    }

    /// Counts connections anew; the controller is told if a number changed.
    fn count(&self) {
        let Some(takeover) = &self.takeover else {
            return self.tell(|status| status.ports.clear());
        };
        takeover.close_pooled();
        let ports: Vec<_> = takeover.redirect.ports().iter().map(|port| takeover.status_of(*port)).collect();
        self.tell(|status| status.ports = ports);
    }

    fn report(&self) {
        let laptops = self.laptops.reachable();
        self.tell(|status| status.laptops = laptops);
    }

    fn tell(&self, change: impl FnOnce(&mut Status)) {
        self.link.report.send_if_modified(|status| {
            let before = status.clone();
            change(status);
            *status != before
        });
    }
}

/// A time that never comes: tokio's own choice of "far in the future" is 30 years.
fn far() -> Instant {
    Instant::now() + Duration::from_secs(86_400 * 365)
}

/// The laptops that have anything to do with this pod.
fn allowed(desired: &Desired) -> BTreeSet<String> {
    desired
        .routes
        .iter()
        .map(|route| route.laptop.clone())
        .chain(desired.environment_for.iter().cloned())
        .collect()
}

impl Takeover {
    async fn begin(routes: Routes, laptops: Laptops) -> anyhow::Result<Self> {
        let proxy = Proxy::bind(routes, laptops).await.context("listen in the pod")?;
        let redirect = Redirect::new(proxy.port()).context("prepare the redirect")?;
        let counters = proxy.counters();
        let (stop, stopped) = oneshot::channel::<()>();
        let run = proxy.run(async move { drop(stopped.await) }, GRACE);
        Ok(Self { redirect, counters, stop, proxy: tokio::spawn(run) })
    }

    fn status_of(&self, port: u16) -> PortStatus {
        let older = older::count(port, self.counters.own()).unwrap_or_else(|error| {
            tracing::warn!(%error, port, "count older connections");
            0
        });
        PortStatus {
            port: port.into(),
            older_connections: older,
            opaque_connections: self.counters.opaque_connections(port),
        }
    }

    fn close_pooled(&self) {
        for port in self.redirect.ports() {
            match older::close_pooled(*port, POOLED_IDLE) {
                Ok(pooled) if pooled == older::Pooled::default() => {}
                Ok(pooled) => tracing::debug!(port, ?pooled, "a sidecar's pooled connections"),
                Err(error) => tracing::warn!(%error, port, "close a sidecar's pooled connections"),
            }
        }
    }

    async fn end(mut self) {
        // The table itself carries the connections that are open: it goes last.
        if let Err(error) = self.redirect.apply(&BTreeSet::new()) {
            tracing::error!(%error, "redirect no more connections");
        }
        // The proxy is there until it is told to stop.
        let _ = self.stop.send(());
        match self.proxy.await {
            Ok(0) => {}
            Ok(cut) => tracing::warn!(cut, "connections were still open at the end"),
            Err(error) => tracing::error!(%error, "the proxy failed"),
        }
        if let Err(error) = self.redirect.remove() {
            tracing::error!(%error, "remove the redirect");
        }
    }
}
