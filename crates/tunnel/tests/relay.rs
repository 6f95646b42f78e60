//! The relay against those who speak no protocol of ours, over real sockets.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod common;

use std::time::Duration;

use common::*;
use forkd_tunnel::relay::Dropped;
use forkd_wire::relay::forward_header;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UdpSocket;

async fn wait_for(mut condition: impl FnMut() -> bool) {
    until(&mut condition, &mut std::pin::pin!(std::future::pending::<()>())).await;
}

#[tokio::test]
async fn a_stranger_on_udp_reaches_nobody_and_gets_nothing_bigger_than_it_sent() {
    let world = world().await;
    let agent = world.agent("a", forkd_wire::relay::Register { any_laptop: true, laptops: vec![] });
    let laptop = world.laptop("l1").await;
    laptop.sees(&["a"]).await;
    let before = world.relay.forwarded();
    let stranger = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    stranger.connect(world.relay.udp_addr()).await.unwrap();

    let mut forwarded = forward_header(agent_identity("a").peer_id()).to_vec();
    forwarded.resize(1200, 0x41);
    let unknown_version = |len: usize| {
        let mut packet =
            vec![0xc0, 0x0a, 0x0a, 0x0a, 0x0a, 8, 1, 2, 3, 4, 5, 6, 7, 8, 8, 1, 2, 3, 4, 5, 6, 7, 8];
        packet.resize(len, 0);
        packet
    };
    let mut initial = unknown_version(1200);
    initial[1..5].copy_from_slice(&[0, 0, 0, 1]);
    let mut sizes = Vec::new();
    for datagram in [
        forwarded.clone(),
        vec![0x01],
        vec![0x00, 1, 2],
        vec![0x40],
        vec![0x40; 40],
        vec![0x7f; 1472],
        initial,
        unknown_version(30),
        // The last one is answered: version negotiation (RFC 9000 §6). Answers come in order.
        unknown_version(1200),
    ] {
        stranger.send(&datagram).await.unwrap();
        sizes.push(datagram.len());
    }
    let mut answer = [0; 2000];
    loop {
        let len =
            tokio::time::timeout(PATIENCE, stranger.recv(&mut answer)).await.expect("an answer").unwrap();
        assert!(len < 1200, "{len} bytes");
        if answer[0] & 0x80 != 0 && answer[1..5] == [0; 4] {
            break;
        }
    }
    wait_for(|| world.relay.dropped(Dropped::UnknownFrame) == 2).await;
    assert_eq!(world.relay.dropped(Dropped::Unauthenticated), 1);
    assert_eq!(world.relay.forwarded(), before);
    drop(agent);
}

#[tokio::test]
async fn a_stranger_in_a_pipe_reaches_nobody() {
    let world = world().await;
    let agent = world.agent("a", forkd_wire::relay::Register { any_laptop: true, laptops: vec![] });
    world.laptop("l1").await.sees(&["a"]).await;
    let before = world.relay.forwarded();
    let frame = |datagram: &[u8]| [&u16::try_from(datagram.len()).unwrap().to_be_bytes(), datagram].concat();
    let mut forwarded = forward_header(agent_identity("a").peer_id()).to_vec();
    forwarded.resize(500, 0x41);

    let mut pipe = world.pipe().await;
    pipe.write_all(&frame(&forwarded)).await.unwrap();
    pipe.write_all(&frame(&[0])).await.unwrap();
    let mut long = forwarded.clone();
    long.resize(65_535, 0);
    pipe.write_all(&frame(&long)).await.unwrap();
    wait_for(|| {
        [Dropped::Unauthenticated, Dropped::UnknownFrame, Dropped::TooLong]
            .map(|reason| world.relay.dropped(reason))
            == [1, 1, 1]
    })
    .await;
    // A frame without content ends the pipe.
    pipe.write_all(&[0, 0]).await.unwrap();
    let mut rest = Vec::new();
    match tokio::time::timeout(PATIENCE, pipe.read_to_end(&mut rest)).await.expect("an end") {
        Ok(_) => assert!(rest.is_empty()),
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
    }

    // A pipe with nobody behind it is closed after a while, though it says nothing wrong.
    let mut silent = world.pipe().await;
    let end = tokio::time::timeout(Duration::from_secs(60), silent.read(&mut [0])).await.expect("an end");
    assert_eq!(end.unwrap(), 0);
    assert_eq!(world.relay.forwarded(), before);
    drop(agent);
}
