//! The cluster's own DNS, asked on a laptop's behalf: one message in, one message out.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

/// Shortest DNS message: its header (RFC 1035 §4.1.1).
const HEADER: usize = 12;
/// TC, "truncated", in the third byte of the header.
const TRUNCATED: u8 = 0x02;
/// As resolv.conf(5): wait this long for an answer, this often.
const WAIT: Duration = Duration::from_secs(5);
const ATTEMPTS: usize = 2;

/// The pod's resolver configuration, which the kubelet writes for `dnsPolicy: ClusterFirst`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolver {
    /// Where to ask.
    pub servers: Vec<SocketAddr>,
    /// The cluster's domain, e.g. `cluster.local`: what follows `svc.` in the search list.
    pub domain: Option<String>,
}

impl Resolver {
    /// Reads `/etc/resolv.conf`.
    ///
    /// # Errors
    /// The file cannot be read, or names no server.
    pub fn of_this_pod() -> anyhow::Result<Self> {
        let text = std::fs::read_to_string("/etc/resolv.conf").context("read /etc/resolv.conf")?;
        let resolver = Self::parse(&text);
        anyhow::ensure!(!resolver.servers.is_empty(), "/etc/resolv.conf names no server");
        Ok(resolver)
    }

    fn parse(text: &str) -> Self {
        let mut resolver = Self { servers: Vec::new(), domain: None };
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => {
                    resolver.servers.extend(
                        words
                            .next()
                            .and_then(|ip| ip.parse::<IpAddr>().ok())
                            .map(|ip| SocketAddr::new(ip, 53)),
                    );
                }
                Some("search") => {
                    resolver.domain = words.find_map(|domain| {
                        domain.strip_prefix("svc.").map(|d| d.trim_end_matches('.').to_owned())
                    });
                }
                _ => {}
            }
        }
        resolver
    }

    /// Asks, by UDP and, when the answer is truncated, again by TCP (RFC 7766 §5).
    ///
    /// # Errors
    /// No server gave an answer in time.
    pub async fn ask(&self, query: &[u8]) -> io::Result<Vec<u8>> {
        if query.len() < HEADER {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "shorter than a DNS header"));
        }
        let mut last = io::Error::new(io::ErrorKind::TimedOut, "no answer from the cluster's DNS");
        for _ in 0..ATTEMPTS {
            for server in &self.servers {
                match timeout(WAIT, ask_udp(*server, query)).await {
                    Ok(Ok(answer)) if answer[2] & TRUNCATED == 0 => return Ok(answer),
                    Ok(Ok(truncated)) => {
                        return match timeout(WAIT, ask_tcp(*server, query)).await {
                            Ok(Ok(answer)) => Ok(answer),
                            _ => Ok(truncated),
                        };
                    }
                    Ok(Err(error)) => last = error,
                    Err(_) => {}
                }
            }
        }
        Err(last)
    }
}

async fn ask_udp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    // A socket per question: its random port is the protection against forged answers (RFC 5452 §9.2).
    let any: SocketAddr = if server.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    socket.send(query).await?;
    let mut answer = vec![0; 65535];
    loop {
        let len = socket.recv(&mut answer).await?;
        if len >= HEADER && answer[..2] == query[..2] {
            answer.truncate(len);
            return Ok(answer);
        }
    }
}

async fn ask_tcp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let len = u16::try_from(query.len())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "query too long"))?;
    let mut stream = TcpStream::connect(server).await?;
    stream.write_all(&[&len.to_be_bytes()[..], query].concat()).await?;
    let mut answer = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut answer).await?;
    if answer.len() < HEADER {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "shorter than a DNS header"));
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kubelets_resolv_conf_tells_server_and_domain() {
        let text = "search shop.svc.cluster.local svc.cluster.local cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n";
        let resolver = Resolver::parse(text);
        assert_eq!(resolver.servers, [SocketAddr::from(([10, 96, 0, 10], 53))]);
        assert_eq!(resolver.domain.as_deref(), Some("cluster.local"));
    }

    #[tokio::test]
    async fn a_truncated_answer_is_asked_for_again_by_tcp() {
        let tcp = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let udp = UdpSocket::bind(tcp.local_addr().unwrap()).await.unwrap();
        let resolver = Resolver { servers: vec![tcp.local_addr().unwrap()], domain: None };
        let server = async {
            let mut query = [0; 512];
            let (len, from) = udp.recv_from(&mut query).await.unwrap();
            let mut answer = query[..len].to_vec();
            answer[2] |= 0x80 | TRUNCATED;
            udp.send_to(&answer, from).await.unwrap();
            let (mut stream, _) = tcp.accept().await.unwrap();
            let len = stream.read_u16().await.unwrap();
            let mut query = vec![0; usize::from(len)];
            stream.read_exact(&mut query).await.unwrap();
            query.extend_from_slice(b"the whole answer");
            stream.write_u16(query.len() as u16).await.unwrap();
            stream.write_all(&query).await.unwrap();
        };
        let query = [7u8; HEADER];
        let (answer, ()) = tokio::join!(resolver.ask(&query), server);
        assert!(answer.unwrap().ends_with(b"the whole answer"));
        assert!(resolver.ask(&[1, 2, 3]).await.is_err());
    }
}
