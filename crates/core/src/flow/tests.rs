use std::net::{IpAddr, SocketAddr};

use smoltcp::iface::{Config as InterfaceConfig, Interface};
use smoltcp::phy::{self, Checksum, DeviceCapabilities, Medium};
use smoltcp::wire::{HardwareAddress, IpCidr, IpEndpoint, Ipv4Packet, Ipv6Packet, TcpPacket};

use super::*;

const MTU: u16 = 1500;
const DNS: &str = "10.96.0.10:53";
const V4: (&str, &str) = ("198.19.0.1:40000", "10.96.1.1:80");
const V6: (&str, &str) = ("[fd66::1]:40000", "[fd10::1]:80");

fn pair((src, dst): (&str, &str)) -> Pair {
    Pair { src: src.parse().unwrap(), dst: dst.parse().unwrap() }
}

fn config() -> Config {
    Config { mtu: MTU, ring: 64 * 1024, max_flows: 100, dns: Some(DNS.parse().unwrap()), seed: 1 }
}

/// Frames on their way to the application.
#[derive(Default)]
struct Frames(VecDeque<Vec<u8>>);

impl Sink for Frames {
    fn send(&mut self, frame: &[u8]) {
        self.0.push_back(frame.to_vec());
    }
}

/// The application's kernel: smoltcp on the other side of the TUN.
struct Application {
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    wire: Wire,
}

/// Its device: packets in, frames out that vouch for their checksum as a kernel's do.
#[derive(Default)]
struct Wire {
    rx: VecDeque<Vec<u8>>,
    tx: VecDeque<Vec<u8>>,
}

struct Token<'a>(&'a mut VecDeque<Vec<u8>>);

impl phy::TxToken for Token<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; HEADER + len];
        frame[0] = 1;
        let result = f(&mut frame[HEADER..]);
        self.0.push_back(frame);
        result
    }
}

struct Packet(Vec<u8>);

impl phy::RxToken for Packet {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0[HEADER..])
    }
}

impl phy::Device for Wire {
    type RxToken<'a> = Packet;
    type TxToken<'a> = Token<'a>;

    fn receive(&mut self, _now: smoltcp::time::Instant) -> Option<(Packet, Token<'_>)> {
        Some((Packet(self.rx.pop_front()?), Token(&mut self.tx)))
    }

    fn transmit(&mut self, _now: smoltcp::time::Instant) -> Option<Token<'_>> {
        Some(Token(&mut self.tx))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut caps = DeviceCapabilities::default();
        caps.medium = Medium::Ip;
        caps.max_transmission_unit = MTU.into();
        caps.checksum.tcp = Checksum::None;
        caps
    }
}

impl Application {
    fn connecting(pair: Pair) -> Self {
        let mut wire = Wire::default();
        let mut interface = Interface::new(
            InterfaceConfig::new(HardwareAddress::Ip),
            &mut wire,
            smoltcp::time::Instant::from_micros(0),
        );
        interface.update_ip_addrs(|addresses| {
            // A network that has everything: no routes needed.
            addresses.push(IpCidr::new(pair.src.ip().into(), 0)).unwrap();
        });
        let ring = || SocketBuffer::new(vec![0; 32 * 1024]);
        let mut socket = Socket::new(ring(), ring());
        socket.set_ack_delay(None);
        let local = IpEndpoint::new(pair.src.ip().into(), pair.src.port());
        socket.connect(interface.context(), IpEndpoint::from(pair.dst), local).unwrap();
        let mut sockets = SocketSet::new(vec![]);
        let handle = sockets.add(socket);
        Self { interface, sockets, handle, wire }
    }

    fn socket(&mut self) -> &mut Socket<'static> {
        self.sockets.get_mut(self.handle)
    }
}

/// Both sides of the TUN, and time.
struct Bench {
    flows: Flows,
    begun: Instant,
    now: Instant,
    frames: Frames,
    verdicts: Vec<Verdict>,
    /// Every so many-th frame is lost, in both directions.
    loses: usize,
    passed: usize,
    largest: usize,
    segments: Vec<u16>,
}

