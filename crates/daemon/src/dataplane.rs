//! The thread of the packets: QUIC, the TUN's flows, DNS and deliveries, on one `LocalSet`. Nothing in it waits for
//! Kubernetes; the rest of the session talks to it through [`DataPlane`].

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use forkd_core::dns::Zones;
use forkd_tunnel::endpoint::LaptopEndpoint;
use forkd_tunnel::identity::{AgentRole, Credentials, Identity};
use forkd_tunnel::stream::{self, OpenError, code};
use forkd_wire::tunnel::{Dial, Open, Outcome, Reset, open};
use futures::FutureExt;
use futures::future::LocalBoxFuture;
use quinn::Connection;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::LocalSet;

use crate::deliver::{self, Targets};
use crate::net::stream::{Dialer, Refused, Stream};
use crate::net::{LaptopNet, NetConfig};
use crate::questions::Questions;

/// Between attempts to reach an agent; doubles up to the second.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// An agent that no relay has known for so long is gone. Restarts of relays are over much sooner, and flows through
/// the agent outlive them.
const FORGET: Duration = Duration::from_secs(60);
/// How long a forbidden dial is worth a word in the status: while someone wonders why a connection failed.
const FORBIDDEN_SHOWN: Duration = Duration::from_secs(300);
/// The most reasons that are kept. There is about one for each namespace.
const FORBIDDEN_MAX: usize = 8;
/// An agent that is there says something within a round trip.
const SIGN_OF_LIFE: Duration = Duration::from_secs(4);

/// Connections to agents.
pub type Connections = BTreeMap<Identity, Connection>;

/// The session's handle of the thread. Dropping it ends the thread: connections close, flows are reset.
pub struct DataPlane {
    /// Where pipes are attached.
    pub endpoint: Arc<LaptopEndpoint>,
    connections: watch::Receiver<Connections>,
    preferred: watch::Sender<Vec<String>>,
    orders: mpsc::Sender<Order>,
    forbidden: Forbidden,
    thread: Option<std::thread::JoinHandle<()>>,
}

enum Order {
    Net { tun: OwnedFd, config: NetConfig, started: oneshot::Sender<io::Result<()>> },
    Names { zones: Zones, upstream: Vec<SocketAddr> },
}

/// Why the thread does not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum PlaneError {
    /// It could not be started.
    #[error("start the thread of the packets")]
    Start(#[source] anyhow::Error),
    /// The TUN cannot be used.
    #[error("use the TUN")]
    Tun(#[from] io::Error),
    /// It ended.
    #[error("the thread of the packets ended")]
    Ended,
}

impl DataPlane {
    /// Starts the thread. Agents that are `reachable` are connected to, and what they open is served from `targets`.
    ///
    /// # Errors
    /// [`PlaneError::Start`].
    pub async fn start(
        credentials: Credentials,
        targets: Targets,
        reachable: watch::Receiver<Vec<Identity>>,
    ) -> Result<Self, PlaneError> {
        let (orders, ordered) = mpsc::channel(8);
        let (connected, connections) = watch::channel(Connections::new());
        let (preferred, prefers) = watch::channel(Vec::new());
        let (ready, started) = oneshot::channel();
        let forbidden = Forbidden::default();
        let seen = forbidden.clone();
        let thread = std::thread::Builder::new()
            .name("packets".to_owned())
            .spawn(move || {
                let shared =
                    Shared { connected: Rc::new(connected), reachable, prefers, targets, forbidden: seen };
                let result = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .map_err(anyhow::Error::from)
                    .map(|runtime| {
                        LocalSet::new().block_on(&runtime, run(credentials, shared, ordered, ready))
                    });
                if let Err(error) = result {
                    tracing::error!(%error, "no runtime for the packets");
                }
            })
            .map_err(|error| PlaneError::Start(error.into()))?;
        let endpoint = started.await.map_err(|_| PlaneError::Ended)?.map_err(PlaneError::Start)?;
        Ok(Self { endpoint, connections, preferred, orders, forbidden, thread: Some(thread) })
    }

    /// Connections of the moment, and their changes.
    pub fn connections(&self) -> watch::Receiver<Connections> {
        self.connections.clone()
    }

    /// Why connections of the last minutes were forbidden, newest last: the application sees no more than an errno.
    pub fn forbidden(&self) -> Vec<String> {
        self.forbidden.recent()
    }

    /// New flows go out by the first of these pods (`metadata.uid`) that is connected, else by the gateway.
    pub fn prefer(&self, pods: Vec<String>) {
        self.preferred.send_if_modified(|now| {
            *now != pods && {
                *now = pods;
                true
            }
        });
    }

    /// Begins to serve the TUN.
    ///
    /// # Errors
    /// [`PlaneError::Tun`], [`PlaneError::Ended`].
    pub async fn serve(&self, tun: OwnedFd, config: NetConfig) -> Result<(), PlaneError> {
        let (started, result) = oneshot::channel();
        self.orders.send(Order::Net { tun, config, started }).await.map_err(|_| PlaneError::Ended)?;
        Ok(result.await.map_err(|_| PlaneError::Ended)??)
    }

    /// Changes who answers which names.
    ///
    /// # Errors
    /// [`PlaneError::Ended`].
    pub async fn set_names(&self, zones: Zones, upstream: Vec<SocketAddr>) -> Result<(), PlaneError> {
        self.orders.send(Order::Names { zones, upstream }).await.map_err(|_| PlaneError::Ended)
    }

    /// Resolves when the thread has ended by itself: the TUN is gone, or it panicked.
    pub async fn ended(&self) {
        self.orders.closed().await;
    }
}

impl Drop for DataPlane {
    fn drop(&mut self) {
        // The thread ends when nobody can order anything any more.
        self.orders = mpsc::channel(1).0;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the packets panicked");
        }
    }
}

