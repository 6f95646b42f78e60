//! DNS questions to the cluster: all of them through one stream to the gateway, opened anew when it ends.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};
use forkd_tunnel::stream;
use forkd_wire::tunnel::{Dns, Open, open};
use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::{mpsc, oneshot};

/// Questions that may wait for an answer at a time. Ids are 16 bits; a host asks for a handful at once.
const MAX_OPEN: usize = 4096;
/// A question older than this has been given up by whoever asked.
const FORGOTTEN: Duration = Duration::from_secs(15);

type Answer = oneshot::Sender<Bytes>;

/// Asks the cluster's DNS. Cheap to clone.
#[derive(Clone)]
pub struct Questions(mpsc::Sender<(Bytes, Answer)>);

impl Questions {
    /// `gateway` yields the connection to the gateway of the moment. Runs until all clones are dropped.
    pub fn start(gateway: impl AsyncFn() -> Option<Connection> + 'static) -> Self {
        let (sender, asked) = mpsc::channel(64);
        tokio::task::spawn_local(run(asked, gateway));
        Self(sender)
    }

    /// One message in, one out, neither with a length prefix.
    ///
    /// # Errors
    /// There is no gateway, or the stream ended before the answer came.
    pub async fn ask(&self, query: Bytes) -> anyhow::Result<Bytes> {
        anyhow::ensure!((12..=usize::from(u16::MAX)).contains(&query.len()), "no DNS message");
        let (sender, answer) = oneshot::channel();
        self.0.send((query, sender)).await?;
        answer.await.map_err(|_| anyhow::anyhow!("no way to the cluster's DNS at the moment"))
    }
}

/// Questions on their way: our id → the asker's id, when, and where the answer goes. Askers choose ids without knowing
/// of each other, so they are replaced.
#[derive(Default)]
struct Waiting {
    by_id: HashMap<u16, ([u8; 2], Instant, Answer)>,
    next: u16,
}

impl Waiting {
    /// The question as it goes out: length, our id, the rest.
    fn put(&mut self, query: &[u8], answer: Answer, now: Instant) -> Option<BytesMut> {
        if self.by_id.len() >= MAX_OPEN {
            self.by_id.retain(|_, (_, since, _)| now.duration_since(*since) < FORGOTTEN);
        }
        let (id, rest) = query.split_first_chunk::<2>()?;
        if self.by_id.len() >= MAX_OPEN {
            return None;
        }
        while self.by_id.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let ours = self.next;
        self.next = self.next.wrapping_add(1);
        let mut framed = BytesMut::with_capacity(query.len() + 2);
        framed.put_u16(u16::try_from(query.len()).ok()?);
        framed.put_u16(ours);
        framed.put_slice(rest);
        self.by_id.insert(ours, (*id, now, answer));
        Some(framed)
    }

    /// Hands an answer to who asked; one that nobody waits for any more goes nowhere.
    fn answer(&mut self, mut message: Vec<u8>) {
        let Some(ours) = message.first_chunk::<2>().map(|id| u16::from_be_bytes(*id)) else { return };
        if let Some((id, _, answer)) = self.by_id.remove(&ours) {
            message[..2].copy_from_slice(&id);
            // The asker may have given up.
            let _ = answer.send(message.into());
        }
    }
}

async fn run(mut asked: mpsc::Receiver<(Bytes, Answer)>, gateway: impl AsyncFn() -> Option<Connection>) {
    while let Some(first) = asked.recv().await {
        let Some(connection) = gateway().await else { continue };
        let dns = Open { kind: Some(open::Kind::Dns(Dns {})) };
        match stream::open(&connection, dns).await {
            Ok((send, recv)) => {
                // Dropping what waits tells the askers; their resolvers ask again.
                if let Err(error) = converse(first, &mut asked, send, recv).await {
                    tracing::debug!(error = format!("{error:#}"), "DNS stream ended");
                }
            }
            Err(error) => tracing::warn!(%error, "no DNS stream to the gateway"),
        }
    }
}

async fn converse(
    first: (Bytes, Answer),
    asked: &mut mpsc::Receiver<(Bytes, Answer)>,
    mut send: SendStream,
    mut recv: RecvStream,
) -> anyhow::Result<()> {
    let mut waiting = Waiting::default();
    let (answers, mut answered) = mpsc::channel::<Vec<u8>>(64);
    // Reading whole messages is not cancel-safe: it has its own task, which ends with the stream.
    let reading = tokio::task::spawn_local(async move {
        loop {
            let mut length = [0; 2];
            recv.read_exact(&mut length).await?;
            let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
            recv.read_exact(&mut message).await?;
            if answers.send(message).await.is_err() {
                return Ok::<(), quinn::ReadExactError>(());
            }
        }
    });
    let mut next = Some(first);
    loop {
        if let Some((query, answer)) = next.take()
            && let Some(framed) = waiting.put(&query, answer, Instant::now())
        {
            send.write_all(&framed).await?;
        }
        tokio::select! {
            message = answered.recv() => match message {
                Some(message) => waiting.answer(message),
                None => return Ok(reading.await??),
            },
            question = asked.recv() => match question {
                Some(question) => next = Some(question),
                None => {
                    reading.abort();
                    return Ok(());
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(id: u16, rest: &[u8]) -> Vec<u8> {
        [&id.to_be_bytes()[..], rest].concat()
    }

    #[test]
    fn two_askers_with_the_same_id_each_get_their_own_answer() {
        let mut waiting = Waiting::default();
        let now = Instant::now();
        let (one, mut first) = oneshot::channel();
        let (two, mut second) = oneshot::channel();
        let a = waiting.put(&query(7, b"one"), one, now).unwrap();
        let b = waiting.put(&query(7, b"two"), two, now).unwrap();
        assert_eq!(&a[..2], &[0, 5], "length prefix");
        assert_ne!(a[2..4], b[2..4]);
        waiting.answer([&b[2..4], b"B"].concat());
        waiting.answer([&a[2..4], b"A"].concat());
        assert_eq!(&first.try_recv().unwrap()[..], query(7, b"A"));
        assert_eq!(&second.try_recv().unwrap()[..], query(7, b"B"));
        waiting.answer([&a[2..4], b"again"].concat());
        waiting.answer(vec![1]);
    }

    #[test]
    fn open_questions_are_bounded_and_old_ones_make_room() {
        let mut waiting = Waiting::default();
        let now = Instant::now();
        for _ in 0..MAX_OPEN {
            assert!(waiting.put(&query(1, b"x"), oneshot::channel().0, now).is_some());
        }
        assert!(waiting.put(&query(1, b"x"), oneshot::channel().0, now).is_none());
        assert!(waiting.put(&query(1, b"x"), oneshot::channel().0, now + FORGOTTEN).is_some());
        assert_eq!(waiting.by_id.len(), 1);
    }
}
