//! The laptop's data plane against the real kernel: TUN, routes, resolver, sockets. Each case is a process of its own in
//! new network and mount namespaces, so that this machine's routes and /etc are never touched:
//!
//! ```text
//! namespace "laptop": the application (main thread), the helper, the TUN
//! namespace "cluster": the daemon's thread (data plane, plain TCP in the place of QUIC), servers
//! ```
//!
//! The namespaces are joined by nothing but the TUN's file descriptor. Needs root and /dev/net/tun.

mod bytes;
mod deaths;
mod names;
mod world;

use std::io::Read;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// A hung case fails after this long; the slowest takes a few seconds.
const PATIENCE: Duration = Duration::from_secs(120);

fn cases() -> Vec<(&'static str, fn())> {
    [bytes::cases(), names::cases(), deaths::cases()].concat()
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("helper") => return forkd_daemon::helper::main(),
        Some("stand-in") => {
            deaths::stand_in();
            return ExitCode::SUCCESS;
        }
        Some("case") => {
            let (_, case) = cases()
                .into_iter()
                .chain(bytes::measurements())
                .chain(names::with_resolved())
                .find(|(name, _)| Some(*name) == arguments.get(1).map(String::as_str))
                .expect("a case of this name");
            world::enter();
            case();
            return ExitCode::SUCCESS;
        }
        Some("--list") => {
            for (name, _) in cases() {
                println!("{name}: test");
            }
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    if !nix::unistd::geteuid().is_root() || !std::path::Path::new("/dev/net/tun").exists() {
        eprintln!(
            "error: these tests cannot run here\nbecause: they need root and /dev/net/tun\n\
             try: run them as root on Linux, e.g. in a virtual machine"
        );
        return ExitCode::FAILURE;
    }
    let filter: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let mut failed = 0;
    for (name, _) in cases() {
        if !filter.is_empty() && !filter.iter().any(|part| name.contains(part.as_str())) {
            continue;
        }
        match run(name) {
            Ok(took) => println!("test {name} ... ok ({} ms)", took.as_millis()),
            Err(output) => {
                failed += 1;
                println!("test {name} ... FAILED\n{output}");
            }
        }
    }
    println!("\ntest result: {} failed", failed);
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run(name: &str) -> Result<Duration, String> {
    let begun = Instant::now();
    let mut child = Command::new(std::env::current_exe().expect("own path"))
        .args(["case", name])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| error.to_string())?;
    let mut stderr = child.stderr.take().expect("piped");
    let output = std::thread::spawn(move || {
        let mut text = Vec::new();
        // A helper that outlives its case would keep the pipe open: that, too, is a failure, by time.
        let _ = stderr.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    });
    while begun.elapsed() < PATIENCE {
        if let Some(status) = child.try_wait().map_err(|error| error.to_string())?
            && output.is_finished()
        {
            let output = output.join().unwrap_or_default();
            return if status.success() { Ok(begun.elapsed()) } else { Err(format!("{status}\n{output}")) };
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    Err(format!("did not end within {} s", PATIENCE.as_secs()))
}
