//! The developer's machine: an unprivileged user, who may use sudo, in a network of their own.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::cluster::script;
use super::process::{Output, Process, run};
use super::shop::{Client, Server};

/// A user on a laptop, with a kubeconfig.
#[derive(Clone, Debug)]
pub struct Laptop {
    unix_user: &'static str,
    kubeconfig: PathBuf,
    /// A process in the second laptop's namespaces; `None` for the first laptop.
    second: Option<i32>,
}

impl Laptop {
    /// The laptop of `scripts/cluster`, for its unprivileged user.
    pub fn of(kubeconfig: PathBuf) -> Self {
        Self { unix_user: "dev", kubeconfig, second: None }
    }

    /// The one that another process lives on.
    pub fn beside(kubeconfig: PathBuf, pid: i32) -> Self {
        Self { unix_user: "dev", kubeconfig, second: Some(pid) }
    }

    /// The same laptop, used by root.
    #[must_use]
    pub fn as_root(&self) -> Self {
        Self { unix_user: "root", ..self.clone() }
    }

    /// The same laptop and user, with another kubeconfig.
    #[must_use]
    pub fn with_kubeconfig(&self, kubeconfig: &Path) -> Self {
        Self { kubeconfig: kubeconfig.to_owned(), ..self.clone() }
    }

    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// A command on the laptop.
    pub fn command(&self, program: &str) -> Command {
        let mut command = script();
        command.arg("laptop");
        match self.second {
            None => command.args(["--user", self.unix_user, "--"]),
            Some(pid) => command
                .args(["--", "nsenter", "--target", &pid.to_string(), "--net", "--mount", "--uts", "--"])
                .args(["setpriv", "--reuid", self.unix_user, "--regid", self.unix_user, "--init-groups"])
                .args(["--inh-caps=-all", "--", "env", "HOME=/home/dev", "USER=dev", "LOGNAME=dev"])
                .arg("XDG_RUNTIME_DIR=/run/user/dev"),
        };
        command.arg("env").arg(format!("KUBECONFIG={}", self.kubeconfig.display())).arg(program);
        command
    }

    /// Runs a command to its end.
    #[track_caller]
    pub fn run(&self, program: &str, args: &[&str]) -> Output {
        run(self.command(program).args(args), None)
    }

    /// Runs forkd to its end.
    #[track_caller]
    pub fn forkd(&self, args: &[&str]) -> Output {
        self.run("forkd", args)
    }

    /// Runs forkd and reads what it says as JSON.
    #[track_caller]
    pub fn forkd_json(&self, args: &[&str]) -> Value {
        self.forkd(&[&["--output", "json"], args].concat()).json()
    }

    /// Starts a command that stays.
    #[track_caller]
    pub fn start(&self, program: &str, args: &[&str]) -> Process {
        Process::start(self.command(program).args(args))
    }

    /// A session in the shop's namespace.
    #[track_caller]
    pub fn connect(&self) {
        self.forkd(&["connect", "--namespace", super::cluster::SHOP]).ok();
    }

    /// Takes a Service's requests; gives what forkd says about it.
    #[track_caller]
    pub fn intercept(&self, service: &str, port: u16, more: &[&str]) -> Value {
        let port = port.to_string();
        let mut args = vec!["intercept", service, "--namespace", super::cluster::SHOP];
        if !more.contains(&"--port") {
            args.extend(["--port", &port]);
        }
        args.extend(more);
        self.forkd_json(&args)
    }

    /// Gives them back.
    #[track_caller]
    pub fn leave(&self, service: &str) {
        self.forkd(&["leave", service, "--namespace", super::cluster::SHOP]).ok();
    }

    /// One of the shop's services on the laptop, which says that it answers from `where_`.
    #[track_caller]
    pub fn serve(&self, service: &str, where_: &str) -> Server {
        Server::start(self, service, where_, &[])
    }

    /// The shop's client on the laptop.
    pub fn client(&self) -> Client {
        Client::on(self.clone())
    }

