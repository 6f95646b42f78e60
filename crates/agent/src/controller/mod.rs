//! The controller: turns Fork and ForkTarget objects into agents and routes, and vouches for who is who.
//!
//! What it knows comes by watches into `world`; each change marks a key in `queue`; `reconcile` takes keys and
//! makes it so, deciding by `plan` and `inject`, writing what `status` says. Agents, gateways and relays are
//! connected to `server`; `hub` keeps what they were told and what they said. Only the holder of the Lease does any
//! of this (`leader`); all that has to outlive it is in the API server.
//!
//! | task | runs | ends |
//! | --- | --- | --- |
//! | watches, one per kind | `watch` | never |
//! | reconciler | `reconcile::Reconciler::run` | never |
//! | control server, one task per connection | `server::Server::serve` | when the listener fails |
//! | signer of laptops' certificates | `csr::Signer::run` | never |
//! | lease | `leader::Leadership::hold` | when leadership is lost: so does the process |

mod access;
mod ca;
mod cluster;
mod csr;
mod health;
mod hub;
mod inject;
mod join;
mod leader;
mod memory;
mod plan;
mod queue;
mod reconcile;
mod server;
mod status;
mod token;
mod view;
mod watch;
mod world;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use forkd_api::manifests::IMAGE_REPOSITORY;
use forkd_tunnel::identity::{Authority, Credentials, Identity, KeyPair};
use kube::Client;
use kube::runtime::events::{Recorder, Reporter};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;

/// Field manager of what the controller writes (server-side apply). Not the installer's: each owns its own fields.
const FIELD_MANAGER: &str = "forkd-controller";
/// Life of the controller's own certificate.
const OWN_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Arguments of the role `controller`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Where agents, gateways and relays connect
    #[arg(long, env = "FORKD_LISTEN", default_value = "[::]:9443")]
    pub listen: SocketAddr,
    /// Where the kubelet asks for /healthz and /readyz
    #[arg(long, env = "FORKD_HEALTH", default_value = "[::]:8080")]
    pub health: SocketAddr,
    /// Image of the agents that are put into pods
    #[arg(long, env = "FORKD_IMAGE", default_value_t = format!("{IMAGE_REPOSITORY}:{}", env!("CARGO_PKG_VERSION")))]
    pub image: String,
    /// When the kubelet pulls that image: Always, IfNotPresent, Never
    #[arg(long, env = "FORKD_IMAGE_PULL_POLICY", default_value = "IfNotPresent")]
    pub image_pull_policy: String,
    /// IP:PORT of this controller as pods reach it [default: that of the Service forkd-controller]
    #[arg(long, env = "FORKD_ADVERTISE")]
    pub advertise: Option<SocketAddr>,
    /// Seconds after which the claims of a laptop that is gone are freed
    #[arg(long, env = "FORKD_LAPTOP_GRACE", default_value_t = 600)]
    pub laptop_grace: u64,
    /// Name of this controller among its like
    #[arg(long, env = "POD_NAME", default_value = "forkd-controller")]
    pub name: String,
}

/// Runs the controller until SIGTERM, SIGINT or the loss of leadership.
///
/// # Errors
/// If it cannot start, loses the lease, or a part of it ends: the process is to be started again then.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let client = Client::try_default().await.context("find the way to the API server")?;
    let ready = Arc::new(AtomicBool::new(false));
    let mut tasks = JoinSet::new();
    let health = listen(args.health).await?;
    let mut probes = tokio::spawn(health::serve(health, Arc::clone(&ready)));
    let mut terminated = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupted = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let mut stop = std::pin::pin!(async {
        tokio::select! {
            _ = terminated.recv() => {}
            _ = interrupted.recv() => {}
        }
    });
    let mut leadership = tokio::select! {
        led = leader::acquire(&client, &args.name) => led?,
        () = &mut stop => return Ok(()),
    };
    let outcome = tokio::select! {
        lost = leadership.hold() => lost,
        ended = lead(&args, client, &ready, &mut tasks) => ended,
        failed = &mut probes => failed.context("answer health probes")?.context("answer health probes"),
        () = &mut stop => {
            tracing::info!("asked to stop");
            Ok(())
        }
    };
    ready.store(false, Ordering::Release);
    probes.abort();
    tasks.shutdown().await;
    if outcome.is_ok() {
        leadership.release().await?;
    }
    outcome
}

