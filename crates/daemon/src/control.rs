//! The control protocol between the `forkd` command and the daemon: one JSON object per line over a unix socket.
//!
//! The command sends a [`Request`] inside a [`Call`]; the daemon answers with any number of [`Reply::Progress`] and
//! [`Reply::Note`] and one [`Reply::Done`] or [`Reply::Error`]. Then the next request may follow. A request whose
//! command goes away is dropped; an intercept made with [`Intercept::attached`] ends as soon as its connection closes.

use std::io;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;

use crate::failure::{Exit, Failure};

/// Version of this protocol. Command and daemon are one binary; after an update the daemon may be the older one.
pub const VERSION: u32 = 1;
/// The longest line. An environment may have 2 MiB on Linux (ARG_MAX), and up to four characters for each byte here.
const MAX_LINE: u64 = 8 * 1024 * 1024;

/// What the command sends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// [`VERSION`] of the command.
    pub version: u32,
    /// What it wants.
    #[serde(flatten)]
    pub request: Request,
}

/// What the command wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// Start the session, or see that it is there; answered with [`Connected`].
    Connect {
        /// Where short names are looked up; `None` for the kubeconfig context's namespace.
        namespace: Option<String>,
    },
    /// Answered with [`crate::status::Status`].
    Status,
    /// Answered with [`Intercepted`].
    Intercept(Intercept),
    /// Answered with [`Left`].
    Leave(Leave),
    /// Leave all, undo what the session did to the laptop, end the daemon; answered with [`Left`].
    Quit,
}

/// Take a Service's requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intercept {
    /// The Service's name.
    pub service: String,
    /// `None` for the session's namespace.
    pub namespace: Option<String>,
    /// `None` for the user's own fork.
    pub fork: Option<String>,
    /// Empty for the Service's only port.
    pub ports: Vec<crate::ports::PortSpec>,
    /// Everything, not only what carries the key.
    pub all: bool,
    /// What keyed requests get while the laptop is gone: the baseline's answer, not an error.
    pub baseline_when_gone: bool,
    /// Answer with the environment of the pod's container.
    pub environment: bool,
    /// Leave as soon as this connection closes.
    pub attached: bool,
}

/// Give a Service's requests back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leave {
    /// The Service's name.
    pub service: String,
    /// `None` for the session's namespace.
    pub namespace: Option<String>,
    /// `None` for whichever fork the session holds the Service in.
    pub fork: Option<String>,
}

/// There is a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connected {
    /// The kubeconfig context.
    pub context: String,
    /// Where short names are looked up.
    pub namespace: String,
    /// Who the API server says the user is.
    pub user: String,
    /// What goes to the cluster, CIDR text.
    pub routes: Vec<String>,
    /// It was there before.
    pub already: bool,
}

/// The intercept is in effect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intercepted {
    /// The fork's id: the value of the key.
    pub fork: String,
    /// Of the Service.
    pub namespace: String,
    /// The Service.
    pub service: String,
    /// Which port goes where.
    pub ports: Vec<InterceptedPort>,
    /// Everything, not only what carries the key.
    pub all: bool,
    /// "2/2": pods that are routed, of pods that are ready.
    pub routed: String,
    /// `KEY=VALUE` entries of the container, as bytes; empty when they were not asked for. Secret.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub environment: Vec<Vec<u8>>,
}

/// One port of [`Intercepted`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterceptedPort {
    /// The Service's port.
    pub port: u16,
    /// The port on the laptop.
    pub laptop_port: u16,
    /// It speaks HTTP, as far as the Service says.
    pub http: bool,
}

/// Intercepts that ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// `namespace/service` and fork of each.
    pub left: Vec<LeftTarget>,
}

/// One of [`Left`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftTarget {
    /// Of the Service.
    pub namespace: String,
    /// The Service.
    pub service: String,
    /// The fork's id.
    pub fork: String,
}

