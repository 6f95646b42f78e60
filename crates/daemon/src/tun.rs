//! The TUN's file descriptor: packets of up to 64 KiB with a virtio-net header in front, from and to the kernel.
#![allow(unsafe_code, reason = "file descriptors that come over a socket, and waiting for them")]

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::task::{Context, Poll};

use forkd_core::flow::{FRAME_MAX, Sink};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A TUN with `IFF_VNET_HDR`, opened by the helper.
pub struct Tun {
    fd: AsyncFd<OwnedFd>,
    /// Writes that the kernel refused; TCP repairs the loss.
    refused: u64,
}

impl Tun {
    /// Takes over a TUN's descriptor. Needs a tokio runtime.
    ///
    /// # Errors
    /// The descriptor cannot be polled.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self { fd: pollable(fd, Interest::READABLE)?, refused: 0 })
    }

    /// Ready when there is a packet (or an error) to read.
    ///
    /// # Errors
    /// The runtime is shutting down.
    pub fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.fd.poll_read_ready(cx).map_ok(drop)
    }

    /// One frame: virtio-net header and packet. `frame` should have [`FRAME_MAX`] bytes.
    ///
    /// # Errors
    /// `WouldBlock` when there is none; `EBADFD` when the interface was deleted.
    pub fn read(&self, frame: &mut [u8]) -> io::Result<usize> {
        debug_assert!(frame.len() >= FRAME_MAX);
        self.fd.try_io(Interest::READABLE, |fd| Ok(nix::unistd::read(fd, frame)?))
    }

    /// How many frames the kernel refused.
    pub fn refused(&self) -> u64 {
        self.refused
    }
}

impl Sink for Tun {
    fn send(&mut self, frame: &[u8]) {
        // Never blocks: the kernel takes the packet in or refuses it.
        if let Err(errno) = nix::unistd::write(self.fd.get_ref(), frame) {
            self.refused += 1;
            tracing::debug!(%errno, bytes = frame.len(), "the kernel refused a packet");
        }
    }
}

/// Makes a descriptor non-blocking and has the runtime wait for it.
///
/// # Errors
/// The descriptor is of a kind that cannot be waited for.
pub fn pollable(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    set_nonblocking(fd.as_fd())?;
    // SAFETY: an OwnedFd names one open descriptor, always the same, until AsyncFd gives it back or drops it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// Makes reads and writes return at once.
///
/// # Errors
/// The descriptor is not open.
fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// One message of a packet socket, with the file descriptor that came along; (0, None) at its end.
///
/// # Errors
/// As recvmsg(2); `InvalidData` for a message longer than `buffer`.
pub fn recv_with_fd(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut control = nix::cmsg_space!([std::os::fd::RawFd; 1]);
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let mut received = None;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = part {
            for fd in fds {
                // SAFETY: the kernel has just made this descriptor for us (SCM_RIGHTS); nobody else knows its number.
                received = Some(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    if message.flags.contains(MsgFlags::MSG_TRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "message longer than the protocol allows"));
    }
    Ok((message.bytes, received))
}
