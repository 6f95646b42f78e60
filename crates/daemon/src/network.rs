//! What the session does to the laptop: TUN, routes and resolver, through the helper, as the cluster says it is.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use forkd_core::dns::Zones;
use forkd_tunnel::identity::{AgentRole, Identity};
use forkd_tunnel::stream::{self, MessageReader};
use forkd_wire::tunnel::{Cluster, ClusterInfo, Open, open};
use ipnet::IpNet;
use tokio::sync::watch;

use crate::control::Progress;
use crate::dataplane::{Connections, SharedPlane};
use crate::failure::Failure;
use crate::helper::HelperClient;
use crate::helper::protocol::DnsMode;
use crate::net::NetConfig;
use crate::status;

/// MTU of the TUN. Applications see the usual segment size; offloads make packets of up to 64 KiB of it.
const MTU: u16 = 1500;
/// Flows at a time; each costs some KiB. Beyond what a laptop opens, below what fills its memory.
const MAX_FLOWS: usize = 16 * 1024;
/// From the port-forward to the gateway's first word about the cluster.
const GATEWAY: Duration = Duration::from_secs(20);

/// What is set up.
#[derive(Clone, Debug, Default)]
pub struct Applied {
    /// What is routed into the TUN.
    pub routes: Vec<IpNet>,
    /// How names get to the cluster.
    pub dns: Option<status::Dns>,
    info: ClusterInfo,
    namespace: String,
}

/// The laptop's side of the network. Dropping it lets the helper undo everything.
pub struct Network {
    helper: HelperClient,
    plane: SharedPlane,
    /// Addresses of the API server: they must stay reachable as they are.
    keep: Vec<IpAddr>,
    applied: Mutex<Applied>,
    /// One change at a time.
    turn: tokio::sync::Mutex<()>,
}

