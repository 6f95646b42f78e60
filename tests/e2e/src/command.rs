//! `forkd intercept … -- CMD`: the command acts as the pod, and the intercept ends with it.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::cluster::{SHOP, kubectl, pods_of};
use crate::harness::test::{cluster_logs, no_fork_is_left};
use crate::harness::wait::so;
use crate::harness::{Laptop, Process, eventually, inside, on_laptop};

/// No other process of a test listens here.
const PORT: &str = "18080";

fn forkd<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&["intercept", "cart", "--namespace", SHOP, "--fork", "alice", "--port", PORT, "--"], more].concat()
}

/// The shop's cart as the command, answering.
#[track_caller]
fn serving(laptop: &Laptop) -> Process {
    let address = format!("127.0.0.1:{PORT}");
    let process =
        laptop.start("forkd", &forkd(&["shop", "serve", "cart", "--listen", &address, "--where", "laptop"]));
    eventually("keyed requests reach the command", || {
        let line = inside().http("cart:8080", "alice");
        so(line.from() == "laptop", || format!("{line:?}\n{}", process.said()))
    });
    process
}

#[test]
fn the_command_has_the_pods_environment_and_returns_its_own_exit_code() {
    on_laptop(|laptop| {
        let script = r#"echo "secret=$SHOP_SECRET|config=$SHOP_CONFIG|ip=$POD_IP|fork=$FORKD_FORK|home=$HOME"; exit 7"#;
        let output = laptop.forkd(&forkd(&["sh", "-c", script]));
        assert_eq!(output.code, 7, "{output}");
        let line = output.stdout.trim();
        let ips: Vec<String> = pods_of("cart").into_iter().map(|pod| pod.ip).collect();
        assert!(line.starts_with("secret=not-very-secret|config=currency=EUR|ip="), "{output}");
        assert!(ips.iter().any(|ip| line.contains(&format!("|ip={ip}|"))), "{ips:?}: {output}");
        assert!(line.ends_with("|fork=alice|home=/home/dev"), "{output}");
        no_fork_is_left();
    });
}

#[test]
fn nothing_secret_is_logged_or_written() {
    on_laptop(|laptop| {
        let running = serving(laptop);
        let targets = kubectl(&["get", "forks,forktargets,events", "--all-namespaces", "--output=yaml"]).ok();
        let logs = cluster_logs() + &laptop.whole_log() + &running.said() + &targets;
        assert!(!logs.is_empty());
        assert!(!logs.contains("not-very-secret"), "a secret of the pod's environment is in a log");
        let written = "grep -rls not-very-secret \"$HOME\" \"$XDG_RUNTIME_DIR\" /tmp/forkd-* || true";
        assert_eq!(laptop.run("sh", &["-c", written]).ok(), "", "a secret is in a file");
        running.signal(Signal::SIGINT);
    });
}

#[test]
fn ctrl_c_ends_the_command_and_undoes_the_intercept() {
    on_laptop(|laptop| {
        let mut running = serving(laptop);
        running.signal(Signal::SIGINT);
        assert_eq!(running.code(), 0, "the shop ends well on SIGINT: {}", running.said());
        no_fork_is_left();
        assert_eq!(inside().http("cart:8080", "alice").fine().from(), "cluster");
    });
}

#[test]
fn a_command_that_a_signal_ends_is_told_as_a_shell_would() {
    on_laptop(|laptop| {
        assert_eq!(laptop.forkd(&forkd(&["sh", "-c", "kill -TERM $$"])).code, 143);
        no_fork_is_left();
        laptop.forkd(&forkd(&["/no/such/program"])).fails(1, &["error:", "/no/such/program"]);
        no_fork_is_left();
    });
}

#[test]
fn the_intercept_ends_when_forkd_itself_is_killed() {
    on_laptop(|laptop| {
        let mut running = serving(laptop);
        running.signal(Signal::SIGKILL);
        assert_eq!(running.code(), 137);
        no_fork_is_left();
        eventually("keyed requests reach the cluster", || {
            let line = inside().http("cart:8080", "alice");
            so(line.from() == "cluster", || format!("{line:?}"))
        });
        // Nobody can end the command of a forkd that was killed.
        for pid in laptop.processes(&["shop", "serve", PORT]) {
            kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it is there");
        }
    });
}

#[test]
fn the_commands_input_and_output_are_its_own() {
    on_laptop(|laptop| {
        let mut command = laptop.command("forkd");
        command.args(forkd(&["sh", "-c", "read line; echo \"got $line\"; echo aside >&2"]));
        let output = crate::harness::process::run(&mut command, Some("hello\n"));
        assert_eq!((output.code, output.stdout.as_str()), (0, "got hello\n"), "{output}");
        assert!(output.stderr.contains("aside"), "{output}");
    });
}
