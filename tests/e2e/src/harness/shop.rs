//! The shop's own client and services.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::cluster::{SHOP, script};
use super::laptop::Laptop;
use super::process::{Output, Process, run};
use super::wait::{eventually, so};

/// What the client prints for one request or connection.
#[derive(Clone, Debug, Deserialize)]
pub struct Line {
    /// The key that was sent; empty for none.
    pub key: String,
    pub answer: Option<Answer>,
    /// The client's end of the connection.
    #[serde(default)]
    pub conn: String,
    /// Of HTTP.
    #[serde(default)]
    pub status: u16,
    /// Of gRPC.
    #[serde(default)]
    pub code: String,
    /// The header `forkd-served-by`.
    #[serde(default)]
    pub served_by: String,
    /// Messages that came back.
    #[serde(default)]
    pub messages: u32,
    /// Bytes that came back.
    #[serde(default)]
    pub bytes: u64,
    /// What came back is what was sent.
    pub same: Option<bool>,
    /// "100 Continue" came.
    #[serde(default)]
    pub continued: bool,
    #[serde(default)]
    pub trailers: BTreeMap<String, String>,
    #[serde(default)]
    pub body: Value,
    /// Milliseconds until the first byte or message of the answer.
    #[serde(default)]
    pub first_ms: f64,
    pub ms: f64,
    #[serde(default)]
    pub error: String,
    #[serde(default)]
    pub errno: String,
}

impl Line {
    /// Where it was answered: `cluster`, or what the process on a laptop was told to say; empty if nobody did.
    pub fn from(&self) -> &str {
        self.answer.as_ref().map_or("", |answer| &answer.place)
    }

    /// Who answered.
    #[track_caller]
    pub fn answer(&self) -> &Answer {
        self.answer.as_ref().unwrap_or_else(|| panic!("nobody says that they answered: {self:?}"))
    }

    /// Itself, if nothing went wrong.
    #[track_caller]
    pub fn fine(self) -> Self {
        assert!(self.error.is_empty(), "this should have been answered: {self:?}");
        self
    }
}

/// One service's part in an answer.
#[derive(Clone, Debug, Deserialize)]
pub struct Answer {
    pub service: String,
    pub pod: String,
    #[serde(rename = "where")]
    pub place: String,
    /// The key that it saw in the baggage.
    pub key: String,
    #[serde(default)]
    pub error: String,
    #[serde(default)]
    pub calls: Vec<Answer>,
}

impl Answer {
    /// The part of a service that this one called, itself or through others.
    pub fn find(&self, service: &str) -> Option<&Answer> {
        if self.service == service {
            return Some(self);
        }
        self.calls.iter().find_map(|call| call.find(service))
    }

    /// What went wrong, anywhere below.
    pub fn errors(&self) -> Vec<String> {
        let own = (!self.error.is_empty()).then(|| format!("{}: {}", self.service, self.error));
        own.into_iter().chain(self.calls.iter().flat_map(Answer::errors)).collect()
    }
}

/// The shop's client, and where it runs.
#[derive(Clone, Debug)]
pub enum Client {
    /// In a pod of the shop that no test intercepts; the API server carries what it says.
    Pod,
    /// On the node: reaches Services by address, and needs no API server.
    Node,
    /// On a laptop.
    Laptop(Laptop),
}

/// The client in a pod that no test intercepts.
pub fn inside() -> Client {
    Client::Pod
}

impl Client {
    pub fn on(laptop: Laptop) -> Self {
        Self::Laptop(laptop)
    }

    fn command(&self, kind: &str, addr: &str, more: &[&str]) -> std::process::Command {
        let mut command = match self {
            Self::Laptop(laptop) => laptop.command("shop"),
            Self::Node => {
                let mut command = script();
                command
                    .arg("node")
                    .arg(std::env::var("FORKD_BIN_DIR").expect("set by tests/e2e/run") + "/shop");
                command
            }
            Self::Pod => {
                let mut command = script();
                command.args(["kubectl", "--namespace", SHOP, "exec", "deployment/clock", "--", "/bin/shop"]);
                command
            }
        };
        command.args(["client", kind, "--addr", addr]).args(more);
        command
    }

    /// Asks, and gives everything: lines also where some failed.
    #[track_caller]
    pub fn output(&self, kind: &str, addr: &str, more: &[&str]) -> Output {
        run(&mut self.command(kind, addr, more), None)
    }

    /// Asks, and gives a line for each request or connection, failed ones too.
    #[track_caller]
    pub fn ask(&self, kind: &str, addr: &str, more: &[&str]) -> Vec<Line> {
        let output = self.output(kind, addr, more);
        let lines: Vec<Line> = output
            .stdout
            .lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}:\n{output}")))
            .collect();
        assert!(!lines.is_empty(), "the client says nothing:\n{output}");
        lines
    }

    /// Asks once.
    #[track_caller]
    pub fn one(&self, kind: &str, addr: &str, more: &[&str]) -> Line {
        let mut lines = self.ask(kind, addr, more);
        assert!(lines.len() == 1, "one line should have come: {lines:?}");
        lines.remove(0)
    }

    /// One HTTP/1.1 request with this key (`""` for none).
    #[track_caller]
    pub fn http(&self, addr: &str, key: &str) -> Line {
        self.one("http1", addr, &["--key", key])
    }

    /// Asks beside the test, and waits until the connection is there.
    #[track_caller]
    pub fn hold(&self, kind: &str, addr: &str, more: &[&str]) -> Process {
        let process = self.start(kind, addr, more);
        let port = addr.rsplit(':').next().unwrap_or_default();
        let list =
            ["ss", "-Htn", "state", "established", "dport", "=", &format!(":{port}")].map(str::to_owned);
        eventually(&format!("a connection to {addr} is there"), || {
            let found = match self {
                Self::Laptop(laptop) => {
                    laptop.run(&list[0], &list[1..].iter().map(String::as_str).collect::<Vec<_>>())
                }
                Self::Node | Self::Pod => run(script().arg("node").args(&list), None),
            };
            so(!found.stdout.trim().is_empty(), || format!("{found}"))
        });
        process
    }

    /// Asks beside the test.
    #[track_caller]
    pub fn start(&self, kind: &str, addr: &str, more: &[&str]) -> Process {
        Process::start(&mut self.command(kind, addr, more))
    }
}

/// One of the shop's services on a laptop.
pub struct Server {
    /// Killed with this.
    _process: Process,
    /// Where it listens, on the laptop's loopback, in the order of the service's ports.
    pub ports: Vec<u16>,
}

impl Server {
    /// Starts it on free ports and waits until it listens.
    #[track_caller]
    pub fn start(laptop: &Laptop, service: &str, place: &str, more: &[&str]) -> Self {
        let mut args = vec!["serve", service, "--where", place, "--listen", "127.0.0.1:0"];
        if service == "queue" {
            args.extend(["--listen", "127.0.0.1:0"]);
        }
        args.extend(more);
        let mut process = laptop.start("shop", &args);
        let line = process.says("msg=serving");
        let listen = line.split_once("listen=").expect("it says where it listens").1;
        let ports = listen
            .split(|c: char| !(c.is_ascii_digit() || c == ':' || c == '.'))
            .filter_map(|addr| addr.rsplit_once(':')?.1.parse().ok())
            .collect();
        Self { _process: process, ports }
    }

    /// Its first port.
    pub fn port(&self) -> u16 {
        self.ports[0]
    }
}