/// What the daemon sends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// What is being done at the moment; replaces the one before.
    Progress {
        /// For a person.
        message: String,
    },
    /// Something to know that stays true.
    Note {
        /// For a person.
        message: String,
    },
    /// The request succeeded.
    Done {
        /// As the [`Request`]'s documentation says.
        value: Value,
    },
    /// The request failed.
    Error(Failure),
}

/// Tells a waiting command how far its request is. Cheap to clone; without a listener it says nothing.
#[derive(Clone)]
pub struct Progress(mpsc::Sender<Reply>);

impl Progress {
    /// The progress and where it can be heard. Sixteen lines may wait for a slow terminal, then the work waits.
    pub fn channel() -> (Self, mpsc::Receiver<Reply>) {
        let (sender, receiver) = mpsc::channel(16);
        (Self(sender), receiver)
    }

    /// Says what is being done. A terminal that is too slow to hear of this step hears of the next.
    pub fn step(&self, message: impl Into<String>) {
        let message = message.into();
        tracing::debug!(%message, "step");
        // A listener that went away cancels the request by itself; there is nothing to do about it here.
        let _ = self.0.try_send(Reply::Progress { message });
    }

    /// Says something to know.
    pub async fn note(&self, message: impl Into<String>) {
        let message = message.into();
        tracing::info!(%message, "note");
        let _ = self.0.send(Reply::Note { message }).await;
    }
}

/// Why a conversation broke.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The socket.
    #[error("control socket")]
    Io(#[from] io::Error),
    /// A line that is no JSON of the expected kind.
    #[error("not understood on the control socket")]
    Malformed(#[from] serde_json::Error),
    /// A line without end.
    #[error("a line of more than {MAX_LINE} bytes on the control socket")]
    TooLong,
}

/// One end of a conversation.
pub struct Lines<R, W> {
    reader: BufReader<R>,
    writer: W,
}

/// A conversation over a unix socket.
pub type Socket = Lines<OwnedReadHalf, OwnedWriteHalf>;

impl From<UnixStream> for Socket {
    fn from(stream: UnixStream) -> Self {
        let (reader, writer) = stream.into_split();
        Self { reader: BufReader::new(reader), writer }
    }
}

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Lines<R, W> {
    /// The next message, or `None` at the end. Not cancel-safe.
    ///
    /// # Errors
    /// [`ControlError`]; the conversation is over.
    pub async fn read<T: DeserializeOwned>(&mut self) -> Result<Option<T>, ControlError> {
        let mut line = Vec::new();
        let read = (&mut self.reader).take(MAX_LINE).read_until(b'\n', &mut line).await?;
        if line.last() != Some(&b'\n') {
            // Also the end inside a line: whoever wrote it is gone.
            return if read as u64 == MAX_LINE { Err(ControlError::TooLong) } else { Ok(None) };
        }
        Ok(Some(serde_json::from_slice(&line)?))
    }

    /// Sends a message.
    ///
    /// # Errors
    /// [`ControlError`]; the conversation is over.
    pub async fn write<T: Serialize>(&mut self, message: &T) -> Result<(), ControlError> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        self.writer.write_all(&line).await?;
        self.writer.flush().await?;
        Ok(())
    }

    /// Resolves when the other end is gone, or talks out of turn. Cancel-safe.
    pub async fn closed(&mut self) {
        // What arrives stays in the buffer; an error means gone as well.
        let _ = self.reader.fill_buf().await;
    }
}

/// The command's side of the socket.
pub struct Client {
    socket: Socket,
}

