//! The control channel: TLS connections of agents, gateways and relays (see [`forkd_wire::control`]).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::BytesMut;
use forkd_tunnel::identity::{AgentRole, ClientAuth, Credentials, Identity, identity_of_chain};
use forkd_wire::control::{
    Authorize, Authorized, Certificate, FromController, Join, Retire, Status, ToController, from_controller,
    join, to_controller,
};
use futures::stream::FuturesUnordered;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::access::Access;
use super::ca::Ca;
use super::hub::{Hub, Order};
use super::join::{JoinError, Joins};
use super::queue::{Key, Queue};
use super::world::World;

/// Certificates of agents, gateways and relays; renewed at two thirds.
pub const CERTIFICATE_LIFETIME: Duration = Duration::from_secs(12 * 3600);
/// Connections at a time: agents of so many pods. Further ones wait to be accepted.
const MAX_CONNECTIONS: usize = 8192;
/// Handshake and first message together, and each write.
const PATIENCE: Duration = Duration::from_secs(10);
/// An agent says something once a minute. One that says nothing for so long is gone without a FIN.
const SILENCE: Duration = Duration::from_secs(180);
/// Questions of one agent that are answered at a time; with so many open, nothing more is read from it.
const MAX_QUESTIONS: usize = 16;

/// What connections need.
pub struct Server {
    pub ca: Ca,
    pub joins: Joins,
    pub hub: Arc<Hub>,
    pub world: Arc<World>,
    pub queue: Arc<Queue>,
    pub access: Access,
}

impl Server {
    /// Serves until the listener fails.
    ///
    /// # Errors
    /// If the TLS configuration is not usable, or the listener fails for good.
    pub async fn serve(
        self: Arc<Self>,
        listener: TcpListener,
        credentials: &Credentials,
    ) -> anyhow::Result<()> {
        let config = credentials
            .server_config(forkd_wire::ALPN_CONTROL, ClientAuth::Optional)
            .context("configure TLS")?;
        let acceptor = TlsAcceptor::from(config);
        let free = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            let permit = Arc::clone(&free).acquire_owned().await.context("accept")?;
            let (stream, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, or a connection that broke before it was accepted.
                    tracing::warn!(%error, "accept failed, trying again");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (server, acceptor) = (Arc::clone(&self), acceptor.clone());
            connections.spawn(async move {
                if let Err(error) = server.connection(stream, peer, acceptor).await {
                    tracing::info!(%peer, error = format!("{error:#}"), "control connection ended");
                }
                drop(permit);
            });
        }
    }

    async fn connection(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
        acceptor: TlsAcceptor,
    ) -> anyhow::Result<()> {
        stream.set_nodelay(true).context("set TCP_NODELAY")?;
        let stream = tokio::time::timeout(PATIENCE, acceptor.accept(stream))
            .await
            .context("TLS handshake takes too long")?
            .context("TLS handshake")?;
        let shown = stream.get_ref().1.peer_certificates().map(|chain| identity_of_chain(Some(chain)));
        let mut wire = Wire { stream, input: BytesMut::new() };
        let (identity, fresh) = match shown {
            Some(identity) => (self.returning(identity.context("read the client's certificate")?)?, false),
            None => {
                let joined = tokio::time::timeout(PATIENCE, self.joining(&mut wire, peer.ip()));
                match joined.await.context("no join in time")?? {
                    Some(joined) => joined,
                    None => return Ok(()),
                }
            }
        };
        tracing::info!(%peer, who = identity.short(), fresh, "connected");
        self.serve_party(wire, &identity, fresh).await
    }

    /// Somebody with a certificate. Its pod must still be there: pods end sooner than certificates.
    fn returning(&self, identity: Identity) -> anyhow::Result<Identity> {
        let there = match &identity {
            Identity::Agent { pod_uid, namespace, pod, .. } => {
                self.world.read().pods.one(namespace, pod).is_some_and(|pod| pod.uid == *pod_uid)
            }
            Identity::Relay { name } => self.world.read().own_pods("relay").any(|pod| pod.name == *name),
            Identity::Laptop { .. } | Identity::Controller => {
                bail!("{} has no business here", identity.short())
            }
        };
        if !there {
            bail!("{} has a certificate, but its pod is gone", identity.short());
        }
        Ok(identity)
    }