impl Bench {
    fn new() -> Self {
        let now = Instant::now();
        Self {
            flows: Flows::new(config(), now),
            begun: now,
            now,
            frames: Frames::default(),
            verdicts: Vec::new(),
            loses: usize::MAX,
            passed: 0,
            largest: 0,
            segments: Vec::new(),
        }
    }

    fn packet(&mut self, frame: &[u8]) -> Verdict {
        self.flows.packet(frame, self.now, &mut self.frames)
    }

    fn lost(&mut self) -> bool {
        self.passed += 1;
        self.passed.is_multiple_of(self.loses)
    }

    /// Passes frames to and fro until nothing moves any more at this moment.
    fn exchange(&mut self, application: &mut Application) {
        loop {
            let at = smoltcp::time::Instant::from_micros((self.now - self.begun).as_micros() as i64);
            application.interface.poll(at, &mut application.wire, &mut application.sockets);
            let mut moved = false;
            while let Some(frame) = application.wire.tx.pop_front() {
                moved = true;
                if !self.lost() {
                    let verdict = self.packet(&frame);
                    self.verdicts.push(verdict);
                }
            }
            while let Some(frame) = self.frames.0.pop_front() {
                moved = true;
                self.largest = self.largest.max(frame.len() - HEADER);
                if frame[1] != 0 {
                    self.segments.push(u16::from_ne_bytes([frame[4], frame[5]]));
                }
                if !self.lost() {
                    application.wire.rx.push_back(frame);
                }
            }
            if !moved {
                return;
            }
        }
    }

    /// Moves time to whichever deadline is next.
    fn wait(&mut self, application: &mut Application) {
        let at = smoltcp::time::Instant::from_micros((self.now - self.begun).as_micros() as i64);
        let theirs = application.interface.poll_at(at, &application.sockets);
        let theirs = theirs.map(|at| self.begun + Duration::from_micros(at.total_micros().max(0) as u64));
        let ours = self.flows.poll_timeout().map(|(at, _)| at);
        let next = [theirs, ours].into_iter().flatten().min().expect("somebody waits for something");
        self.now = next.max(self.now + Duration::from_millis(1));
        self.flows.timeout(self.now, &mut self.frames);
        self.exchange(application);
    }

    fn opened(&mut self) -> (FlowId, Pair) {
        match self.flows.poll_event() {
            Some(Event::Opened(id, pair)) => (id, pair),
            other => panic!("not opened: {other:?}"),
        }
    }

    /// A connection that is up.
    fn connected(&mut self, ends: (&str, &str)) -> (Application, FlowId) {
        let mut application = Application::connecting(pair(ends));
        self.exchange(&mut application);
        let (id, _) = self.opened();
        assert!(self.flows.dialed(id, Outcome::Ok, self.now, &mut self.frames));
        self.exchange(&mut application);
        assert_eq!(application.socket().state(), State::Established);
        (application, id)
    }

    fn flush(&mut self, id: FlowId) {
        self.flows.flush(id, self.now, &mut self.frames);
    }

    fn read(&mut self, id: FlowId, into: &mut Vec<u8>) -> Read<()> {
        self.flows.read(id, |bytes| {
            into.extend_from_slice(bytes);
            (bytes.len(), ())
        })
    }
}

/// The application's SYN.
fn syn(ends: (&str, &str)) -> Vec<u8> {
    let mut application = Application::connecting(pair(ends));
    application.interface.poll(
        smoltcp::time::Instant::from_micros(0),
        &mut application.wire,
        &mut application.sockets,
    );
    application.wire.tx.pop_front().unwrap()
}

fn tcp(frame: &[u8]) -> TcpPacket<&[u8]> {
    let header = if frame[HEADER] >> 4 == 6 { 40 } else { 20 };
    TcpPacket::new_checked(&frame[HEADER + header..]).unwrap()
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 11) as u8).collect()
}

