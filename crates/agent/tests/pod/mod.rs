//! A pod and its outside, as two network namespaces joined by a veth pair: real rules, real sockets. Needs root, and
//! the `ip` command.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use bytes::BytesMut;
use forkd_agent::nft::Redirect;
use forkd_agent::proxy::{Counters, Deliver, DeliverError, Proxy, Routes};
use forkd_core::http1::{self, Body, Framing, HeadEnd};
use forkd_wire::control::Route;
use nix::sched::{CloneFlags, unshare};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

pub const POD: &str = "10.9.0.2";
pub const POD6: &str = "fd09::2";
pub const PORT: u16 = 8080;
/// Longer than anything here takes: a test that waits for it has failed.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Where callers live.
#[derive(Clone)]
pub struct Outside(mpsc::Sender<(SocketAddr, tokio::sync::oneshot::Sender<io::Result<std::net::TcpStream>>)>);

impl Outside {
    pub async fn try_connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let (reply, answer) = tokio::sync::oneshot::channel();
        self.0.send((to, reply)).unwrap();
        let stream = answer.await.unwrap()?;
        stream.set_nonblocking(true)?;
        TcpStream::from_std(stream)
    }

    pub async fn connect(&self) -> TcpStream {
        self.try_connect(format!("{POD}:{PORT}").parse().unwrap()).await.unwrap()
    }
}

/// Runs a command in the namespace of the calling thread.
pub fn run(line: &str) -> String {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().unwrap())
        .args(words)
        .output()
        .unwrap_or_else(|error| panic!("{line}: {error} (these tests need iproute2 and nftables)"));
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn namespace() -> String {
    unshare(CloneFlags::CLONE_NEWNET)
        .unwrap_or_else(|error| panic!("cannot make a network namespace: {error} (these tests need root)"));
    run("ip link set lo up");
    format!("/proc/{}/task/{}/ns/net", std::process::id(), nix::unistd::gettid())
}

/// Runs `test` inside a pod of its own.
pub fn in_pod<F: Future<Output = ()>>(test: impl FnOnce(Outside) -> F + Send + 'static) {
    // `RUST_LOG=forkd_agent=debug` shows what the agent does. A second test of the same run finds it set.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_test_writer()
        .try_init();
    let (send, requests) = mpsc::channel::<(SocketAddr, tokio::sync::oneshot::Sender<_>)>();
    let (name, outside_name) = mpsc::channel();
    let (up, wait_up) = mpsc::channel::<()>();
    let (outside_up, wait_outside_up) = mpsc::channel::<()>();
    let outside = std::thread::spawn(move || {
        name.send(namespace()).unwrap();
        wait_up.recv().unwrap();
        run("ip addr add 10.9.0.1/24 dev veth0");
        run("ip -6 addr add fd09::1/64 dev veth0 nodad");
        run("ip link set veth0 up");
        outside_up.send(()).unwrap();
        while let Ok((to, reply)) = requests.recv() {
            let _ = reply.send(std::net::TcpStream::connect_timeout(&to, PATIENCE));
        }
    });
    let pod = std::thread::spawn(move || {
        namespace();
        let peer = outside_name.recv().unwrap();
        run(&format!("ip link add eth0 type veth peer name veth0 netns {peer}"));
        run("ip addr add 10.9.0.2/24 dev eth0");
        run("ip -6 addr add fd09::2/64 dev eth0 nodad");
        run("ip link set eth0 up");
        up.send(()).unwrap();
        wait_outside_up.recv().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let local = tokio::task::LocalSet::new();
            local
                .run_until(async {
                    tokio::time::timeout(PATIENCE * 3, test(Outside(send))).await.expect("the test hangs");
                })
                .await;
        });
    });
    let result = pod.join();
    outside.join().unwrap();
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

/// Laptops by target: the address of their process, or nothing while they are away.
#[derive(Clone, Default)]
pub struct Laptops(Arc<Mutex<HashMap<String, SocketAddr>>>);

impl Laptops {
    pub fn set(&self, target: &str, process: SocketAddr) {
        self.0.lock().unwrap().insert(target.to_owned(), process);
    }

    pub fn remove(&self, target: &str) {
        self.0.lock().unwrap().remove(target);
    }
}

impl Deliver for Laptops {
    type Stream = TcpStream;

    async fn deliver(&self, route: &Route, _caller: SocketAddr) -> Result<TcpStream, DeliverError> {
        let to = self.0.lock().unwrap().get(&route.target).copied().ok_or(DeliverError::LaptopGone)?;
        TcpStream::connect(to)
            .await
            .map_err(|error| DeliverError::NotListening(format!("127.0.0.1:{}: {error}", to.port())))
    }
}

pub fn route(fork: &str) -> Route {
    Route {
        target: format!("uid-{fork}"),
        fork: fork.to_owned(),
        service: "shop/cart".to_owned(),
        laptop: format!("{fork}-mbp"),
        owner: fork.to_owned(),
        port: PORT.into(),
        ..Route::default()
    }
}