/// What the cluster said about dials that it forbade. Cheap to clone.
#[derive(Clone, Default)]
struct Forbidden(Arc<Mutex<Vec<(String, Instant)>>>);

impl Forbidden {
    fn note(&self, reason: &str) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(other, _)| other != reason);
        all.push((reason.to_owned(), Instant::now()));
        if all.len() > FORBIDDEN_MAX {
            all.remove(0);
        }
    }

    fn recent(&self) -> Vec<String> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(_, at)| at.elapsed() < FORBIDDEN_SHOWN);
        all.iter().map(|(reason, _)| reason.clone()).collect()
    }
}

struct Shared {
    connected: Rc<watch::Sender<Connections>>,
    reachable: watch::Receiver<Vec<Identity>>,
    prefers: watch::Receiver<Vec<String>>,
    targets: Targets,
    forbidden: Forbidden,
}

async fn run(
    credentials: Credentials,
    shared: Shared,
    mut orders: mpsc::Receiver<Order>,
    ready: oneshot::Sender<anyhow::Result<Arc<LaptopEndpoint>>>,
) {
    let endpoint = match LaptopEndpoint::new(credentials, None) {
        Ok(endpoint) => Arc::new(endpoint),
        Err(error) => {
            // Whoever waits for it says it; nobody waiting means that nobody wants it.
            let _ = ready.send(Err(error.into()));
            return;
        }
    };
    tokio::task::spawn_local(keep_connected(
        endpoint.clone(),
        shared.reachable,
        shared.connected.clone(),
        shared.targets,
    ));
    let connections = shared.connected.subscribe();
    let gateways = connections.clone();
    let questions = Questions::start(async move || gateway(&gateways.borrow()).cloned());
    let dialer = Rc::new(ClusterDialer {
        connections,
        prefers: shared.prefers,
        questions,
        forbidden: shared.forbidden,
    });
    if ready.send(Ok(endpoint.clone())).is_err() {
        return;
    }
    let mut net: Option<LaptopNet> = None;
    loop {
        let stopped = async {
            match &mut net {
                Some(net) => net.stopped().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            order = orders.recv() => match order {
                None => break,
                Some(Order::Net { tun, config, started }) => {
                    let result = LaptopNet::start(tun, config, dialer.clone()).map(|new| net = Some(new));
                    let _ = started.send(result);
                }
                Some(Order::Names { zones, upstream }) => {
                    if let Some(net) = &net {
                        net.set_names(zones, upstream);
                    }
                }
            },
            end = stopped => {
                tracing::error!(?end, "the TUN is gone");
                break;
            }
        }
    }
    drop(net);
    endpoint.close("the session is over").await;
}

fn gateway(connections: &Connections) -> Option<&Connection> {
    connections
        .iter()
        .find(|(identity, _)| matches!(identity, Identity::Agent { role: AgentRole::Gateway, .. }))
        .map(|(_, connection)| connection)
}

/// Keeps a connection to every agent that relays tell of.
async fn keep_connected(
    endpoint: Arc<LaptopEndpoint>,
    mut reachable: watch::Receiver<Vec<Identity>>,
    connected: Rc<watch::Sender<Connections>>,
    targets: Targets,
) {
    let known: Rc<RefCell<BTreeSet<Identity>>> = Rc::default();
    loop {
        let listed = reachable.borrow_and_update().clone();
        for agent in listed {
            if known.borrow_mut().insert(agent.clone()) {
                let (endpoint, connected, targets) = (endpoint.clone(), connected.clone(), targets.clone());
                let (known, reachable) = (known.clone(), reachable.clone());
                tokio::task::spawn_local(async move {
                    keep_agent(&endpoint, &agent, reachable, &connected, targets).await;
                    known.borrow_mut().remove(&agent);
                });
            }
        }
        if reachable.changed().await.is_err() {
            return;
        }
    }
}

/// Connects to one agent, again and again, until no relay knows it any more.
async fn keep_agent(
    endpoint: &LaptopEndpoint,
    agent: &Identity,
    mut reachable: watch::Receiver<Vec<Identity>>,
    connected: &watch::Sender<Connections>,
    targets: Targets,
) {
    let mut pause = RETRY.0;
    while reachable.borrow_and_update().contains(agent) {
        let attempt = tokio::select! {
            attempt = endpoint.connect(agent) => attempt,
            () = unlisted(&mut reachable, agent, Duration::ZERO) => return,
        };
        let connection = match attempt {
            Ok(connection) => connection,
            Err(error) => {
                tracing::debug!(agent = agent.short(), %error, "not connected");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY.1);
                continue;
            }
        };
        pause = RETRY.0;
        tracing::info!(agent = agent.short(), "connected");
        connected.send_modify(|all| drop(all.insert(agent.clone(), connection.clone())));
        let mut news = reachable.clone();
        tokio::select! {
            () = deliver::serve(connection.clone(), agent.clone(), targets.clone()) => {}
            () = unlisted(&mut reachable, agent, FORGET) => connection.close(code(Reset::Cancelled), b"gone"),
            () = replaced(&mut news, agent, &connection, endpoint) => {
                connection.close(code(Reset::Cancelled), b"replaced");
            }
        }
        connected.send_modify(|all| drop(all.remove(agent)));
        tracing::info!(agent = agent.short(), why = ?connection.close_reason(), "disconnected");
    }
}

