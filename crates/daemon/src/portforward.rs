//! A byte pipe to a port of a pod, through the API server: what `kubectl port-forward` uses, as one object that reads
//! and writes. kube's own needs a task, a channel and a duplex buffer per pipe, which halves the rate of uploads.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use futures::{Sink, Stream};
use kube::Client;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};

/// The channel of a port's bytes, and of its errors (subprotocol `v4.channel.k8s.io`).
const DATA: u8 = 0;
const ERROR: u8 = 1;
/// The most bytes in one message towards the pod: the kubelet copies by 32 KiB.
const MAX_WRITE: usize = 32 * 1024;

/// The bytes of one port within a websocket.
pub struct Pipe<S> {
    socket: WebSocketStream<S>,
    /// Received and not read yet: at most one message.
    unread: Bytes,
    /// Channels whose first message, the port's number, has arrived.
    announced: [bool; 2],
    port: u16,
}

/// Opens a pipe to `port` on the loopback of a pod. Needs `get` (websocket) or `create` on `pods/portforward`.
///
/// # Errors
/// [`kube::Error`]; a port that refuses shows only when reading.
pub async fn open(
    client: &Client,
    namespace: &str,
    pod: &str,
    port: u16,
) -> Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static + use<>, kube::Error> {
    let uri = format!("/api/v1/namespaces/{namespace}/pods/{pod}/portforward?ports={port}");
    let request = http::Request::get(uri).body(Vec::new()).map_err(kube::Error::HttpError)?;
    let socket = client.connect(request).await?.into_stream();
    Ok(Pipe { socket, unread: Bytes::new(), announced: [false; 2], port })
}

impl<S: AsyncRead + AsyncWrite + Unpin> Pipe<S> {
    /// Takes a message apart; what it has for the reader goes to `unread`.
    fn take(&mut self, mut message: Bytes) -> io::Result<()> {
        let broken = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
        if message.is_empty() {
            return Ok(());
        }
        let channel = message.get_u8();
        let Some(announced) = self.announced.get_mut(usize::from(channel)) else {
            return Err(broken(format!("the API server used channel {channel}, which nobody opened")));
        };
        if !std::mem::replace(announced, true) {
            return match <[u8; 2]>::try_from(&message[..]) {
                Ok(port) if u16::from_le_bytes(port) == self.port => Ok(()),
                _ => Err(broken(format!("the API server did not confirm port {}", self.port))),
            };
        }
        match channel {
            ERROR => Err(io::Error::new(
                io::ErrorKind::ConnectionRefused,
                String::from_utf8_lossy(&message).trim().to_owned(),
            )),
            _ => {
                self.unread = message;
                Ok(())
            }
        }
    }
}

fn as_io(error: WsError) -> io::Error {
    match error {
        WsError::Io(error) => error,
        WsError::ConnectionClosed | WsError::AlreadyClosed => io::ErrorKind::BrokenPipe.into(),
        other => io::Error::other(other),
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Pipe<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.unread.is_empty() {
            match ready!(Pin::new(&mut this.socket).poll_next(cx)) {
                Some(Ok(Message::Binary(message))) => this.take(message)?,
                // Pings are answered by the library.
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_) | Message::Text(_))) => {}
                Some(Ok(Message::Close(_))) | None => return Poll::Ready(Ok(())),
                Some(Err(WsError::ConnectionClosed)) => return Poll::Ready(Ok(())),
                Some(Err(error)) => return Poll::Ready(Err(as_io(error))),
            }
        }
        let len = this.unread.len().min(buf.remaining());
        buf.put_slice(&this.unread[..len]);
        this.unread.advance(len);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Pipe<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        // Ready only when the message before is through to the socket: one message waits at most.
        ready!(Pin::new(&mut self.socket).poll_ready(cx)).map_err(as_io)?;
        let len = buf.len().min(MAX_WRITE);
        let mut message = BytesMut::with_capacity(len + 1);
        message.extend_from_slice(&[DATA]);
        message.extend_from_slice(&buf[..len]);
        Pin::new(&mut self.socket).start_send(Message::Binary(message.freeze())).map_err(as_io)?;
        Poll::Ready(Ok(len))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx).map_err(as_io)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_close(cx).map_err(as_io)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::{SinkExt, StreamExt};
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
    use tokio_tungstenite::tungstenite::protocol::Role;

    async fn pair(port: u16) -> (Pipe<DuplexStream>, WebSocketStream<DuplexStream>) {
        let (laptop, server) = tokio::io::duplex(256 * 1024);
        let socket = WebSocketStream::from_raw_socket(laptop, Role::Client, None).await;
        let server = WebSocketStream::from_raw_socket(server, Role::Server, None).await;
        (Pipe { socket, unread: Bytes::new(), announced: [false; 2], port }, server)
    }

    fn message(bytes: &[u8]) -> Message {
        Message::Binary(Bytes::copy_from_slice(bytes))
    }

    #[tokio::test]
    async fn bytes_pass_both_ways_without_their_channel_prefix() {
        let (mut pipe, mut server) = pair(7844).await;
        for first in [[DATA, 0xa4, 0x1e], [ERROR, 0xa4, 0x1e]] {
            server.send(message(&first)).await.unwrap();
        }
        server.send(message(&[DATA, b'h', b'i'])).await.unwrap();
        let mut read = [0; 2];
        pipe.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"hi");
        let big = vec![7; MAX_WRITE + 1];
        pipe.write_all(&big).await.unwrap();
        pipe.flush().await.unwrap();
        let mut got = Vec::new();
        while got.len() < big.len() {
            let Message::Binary(part) = server.next().await.unwrap().unwrap() else { panic!("binary") };
            assert_eq!(part[0], DATA);
            got.extend_from_slice(&part[1..]);
        }
        assert_eq!(got, big);
    }

    #[tokio::test]
    async fn what_the_kubelet_says_on_the_error_channel_is_the_error() {
        let (mut pipe, mut server) = pair(7844).await;
        for text in [&[DATA, 0xa4, 0x1e][..], &[ERROR, 0xa4, 0x1e], b"\x01connect: connection refused\n"] {
            server.send(message(text)).await.unwrap();
        }
        let error = pipe.read(&mut [0; 8]).await.unwrap_err();
        assert_eq!(error.to_string(), "connect: connection refused");
    }

    #[tokio::test]
    async fn a_server_that_confirms_another_port_is_not_believed() {
        let (mut pipe, mut server) = pair(7844).await;
        server.send(message(&[DATA, 1, 0])).await.unwrap();
        assert_eq!(pipe.read(&mut [0; 8]).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        let (mut pipe, server) = pair(7844).await;
        drop(server);
        assert!(matches!(pipe.read(&mut [0; 8]).await, Ok(0) | Err(_)), "an end, not a hang");
    }
}