pub fn all(fork: &str) -> Route {
    Route { all: true, ..route(fork) }
}

/// An agent at work.
pub struct Agent {
    pub routes: Routes,
    pub laptops: Laptops,
    pub redirect: Redirect,
    pub counters: Counters,
    pub port: u16,
    pub stop: Option<tokio::sync::oneshot::Sender<()>>,
    pub run: tokio::task::JoinHandle<usize>,
}

pub async fn agent(routes: impl IntoIterator<Item = Route>) -> Agent {
    let (table, laptops) = (Routes::default(), Laptops::default());
    table.replace(routes);
    let proxy = Proxy::bind(table.clone(), laptops.clone()).await.unwrap();
    let (port, counters) = (proxy.port(), proxy.counters());
    let mut redirect = Redirect::new(port).unwrap();
    redirect.apply(&[PORT].into()).unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let run = tokio::spawn(proxy.run(async { stopped.await.unwrap_or_default() }, PATIENCE));
    Agent { routes: table, laptops, redirect, counters, port, stop: Some(stop), run }
}

pub async fn listen(port: u16) -> TcpListener {
    TcpListener::bind(format!("[::]:{port}")).await.unwrap()
}

/// What a server has seen: the raw bytes of its requests, head and body, in order.
pub type Seen = Arc<Mutex<Vec<Vec<u8>>>>;

/// An HTTP/1.1 server that answers every request with its own name as the body, on kept-alive connections.
pub fn http_server(listener: TcpListener, name: &'static str) -> Seen {
    let seen = Seen::default();
    let all = seen.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let seen = all.clone();
            tokio::spawn(async move {
                let mut buffer = BytesMut::new();
                while let Some(request) = read_request(&mut stream, &mut buffer).await {
                    seen.lock().unwrap().push(request);
                    let head = format!(
                        "HTTP/1.1 200 OK\r\nX-Odd:  {name} \r\ncontent-LENGTH: {}\r\n\r\n",
                        name.len()
                    );
                    if stream.write_all(&[head.as_bytes(), name.as_bytes()].concat()).await.is_err() {
                        break;
                    }
                }
            });
        }
    });
    seen
}

/// A laptop whose process answers with `name`.
pub async fn laptop(agent: &Agent, fork: &str, name: &'static str) -> Seen {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    agent.laptops.set(&format!("uid-{fork}"), listener.local_addr().unwrap());
    http_server(listener, name)
}

/// One raw request; `None` when the connection ends before it.
pub async fn read_request<R: AsyncReadExt + Unpin>(stream: &mut R, buffer: &mut BytesMut) -> Option<Vec<u8>> {
    let mut end = HeadEnd::default();
    let len = loop {
        if let Some(len) = end.find(buffer).unwrap() {
            break len;
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    };
    let framing = http1::request(&buffer[..len]).unwrap().framing;
    read_body(stream, buffer, len, framing).await
}

/// One raw response.
pub async fn read_response<R: AsyncReadExt + Unpin>(stream: &mut R, buffer: &mut BytesMut) -> Vec<u8> {
    let mut end = HeadEnd::default();
    let len = loop {
        if let Some(len) = end.find(buffer).unwrap() {
            break len;
        }
        let n = stream.read_buf(buffer).await.expect("a response");
        assert_ne!(n, 0, "ended within a response's head: {:?}", String::from_utf8_lossy(buffer));
    };
    let framing = http1::response(&buffer[..len], http1::Method::Other).unwrap().framing;
    let framing = if framing == Framing::Tunnel { Framing::Length(0) } else { framing };
    read_body(stream, buffer, len, framing).await.expect("a whole response")
}

async fn read_body<R: AsyncReadExt + Unpin>(
    stream: &mut R,
    buffer: &mut BytesMut,
    len: usize,
    framing: Framing,
) -> Option<Vec<u8>> {
    let mut whole = buffer.split_to(len).to_vec();
    let mut body = Body::new(framing);
    loop {
        let part = body.advance(buffer).unwrap();
        whole.extend_from_slice(&buffer.split_to(part));
        if body.is_done() {
            return Some(whole);
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return body.may_end_here().then_some(whole);
        }
    }
}

/// Sends raw bytes and reads one response, as text.
pub async fn ask(stream: &mut TcpStream, request: &str) -> String {
    stream.write_all(request.as_bytes()).await.unwrap();
    let response = read_response(stream, &mut BytesMut::new()).await;
    String::from_utf8(response).unwrap()
}

/// Polls until `condition` holds.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Waits until nobody listens on this port of the pod.
pub async fn until_refused(outside: &Outside, port: u16) {
    let to = format!("{POD}:{port}").parse().unwrap();
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while outside.try_connect(to).await.is_ok() {
        assert!(tokio::time::Instant::now() < deadline, "{to} still accepts");
    }
}
