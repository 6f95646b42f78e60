//! The daemon's end of the helper's socket, and how a helper is started.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Stdio;

use ipnet::IpNet;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, Interest};
use tokio::process::{ChildStderr, Command};
use tokio::sync::Mutex;

use super::protocol::{DnsInfo, Failure, MAX_MESSAGE, Reply, Request, TunInfo};
use crate::tun;

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// The helper said no, and why.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// The helper is gone, and with it (its guard sees to that) everything it had set up.
    #[error("the privileged helper is gone")]
    Gone,
    /// The socket failed.
    #[error("talk to the privileged helper: {0}")]
    Socket(#[from] io::Error),
    /// The helper answered something else than what was asked: daemon and helper are not of one build.
    #[error("the privileged helper gave an unexpected answer to {0}")]
    Unexpected(&'static str),
}

/// The daemon's end of the helper's socket. Dropping it makes the helper undo everything and exit.
pub struct HelperClient {
    socket: AsyncFd<OwnedFd>,
    /// The same socket, watched for the helper's end without getting between request and reply.
    watch: AsyncFd<OwnedFd>,
    /// One request at a time: replies carry no id.
    turn: Mutex<()>,
}

impl HelperClient {
    /// Takes over what [`spawn_helper`] returned. Needs a tokio runtime.
    ///
    /// # Errors
    /// The descriptor is no socket.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        let watch = socket.try_clone()?;
        Ok(Self {
            socket: tun::pollable(socket, Interest::READABLE | Interest::WRITABLE)?,
            watch: tun::pollable(watch, Interest::READABLE)?,
            turn: Mutex::new(()),
        })
    }

    /// Makes the TUN with this MTU (1280 to 65535 bytes).
    ///
    /// # Errors
    /// [`HelperError`]; a second TUN of the same helper is refused.
    pub async fn create_tun(&self, mtu: u16) -> Result<(TunInfo, OwnedFd), HelperError> {
        match self.ask(&Request::CreateTun { mtu }).await? {
            (Reply::Tun(info), Some(fd)) => Ok((info, fd)),
            _ => Err(HelperError::Unexpected("create-tun")),
        }
    }

    /// Routes exactly `ranges` into the TUN. `keep`: addresses that must stay outside. `take`: those of `ranges` that
    /// the user wants although a wider route of the host covers them.
    ///
    /// # Errors
    /// [`HelperError::Failed`] names range, route and choice; the routes are then as before.
    pub async fn set_routes(
        &self,
        ranges: Vec<IpNet>,
        keep: Vec<IpAddr>,
        take: Vec<IpNet>,
    ) -> Result<(), HelperError> {
        match self.ask(&Request::SetRoutes { ranges, keep, take }).await? {
            (Reply::Routes, None) => Ok(()),
            _ => Err(HelperError::Unexpected("set-routes")),
        }
    }

    /// Sends names under `domain` to `server`, with `search` for short names, best first.
    ///
    /// # Errors
    /// [`HelperError`]; the resolver is then as before.
    pub async fn set_dns(
        &self,
        server: IpAddr,
        domain: String,
        search: Vec<String>,
    ) -> Result<DnsInfo, HelperError> {
        match self.ask(&Request::SetDns { server, domain, search }).await? {
            (Reply::Dns(info), None) => Ok(info),
            _ => Err(HelperError::Unexpected("set-dns")),
        }
    }

    /// Undoes everything and waits until it is done.
    ///
    /// # Errors
    /// [`HelperError`].
    pub async fn undo(&self) -> Result<(), HelperError> {
        match self.ask(&Request::Undo).await? {
            (Reply::Undone, None) => Ok(()),
            _ => Err(HelperError::Unexpected("undo")),
        }
    }

    /// Waits until the helper is gone.
    pub async fn closed(&self) {
        loop {
            match self.watch.ready(Interest::READABLE).await {
                Ok(mut guard) if !guard.ready().is_read_closed() => guard.clear_ready(),
                // Without a readiness to wait for, there is no helper to talk to either.
                _ => return,
            }
        }
    }

    async fn ask(&self, request: &Request) -> Result<(Reply, Option<OwnedFd>), HelperError> {
        let message = serde_json::to_vec(request).map_err(io::Error::from)?;
        let _turn = self.turn.lock().await;
        let sent = self
            .socket
            .async_io(Interest::WRITABLE, |fd| Ok(send(fd.as_raw_fd(), &message, MsgFlags::MSG_NOSIGNAL)?))
            .await;
        match sent {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Err(HelperError::Gone),
            Err(error) => return Err(error.into()),
        }
        let mut buffer = vec![0; MAX_MESSAGE];
        let received =
            self.socket.async_io(Interest::READABLE, |fd| tun::recv_with_fd(fd.as_fd(), &mut buffer)).await;
        let (length, fd) = match received {
            Ok((0, _)) => return Err(HelperError::Gone),
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(HelperError::Gone),
            Err(error) => return Err(error.into()),
        };
        match serde_json::from_slice(&buffer[..length]).map_err(io::Error::from)? {
            Reply::Failed(failure) => Err(failure.into()),
            reply => Ok((reply, fd)),
        }
    }
}