/// The cluster as the gateway describes it; follows its changes for good, over whatever connection there is.
pub async fn follow_cluster(
    mut connections: watch::Receiver<Connections>,
    found: watch::Sender<Option<ClusterInfo>>,
) {
    loop {
        let is_gateway =
            |identity: &Identity| matches!(identity, Identity::Agent { role: AgentRole::Gateway, .. });
        let connection = match connections.wait_for(|all| all.keys().any(is_gateway)).await {
            Ok(all) => all.iter().find(|(identity, _)| is_gateway(identity)).map(|(_, found)| found.clone()),
            Err(_) => return,
        };
        let Some(connection) = connection else { continue };
        let ask = Open { kind: Some(open::Kind::Cluster(Cluster {})) };
        match stream::open(&connection, ask).await {
            Ok((_send, recv)) => {
                let mut messages = MessageReader::<ClusterInfo, _>::new(recv);
                loop {
                    match messages.next().await {
                        Ok(Some(info)) => drop(found.send_replace(Some(info))),
                        Ok(None) => break,
                        Err(error) => {
                            tracing::debug!(%error, "the gateway's description of the cluster broke off");
                            break;
                        }
                    }
                }
            }
            Err(error) => tracing::warn!(%error, "the gateway does not describe the cluster"),
        }
        // The gateway may be on its way out; another answers as soon as it is connected.
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// The first description.
///
/// # Errors
/// [`Failure`] when no gateway is heard of in time.
pub async fn first_info(
    found: &mut watch::Receiver<Option<ClusterInfo>>,
    why: impl Fn() -> Option<String>,
) -> Result<ClusterInfo, Failure> {
    match tokio::time::timeout(GATEWAY, found.wait_for(Option::is_some)).await {
        Ok(Ok(info)) => info.clone().ok_or_else(|| Failure::new("the gateway said nothing")),
        Ok(Err(_)) => {
            Err(Failure::new("cannot reach the cluster's gateway").because("the session ended meanwhile"))
        }
        Err(_) => {
            let failure = Failure::new("cannot reach the cluster's gateway");
            let because = format!("nothing was heard of it within {} s", GATEWAY.as_secs());
            Err(match why() {
                Some(why) => failure.because(because).because(why),
                None => failure.because(because),
            }
            .advice("see whether forkd runs: `kubectl get pods -n forkd` (relay and gateway)"))
        }
    }
}

impl Network {
    /// Sets everything up: TUN first, then what leads into it, so that no packet goes nowhere.
    ///
    /// # Errors
    /// [`Failure`] of the helper, e.g. a range that is routed elsewhere; everything is undone then.
    pub async fn start(
        helper: HelperClient,
        plane: SharedPlane,
        keep: Vec<IpAddr>,
        info: ClusterInfo,
        namespace: &str,
        progress: &Progress,
    ) -> Result<Self, Failure> {
        progress.step("setting up the network");
        let cluster = Described::read(&info)?;
        let cannot = "cannot set up the network of this laptop";
        let (_, tun) =
            helper.create_tun(MTU).await.map_err(|error| Failure::from(error).while_doing(cannot))?;
        let config = NetConfig {
            mtu: MTU,
            dns: cluster.dns,
            zones: cluster.zones.clone(),
            upstream: Vec::new(),
            max_flows: MAX_FLOWS,
        };
        plane.serve(tun, config).await.map_err(|error| Failure::new(cannot).caused_by(&error))?;
        let network =
            Self { helper, plane, keep, applied: Mutex::default(), turn: tokio::sync::Mutex::default() };
        network.apply(info, namespace).await?;
        Ok(network)
    }

    /// What is set up at the moment.
    pub fn applied(&self) -> Applied {
        self.applied.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Looks up short names in another namespace from here on.
    ///
    /// # Errors
    /// [`Failure`] of the helper; the resolver is then as before.
    pub async fn set_namespace(&self, namespace: &str) -> Result<(), Failure> {
        self.apply(self.applied().info, namespace).await
    }

    /// Follows a change of the cluster.
    ///
    /// # Errors
    /// [`Failure`] of the helper; the network is then as before.
    pub async fn set_cluster(&self, info: ClusterInfo) -> Result<(), Failure> {
        let namespace = self.applied().namespace;
        self.apply(info, &namespace).await
    }

    async fn apply(&self, info: ClusterInfo, namespace: &str) -> Result<(), Failure> {
        let _turn = self.turn.lock().await;
        let before = self.applied();
        if before.info == info && before.namespace == namespace {
            return Ok(());
        }
        let cluster = Described::read(&info)?;
        if before.routes != cluster.ranges {
            self.helper.set_routes(cluster.ranges.clone(), self.keep.clone(), Vec::new()).await.map_err(
                |error| Failure::from(error).while_doing("cannot route the cluster's ranges to the cluster"),
            )?;
        }
        let domain = info.domain.trim_end_matches('.');
        let search = vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.to_owned()];
        let names =
            self.helper.set_dns(cluster.dns, domain.to_owned(), search.clone()).await.map_err(|error| {
                Failure::from(error).while_doing("cannot send the cluster's names to the cluster")
            })?;
        let upstream: Vec<SocketAddr> = names.upstream.clone();
        self.plane
            .set_names(cluster.zones, upstream)
            .await
            .map_err(|error| Failure::new("cannot answer the cluster's names").caused_by(&error))?;
        let dns = status::Dns {
            mode: match names.mode {
                DnsMode::Resolved => "systemd-resolved",
                DnsMode::ResolvConf => "resolv.conf",
            }
            .to_owned(),
            server: cluster.dns.to_string(),
            domain: domain.to_owned(),
            search,
        };
        *self.applied.lock().unwrap_or_else(PoisonError::into_inner) =
            Applied { routes: cluster.ranges, dns: Some(dns), info, namespace: namespace.to_owned() };
        Ok(())
    }

    /// Undoes everything, and waits until it is done.
    ///
    /// # Errors
    /// [`Failure`]; the helper undoes what is left when its socket closes.
    pub async fn stop(&self) -> Result<(), Failure> {
        let _turn = self.turn.lock().await;
        self.helper
            .undo()
            .await
            .map_err(|error| Failure::from(error).while_doing("cannot undo the network of this laptop"))
    }

    /// Resolves when the helper is gone, and with it everything that was set up.
    pub async fn helper_gone(&self) {
        self.helper.closed().await;
    }
}

/// [`ClusterInfo`], checked.
struct Described {
    dns: IpAddr,
    ranges: Vec<IpNet>,
    zones: Zones,
}

impl Described {
    fn read(info: &ClusterInfo) -> Result<Self, Failure> {
        let cannot = || Failure::new("cannot use the gateway's description of the cluster");
        let dns = info
            .dns_ip
            .parse()
            .map_err(|_| cannot().because(format!("`{}` is no address of a DNS service", info.dns_ip)))?;
        let mut ranges = Vec::new();
        for text in info.service_cidrs.iter().chain(&info.pod_cidrs) {
            let range: IpNet =
                text.parse().map_err(|_| cannot().because(format!("`{text}` is no address range")))?;
            ranges.push(range.trunc());
        }
        ranges.sort_unstable();
        ranges.dedup();
        if ranges.is_empty() {
            return Err(cannot().because("it names no address ranges"));
        }
        let zones = Zones::new(info.domain.trim_end_matches('.'), ranges.clone())
            .map_err(|error| cannot().caused_by(&error))?;
        Ok(Self { dns, ranges, zones })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(dns: &str, services: &[&str]) -> ClusterInfo {
        ClusterInfo {
            dns_ip: dns.into(),
            domain: "cluster.local.".into(),
            service_cidrs: services.iter().map(|text| (*text).to_owned()).collect(),
            pod_cidrs: vec!["10.244.0.0/24".into()],
        }
    }

    #[test]
    fn a_description_that_makes_no_sense_is_refused_with_what_is_wrong() {
        let read = Described::read(&info("10.96.0.10", &["10.96.0.1/16", "10.244.0.0/24"])).unwrap();
        let ranges: Vec<String> = read.ranges.iter().map(ToString::to_string).collect();
        assert_eq!(ranges, ["10.96.0.0/16", "10.244.0.0/24"], "host bits cut, each range once");
        let why = |info| Described::read(&info).err().unwrap().because[0].clone();
        assert!(why(info("kube-dns", &[])).contains("`kube-dns`"));
        assert!(why(info("10.96.0.10", &["10.96.0.0"])).contains("`10.96.0.0`"));
        let root = ClusterInfo { domain: ".".into(), ..info("10.96.0.10", &[]) };
        assert!(Described::read(&root).is_err());
    }
}
