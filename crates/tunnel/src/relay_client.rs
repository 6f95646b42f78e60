//! The control connection that a laptop or an agent keeps with a relay. It proves who is behind a leg, and tells who
//! else is there.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use forkd_wire::ALPN_RELAY;
use forkd_wire::peer::PeerId;
use forkd_wire::relay::{Agent, FromRelay, Register, ToRelay};
use quinn::{Connection, TransportConfig};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::congestion::Generation;
use crate::endpoint::{Common, EndpointError, Present, base_transport};
use crate::identity::{ANY_RELAY, Identity, IdentityError, peer_identity};
use crate::stream::{MessageError, MessageReader, write_message};

/// Either side that hears nothing for this long gives the connection up: four missed keep-alives.
pub(crate) const CONTROL_IDLE: Duration = Duration::from_secs(20);
const CONTROL_KEEP_ALIVE: Duration = Duration::from_secs(5);
/// How long a handshake with a relay may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Waits between attempts.
const BACKOFF: std::ops::RangeInclusive<Duration> = Duration::from_millis(50)..=Duration::from_secs(5);

/// A laptop's control connection with one relay. Dropping it ends it.
#[derive(Debug)]
pub struct RelayClient {
    agents: watch::Receiver<Vec<Identity>>,
    problem: watch::Receiver<String>,
    task: JoinHandle<()>,
}

impl RelayClient {
    pub(crate) fn start(common: Common, relay: Identity) -> Result<Self, EndpointError> {
        let (sender, agents) = watch::channel(Vec::new());
        let client =
            Client::new(common, relay.peer_id(), Some(relay), Told::Laptop(sender, Mutex::default()))?;
        let problem = client.problem.subscribe();
        let register = watch::Sender::new(Register::default());
        let task = tokio::spawn(async move {
            let register = register;
            client.run(register.subscribe()).await;
        });
        Ok(Self { agents, problem, task })
    }

    /// The agents that may be called through this relay, as it last said. Also changes where none came or went but one
    /// sends from another address: it may be a successor of the same name, which knows nothing of the connection.
    pub fn agents(&self) -> watch::Receiver<Vec<Identity>> {
        self.agents.clone()
    }

    /// Why the relay cannot be talked to; empty while it can, and until the first attempt has ended.
    pub fn problem(&self) -> watch::Receiver<String> {
        self.problem.clone()
    }
}

impl Drop for RelayClient {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The peer id under which an agent knows a relay: all it knows of it is an address. Stays on this side.
pub(crate) fn peer_at(addr: SocketAddr) -> PeerId {
    PeerId::of_uri(&format!("forkd://relay-at/{addr}"))
}

/// An agent's control connection with the relay at an address.
pub(crate) fn start_at(
    common: Common,
    addr: SocketAddr,
    register: watch::Receiver<Register>,
    present: Arc<Present>,
) -> Result<AgentRelay, EndpointError> {
    let relay = peer_at(addr);
    common.socket.attach_udp(relay, addr);
    let client = Client::new(common, relay, None, Told::Agent(present))?;
    let problem = client.problem.subscribe();
    Ok(AgentRelay { problem, task: tokio::spawn(client.run(register)) })
}

/// An agent's control connection with one relay. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct AgentRelay {
    pub(crate) problem: watch::Receiver<String>,
    task: JoinHandle<()>,
}

impl Drop for AgentRelay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Who is told what the relay says.
enum Told {
    /// And the list as it came, to tell what is news.
    Laptop(watch::Sender<Vec<Identity>>, Mutex<Vec<Agent>>),
    Agent(Arc<Present>),
}

struct Client {
    common: Common,
    config: quinn::ClientConfig,
    relay: PeerId,
    expected: Option<Identity>,
    told: Told,
    problem: watch::Sender<String>,
}