    /// Somebody without: the first message is a join. `None` if there was none.
    async fn joining(&self, wire: &mut Wire, from: IpAddr) -> anyhow::Result<Option<(Identity, bool)>> {
        let Some(message) = wire.read().await? else { return Ok(None) };
        let Some(to_controller::Kind::Join(join)) = message.kind else {
            bail!("the first message of a connection without certificate is no join");
        };
        let fresh = matches!(join.proof, Some(join::Proof::JoinToken(_)));
        match self.admit(&join, from).await {
            Ok((identity, certificate)) => {
                wire.write(from_controller::Kind::Certificate(certificate)).await?;
                Ok(Some((identity, fresh)))
            }
            // A refusal is final for the caller; this is none: it may try again.
            Err(error) if matches!(error.downcast_ref(), Some(JoinError::Api(_))) => Err(error),
            Err(error) => {
                let refused = format!("{error:#}");
                wire.write(from_controller::Kind::Certificate(Certificate { chain: Vec::new(), refused }))
                    .await?;
                Err(error)
            }
        }
    }

    async fn admit(&self, join: &Join, from: IpAddr) -> anyhow::Result<(Identity, Certificate)> {
        let identity = self.joins.identify(join.proof.as_ref(), from).await?;
        let certificate = self.certificate(&join.csr, &identity)?;
        Ok((identity, certificate))
    }

    fn certificate(&self, csr: &[u8], identity: &Identity) -> anyhow::Result<Certificate> {
        let chain = self.ca.authority.sign(csr, identity, CERTIFICATE_LIFETIME)?;
        Ok(Certificate { chain: chain.to_der(), refused: String::new() })
    }

    async fn serve_party(&self, mut wire: Wire, identity: &Identity, fresh: bool) -> anyhow::Result<()> {
        // A relay has a line, too: so that a new connection of it ends the old one.
        let id = match identity {
            Identity::Agent { pod_uid, role: AgentRole::Env, .. } => format!("{pod_uid}.env"),
            Identity::Agent { pod_uid, .. } => pod_uid.clone(),
            other => other.short(),
        };
        let line = self.hub.connect(&id, identity, fresh);
        self.mark(identity);
        let outcome = self.talk(&mut wire, identity, &id, line.number, line.orders).await;
        if self.hub.disconnect(&id, line.number) {
            tracing::info!(who = identity.short(), "disconnected");
            self.mark(identity);
        }
        outcome
    }

    /// What depends on this party is to be looked at again.
    fn mark(&self, identity: &Identity) {
        match identity {
            Identity::Agent { role: AgentRole::Gateway, .. } => {
                self.queue.mark(Key::Cluster);
                self.mark_all_targets();
            }
            Identity::Agent { namespace, .. } => self.queue.mark(Key::Namespace(namespace.clone())),
            Identity::Laptop { .. } | Identity::Relay { .. } | Identity::Controller => {}
        }
    }

    /// Laptops come and go at gateways, which tells whether a claim still has its holder.
    fn mark_all_targets(&self) {
        let namespaces = self.world.read().target_namespaces();
        namespaces.into_iter().for_each(|namespace| self.queue.mark(Key::Namespace(namespace)));
    }

