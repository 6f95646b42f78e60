//! DNS at the cluster's DNS address, over UDP and TCP: cluster names go through the tunnel, all others to whoever the
//! laptop asked before.

use std::future::poll_fn;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use forkd_core::dns::{self, Failure, MESSAGE_MAX, Place};
use forkd_core::flow::{FlowId, Pair, Read};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use super::Shared;

/// How long one upstream resolver has. Resolvers of C libraries ask again after 5 s: two must have had their turn.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long the cluster has: as long as a C library waits.
const CLUSTER_PATIENCE: Duration = Duration::from_secs(5);
/// Bytes in front of a DNS message over TCP.
const PREFIX: usize = 2;

/// The flow is over, orderly or not.
struct Over;

impl Shared {
    /// Answers one question that came over UDP.
    pub(super) async fn answer(self: Rc<Self>, pair: Pair, query: Vec<u8>) {
        let reply = self.resolve(&query).await.map(|answer| dns::fit_udp(&query, answer));
        let plane = &mut *self.plane.borrow_mut();
        match reply {
            Some(message) => plane.flows.answer(pair, &message, &mut plane.tun),
            None => plane.flows.no_answer(),
        }
    }

    /// Serves one TCP connection to the DNS address: messages with two-byte lengths (RFC 1035 §4.2.2), one after the
    /// other, until the application closes it. Returns the bytes of questions and of answers.
    pub(super) async fn dns_flow(&self, id: FlowId) -> (u64, u64) {
        let (mut up, mut down) = (0, 0);
        let mut prefix = [0; PREFIX];
        while let Ok(()) = self.read_exact(id, &mut prefix).await {
            let mut query = vec![0; u16::from_be_bytes(prefix).into()];
            if self.read_exact(id, &mut query).await.is_err() {
                break;
            }
            up += (PREFIX + query.len()) as u64;
            let Some(answer) = self.resolve(&query).await else { break };
            let mut message = (answer.len() as u16).to_be_bytes().to_vec();
            message.extend_from_slice(&answer);
            if self.write_all(id, &message).await.is_err() {
                break;
            }
            down += message.len() as u64;
        }
        self.plane.borrow_mut().flows.close(id);
        self.flush(id);
        (up, down)
    }

    /// The answer to any message; `None` if it deserves none.
    async fn resolve(&self, query: &[u8]) -> Option<Vec<u8>> {
        let place = self.zones.borrow().place(query);
        let answer = match place {
            Err(_) => return dns::failure(query, Failure::FormErr),
            Ok(Place::Cluster) => {
                let asked = self.dialer.dns(Bytes::copy_from_slice(query));
                match timeout(CLUSTER_PATIENCE, asked).await {
                    Ok(Ok(answer)) => Ok(answer.to_vec()),
                    Ok(Err(error)) => Err(format!("{error:#}")),
                    Err(_) => Err("the cluster's DNS did not answer in time".to_owned()),
                }
            }
            Ok(Place::Laptop) => {
                let upstream = self.upstream.borrow().clone();
                forward(query, &upstream).await
            }
        };
        match answer {
            // The length prefix over TCP has two bytes; and an answer to another question is worse than none.
            Ok(answer) if answer.len() <= MESSAGE_MAX && answer.get(..2) == query.get(..2) => Some(answer),
            Ok(_) => dns::failure(query, Failure::ServFail),
            Err(because) => {
                tracing::debug!(because, ?place, "a name was not resolved");
                dns::failure(query, Failure::ServFail)
            }
        }
    }

    async fn read_exact(&self, id: FlowId, mut into: &mut [u8]) -> Result<(), Over> {
        poll_fn(|cx| {
            let plane = &mut *self.plane.borrow_mut();
            plane.wake_by(id, cx.waker());
            while !into.is_empty() {
                let read = plane.flows.read(id, |bytes| {
                    let length = bytes.len().min(into.len());
                    into[..length].copy_from_slice(&bytes[..length]);
                    (length, length)
                });
                match read {
                    Read::Data(length) => into = &mut std::mem::take(&mut into)[length..],
                    Read::Blocked => return Poll::Pending,
                    Read::Eof | Read::Reset => return Poll::Ready(Err(Over)),
                }
            }
            plane.flows.flush(id, Instant::now(), &mut plane.tun);
            plane.rearm();
            Poll::Ready(Ok(()))
        })
        .await
    }

    async fn write_all(&self, id: FlowId, mut data: &[u8]) -> Result<(), Over> {
        poll_fn(|cx| {
            let plane = &mut *self.plane.borrow_mut();
            plane.wake_by(id, cx.waker());
            let written = plane.flows.write(id, data);
            plane.flows.flush(id, Instant::now(), &mut plane.tun);
            plane.rearm();
            match written {
                Ok(written) => data = &data[written..],
                Err(_gone) => return Poll::Ready(Err(Over)),
            }
            if data.is_empty() { Poll::Ready(Ok(())) } else { Poll::Pending }
        })
        .await
    }

    fn flush(&self, id: FlowId) {
        let plane = &mut *self.plane.borrow_mut();
        plane.flows.flush(id, Instant::now(), &mut plane.tun);
        plane.rearm();
    }
}

/// Asks the laptop's own resolvers, one after the other, by UDP and where the answer is cut by TCP.
async fn forward(query: &[u8], upstream: &[SocketAddr]) -> Result<Vec<u8>, String> {
    let mut because = "this machine had no resolver".to_owned();
    for server in upstream {
        match timeout(PATIENCE, ask(query, *server)).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => because = format!("{server}: {error}"),
            Err(_) => because = format!("{server} did not answer in time"),
        }
    }
    Err(because)
}

async fn ask(query: &[u8], server: SocketAddr) -> io::Result<Vec<u8>> {
    // A socket per question: its random port is what makes forged answers hard (RFC 5452 §4.5).
    let any = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).await?;
    socket.connect(server).await?;
    socket.send(query).await?;
    let mut answer = vec![0; MESSAGE_MAX];
    loop {
        let length = socket.recv(&mut answer).await?;
        // What is no answer to this question is passed over: the right one may still come.
        if length >= 12 && answer[..2] == query[..2] && answer[2] & 0x80 != 0 {
            answer.truncate(length);
            break;
        }
    }
    let truncated = answer[2] & 0x02 != 0;
    if truncated { ask_by_tcp(query, server).await } else { Ok(answer) }
}

async fn ask_by_tcp(query: &[u8], server: SocketAddr) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let mut message = (query.len() as u16).to_be_bytes().to_vec();
    message.extend_from_slice(query);
    stream.write_all(&message).await?;
    let mut answer = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}
