//! The laptop's data plane in one place: the TUN, the flows, DNS, and the streams they are joined to. All of it runs on
//! one thread (a tokio `LocalSet`): a packet meets no lock, no channel and no other thread.

mod pump;
mod resolve;
pub mod stream;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::task::Waker;
use std::time::Instant;

use forkd_core::dns::Zones;
use forkd_core::flow::{self, Event, FRAME_MAX, FlowId, Flows, Pair};
use forkd_wire::tunnel::Outcome;
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinHandle};

use crate::tun::Tun;
use pump::Pump;
pub use pump::{Ended, Finished};
use stream::{Dialer, Refused};

/// Packets read at a time before streams get their turn.
const BATCH: usize = 16;
/// The port of DNS.
const DNS_PORT: u16 = 53;

/// Settings of [`LaptopNet`].
#[derive(Clone, Debug)]
pub struct NetConfig {
    /// MTU of the TUN, bytes.
    pub mtu: u16,
    /// The address whose port 53 answers DNS, over UDP and TCP: the cluster's own DNS service.
    pub dns: IpAddr,
    /// Which names are the cluster's.
    pub zones: Zones,
    /// Who answers all others: what [`set_dns`](crate::helper::HelperClient::set_dns) returned. Without any, they are
    /// answered SERVFAIL.
    pub upstream: Vec<SocketAddr>,
    /// Flows at a time.
    pub max_flows: usize,
}

/// One flow, for `forkd status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowInfo {
    /// The two ends.
    pub pair: Pair,
    /// The cluster has answered the dial.
    pub connected: bool,
    /// When the SYN came.
    pub since: Instant,
}

/// The running data plane; stops when dropped, with a reset for each open flow.
pub struct LaptopNet {
    shared: Rc<Shared>,
    reader: JoinHandle<io::Result<()>>,
}

/// What all tasks of the thread share.
struct Shared {
    plane: Rc<RefCell<Plane>>,
    dialer: Rc<dyn Dialer>,
    zones: RefCell<Zones>,
    upstream: RefCell<Vec<SocketAddr>>,
    tasks: RefCell<HashMap<FlowId, (FlowInfo, AbortHandle)>>,
    dns: SocketAddr,
}

/// Flows and the TUN they send to.
struct Plane {
    flows: Flows,
    tun: Tun,
    wakers: HashMap<FlowId, Waker>,
    /// Until when the reader sleeps at most; moved earlier by `rearm`.
    alarm: Cell<Option<Instant>>,
    earlier: Rc<Notify>,
}

impl Plane {
    fn wake_by(&mut self, id: FlowId, waker: &Waker) {
        match self.wakers.get_mut(&id) {
            Some(known) => known.clone_from(waker),
            None => drop(self.wakers.insert(id, waker.clone())),
        }
    }

    /// Tells the reader about a deadline that came to lie before the one it sleeps for.
    fn rearm(&self) {
        if let Some((at, _)) = self.flows.poll_timeout()
            && self.alarm.get().is_none_or(|alarm| at < alarm)
        {
            self.alarm.set(Some(at));
            self.earlier.notify_one();
        }
    }
}

impl LaptopNet {
    /// Starts on the current thread's `LocalSet`, with the TUN that the helper made.
    ///
    /// # Errors
    /// The descriptor cannot be polled, or the system has no random numbers.
    pub fn start(tun: OwnedFd, config: NetConfig, dialer: Rc<dyn Dialer>) -> io::Result<Self> {
        let dns = SocketAddr::new(config.dns, DNS_PORT);
        let settings = flow::Config {
            mtu: config.mtu,
            ring: flow::RING,
            max_flows: config.max_flows,
            dns: Some(dns),
            seed: random()?,
        };
        let plane = Rc::new(RefCell::new(Plane {
            flows: Flows::new(settings, Instant::now()),
            tun: Tun::new(tun)?,
            wakers: HashMap::new(),
            alarm: Cell::new(None),
            earlier: Rc::default(),
        }));
        let shared = Rc::new(Shared {
            plane,
            dialer,
            zones: RefCell::new(config.zones),
            upstream: RefCell::new(config.upstream),
            tasks: RefCell::default(),
            dns,
        });
        let reader = tokio::task::spawn_local(shared.clone().run());
        Ok(Self { shared, reader })
    }

    /// Waits until the data plane stops by itself: the TUN is gone.
    ///
    /// # Errors
    /// What reading the TUN ran into.
    pub async fn stopped(&mut self) -> io::Result<()> {
        (&mut self.reader).await.map_err(io::Error::other)?
    }

    /// Open flows, in no particular order.
    pub fn flows(&self) -> Vec<FlowInfo> {
        self.shared.tasks.borrow().values().map(|(info, _)| info.clone()).collect()
    }

    /// Packets so far.
    pub fn counters(&self) -> flow::Counters {
        self.shared.plane.borrow().flows.counters()
    }

    /// Sends names elsewhere from here on, e.g. after the host's resolver or the cluster's ranges have changed.
    pub fn set_names(&self, zones: Zones, upstream: Vec<SocketAddr>) {
        *self.shared.zones.borrow_mut() = zones;
        *self.shared.upstream.borrow_mut() = upstream;
    }
}

