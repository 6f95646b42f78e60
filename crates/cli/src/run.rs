//! The command of `forkd intercept … -- CMD`: in the foreground, with the terminal, as if the shell had started it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
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
/// [`Failure`] when the command cannot be started.
pub async fn run(
    command: &[OsString],
    environment: BTreeMap<OsString, OsString>,
    gone: impl Future<Output = ()>,
    say_gone: impl FnOnce(),
) -> Result<u8, Failure> {
    let (program, arguments) =
        command.split_first().ok_or_else(|| Failure::new("there is no command to run"))?;
    let failed = |error: std::io::Error| {
        Failure::new(format!("cannot run {}", program.display()))
            .caused_by(&error)
            .advice("check the command behind `--`")
    };
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
    let mut child =
        Command::new(program).args(arguments).env_clear().envs(environment).spawn().map_err(failed)?;
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

    async fn sh(script: &str) -> Result<u8, Failure> {
        let _one = ONE_AT_A_TIME.lock().await;
        let command = ["/bin/sh", "-c", script].map(OsString::from);
        run(&command, [("WHO".into(), "alice".into())].into(), std::future::pending(), || ()).await
    }

    #[tokio::test]
    async fn the_exit_code_is_the_commands_and_128_plus_n_for_signals() {
        assert_eq!(sh("exit 7").await, Ok(7));
        assert_eq!(sh("kill -TERM $$").await, Ok(143));
        assert_eq!(sh("[ \"$WHO\" = alice ] && [ -z \"$HOME\" ]").await, Ok(0), "exactly this environment");
        let missing = run(&["/no/such/program".into()], BTreeMap::new(), std::future::pending(), || ()).await;
        assert_eq!(missing.unwrap_err().error, "cannot run /no/such/program");
    }

    #[tokio::test]
    async fn a_signal_to_forkd_reaches_the_command() {
        // The command signals its parent, which is this process, and waits for it to come back.
        let code = sh("trap 'exit 9' USR1; kill -USR1 $PPID; while :; do sleep 0.05; done").await;
        assert_eq!(code, Ok(9));
    }

    #[tokio::test]
    async fn the_command_outlives_the_daemon() {
        let _one = ONE_AT_A_TIME.lock().await;
        let mut told = false;
        let command = ["/bin/sh", "-c", "exit 3"].map(OsString::from);
        let code = run(&command, BTreeMap::new(), std::future::ready(()), || told = true).await;
        assert_eq!((code, told), (Ok(3), true));
    }
}
