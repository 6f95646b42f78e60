//! The watches that keep [`World`] up to date.

use std::collections::HashSet;
use std::fmt::Debug;
use std::sync::Arc;

use anyhow::Context as _;
use forkd_api::{Fork, ForkTarget, SYSTEM_NAMESPACE};
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod, Service};
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::api::ListParams;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::view::{NodeView, PodView, ServiceView};
use super::world::{Watched, World};

/// Name of the ConfigMap with which `forkd uninstall` tells all agents to go.
pub const RETIRE: &str = "forkd-retire";

/// Starts all watches on `tasks` and returns once each has seen everything that there is.
///
/// # Errors
/// If the API server cannot be asked which kinds it knows, or a watch ends.
pub async fn start(client: &Client, world: &Arc<World>, tasks: &mut JoinSet<()>) -> anyhow::Result<()> {
    let mut synced = vec![
        feed(Api::<Pod>::all(client.clone()), world, PodView::of, tasks),
        feed(Api::<Service>::all(client.clone()), world, ServiceView::of, tasks),
        feed(Api::<Node>::all(client.clone()), world, NodeView::of, tasks),
        feed(Api::<Fork>::all(client.clone()), world, without_managers, tasks),
        feed(Api::<ForkTarget>::all(client.clone()), world, without_managers, tasks),
        retirement(client, world, tasks),
    ];
    let cidrs = Api::<ServiceCIDR>::all(client.clone());
    match cidrs.list_metadata(&ListParams::default().limit(1)).await {
        Ok(_) => synced.push(feed(cidrs, world, service_cidr, tasks)),
        // Before Kubernetes 1.33 there is no such kind; the ranges are then guessed from the Services there are.
        Err(kube::Error::Api(status)) if status.code == 404 => {}
        Err(error) => return Err(error).context("list ServiceCIDRs"),
    }
    for done in synced {
        done.await.context("a watch ended before it began")?;
    }
    Ok(())
}

/// Managed fields are half of an object, and nobody here reads them.
fn without_managers<K: Resource + Clone>(object: &K) -> K {
    let mut object = object.clone();
    object.meta_mut().managed_fields = None;
    object
}

fn service_cidr(object: &ServiceCIDR) -> Vec<String> {
    object.spec.as_ref().and_then(|spec| spec.cidrs.clone()).unwrap_or_default()
}

/// Keeps one kind up to date. The receiver hears when the first listing is complete.
fn feed<K, V>(
    api: Api<K>,
    world: &Arc<World>,
    view: fn(&K) -> V,
    tasks: &mut JoinSet<()>,
) -> oneshot::Receiver<()>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
    V: Watched + Send + Sync + 'static,
{
    let world = Arc::clone(world);
    let (done, synced) = oneshot::channel();
    tasks.spawn(async move {
        let mut done = Some(done);
        let mut seen = HashSet::new();
        let mut events = watcher(api, watcher::Config::default()).default_backoff().boxed();
        let key = |object: &K| (object.namespace().unwrap_or_default(), object.name_any());
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Init) => seen.clear(),
                Ok(Event::InitApply(object)) => {
                    let key = key(&object);
                    world.set(&key.0, &key.1, Some(view(&object)));
                    seen.insert(key);
                }
                Ok(Event::InitDone) => {
                    world.retain::<V>(&seen);
                    seen = HashSet::new();
                    // Whoever waited may have given up: then nobody needs to know.
                    done.take().map(|done| done.send(()));
                }
                Ok(Event::Apply(object)) => {
                    let key = key(&object);
                    world.set(&key.0, &key.1, Some(view(&object)));
                }
                Ok(Event::Delete(object)) => {
                    let key = key(&object);
                    world.set::<V>(&key.0, &key.1, None);
                }
                Err(error) => tracing::warn!(kind = %K::kind(&()), %error, "watch interrupted, trying again"),
            }
        }
    });
    synced
}

/// Watches for the ConfigMap [`RETIRE`].
fn retirement(client: &Client, world: &Arc<World>, tasks: &mut JoinSet<()>) -> oneshot::Receiver<()> {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), SYSTEM_NAMESPACE);
    let world = Arc::clone(world);
    let (done, synced) = oneshot::channel();
    tasks.spawn(async move {
        let mut done = Some(done);
        let mut found = false;
        let config = watcher::Config::default().fields(&format!("metadata.name={RETIRE}"));
        let mut events = watcher(api, config).default_backoff().boxed();
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Init) => found = false,
                Ok(Event::InitApply(_)) => found = true,
                Ok(Event::InitDone) => {
                    world.set_retiring(found);
                    done.take().map(|done| done.send(()));
                }
                Ok(Event::Apply(_)) => world.set_retiring(true),
                Ok(Event::Delete(_)) => world.set_retiring(false),
                Err(error) => tracing::warn!(kind = "ConfigMap", %error, "watch interrupted, trying again"),
            }
        }
    });
    synced
}
