//! Bytes of IP packets: what came in, and the few packets that are made without a TCP socket.

use std::net::{IpAddr, SocketAddr};

use smoltcp::wire::{IpAddress, IpProtocol, IpVersion, Ipv4Packet, Ipv6Packet, TcpPacket, UdpPacket};

use super::DropReason;

/// Bytes of the virtio-net header (`struct virtio_net_hdr`, without `num_buffers`) in front of each packet.
pub const HEADER: usize = 10;
/// The longest frame: the header, and an IP packet as long as its length field can say.
pub const FRAME_MAX: usize = HEADER + 65535;

/// virtio-net: the checksum is the sender's pseudo-header sum only; whoever puts it on a wire finishes it.
const NEEDS_CSUM: u8 = 1;
/// virtio-net: somebody has verified the checksum.
const DATA_VALID: u8 = 2;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const ICMP_CHECKSUM: usize = 2;
const TCP_CHECKSUM: usize = 16;
/// RFC 1812 §4.3.2.3: an ICMP error carries as much of the packet as fits into 576 bytes. IPv6 could carry more
/// (RFC 4443 §2.4), and needs no more.
const ICMP_QUOTE: usize = 576 - 20 - 8;
/// Hop limit of packets made here.
pub(super) const HOPS: u8 = 64;

/// The two ends of a flow: `src` is the application, `dst` what it wants to reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pair {
    /// The application's end.
    pub src: SocketAddr,
    /// The cluster's end.
    pub dst: SocketAddr,
}

/// What stands in a frame.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Parsed<'a> {
    /// `opens`: SYN without ACK; `seq` tells a retransmitted SYN from a new connection on the same ports.
    Tcp {
        pair: Pair,
        opens: bool,
        resets: bool,
        seq: i32,
    },
    Udp {
        pair: Pair,
        payload: &'a [u8],
    },
}

/// Takes a frame apart: the IP packet, cut to the length it states, and what it carries.
pub(super) fn parse(frame: &[u8]) -> Result<(&[u8], Parsed<'_>), DropReason> {
    let (header, packet) = frame.split_at_checked(HEADER).ok_or(DropReason::Malformed)?;
    if packet.is_empty() {
        // smoltcp looks at the first byte without asking whether there is one.
        return Err(DropReason::Malformed);
    }
    let trusted = header[0] & (NEEDS_CSUM | DATA_VALID) != 0;
    let malformed = |_| DropReason::Malformed;
    let (src, dst, protocol, payload): (IpAddr, IpAddr, IpProtocol, &[u8]) =
        match IpVersion::of_packet(packet).map_err(malformed)? {
            IpVersion::Ipv4 => {
                let ip = Ipv4Packet::new_checked(packet).map_err(malformed)?;
                if usize::from(ip.header_len()) < 20 {
                    return Err(DropReason::Malformed);
                }
                if ip.more_frags() || ip.frag_offset() != 0 {
                    return Err(DropReason::Fragment);
                }
                (ip.src_addr().into(), ip.dst_addr().into(), ip.next_header(), ip.payload())
            }
            IpVersion::Ipv6 => {
                let ip = Ipv6Packet::new_checked(packet).map_err(malformed)?;
                (ip.src_addr().into(), ip.dst_addr().into(), ip.next_header(), ip.payload())
            }
        };
    let start = payload.as_ptr() as usize - packet.as_ptr() as usize;
    let whole = &packet[..start + payload.len()];
    let unicast = |ip: IpAddr| {
        !ip.is_unspecified() && !ip.is_multicast() && !matches!(ip, IpAddr::V4(v4) if v4.is_broadcast())
    };
    if !unicast(src) || !unicast(dst) {
        return Err(DropReason::NotUnicast);
    }
    let ends = (IpAddress::from(src), IpAddress::from(dst));
    match protocol {
        IpProtocol::Tcp => {
            let tcp = TcpPacket::new_checked(payload).map_err(malformed)?;
            if tcp.src_port() == 0 || tcp.dst_port() == 0 {
                return Err(DropReason::Malformed);
            }
            if !trusted && !tcp.verify_checksum(&ends.0, &ends.1) {
                return Err(DropReason::BadChecksum);
            }
            let pair =
                Pair { src: SocketAddr::new(src, tcp.src_port()), dst: SocketAddr::new(dst, tcp.dst_port()) };
            let opens = tcp.syn() && !tcp.ack() && !tcp.rst() && !tcp.fin();
            Ok((whole, Parsed::Tcp { pair, opens, resets: tcp.rst(), seq: tcp.seq_number().0 }))
        }
        IpProtocol::Udp => {
            let udp = UdpPacket::new_checked(payload).map_err(malformed)?;
            if !trusted && !udp.verify_checksum(&ends.0, &ends.1) {
                return Err(DropReason::BadChecksum);
            }
            let pair =
                Pair { src: SocketAddr::new(src, udp.src_port()), dst: SocketAddr::new(dst, udp.dst_port()) };
            // smoltcp's payload() trusts the length field, which new_checked has held to the buffer.
            let length = usize::from(udp.len());
            Ok((whole, Parsed::Udp { pair, payload: payload.get(8..length).ok_or(DropReason::Malformed)? }))
        }
        IpProtocol::Icmp | IpProtocol::Icmpv6 | IpProtocol::HopByHop => Err(DropReason::IcmpNotYet),
        IpProtocol::Ipv6Frag => Err(DropReason::Fragment),
        _ => Err(DropReason::OtherProtocol),
    }
}

