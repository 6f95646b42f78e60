//! Which controller leads: the holder of the Lease `forkd-controller`. Only it serves and writes.

use std::time::Duration;

use anyhow::{Context as _, bail};
use forkd_api::SYSTEM_NAMESPACE;
use forkd_api::manifests::MANAGED_BY;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::core::ObjectMeta;
use kube::{Api, Client};
use tokio::time::Instant;

const NAME: &str = "forkd-controller";
/// Who does not renew for so long has lost the lease.
const DURATION: Duration = Duration::from_secs(15);
/// How often the holder renews.
const RENEW: Duration = Duration::from_secs(4);
/// A holder that could not renew for so long stops, well before somebody else may take over.
const GIVE_UP: Duration = Duration::from_secs(10);
/// How often others look whether it is free.
const RETRY: Duration = Duration::from_secs(2);

/// The lease, held.
pub struct Leadership {
    api: Api<Lease>,
    me: String,
    lease: Lease,
    renewed: Instant,
}

/// Waits until this controller leads.
///
/// # Errors
/// If the API server refuses to show or give the lease.
pub async fn acquire(client: &Client, me: &str) -> anyhow::Result<Leadership> {
    let api: Api<Lease> = Api::namespaced(client.clone(), SYSTEM_NAMESPACE);
    // Clocks of machines differ, so what counts is how long the lease has not changed by the own clock.
    let mut observed: Option<(Option<String>, Instant)> = None;
    loop {
        let found = api.get_opt(NAME).await.context("read the Lease forkd-controller")?;
        let taken = match found {
            None => api.create(&PostParams::default(), &mine(Lease::default(), me)).await,
            Some(lease) => {
                let holder =
                    lease.spec.as_ref().and_then(|spec| spec.holder_identity.clone()).unwrap_or_default();
                let version = lease.metadata.resource_version.clone();
                if observed.as_ref().is_none_or(|(seen, _)| *seen != version) {
                    observed = Some((version, Instant::now()));
                }
                let stale = observed.as_ref().is_some_and(|(_, since)| since.elapsed() >= DURATION);
                if !holder.is_empty() && holder != me && !stale {
                    tracing::debug!(%holder, "another controller leads");
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
                api.replace(NAME, &PostParams::default(), &mine(lease, me)).await
            }
        };
        match taken {
            Ok(lease) => {
                tracing::info!(%me, "leading");
                return Ok(Leadership { api, me: me.to_owned(), lease, renewed: Instant::now() });
            }
            // Somebody else was faster.
            Err(kube::Error::Api(status)) if status.code == 409 => tokio::time::sleep(RETRY).await,
            Err(error) => return Err(error).context("take the Lease forkd-controller"),
        }
    }
}

impl Leadership {
    /// Renews for as long as it can.
    ///
    /// # Errors
    /// When leadership is lost: whoever leads must stop at once.
    pub async fn hold(&mut self) -> anyhow::Result<()> {
        loop {
            tokio::time::sleep(RENEW).await;
            let (params, lease) = (PostParams::default(), mine(self.lease.clone(), &self.me));
            let renewed = self.api.replace(NAME, &params, &lease);
            match tokio::time::timeout(RENEW, renewed).await {
                Ok(Ok(lease)) => {
                    self.lease = lease;
                    self.renewed = Instant::now();
                }
                Ok(Err(kube::Error::Api(status))) if status.code == 409 => {
                    // An own write whose answer was lost, or another leader: the object knows.
                    let lease = self.api.get(NAME).await.context("read the Lease forkd-controller")?;
                    let holder = lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref());
                    if holder != Some(&self.me) {
                        bail!("leadership was taken by {}", holder.unwrap_or("nobody"));
                    }
                    self.lease = lease;
                }
                Ok(Err(error)) => tracing::warn!(%error, "renewing the lease failed, trying again"),
                Err(_) => tracing::warn!("renewing the lease takes too long, trying again"),
            }
            if self.renewed.elapsed() > GIVE_UP {
                bail!("leadership was lost: the lease could not be renewed for {} s", GIVE_UP.as_secs());
            }
        }
    }

    /// Gives it back, so that the next one need not wait.
    ///
    /// # Errors
    /// If the API server cannot be reached: the lease then runs out by itself.
    pub async fn release(self) -> anyhow::Result<()> {
        let mut lease = self.lease;
        if let Some(spec) = &mut lease.spec {
            spec.holder_identity = Some(String::new());
        }
        self.api.replace(NAME, &PostParams::default(), &lease).await.context("release the lease")?;
        Ok(())
    }
}

fn mine(mut lease: Lease, me: &str) -> Lease {
    let now = MicroTime(Timestamp::now());
    let old = lease.spec.take().unwrap_or_default();
    let changes_hands = old.holder_identity.as_deref() != Some(me);
    lease.metadata = ObjectMeta {
        name: Some(NAME.to_owned()),
        namespace: Some(SYSTEM_NAMESPACE.to_owned()),
        resource_version: lease.metadata.resource_version,
        labels: Some([(MANAGED_BY.to_owned(), forkd_api::MANAGER.to_owned())].into()),
        ..ObjectMeta::default()
    };
    lease.spec = Some(LeaseSpec {
        holder_identity: Some(me.to_owned()),
        lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
        acquire_time: if changes_hands { Some(now.clone()) } else { old.acquire_time },
        renew_time: Some(now),
        lease_transitions: Some(old.lease_transitions.unwrap_or(0) + i32::from(changes_hands)),
        ..LeaseSpec::default()
    });
    lease
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_counts_its_holders() {
        let first = mine(Lease::default(), "a");
        let spec = first.spec.clone().unwrap();
        assert_eq!((spec.holder_identity.as_deref(), spec.lease_transitions), (Some("a"), Some(1)));
        let renewed = mine(first.clone(), "a").spec.unwrap();
        assert_eq!((renewed.acquire_time, renewed.lease_transitions), (spec.acquire_time, Some(1)));
        assert_eq!(mine(first, "b").spec.unwrap().lease_transitions, Some(2));
    }
}
