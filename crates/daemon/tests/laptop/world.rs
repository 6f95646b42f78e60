//! Namespaces, a daemon with plain TCP in the place of QUIC, and servers.

use std::cell::Cell;
use std::fs::File;
use std::future::Future;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;
use std::rc::Rc;
use std::sync::mpsc;
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};
use forkd_core::dns::Zones;
use forkd_daemon::helper::protocol::{DnsInfo, TunInfo};
use forkd_daemon::helper::{HelperClient, HelperError, spawn_helper};
use forkd_daemon::net::stream::{Dialer, End, RecvHalf, Refused, SendHalf, Stream};
use forkd_daemon::net::{LaptopNet, NetConfig};
use forkd_wire::tunnel::{Outcome, Reset};
use futures::future::LocalBoxFuture;
use ipnet::IpNet;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

pub const DNS: &str = "10.96.0.10";
/// A Service that servers listen on; any address of the range is local in the cluster's namespace.
pub const SERVICE: &str = "10.96.1.1";
pub const SERVICE_V6: &str = "fd10::1";
/// Answers ENETUNREACH, EHOSTUNREACH: the kernel of the cluster's namespace says so.
pub const NOWHERE: &str = "10.97.0.1";
pub const NOBODY: &str = "10.96.9.9";
/// Answers as RBAC would.
pub const FORBIDDEN: &str = "10.96.8.8";
pub const FORBIDDEN_V6: &str = "fd10::8888";
/// The resolver that the laptop had before.
pub const UPSTREAM: &str = "192.0.2.53";
pub const RESOLV_CONF: &str =
    "# as it was\nsearch old.example\nnameserver 192.0.2.53\noptions timeout:1 attempts:2\n";

/// The current thread's process gets namespaces of its own: "laptop".
pub fn enter() {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).expect("new namespaces (needs root)");
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private mounts");
    // An /etc of our own: just what a C library reads.
    let kept: Vec<_> = ["/etc/passwd", "/etc/group", "/etc/hosts", "/etc/nsswitch.conf", "/etc/ld.so.cache"]
        .into_iter()
        .filter_map(|path| Some((path, std::fs::read(path).ok()?)))
        .collect();
    for folder in ["/etc", "/run"] {
        mount(Some("tmpfs"), folder, Some("tmpfs"), MsFlags::empty(), none).expect("mount tmpfs");
    }
    for (path, content) in kept {
        std::fs::write(path, content).expect("fill /etc");
    }
    std::fs::write("/etc/resolv.conf", RESOLV_CONF).expect("write resolv.conf");
    ip("link set lo up");
}