/// Completes a frame whose TCP checksum field is to hold the pseudo-header sum: header for the kernel to finish
/// checksum and, where the payload is longer than `segment` bytes, segmentation.
pub(super) fn offload(frame: &mut [u8], segment: Option<u16>) {
    let (header, packet) = frame.split_at_mut(HEADER);
    header.fill(0);
    let v6 = packet[0] >> 4 == 6;
    let (ip, addresses, protocol) = if v6 { (40, 8..40, packet[6]) } else { (20, 12..20, packet[9]) };
    if protocol != u8::from(IpProtocol::Tcp) {
        return;
    }
    let length = (packet.len() - ip) as u32;
    let sum = fold(add(&packet[addresses], u32::from(protocol) + (length >> 16) + (length & 0xffff)));
    let tcp_header = usize::from(packet[ip + 12] >> 4) * 4;
    packet[ip + TCP_CHECKSUM..ip + TCP_CHECKSUM + 2].copy_from_slice(&sum.to_be_bytes());
    header[0] = NEEDS_CSUM;
    let payload = packet.len() - ip - tcp_header;
    if let Some(segment) = segment.filter(|segment| payload > usize::from(*segment)) {
        header[1] = if v6 { GSO_TCPV6 } else { GSO_TCPV4 };
        header[2..4].copy_from_slice(&((ip + tcp_header) as u16).to_ne_bytes());
        header[4..6].copy_from_slice(&segment.to_ne_bytes());
    }
    header[6..8].copy_from_slice(&(ip as u16).to_ne_bytes());
    header[8..10].copy_from_slice(&(TCP_CHECKSUM as u16).to_ne_bytes());
}

/// Raises the maximum segment size that an IPv6 SYN announces (RFC 9293 §3.7.1) to `mss`, and returns what it was.
/// `None`, and nothing changed, for one that announces none. The checksum is left as it was: it is verified by then.
pub(super) fn raise_mss(syn: &mut [u8], mss: u16) -> Option<u16> {
    const IP: usize = 40;
    const END: u8 = 0;
    const NOTHING: u8 = 1;
    const MSS: u8 = 2;
    let header = usize::from(*syn.get(IP + 12)? >> 4) * 4;
    let mut options = syn.get_mut(IP + 20..IP + header)?;
    loop {
        match options {
            [MSS, 4, high, low, ..] => {
                let old = u16::from_be_bytes([*high, *low]);
                [*high, *low] = mss.to_be_bytes();
                return Some(old);
            }
            [NOTHING, rest @ ..] => options = rest,
            [END, ..] | [] => return None,
            [_, length, ..] if *length >= 2 => {
                let length = usize::from(*length);
                options = options.get_mut(length..)?;
            }
            _ => return None,
        }
    }
}

/// Kinds of "destination unreachable" (RFC 792, RFC 1812 §5.2.7.1, RFC 4443 §3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unreachable {
    Network,
    Host,
    Prohibited,
}

