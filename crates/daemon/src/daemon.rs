//! The daemon's process: one per user and cluster, started by the command line with the helper's socket as its standard
//! input, detached from the terminal.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::process::ExitCode;
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use serde_json::Value;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Mutex, watch};
use tokio::task::JoinSet;

use crate::control::{self, Handler, Intercept, Left, Progress, Reply, Request};
use crate::failure::{Exit, Failure};
use crate::helper::HelperClient;
use crate::kubernetes::{Choice, Target};
use crate::log::BoundedLog;
use crate::session::Session;
use crate::state::Places;

/// Whoever starts a daemon talks to it at once.
const FIRST_WORD: Duration = Duration::from_secs(30);
/// Threads beside that of the packets: Kubernetes and the TLS of the port-forward.
const WORKERS: usize = 2;

/// Main function of the daemon. Says on standard output, as one line of the control protocol, whether it is ready, and
/// closes it.
pub fn main(choice: &Choice, verbose: u8) -> ExitCode {
    match start(choice, verbose) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            tracing::error!(failure = failure.one_line(), "the daemon ends");
            say(&Reply::Error(failure.clone()));
            u8::from(failure.exit).into()
        }
    }
}

/// To whoever started it. Nobody may be left to hear it.
fn say(reply: &Reply) {
    if let Ok(line) = serde_json::to_string(reply) {
        let _ = writeln!(io::stdout(), "{line}");
    }
}

fn start(choice: &Choice, verbose: u8) -> Result<(), Failure> {
    let cannot = || Failure::new("cannot start the daemon");
    let failed = |error: io::Error| cannot().caused_by(&error);
    let target = Target::read(choice)?;
    let places = Places::of(&target.key()).map_err(|error| cannot().caused_by(&error))?;
    let log = BoundedLog::open(&places.log).map_err(failed)?;
    start_log(log, verbose);
    // Fails only for the leader of a process group: then it is detached already.
    let _ = nix::unistd::setsid();
    let helper = helper_socket().map_err(failed)?;

    let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&places.lock);
    let _lock = Flock::lock(lock.map_err(failed)?, FlockArg::LockExclusiveNonblock)
        .map_err(|_| cannot().because("another one has just been started").advice("try again"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .build()
        .map_err(failed)?;
    let result = runtime.block_on(async {
        // Ours by the lock: a socket that is there is a dead daemon's.
        match std::fs::remove_file(&places.socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let listener = UnixListener::bind(&places.socket).map_err(failed)?;
        say(&Reply::Done { value: Value::Null });
        silence_stdout().map_err(failed)?;
        serve(listener, target, helper, &places).await
    });
    // Fails if someone has removed it: then there is nothing to remove.
    let _ = std::fs::remove_file(&places.socket);
    runtime.shutdown_timeout(Duration::from_secs(2));
    tracing::info!("the daemon ends");
    result
}

fn start_log(log: BoundedLog, verbose: u8) {
    let level = if verbose > 0 { "info,forkd=debug,forkd_daemon=debug,forkd_tunnel=debug" } else { "info" };
    let filter = tracing_subscriber::EnvFilter::try_from_env("FORKD_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    // A second call changes nothing: the first log stays.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(StdMutex::new(log))
        .try_init();
}

/// Takes the helper's socket off standard input: no child, e.g. an exec plugin of the kubeconfig, may hold it too.
fn helper_socket() -> io::Result<OwnedFd> {
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    nix::unistd::dup2_stdin(File::open("/dev/null")?)?;
    Ok(socket)
}

/// Whoever started the daemon reads until the end.
fn silence_stdout() -> io::Result<()> {
    io::stdout().flush()?;
    Ok(nix::unistd::dup2_stdout(OpenOptions::new().write(true).open("/dev/null")?)?)
}

/// What all connections share.
struct Daemon {
    target: Target,
    log: std::path::PathBuf,
    /// Until the session takes it over.
    helper: StdMutex<Option<OwnedFd>>,
    session: watch::Sender<Option<Arc<Session>>>,
    /// One `connect` at a time.
    connecting: Mutex<()>,
    /// True when the daemon is to end.
    end: watch::Sender<bool>,
}

async fn serve(
    listener: UnixListener,
    target: Target,
    helper: OwnedFd,
    places: &Places,
) -> Result<(), Failure> {
    let cannot = |error: io::Error| Failure::new("cannot serve the control socket").caused_by(&error);
    let (end, mut ended) = watch::channel(false);
    let daemon = Arc::new(Daemon {
        target,
        log: places.log.clone(),
        helper: StdMutex::new(Some(helper)),
        session: watch::channel(None).0,
        connecting: Mutex::default(),
        end,
    });
    let mut terminate = signal(SignalKind::terminate()).map_err(cannot)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot)?;
    // Of a terminal that is none of its business any more.
    let mut _hangup = signal(SignalKind::hangup()).map_err(cannot)?;
    let mut conversations = JoinSet::new();
    let mut silence = std::pin::pin!(tokio::time::sleep(FIRST_WORD));
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (stream, _) = accepted.map_err(cannot)?;
                conversations.spawn(converse(stream, daemon.clone()));
            }
            Some(_) = conversations.join_next() => {}
            () = daemon.broken() => break,
            _ = ended.wait_for(|end| *end) => break,
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            () = &mut silence, if conversations.is_empty() && daemon.is_idle() => break,
        }
    }
    drop(listener);
    daemon.stop(&Progress::channel().0).await;
    // Those that wait for an answer get it: `quit` above all.
    let rest = async { while conversations.join_next().await.is_some() {} };
    if tokio::time::timeout(Duration::from_secs(1), rest).await.is_err() {
        tracing::debug!("conversations cut");
    }
    Ok(())
}

