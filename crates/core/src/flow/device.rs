//! What smoltcp sees as its network device: one packet in, packets out with offloads.

use std::num::NonZeroUsize;

use smoltcp::phy::{self, Checksum, DeviceCapabilities, Medium, PacketMeta};
use smoltcp::time::Instant;

use super::packet::{self, FRAME_MAX, HEADER};

/// Where frames (virtio-net header and packet) for the TUN go.
pub trait Sink {
    /// Takes one frame. TCP repairs the loss of one that cannot be sent.
    fn send(&mut self, frame: &[u8]);
}

/// A device for one turn of smoltcp.
pub(super) struct Device<'a, S> {
    pub rx: Option<&'a [u8]>,
    pub frame: &'a mut [u8],
    pub sink: &'a mut S,
    pub mtu: usize,
    /// Bytes of payload after which a packet is segmented by the kernel, where smoltcp does not say so itself.
    pub split: Option<u16>,
    /// Frames sent through this device.
    pub sent: &'a mut u64,
}

/// The longest IP packet that is handed over for segmentation.
const SEGMENTABLE: NonZeroUsize = NonZeroUsize::new(FRAME_MAX - HEADER).expect("not zero");

impl<S: Sink> phy::Device for Device<'_, S> {
    type RxToken<'t>
        = Rx<'t>
    where
        Self: 't;
    type TxToken<'t>
        = Tx<'t, S>
    where
        Self: 't;

    fn receive(&mut self, _now: Instant) -> Option<(Rx<'_>, Tx<'_, S>)> {
        let rx = self.rx.take()?;
        Some((Rx(rx), Tx { frame: self.frame, sink: self.sink, sent: self.sent, segment: self.split }))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Tx<'_, S>> {
        Some(Tx { frame: self.frame, sink: self.sink, sent: self.sent, segment: self.split })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut caps = DeviceCapabilities::default();
        caps.medium = Medium::Ip;
        caps.max_transmission_unit = self.mtu;
        // `packet::parse` verifies what the kernel has not vouched for; the kernel finishes ours.
        caps.checksum.tcp = Checksum::None;
        caps.checksum.ipv4 = Checksum::Tx;
        caps.segmentation.tcpv4 = Some(SEGMENTABLE);
        // Not tcpv6: smoltcp 0.14 drops what is longer than the MTU before it asks whether the device would cut it
        // (`InterfaceInner::dispatch_ip`). See `Flows::device` for what is done instead.
        caps
    }
}

pub(super) struct Rx<'a>(&'a [u8]);

impl phy::RxToken for Rx<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

pub(super) struct Tx<'a, S> {
    frame: &'a mut [u8],
    sink: &'a mut S,
    sent: &'a mut u64,
    segment: Option<u16>,
}

impl<S: Sink> phy::TxToken for Tx<'_, S> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let frame = &mut self.frame[..HEADER + len];
        let result = f(&mut frame[HEADER..]);
        packet::offload(frame, self.segment);
        *self.sent += 1;
        self.sink.send(frame);
        result
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.segment = meta.segmentation_offload_size.map(std::num::NonZero::get).or(self.segment);
    }
}