    async fn talk(
        &self,
        wire: &mut Wire,
        identity: &Identity,
        id: &str,
        number: u64,
        mut orders: watch::Receiver<Order>,
    ) -> anyhow::Result<()> {
        let (answers, mut answered) = mpsc::channel::<Authorized>(MAX_QUESTIONS);
        let mut questions = FuturesUnordered::new();
        let is_agent = matches!(identity, Identity::Agent { .. });
        let mut heard = tokio::time::Instant::now();
        orders.mark_changed();
        loop {
            tokio::select! {
                message = wire.read(), if questions.len() < MAX_QUESTIONS => {
                    heard = tokio::time::Instant::now();
                    let Some(message) = message? else { return Ok(()) };
                    match message.kind {
                        Some(to_controller::Kind::Status(status)) => self.status(identity, id, number, status),
                        Some(to_controller::Kind::Renew(renew)) => {
                            let certificate = self.certificate(&renew.csr, identity).unwrap_or_else(|error| Certificate {
                                chain: Vec::new(),
                                refused: format!("{error:#}"),
                            });
                            wire.write(from_controller::Kind::Certificate(certificate)).await?;
                        }
                        Some(to_controller::Kind::Authorize(question)) => {
                            questions.push(self.answer(question, identity, answers.clone()));
                        }
                        Some(to_controller::Kind::Join(_)) => bail!("a second join on one connection"),
                        // A kind of a later version.
                        None => {}
                    }
                }
                Some(()) = futures::StreamExt::next(&mut questions), if !questions.is_empty() => {}
                Some(answer) = answered.recv() => {
                    wire.write(from_controller::Kind::Authorized(answer)).await?;
                }
                changed = orders.changed() => {
                    if changed.is_err() {
                        bail!("replaced by a newer connection of {}", identity.short());
                    }
                    let order = orders.borrow_and_update().clone();
                    match order {
                        Order::Wait => {}
                        Order::Desired(desired) => wire.write(from_controller::Kind::Desired(*desired)).await?,
                        Order::Retire(reason) => wire.write(from_controller::Kind::Retire(Retire { reason })).await?,
                    }
                }
                () = tokio::time::sleep_until(heard + SILENCE), if is_agent && questions.len() < MAX_QUESTIONS => {
                    bail!("nothing was heard for {} s", SILENCE.as_secs());
                }
            }
        }
    }

    fn status(&self, identity: &Identity, id: &str, number: u64, status: Status) {
        if !status.error.is_empty() {
            tracing::warn!(
                who = identity.short(),
                error = status.error,
                "an agent cannot do what it is to do"
            );
        }
        if self.hub.status(id, number, status) {
            match identity {
                Identity::Agent { role: AgentRole::Gateway, .. } => self.mark_all_targets(),
                other => self.mark(other),
            }
        }
    }

    async fn answer(&self, question: Authorize, identity: &Identity, answers: mpsc::Sender<Authorized>) {
        let namespace = match identity {
            Identity::Agent { namespace, .. } => namespace.as_str(),
            _ => "",
        };
        // Only an agent asks, for a user who is connected to it. A relay has nothing to ask.
        let answer = if namespace.is_empty() {
            Authorized { id: question.id, reason: "only agents may ask".to_owned(), ..Authorized::default() }
        } else {
            self.access.answer(&question, namespace).await
        };
        // The channel has as many places as there are questions, so nothing waits here.
        if answers.send(answer).await.is_err() {
            tracing::debug!("an answer came after its connection ended");
        }
    }
}

/// Messages on a TLS connection.
struct Wire {
    stream: TlsStream<TcpStream>,
    /// Received, not yet a whole message: at most one message and its length.
    input: BytesMut,
}

impl Wire {
    /// The next message; `None` at the end. Safe to cancel: what was received stays.
    async fn read(&mut self) -> anyhow::Result<Option<ToController>> {
        loop {
            if let Some(message) = forkd_wire::decode_delimited(&mut self.input).context("read a message")? {
                return Ok(Some(message));
            }
            if self.stream.read_buf(&mut self.input).await.context("read from the connection")? == 0 {
                if self.input.is_empty() {
                    return Ok(None);
                }
                bail!("the connection ended in the middle of a message");
            }
        }
    }

    async fn write(&mut self, kind: from_controller::Kind) -> anyhow::Result<()> {
        let mut output = BytesMut::new();
        forkd_wire::encode_delimited(&FromController { kind: Some(kind) }, &mut output);
        let written = async {
            self.stream.write_all(&output).await?;
            self.stream.flush().await
        };
        tokio::time::timeout(PATIENCE, written)
            .await
            .context("the other side does not read")?
            .context("write to the connection")
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
