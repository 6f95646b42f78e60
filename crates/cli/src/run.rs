//! The command of `forkd intercept … -- CMD`: in the foreground, with the terminal, as if the shell had started it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::ExitStatus;

use forkd_daemon::failure::Failure;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

/// Signals that are passed on. SIGKILL and SIGSTOP cannot be; SIGTSTP and SIGCONT reach the whole group anyway.
const FORWARDED: &[Signal] =
    &[Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2];

/// Runs the command with exactly this environment and returns its exit code, 128+n when signal n ended it. `gone`
/// resolves when the daemon is gone; `say_gone` is called then, and the command goes on.
///
/// # Errors
/// [`Failure`] when no process can be started. That there is no such command, the process says itself, and ends with 1.
pub async fn run(
    command: &[OsString],
    json: bool,
    environment: BTreeMap<OsString, OsString>,
    gone: impl Future<Output = ()>,
    say_gone: impl FnOnce(),
) -> Result<u8, Failure> {
    let forkd = std::env::current_exe()
        .map_err(|error| Failure::new("cannot find the forkd that runs").caused_by(&error))?;
    let mut start = Command::new(forkd);
    start.args(["exec", "--output", if json { "json" } else { "text" }, "--"]).args(command);
    start.env_clear().envs(environment);
    supervise(start, gone, say_gone).await
}

async fn supervise(
    mut command: Command,
    gone: impl Future<Output = ()>,
    say_gone: impl FnOnce(),
) -> Result<u8, Failure> {
    let failed = |error: std::io::Error| Failure::new("cannot start the command").caused_by(&error);
    // From before the start: a Ctrl-C in between must not end forkd without undoing the intercept.
    let (sender, mut signals) = tokio::sync::mpsc::channel(8);
    for wanted in FORWARDED {
        let mut stream = signal(SignalKind::from_raw(*wanted as i32)).map_err(failed)?;
        let sender = sender.clone();
        tokio::spawn(async move {
            while stream.recv().await.is_some() {
                if sender.send(*wanted).await.is_err() {
                    return;
                }
            }
        });
    }
    let mut child = command.spawn().map_err(failed)?;
    let mut gone = std::pin::pin!(gone);
    let mut say_gone = Some(say_gone);
    loop {
        tokio::select! {
            biased;
            Some(signal) = signals.recv() => forward(&child, signal),
            () = &mut gone, if say_gone.is_some() => {
                if let Some(say) = say_gone.take() {
                    say();
                }
            }
            status = child.wait() => return Ok(exit_code(status.map_err(failed)?)),
        }
    }
}

/// Becomes the command, in the process that [`run`] started: it is to end when that `forkd` is killed, since nobody could
/// end it from the terminal any more. Returns only if there is no such command.
pub fn exec(command: &[OsString]) -> Failure {
    let Some((program, arguments)) = command.split_first() else {
        return Failure::new("there is no command to run");
    };
    let failed = Failure::new(format!("cannot run {}", program.display()));
    // Survives the exec, unless the command is setuid (prctl(2)).
    if let Err(error) = nix::sys::prctl::set_pdeathsig(Signal::SIGTERM) {
        return failed.caused_by(&error);
    }
    let error = std::process::Command::new(program).args(arguments).exec();
    failed.caused_by(&error).advice("check the command behind `--`")
}

/// Passes a signal on, unless the terminal has sent it to the command as well.
fn forward(child: &Child, signal: Signal) {
    let by_terminal = matches!(signal, Signal::SIGINT | Signal::SIGQUIT);
    if by_terminal && in_foreground() {
        return;
    }
    let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) else { return };
    if let Err(error) = kill(Pid::from_raw(pid), signal) {
        tracing::debug!(%error, %signal, "signal not passed on");
    }
}

/// Does Ctrl-C of the terminal reach this process group, and with it the command?
fn in_foreground() -> bool {
    nix::unistd::tcgetpgrp(std::io::stdin()).is_ok_and(|group| group == nix::unistd::getpgrp())
}

fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::Mutex;

    /// A signal to this process reaches the command of every test that runs at the moment.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

    async fn sh(script: &str, gone: impl Future<Output = ()>, say: impl FnOnce()) -> u8 {
        let _one = ONE_AT_A_TIME.lock().await;
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        supervise(command, gone, say).await.unwrap()
    }

    #[tokio::test]
    async fn the_exit_code_is_the_commands_and_128_plus_n_for_signals() {
        assert_eq!(sh("exit 7", std::future::pending(), || ()).await, 7);
        assert_eq!(sh("kill -TERM $$", std::future::pending(), || ()).await, 143);
    }

    #[tokio::test]
    async fn a_signal_to_forkd_reaches_the_command() {
        // The command signals its parent, which is this process, and waits for it to come back.
        let script = "trap 'exit 9' USR1; kill -USR1 $PPID; while :; do sleep 0.05; done";
        assert_eq!(sh(script, std::future::pending(), || ()).await, 9);
    }

    #[tokio::test]
    async fn the_command_outlives_the_daemon() {
        let mut told = false;
        assert_eq!(sh("exit 3", std::future::ready(()), || told = true).await, 3);
        assert!(told);
    }
}