#[test]
fn a_syn_is_answered_only_when_the_dial_is() {
    for ends in [V4, V6] {
        let mut bench = Bench::new();
        let mut application = Application::connecting(pair(ends));
        bench.exchange(&mut application);
        assert_eq!(bench.opened().1, pair(ends));
        assert_eq!(bench.verdicts, [Verdict::Held]);
        // The application's kernel asks again, and again: it is not dialed again, and nothing is said.
        for _ in 0..3 {
            bench.wait(&mut application);
        }
        assert_eq!(bench.flows.counters().dropped(DropReason::SynRepeated), 3);
        assert_eq!((bench.flows.poll_event(), bench.flows.counters().sent), (None, 0));
    }
}

#[test]
fn each_outcome_of_the_dial_is_what_the_application_sees() {
    let icmp = |v4, v6| [Some(v4), Some(v6)];
    for (outcome, expected) in [
        (Outcome::NetworkUnreachable, icmp((3, 0), (1, 0))),
        (Outcome::HostUnreachable, icmp((3, 1), (1, 3))),
        (Outcome::Unavailable, icmp((3, 1), (1, 3))),
        (Outcome::Unsupported, icmp((3, 1), (1, 3))),
        (Outcome::Forbidden, icmp((3, 13), (1, 1))),
        (Outcome::TimedOut, [None, None]),
    ] {
        for (ends, expected) in [V4, V6].into_iter().zip(expected) {
            let mut bench = Bench::new();
            let syn = syn(ends);
            bench.packet(&syn);
            let (id, _) = bench.opened();
            assert!(bench.flows.dialed(id, outcome, bench.now, &mut bench.frames));
            let sent = bench.frames.0.pop_front();
            assert_eq!(sent.is_some(), expected.is_some(), "{outcome:?} {ends:?}");
            if let (Some(frame), Some((kind, code))) = (sent, expected) {
                let ip = if ends == V6 { 40 } else { 20 };
                let icmp = &frame[HEADER + ip..];
                assert_eq!((icmp[0], icmp[1]), (kind, code), "{outcome:?} {ends:?}");
                assert_eq!(icmp[8..], syn[HEADER..], "quotes the SYN");
            }
            assert!(bench.flows.is_empty() && bench.frames.0.is_empty());
            assert!(!bench.flows.dialed(id, Outcome::Ok, bench.now, &mut bench.frames), "gone is gone");
        }
    }
    for ends in [V4, V6] {
        let mut bench = Bench::new();
        let mut application = Application::connecting(pair(ends));
        bench.exchange(&mut application);
        let (id, _) = bench.opened();
        bench.flows.dialed(id, Outcome::Refused, bench.now, &mut bench.frames);
        bench.exchange(&mut application);
        assert_eq!(application.socket().state(), State::Closed, "refused by RST");
        assert!(bench.flows.is_empty());
    }
}

#[test]
fn icmp_and_udp_that_we_make_have_right_checksums() {
    for ends in [V4, V6] {
        let mut bench = Bench::new();
        let mut held = syn(ends);
        bench.packet(&held);
        let (id, _) = bench.opened();
        bench.flows.dialed(id, Outcome::HostUnreachable, bench.now, &mut bench.frames);
        let frame = bench.frames.0.pop_front().unwrap();
        let (src, dst): (IpAddr, IpAddr) = (pair(ends).dst.ip(), pair(ends).src.ip());
        match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(_)) => {
                let ip = Ipv4Packet::new_checked(&frame[HEADER..]).unwrap();
                assert!(ip.verify_checksum() && ip.src_addr() == src);
                assert!(smoltcp::wire::Icmpv4Packet::new_checked(ip.payload()).unwrap().verify_checksum());
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let ip = Ipv6Packet::new_checked(&frame[HEADER..]).unwrap();
                let icmp = smoltcp::wire::Icmpv6Packet::new_checked(ip.payload()).unwrap();
                assert!(icmp.verify_checksum(&src, &dst));
            }
            _ => unreachable!("both ends are of one family"),
        }
        // A UDP answer comes back in through the parser, which verifies what nobody vouches for.
        let mut buffer = vec![0; 2000];
        let length = packet::udp(pair(ends), &pattern(501), &mut buffer).unwrap();
        let (_, parsed) = packet::parse(&buffer[..length]).unwrap();
        let back = Pair { src: pair(ends).dst, dst: pair(ends).src };
        assert_eq!(parsed, Parsed::Udp { pair: back, payload: &pattern(501) });
        buffer[length - 1] ^= 1;
        assert_eq!(packet::parse(&buffer[..length]), Err(DropReason::BadChecksum));
        // The kernel vouches for its own, whose checksum is not finished; nobody for a packet without that flag.
        held[0] = 0;
        assert_eq!(bench.packet(&held), Verdict::Dropped(DropReason::BadChecksum));
    }
}

