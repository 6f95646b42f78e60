//! An application's TCP connection through the tunnel: each end sees what the other did.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod common;

use std::io::ErrorKind;

use common::*;
use forkd_tunnel::copy::{Copied, End, copy};
use forkd_tunnel::endpoint::AgentEndpoint;
use forkd_tunnel::stream;
use forkd_wire::tunnel::Reset;
use quinn::Connection;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

struct Ends {
    /// The application on the laptop.
    app: TcpStream,
    /// The service in the cluster.
    service: TcpStream,
    laptop: JoinHandle<Copied>,
    agent: JoinHandle<Copied>,
    connection: Connection,
    /// quinn closes a connection with its last handle, whatever is under way.
    _far: Connection,
    _world: (World, Laptop, AgentEndpoint),
}

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (near, listener.accept().await.unwrap().0)
}

async fn ends() -> Ends {
    let world = world().await;
    let agent = world.agent("a", only(&["l1"]));
    let laptop = world.laptop("l1").await;
    let connection = laptop.call("a").await;
    let (far, _) = agent.accept().await.unwrap();
    let ((app, app_end), (service_end, service)) = (pair().await, pair().await);
    let accepting = tokio::spawn({
        let far = far.clone();
        async move {
            let (send, recv) = far.accept_bi().await.unwrap();
            let (send, recv) = stream::accept(send, recv).await.unwrap().1.ok().await.unwrap();
            copy(service_end, send, recv).await
        }
    });
    let (send, recv) = stream::open(&connection, dial(80)).await.unwrap();
    let laptop_copy = tokio::spawn(copy(app_end, send, recv));
    Ends {
        app,
        service,
        laptop: laptop_copy,
        agent: accepting,
        connection,
        _far: far,
        _world: (world, laptop, agent),
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("in time")
}

#[tokio::test]
async fn half_close_in_either_order_lets_the_other_half_finish() {
    for app_first in [true, false] {
        let mut ends = ends().await;
        let (first, second) =
            if app_first { (&mut ends.app, &mut ends.service) } else { (&mut ends.service, &mut ends.app) };
        let mut all = Vec::new();
        first.write_all(b"question").await.unwrap();
        first.shutdown().await.unwrap();
        within(second.read_to_end(&mut all)).await.unwrap();
        assert_eq!(all, b"question");
        let answer: Vec<u8> = (0..3_000_000).map(pattern).collect();
        let (sent, mut got) = (answer.clone(), Vec::new());
        let writing = async {
            second.write_all(&sent).await.unwrap();
            second.shutdown().await.unwrap();
        };
        let (_, read) = within(async { tokio::join!(writing, first.read_to_end(&mut got)) }).await;
        read.unwrap();
        assert!(got == answer);
        let (laptop, agent) = (within(ends.laptop).await.unwrap(), within(ends.agent).await.unwrap());
        let up = if app_first { 8 } else { 3_000_000 };
        assert_eq!(laptop, Copied { to_stream: up, to_tcp: 3_000_008 - up, end: End::Finished });
        assert_eq!(agent, Copied { to_stream: 3_000_008 - up, to_tcp: up, end: End::Finished });
    }
}

#[tokio::test]
async fn a_reset_at_one_end_is_a_reset_at_the_other() {
    for app_resets in [true, false] {
        let mut ends = ends().await;
        ends.app.write_all(b"x").await.unwrap();
        ends.service.read_exact(&mut [0]).await.unwrap();
        let (resetting, mut other) =
            if app_resets { (ends.app, ends.service) } else { (ends.service, ends.app) };
        resetting.set_zero_linger().unwrap();
        drop(resetting);
        let error = within(other.read(&mut [0])).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        let (laptop, agent) = (within(ends.laptop).await.unwrap(), within(ends.agent).await.unwrap());
        let by_stream = End::StreamReset(stream::code(Reset::ConnectionReset));
        let wanted = if app_resets { (End::TcpReset, by_stream) } else { (by_stream, End::TcpReset) };
        assert_eq!((laptop.end, agent.end), wanted);
    }
}

#[tokio::test]
async fn a_reset_after_half_close_still_gets_through() {
    let mut ends = ends().await;
    ends.app.shutdown().await.unwrap();
    let mut rest = Vec::new();
    within(ends.service.read_to_end(&mut rest)).await.unwrap();
    ends.service.set_zero_linger().unwrap();
    drop(ends.service);
    let error = within(ends.app.read(&mut [0])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert_eq!(within(ends.agent).await.unwrap().end, End::TcpReset);
}

#[tokio::test]
async fn an_end_that_stops_reading_stops_the_other_from_writing() {
    let mut ends = ends().await;
    // Writes until nothing goes for a while: then all buffers on the way are full.
    let block = vec![7; 1 << 16];
    let mut written = 0_u64;
    while let Ok(result) =
        tokio::time::timeout(std::time::Duration::from_secs(2), ends.app.write(&block)).await
    {
        written += result.unwrap() as u64;
        assert!(written < 64 << 20, "buffers on the way must be bounded");
    }
    ends.app.shutdown().await.unwrap();
    let mut read = 0;
    let mut buffer = vec![0; 1 << 16];
    loop {
        match within(ends.service.read(&mut buffer)).await.unwrap() {
            0 => break,
            some => read += some as u64,
        }
    }
    assert_eq!(read, written, "and nothing is lost");
}

#[tokio::test]
async fn a_lost_connection_resets_both_ends() {
    let mut ends = ends().await;
    ends.app.write_all(b"x").await.unwrap();
    ends.service.read_exact(&mut [0]).await.unwrap();
    ends.connection.close(0u32.into(), b"gone");
    for end in [&mut ends.app, &mut ends.service] {
        assert_eq!(within(end.read(&mut [0])).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    assert!(matches!(within(ends.laptop).await.unwrap().end, End::ConnectionLost(_)));
    assert!(matches!(within(ends.agent).await.unwrap().end, End::ConnectionLost(_)));
}

#[tokio::test]
async fn a_copy_that_is_dropped_resets_both_ends() {
    let mut ends = ends().await;
    ends.app.write_all(b"x").await.unwrap();
    ends.service.read_exact(&mut [0]).await.unwrap();
    ends.agent.abort();
    for end in [&mut ends.app, &mut ends.service] {
        assert_eq!(within(end.read(&mut [0])).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    assert_eq!(within(ends.laptop).await.unwrap().end, End::StreamReset(stream::code(Reset::Cancelled)));
}