pub fn ip(arguments: &str) {
    let output =
        Command::new("ip").args(arguments.split(' ')).output().expect("run ip(8), of package iproute2");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// What `ip` prints.
pub fn ip_says(arguments: &str) -> String {
    let output =
        Command::new("ip").args(arguments.split(' ')).output().expect("run ip(8), of package iproute2");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Waits until `met`, and fails naming `what` if that takes too long.
pub fn wait_for(what: &str, mut met: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !met() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what} did not come to be");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Where helpers log: with the test.
pub fn log() -> File {
    std::io::stderr().as_fd().try_clone_to_owned().expect("stderr").into()
}

/// A helper in this thread's namespace.
pub fn helper() -> OwnedFd {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(spawn_helper(log())).unwrap_or_else(|failure| panic!("{failure:?}"))
}

pub fn ranges() -> Vec<IpNet> {
    ["10.96.0.0/16", "10.97.0.0/16", "fd10::/64"]
        .iter()
        .map(|range| range.parse().expect("a range"))
        .collect()
}

pub fn search() -> Vec<String> {
    ["shop.svc.cluster.local", "svc.cluster.local", "cluster.local"].map(str::to_owned).to_vec()
}

/// TUN, routes and resolver as a session sets them.
pub async fn set_up(client: &HelperClient) -> Result<(TunInfo, OwnedFd, DnsInfo), HelperError> {
    let (info, tun) = client.create_tun(1500).await?;
    client.set_routes(ranges(), vec![], vec![]).await?;
    let dns = client.set_dns(DNS.parse().expect("an address"), "cluster.local".to_owned(), search()).await?;
    Ok((info, tun, dns))
}

/// A connected laptop; the daemon's thread ends when this is dropped.
pub struct World {
    stop: Option<oneshot::Sender<()>>,
    ask: mpsc::Sender<mpsc::Sender<Seen>>,
    thread: Option<JoinHandle<()>>,
    /// /etc/resolv.conf before.
    resolv_conf: String,
}

/// What the daemon sees.
pub struct Seen {
    pub flows: usize,
    pub counters: forkd_core::flow::Counters,
}

impl World {
    /// Runs `servers` in the cluster's namespace, then connects.
    pub fn connect(servers: impl FnOnce() + Send + 'static) -> Self {
        let resolv_conf = std::fs::read_to_string("/etc/resolv.conf").expect("read");
        let helper = helper();
        let (ready, is_ready) = mpsc::channel();
        let (stop, stopped) = oneshot::channel();
        let (ask, asked) = mpsc::channel::<mpsc::Sender<Seen>>();
        let thread = std::thread::spawn(move || {
            cluster();
            servers();
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
            tokio::task::LocalSet::new().block_on(&runtime, async move {
                let client = HelperClient::new(helper).expect("helper's socket");
                let (info, tun, dns) = set_up(&client).await.unwrap_or_else(|error| panic!("{error:?}"));
                let config = NetConfig {
                    mtu: info.mtu,
                    dns: DNS.parse().expect("an address"),
                    zones: Zones::new("cluster.local", ranges()).expect("a domain"),
                    upstream: dns.upstream,
                    max_flows: 4096,
                };
                let net = LaptopNet::start(tun, config, Rc::new(Plain)).expect("start the data plane");
                ready.send(()).expect("the test waits");
                let mut stopped = stopped;
                loop {
                    tokio::select! {
                        _ = &mut stopped => break,
                        () = tokio::time::sleep(Duration::from_millis(5)) => {
                            while let Ok(reply) = asked.try_recv() {
                                let seen = Seen { flows: net.flows().len(), counters: net.counters() };
                                reply.send(seen).expect("the test waits");
                            }
                        }
                    }
                }
                drop(net);
                client.undo().await.unwrap_or_else(|error| panic!("{error:?}"));
            });
        });
        is_ready.recv().expect("the daemon's thread is up");
        Self { stop: Some(stop), ask, thread: Some(thread), resolv_conf }
    }

    pub fn look(&self) -> Seen {
        let (reply, replied) = mpsc::channel();
        self.ask.send(reply).expect("the daemon lives");
        replied.recv().expect("the daemon answers")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take()
            && let Err(panic) = thread.join()
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
        if !std::thread::panicking() {
            assert!(!ip_says("link").contains("forkd"), "the TUN is gone");
            // systemd-resolved rewrites its own in its own time.
            wait_for("the resolver's file as before", || {
                std::fs::read_to_string("/etc/resolv.conf").expect("read") == self.resolv_conf
            });
        }
    }
}

/// This thread moves into a namespace in which every address of the cluster is a local one.
fn cluster() {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
    for step in [
        "link set lo up",
        "route add local 10.96.0.0/16 dev lo",
        "route add unreachable 10.96.9.9/32",
        "addr add 192.0.2.53/32 dev lo",
        "-6 route add local fd10::/64 dev lo",
        // IPv6 binds to addresses only, not to ranges.
        "-6 addr add fd10::1/128 dev lo nodad",
    ] {
        ip(step);
    }
}

/// Streams that are plain TCP connections in the cluster's namespace.
struct Plain;

impl Dialer for Plain {
    fn dial(&self, dst: SocketAddr) -> LocalBoxFuture<'_, Result<Stream, Refused>> {
        Box::pin(async move {
            if [FORBIDDEN, FORBIDDEN_V6].iter().any(|ip| ip.parse() == Ok(dst.ip())) {
                return Err(Refused { outcome: Outcome::Forbidden, reason: "RBAC".to_owned() });
            }
            let stream = TcpStream::connect(dst).await.map_err(|error| {
                let outcome = match error.kind() {
                    ErrorKind::ConnectionRefused => Outcome::Refused,
                    ErrorKind::NetworkUnreachable => Outcome::NetworkUnreachable,
                    ErrorKind::HostUnreachable => Outcome::HostUnreachable,
                    _ => Outcome::Unavailable,
                };
                Refused { outcome, reason: error.to_string() }
            })?;
            stream.set_nodelay(true).expect("nodelay");
            let half = Half { stream: Rc::new(stream), gave_up: Rc::default() };
            let other = Half { stream: half.stream.clone(), gave_up: half.gave_up.clone() };
            Ok(Stream { send: Box::new(other), recv: Box::new(half) })
        })
    }

    fn dns(&self, query: Bytes) -> LocalBoxFuture<'_, anyhow::Result<Bytes>> {
        Box::pin(async move { Ok(super::names::cluster_dns(&query).into()) })
    }
}

