//! Upstream HTTP/2 connections of one caller's connection: one to the application, one to each laptop.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use forkd_wire::control::Route;
use h2::client::SendRequest;
use tokio::sync::{Mutex, Notify};
use tokio::task::JoinSet;

use super::{CONNECTION_WINDOW, LAPTOP_WINDOW, MAX_HEADERS, STREAM_WINDOW, STREAMS_AT_FIRST};
use crate::proxy::baseline::{Baseline, Upstream};
use crate::proxy::{Connection, Deliver, DeliverError, sniff};

/// Where the streams of one caller can go.
pub(super) struct Lanes<D: Deliver> {
    pub(super) connection: Connection<D>,
    /// The connection that was dialed while the caller was silent, until the first stream needs it.
    dialed: std::sync::Mutex<Option<Baseline>>,
    baseline: Slot,
    baseline_closed: Notify,
    laptops: std::sync::Mutex<HashMap<LaptopKey, Slot>>,
    drivers: std::sync::Mutex<JoinSet<()>>,
}

/// Target, laptop, owner: when one of them changes, it is another connection.
type LaptopKey = (String, String, String);
type Slot = Arc<Mutex<Option<Lane>>>;

#[derive(Clone)]
struct Lane {
    sender: SendRequest<Bytes>,
    closed: Arc<AtomicBool>,
}

/// Why a stream has no upstream.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoLane {
    #[error("the application refused: {0}")]
    Refused(#[from] io::Error),
    #[error(transparent)]
    Deliver(#[from] DeliverError),
    #[error(transparent)]
    Http2(#[from] h2::Error),
}

impl<D: Deliver> Lanes<D> {
    pub(super) fn new(connection: Connection<D>, dialed: Option<Baseline>) -> Self {
        Self {
            connection,
            dialed: std::sync::Mutex::new(dialed),
            baseline: Slot::default(),
            baseline_closed: Notify::new(),
            laptops: std::sync::Mutex::default(),
            drivers: std::sync::Mutex::default(),
        }
    }

    /// Done when a connection to the application has ended.
    pub(super) async fn baseline_closed(&self) {
        self.baseline_closed.notified().await;
    }

    /// A sender to the application that may open a stream.
    pub(super) async fn baseline(self: &Arc<Self>) -> Result<SendRequest<Bytes>, NoLane> {
        let slot = self.baseline.clone();
        self.ready(&slot, None).await
    }

    /// A sender to the laptop of `route` that may open a stream. Idle connections to targets that are gone end here.
    pub(super) async fn laptop(self: &Arc<Self>, route: &Arc<Route>) -> Result<SendRequest<Bytes>, NoLane> {
        let key = (route.target.clone(), route.laptop.clone(), route.owner.clone());
        let slot = {
            let table = self.connection.table();
            let mut laptops = self.laptops.lock().unwrap_or_else(PoisonError::into_inner);
            laptops.retain(|(target, laptop, owner), _| {
                table.still_holds(
                    self.connection.port(),
                    &Route {
                        target: target.clone(),
                        laptop: laptop.clone(),
                        owner: owner.clone(),
                        ..Route::default()
                    },
                )
            });
            laptops.entry(key).or_default().clone()
        };
        self.ready(&slot, Some(route)).await
    }

    /// The sender in `slot`, connected anew if it is closed or going away.
    async fn ready(
        self: &Arc<Self>,
        slot: &Slot,
        laptop: Option<&Arc<Route>>,
    ) -> Result<SendRequest<Bytes>, NoLane> {
        let kept = {
            let mut slot = slot.lock().await;
            if slot.as_ref().is_none_or(|lane| lane.closed.load(Ordering::Acquire)) {
                *slot = Some(self.open(laptop).await?);
            }
            slot.clone()
        };
        if let Some(lane) = kept {
            // Waits while the other end allows no more streams; fails after its GOAWAY.
            if let Ok(sender) = lane.sender.ready().await {
                return Ok(sender);
            }
            lane.closed.store(true, Ordering::Release);
        }
        let lane = {
            let mut slot = slot.lock().await;
            match &*slot {
                // Somebody else was faster.
                Some(lane) if !lane.closed.load(Ordering::Acquire) => lane.clone(),
                _ => slot.insert(self.open(laptop).await?).clone(),
            }
        };
        Ok(lane.sender.ready().await?)
    }

    /// Connects to the laptop of this route, or to the application.
    async fn open(self: &Arc<Self>, laptop: Option<&Arc<Route>>) -> Result<Lane, NoLane> {
        let baseline = laptop.is_none();
        let (upstream, window) = match laptop {
            Some(route) => (Upstream::Laptop(sniff::deliver(&self.connection, route).await?), LAPTOP_WINDOW),
            None => {
                let dialed = self.dialed.lock().unwrap_or_else(PoisonError::into_inner).take();
                let baseline = match dialed {
                    Some(baseline) => baseline,
                    None => self.connection.shared.counters.own.dial(self.connection.original).await?,
                };
                (Upstream::Baseline(baseline), STREAM_WINDOW)
            }
        };
        let (sender, driver) = h2::client::Builder::new()
            .initial_window_size(window)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(MAX_HEADERS)
            .initial_max_send_streams(STREAMS_AT_FIRST)
            .enable_push(false)
            .handshake(upstream)
            .await?;
        let closed = Arc::new(AtomicBool::new(false));
        let (ended, lanes) = (closed.clone(), Arc::downgrade(self));
        let mut drivers = self.drivers.lock().unwrap_or_else(PoisonError::into_inner);
        while drivers.try_join_next().is_some() {}
        drivers.spawn(async move {
            if let Err(error) = driver.await {
                tracing::debug!(%error, "an upstream HTTP/2 connection");
            }
            ended.store(true, Ordering::Release);
            if let (true, Some(lanes)) = (baseline, lanes.upgrade()) {
                lanes.baseline_closed.notify_one();
            }
        });
        Ok(Lane { sender, closed })
    }
}
