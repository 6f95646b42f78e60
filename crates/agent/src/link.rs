//! The control channel, seen from agent, gateway and relay: join, stay joined, renew, ask.
//!
//! One task owns the connection and makes it anew whenever it ends. What the controller wants arrives in
//! [`Link::desired`]; what it is to know is put into [`Link::report`]; questions go through [`Link::authorize`].

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use forkd_tunnel::identity::{Chain, Credentials, Identity, KeyPair, joining_client_config};
use forkd_tunnel::stream::{MessageReader, write_message};
use forkd_wire::ALPN_CONTROL;
use forkd_wire::control::{
    Authorize, Desired, FromController, Join, Renew, Status, ToController, User, Verdict, authorize,
    from_controller, join, to_controller,
};
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Connecting takes milliseconds inside a cluster; a Service without endpoints says nothing at all.
const CONNECT: Duration = Duration::from_secs(5);
/// Between attempts; a controller that is being replaced is away for a second or two.
const PAUSE: Duration = Duration::from_millis(500);
/// Status is repeated, so that a controller that missed one catches up.
const STATUS_EVERY: Duration = Duration::from_secs(60);
/// A controller that has been away for this long is gone for good, and an agent in somebody's pod gives the ports back.
pub const LOST: Duration = Duration::from_secs(600);
/// How long a party waits for its first certificate. A join token is good for a minute; a first install, where relay
/// and gateway may start before the controller, takes less than this.
const JOIN: Duration = Duration::from_secs(120);
/// Questions that wait for an answer; more are answered with "unavailable".
const QUESTIONS: usize = 256;
/// Answers that are kept. At about 100 bytes each, 100 KiB.
const ANSWERS: usize = 1024;

/// How this pod proves who it is.
pub enum Proof {
    /// From the container's environment; good for one use.
    JoinToken(String),
    /// Read anew each time: the kubelet rotates it.
    ServiceAccountToken(std::path::PathBuf),
}

/// Where the controller is, and how to talk to it.
pub struct Config {
    /// `host:port`.
    pub controller: String,
    /// The cluster's forkd authority.
    pub authority: CertificateDer<'static>,
    /// For the first connection.
    pub proof: Proof,
    /// After how long without a controller the party is [`State::Lost`], if its certificate does not end before.
    pub lost_after: Duration,
}

/// The joined party.
pub struct Link {
    /// The certificate, renewed in place.
    pub credentials: Credentials,
    /// What the controller wants; its default before the first word.
    pub desired: watch::Receiver<Desired>,
    /// What the controller is to know.
    pub report: watch::Sender<Status>,
    /// How it stands between the two.
    pub state: watch::Receiver<State>,
    questions: mpsc::Sender<Question>,
    answers: Mutex<Answers>,
}

/// How it stands between a party and its controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Connected, or on the way back.
    Joined,
    /// Told to stop for good.
    Retired,
    /// Not heard of for too long: [`Config::lost_after`].
    Lost,
}

/// Who asked for what → verdict, reason, good until.
type Answers = HashMap<(User, authorize::Action), (Verdict, String, Instant)>;

struct Question {
    user: User,
    action: authorize::Action,
    answer: oneshot::Sender<forkd_wire::control::Authorized>,
}

type Tls = TlsStream<TcpStream>;

struct Connection {
    reader: MessageReader<FromController, ReadHalf<Tls>>,
    writer: WriteHalf<Tls>,
}

impl Link {
    /// Joins: connects, proves who this pod is, gets a certificate. Tries again while the controller is away.
    ///
    /// # Errors
    /// The controller refused, or was not there for two minutes.
    pub async fn join(config: Config) -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let tls = TlsConnector::from(joining_client_config(&config.authority, ALPN_CONTROL)?);
        let (credentials, connection) = timeout(JOIN, async {
            loop {
                match first(&config, &tls, &key).await {
                    Ok(joined) => return Ok(joined),
                    Err(FirstError::Refused(reason)) => {
                        anyhow::bail!("the controller refused this pod: {reason}")
                    }
                    Err(FirstError::Retry(error)) => {
                        tracing::info!("join the controller at {}: {error:#}", config.controller);
                        sleep(PAUSE).await;
                    }
                }
            }
        })
        .await
        .with_context(|| format!("join the controller at {}", config.controller))??;
        tracing::info!(identity = %credentials.identity().uri(), "joined");