#[test]
fn bytes_pass_in_both_directions_in_segments_that_the_kernel_cuts() {
    for (ends, mss) in [(V4, MTU - 40), (V6, MTU - 60)] {
        let mut bench = Bench::new();
        let (mut application, id) = bench.connected(ends);
        let data = pattern(400_000);
        let (mut up, mut down) = (Vec::new(), Vec::new());
        let (mut sent_up, mut sent_down) = (0, 0);
        while up.len() < data.len() || down.len() < data.len() {
            sent_up += application.socket().send_slice(&data[sent_up..]).unwrap();
            sent_down += bench.flows.write(id, &data[sent_down..]).unwrap();
            bench.flush(id);
            bench.exchange(&mut application);
            while bench.read(id, &mut up) == Read::Data(()) {}
            let length = down.len();
            down.resize(length + 64 * 1024, 0);
            let got = application.socket().recv_slice(&mut down[length..]).unwrap();
            down.truncate(length + got);
            bench.flush(id);
            bench.exchange(&mut application);
        }
        assert!(up == data && down == data, "{ends:?}");
        assert!(bench.largest > 20_000, "{ends:?}: packets of {} bytes at most", bench.largest);
        assert!(
            !bench.segments.is_empty() && bench.segments.iter().all(|segment| *segment == mss),
            "{ends:?}"
        );
    }
}

#[test]
fn lost_packets_are_sent_again_when_their_time_comes() {
    for ends in [V4, V6] {
        let mut bench = Bench::new();
        let (mut application, id) = bench.connected(ends);
        bench.loses = 7;
        let data = pattern(300_000);
        let (mut up, mut down) = (Vec::new(), Vec::new());
        let (mut sent_up, mut sent_down) = (0, 0);
        let mut turns = 0;
        while up.len() < data.len() || down.len() < data.len() {
            turns += 1;
            assert!(turns < 10_000, "{ends:?}: stuck at {} and {}", up.len(), down.len());
            sent_up += application.socket().send_slice(&data[sent_up..]).unwrap();
            sent_down += bench.flows.write(id, &data[sent_down..]).unwrap();
            while bench.read(id, &mut up) == Read::Data(()) {}
            while application.socket().can_recv() {
                application.socket().recv(|bytes| (bytes.len(), down.extend_from_slice(bytes))).unwrap();
            }
            bench.flush(id);
            bench.exchange(&mut application);
            bench.wait(&mut application);
        }
        assert!(up == data && down == data, "{ends:?}");
    }
}

#[test]
fn an_application_that_does_not_read_holds_the_writer_back() {
    let mut bench = Bench::new();
    let (mut application, id) = bench.connected(V4);
    let data = pattern(1_000_000);
    let mut sent = 0;
    loop {
        let taken = bench.flows.write(id, &data[sent..]).unwrap();
        bench.flush(id);
        bench.exchange(&mut application);
        sent += taken;
        if taken == 0 {
            break;
        }
    }
    assert_eq!(sent, 64 * 1024 + 32 * 1024, "our ring, and the application's");
    while bench.flows.poll_event().is_some() {}
    let read = application.socket().recv(|bytes| (bytes.len(), bytes.len())).unwrap();
    bench.exchange(&mut application);
    assert!(read > 0);
    assert_eq!(bench.flows.poll_event(), Some(Event::Ready(id)), "there is room again");
    assert!(bench.flows.room(id) > 0);
}