/// Everything that only the leader does.
async fn lead(
    args: &Args,
    client: Client,
    ready: &AtomicBool,
    tasks: &mut JoinSet<()>,
) -> anyhow::Result<()> {
    let ca = ca::load_or_create(&client).await?;
    ca::publish(&client, &ca.authority).await?;
    let queue = Arc::new(queue::Queue::default());
    let world = Arc::new(world::World::new(Arc::clone(&queue)));
    watch::start(&client, &world, tasks).await?;
    let (credentials, key) = own_credentials(&ca.authority)?;
    let server = Arc::new(server::Server {
        joins: join::Joins {
            client: client.clone(),
            world: Arc::clone(&world),
            tokens: token::Tokens::new(ca.token_key.clone()),
        },
        access: access::Access::new(client.clone(), Arc::clone(&world)),
        hub: Arc::default(),
        ca,
        world,
        queue,
    });
    let reporter = Reporter { controller: FIELD_MANAGER.to_owned(), instance: Some(args.name.clone()) };
    let config = reconcile::Config {
        image: args.image.clone(),
        image_pull_policy: args.image_pull_policy.clone(),
        advertise: args.advertise.map(|address| address.to_string()),
        grace: Duration::from_secs(args.laptop_grace),
        resolv: resolv().await,
    };
    let recorder = Recorder::new(client.clone(), reporter);
    let reconciler = reconcile::Reconciler::new(client.clone(), Arc::clone(&server), recorder, config);
    let listener = listen(args.listen).await?;
    ready.store(true, Ordering::Release);
    tracing::info!(address = %args.listen, image = args.image, "controller is ready");
    tokio::select! {
        () = reconciler.run() => bail!("the reconciler ended"),
        served = Arc::clone(&server).serve(listener, &credentials) => served,
        () = csr::Signer::new(client, Arc::clone(&server)).run() => bail!("the signer ended"),
        renewed = renew(&server.ca.authority, &credentials, &key) => renewed,
        ended = tasks.join_next() => match ended {
            Some(Err(error)) => Err(error).context("a watch failed"),
            _ => bail!("a watch ended"),
        },
    }
}

fn own_credentials(authority: &Authority) -> anyhow::Result<(Credentials, KeyPair)> {
    let key = KeyPair::generate().context("generate the controller's key")?;
    let request = key.request(&Identity::Controller)?;
    let chain = authority
        .sign(&request.der, &Identity::Controller, OWN_LIFETIME)
        .context("sign the controller's certificate")?;
    Ok((Credentials::new(chain, &key)?, key))
}

/// Signs itself a new certificate whenever two thirds of the old one's life are over.
async fn renew(authority: &Authority, credentials: &Credentials, key: &KeyPair) -> anyhow::Result<()> {
    loop {
        let wait = credentials.renew_at().duration_since(SystemTime::now()).unwrap_or_default();
        // Not less: an authority at its end gives certificates without any life.
        tokio::time::sleep(wait.max(Duration::from_secs(60))).await;
        let request = key.request(&Identity::Controller)?;
        let chain = authority
            .sign(&request.der, &Identity::Controller, OWN_LIFETIME)
            .context("renew the controller's certificate")?;
        credentials.replace(chain, key).context("renew the controller's certificate")?;
    }
}

/// Binds; where there is no IPv6, `[::]` means all of IPv4.
async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let bound = match TcpListener::bind(address).await {
        Err(_) if address.ip().is_unspecified() && address.is_ipv6() => {
            TcpListener::bind((std::net::Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    };
    bound.with_context(|| format!("listen on {address}"))
}

/// The DNS settings of this pod; without any, the usual ones are assumed.
async fn resolv() -> cluster::Resolv {
    match tokio::fs::read_to_string("/etc/resolv.conf").await {
        Ok(text) => cluster::Resolv::parse(&text),
        Err(error) => {
            tracing::warn!(%error, "reading /etc/resolv.conf failed, assuming the domain cluster.local");
            cluster::Resolv::default()
        }
    }
}