struct Half {
    stream: Rc<TcpStream>,
    /// RST was ordered.
    gave_up: Rc<Cell<bool>>,
}

impl Half {
    fn give_up(&self) {
        // An RST at close, as the agent would send one.
        if !self.gave_up.replace(true) {
            let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
            nix::sys::socket::setsockopt(&self.stream.as_fd(), nix::sys::socket::sockopt::Linger, &linger)
                .expect("linger");
        }
    }
}

fn end(error: &io::Error) -> End {
    match error.kind() {
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => End::Reset(Reset::ConnectionReset as u64),
        _ => End::Lost,
    }
}

impl SendHalf for Half {
    fn poll_write(&mut self, cx: &mut Context<'_>, data: &[u8]) -> Poll<Result<usize, End>> {
        loop {
            match self.stream.poll_write_ready(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(end(&error))),
                Poll::Ready(Ok(())) => match self.stream.try_write(data) {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    result => return Poll::Ready(result.map_err(|error| end(&error))),
                },
            }
        }
    }

    fn poll_finish(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        let shut = nix::sys::socket::shutdown(self.stream.as_raw_fd(), nix::sys::socket::Shutdown::Write);
        Poll::Ready(shut.map_err(|errno| end(&errno.into())))
    }

    fn poll_stopped(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let mut ready = Box::pin(self.stream.ready(tokio::io::Interest::ERROR));
        ready.as_mut().poll(cx).map(|_| End::Reset(Reset::ConnectionReset as u64))
    }

    fn reset(&mut self, _code: Reset) {
        self.give_up();
    }
}

impl RecvHalf for Half {
    fn poll_chunk(&mut self, cx: &mut Context<'_>, max: usize) -> Poll<Result<Option<Bytes>, End>> {
        loop {
            match self.stream.poll_read_ready(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(end(&error))),
                Poll::Ready(Ok(())) => {
                    // Filled only once there is something: an idle connection costs no buffer.
                    let mut chunk = BytesMut::with_capacity(max);
                    match self.stream.try_read_buf(&mut (&mut chunk).limit(max)) {
                        Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                        Ok(0) => return Poll::Ready(Ok(None)),
                        Ok(_) => return Poll::Ready(Ok(Some(chunk.freeze()))),
                        Err(error) => return Poll::Ready(Err(end(&error))),
                    }
                }
            }
        }
    }

    fn stop(&mut self, _code: Reset) {
        self.give_up();
    }
}

/// An address of the cluster.
pub fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse::<IpAddr>().expect("an address"), port)
}