/// Resolves when no relay has known the agent for `grace`.
async fn unlisted(reachable: &mut watch::Receiver<Vec<Identity>>, agent: &Identity, grace: Duration) {
    loop {
        if reachable.wait_for(|all| !all.contains(agent)).await.is_err() {
            return std::future::pending().await;
        }
        let back = tokio::time::timeout(grace, reachable.wait_for(|all| all.contains(agent))).await;
        if back.is_err() {
            return;
        }
    }
}

/// Resolves when the agent does not know this connection (any more). QUIC would find out after hours: one that was
/// killed says nothing, and its successor of the same name cannot know. Asked whenever a relay has news of agents.
async fn replaced(
    news: &mut watch::Receiver<Vec<Identity>>,
    agent: &Identity,
    connection: &Connection,
    endpoint: &LaptopEndpoint,
) {
    loop {
        if news.changed().await.is_err() {
            return std::future::pending().await;
        }
        let mut paths = endpoint.socket().changes();
        while news.borrow_and_update().contains(agent) {
            paths.mark_unchanged();
            // A kind that no agent knows: it says so, or (of a later version) something else; either is a sign of life.
            let asked =
                tokio::time::timeout(SIGN_OF_LIFE, stream::open(connection, Open { kind: None })).await;
            if asked.is_ok() {
                break;
            }
            // Silence counts only if the way was there all the time.
            if !paths.has_changed().unwrap_or(false) {
                return;
            }
        }
    }
}

/// Opens flows by the pod of the newest intercept, else by the gateway.
struct ClusterDialer {
    connections: watch::Receiver<Connections>,
    prefers: watch::Receiver<Vec<String>>,
    questions: Questions,
    forbidden: Forbidden,
}

impl ClusterDialer {
    /// Best first; two at most.
    fn candidates(&self) -> Vec<Connection> {
        let connections = self.connections.borrow();
        let prefers = self.prefers.borrow();
        let preferred = prefers.iter().find_map(|uid| {
            connections.iter().find_map(|(identity, connection)| match identity {
                Identity::Agent { pod_uid, role: AgentRole::Pod, .. } if pod_uid == uid => Some(connection),
                _ => None,
            })
        });
        preferred.into_iter().chain(gateway(&connections)).cloned().collect()
    }

    async fn open(&self, dst: SocketAddr) -> Result<Stream, Refused> {
        let ip = match dst.ip() {
            std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
            std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        let dial = Open { kind: Some(open::Kind::Dial(Dial { ip, port: dst.port().into() })) };
        let mut last = Refused {
            outcome: Outcome::NetworkUnreachable,
            reason: "no agent of the cluster is connected".to_owned(),
        };
        for connection in self.candidates() {
            match stream::open(&connection, dial.clone()).await {
                Ok((send, recv)) => return Ok(Stream::quic(send, recv)),
                Err(OpenError::Refused { outcome, reason }) => {
                    if outcome == Outcome::Forbidden {
                        self.forbidden.note(&reason);
                    }
                    last = Refused { outcome, reason };
                    // Only an agent that cannot serve at all is worth asking another.
                    if !matches!(outcome, Outcome::Unavailable | Outcome::Unsupported) {
                        break;
                    }
                }
                Err(error) => {
                    last = Refused { outcome: Outcome::NetworkUnreachable, reason: error.to_string() }
                }
            }
        }
        Err(last)
    }
}

impl Dialer for ClusterDialer {
    fn dial(&self, dst: SocketAddr) -> LocalBoxFuture<'_, Result<Stream, Refused>> {
        self.open(dst).boxed_local()
    }

    fn dns(&self, query: Bytes) -> LocalBoxFuture<'_, anyhow::Result<Bytes>> {
        self.questions.ask(query).boxed_local()
    }
}

/// Keeps [`DataPlane`] shareable between the tasks of a session.
pub type SharedPlane = Arc<DataPlane>;
