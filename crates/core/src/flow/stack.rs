//! smoltcp's two interfaces, and the one buffer that packets for the TUN are made in.

use smoltcp::iface::{Config, Interface, PollResult, SocketSet};
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr, Ipv4Address, Ipv6Address};

use super::Pair;
use super::device::{Device, Sink};
use super::packet::{self, FRAME_MAX, HEADER, Unreachable};

/// IPv6 and TCP headers without options, bytes.
const HEADERS_V6: u16 = 60;
/// What smoltcp believes of the IPv6 path: see [`Stack::open_syn`].
const MTU_V6: u16 = (FRAME_MAX - HEADER) as u16;

/// Turns of smoltcp for one socket set at a time.
pub(super) struct Stack {
    mtu: u16,
    v4: Interface,
    v6: Interface,
    frame: Box<[u8]>,
    /// Packets sent.
    pub sent: u64,
}

/// What a flow's packets need of the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Route {
    pub v6: bool,
    /// Bytes of payload that fit into one packet, where smoltcp does not know.
    pub split: Option<u16>,
}

impl Stack {
    pub fn new(mtu: u16, seed: u64) -> Self {
        let mut frame = vec![0; FRAME_MAX].into_boxed_slice();
        let mut interface = |mtu: u16, address: IpAddress| {
            let mut config = Config::new(HardwareAddress::Ip);
            config.random_seed = seed;
            let sink = &mut Nowhere;
            let mut device =
                Device { rx: None, frame: &mut frame, sink, mtu: mtu.into(), split: None, sent: &mut 0 };
            let mut interface = Interface::new(config, &mut device, Instant::from_micros(0));
            // AnyIP takes packets to any address that is routed to one of the interface's own: everything is. The
            // address appears in no packet.
            interface.set_any_ip(true);
            interface.update_ip_addrs(|addresses| {
                let length = if matches!(address, IpAddress::Ipv4(_)) { 32 } else { 128 };
                // The first of two that the list can hold; the same goes for the route.
                let _ = addresses.push(IpCidr::new(address, length));
            });
            let _ = match address {
                IpAddress::Ipv4(ip) => interface.routes_mut().add_default_ipv4_route(ip).map(drop),
                IpAddress::Ipv6(ip) => interface.routes_mut().add_default_ipv6_route(ip).map(drop),
            };
            interface
        };
        let v4 = interface(mtu, Ipv4Address::new(192, 0, 0, 8).into());
        let v6 = interface(MTU_V6, Ipv6Address::new(0x100, 0, 0, 0, 0, 0, 0, 1).into());
        Self { mtu, v4, v6, frame, sent: 0 }
    }

    /// Prepares the SYN of a flow for its socket.
    ///
    /// smoltcp 0.14 asks the device to segment IPv4 only. For IPv6 it is therefore made to believe that packets of
    /// 64 KiB pass whole, by its interface and by the application's kernel; the device has them cut to what that kernel
    /// announced. What smoltcp announces in turn does no harm: Linux sends no more than the TUN's MTU allows.
    pub fn open_syn(&self, pair: Pair, syn: &mut [u8]) -> Route {
        let v6 = pair.dst.is_ipv6();
        let announced = if v6 { packet::raise_mss(syn, MTU_V6 - HEADERS_V6) } else { None };
        Route { v6, split: announced.map(|mss| mss.clamp(1, self.mtu.max(HEADERS_V6 + 1) - HEADERS_V6)) }
    }

    /// Hands a packet, if there is one, to the sockets of `set`, and sends all that they have to send.
    pub fn turn<S: Sink>(
        &mut self,
        packet: Option<&[u8]>,
        set: &mut SocketSet<'static>,
        route: Route,
        at: Instant,
        sink: &mut S,
    ) {
        let Self { v4, v6, frame, sent, mtu } = self;
        let interface = if route.v6 { v6 } else { v4 };
        let mtu = if route.v6 { MTU_V6 } else { *mtu };
        let mut device = Device { rx: packet, frame, sink, mtu: mtu.into(), split: route.split, sent };
        if packet.is_some() {
            interface.poll_ingress_single(at, &mut device, set);
        }
        while interface.poll_egress(at, &mut device, set) == PollResult::SocketStateChanged {}
    }

    /// When the sockets of `set` want their next turn.
    pub fn poll_at(&mut self, set: &SocketSet<'static>, route: Route, at: Instant) -> Option<Instant> {
        if route.v6 { self.v6.poll_at(at, set) } else { self.v4.poll_at(at, set) }
    }

    /// Tells the sender of `packet` that its destination is unreachable.
    pub fn unreachable<S: Sink>(&mut self, packet: &[u8], pair: Pair, what: Unreachable, sink: &mut S) {
        let length = packet::unreachable(packet, pair, what, &mut self.frame);
        self.sent += 1;
        sink.send(&self.frame[..length]);
    }

    /// Sends a UDP packet from `pair.dst` to `pair.src`; one longer than a packet can be is not sent.
    pub fn udp<S: Sink>(&mut self, pair: Pair, payload: &[u8], sink: &mut S) {
        if let Some(length) = packet::udp(pair, payload, &mut self.frame) {
            self.sent += 1;
            sink.send(&self.frame[..length]);
        }
    }
}

/// For the turn of smoltcp that sends nothing.
struct Nowhere;

impl Sink for Nowhere {
    fn send(&mut self, _frame: &[u8]) {}
}