async fn converse(stream: UnixStream, daemon: Arc<Daemon>) {
    // The directory keeps others out already; a descriptor could have been passed on all the same.
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == nix::unistd::getuid().as_raw() => {}
        Ok(peer) => {
            tracing::warn!(uid = peer.uid(), "someone else on the control socket");
            return;
        }
        Err(error) => {
            tracing::warn!(%error, "no credentials on the control socket");
            return;
        }
    }
    if let Err(error) = control::serve(stream, &*daemon).await {
        tracing::debug!(%error, "conversation broke off");
    }
}

impl Daemon {
    fn session(&self) -> Result<Arc<Session>, Failure> {
        self.session.borrow().clone().ok_or_else(|| {
            Failure::new(format!("there is no session with {}", self.target.context))
                .advice("`forkd connect` starts one")
                .exit(Exit::NoDaemon)
        })
    }

    fn is_idle(&self) -> bool {
        self.session.borrow().is_none() && self.connecting.try_lock().is_ok()
    }

    async fn connect(&self, namespace: Option<String>, progress: &Progress) -> Result<Value, Failure> {
        let _one = self.connecting.lock().await;
        if let Ok(session) = self.session() {
            if let Some(namespace) = namespace.filter(|namespace| *namespace != session.namespace()) {
                session.set_namespace(namespace).await?;
            }
            return value(&session.connected(true));
        }
        let cannot = || Failure::new("cannot start the session");
        let helper = self.helper.lock().unwrap_or_else(PoisonError::into_inner).take();
        let helper = helper.ok_or_else(|| {
            cannot()
                .because("the first attempt failed, and its helper is gone")
                .advice("run `forkd connect` again")
        })?;
        let helper = HelperClient::new(helper).map_err(|error| {
            cannot().caused_by(&error).advice(
                "`forkd connect` starts daemon and helper together; do not run `forkd daemon` by hand",
            )
        })?;
        let session = Session::start(self.target.clone(), helper, namespace, progress).await.map(Arc::new)?;
        let connected = session.connected(false);
        self.session.send_replace(Some(session));
        value(&connected)
    }

    /// Ends a daemon that has no session: the next `forkd connect` starts afresh, with a new helper.
    fn end_if_idle(&self) {
        if self.is_idle() {
            self.end.send_replace(true);
        }
    }

    /// Resolves when the session cannot go on.
    async fn broken(&self) {
        let mut changes = self.session.subscribe();
        let session = match changes.wait_for(Option::is_some).await {
            Ok(session) => session.clone(),
            Err(_) => None,
        };
        if let Some(session) = session {
            let why = session.broken().await;
            tracing::error!(why, "the session cannot go on");
        }
    }

    /// Leaves everything and undoes what was done to the laptop. What cannot be undone here is the helper's to undo when
    /// its socket closes, and the controller's when the laptop stays away.
    async fn stop(&self, progress: &Progress) -> Left {
        let Some(session) = self.session.send_replace(None) else { return Left::default() };
        let (left, failed) = session.intercepts.leave_all(progress).await;
        if let Some(failure) = failed {
            tracing::warn!(failure = failure.one_line(), "not everything was left");
            progress.note(failure.one_line()).await;
        }
        progress.step("undoing the network");
        if let Err(failure) = session.stop().await {
            tracing::warn!(failure = failure.one_line(), "the helper undoes the rest by itself");
        }
        Left { left }
    }
}

fn value(answer: &impl serde::Serialize) -> Result<Value, Failure> {
    serde_json::to_value(answer)
        .map_err(|error| Failure::new("cannot write the answer as JSON").caused_by(&error))
}

impl Handler for Daemon {
    async fn handle(&self, request: Request, progress: Progress) -> Result<Value, Failure> {
        match request {
            Request::Connect { namespace } => {
                // Also when it is dropped: whoever asked for it is gone.
                let _end = EndIfIdle(self);
                self.connect(namespace, &progress).await
            }
            Request::Status => value(&self.session()?.status(&self.log).await),
            Request::Intercept(wanted) => {
                let session = self.session()?;
                let namespace = wanted.namespace.clone().unwrap_or_else(|| session.namespace());
                let result = session.intercepts.intercept(&wanted, namespace.clone(), &progress).await;
                value(&result?)
            }
            Request::Leave(leave) => {
                let session = self.session()?;
                let namespace = leave.namespace.clone().unwrap_or_else(|| session.namespace());
                value(&Left { left: session.intercepts.leave(&leave, namespace, &progress).await? })
            }
            Request::Quit => {
                let left = self.stop(&progress).await;
                self.end.send_replace(true);
                value(&left)
            }
        }
    }

    async fn abandoned(&self, wanted: Intercept) {
        // Without a session there is nothing left to give back.
        if let Ok(session) = self.session() {
            let namespace = wanted.namespace.clone().unwrap_or_else(|| session.namespace());
            session.intercepts.abandon(&wanted, namespace).await;
        }
    }
}

/// See [`Daemon::end_if_idle`].
struct EndIfIdle<'a>(&'a Daemon);

impl Drop for EndIfIdle<'_> {
    fn drop(&mut self) {
        self.0.end_if_idle();
    }
}