    /// The processes in the laptop's network whose command line has all of these words.
    pub fn processes(&self, words: &[&str]) -> Vec<i32> {
        let net = self.run("readlink", &["/proc/self/ns/net"]).ok();
        let Ok(all) = fs::read_dir("/proc") else { return Vec::new() };
        all.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
            .filter(|pid| {
                let here = fs::read_link(format!("/proc/{pid}/ns/net"))
                    .is_ok_and(|link| link.to_string_lossy() == net.trim());
                // Some end while this looks.
                let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let line = String::from_utf8_lossy(&line).replace('\0', " ");
                here && !line.is_empty() && words.iter().all(|word| line.contains(word))
            })
            .collect()
    }

    /// The daemon of this laptop's user.
    #[track_caller]
    pub fn daemon(&self) -> i32 {
        let found = self.processes(&["forkd", " daemon"]);
        assert!(found.len() == 1, "there should be one daemon: {found:?}");
        found[0]
    }

    /// The privileged helper's processes, without the sudo that started them.
    #[track_caller]
    pub fn helpers(&self) -> Vec<i32> {
        let sudo = self.processes(&["sudo", "forkd", " helper"]);
        let found: Vec<_> =
            self.processes(&["forkd", " helper"]).into_iter().filter(|pid| !sudo.contains(pid)).collect();
        assert!(!found.is_empty(), "there should be a helper");
        found
    }

    /// What forkd could leave behind on the laptop.
    #[track_caller]
    pub fn traces(&self) -> Traces {
        let root = self.as_root();
        let lines = |args: &[&str]| root.run("ip", args).ok().lines().map(trimmed).collect();
        let pid = self.processes(&[]).into_iter().next();
        let names: BTreeSet<String> = root
            .run("ip", &["-oneline", "link", "show"])
            .ok()
            .lines()
            .filter_map(|line| line.split(": ").nth(1).map(str::to_owned))
            .collect();
        Traces {
            links: names,
            addresses: lines(&["-oneline", "address", "show"]),
            routes: lines(&["route", "show", "table", "all"]),
            routes6: lines(&["-6", "route", "show", "table", "all"]),
            rules: lines(&["rule", "show"]),
            resolver: root.run("cat", &["/etc/resolv.conf"]).ok(),
            resolver_file: pid.and_then(file_kind).unwrap_or_default(),
            hosts: root.run("cat", &["/etc/hosts"]).ok(),
            processes: self.processes(&["forkd", " daemon"]).len()
                + self.processes(&["forkd", " helper"]).len(),
        }
    }

    /// After a failed test: ends what forkd still runs here and takes away what it left.
    pub fn clear(&self, before: &Traces) {
        for words in [["forkd", " daemon"], ["forkd", " helper"], ["forkd", " intercept"]] {
            for pid in self.processes(&words) {
                // It may have ended meanwhile.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        let root = self.as_root();
        for link in self.traces().links.difference(&before.links) {
            root.run("ip", &["link", "delete", link]);
        }
        let restore = format!("cat >/etc/resolv.conf <<'END'\n{}END\n", before.resolver);
        root.run("sh", &["-c", &restore]);
    }

    /// The end of the daemon's logs.
    pub fn log(&self) -> String {
        self.run("sh", &["-c", "tail -n 150 \"$HOME\"/.local/state/forkd/*.log"]).to_string()
    }

    /// All of the daemon's logs, for a search.
    pub fn whole_log(&self) -> String {
        self.run("sh", &["-c", "cat \"$HOME\"/.local/state/forkd/*.log*"]).ok()
    }
}

/// What forkd could leave behind on a laptop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traces {
    pub links: BTreeSet<String>,
    pub addresses: Vec<String>,
    pub routes: Vec<String>,
    pub routes6: Vec<String>,
    pub rules: Vec<String>,
    pub resolver: String,
    pub resolver_file: String,
    pub hosts: String,
    pub processes: usize,
}

fn trimmed(line: &str) -> String {
    line.trim().to_owned()
}

/// Type, owner and mode of the resolver's file, and where a link leads.
fn file_kind(pid: i32) -> Option<String> {
    let path = format!("/proc/{pid}/root/etc/resolv.conf");
    let meta = fs::symlink_metadata(&path).ok()?;
    let link = fs::read_link(&path).map(|to| to.display().to_string()).unwrap_or_default();
    Some(format!("{:o} {}:{} {link}", meta.mode(), meta.uid(), meta.gid()))
}
