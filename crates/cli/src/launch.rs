//! Finding the daemon of a cluster, or starting it.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use forkd_daemon::control::{Client, Reply};
use forkd_daemon::failure::{Exit, Failure};
use forkd_daemon::helper::spawn_helper;
use forkd_daemon::kubernetes::Target;
use forkd_daemon::state::{self, Places, StateError};

use crate::args::Global;
use crate::ui::Ui;

fn no_place(error: &StateError) -> Failure {
    Failure::new("cannot use forkd's directories")
        .caused_by(error)
        .advice("set XDG_RUNTIME_DIR and XDG_STATE_HOME to directories of your own")
}

/// The places of the cluster's daemon.
pub fn places(target: &Target) -> Result<Places, Failure> {
    Places::of(&target.key()).map_err(|error| no_place(&error))
}

/// The daemon of the chosen cluster; exit 3 if there is none.
pub async fn find(target: &Target) -> Result<Client, Failure> {
    let places = places(target)?;
    match reach(&places.socket).await? {
        Some(client) => Ok(client),
        None => Err(none(target, &places).await),
    }
}

async fn none(target: &Target, places: &Places) -> Failure {
    let failure = Failure::new(format!("there is no session with {}", target.context)).exit(Exit::NoDaemon);
    // The current context may have changed since `forkd connect`.
    let mut others = 0;
    for socket in state::sockets().unwrap_or_default() {
        if socket != places.socket && matches!(Client::connect(&socket).await, Ok(Some(_))) {
            others += 1;
        }
    }
    match others {
        0 => failure.advice("`forkd connect` starts one"),
        _ => failure.advice(format!(
            "`forkd connect` starts one; another cluster has a session ({others}): name it with --context"
        )),
    }
}

async fn reach(socket: &Path) -> Result<Option<Client>, Failure> {
    Client::connect(socket).await.map_err(|error| {
        Failure::new("cannot talk to the daemon")
            .because(format!("{}: {error}", socket.display()))
            .exit(Exit::NoDaemon)
    })
}

/// The daemon of the chosen cluster, started if there is none: first the helper, which may ask for a password on this
/// terminal, then the daemon, which gets the helper's socket as its standard input.
pub async fn find_or_start(global: &Global, target: &Target, ui: &Ui) -> Result<Client, Failure> {
    let places = places(target)?;
    if let Some(client) = reach(&places.socket).await? {
        return Ok(client);
    }
    // Without the spinner: sudo's question needs the line.
    ui.settle();
    let failed = |error: std::io::Error| Failure::new("cannot start the daemon").caused_by(&error);
    let log = OpenOptions::new().create(true).append(true).mode(0o600).open(&places.log).map_err(failed)?;
    let helper = spawn_helper(log.try_clone().map_err(failed)?).await.map_err(Failure::from)?;
    ui.step("starting the daemon");
    let mut command = Command::new(std::env::current_exe().map_err(failed)?);
    command.arg("daemon").arg("--context").arg(&target.context);
    if let Some(path) = &global.kubeconfig {
        command.arg("--kubeconfig").arg(absolute(path).map_err(failed)?);
    }
    for _ in 0..global.verbose {
        command.arg("-v");
    }
    let mut daemon = command
        .stdin(Stdio::from(helper))
        .stdout(Stdio::piped())
        .stderr(Stdio::from(log))
        .spawn()
        .map_err(failed)?;
    // Command keeps the helper's socket open: with it, the helper would not notice that the daemon died.
    drop(command);
    let said = daemon.stdout.take();
    let said = tokio::task::spawn_blocking(move || first_words(said)).await;
    let said = said.map_err(|error| failed(std::io::Error::other(error)))?.map_err(failed)?;
    match serde_json::from_str::<Reply>(&said) {
        Ok(Reply::Error(failure)) => return Err(failure),
        Ok(_) => {}
        Err(_) => {
            return Err(Failure::new("cannot start the daemon")
                .because("it ended before it was ready")
                .advice(format!("look at its log: {}", places.log.display())));
        }
    }
    reach(&places.socket).await?.ok_or_else(|| {
        Failure::new("the daemon went away")
            .advice(format!("look at its log: {}", places.log.display()))
            .exit(Exit::NoDaemon)
    })
}

/// What the daemon says on its standard output before it closes it: that it is ready, or why not.
fn first_words(stdout: Option<std::process::ChildStdout>) -> std::io::Result<String> {
    let mut said = String::new();
    if let Some(stdout) = stdout {
        stdout.take(64 * 1024).read_to_string(&mut said)?;
    }
    Ok(said)
}

fn absolute(path: &Path) -> std::io::Result<PathBuf> {
    std::path::absolute(path)
}