/// Starts a helper and returns the daemon's end of its socket: as root directly, else through sudo, which asks for the
/// password on the terminal if there is one. Returns when the helper answers. What it says from then on goes to `log`:
/// a pipe or terminal of ours that it held would keep whoever reads from us (`$(forkd connect)`) waiting for its end.
///
/// # Errors
/// What failed, why, and what to do, for the user.
pub async fn spawn_helper(log: File) -> Result<OwnedFd, Failure> {
    let failed = |because: String, try_: &str| Failure {
        error: "cannot start the privileged helper".to_owned(),
        because,
        try_: try_.to_owned(),
    };
    let plain = |error: io::Error| failed(error.to_string(), "run `forkd connect` as root");
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(|errno| plain(errno.into()))?;
    let exe = std::env::current_exe().map_err(plain)?;
    let root = nix::unistd::geteuid().is_root();
    let terminal = io::stderr().is_terminal();
    let mut command = if root {
        Command::new(&exe)
    } else {
        let mut sudo = Command::new("sudo");
        sudo.args(if terminal { &["--prompt=[forkd] password for %p: "][..] } else { &["-n"][..] });
        sudo.arg("--").arg(&exe);
        sudo
    };
    command.arg("helper").stdin(Stdio::from(theirs)).stdout(Stdio::from(log)).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| {
        failed(
            format!("run {:?}: {error}", command.as_std().get_program()),
            "install sudo, or run `forkd connect` as root",
        )
    })?;
    // Command keeps the helper's end open: with it, nobody would notice that the helper died.
    drop(command);
    let told = tokio::spawn(tell(child.stderr.take()));
    let client = ours.try_clone().and_then(HelperClient::new).map_err(plain)?;
    // Undo is the one request that changes nothing here: its answer says that the helper is up.
    tokio::select! {
        up = client.undo() => up.map_err(|error| match error {
            HelperError::Failed(failure) => failure,
            other => failed(other.to_string(), if root { "" } else { "run `sudo -v` in a terminal, then again" }),
        })?,
        status = child.wait() => {
            let because = status.map_or_else(|error| error.to_string(), |status| format!("it ended with {status}"));
            let try_ = match (root, terminal) {
                (true, _) => "look at the lines above: the helper says there what is missing",
                (false, true) => "check that your user may use sudo, or run `forkd connect` as root",
                (false, false) => "run `sudo -v` in a terminal, then again: without a terminal sudo cannot ask",
            };
            // Its last words, before ours. Only a failure to read them could fail here.
            let _ = told.await;
            return Err(failed(because, try_));
        }
    }
    told.abort();
    Ok(ours)
}

/// Passes on what sudo and the starting helper say, to the end.
async fn tell(said: Option<ChildStderr>) {
    let Some(mut said) = said else { return };
    let mut buffer = [0; 1024];
    while let Ok(length @ 1..) = said.read(&mut buffer).await {
        // Nobody may be left to hear it.
        let _ = io::stderr().write_all(&buffer[..length]);
    }
}
