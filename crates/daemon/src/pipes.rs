//! The port-forward to a relay, kept open: when it dies, the next relay is tried. Live flows wait meanwhile.

use std::sync::Arc;
use std::time::Duration;

use forkd_api::SYSTEM_NAMESPACE;
use forkd_tunnel::endpoint::LaptopEndpoint;
use forkd_tunnel::identity::Identity;
use forkd_wire::relay::RELAY_PORT;
use kube::Client;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::failure::{Exit, Failure};
use crate::kubernetes;
use crate::portforward;

/// Relays have fixed names (a StatefulSet's), so that RBAC can name them; there are at most this many to try.
const RELAYS: usize = 9;
/// Between attempts; doubles up to the second. Short, because sleep and roaming are the common cause.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// How packets travel at the moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Path {
    /// "port-forward via forkd-relay-0"; empty while there is none.
    pub name: String,
    /// Why there is none.
    pub problem: Option<String>,
}

fn relay(number: usize) -> String {
    format!("forkd-relay-{number}")
}

/// Opens a pipe to the first relay that takes one, beginning with number `first`. Returns its number.
///
/// # Errors
/// That of the first relay that was asked and is there: the others' are mostly the same.
pub async fn open(
    client: &Client,
    first: usize,
) -> Result<(usize, impl AsyncRead + AsyncWrite + Send + Unpin + 'static + use<>), Failure> {
    let mut failed: Option<kube::Error> = None;
    let mut number = first;
    for _ in 0..RELAYS {
        match portforward::open(client, SYSTEM_NAMESPACE, &relay(number), RELAY_PORT).await {
            Ok(pipe) => return Ok((number, pipe)),
            Err(error) => {
                // Beyond the last relay there is none, and users' RBAC names only those that are there.
                let end = matches!(&error, kube::Error::Api(status) if matches!(status.code, 403 | 404));
                tracing::debug!(relay = number, %error, "no port-forward");
                failed.get_or_insert(error);
                if end && number == 0 {
                    break;
                }
                number = if end { 0 } else { number + 1 };
                if number == first {
                    break;
                }
            }
        }
    }
    let cannot =
        format!("cannot open a port-forward to {} in the namespace {SYSTEM_NAMESPACE}", relay(first));
    let failure = match &failed {
        Some(kube::Error::Api(status)) if status.code == 404 => Failure::new(cannot)
            .because(&status.message)
            .advice("see whether forkd is installed: `kubectl get pods -n forkd`; `forkd install`"),
        // RBAC alone says no without a reason, and the API server then does not say which verb it asked for.
        Some(kube::Error::Api(status)) if status.code == 403 && !status.message.contains(" cannot ") => {
            Failure::new(cannot)
                .because(status.message.trim().trim_end_matches(':'))
                .because(format!(
                    "you cannot create resource \"pods/portforward\" named {} in the namespace \
                     {SYSTEM_NAMESPACE}",
                    relay(first)
                ))
                .advice(format!("ask for the Role `forkd-user` in the namespace {SYSTEM_NAMESPACE}"))
                .exit(Exit::Refused)
        }
        Some(error) => kubernetes::failure(cannot, error),
        None => Failure::new(cannot),
    };
    Err(failure)
}

/// What the session hears about the way to the cluster.
pub struct Report {
    /// How packets travel.
    pub path: watch::Sender<Path>,
    /// Agents that the relay of the moment knows; stays as it was while there is none.
    pub reachable: watch::Sender<Vec<Identity>>,
}

/// Attaches a pipe and waits for its end; then opens the next, for good.
pub async fn keep<I>(client: Client, endpoint: Arc<LaptopEndpoint>, first: (usize, I), report: Report)
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (mut number, pipe) = first;
    attached(&endpoint, number, pipe, &report).await;
    let mut pause = RETRY.0;
    loop {
        match open(&client, number + 1).await {
            Ok((next, pipe)) => {
                number = next;
                let since = Instant::now();
                attached(&endpoint, number, pipe, &report).await;
                // A pipe that dies at once, as when the relay in the pod does not listen, is no success.
                pause = if since.elapsed() > RETRY.1 { RETRY.0 } else { (pause * 2).min(RETRY.1) };
            }
            Err(failure) => {
                let problem = failure.one_line();
                tracing::debug!(problem, "no path");
                report.path.send_modify(|path| path.problem = Some(problem));
                pause = (pause * 2).min(RETRY.1);
            }
        }
        tokio::time::sleep(pause).await;
    }
}

/// Uses a pipe until it is dead.
async fn attached<I>(endpoint: &LaptopEndpoint, number: usize, pipe: I, report: &Report)
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let name = relay(number);
    let identity = Identity::Relay { name: name.clone() };
    let end = endpoint.attach_pipe(&identity, pipe);
    let control = match endpoint.relay(&identity) {
        Ok(control) => control,
        Err(error) => {
            let problem = format!("cannot talk to {name}: {error}");
            report.path.send_replace(Path { name: String::new(), problem: Some(problem) });
            return;
        }
    };
    tracing::info!(relay = name, "port-forward open");
    report.path.send_replace(Path { name: format!("port-forward via {name}"), problem: None });
    let mut agents = control.agents();
    let listen = async {
        // What it said before is another's: only news counts.
        while agents.changed().await.is_ok() {
            report.reachable.send_replace(agents.borrow_and_update().clone());
        }
        std::future::pending().await
    };
    let why = tokio::select! {
        why = end => format!("{why:?}"),
        () = listen => return,
    };
    tracing::info!(relay = name, why, "port-forward ended");
    report.path.send_replace(Path {
        name: String::new(),
        problem: Some(format!("the port-forward to {name} ended: {why}")),
    });
}
