//! A small world in one process: one authority, a relay on loopback, agents on UDP, laptops through TCP pipes.
#![allow(dead_code, clippy::unwrap_used)] // each test file uses its part; helpers of tests are tests

use std::net::SocketAddr;
use std::time::Duration;

use forkd_tunnel::endpoint::{AgentEndpoint, LaptopEndpoint};
use forkd_tunnel::identity::{AgentRole, Authority, Credentials, Identity, KeyPair};
use forkd_tunnel::path::PipeHandle;
use forkd_tunnel::relay::Relay;
use forkd_tunnel::relay_client::RelayClient;
use forkd_tunnel::stream;
use forkd_wire::relay::Register;
use forkd_wire::tunnel::{Dial, Open, Outcome, open};
use quinn::{Connection, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};

/// Generous: a condition that does not come about within this is a failure, on any machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub fn credentials(authority: &Authority, identity: &Identity) -> Credentials {
    let key = KeyPair::generate().unwrap();
    let csr = key.request(identity).unwrap();
    Credentials::new(authority.sign(&csr.der, identity, Duration::from_secs(3600)).unwrap(), &key).unwrap()
}

pub fn udp() -> std::net::UdpSocket {
    std::net::UdpSocket::bind("127.0.0.1:0").unwrap()
}

pub fn laptop_identity(id: &str) -> Identity {
    Identity::Laptop { id: id.to_owned(), user: "alice".to_owned(), groups: vec!["dev".to_owned()] }
}

pub fn agent_identity(uid: &str) -> Identity {
    let (namespace, pod) = ("shop".to_owned(), format!("cart-{uid}"));
    Identity::Agent { pod_uid: uid.to_owned(), namespace, pod, role: AgentRole::Pod }
}

pub fn only(laptops: &[&str]) -> Register {
    Register { laptops: laptops.iter().map(|&id| id.to_owned()).collect(), any_laptop: false }
}

pub struct World {
    pub authority: Authority,
    pub relay: Relay,
    pub relay_identity: Identity,
    pub pipes_at: SocketAddr,
}

pub async fn world() -> World {
    // Logs of a failed test are worth having; set once per process.
    let _ = tracing_subscriber::fmt()
        .with_test_writer()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .try_init();
    let authority = Authority::create().unwrap();
    let relay_identity = Identity::Relay { name: "relay-0".to_owned() };
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let pipes_at = tcp.local_addr().unwrap();
    let relay = Relay::start(&credentials(&authority, &relay_identity), udp(), tcp).unwrap();
    World { authority, relay, relay_identity, pipes_at }
}

pub struct Laptop {
    pub endpoint: LaptopEndpoint,
    pub client: RelayClient,
    pub pipe: PipeHandle,
}

impl World {
    pub fn agent(&self, uid: &str, register: Register) -> AgentEndpoint {
        let agent = AgentEndpoint::new(credentials(&self.authority, &agent_identity(uid)), udp()).unwrap();
        agent.register(register);
        agent.set_relays(&[self.relay.udp_addr()]).unwrap();
        agent
    }

    pub async fn pipe(&self) -> TcpStream {
        let pipe = TcpStream::connect(self.pipes_at).await.unwrap();
        pipe.set_nodelay(true).unwrap();
        pipe
    }

    pub async fn laptop(&self, id: &str) -> Laptop {
        let pipe = self.pipe().await;
        self.laptop_over(id, pipe)
    }

    pub fn laptop_over<I: AsyncRead + AsyncWrite + Send + 'static>(&self, id: &str, io: I) -> Laptop {
        let credentials = credentials(&self.authority, &laptop_identity(id));
        let endpoint = LaptopEndpoint::new(credentials, None).unwrap();
        let client = endpoint.relay(&self.relay_identity).unwrap();
        let pipe = endpoint.attach_pipe(&self.relay_identity, io);
        Laptop { endpoint, client, pipe }
    }
}

impl Laptop {
    /// Waits until exactly these agents may be called.
    pub async fn sees(&self, uids: &[&str]) {
        let mut wanted: Vec<Identity> = uids.iter().map(|uid| agent_identity(uid)).collect();
        wanted.sort();
        let mut agents = self.client.agents();
        let seen = agents.wait_for(|agents| {
            let mut agents = agents.clone();
            agents.sort();
            agents == wanted
        });
        tokio::time::timeout(PATIENCE, seen).await.expect("the agents in time").unwrap();
    }

    pub async fn call(&self, uid: &str) -> Connection {
        self.sees(&[uid]).await;
        self.endpoint.connect(&agent_identity(uid)).await.unwrap()
    }
}

pub fn dial(port: u32) -> Open {
    Open { kind: Some(open::Kind::Dial(Dial { ip: vec![127, 0, 0, 1], port })) }
}

/// Serves every connection of an agent: each stream is echoed; port 9 is refused.
pub async fn echo(agent: AgentEndpoint) {
    while let Some((connection, _)) = agent.accept().await {
        tokio::spawn(async move {
            while let Ok((send, recv)) = connection.accept_bi().await {
                tokio::spawn(echo_stream(send, recv));
            }
        });
    }
}

async fn echo_stream(send: SendStream, recv: RecvStream) {
    let Ok((open, accepting)) = stream::accept(send, recv).await else { return };
    if open == dial(9) {
        return accepting.refuse(Outcome::Refused, "port 9 is closed").await.unwrap();
    }
    let Ok((mut send, mut recv)) = accepting.ok().await else { return };
    while let Ok(Some(chunk)) = recv.read_chunk(1 << 16, true).await {
        if send.write_chunk(chunk.bytes).await.is_err() {
            return;
        }
    }
    let _ = send.finish();
}

/// Byte `at` of a stream that never repeats within what a window or a packet holds.
pub fn pattern(at: usize) -> u8 {
    let word = (at as u64 / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word.to_le_bytes()[at % 8] ^ (word >> 60) as u8
}

/// Sends `len` bytes of the pattern, and checks that the same come back, however they are cut.
pub async fn exchange(
    mut send: SendStream,
    mut recv: RecvStream,
    len: usize,
    mut progress: impl FnMut(usize),
) {
    let upload = async move {
        let mut at = 0;
        while at < len {
            let block: Vec<u8> = (at..(at + 65_536).min(len)).map(pattern).collect();
            send.write_all(&block).await.unwrap();
            at += block.len();
        }
        send.finish().unwrap();
    };
    let download = async move {
        let mut at = 0;
        while let Some(chunk) = recv.read_chunk(1 << 16, true).await.unwrap() {
            for (offset, byte) in chunk.bytes.iter().enumerate() {
                assert_eq!(*byte, pattern(at + offset), "byte {}", at + offset);
            }
            at += chunk.bytes.len();
            progress(at);
        }
        assert_eq!(at, len);
    };
    tokio::join!(upload, download);
}

/// Waits for a condition that nothing announces, while `meanwhile` runs (and must not end).
pub async fn until<F: Future>(mut condition: impl FnMut() -> bool, meanwhile: &mut std::pin::Pin<&mut F>) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        waited = tokio::time::timeout(PATIENCE, wait) => waited.expect("the condition in time"),
        _ = meanwhile => panic!("it ended"),
    }
}
