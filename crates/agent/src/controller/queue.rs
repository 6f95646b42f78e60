//! What is to be looked at again, and when.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;
use tokio::time::Instant;

/// What one reconciliation is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    /// Addresses of relays, ranges of the cluster: what gateways are told.
    Cluster,
    /// The status of a Fork.
    Fork(String),
    /// All targets of a namespace, and the agents in its pods: claims and agents are shared between targets.
    Namespace(String),
}

/// Keys with the time at which they are due. A key is here at most once, at its earliest time, so it is bounded by
/// what there is in the cluster.
#[derive(Debug, Default)]
pub struct Queue {
    due: Mutex<BTreeMap<Key, Instant>>,
    changed: Notify,
}

impl Queue {
    /// Look at it as soon as possible.
    pub fn mark(&self, key: Key) {
        self.mark_at(key, Instant::now());
    }

    /// Look at it at `when` at the latest.
    pub fn mark_at(&self, key: Key, when: Instant) {
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = due.entry(key).or_insert(when);
        *entry = (*entry).min(when);
        drop(due);
        self.changed.notify_one();
    }

    /// Takes one that is due and for which `free` holds; waits for it.
    pub async fn next(&self, free: impl Fn(&Key) -> bool) -> Key {
        loop {
            let wake = {
                let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
                let first = due.iter().filter(|(key, _)| free(key)).min_by_key(|(_, when)| **when);
                match first.map(|(key, when)| (key.clone(), *when)) {
                    Some((key, when)) if when <= Instant::now() => {
                        due.remove(&key);
                        return key;
                    }
                    Some((_, when)) => Some(when),
                    None => None,
                }
            };
            match wake {
                Some(when) => tokio::select! {
                    () = tokio::time::sleep_until(when) => {}
                    () = self.changed.notified() => {}
                },
                None => self.changed.notified().await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_key_comes_once_at_its_earliest_time() {
        let queue = Queue::default();
        let key = Key::Fork("alice".to_owned());
        let start = Instant::now();
        queue.mark_at(key.clone(), start + Duration::from_secs(60));
        queue.mark_at(key.clone(), start + Duration::from_secs(5));
        queue.mark_at(key.clone(), start + Duration::from_secs(30));
        assert_eq!(queue.next(|_| true).await, key);
        assert_eq!(start.elapsed().as_secs(), 5);
        assert!(queue.due.lock().unwrap().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_in_work_waits_and_does_not_hold_up_others() {
        let queue = Queue::default();
        let (busy, other) = (Key::Namespace("busy".to_owned()), Key::Namespace("other".to_owned()));
        queue.mark(busy.clone());
        queue.mark(other.clone());
        assert_eq!(queue.next(|key| *key != busy).await, other);
        assert_eq!(queue.next(|_| true).await, busy);
    }
}
