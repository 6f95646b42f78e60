//! DNS as applications see it, through the C library and by hand.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::process::{Child, Command};
use std::time::Duration;

use forkd_core::flow::DropReason;

use crate::world::{DNS, UPSTREAM, World, at};

pub fn cases() -> Vec<(&'static str, fn())> {
    vec![
        ("cluster_names_resolve_in_any_program", cluster_names_resolve_in_any_program),
        ("other_names_go_to_the_laptops_own_resolver", other_names_go_to_the_laptops_own_resolver),
        ("dns_over_tcp_and_truncation", dns_over_tcp_and_truncation),
        (
            "nonsense_gets_formerr_and_udp_to_others_is_counted",
            nonsense_gets_formerr_and_udp_to_others_is_counted,
        ),
    ]
}

/// Not among the tests, since it needs a file that few machines of CI have: the program systemd-resolved (its path in
/// `SYSTEMD_RESOLVED`, with `SYSTEMD_RESOLVED_POLICY` its D-Bus policy) and dbus-daemon.
pub fn with_resolved() -> Vec<(&'static str, fn())> {
    vec![("resolved_asks_us_for_cluster_names_only", resolved_asks_us_for_cluster_names_only)]
}

/// A query with one question of type A.
fn query(id: u16, name: &str) -> Vec<u8> {
    let mut message = id.to_be_bytes().to_vec();
    message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        message.push(label.len() as u8);
        message.extend(label.as_bytes());
    }
    message.extend([0, 0, 1, 0, 1]);
    message
}

/// The name of the question, and the message up to its end.
fn question(query: &[u8]) -> (String, &[u8]) {
    let (mut at, mut labels) = (12, Vec::new());
    while query[at] != 0 {
        let length = usize::from(query[at]);
        labels.push(String::from_utf8_lossy(&query[at + 1..at + 1 + length]).into_owned());
        at += 1 + length;
    }
    (labels.join(".").to_ascii_lowercase(), &query[..at + 5])
}

/// An answer with `count` A records, or NXDOMAIN without any.
fn answer(query: &[u8], address: [u8; 4], count: u16) -> Vec<u8> {
    let mut message = question(query).1.to_vec();
    message[2] = 0x85;
    message[3] = if count == 0 { 0x83 } else { 0x80 };
    message[6..8].copy_from_slice(&count.to_be_bytes());
    message[8..12].fill(0);
    // Questions for AAAA get no records: type is the third-last byte pair.
    if message[message.len() - 3] != 1 {
        message[3] = 0x80;
        message[6..8].fill(0);
        return message;
    }
    for _ in 0..count {
        message.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4]);
        message.extend(address);
    }
    message
}

/// The cluster's DNS.
pub fn cluster_dns(query: &[u8]) -> Vec<u8> {
    match question(query).0.as_str() {
        "cart.shop.svc.cluster.local" => answer(query, [10, 96, 1, 1], 1),
        "many.shop.svc.cluster.local" => answer(query, [10, 96, 1, 2], 60),
        _ => answer(query, [0; 4], 0),
    }
}

/// The laptop's own resolver: over UDP it truncates `big.example`.
fn upstream() {
    let reply = |query: &[u8]| match question(query).0.as_str() {
        "host.example" => answer(query, [192, 0, 2, 1], 1),
        "big.example" => answer(query, [192, 0, 2, 2], 60),
        _ => answer(query, [0; 4], 0),
    };
    let socket = UdpSocket::bind(at(UPSTREAM, 53)).expect("bind");
    std::thread::spawn(move || {
        let mut buffer = [0; 1500];
        loop {
            let (length, from) = socket.recv_from(&mut buffer).expect("receive");
            let mut message = reply(&buffer[..length]);
            if message.len() > 512 {
                message = answer(&buffer[..length], [0; 4], 0);
                message[2] |= 2;
            }
            socket.send_to(&message, from).expect("send");
        }
    });
    let listener = TcpListener::bind(at(UPSTREAM, 53)).expect("listen");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("accept");
            let query = read_message(&mut stream);
            write_message(&mut stream, &reply(&query));
        }
    });
}

fn read_message(stream: &mut TcpStream) -> Vec<u8> {
    let mut length = [0; 2];
    stream.read_exact(&mut length).expect("read a length");
    let mut message = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut message).expect("read a message");
    message
}

fn write_message(stream: &mut TcpStream, message: &[u8]) {
    stream.write_all(&(message.len() as u16).to_be_bytes()).expect("write");
    stream.write_all(message).expect("write");
}

fn ask(message: &[u8]) -> Vec<u8> {
    let socket = UdpSocket::bind("0.0.0.0:0").expect("bind");
    socket.connect(at(DNS, 53)).expect("connect");
    socket.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
    socket.send(message).expect("send");
    let mut buffer = vec![0; 65535];
    let length = socket.recv(&mut buffer).expect("an answer");
    buffer.truncate(length);
    buffer
}

fn records(answer: &[u8]) -> u16 {
    u16::from_be_bytes([answer[6], answer[7]])
}

fn cluster_names_resolve_in_any_program() {
    let _world = World::connect(|| {
        let listener = TcpListener::bind(at("10.96.1.1", 80)).expect("listen");
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("accept");
            stream.write_all(b"cart").expect("write");
        });
    });
    // The C library reads resolv.conf: short names by the search list, long ones as they are.
    for name in
        ["cart", "cart.shop", "cart.shop.svc", "cart.shop.svc.cluster.local", "CART.shop.svc.cluster.local."]
    {
        let found: Vec<_> =
            (name, 80).to_socket_addrs().unwrap_or_else(|error| panic!("{name}: {error}")).collect();
        assert_eq!(found, [at("10.96.1.1", 80)], "{name}");
    }
    assert!(("nobody.shop.svc.cluster.local", 80).to_socket_addrs().is_err());
    let mut text = String::new();
    TcpStream::connect(("cart", 80)).expect("connect by name").read_to_string(&mut text).expect("read");
    assert_eq!(text, "cart");
}

