use std::net::Ipv4Addr;
use std::time::SystemTime;

use aws_lc_rs::hmac;
use forkd_tunnel::identity::{Authority, Chain, KeyPair, joining_client_config};
use forkd_tunnel::stream::{MessageReader, write_message};
use forkd_wire::control::{Desired, PortStatus, Renew, Route, from_controller::Kind};
use kube::Client;
use rustls::pki_types::ServerName;
use tokio::io::{ReadHalf, WriteHalf};
use tokio_rustls::TlsConnector;

use super::super::token::Tokens;
use super::super::view::{AgentState, AgentView, PodView, Purpose};
use super::*;

const CONTAINER: &str = "forkd-agent-0a";

/// A controller on the loopback, and a pod of the same address. The API server is never asked: its address leads nowhere.
struct Scene {
    server: Arc<Server>,
    address: SocketAddr,
}

type Tls = tokio_rustls::client::TlsStream<TcpStream>;

struct Party {
    reader: MessageReader<FromController, ReadHalf<Tls>>,
    writer: WriteHalf<Tls>,
}

fn pod() -> PodView {
    PodView {
        namespace: "shop".to_owned(),
        name: "cart-1".to_owned(),
        uid: "uid-1".to_owned(),
        ips: vec![Ipv4Addr::LOCALHOST.into()],
        agents: vec![AgentView {
            name: CONTAINER.to_owned(),
            purpose: Purpose::Pod,
            image: String::new(),
            target_container: "app".to_owned(),
            state: AgentState::Starting,
        }],
        ..PodView::default()
    }
}

