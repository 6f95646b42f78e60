//! What a laptop asks of an agent: dial, DNS, the environment, the cluster's shape. One task per stream.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::Context as _;
use bytes::BytesMut;
use forkd_tunnel::copy::copy;
use forkd_tunnel::stream::{AcceptError, Accepting, accept, code};
use forkd_wire::control::{Desired, ReadEnvironment, User, Verdict, authorize};
use forkd_wire::encode_delimited;
use forkd_wire::tunnel::{Dial, Outcome, Reset, open::Kind};
use quinn::{Connection, RecvStream, SendStream};
use tokio::io::AsyncReadExt as _;
use tokio::sync::{Semaphore, mpsc, watch};

use crate::dns::Resolver;
use crate::link::Link;
use crate::{dial, environment};

/// DNS questions of one laptop that are asked at the same time; further ones wait.
const QUESTIONS: usize = 64;

/// What this agent can do for a laptop, shared by all connections.
pub struct Service {
    /// Asked before anything is done for a user.
    pub link: Arc<Link>,
    /// The pod's resolver, where it has one of the cluster.
    pub resolver: Option<Arc<Resolver>>,
    /// Runs with the application's rights and reads its environment.
    pub reads_environment: bool,
}

impl Service {
    /// Serves one laptop until its connection ends.
    pub async fn laptop(self: Arc<Self>, id: String, user: User, connection: Connection) {
        let user = Arc::new(user);
        loop {
            let (send, recv) = match connection.accept_bi().await {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::info!(laptop = id, user = user.name, "laptop left: {error}");
                    return;
                }
            };
            let (service, user) = (self.clone(), user.clone());
            tokio::spawn(async move {
                match service.stream(&user, send, recv).await {
                    Ok(()) => {}
                    Err(AcceptError::Abandoned | AcceptError::Connection(_)) => {}
                    Err(error) => tracing::warn!(user = user.name, "a stream of a laptop: {error}"),
                }
            });
        }
    }

    async fn stream(&self, user: &User, send: SendStream, recv: RecvStream) -> Result<(), AcceptError> {
        let (open, accepting) = accept(send, recv).await?;
        match open.kind {
            Some(Kind::Dial(to)) => self.dial(user, &to, accepting).await,
            Some(Kind::Dns(_)) => match self.resolver.clone() {
                Some(resolver) => self.dns(resolver, accepting).await,
                None => {
                    accepting.refuse(Outcome::Unsupported, "this pod has no resolver of the cluster").await
                }
            },
            Some(Kind::Environment(_)) if self.reads_environment => self.environment(user, accepting).await,
            Some(Kind::Environment(_)) => {
                accepting
                    .refuse(Outcome::Unsupported, "this agent cannot read the application's environment")
                    .await
            }
            Some(Kind::Cluster(_)) => self.cluster(accepting).await,
            Some(Kind::Deliver(_)) | None => {
                accepting
                    .refuse(Outcome::Unsupported, "this agent does not know what the stream is for")
                    .await
            }
        }
    }

    async fn dial(&self, user: &User, to: &Dial, accepting: Accepting) -> Result<(), AcceptError> {
        let Some(to) = dial::address(to) else {
            return accepting.refuse(Outcome::Unsupported, "no address").await;
        };
        if dial::is_local(to.ip()) {
            return accepting
                .refuse(Outcome::Forbidden, &format!("{} is not an address of the cluster", to.ip()))
                .await;
        }
        if let Err((outcome, reason)) = self.may_dial(user, to.ip()).await {
            tracing::info!(user = user.name, %to, ?outcome, "dial refused: {reason}");
            return accepting.refuse(outcome, &reason).await;
        }
        let connected = tokio::select! {
            connected = dial::connect(to) => connected,
            () = accepting.cancelled() => return Err(AcceptError::Abandoned),
        };
        match connected {
            Ok(tcp) => {
                let (send, recv) = accepting.ok().await?;
                let done = copy(tcp, send, recv).await;
                tracing::info!(
                    user = user.name, %to, up = done.to_tcp, down = done.to_stream, end = done.end.as_str(), "flow"
                );
                Ok(())
            }
            Err((outcome, reason)) => {
                tracing::debug!(user = user.name, %to, ?outcome, "dial: {reason}");
                accepting.refuse(outcome, &reason).await
            }
        }
    }

    async fn may_dial(&self, user: &User, ip: IpAddr) -> Result<(), (Outcome, String)> {
        let bytes = match ip {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        match self.link.authorize(user, authorize::Action::Dial(bytes)).await {
            Ok((Verdict::Allowed, _)) => Ok(()),
            Ok((Verdict::Denied, reason)) => Err((Outcome::Forbidden, reason)),
            // What the pod network itself says of an address that nobody has.
            Ok((Verdict::NoSuchAddress, reason)) => Err((Outcome::HostUnreachable, reason)),
            Err(error) => Err((Outcome::Unavailable, format!("{error:#}"))),
        }
    }

    /// Questions and answers with two-byte lengths, answered in any order.
    async fn dns(&self, resolver: Arc<Resolver>, accepting: Accepting) -> Result<(), AcceptError> {
        let (send, mut recv) = accepting.ok().await?;
        let (answers, answered) = mpsc::channel::<Vec<u8>>(QUESTIONS);
        let limit = Arc::new(Semaphore::new(QUESTIONS));
        let writer = tokio::spawn(write_answers(answered, send));
        // The laptop ends the stream; a read error means that it is gone.
        while let Ok(question) = read_question(&mut recv).await {
            let Ok(permit) = limit.clone().acquire_owned().await else { break };
            let (resolver, answers) = (resolver.clone(), answers.clone());
            tokio::spawn(async move {
                match resolver.ask(&question).await {
                    // Gone only when the laptop is.
                    Ok(answer) => drop(answers.send(answer).await),
                    // The laptop's own time-out is the answer, as with any resolver that is silent.
                    Err(error) => tracing::warn!(%error, "ask the cluster's DNS"),
                }
                drop(permit);
            });
        }
        drop(answers);
        if let Err(error) = writer.await {
            tracing::error!(%error, "DNS answers");
        }
        Ok(())
    }

    async fn environment(&self, user: &User, accepting: Accepting) -> Result<(), AcceptError> {
        match self.link.authorize(user, authorize::Action::Environment(ReadEnvironment {})).await {
            Ok((Verdict::Allowed, _)) => {}
            Ok((_, reason)) => return accepting.refuse(Outcome::Forbidden, &reason).await,
            Err(error) => return accepting.refuse(Outcome::Unavailable, &format!("{error:#}")).await,
        }
        match environment::read() {
            Ok(bytes) => {
                tracing::info!(user = user.name, bytes = bytes.len(), "environment read");
                let (mut send, _recv) = accepting.ok().await?;
                send.write_all(&bytes).await.map_err(|_| AcceptError::Abandoned)?;
                send.finish().map_err(|_| AcceptError::Abandoned)?;
                // Until the laptop has it all, or is gone.
                let _ = send.stopped().await;
                Ok(())
            }
            Err(error) => accepting.refuse(Outcome::Unavailable, &error.to_string()).await,
        }
    }

    async fn cluster(&self, accepting: Accepting) -> Result<(), AcceptError> {
        let mut desired: watch::Receiver<Desired> = self.link.desired.clone();
        if desired.wait_for(|desired| desired.cluster.is_some()).await.is_err() {
            return accepting.refuse(Outcome::Unavailable, "this agent is shutting down").await;
        }
        let (mut send, _recv) = accepting.ok().await?;
        let mut told = None;
        loop {
            let cluster = desired.borrow_and_update().cluster.clone();
            if let Some(info) = &cluster
                && told != cluster
            {
                let mut bytes = BytesMut::new();
                encode_delimited(info, &mut bytes);
                send.write_all(&bytes).await.map_err(|_| AcceptError::Abandoned)?;
                told = cluster;
            }
            tokio::select! {
                changed = desired.changed() => if changed.is_err() { break },
                _ = send.stopped() => break,
            }
        }
        // The laptop may be gone already.
        let _ = send.reset(code(Reset::Cancelled));
        Ok(())
    }
}

async fn read_question(recv: &mut RecvStream) -> io::Result<Vec<u8>> {
    let len = recv.read_u16().await?;
    let mut question = vec![0; usize::from(len)];
    recv.read_exact(&mut question).await.map_err(io::Error::other)?;
    Ok(question)
}

async fn write_answers(mut answered: mpsc::Receiver<Vec<u8>>, mut send: SendStream) {
    while let Some(answer) = answered.recv().await {
        let Ok(len) = u16::try_from(answer.len()) else { continue };
        let message = [&len.to_be_bytes()[..], &answer].concat();
        if send.write_all(&message).await.context("write an answer").is_err() {
            return; // the laptop is gone
        }
    }
    // Fails only if the laptop no longer wants it.
    let _ = send.finish();
}
