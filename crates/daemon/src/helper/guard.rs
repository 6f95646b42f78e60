//! The helper's guard: a process that does nothing but wait for the helper, and sweep if it did not end by itself.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, Stdio};

use anyhow::Context;
use nix::sys::signal::{SigSet, Signal};

use super::{journal, worker};
use crate::host::netlink::Netlink;

/// Set for the helper itself, to its guard's process number.
const GUARDED_BY: &str = "FORKD_HELPER_GUARD";

/// The hidden subcommand `forkd helper`. Its stdin is one end of a SOCK_SEQPACKET pair; the daemon has the other.
///
/// The process becomes the guard and starts the helper as its child. If either is killed, the other undoes everything;
/// what the death of both leaves is swept up by the next start.
pub fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_target(false).without_time().init();
    let result = match std::env::var(GUARDED_BY).ok().and_then(|pid| pid.parse().ok()) {
        Some(guard) => worker::run(guard).context("serve the daemon"),
        None => watch(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: the privileged helper failed\nbecause: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn watch() -> anyhow::Result<()> {
    anyhow::ensure!(
        nix::unistd::geteuid().is_root(),
        "it needs root: `forkd connect` starts it through sudo"
    );
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGHUP);
    signals.thread_block()?;
    journal::prepare()?;
    let netlink = Netlink::open()?;
    {
        let _lock = journal::lock()?;
        journal::sweep(&netlink, None).context("undo what an earlier helper left")?;
    }
    // Up to here whoever started us listens to stderr; from here on it is the log, which is stdout.
    nix::unistd::dup2_stderr(std::io::stdout())?;
    let mut child = Command::new("/proc/self/exe")
        .arg("helper")
        .env(GUARDED_BY, std::process::id().to_string())
        .stdin(Stdio::inherit())
        .spawn()
        .context("start the helper's second process")?;
    let pid = child.id().cast_signed();
    let status = child.wait()?;
    if status.success() {
        return Ok(());
    }
    let _lock = journal::lock()?;
    journal::sweep(&netlink, Some(pid)).context("undo what the helper left")?;
    match status.signal() {
        Some(signal) => anyhow::bail!("it was killed by signal {signal}; what it had changed is undone"),
        None => anyhow::bail!("it failed; what it had changed is undone"),
    }
}
