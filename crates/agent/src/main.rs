//! The one binary of the agent image: what runs in the cluster, by role.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use forkd_agent::link::{Config, LOST, Proof};
use forkd_agent::pod::{self, Role};
use forkd_agent::{controller, relay};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

/// forkd in the cluster.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    role: RoleArgs,
}

#[derive(Subcommand)]
enum RoleArgs {
    /// In a pod: takes its ports and dials on its behalf. Started by the controller, as an ephemeral container.
    Agent {
        /// Only read the application's environment; runs with the application's own rights.
        #[arg(long)]
        env: bool,
        #[command(flatten)]
        join: JoinArgs,
    },
    /// In forkd's namespace: dials for laptops that intercept nothing.
    Gateway(JoinArgs),
    /// Passes sealed packets between laptops and agents.
    Relay(JoinArgs),
    /// Turns Fork and ForkTarget objects into agents and routes; the certificate authority.
    Controller(controller::Args),
}

#[derive(clap::Args)]
struct JoinArgs {
    /// The controller, host:port.
    #[arg(long, env = "FORKD_CONTROLLER")]
    controller: String,
    /// Certificate of forkd's authority, PEM.
    #[arg(long, env = "FORKD_CA", hide_env_values = true)]
    ca: Option<String>,
    /// The same, in a file.
    #[arg(long, env = "FORKD_CA_FILE", conflicts_with = "ca")]
    ca_file: Option<PathBuf>,
    /// The one-time join token of an agent.
    #[arg(long, env = "FORKD_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// A projected service account token with audience "forkd".
    #[arg(long, env = "FORKD_TOKEN_FILE", conflicts_with = "token")]
    token_file: Option<PathBuf>,
}

impl JoinArgs {
    /// `lost_after`: how long the role makes sense without a controller.
    fn config(self, lost_after: Duration) -> anyhow::Result<Config> {
        let pem = match (self.ca, self.ca_file) {
            (Some(pem), _) => pem,
            (None, Some(file)) => {
                std::fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?
            }
            (None, None) => anyhow::bail!("neither FORKD_CA nor FORKD_CA_FILE is set"),
        };
        let authority =
            CertificateDer::from_pem_slice(pem.as_bytes()).context("read the authority's certificate")?;
        let proof = match (self.token, self.token_file) {
            (Some(token), _) => Proof::JoinToken(token),
            (None, Some(file)) => Proof::ServiceAccountToken(file),
            (None, None) => anyhow::bail!("neither FORKD_TOKEN nor FORKD_TOKEN_FILE is set"),
        };
        Ok(Config { controller: self.controller, authority, proof, lost_after })
    }
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("FORKD_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")),
        )
        .with_ansi(false)
        .with_target(false)
        .init();
    // An agent shares its pod's CPU limit with the application and rarely has more than one core's work. One thread
    // also spares it the hop between them.
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(run(args.role))
}

async fn run(role: RoleArgs) -> anyhow::Result<()> {
    match role {
        RoleArgs::Agent { env: false, join } => pod::run(Role::Pod, join.config(LOST)?).await,
        RoleArgs::Agent { env: true, join } => pod::run(Role::Environment, join.config(LOST)?).await,
        // These two go on for as long as their certificates do: sessions outlive the controller.
        RoleArgs::Gateway(join) => pod::run(Role::Gateway, join.config(Duration::MAX)?).await,
        RoleArgs::Relay(join) => relay::run(join.config(Duration::MAX)?).await,
        RoleArgs::Controller(args) => controller::run(args).await,
    }
}
