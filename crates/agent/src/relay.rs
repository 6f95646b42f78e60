//! The role `relay`: passes sealed packets between laptops and agents.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use anyhow::Context as _;
use forkd_tunnel::identity::Identity;
use forkd_tunnel::relay::{Dropped, Relay};
use forkd_wire::relay::RELAY_PORT;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::link::{Config, Link, State};

/// How often the counters are written to the log, if they moved.
const REPORT: Duration = Duration::from_secs(60);

/// Runs until told to stop.
///
/// # Errors
/// It could not start, was refused, or lost its sockets.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let link = Link::join(config).await?;
    let identity = link.credentials.identity();
    anyhow::ensure!(
        matches!(identity, Identity::Relay { .. }),
        "the controller took this relay for {}",
        identity.uri()
    );
    let udp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, RELAY_PORT)).context("bind the relay's UDP port")?;
    // Loopback only: where a port-forward ends, and nobody else in the cluster can connect.
    let tcp =
        TcpListener::bind((Ipv4Addr::LOCALHOST, RELAY_PORT)).await.context("bind the relay's TCP port")?;
    let mut relay = Relay::start(&link.credentials, udp, tcp).context("start the relay")?;
    tracing::info!(port = RELAY_PORT, "relay");

    let mut state = link.state.clone();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut report = tokio::time::interval(REPORT);
    let mut before = (0, 0);
    loop {
        tokio::select! {
            () = relay.ended() => anyhow::bail!("the relay lost its sockets"),
            Ok(()) = state.changed() => match *state.borrow_and_update() {
                State::Joined => {}
                State::Retired => break,
                // A relay without a certificate is of no use; the kubelet starts it anew, and it joins anew.
                State::Lost => anyhow::bail!("the controller is gone"),
            },
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = report.tick() => {
                let now = relay.forwarded();
                if now != before {
                    tracing::info!(parties = relay.parties(), packets = now.0, bytes = now.1, dropped = dropped(&relay), "forwarded");
                    before = now;
                }
            }
        }
    }
    relay.close().await;
    Ok(())
}

/// `reason=count` for every reason that occurred.
fn dropped(relay: &Relay) -> String {
    let counts = Dropped::ALL.iter().map(|reason| (reason.as_str(), relay.dropped(*reason)));
    counts.filter(|(_, n)| *n > 0).map(|(reason, n)| format!("{reason}={n}")).collect::<Vec<_>>().join(" ")
}
