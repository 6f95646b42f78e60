//! How much may be in flight: what the path carries in its shortest round trip, plus an allowance for jitter.
//!
//! A byte pipe loses nothing, so controllers that wait for loss fill every buffer on the way (hundreds of
//! milliseconds). This one follows the idea of BBR (draft-cardwell-iccrg-bbr-congestion-control), without its state
//! machine: largest delivery rate of the last rounds × smallest round trip of the last seconds. Loss does not count;
//! it shows as a lower delivery rate.

use std::any::Any;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory};
use quinn_proto::RttEstimator;

/// Rounds over which the largest delivery rate counts.
const RATE_ROUNDS: usize = 12;
/// How long a smallest round trip counts.
const MIN_RTT_LIFE: Duration = Duration::from_secs(10);
/// Doubles the rate each round until it stops growing (2/ln 2, as in BBR).
const STARTUP_GAIN: f64 = 2.9;
/// After startup, by round: a little more to find out whether there is more, then less to drain, then steady.
const CYCLE: [f64; 8] = [1.6, 0.9, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2];
/// Below this round trip no queue worth the name can build up, and the window must not bind.
const NEAR: Duration = Duration::from_millis(2);
const NEAR_FLOOR: u64 = 1 << 20;
const FAR_FLOOR: u64 = 64 * 1024;
/// Until the first rate is known: RFC 9002 would start with 14 KiB, which costs round trips on every path that
/// forkd's packets take.
const INITIAL: u64 = 128 * 1024;
/// Upper bound of the allowance for jitter.
const MAX_JITTER: Duration = Duration::from_millis(60);
/// Shortest span over which a rate is taken.
const MIN_ROUND: Duration = Duration::from_millis(1);

/// Counts the paths that a socket has switched to. What was learned on one path says nothing about the next.
#[derive(Clone, Debug, Default)]
pub struct Generation(Arc<AtomicU64>);