#[test]
fn a_reader_is_told_once_when_there_is_something_to_read() {
    let mut bench = Bench::new();
    let (mut application, id) = bench.connected(V4);
    let mut read = Vec::new();
    assert_eq!(bench.read(id, &mut read), Read::Blocked);
    for _ in 0..3 {
        application.socket().send_slice(b"hello").unwrap();
        bench.exchange(&mut application);
    }
    assert_eq!(bench.flows.poll_event(), Some(Event::Ready(id)));
    assert_eq!(bench.flows.poll_event(), None, "nobody waits any more");
    assert_eq!(bench.read(id, &mut read), Read::Data(()));
    assert_eq!(read, b"hellohellohello");
}

#[test]
fn each_side_can_close_first_and_still_be_sent_to() {
    for application_first in [true, false] {
        let mut bench = Bench::new();
        let (mut application, id) = bench.connected(V4);
        let mut read = Vec::new();
        if application_first {
            application.socket().close();
            bench.exchange(&mut application);
            assert_eq!(bench.read(id, &mut read), Read::Eof);
            assert_eq!(bench.flows.write(id, b"late"), Ok(4));
            bench.flows.close(id);
        } else {
            bench.flows.close(id);
            bench.flush(id);
            bench.exchange(&mut application);
            assert!(!application.socket().may_recv());
            application.socket().send_slice(b"late").unwrap();
            application.socket().close();
        }
        bench.flush(id);
        bench.exchange(&mut application);
        if application_first {
            assert_eq!(
                application.socket().recv(|bytes| (bytes.len(), bytes.to_vec())),
                Ok(b"late".to_vec())
            );
        } else {
            assert_eq!(bench.read(id, &mut read), Read::Data(()));
            assert_eq!(read, b"late");
            assert_eq!(bench.read(id, &mut read), Read::Eof);
        }
        bench.exchange(&mut application);
        assert!(!bench.flows.is_reset(id), "an orderly end is no reset");
        bench.flows.release(id, bench.now, &mut bench.frames);
        assert!(bench.flows.is_empty());
    }
}

#[test]
fn what_was_written_before_release_still_arrives() {
    let mut bench = Bench::new();
    let (mut application, id) = bench.connected(V4);
    let data = pattern(60_000);
    assert_eq!(bench.flows.write(id, &data), Ok(data.len()));
    bench.flows.close(id);
    bench.flows.release(id, bench.now, &mut bench.frames);
    let mut received = Vec::new();
    while received.len() < data.len() {
        bench.exchange(&mut application);
        application.socket().recv(|bytes| (bytes.len(), received.extend_from_slice(bytes))).unwrap();
    }
    assert!(received == data);
    bench.exchange(&mut application);
    application.socket().close();
    bench.exchange(&mut application);
    assert!(bench.flows.is_empty());
}

#[test]
fn a_reset_by_either_side_reaches_the_other() {
    let mut bench = Bench::new();
    let (mut application, id) = bench.connected(V4);
    assert_eq!(bench.read(id, &mut Vec::new()), Read::Blocked);
    application.socket().abort();
    bench.exchange(&mut application);
    assert_eq!(bench.flows.poll_event(), Some(Event::Ready(id)));
    assert!(bench.flows.is_reset(id));
    assert_eq!(bench.read(id, &mut Vec::new()), Read::Reset);
    assert_eq!(bench.flows.write(id, b"x"), Err(Gone));
    bench.flows.release(id, bench.now, &mut bench.frames);
    assert!(bench.flows.is_empty());

    let (mut application, id) = bench.connected(V4);
    bench.flows.abort(id);
    bench.flows.release(id, bench.now, &mut bench.frames);
    bench.exchange(&mut application);
    assert_eq!(application.socket().state(), State::Closed);
    assert!(bench.flows.is_empty());
}

#[test]
fn an_application_that_gave_up_while_dialing_is_reset_afterwards() {
    let mut bench = Bench::new();
    let mut application = Application::connecting(pair(V4));
    bench.exchange(&mut application);
    let (id, _) = bench.opened();
    // Its kernel says nothing, and knows nothing of the connection any more: it answers the SYN-ACK by RST.
    application.sockets.remove(application.handle);
    bench.exchange(&mut application);
    assert!(bench.flows.dialed(id, Outcome::Ok, bench.now, &mut bench.frames));
    bench.exchange(&mut application);
    assert!(bench.flows.is_reset(id));
}