        let (desired_in, desired) = watch::channel(Desired::default());
        let (report, status) = watch::channel(Status::default());
        let (state_in, state) = watch::channel(State::Joined);
        let (questions, asked) = mpsc::channel(QUESTIONS);
        let task = Task {
            config,
            key,
            credentials: credentials.clone(),
            desired: desired_in,
            status,
            state: state_in,
            asked,
        };
        tokio::spawn(task.run(connection));
        Ok(Self { credentials, desired, report, state, questions, answers: Mutex::default() })
    }

    /// May this user do that? Answers are kept for as long as the controller said.
    ///
    /// # Errors
    /// No answer: the controller is away. Nobody is let through for lack of one.
    pub async fn authorize(
        &self,
        user: &User,
        action: authorize::Action,
    ) -> anyhow::Result<(Verdict, String)> {
        let asked = (user.clone(), action);
        if let Some((verdict, reason, until)) = self.kept().get(&asked)
            && *until > Instant::now()
        {
            return Ok((*verdict, reason.clone()));
        }
        let (answer, answered) = oneshot::channel();
        let question = Question { user: asked.0.clone(), action: asked.1.clone(), answer };
        self.questions.try_send(question).context("ask the controller: too many questions wait")?;
        let answer = timeout(CONNECT, answered)
            .await
            .context("ask the controller: no answer")?
            .context("ask the controller: it is away")?;
        let verdict = answer.verdict();
        let until = Instant::now() + Duration::from_secs(answer.ttl_s.into());
        let mut kept = self.kept();
        if kept.len() >= ANSWERS {
            let now = Instant::now();
            kept.retain(|_, (_, _, until)| *until > now);
            if kept.len() >= ANSWERS {
                kept.clear();
            }
        }
        kept.insert(asked, (verdict, answer.reason.clone(), until));
        Ok((verdict, answer.reason))
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

enum FirstError {
    Refused(String),
    Retry(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for FirstError {
    fn from(error: E) -> Self {
        Self::Retry(error.into())
    }
}

async fn first(
    config: &Config,
    tls: &TlsConnector,
    key: &KeyPair,
) -> Result<(Credentials, Connection), FirstError> {
    let proof = match &config.proof {
        Proof::JoinToken(token) => join::Proof::JoinToken(token.clone()),
        Proof::ServiceAccountToken(path) => {
            let token = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
            join::Proof::ServiceAccountToken(token.trim().to_owned())
        }
    };
    let mut connection = connect(config, tls).await?;
    // The controller decides who this is; the request only carries the key.
    let csr = key.request(&Identity::Controller)?.der;
    connection.send(to_controller::Kind::Join(Join { proof: Some(proof), csr })).await?;
    let answer = timeout(CONNECT, connection.reader.next()).await??;
    match answer.and_then(|message| message.kind) {
        Some(from_controller::Kind::Certificate(certificate)) if certificate.refused.is_empty() => {
            let credentials = Credentials::new(Chain::from_der(certificate.chain), key)?;
            Ok((credentials, connection))
        }
        Some(from_controller::Kind::Certificate(certificate)) => {
            Err(FirstError::Refused(certificate.refused))
        }
        Some(_) => Err(anyhow::anyhow!("the controller answered a join with something else").into()),
        None => Err(anyhow::anyhow!("the controller closed the connection").into()),
    }
}

async fn connect(config: &Config, tls: &TlsConnector) -> anyhow::Result<Connection> {
    let stream = timeout(CONNECT, TcpStream::connect(&config.controller))
        .await
        .context("connect")?
        .context("connect")?;
    stream.set_nodelay(true)?;
    let name = ServerName::try_from(Identity::Controller.dns_name())?;
    let stream = timeout(CONNECT, tls.connect(name, stream))
        .await
        .context("TLS handshake")?
        .context("TLS handshake")?;
    let (reader, writer) = tokio::io::split(stream);
    Ok(Connection { reader: MessageReader::new(reader), writer })
}

impl Connection {
    async fn send(&mut self, kind: to_controller::Kind) -> anyhow::Result<()> {
        write_message(&mut self.writer, &ToController { kind: Some(kind) })
            .await
            .context("write to the controller")
    }
}

struct Task {
    config: Config,
    key: KeyPair,
    credentials: Credentials,
    desired: watch::Sender<Desired>,
    status: watch::Receiver<Status>,
    state: watch::Sender<State>,
    asked: mpsc::Receiver<Question>,
}

/// Why one connection to the controller ended.
enum End {
    Retired(String),
    Broken(anyhow::Error),
    /// Nobody holds the [`Link`] any more.
    Unused,
}

impl Task {
    async fn run(mut self, connection: Connection) {
        let mut connection = Some(connection);
        let mut last_seen = Instant::now();
        loop {
            if let Some(connected) = connection.take() {
                let end = self.serve(connected).await;
                last_seen = Instant::now();
                match end {
                    End::Retired(reason) => {
                        tracing::info!(reason, "the controller retires this agent");
                        let _ = self.state.send(State::Retired);
                        return;
                    }
                    End::Unused => return,
                    End::Broken(error) => tracing::warn!("the controller is away: {error:#}"),
                }
            }
            sleep(PAUSE).await;
            if last_seen.elapsed() > self.config.lost_after
                || self.credentials.expires_at() < SystemTime::now()
            {
                tracing::warn!("the controller is gone for good");
                let _ = self.state.send(State::Lost);
                return;
            }
            match self.reconnect().await {
                Ok(connected) => {
                    tracing::info!("the controller is back");
                    connection = Some(connected);
                }
                Err(error) => tracing::debug!("connect to the controller: {error:#}"),
            }
        }
    }

    async fn reconnect(&self) -> anyhow::Result<Connection> {
        let tls = TlsConnector::from(self.credentials.client_config(ALPN_CONTROL)?);
        connect(&self.config, &tls).await
    }

    async fn serve(&mut self, connection: Connection) -> End {
        let Connection { mut reader, mut writer } = connection;
        let mut send = async |kind| {
            let message = ToController { kind: Some(kind) };
            timeout(CONNECT, write_message(&mut writer, &message))
                .await
                .context("write to the controller")?
                .context("write to the controller")
        };
        let mut waiting: HashMap<u64, oneshot::Sender<_>> = HashMap::new();
        let mut next_id = 0;
        let mut beat = tokio::time::interval(STATUS_EVERY);
        loop {
            let renew_in = self.credentials.renew_at().duration_since(SystemTime::now()).unwrap_or(PAUSE);
            let sent = tokio::select! {
                message = reader.next() => match message {
                    Ok(Some(message)) => match self.receive(message, &mut waiting) {
                        Ok(None) => Ok(()),
                        Ok(Some(end)) => return end,
                        Err(error) => Err(error),
                    },
                    Ok(None) => Err(anyhow::anyhow!("it closed the connection")),
                    Err(error) => Err(anyhow::Error::new(error).context("read from the controller")),
                },
                changed = self.status.changed() => match changed {
                    Ok(()) => { let status = self.status.borrow_and_update().clone(); send(to_controller::Kind::Status(status)).await }
                    Err(_) => return End::Unused,
                },
                _ = beat.tick() => { let status = self.status.borrow_and_update().clone(); send(to_controller::Kind::Status(status)).await }
                question = self.asked.recv() => match question {
                    Some(Question { user, action, answer }) => {
                        waiting.retain(|_, waits: &mut oneshot::Sender<_>| !waits.is_closed());
                        next_id += 1;
                        waiting.insert(next_id, answer);
                        send(to_controller::Kind::Authorize(Authorize { id: next_id, user: Some(user), action: Some(action) })).await
                    }
                    None => return End::Unused,
                },
                () = sleep(renew_in) => match self.key.request(&Identity::Controller) {
                    Ok(request) => {
                        let sent = send(to_controller::Kind::Renew(Renew { csr: request.der })).await;
                        match sent {
                            Ok(()) => match timeout(CONNECT, self.renewed(&mut reader, &mut waiting)).await {
                                Ok(Ok(None)) => Ok(()),
                                Ok(Ok(Some(end))) => return end,
                                Ok(Err(error)) => Err(error),
                                Err(_) => Err(anyhow::anyhow!("no answer to a renewal")),
                            },
                            Err(error) => Err(error),
                        }
                    }
                    Err(error) => Err(error.into()),
                },
            };
            if let Err(error) = sent {
                return End::Broken(error);
            }
        }
    }

    /// Reads until the renewal is answered, so that the timer above does not ask twice.
    async fn renewed(
        &mut self,
        reader: &mut MessageReader<FromController, ReadHalf<Tls>>,
        waiting: &mut HashMap<u64, oneshot::Sender<forkd_wire::control::Authorized>>,
    ) -> anyhow::Result<Option<End>> {
        loop {
            let message = reader.next().await?.context("it closed the connection")?;
            let answered = matches!(message.kind, Some(from_controller::Kind::Certificate(_)));
            if let Some(end) = self.receive(message, waiting)? {
                return Ok(Some(end));
            }
            if answered {
                return Ok(None);
            }
        }
    }

    fn receive(
        &mut self,
        message: FromController,
        waiting: &mut HashMap<u64, oneshot::Sender<forkd_wire::control::Authorized>>,
    ) -> anyhow::Result<Option<End>> {
        match message.kind {
            Some(from_controller::Kind::Desired(desired)) => {
                tracing::debug!(
                    generation = desired.generation,
                    routes = desired.routes.len(),
                    "desired state"
                );
                self.desired.send_replace(desired);
            }
            Some(from_controller::Kind::Authorized(answer)) => {
                if let Some(waits) = waiting.remove(&answer.id) {
                    // Whoever asked may have given up meanwhile.
                    let _ = waits.send(answer);
                }
            }
            Some(from_controller::Kind::Certificate(certificate)) if certificate.refused.is_empty() => {
                self.credentials
                    .replace(Chain::from_der(certificate.chain), &self.key)
                    .context("renew the certificate")?;
                tracing::info!("certificate renewed");
            }
            Some(from_controller::Kind::Certificate(certificate)) => {
                anyhow::bail!("the controller refused a renewal: {}", certificate.refused)
            }
            Some(from_controller::Kind::Retire(retire)) => return Ok(Some(End::Retired(retire.reason))),
            None => tracing::debug!("a message of a kind that this version does not know"),
        }
        Ok(None)
    }
}