impl Client {
    /// Connects to the daemon of this socket; `None` when there is none.
    ///
    /// # Errors
    /// [`io::Error`] for anything else than "nobody listens".
    pub async fn connect(socket: &Path) -> io::Result<Option<Self>> {
        match UnixStream::connect(socket).await {
            Ok(stream) => Ok(Some(Self { socket: stream.into() })),
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Sends a request, hands progress and notes to `hear`, and returns the answer.
    ///
    /// # Errors
    /// The daemon's [`Failure`], or one that says that the daemon went away.
    pub async fn call<T: DeserializeOwned>(
        &mut self,
        request: Request,
        mut hear: impl FnMut(&Reply),
    ) -> Result<T, Failure> {
        let gone = |error: ControlError| lost().caused_by(&error);
        self.socket.write(&Call { version: VERSION, request }).await.map_err(gone)?;
        loop {
            match self.socket.read::<Reply>().await.map_err(gone)? {
                Some(Reply::Done { value }) => {
                    return serde_json::from_value(value).map_err(|error| gone(error.into()));
                }
                Some(Reply::Error(failure)) => return Err(failure),
                Some(reply) => hear(&reply),
                None => return Err(lost().because("it closed the control socket before it answered")),
            }
        }
    }

    /// Resolves when the daemon is gone. Cancel-safe.
    pub async fn closed(&mut self) {
        self.socket.closed().await;
    }
}

fn lost() -> Failure {
    Failure::new("the daemon went away")
        .advice("look at its log (`forkd status` names it), then run `forkd connect` again")
        .exit(Exit::NoDaemon)
}

/// What answers requests on the daemon's side.
pub trait Handler {
    /// Answers one request. Dropped at any await when the command goes away: it undoes by itself what it has begun, as
    /// it does when it fails.
    fn handle(
        &self,
        request: Request,
        progress: Progress,
    ) -> impl Future<Output = Result<Value, Failure>> + Send;

    /// The connection of an intercept that was to last as long as it has closed.
    fn abandoned(&self, intercept: Intercept) -> impl Future<Output = ()> + Send;
}

/// Serves one connection until it ends.
///
/// # Errors
/// [`ControlError`] when the other end cannot be understood; whatever it held has been given back by then.
pub async fn serve(stream: UnixStream, handler: &impl Handler) -> Result<(), ControlError> {
    let mut socket = Socket::from(stream);
    let mut held = Vec::new();
    let result = converse(&mut socket, handler, &mut held).await;
    for intercept in held {
        handler.abandoned(intercept).await;
    }
    result
}

async fn converse(
    socket: &mut Socket,
    handler: &impl Handler,
    held: &mut Vec<Intercept>,
) -> Result<(), ControlError> {
    while let Some(call) = socket.read::<Value>().await? {
        let call = match understand(call) {
            Ok(request) => request,
            Err(failure) => {
                socket.write(&Reply::Error(failure)).await?;
                continue;
            }
        };
        let (progress, mut heard) = Progress::channel();
        let answer = {
            let mut work = std::pin::pin!(handler.handle(call.clone(), progress));
            loop {
                tokio::select! {
                    biased;
                    Some(reply) = heard.recv() => socket.write(&reply).await?,
                    answer = &mut work => break answer,
                    () = socket.closed() => return Ok(()),
                }
            }
        };
        while let Ok(reply) = heard.try_recv() {
            socket.write(&reply).await?;
        }
        match (&call, answer.is_ok()) {
            (Request::Intercept(intercept), true) if intercept.attached => held.push(intercept.clone()),
            (Request::Leave(leave), true) => held.retain(|one| one.service != leave.service),
            _ => {}
        }
        socket.write(&answer.map_or_else(Reply::Error, |value| Reply::Done { value })).await?;
    }
    Ok(())
}

fn understand(call: Value) -> Result<Request, Failure> {
    let version = call.get("version").and_then(Value::as_u64);
    // To end a daemon must work after an update, too: the shape of this request is fixed for good.
    if call.get("request").and_then(Value::as_str) == Some("quit") {
        return Ok(Request::Quit);
    }
    if version != Some(u64::from(VERSION)) {
        return Err(Failure::new("the daemon is of another version of forkd")
            .because(format!("it speaks version {VERSION} of the control protocol, the command {version:?}"))
            .advice("run `forkd quit`, then `forkd connect`"));
    }
    let call: Call = serde_json::from_value(call)
        .map_err(|error| Failure::new("the daemon does not understand this request").caused_by(&error))?;
    Ok(call.request)
}