#[test]
fn another_connection_on_the_same_ports_is_another_flow() {
    let mut bench = Bench::new();
    let first = syn(V4);
    let mut second = first.clone();
    // Another initial sequence number.
    second[HEADER + 20 + 4] ^= 0x55;
    assert_eq!(bench.packet(&first), Verdict::Held);
    let (old, _) = bench.opened();
    assert_eq!(bench.packet(&first), Verdict::Dropped(DropReason::SynRepeated));
    assert_eq!(bench.packet(&second), Verdict::Held);
    let (new, _) = bench.opened();
    assert_ne!(old, new);
    assert!(!bench.flows.dialed(old, Outcome::Refused, bench.now, &mut bench.frames));
    assert!(bench.frames.0.is_empty(), "an answer to the old one would hit the new one");
    assert!(bench.flows.dialed(new, Outcome::Ok, bench.now, &mut bench.frames));
    let answer = bench.frames.0.pop_front().unwrap();
    assert_eq!(tcp(&answer).ack_number(), tcp(&second).seq_number() + 1);
}

#[test]
fn packets_of_no_flow_are_reset_and_resets_are_not() {
    let mut bench = Bench::new();
    let mut stray = syn(V4);
    stray[HEADER + 20 + 13] = 0x10; // ACK
    assert_eq!(bench.packet(&stray), Verdict::Answered);
    assert!(tcp(&bench.frames.0.pop_front().unwrap()).rst());
    stray[HEADER + 20 + 13] = 0x04; // RST
    assert_eq!(bench.packet(&stray), Verdict::Dropped(DropReason::StrayReset));
    assert!(bench.frames.0.is_empty());
}

#[test]
fn more_flows_than_allowed_wait_for_their_kernels_next_try() {
    let mut bench = Bench::new();
    let from = |port: u16| {
        let mut frame = syn(V4);
        frame[HEADER + 20..HEADER + 22].copy_from_slice(&port.to_be_bytes());
        frame
    };
    for port in 1..=100 {
        assert_eq!(bench.packet(&from(port)), Verdict::Held);
    }
    assert_eq!(bench.packet(&from(101)), Verdict::Dropped(DropReason::TooManyFlows));
    let (id, _) = bench.opened();
    bench.flows.release(id, bench.now, &mut bench.frames);
    assert_eq!(bench.packet(&from(101)), Verdict::Held);
}

#[test]
fn flows_that_end_leave_neither_timers_nor_sockets_behind() {
    let mut bench = Bench::new();
    for _ in 0..1000 {
        let (mut application, id) = bench.connected(V4);
        application.socket().send_slice(b"hello").unwrap();
        bench.exchange(&mut application);
        bench.flows.abort(id);
        bench.flows.release(id, bench.now, &mut bench.frames);
        bench.exchange(&mut application);
        while bench.flows.poll_event().is_some() {}
    }
    assert!(bench.flows.is_empty());
    assert!(bench.flows.timers.len() <= 64, "{} timers", bench.flows.timers.len());
    assert_eq!((bench.flows.slots.len(), bench.flows.spare.len()), (1, 1));
}

#[test]
fn an_application_that_vanished_is_given_up() {
    let mut bench = Bench::new();
    let (_application, id) = bench.connected(V4);
    let gone_by = bench.now + SILENCE + Duration::from_secs(60);
    while bench.now < gone_by {
        let (at, _) = bench.flows.poll_timeout().expect("a keep-alive");
        bench.now = at;
        bench.flows.timeout(at, &mut bench.frames);
        if bench.flows.is_reset(id) {
            return;
        }
    }
    panic!("still there");
}