fn other_names_go_to_the_laptops_own_resolver() {
    let _world = World::connect(upstream);
    let found: Vec<_> = ("host.example", 80).to_socket_addrs().expect("resolve").collect();
    assert_eq!(found, [at("192.0.2.1", 80)]);
    // Truncated over UDP upstream, so asked again over TCP there, and from us too.
    let found: Vec<_> = ("big.example", 80).to_socket_addrs().expect("resolve").collect();
    assert_eq!(found.len(), 60);
}

fn dns_over_tcp_and_truncation() {
    let _world = World::connect(|| {});
    let cut = ask(&query(7, "many.shop.svc.cluster.local"));
    assert_eq!(cut[..2], [0, 7]);
    assert!(cut[2] & 2 != 0 && records(&cut) == 0, "60 records do not fit into 512 bytes");

    let mut with_edns = query(8, "many.shop.svc.cluster.local");
    with_edns[11] = 1;
    with_edns.extend([0, 0, 41, 0x10, 0, 0, 0, 0, 0, 0, 0]);
    let whole = ask(&with_edns);
    assert!(whole[2] & 2 == 0 && records(&whole) == 60, "4096 bytes are enough");

    let mut stream = TcpStream::connect(at(DNS, 53)).expect("connect");
    for id in 1..=3 {
        write_message(&mut stream, &query(id, "many.shop.svc.cluster.local"));
        let message = read_message(&mut stream);
        assert_eq!(message[..2], id.to_be_bytes());
        assert_eq!(records(&message), 60);
    }
}

fn nonsense_gets_formerr_and_udp_to_others_is_counted() {
    let world = World::connect(|| {});
    let mut nonsense = query(9, "x.cluster.local");
    nonsense.truncate(20);
    let answer = ask(&nonsense);
    assert_eq!((answer[..2].to_vec(), answer[3] & 0xf), (vec![0, 9], 1), "FORMERR");

    let reason = DropReason::UdpNotYet;
    let before = world.look().counters.dropped(reason);
    let socket = UdpSocket::bind("0.0.0.0:0").expect("bind");
    socket.send_to(b"x", at("10.96.1.1", 9)).expect("send");
    crate::world::wait_for("a counted packet", || world.look().counters.dropped(reason) > before);
}

fn resolved_asks_us_for_cluster_names_only() {
    let variable = |name| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
    let link = std::path::Path::new("/run/systemd/resolve/stub-resolv.conf");
    std::fs::remove_file("/etc/resolv.conf").expect("remove");
    std::os::unix::fs::symlink(link, "/etc/resolv.conf").expect("link");
    let mut passwd = std::fs::read_to_string("/etc/passwd").expect("read");
    passwd.push_str("systemd-resolve:x:996:996::/:/usr/sbin/nologin\n");
    std::fs::write("/etc/passwd", passwd).expect("write");
    let mut group = std::fs::read_to_string("/etc/group").expect("read");
    group.push_str("systemd-resolve:x:996:\n");
    std::fs::write("/etc/group", group).expect("write");
    for folder in ["/etc/dbus-1/system.d", "/run/dbus", "/run/systemd/resolve"] {
        std::fs::create_dir_all(folder).expect("make a folder");
    }
    std::os::unix::fs::chown("/run/systemd/resolve", Some(996), Some(996)).expect("chown");
    let policy = "/etc/dbus-1/system.d/org.freedesktop.resolve1.conf";
    std::fs::copy(variable("SYSTEMD_RESOLVED_POLICY"), policy).expect("copy the policy");
    let _bus = Service(
        Command::new("dbus-daemon")
            .args(["--system", "--nofork", "--nopidfile"])
            .spawn()
            .expect("dbus-daemon"),
    );
    crate::world::wait_for("a bus", || std::path::Path::new("/run/dbus/system_bus_socket").exists());
    let _resolved = Service(Command::new(variable("SYSTEMD_RESOLVED")).spawn().expect("systemd-resolved"));
    crate::world::wait_for("systemd-resolved's stub", || {
        link.exists() && UdpSocket::bind("127.0.0.53:53").is_err()
    });
    let lookup = |name| (name, 80).to_socket_addrs().map(Iterator::collect::<Vec<_>>);
    {
        let world = World::connect(|| {});
        assert_eq!(std::fs::read_link("/etc/resolv.conf").expect("a link"), link, "not ours to change");
        // The link's search list reaches the C library by resolved's file, in resolved's time.
        crate::world::wait_for("the search list", || {
            std::fs::read_to_string(link).expect("read").contains("search shop.svc.cluster.local")
        });
        for name in ["cart", "cart.shop.svc", "cart.shop.svc.cluster.local"] {
            let found = lookup(name).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(found, [at("10.96.1.1", 80)], "{name}");
        }
        // Its multicasts (LLMNR) come by as well, and are dropped.
        let taken = || {
            let counters = world.look().counters;
            counters.received - DropReason::ALL.iter().map(|reason| counters.dropped(*reason)).sum::<u64>()
        };
        let asked = taken();
        assert!(asked > 0);
        // With its last dot, the search list does not make a cluster name of it.
        assert!(lookup("host.example.").is_err(), "there is no other resolver in this world");
        assert_eq!(taken(), asked, "and it was not asked of us");
    }
    assert!(lookup("cart.shop.svc.cluster.local").is_err());
}

/// A program that ends with its case.
struct Service(Child);

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