impl Drop for LaptopNet {
    fn drop(&mut self) {
        self.reader.abort();
        let tasks = std::mem::take(&mut *self.shared.tasks.borrow_mut());
        let plane = &mut *self.shared.plane.borrow_mut();
        for (id, (_, task)) in tasks {
            task.abort();
            plane.flows.abort(id);
            plane.flows.release(id, Instant::now(), &mut plane.tun);
        }
    }
}

impl Shared {
    /// Reads packets and keeps time until the TUN is gone.
    async fn run(self: Rc<Self>) -> io::Result<()> {
        let mut frame = vec![0; FRAME_MAX];
        let earlier = self.plane.borrow().earlier.clone();
        loop {
            let alarm = self.plane.borrow().alarm.get();
            let alarm = async {
                match alarm {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                ready = readable(&self.plane) => ready?,
                () = alarm => {}
                () = earlier.notified() => continue,
            }
            self.batch(&mut frame)?;
            tokio::task::yield_now().await;
        }
    }

    /// Up to [`BATCH`] packets and whatever is due, then the events of both.
    fn batch(self: &Rc<Self>, frame: &mut [u8]) -> io::Result<()> {
        let now = Instant::now();
        {
            let plane = &mut *self.plane.borrow_mut();
            for _ in 0..BATCH {
                match plane.tun.read(frame) {
                    Ok(length) => {
                        let verdict = plane.flows.packet(&frame[..length], now, &mut plane.tun);
                        tracing::trace!(length, ?verdict, "packet");
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
            }
            plane.flows.timeout(now, &mut plane.tun);
            plane.alarm.set(plane.flows.poll_timeout().map(|(at, _)| at));
        }
        loop {
            let event = self.plane.borrow_mut().flows.poll_event();
            match event {
                Some(Event::Ready(id)) => {
                    if let Some(waker) = self.plane.borrow().wakers.get(&id) {
                        waker.wake_by_ref();
                    }
                }
                Some(Event::Opened(id, pair)) => self.open(id, pair),
                Some(Event::Query(pair, message)) => {
                    tokio::task::spawn_local(self.clone().answer(pair, message));
                }
                None => return Ok(()),
            }
        }
    }

    fn open(self: &Rc<Self>, id: FlowId, pair: Pair) {
        let info = FlowInfo { pair, connected: false, since: Instant::now() };
        let task = tokio::task::spawn_local(self.clone().flow(id, pair));
        self.tasks.borrow_mut().insert(id, (info, task.abort_handle()));
    }

    /// One flow from its dial to its end.
    async fn flow(self: Rc<Self>, id: FlowId, pair: Pair) {
        let _cleanup = Cleanup { shared: self.clone(), id };
        let dns = pair.dst == self.dns;
        // The future of this task is what an idle flow costs: what the dial needed is boxed, and gone by then.
        let dialed = if dns { Ok(None) } else { self.dialer.dial(pair.dst).await.map(Some) };
        let outcome = dialed.as_ref().map_or_else(|refused| refused.outcome, |_| Outcome::Ok);
        let alive = {
            let plane = &mut *self.plane.borrow_mut();
            let alive = plane.flows.dialed(id, outcome, Instant::now(), &mut plane.tun);
            plane.rearm();
            alive
        };
        let stream = match dialed {
            Ok(stream) if alive => stream,
            Ok(_) => return tracing::debug!(src = %pair.src, dst = %pair.dst, "flow given up while dialing"),
            Err(Refused { outcome, reason }) => {
                return tracing::debug!(src = %pair.src, dst = %pair.dst, ?outcome, reason, "flow refused");
            }
        };
        if let Some((info, _)) = self.tasks.borrow_mut().get_mut(&id) {
            info.connected = true;
        }
        let Some(stream) = stream else {
            let (up, down) = self.dns_flow(id).await;
            return tracing::debug!(src = %pair.src, up, down, "DNS connection ended");
        };
        let Finished { up, down, ended } = Pump::new(self.plane.clone(), id, stream).run().await;
        tracing::debug!(src = %pair.src, dst = %pair.dst, up, down, ?ended, "flow ended");
    }
}

/// Ends a flow with its task, however the task ends: a panic in one must not leave its application waiting.
struct Cleanup {
    shared: Rc<Shared>,
    id: FlowId,
}

impl Drop for Cleanup {
    fn drop(&mut self) {
        self.shared.tasks.borrow_mut().remove(&self.id);
        let plane = &mut *self.shared.plane.borrow_mut();
        plane.wakers.remove(&self.id);
        if std::thread::panicking() {
            plane.flows.abort(self.id);
        }
        plane.flows.release(self.id, Instant::now(), &mut plane.tun);
        plane.rearm();
    }
}

/// Waits for a packet.
async fn readable(plane: &Rc<RefCell<Plane>>) -> io::Result<()> {
    std::future::poll_fn(|cx| plane.borrow().tun.poll_readable(cx)).await
}

fn random() -> io::Result<u64> {
    use std::io::Read;
    let mut seed = [0; 8];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut seed)?;
    Ok(u64::from_ne_bytes(seed))
}