async fn scene() -> Scene {
    let nowhere = kube::Config::new("http://127.0.0.1:1".parse().unwrap());
    let client = Client::try_from(nowhere).unwrap();
    let queue = Arc::new(Queue::default());
    let world = Arc::new(World::new(Arc::clone(&queue)));
    world.set("shop", "cart-1", Some(pod()));
    let key = hmac::Key::new(hmac::HMAC_SHA256, &[7; 32]);
    let authority = Authority::create().unwrap();
    let (credentials, _) = crate::controller::own_credentials(&authority).unwrap();
    let server = Arc::new(Server {
        joins: Joins { client: client.clone(), world: Arc::clone(&world), tokens: Tokens::new(key.clone()) },
        access: Access::new(client, Arc::clone(&world)),
        ca: Ca { authority, token_key: key },
        hub: Arc::default(),
        world,
        queue,
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = Arc::clone(&server);
    tokio::spawn(async move { serving.serve(listener, &credentials).await });
    Scene { server, address }
}

impl Scene {
    fn token(&self) -> String {
        self.server.joins.tokens.issue(("shop", "cart-1", "uid-1"), CONTAINER, SystemTime::now()).unwrap()
    }

    async fn connect(&self, config: Arc<rustls::ClientConfig>) -> Party {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let name = ServerName::try_from(Identity::Controller.dns_name()).unwrap();
        let stream = TlsConnector::from(config).connect(name, stream).await.unwrap();
        let (reader, writer) = tokio::io::split(stream);
        Party { reader: MessageReader::new(reader), writer }
    }

    async fn stranger(&self) -> Party {
        let authority = self.server.ca.authority.certificate();
        self.connect(joining_client_config(authority, forkd_wire::ALPN_CONTROL).unwrap()).await
    }

    /// Joins with a token; the certificate or why there is none.
    async fn join(&self, token: &str, key: &KeyPair) -> (Party, Certificate) {
        let mut party = self.stranger().await;
        let proof = Some(join::Proof::JoinToken(token.to_owned()));
        // What it asks to be does not matter.
        let csr = key.request(&Identity::Controller).unwrap().der;
        party.send(to_controller::Kind::Join(Join { proof, csr })).await;
        match party.next().await {
            Some(Kind::Certificate(certificate)) => (party, certificate),
            other => panic!("{other:?}"),
        }
    }

    async fn joined(&self) -> (Party, Credentials, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let (party, certificate) = self.join(&self.token(), &key).await;
        let credentials = Credentials::new(Chain::from_der(certificate.chain), &key).unwrap();
        (party, credentials, key)
    }
}

impl Party {
    async fn send(&mut self, kind: to_controller::Kind) {
        write_message(&mut self.writer, &ToController { kind: Some(kind) }).await.unwrap();
    }

    /// The next message; `None` when the controller has ended the connection.
    async fn next(&mut self) -> Option<Kind> {
        self.reader.next().await.ok().flatten().and_then(|message| message.kind)
    }
}

fn desired() -> Desired {
    let route = Route { target: "t1".to_owned(), port: 8080, ..Route::default() };
    Desired { routes: vec![route], ..Desired::default() }
}

#[tokio::test]
async fn a_token_earns_the_certificate_of_its_pod_and_only_once() {
    let scene = scene().await;
    let (token, key) = (scene.token(), KeyPair::generate().unwrap());
    let (_party, certificate) = scene.join(&token, &key).await;
    assert_eq!(certificate.refused, "");
    let credentials = Credentials::new(Chain::from_der(certificate.chain), &key).unwrap();
    assert_eq!(credentials.identity().uri(), "forkd://agent/uid-1?namespace=shop&pod=cart-1&role=pod");
    let (mut party, again) = scene.join(&token, &key).await;
    assert!(again.chain.is_empty() && again.refused.contains("used before"), "{}", again.refused);
    assert_eq!(party.next().await, None, "the connection is over");
    let (_, forged) = scene.join("00.00", &key).await;
    assert!(forged.refused.contains("no join token"), "{}", forged.refused);
}

#[tokio::test]
async fn an_agent_hears_what_to_do_and_says_what_it_did() {
    let scene = scene().await;
    let (mut party, ..) = scene.joined().await;
    scene.server.hub.push("uid-1", desired());
    let Some(Kind::Desired(told)) = party.next().await else { panic!("nothing to do") };
    assert_eq!(told.routes[0].port, 8080);
    let ports = vec![PortStatus { port: 8080, older_connections: 3, opaque_connections: 0 }];
    let status = Status { generation: told.generation, ports, ..Status::default() };
    party.send(to_controller::Kind::Status(status)).await;
    let report = async {
        loop {
            if let Some(report) = scene.server.hub.report("uid-1", "t1", &[8080]) {
                return report;
            }
            tokio::task::yield_now().await;
        }
    };
    let report = report.await;
    assert!(report.routed);
    assert_eq!(report.older_connections, 3);
    scene.server.hub.retire("uid-1", "over");
    assert!(matches!(party.next().await, Some(Kind::Retire(retire)) if retire.reason == "over"));
}

#[tokio::test]
async fn an_agent_comes_back_with_its_certificate_renews_it_and_replaces_its_old_connection() {
    let scene = scene().await;
    let (mut old, credentials, key) = scene.joined().await;
    scene.server.hub.push("uid-1", desired());
    assert!(matches!(old.next().await, Some(Kind::Desired(_))));
    let mut new = scene.connect(credentials.client_config(forkd_wire::ALPN_CONTROL).unwrap()).await;
    assert!(matches!(new.next().await, Some(Kind::Desired(_))), "it hears at once what still holds");
    assert_eq!(old.next().await, None);
    let csr = key.request(&Identity::Controller).unwrap().der;
    new.send(to_controller::Kind::Renew(Renew { csr })).await;
    let Some(Kind::Certificate(renewed)) = new.next().await else { panic!("no answer") };
    credentials.replace(Chain::from_der(renewed.chain), &key).unwrap();
}

#[tokio::test]
async fn a_certificate_outlives_its_pod_in_vain() {
    let scene = scene().await;
    let (_party, credentials, _) = scene.joined().await;
    scene.server.world.set::<PodView>("shop", "cart-1", None);
    let mut late = scene.connect(credentials.client_config(forkd_wire::ALPN_CONTROL).unwrap()).await;
    assert_eq!(late.next().await, None);
}

#[tokio::test]
async fn a_laptops_certificate_opens_nothing_here() {
    let scene = scene().await;
    let key = KeyPair::generate().unwrap();
    let laptop = Identity::Laptop { id: "l1".to_owned(), user: "alice".to_owned(), groups: Vec::new() };
    let csr = key.request(&laptop).unwrap().der;
    let chain = scene.server.ca.authority.sign(&csr, &laptop, CERTIFICATE_LIFETIME).unwrap();
    let credentials = Credentials::new(chain, &key).unwrap();
    let mut party = scene.connect(credentials.client_config(forkd_wire::ALPN_CONTROL).unwrap()).await;
    assert_eq!(party.next().await, None);
}

#[tokio::test]
async fn who_does_not_begin_with_a_join_is_sent_away() {
    let scene = scene().await;
    let mut party = scene.stranger().await;
    party.send(to_controller::Kind::Status(Status::default())).await;
    assert_eq!(party.next().await, None);
    let mut garbage = scene.stranger().await;
    garbage.writer.write_all(&[0xff; 64]).await.unwrap();
    assert_eq!(garbage.next().await, None);
}

#[tokio::test]
async fn an_address_that_nobody_has_is_told_from_one_that_is_forbidden() {
    let scene = scene().await;
    let (mut party, ..) = scene.joined().await;
    let user = Some(forkd_wire::control::User { name: "alice".to_owned(), groups: Vec::new() });
    let ask = |id, ip: [u8; 4]| {
        let action = Some(forkd_wire::control::authorize::Action::Dial(ip.to_vec()));
        to_controller::Kind::Authorize(Authorize { id, user: user.clone(), action })
    };
    party.send(ask(1, [10, 9, 9, 9])).await;
    let Some(Kind::Authorized(answer)) = party.next().await else { panic!("no answer") };
    assert_eq!((answer.id, answer.verdict()), (1, forkd_wire::control::Verdict::NoSuchAddress));
    // The pod's own address is somebody's; whether it may be dialed only the API server knows, and it is not there.
    party.send(ask(2, [127, 0, 0, 1])).await;
    let Some(Kind::Authorized(answer)) = party.next().await else { panic!("no answer") };
    assert_eq!((answer.id, answer.verdict()), (2, forkd_wire::control::Verdict::Denied));
    assert!(answer.reason.contains("could not be asked"), "{}", answer.reason);
}
