//! Just enough netlink to set an nftables table and to ask about sockets: messages, attributes, errors.
//!
//! The kernel does the work inside `send`, so its answers are there when `send` returns: nothing here waits.

use std::io;

use netlink_sys::Socket;

/// `nlmsghdr` of `linux/netlink.h`, bytes.
const HEADER: usize = 16;
const NLM_F_REQUEST: u16 = 1;
pub(crate) const NLM_F_ACK: u16 = 4;
pub(crate) const NLM_F_DUMP: u16 = 0x300;
pub(crate) const NLM_F_CREATE: u16 = 0x400;
pub(crate) const NLM_F_APPEND: u16 = 0x800;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLA_F_NESTED: u16 = 0x8000;

/// A socket of one netlink protocol, in the network namespace of the thread that opened it.
pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
}

/// Type and payload of a message from the kernel.
pub(crate) type Answer = (u16, Vec<u8>);

/// What the kernel said about one request.
#[derive(Debug)]
pub(crate) struct Refused {
    /// Index of the request among those sent together.
    pub index: usize,
    pub error: io::Error,
}

impl Netlink {
    pub(crate) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.set_non_blocking(true)?;
        Ok(Self { socket, sequence: 1 })
    }

    /// Sends `requests` as one datagram and gives the payloads (with their types) of what comes back. Errors of
    /// single requests come second; the first one is the cause.
    pub(crate) fn exchange(&mut self, requests: &Requests) -> io::Result<(Vec<Answer>, Option<Refused>)> {
        let first = self.sequence;
        let mut bytes = requests.bytes.clone();
        for start in &requests.starts {
            bytes[start + 8..start + 12].copy_from_slice(&self.sequence.to_ne_bytes());
            self.sequence = self.sequence.wrapping_add(1);
        }
        let sent = self.socket.send(&bytes, 0)?;
        if sent != bytes.len() {
            return Err(io::Error::new(io::ErrorKind::WriteZero, "netlink took a part of a message"));
        }
        let (mut answers, mut refused) = (Vec::new(), None);
        loop {
            let datagram = match self.socket.recv_from_full() {
                Ok((datagram, _)) => datagram,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok((answers, refused)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            for (kind, sequence, payload) in messages(&datagram) {
                let index = sequence.wrapping_sub(first) as usize;
                if index >= requests.starts.len() {
                    continue; // an answer to an exchange that failed half-way
                }
                match (kind, field(payload, 0).map(i32::from_ne_bytes)) {
                    (NLMSG_ERROR | NLMSG_DONE, Some(errno)) if errno < 0 => {
                        let error = io::Error::from_raw_os_error(-errno);
                        refused.get_or_insert(Refused { index, error });
                    }
                    (NLMSG_DONE, _) => return Ok((answers, refused)),
                    _ => answers.push((kind, payload.to_vec())),
                }
            }
        }
    }
}

/// Requests that are sent together.
#[derive(Default)]
pub(crate) struct Requests {
    bytes: Vec<u8>,
    starts: Vec<usize>,
}

impl Requests {
    /// Adds one request; `header` is the fixed part behind the netlink header.
    pub(crate) fn add(
        &mut self,
        kind: u16,
        flags: u16,
        header: &[u8],
        attributes: impl FnOnce(&mut Attributes),
    ) {
        let start = self.bytes.len();
        self.starts.push(start);
        self.bytes.resize(start + HEADER, 0);
        self.bytes[start + 4..start + 6].copy_from_slice(&kind.to_ne_bytes());
        self.bytes[start + 6..start + 8].copy_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        self.bytes.extend_from_slice(header);
        let mut body = Attributes(Vec::new());
        attributes(&mut body);
        self.bytes.extend_from_slice(&body.0);
        let len = (self.bytes.len() - start) as u32;
        self.bytes[start..start + 4].copy_from_slice(&len.to_ne_bytes());
    }

    pub(crate) fn len(&self) -> usize {
        self.starts.len()
    }
}

/// `nlattr`s, each padded to four bytes.
pub(crate) struct Attributes(Vec<u8>);

impl Attributes {
    pub(crate) fn bytes(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        self.0.extend_from_slice(&(value.len() as u16 + 4).to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    pub(crate) fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        self.bytes(kind, &[value.as_bytes(), b"\0"].concat())
    }

    /// Network order, as nftables wants its numbers.
    pub(crate) fn number(&mut self, kind: u16, value: u32) -> &mut Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    pub(crate) fn nest(&mut self, kind: u16, inner: impl FnOnce(&mut Self)) -> &mut Self {
        let mut body = Self(Vec::new());
        inner(&mut body);
        self.bytes(kind | NLA_F_NESTED, &body.0)
    }
}

/// The attribute of this kind among those in `bytes`.
pub(crate) fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    while let (Some(len), Some(kind)) =
        (field(bytes, 0).map(u16::from_ne_bytes), field(bytes, 2).map(u16::from_ne_bytes))
    {
        let value = bytes.get(4..usize::from(len))?;
        if kind & !NLA_F_NESTED == wanted {
            return Some(value);
        }
        bytes = bytes.get(usize::from(len).next_multiple_of(4)..)?;
    }
    None
}

/// `N` bytes at `at`.
pub(crate) fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// Type, sequence number and payload of each message in a datagram.
fn messages(mut datagram: &[u8]) -> impl Iterator<Item = (u16, u32, &[u8])> {
    std::iter::from_fn(move || {
        let len = u32::from_ne_bytes(field(datagram, 0)?) as usize;
        let kind = u16::from_ne_bytes(field(datagram, 4)?);
        let sequence = u32::from_ne_bytes(field(datagram, 8)?);
        let payload = datagram.get(HEADER..len)?;
        datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, sequence, payload))
    })
}
