//! Requests from agents to ports of the laptop: only to ports that this laptop put into its own targets.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, PoisonError, RwLock};

use forkd_tunnel::copy::copy;
use forkd_tunnel::identity::{AgentRole, Identity};
use forkd_tunnel::stream::{self, AcceptError};
use forkd_wire::tunnel::{Deliver, Outcome, open};
use quinn::{Connection, RecvStream, SendStream};
use tokio::net::TcpStream;

/// Where a target's connections go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// Of the Service; an agent of another namespace has no business here.
    pub namespace: String,
    /// The Service, for messages.
    pub service: String,
    /// Container port → port on the laptop. A container's port may have another number in each pod.
    pub ports: BTreeMap<u16, u16>,
}

/// The laptop's own targets by `metadata.uid`. Cheap to clone; all clones see the same.
#[derive(Clone, Default)]
pub struct Targets(Arc<RwLock<HashMap<String, Delivery>>>);

impl Targets {
    /// Adds or replaces a target.
    pub fn put(&self, uid: String, delivery: Delivery) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(uid, delivery);
    }

    /// Takes a target out: nothing is delivered for it from here on.
    pub fn remove(&self, uid: &str) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }

    /// The laptop's port for what an agent wants to deliver, or why there is none.
    fn find(&self, from: &Identity, wanted: &Deliver) -> Result<(u16, String), String> {
        let targets = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let target = targets
            .get(&wanted.target)
            .ok_or_else(|| "this laptop has no such target (it may just have left)".to_owned())?;
        if !matches!(from, Identity::Agent { namespace, role: AgentRole::Pod, .. } if *namespace == target.namespace)
        {
            return Err(format!("{} is no agent of {}.{}", from.short(), target.service, target.namespace));
        }
        let port = u16::try_from(wanted.port).ok().and_then(|port| target.ports.get(&port));
        let name = format!("{}.{}", target.service, target.namespace);
        port.map(|port| (*port, name.clone()))
            .ok_or_else(|| format!("port {} of {name} is not intercepted", wanted.port))
    }
}

/// Serves what an agent opens, until the connection ends. Needs a `LocalSet`.
pub async fn serve(connection: Connection, agent: Identity, targets: Targets) {
    // An error means that the connection has ended, which whoever keeps it sees as well.
    while let Ok((send, recv)) = connection.accept_bi().await {
        let (agent, targets) = (agent.clone(), targets.clone());
        tokio::task::spawn_local(async move {
            if let Err(error) = one(send, recv, &agent, &targets).await {
                tracing::debug!(agent = agent.short(), %error, "stream not served");
            }
        });
    }
}

async fn one(
    send: SendStream,
    recv: RecvStream,
    agent: &Identity,
    targets: &Targets,
) -> Result<(), AcceptError> {
    let (opened, accepting) = stream::accept(send, recv).await?;
    let Some(open::Kind::Deliver(wanted)) = opened.kind else {
        return accepting.refuse(Outcome::Unsupported, "a laptop takes deliveries only").await;
    };
    let (port, service) = match targets.find(agent, &wanted) {
        Ok(found) => found,
        Err(why) => return accepting.refuse(Outcome::Unsupported, &why).await,
    };
    let connected = tokio::select! {
        connected = connect(port) => connected,
        () = accepting.cancelled() => return Ok(()),
    };
    let tcp = match connected {
        Ok(tcp) => tcp,
        Err(error) => {
            tracing::info!(service, port, caller = wanted.caller, %error, "not delivered");
            let outcome = match error.kind() {
                io::ErrorKind::ConnectionRefused => Outcome::Refused,
                io::ErrorKind::TimedOut => Outcome::TimedOut,
                io::ErrorKind::ConnectionReset => Outcome::Reset,
                _ => Outcome::Unavailable,
            };
            let why = match outcome {
                Outcome::Refused => format!("nothing listens on port {port} of the laptop"),
                _ => format!("port {port} of the laptop: {error}"),
            };
            return accepting.refuse(outcome, &why).await;
        }
    };
    let (send, recv) = accepting.ok().await?;
    let copied = copy(tcp, send, recv).await;
    tracing::debug!(
        service,
        port,
        caller = wanted.caller,
        agent = agent.short(),
        to_laptop = copied.to_tcp,
        from_laptop = copied.to_stream,
        end = copied.end.as_str(),
        "delivered"
    );
    Ok(())
}

/// Connects to a port of the laptop itself: IPv4 first, as most development servers listen there; IPv6 for those that
/// listen on nothing else.
///
/// # Errors
/// That of IPv4 if both fail: it is the one that people expect.
pub async fn connect(port: u16) -> io::Result<TcpStream> {
    let v4 = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
    let tcp = match TcpStream::connect(v4).await {
        Ok(tcp) => tcp,
        Err(error) => TcpStream::connect(v6).await.map_err(|_| error)?,
    };
    tcp.set_nodelay(true)?;
    Ok(tcp)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    fn agent(namespace: &str, role: AgentRole) -> Identity {
        Identity::Agent { pod_uid: "u".into(), namespace: namespace.into(), pod: "cart-1".into(), role }
    }

    fn wanted(target: &str, port: u32) -> Deliver {
        Deliver { target: target.into(), port, caller: String::new() }
    }

    #[test]
    fn only_own_targets_and_their_ports_are_found_and_only_for_agents_of_their_namespace() {
        let targets = Targets::default();
        let delivery =
            Delivery { namespace: "shop".into(), service: "cart".into(), ports: [(80, 8080)].into() };
        targets.put("t1".into(), delivery);
        let shop = agent("shop", AgentRole::Pod);
        assert_eq!(targets.find(&shop, &wanted("t1", 80)), Ok((8080, "cart.shop".into())));
        assert!(targets.find(&shop, &wanted("t1", 22)).unwrap_err().contains("not intercepted"));
        assert!(targets.find(&shop, &wanted("t1", 65616)).is_err(), "80 + 65536 is not 80");
        assert!(targets.find(&shop, &wanted("t2", 80)).unwrap_err().contains("no such target"));
        assert!(targets.find(&agent("other", AgentRole::Pod), &wanted("t1", 80)).is_err());
        assert!(targets.find(&agent("shop", AgentRole::Gateway), &wanted("t1", 80)).is_err());
        targets.remove("t1");
        assert!(targets.find(&shop, &wanted("t1", 80)).is_err());
    }

    #[tokio::test]
    async fn a_server_that_listens_on_ipv6_only_is_reached() {
        let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(connect(port).await.unwrap().peer_addr().unwrap().is_ipv6());
        drop(listener);
        assert_eq!(connect(port).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}
