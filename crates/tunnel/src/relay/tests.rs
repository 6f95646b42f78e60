use super::*;
use crate::path::pipe::FrameReader;
use bytes::BytesMut;
use forkd_wire::relay::forward_header;

fn shared() -> Shared {
    Shared {
        udp: Udp::new(std::net::UdpSocket::bind("127.0.0.1:0").unwrap()).unwrap(),
        table: RwLock::default(),
        pipes: RwLock::default(),
        next_pipe: AtomicU64::new(1),
        inbox: Inbox::default(),
        changes: watch::Sender::new(0),
        dropped: Default::default(),
        packets: AtomicU64::new(0),
        bytes: AtomicU64::new(0),
    }
}

fn laptop() -> Identity {
    Identity::Laptop { id: "l1".to_owned(), user: "alice".to_owned(), groups: vec![] }
}

fn agent() -> Identity {
    let (namespace, pod) = ("shop".to_owned(), "cart".to_owned());
    Identity::Agent { pod_uid: "a".to_owned(), namespace, pod, role: crate::identity::AgentRole::Pod }
}

/// The laptop behind `10.0.0.1:7`, the agent behind pipe 1 whose queue comes back.
fn with_parties(shared: &Shared) -> (SocketAddr, Arc<Queue>) {
    let from = SocketAddr::from(([10, 0, 0, 1], 7));
    let queue = Arc::new(Queue::new(3000));
    shared.pipes.write().unwrap().insert(1, queue.clone());
    let mut table = shared.table_mut();
    table.join(laptop(), 1);
    table.join(agent(), 2);
    table.set_leg(laptop().peer_id(), 1, Leg::Udp(from));
    table.set_leg(agent().peer_id(), 2, Leg::Pipe(1));
    table.register(agent().peer_id(), 2, Register { laptops: vec!["l1".to_owned()], any_laptop: false });
    (from, queue)
}

fn packet(to: PeerId, len: usize) -> Vec<u8> {
    let mut packet = forward_header(to).to_vec();
    packet.resize(len, 0xc3);
    packet
}

fn dropped(shared: &Shared) -> Vec<(&'static str, u64)> {
    Dropped::ALL
        .iter()
        .map(|reason| (reason.as_str(), shared.dropped[*reason as usize].load(Ordering::Relaxed)))
        .filter(|(_, count)| *count > 0)
        .collect()
}

async fn queued(queue: &Arc<Queue>) -> Vec<BytesMut> {
    let (near, far) = tokio::io::duplex(1 << 20);
    let writing = queue.write_to(near, || ());
    let mut got = Vec::new();
    let mut reader = FrameReader::new(far);
    tokio::select! {
        _ = writing => panic!("the queue was closed"),
        read = reader.read(&mut got) => read.unwrap(),
    }
    got
}

#[tokio::test]
async fn a_batch_for_several_receivers_is_sorted_and_the_sender_put_in() {
    let shared = shared();
    let (from, queue) = with_parties(&shared);
    let mut batch = Vec::new();
    batch.extend(packet(agent().peer_id(), 100));
    batch.extend(packet(agent().peer_id(), 100));
    batch.extend(packet(PeerId([7; 8]), 100));
    batch.extend([0x40; 100]);
    batch.extend([0x02; 100]);
    batch.extend(packet(agent().peer_id(), 50));
    sort(&shared, from, &mut batch, 100).await.unwrap();
    assert_eq!(dropped(&shared), [("unknown-frame", 1), ("unknown-peer", 1)]);
    let got = queued(&queue).await;
    assert_eq!(got.iter().map(BytesMut::len).collect::<Vec<_>>(), [100, 100, 50]);
    assert!(got.iter().all(|frame| frame[..FORWARD_HEADER] == forward_header(laptop().peer_id())));
    assert_eq!(shared.packets.load(Ordering::Relaxed), 3);
}

#[tokio::test]
async fn hostile_datagrams_reach_nobody_and_are_counted() {
    let shared = shared();
    let (from, queue) = with_parties(&shared);
    let to = agent().peer_id();
    let stranger = SocketAddr::from(([10, 0, 0, 9], 7));
    for (source, mut datagram) in [
        (stranger, packet(to, 100)),
        (SocketAddr::new(from.ip(), 8), packet(to, 100)),
        (addr_of(Leg::Pipe(1)), packet(laptop().peer_id(), 100)),
        (from, packet(to, FORWARD_HEADER)),
        (from, vec![1]),
        (from, vec![0]),
        (from, packet(to, 1473)),
        (from, packet(laptop().peer_id(), 100)),
        (from, vec![]),
    ] {
        let stride = datagram.len().max(1);
        sort(&shared, source, &mut datagram, stride).await.unwrap();
    }
    assert_eq!(
        dropped(&shared),
        [
            ("unknown-frame", 3),
            ("too-long", 1),
            ("unauthenticated", 2),
            ("forged-source", 1),
            ("not-allowed", 1)
        ]
    );
    assert_eq!(shared.packets.load(Ordering::Relaxed), 0);
    assert!(queue.has_room());
}

#[tokio::test]
async fn a_pipe_that_takes_nothing_costs_a_bounded_queue() {
    let shared = shared();
    let (from, queue) = with_parties(&shared);
    for _ in 0..100 {
        sort(&shared, from, &mut packet(agent().peer_id(), 1000), 1000).await.unwrap();
    }
    assert_eq!(dropped(&shared), [("queue-full", 97)]);
    assert_eq!(queued(&queue).await.len(), 3);
    shared.table_mut().lose_leg(Leg::Pipe(1));
    sort(&shared, from, &mut packet(agent().peer_id(), 1000), 1000).await.unwrap();
    assert_eq!(dropped(&shared), [("no-leg", 1), ("queue-full", 97)]);
}

#[tokio::test]
async fn any_bytes_whatever_are_sorted() {
    let shared = shared();
    let (from, _queue) = with_parties(&shared);
    // xorshift64 (Marsaglia 2003).
    let mut state = 88_172_645_463_325_252_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..3000 {
        let mut batch: Vec<u8> = (0..random() % 400).map(|_| (random() % 4) as u8 * 0x41).collect();
        let stride = 1 + (random() % 50) as usize;
        sort(&shared, from, &mut batch, stride).await.unwrap();
    }
    assert_eq!(shared.packets.load(Ordering::Relaxed), 0, "no random id is a party's");
}