impl Generation {
    /// The packets take another path from here on.
    pub fn bump(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn load(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Makes a [`Bandwidth`] for each connection.
#[derive(Clone, Debug)]
pub struct BandwidthConfig {
    generation: Generation,
}

impl BandwidthConfig {
    /// All connections over one socket share its generation.
    pub fn new(generation: Generation) -> Self {
        Self { generation }
    }
}

impl ControllerFactory for BandwidthConfig {
    fn build(self: Arc<Self>, now: Instant, _mtu: u16) -> Box<dyn Controller> {
        Box::new(Bandwidth::new(self.generation.clone(), now))
    }
}

/// The controller of one connection.
#[derive(Clone, Debug)]
pub struct Bandwidth {
    generation: Generation,
    seen: u64,
    /// Acknowledgements of packets from before do not count: they took another path.
    since: Instant,
    /// Bytes per second, by round, newest last.
    rates: VecDeque<f64>,
    /// Smallest round trip and when it was seen.
    min_rtt: Option<(Duration, Instant)>,
    /// Mean deviation of round trips from the smallest, smoothed: what the path does to packets by itself.
    jitter: Duration,
    round: Round,
    /// Best rate so far and rounds without a better one, until three have passed; `None` after startup.
    startup: Option<(f64, u8)>,
    cycle: usize,
    window: u64,
    /// Bytes that are sent and neither acknowledged nor lost; exact after each batch of acknowledgements.
    in_flight: u64,
    /// Of these, what was sent before the last restart. It is probably lost with its path, which nobody knows before
    /// something newer is acknowledged: so it must not keep newer packets from being sent.
    stale: u64,
}

#[derive(Clone, Debug)]
struct Round {
    started: Instant,
    acked: u64,
    /// The application had nothing more to send in this round: its rate is a lower bound.
    app_limited: bool,
}

impl Bandwidth {
    fn new(generation: Generation, now: Instant) -> Self {
        let seen = generation.load();
        Self {
            generation,
            seen,
            since: now,
            rates: VecDeque::with_capacity(RATE_ROUNDS),
            min_rtt: None,
            jitter: Duration::ZERO,
            round: Round { started: now, acked: 0, app_limited: false },
            startup: Some((0.0, 0)),
            cycle: 0,
            window: INITIAL,
            in_flight: 0,
            stale: 0,
        }
    }

    fn restart(&mut self, now: Instant) {
        // Ack-only packets are in the sum and never in flight: what the window did not allow is not there.
        let in_flight = self.in_flight.min(self.window + self.stale);
        *self = Self { in_flight, stale: in_flight, ..Self::new(self.generation.clone(), now) };
    }

    fn follow_path(&mut self, now: Instant) {
        if self.generation.load() != self.seen {
            self.restart(now);
        }
    }

    fn max_rate(&self) -> f64 {
        self.rates.iter().copied().fold(0.0, f64::max)
    }

    fn acked(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, smoothed: Duration) {
        self.follow_path(now);
        self.in_flight = self.in_flight.saturating_sub(bytes);
        if sent < self.since {
            self.stale = self.stale.saturating_sub(bytes);
            return;
        }
        let sample = now.saturating_duration_since(sent);
        let smallest = match self.min_rtt {
            Some((least, at)) if sample > least && now.saturating_duration_since(at) < MIN_RTT_LIFE => least,
            _ => {
                self.min_rtt = Some((sample, now));
                sample
            }
        };
        // Only round trips that our own queue does not explain count as jitter: when little is in flight. The
        // estimator's value, not the sample: a lone packet is acknowledged up to 25 ms late (RFC 9000 §18.2).
        if app_limited {
            self.jitter = (self.jitter * 15 + smoothed.saturating_sub(smallest).min(MAX_JITTER)) / 16;
        }
        self.round.acked += bytes;
        self.round.app_limited |= app_limited;
        self.end_round(now, smoothed);
    }

    fn end_round(&mut self, now: Instant, rtt: Duration) {
        let span = now.saturating_duration_since(self.round.started);
        if span < rtt.max(MIN_ROUND) || self.round.acked == 0 {
            return;
        }
        let rate = self.round.acked as f64 / span.as_secs_f64();
        let app_limited = self.round.app_limited;
        self.round = Round { started: now, acked: 0, app_limited: false };
        if app_limited && rate <= self.max_rate() {
            return;
        }
        if self.rates.len() == RATE_ROUNDS {
            self.rates.pop_front();
        }
        self.rates.push_back(rate);
        match &mut self.startup {
            Some((best, _)) if rate > *best * 1.25 => self.startup = Some((rate, 0)),
            Some(_) if app_limited => {}
            Some((_, rounds)) if *rounds < 2 => *rounds += 1,
            Some(_) => self.startup = None,
            None => self.cycle = (self.cycle + 1) % CYCLE.len(),
        }
        self.update_window();
    }

    fn update_window(&mut self) {
        let Some((min_rtt, _)) = self.min_rtt else { return };
        let gain = if self.startup.is_some() { STARTUP_GAIN } else { CYCLE[self.cycle] };
        let allowance = self.jitter.min(MAX_JITTER);
        let target = self.max_rate() * (gain * min_rtt.as_secs_f64() + allowance.as_secs_f64());
        let floor = if min_rtt < NEAR { NEAR_FLOOR } else { FAR_FLOOR };
        // Startup has not found the rate yet: it may not bind before it has.
        let floor = if self.startup.is_some() { floor.max(INITIAL) } else { floor };
        self.window = (target as u64).max(floor);
    }
}

impl Controller for Bandwidth {
    fn on_sent(&mut self, now: Instant, bytes: u64, _last_packet_number: u64) {
        self.follow_path(now);
        self.in_flight += bytes;
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        self.acked(now, sent, bytes, app_limited, rtt.get());
    }

    fn on_end_acks(&mut self, _now: Instant, in_flight: u64, _app_limited: bool, _largest: Option<u64>) {
        self.in_flight = in_flight;
        self.stale = self.stale.min(in_flight);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost: u64,
    ) {
        self.follow_path(now);
        self.in_flight = self.in_flight.saturating_sub(lost);
        self.stale = self.stale.min(self.in_flight);
        if sent < self.since {
            self.stale = self.stale.saturating_sub(lost);
        } else if is_persistent_congestion {
            // Everything sent for a long time is lost: whatever path this is, it is not the one that was measured.
            self.restart(now);
        }
    }

    fn on_mtu_update(&mut self, _new_mtu: u16) {}

    fn window(&self) -> u64 {
        if self.generation.load() == self.seen {
            self.window + self.stale
        } else {
            // Nothing was sent or acknowledged since the switch.
            self.in_flight + INITIAL
        }
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        INITIAL
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKET: u64 = 1400;

    /// A bottleneck of `rate` bytes per second with an endless queue, `rtt` away; a sender with endless data.
    struct Link {
        controller: Bandwidth,
        now: Instant,
        rate: f64,
        rtt: Duration,
        busy_until: Instant,
        flying: VecDeque<(Instant, Instant)>,
        smoothed: Duration,
    }

    impl Link {
        fn new(rate: f64, rtt: Duration) -> Self {
            let now = Instant::now();
            let controller = Bandwidth::new(Generation::default(), now);
            Self { controller, now, rate, rtt, busy_until: now, flying: VecDeque::new(), smoothed: rtt }
        }

        fn send(&mut self) {
            while (self.flying.len() as u64 + 1) * PACKET <= self.controller.window() {
                self.controller.on_sent(self.now, PACKET, 0);
                let start = self.busy_until.max(self.now);
                self.busy_until = start + Duration::from_secs_f64(PACKET as f64 / self.rate);
                self.flying.push_back((self.now, self.busy_until + self.rtt));
            }
        }

        /// Goodput in bytes per second and the mean round trip over `span`.
        fn run(&mut self, span: Duration) -> (f64, Duration) {
            let end = self.now + span;
            let (mut acked, mut sum) = (0_u64, Duration::ZERO);
            self.send();
            while let Some((sent, at)) = self.flying.pop_front() {
                if at > end {
                    self.flying.push_front((sent, at));
                    break;
                }
                self.now = at;
                self.smoothed = (self.smoothed * 7 + (at - sent)) / 8;
                self.controller.acked(at, sent, PACKET, false, self.smoothed);
                self.controller.on_end_acks(at, self.flying.len() as u64 * PACKET, false, None);
                acked += 1;
                sum += at - sent;
                self.send();
            }
            self.now = end;
            ((acked * PACKET) as f64 / span.as_secs_f64(), sum / u32::try_from(acked.max(1)).unwrap())
        }

        /// Everything in flight is lost, and the path is another.
        fn switch(&mut self, rate: f64, rtt: Duration) {
            (self.rate, self.rtt, self.busy_until) = (rate, rtt, self.now);
            let lost = self.flying.len() as u64 * PACKET;
            let sent = self.now;
            self.controller.generation.bump();
            assert!(self.controller.window() >= lost + INITIAL, "what is lost must not block what comes");
            self.flying.clear();
            self.controller.on_congestion_event(self.now + rtt, sent, false, lost);
        }
    }

    const MBIT: f64 = 125_000.0;

    #[test]
    fn a_link_is_filled_and_its_queue_stays_short() {
        for (mbit, ms) in [(200.0, 20), (50.0, 60), (1000.0, 5), (10.0, 100)] {
            let rtt = Duration::from_millis(ms);
            let mut link = Link::new(mbit * MBIT, rtt);
            link.run(Duration::from_secs(3));
            let (rate, mean) = link.run(Duration::from_secs(5));
            assert!(rate > 0.93 * mbit * MBIT, "{mbit} Mbit/s {ms} ms: {} Mbit/s", rate / MBIT);
            assert!(mean < rtt.mul_f64(1.5), "{mbit} Mbit/s {ms} ms: {mean:?}");
        }
    }

    #[test]
    fn a_near_path_is_not_held_back_by_what_a_far_one_taught_nor_the_other_way_round() {
        let (near, far) = (Duration::from_micros(100), Duration::from_millis(20));
        let mut link = Link::new(3000.0 * MBIT, near);
        link.run(Duration::from_secs(1));
        link.switch(200.0 * MBIT, far);
        link.run(Duration::from_millis(500));
        let (rate, mean) = link.run(Duration::from_secs(1));
        assert!(rate > 180.0 * MBIT, "{} Mbit/s", rate / MBIT);
        assert!(mean < far.mul_f64(1.6), "{mean:?}");
        link.switch(3000.0 * MBIT, near);
        link.run(Duration::from_millis(100));
        assert!(link.run(Duration::from_millis(500)).0 > 2500.0 * MBIT);
    }

    #[test]
    fn the_queue_does_not_creep_up_over_minutes() {
        let rtt = Duration::from_millis(20);
        let mut link = Link::new(100.0 * MBIT, rtt);
        link.run(Duration::from_secs(180));
        let (rate, mean) = link.run(Duration::from_secs(15));
        assert!(rate > 93.0 * MBIT && mean < rtt.mul_f64(1.5), "{} Mbit/s, {mean:?}", rate / MBIT);
    }

    #[test]
    fn a_rate_that_falls_is_followed() {
        let rtt = Duration::from_millis(20);
        let mut link = Link::new(200.0 * MBIT, rtt);
        link.run(Duration::from_secs(2));
        link.rate = 50.0 * MBIT;
        link.run(Duration::from_secs(3));
        let (rate, mean) = link.run(Duration::from_secs(2));
        assert!(rate > 45.0 * MBIT && mean < rtt.mul_f64(1.6), "{} Mbit/s, {mean:?}", rate / MBIT);
    }

    #[test]
    fn an_idle_application_teaches_nothing_about_the_rate() {
        let start = Instant::now();
        let mut controller = Bandwidth::new(Generation::default(), start);
        let rtt = Duration::from_millis(20);
        for n in 1..2000u32 {
            let now = start + rtt * n;
            controller.on_sent(now - rtt, 100, 0);
            controller.acked(now, now - rtt, 100, true, rtt);
            controller.on_end_acks(now, 0, true, None);
        }
        assert!(controller.window() >= FAR_FLOOR);
        assert!(controller.startup.is_some(), "the rate is yet to be found");
    }
}