/// Writes the frame that says so to the sender of `packet`; returns its length. The address that it comes from is the
/// one that was asked for: nothing stands between it and the application.
pub(super) fn unreachable(packet: &[u8], pair: Pair, what: Unreachable, frame: &mut [u8]) -> usize {
    let quote = &packet[..packet.len().min(ICMP_QUOTE)];
    let (kind, code, protocol) = match (pair.dst.is_ipv6(), what) {
        (false, Unreachable::Network) => (3, 0, IpProtocol::Icmp),
        (false, Unreachable::Host) => (3, 1, IpProtocol::Icmp),
        (false, Unreachable::Prohibited) => (3, 13, IpProtocol::Icmp),
        (true, Unreachable::Network) => (1, 0, IpProtocol::Icmpv6),
        (true, Unreachable::Host) => (1, 3, IpProtocol::Icmpv6),
        (true, Unreachable::Prohibited) => (1, 1, IpProtocol::Icmpv6),
    };
    let body = emit_ip(pair.dst.ip(), pair.src.ip(), protocol, 8 + quote.len(), frame);
    let icmp = &mut frame[body..body + 8 + quote.len()];
    icmp[..8].copy_from_slice(&[kind, code, 0, 0, 0, 0, 0, 0]);
    icmp[8..].copy_from_slice(quote);
    let start = match protocol {
        IpProtocol::Icmpv6 => pseudo_sum(pair.dst.ip(), pair.src.ip(), protocol, icmp.len()),
        _ => 0,
    };
    let sum = !fold(add(icmp, start));
    icmp[ICMP_CHECKSUM..ICMP_CHECKSUM + 2].copy_from_slice(&sum.to_be_bytes());
    body + 8 + quote.len()
}

/// Writes the frame of a UDP packet from `pair.dst` to `pair.src`; returns its length, or `None` if it does not fit.
pub(super) fn udp(pair: Pair, payload: &[u8], frame: &mut [u8]) -> Option<usize> {
    let length = u16::try_from(payload.len() + 8).ok()?;
    if HEADER + 40 + usize::from(length) > frame.len() {
        return None;
    }
    let body = emit_ip(pair.dst.ip(), pair.src.ip(), IpProtocol::Udp, length.into(), frame);
    let udp = &mut frame[body..body + usize::from(length)];
    udp[0..2].copy_from_slice(&pair.dst.port().to_be_bytes());
    udp[2..4].copy_from_slice(&pair.src.port().to_be_bytes());
    udp[4..6].copy_from_slice(&length.to_be_bytes());
    udp[6..8].fill(0);
    udp[8..].copy_from_slice(payload);
    let sum = !fold(add(udp, pseudo_sum(pair.dst.ip(), pair.src.ip(), IpProtocol::Udp, length.into())));
    // RFC 768: 0 would mean "no checksum".
    let sum = if sum == 0 { 0xffff } else { sum };
    udp[6..8].copy_from_slice(&sum.to_be_bytes());
    Some(body + usize::from(length))
}

/// Writes virtio-net and IP header, and returns where the payload of `length` bytes begins.
fn emit_ip(src: IpAddr, dst: IpAddr, protocol: IpProtocol, length: usize, frame: &mut [u8]) -> usize {
    frame[..HEADER].fill(0);
    let packet = &mut frame[HEADER..];
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            packet[..20].copy_from_slice(&[
                0x45,
                0,
                0,
                0,
                0,
                0,
                0x40,
                0,
                HOPS,
                protocol.into(),
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
            ]);
            packet[2..4].copy_from_slice(&(20 + length as u16).to_be_bytes());
            packet[12..16].copy_from_slice(&src.octets());
            packet[16..20].copy_from_slice(&dst.octets());
            let sum = !fold(add(&packet[..20], 0));
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            HEADER + 20
        }
        (src, dst) => {
            let octets = |ip: IpAddr| match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                IpAddr::V6(ip) => ip.octets(),
            };
            packet[..4].copy_from_slice(&[0x60, 0, 0, 0]);
            packet[4..6].copy_from_slice(&(length as u16).to_be_bytes());
            packet[6] = protocol.into();
            packet[7] = HOPS;
            packet[8..24].copy_from_slice(&octets(src));
            packet[24..40].copy_from_slice(&octets(dst));
            HEADER + 40
        }
    }
}

fn pseudo_sum(src: IpAddr, dst: IpAddr, protocol: IpProtocol, length: usize) -> u32 {
    let octets = |ip: IpAddr, sum: u32| match ip {
        IpAddr::V4(ip) => add(&ip.octets(), sum),
        IpAddr::V6(ip) => add(&ip.octets(), sum),
    };
    octets(dst, octets(src, u32::from(u8::from(protocol)) + length as u32))
}

/// Adds 16-bit words in network order (RFC 1071). At most 64 KiB of them: no overflow.
fn add(bytes: &[u8], sum: u32) -> u32 {
    let words = bytes.chunks_exact(2);
    let last = words.remainder().first().map_or(0, |byte| u32::from(*byte) << 8);
    words.fold(sum + last, |sum, word| sum + u32::from(u16::from_be_bytes([word[0], word[1]])))
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}
