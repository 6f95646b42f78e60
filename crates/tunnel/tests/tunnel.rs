//! Laptop, relay and agent in one process, over loopback sockets.

mod common;

use common::*;
use forkd_tunnel::stream::{self, OpenError};
use forkd_wire::tunnel::Outcome;

#[tokio::test]
async fn a_hundred_megabytes_go_both_ways_through_the_relay_byte_for_byte() {
    let world = world().await;
    tokio::spawn(echo(world.agent("a", only(&["l1"]))));
    let laptop = world.laptop("l1").await;
    let connection = laptop.call("a").await;
    let (send, recv) = stream::open(&connection, dial(7)).await.unwrap();
    tokio::time::timeout(PATIENCE * 3, exchange(send, recv, 100 << 20, |_| ())).await.expect("in time");
    assert!(world.relay.forwarded().1 > 200 << 20);
}

#[tokio::test]
async fn a_refusal_comes_back_as_it_was_said() {
    let world = world().await;
    tokio::spawn(echo(world.agent("a", only(&["l1"]))));
    let laptop = world.laptop("l1").await;
    let connection = laptop.call("a").await;
    match stream::open(&connection, dial(9)).await {
        Err(OpenError::Refused { outcome: Outcome::Refused, reason }) => {
            assert_eq!(reason, "port 9 is closed")
        }
        other => panic!("{other:?}"),
    }
}
