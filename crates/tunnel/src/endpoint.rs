//! The QUIC endpoints: [`LaptopEndpoint`] calls agents, [`AgentEndpoint`] is called by laptops. Both reach each other
//! through relays, over the legs of one [`PathSocket`].

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use forkd_wire::ALPN_TUNNEL;
use forkd_wire::peer::PeerId;
use forkd_wire::relay::Register;
use quinn::{Connection, ConnectionError, EndpointConfig, MtuDiscoveryConfig, TransportConfig, VarInt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinHandle;

use crate::congestion::{BandwidthConfig, Generation};
use crate::identity::{Credentials, Identity, IdentityError, peer_identity};
use crate::path::{MAX_PACKET, MAX_PAYLOAD, PathSocket, PipeHandle};
use crate::relay_client::{self, AgentRelay, RelayClient};

/// A laptop may sleep, and its connections wait. That a peer is gone is for relays and paths to say.
const IDLE: Duration = Duration::from_secs(4 * 3600);
/// Keeps what a path learned (and stateful boxes on it) alive.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Per stream: twice the bandwidth-delay product of 200 Mbit/s at 40 ms. Larger ones let a bulk flow put seconds of
/// data before an interactive one.
const STREAM_WINDOW: u32 = 2 << 20;
/// All streams together; must exceed what a few stalled ones hold, or they stall the rest.
const SEND_WINDOW: u64 = 64 << 20;
/// Streams that the peer may have open at once: flows of one laptop in one pod.
const STREAMS: u32 = 16_384;
/// A first guess at the round trip; QUIC's default of 333 ms makes the first retransmission wait a second.
const INITIAL_RTT: Duration = Duration::from_millis(100);
/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(15);
/// Handshakes in progress at an agent.
const HANDSHAKES: usize = 64;
/// Connections that wait for [`AgentEndpoint::accept`].
const ACCEPTED: usize = 16;

/// Why an endpoint or a connection could not be made.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The socket cannot be used.
    #[error("cannot use the socket: {0}")]
    Socket(#[from] io::Error),
    /// Certificate, key or peer are not what they should be.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// QUIC does not take the configuration.
    #[error("cannot call the peer: {0}")]
    Connect(#[from] quinn::ConnectError),
    /// The handshake failed, or the connection ended in it.
    #[error("the handshake failed: {0}")]
    Connection(#[from] ConnectionError),
    /// No answer.
    #[error("no answer within {} s", HANDSHAKE.as_secs())]
    TimedOut,
}

/// What both endpoints have.
#[derive(Clone, Debug)]
pub(crate) struct Common {
    pub(crate) endpoint: quinn::Endpoint,
    pub(crate) socket: Arc<PathSocket>,
    pub(crate) credentials: Credentials,
}

impl Common {
    fn new(
        credentials: Credentials,
        udp: Option<std::net::UdpSocket>,
        server: bool,
    ) -> Result<Self, EndpointError> {
        let socket = PathSocket::new(credentials.identity().peer_id(), udp)?;
        let server = if server {
            let mut config = credentials.quic_server_config(ALPN_TUNNEL)?;
            config.transport_config(transport(socket.generation()));
            // A peer's address is made of its identity and never changes.
            config.migration(false);
            config.max_incoming(4 * HANDSHAKES);
            Some(config)
        } else {
            None
        };
        let endpoint = quinn::Endpoint::new_with_abstract_socket(
            endpoint_config(),
            server,
            socket.clone(),
            Arc::new(quinn::TokioRuntime),
        )?;
        Ok(Self { endpoint, socket, credentials })
    }

    /// Makes every connection send something at once, over whatever leg there is: after an outage, each would
    /// otherwise wait for its retransmission timer, which has backed off as long as the outage was.
    pub(crate) fn nudge(&self) {
        self.socket.generation().bump();
        // Fails only if the socket had no address, and it has one.
        if let Err(error) = self.endpoint.rebind_abstract(self.socket.clone()) {
            tracing::error!(%error, "cannot nudge connections");
        }
    }
}

/// The laptop's end.
#[derive(Debug)]
pub struct LaptopEndpoint {
    common: Common,
}

impl LaptopEndpoint {
    /// An endpoint without any leg yet. `udp`: `None` where there is no UDP, or none wanted.
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`EndpointError::Socket`], [`EndpointError::Identity`].
    pub fn new(credentials: Credentials, udp: Option<std::net::UdpSocket>) -> Result<Self, EndpointError> {
        Ok(Self { common: Common::new(credentials, udp, false)? })
    }

    /// Reaches `relay` through a byte pipe (a port-forward to its TCP port), in place of the pipe before. The handle
    /// resolves when the pipe is dead, with the reason; then attach another: live connections and their streams go on.
    /// Dropping the handle gives the pipe up. Packets flow as soon as a [`RelayClient`] of this relay has proved to
    /// it who is behind the pipe.
    pub fn attach_pipe<I>(&self, relay: &Identity, io: I) -> PipeHandle
    where
        I: AsyncRead + AsyncWrite + Send + 'static,
    {
        self.common.socket.attach_pipe(relay.peer_id(), io)
    }

    /// Keeps a control connection with `relay` over whatever leg it has, again and again, until dropped.
    ///
    /// # Errors
    /// [`EndpointError::Identity`] if TLS does not take the credentials.
    pub fn relay(&self, relay: &Identity) -> Result<RelayClient, EndpointError> {
        RelayClient::start(self.common.clone(), relay.clone())
    }

    /// Calls an agent that [`RelayClient::agents`] names. The certificate must say exactly that identity. The
    /// connection lives across dead and re-attached pipes.
    ///
    /// # Errors
    /// [`EndpointError`]; [`EndpointError::TimedOut`] also when there is no leg.
    pub async fn connect(&self, agent: &Identity) -> Result<Connection, EndpointError> {
        let mut config = self.common.credentials.quic_client_config(ALPN_TUNNEL)?;
        config.transport_config(transport(self.common.socket.generation()));
        let addr = agent.peer_id().synthetic_addr();
        let connecting = self.common.endpoint.connect_with(config, addr, &agent.dns_name())?;
        let connection =
            tokio::time::timeout(HANDSHAKE, connecting).await.map_err(|_| EndpointError::TimedOut)??;
        if let Err(error) = peer_identity(&connection).and_then(|found| agent.expect(&found)) {
            connection.close(VarInt::from_u32(0), b"not the agent that was called");
            return Err(error.into());
        }
        Ok(connection)
    }

    /// The socket beneath, for counters.
    pub fn socket(&self) -> &Arc<PathSocket> {
        &self.common.socket
    }

    /// Ends all connections and tells their peers; waits until they know, a second at most.
    pub async fn close(&self, reason: &str) {
        close(&self.common.endpoint, reason).await;
    }
}

/// The agent's end.
#[derive(Debug)]
pub struct AgentEndpoint {
    common: Common,
    register: watch::Sender<Register>,
    relays: Mutex<HashMap<SocketAddr, AgentRelay>>,
    present: Arc<Present>,
    accepted: tokio::sync::Mutex<mpsc::Receiver<(Connection, Identity)>>,
    acceptor: JoinHandle<()>,
}

/// Laptops by relay, as the relays tell.
#[derive(Debug, Default)]
pub(crate) struct Present {
    by_relay: Mutex<HashMap<PeerId, BTreeMap<String, u64>>>,
    all: watch::Sender<BTreeSet<String>>,
}

impl Present {
    /// What a relay says; empty when it is lost. True if some laptop is there by a new leg.
    pub(crate) fn update(&self, relay: PeerId, laptops: BTreeMap<String, u64>) -> bool {
        let mut by_relay = self.by_relay.lock().unwrap_or_else(PoisonError::into_inner);
        let before = by_relay.insert(relay, laptops).unwrap_or_default();
        let new_leg = by_relay[&relay].iter().any(|(id, leg)| before.get(id) != Some(leg));
        if by_relay[&relay].is_empty() {
            by_relay.remove(&relay);
        }
        let all: BTreeSet<String> = by_relay.values().flat_map(BTreeMap::keys).cloned().collect();
        self.all.send_if_modified(|known| {
            let news = *known != all;
            *known = all;
            news
        });
        new_leg
    }
}

impl AgentEndpoint {
    /// An endpoint on a UDP socket (any port, any address), without relays yet. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`EndpointError::Socket`], [`EndpointError::Identity`].
    pub fn new(credentials: Credentials, udp: std::net::UdpSocket) -> Result<Self, EndpointError> {
        let common = Common::new(credentials, Some(udp), true)?;
        let (sender, accepted) = mpsc::channel(ACCEPTED);
        let acceptor = tokio::spawn(accept_all(common.endpoint.clone(), sender));
        Ok(Self {
            common,
            register: watch::Sender::new(Register::default()),
            relays: Mutex::default(),
            present: Arc::default(),
            accepted: tokio::sync::Mutex::new(accepted),
            acceptor,
        })
    }

    /// Reaches out to exactly these relays, each again and again; relays no longer in the list are left.
    ///
    /// # Errors
    /// [`EndpointError::Identity`] if TLS does not take the credentials.
    pub fn set_relays(&self, addrs: &[SocketAddr]) -> Result<(), EndpointError> {
        let mut relays = self.relays.lock().unwrap_or_else(PoisonError::into_inner);
        relays.retain(|addr, _| {
            let keep = addrs.contains(addr);
            if !keep {
                let relay = relay_client::peer_at(*addr);
                self.common.socket.remove(relay);
                self.present.update(relay, BTreeMap::new());
            }
            keep
        });
        for addr in addrs {
            if !relays.contains_key(addr) {
                let relay = relay_client::start_at(
                    self.common.clone(),
                    *addr,
                    self.register.subscribe(),
                    self.present.clone(),
                )?;
                relays.insert(*addr, relay);
            }
        }
        Ok(())
    }

    /// Tells all relays, present and future, which laptops may reach this agent. Replaces what was said before.
    pub fn register(&self, register: Register) {
        self.register.send_if_modified(|known| {
            let news = *known != register;
            *known = register;
            news
        });
    }

    /// Why the relay at this address cannot be talked to; empty while it can, and until the first attempt has ended.
    /// `None` if it is not in the list.
    pub fn relay_problem(&self, addr: SocketAddr) -> Option<watch::Receiver<String>> {
        let relays = self.relays.lock().unwrap_or_else(PoisonError::into_inner);
        relays.get(&addr).map(|relay| relay.problem.clone())
    }

    /// Ids of the laptops that may reach this agent and are there, as the relays see it. A laptop that is killed goes
    /// missing here within seconds; its QUIC connection lives on, in case that it comes back.
    pub fn laptops(&self) -> watch::Receiver<BTreeSet<String>> {
        self.present.all.subscribe()
    }

    /// The next laptop that called, authenticated. `None` after [`Self::close`]. Cancel safe.
    pub async fn accept(&self) -> Option<(Connection, Identity)> {
        self.accepted.lock().await.recv().await
    }

    /// The socket beneath, for counters.
    pub fn socket(&self) -> &Arc<PathSocket> {
        &self.common.socket
    }

    /// Ends all connections and tells their peers; waits until they know, a second at most.
    pub async fn close(&self, reason: &str) {
        close(&self.common.endpoint, reason).await;
    }
}

impl Drop for AgentEndpoint {
    fn drop(&mut self) {
        self.acceptor.abort();
    }
}

async fn accept_all(endpoint: quinn::Endpoint, to: mpsc::Sender<(Connection, Identity)>) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
    loop {
        // Closed never: the semaphore is ours.
        let Ok(permit) = handshakes.clone().acquire_owned().await else { return };
        let Some(incoming) = endpoint.accept().await else { return };
        let to = to.clone();
        tokio::spawn(async move {
            let from = incoming.remote_address();
            let connection = match tokio::time::timeout(HANDSHAKE, incoming).await {
                Ok(Ok(connection)) => connection,
                Ok(Err(error)) => return tracing::info!(%error, "a laptop's handshake failed"),
                Err(_) => return tracing::info!("a laptop's handshake took too long"),
            };
            drop(permit);
            match peer_identity(&connection) {
                // The relay vouches for the address, TLS for the certificate: they must name the same party.
                Ok(identity @ Identity::Laptop { .. }) if identity.peer_id().synthetic_addr() == from => {
                    // Fails only when the endpoint is gone.
                    let _ = to.send((connection, identity)).await;
                }
                Ok(identity) => {
                    tracing::warn!(peer = %identity.short(), "refused: only laptops may call an agent");
                    connection.close(VarInt::from_u32(0), b"only laptops may call an agent");
                }
                Err(error) => {
                    tracing::warn!(%error, "refused a caller");
                    connection.close(VarInt::from_u32(0), b"certificate of no use");
                }
            }
        });
    }
}

async fn close(endpoint: &quinn::Endpoint, reason: &str) {
    endpoint.close(VarInt::from_u32(0), reason.as_bytes());
    // Peers that cannot be reached are not waited for.
    let _ = tokio::time::timeout(Duration::from_secs(1), endpoint.wait_idle()).await;
}

/// For connections between laptop and agent.
fn transport(generation: &Generation) -> Arc<TransportConfig> {
    let mut config = base_transport(generation);
    // Both fit: hours in milliseconds are far below 2^62.
    config.max_idle_timeout(IDLE.try_into().ok());
    config.keep_alive_interval(Some(KEEP_ALIVE));
    config.stream_receive_window(VarInt::from_u32(STREAM_WINDOW));
    config.send_window(SEND_WINDOW);
    config.max_concurrent_bidi_streams(VarInt::from_u32(STREAMS));
    config.max_concurrent_uni_streams(VarInt::from_u32(0));
    Arc::new(config)
}

/// What all our connections share: packet sizes and congestion control.
pub(crate) fn base_transport(generation: &Generation) -> TransportConfig {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(MAX_PACKET);
    let mut config = TransportConfig::default();
    config.mtu_discovery_config(Some(mtu));
    config.initial_rtt(INITIAL_RTT);
    config.congestion_controller_factory(Arc::new(BandwidthConfig::new(generation.clone())));
    config
}

/// What all our endpoints share.
pub(crate) fn endpoint_config() -> EndpointConfig {
    let mut config = EndpointConfig::default();
    // Frames of the relay are told apart from QUIC packets by this bit.
    config.grease_quic_bit(false);
    if let Err(error) = config.max_udp_payload_size(MAX_PAYLOAD) {
        // The constant is within the bounds of RFC 9000 §18.2.
        tracing::error!(%error, "cannot set the largest payload");
    }
    config
}