#[test]
fn dns_questions_are_events_and_their_number_is_bounded() {
    let mut bench = Bench::new();
    let question = |port: u16| {
        let to: SocketAddr = DNS.parse().unwrap();
        let from = SocketAddr::new("198.19.0.1".parse().unwrap(), port);
        let mut frame = vec![0; 600];
        let length = packet::udp(Pair { src: to, dst: from }, b"question", &mut frame).unwrap();
        frame.truncate(length);
        frame
    };
    for port in 1..=QUERIES as u16 {
        assert_eq!(bench.packet(&question(port)), Verdict::Query);
    }
    assert_eq!(bench.packet(&question(9999)), Verdict::Dropped(DropReason::TooManyQueries));
    let Some(Event::Query(asked, message)) = bench.flows.poll_event() else { panic!("no question") };
    assert_eq!((asked.src.port(), message.as_slice()), (1, &b"question"[..]));
    bench.flows.answer(asked, b"answer", &mut bench.frames);
    let frame = bench.frames.0.pop_front().unwrap();
    let back = Pair { src: asked.dst, dst: asked.src };
    assert_eq!(packet::parse(&frame).unwrap().1, Parsed::Udp { pair: back, payload: b"answer" });
    assert_eq!(bench.packet(&question(9999)), Verdict::Query);
    bench.flows.no_answer();

    let mut other = question(5);
    let at = HEADER + 16..HEADER + 20;
    other[at].copy_from_slice(&[10, 96, 0, 11]);
    other[0] = 1;
    assert_eq!(bench.packet(&other), Verdict::Dropped(DropReason::UdpNotYet));
}

#[test]
fn any_bytes_at_all_are_counted_and_never_panic() {
    let mut bench = Bench::new();
    let mut seeds = vec![syn(V4), syn(V6)];
    let (mut application, id) = bench.connected(V4);
    application.socket().send_slice(&pattern(3000)).unwrap();
    let at = smoltcp::time::Instant::from_micros(0);
    application.interface.poll(at, &mut application.wire, &mut application.sockets);
    seeds.extend(application.wire.tx.drain(..));
    let mut state = 0x2545_f491_u32;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as usize % below
    };
    let mut dropped = 0;
    for round in 0..50_000 {
        let mut frame = seeds[random(seeds.len())].clone();
        for _ in 0..=random(6) {
            // Mostly headers: that is where the decisions are.
            let at = random(frame.len().min(HEADER + 80));
            frame[at] = random(256) as u8;
        }
        frame.truncate(random(frame.len() + 1));
        dropped += u32::from(matches!(bench.packet(&frame), Verdict::Dropped(_)));
        bench.now += Duration::from_millis(1);
        bench.flows.timeout(bench.now, &mut bench.frames);
        bench.frames.0.clear();
        while let Some(event) = bench.flows.poll_event() {
            match event {
                Event::Opened(id, _) => {
                    let outcome = if round % 3 == 0 { Outcome::Ok } else { Outcome::HostUnreachable };
                    bench.flows.dialed(id, outcome, bench.now, &mut bench.frames);
                    bench.flows.release(id, bench.now, &mut bench.frames);
                }
                Event::Ready(_) => {}
                Event::Query(..) => bench.flows.no_answer(),
            }
        }
    }
    let counters = bench.flows.counters();
    let sum: u64 = DropReason::ALL.iter().map(|reason| counters.dropped(*reason)).sum();
    assert!(sum >= u64::from(dropped) && dropped > 1000);
    bench.read(id, &mut Vec::new());
}

#[test]
fn the_size_that_an_ipv6_syn_announces_is_raised_and_remembered() {
    let whole = syn(V6);
    let mut packet = whole[HEADER..].to_vec();
    assert_eq!(packet::raise_mss(&mut packet, 65475), Some(1440));
    assert_eq!(packet::raise_mss(&mut packet, 65475), Some(65475));
    for cut in 0..packet.len() {
        // Whatever is missing, it is not read.
        packet::raise_mss(&mut packet[..cut].to_vec(), 1);
    }
    let mut none = packet.clone();
    let header = usize::from(none[52] >> 4) * 4;
    none[60..40 + header].fill(1);
    assert_eq!(packet::raise_mss(&mut none, 65475), None);
    none[60] = 9;
    none[61] = 0;
    assert_eq!(
        packet::raise_mss(&mut none, 65475),
        None,
        "an option of no length ends nothing and loops never"
    );
}