/// Why a control connection ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    #[error("no answer within {} s", HANDSHAKE.as_secs())]
    TimedOut,
    #[error("cannot hear the relay: {0}")]
    Message(#[from] MessageError),
    #[error("cannot tell the relay: {0}")]
    Write(#[from] std::io::Error),
    #[error("the relay ended its stream")]
    Finished,
}

impl Client {
    fn new(
        common: Common,
        relay: PeerId,
        expected: Option<Identity>,
        told: Told,
    ) -> Result<Self, EndpointError> {
        let mut config = common.credentials.quic_client_config(ALPN_RELAY)?;
        config.transport_config(control_transport(common.socket.generation()));
        Ok(Self { common, config, relay, expected, told, problem: watch::Sender::default() })
    }

    async fn run(self, mut register: watch::Receiver<Register>) {
        let mut backoff = *BACKOFF.start();
        let mut changes = self.common.socket.changes();
        loop {
            while self.common.socket.leg_number(self.relay).is_none() {
                // The sender lives in the socket, which we hold.
                if changes.changed().await.is_err() {
                    return;
                }
            }
            let ended = match self.connect().await {
                Ok(connection) => {
                    backoff = *BACKOFF.start();
                    let ended = self.talk(&connection, &mut register).await;
                    connection.close(0u32.into(), b"");
                    ended
                }
                Err(ended) => ended,
            };
            tracing::info!(error = %ended, "lost the relay");
            self.problem.send_replace(ended.to_string());
            if let Told::Agent(present) = &self.told {
                present.update(self.relay, BTreeMap::new());
            }
            if matches!(ended, Ended::Endpoint(EndpointError::Connect(quinn::ConnectError::EndpointStopping)))
            {
                return;
            }
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(*BACKOFF.end());
        }
    }

    async fn connect(&self) -> Result<Connection, Ended> {
        let connecting = self
            .common
            .endpoint
            .connect_with(self.config.clone(), self.relay.synthetic_addr(), ANY_RELAY)
            .map_err(EndpointError::from)?;
        let connection = tokio::time::timeout(HANDSHAKE, connecting)
            .await
            .map_err(|_| Ended::TimedOut)?
            .map_err(EndpointError::from)?;
        match (peer_identity(&connection).map_err(EndpointError::from)?, &self.expected) {
            (found, Some(expected)) => expected.expect(&found).map_err(EndpointError::from)?,
            (Identity::Relay { .. }, None) => {}
            (found, None) => {
                let error = IdentityError::WrongPeer { expected: "a relay".to_owned(), found: found.uri() };
                return Err(EndpointError::from(error).into());
            }
        }
        Ok(connection)
    }

    /// Tells the relay what changes, and hears what it says, until either fails.
    async fn talk(&self, connection: &Connection, register: &mut watch::Receiver<Register>) -> Ended {
        match self.try_talk(connection, register).await {
            Ok(never) => match never {},
            Err(ended) => ended,
        }
    }

    async fn try_talk(
        &self,
        connection: &Connection,
        register: &mut watch::Receiver<Register>,
    ) -> Result<std::convert::Infallible, Ended> {
        let (mut send, recv) = connection.open_bi().await.map_err(EndpointError::from)?;
        let mut reader = MessageReader::<FromRelay, _>::new(recv);
        let mut changes = self.common.socket.changes();
        let (mut told_leg, mut told_register) = (None, false);
        loop {
            let leg = self.common.socket.leg_number(self.relay);
            if leg.is_some() && (leg != told_leg || !told_register) {
                (told_leg, told_register) = (leg, true);
                let register = Some(register.borrow_and_update().clone());
                write_message(&mut send, &ToRelay { register, leg: leg.unwrap_or_default() }).await?;
            }
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return Err(Ended::Finished) },
                changed = register.changed() => match changed {
                    Ok(()) => told_register = false,
                    Err(_) => return Err(Ended::Finished),
                },
                message = reader.next() => {
                    let message = message?.ok_or(Ended::Finished)?;
                    self.heard(message);
                }
            }
        }
    }

    fn heard(&self, message: FromRelay) {
        self.problem.send_if_modified(|problem| !std::mem::take(problem).is_empty());
        if self.common.socket.confirm(self.relay, message.leg) {
            tracing::info!("packets pass the relay");
            self.common.nudge();
        }
        match &self.told {
            Told::Laptop(agents, last) => {
                let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
                if *last != message.agents {
                    // Agents of a later version may have identities that this one cannot read.
                    let known = message.agents.iter().filter_map(|agent| Identity::parse(&agent.uri).ok());
                    agents.send_replace(known.collect());
                    *last = message.agents;
                }
            }
            Told::Agent(present) => {
                let laptops = message.laptops.into_iter().map(|laptop| (laptop.id, laptop.leg)).collect();
                if present.update(self.relay, laptops) {
                    self.common.nudge();
                }
            }
        }
    }
}

/// For control connections, on both sides.
pub(crate) fn control_transport(generation: &Generation) -> Arc<TransportConfig> {
    let mut config = base_transport(generation);
    // Fits: seconds in milliseconds are far below 2^62.
    config.max_idle_timeout(CONTROL_IDLE.try_into().ok());
    config.keep_alive_interval(Some(CONTROL_KEEP_ALIVE));
    config.max_concurrent_bidi_streams(1u32.into());
    config.max_concurrent_uni_streams(0u32.into());
    Arc::new(config)
}
