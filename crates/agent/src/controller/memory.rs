//! What the reconciler remembers of a namespace between two looks at it. All of it may be lost: it then only asks once more.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use tokio::time::Instant;

use super::plan::Plan;
use super::reconcile::RETRY;
use super::view::{PodView, Purpose};

/// First wait after an agent was refused; doubles up to ten minutes. Somebody has to change a policy meanwhile.
const REFUSED: Duration = Duration::from_secs(30);

/// An agent that the API server did not let in.
#[derive(Clone, Debug)]
pub struct Refusal {
    pub forbidden: bool,
    pub message: String,
    pub times: u32,
    pub until: Instant,
}

/// What is remembered of a namespace between two looks at it.
#[derive(Default)]
pub struct Memory {
    /// By pod uid: containers that were added, until the watch shows them.
    pub pending: HashMap<String, BTreeSet<String>>,
    /// By pod uid and purpose.
    pub refused: HashMap<(String, Purpose), Refusal>,
}

impl Memory {
    /// Forgets pods that are gone, and containers that the watch has shown.
    pub fn clean(&mut self, plan: &Plan) {
        let pods: HashMap<&str, &PodView> = plan
            .targets
            .iter()
            .flat_map(|target| &target.pods)
            .map(|planned| (planned.pod.uid.as_str(), planned.pod.as_ref()))
            .collect();
        self.pending.retain(|uid, names| {
            let Some(pod) = pods.get(uid.as_str()) else { return false };
            names.retain(|name| !pod.agents.iter().any(|agent| agent.name == *name));
            !names.is_empty()
        });
        self.refused.retain(|(uid, _), _| pods.contains_key(uid.as_str()));
    }

    /// What came of adding a container.
    pub fn note(&mut self, pod: &PodView, purpose: Purpose, name: String, outcome: Result<(), kube::Error>) {
        let key = (pod.uid.clone(), purpose);
        let (code, message) = match outcome {
            Ok(()) => {
                self.refused.remove(&key);
                self.pending.entry(pod.uid.clone()).or_default().insert(name);
                return;
            }
            // The pod is gone, or another one has its name: the watch will say so.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => return,
            Err(kube::Error::Api(status)) => (status.code, status.message.clone()),
            Err(error) => (0, error.to_string()),
        };
        tracing::warn!(namespace = pod.namespace, pod = pod.name, code, message, "an agent was not let in");
        let times = self.refused.get(&key).map_or(0, |before| before.times) + 1;
        let wait = REFUSED.saturating_mul(1 << (times - 1).min(8)).min(Duration::from_secs(600));
        let forbidden = (400..500).contains(&code) && code != 429;
        // What is no refusal (a broken connection, a busy API server) passes sooner.
        let wait = if forbidden { wait } else { RETRY };
        self.refused.insert(key, Refusal { forbidden, message, times, until: Instant::now() + wait });
    }
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    fn refusal(code: u16) -> Result<(), kube::Error> {
        Err(kube::Error::Api(Status { code, message: "no".to_owned(), ..Status::default() }.boxed()))
    }

    fn pod() -> PodView {
        PodView { uid: "uid".to_owned(), ..PodView::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_asked_about_again_after_a_growing_wait_and_other_errors_soon() {
        let mut memory = Memory::default();
        let key = ("uid".to_owned(), Purpose::Pod);
        for seconds in [30, 60, 120, 240, 480, 600, 600] {
            memory.note(&pod(), Purpose::Pod, String::new(), refusal(403));
            let refused = &memory.refused[&key];
            assert!(refused.forbidden);
            assert_eq!(refused.until - Instant::now(), Duration::from_secs(seconds));
        }
        memory.note(&pod(), Purpose::Pod, String::new(), refusal(500));
        assert!(!memory.refused[&key].forbidden);
        assert_eq!(memory.refused[&key].until - Instant::now(), RETRY);
        memory.note(&pod(), Purpose::Pod, "forkd-agent-1".to_owned(), Ok(()));
        assert!(memory.refused.is_empty());
        assert!(memory.pending["uid"].contains("forkd-agent-1"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_is_gone_was_not_refused_and_is_forgotten() {
        let mut memory = Memory::default();
        memory.note(&pod(), Purpose::Pod, String::new(), refusal(404));
        assert!(memory.refused.is_empty());
        memory.note(&pod(), Purpose::Pod, String::new(), refusal(403));
        memory.note(&pod(), Purpose::Env, "forkd-env-1".to_owned(), Ok(()));
        memory.clean(&Plan::default());
        assert!(memory.refused.is_empty() && memory.pending.is_empty());
    }
}
