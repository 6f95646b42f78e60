//! The seam to the tunnel: how a caller's connection reaches a laptop.

use std::future::Future;
use std::net::SocketAddr;

use forkd_wire::control::Route;
use tokio::io::{AsyncRead, AsyncWrite};

/// Brings connections to laptops.
pub trait Deliver: Send + Sync + 'static {
    /// Raw bytes to and from the process on the laptop. `shutdown` is the half-close (FIN). Dropping it without one
    /// must reset the other end; an error while reading or writing counts as a reset by the other end.
    type Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    /// Opens a connection for `route`; done when the laptop said that its process accepted. The port that the caller
    /// reached is `route.port`.
    fn deliver(
        &self,
        route: &Route,
        caller: SocketAddr,
    ) -> impl Future<Output = Result<Self::Stream, DeliverError>> + Send;
}

/// Why a laptop cannot be reached.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeliverError {
    /// No live connection to the laptop that holds the target.
    #[error("the laptop is not connected")]
    LaptopGone,
    /// The laptop is there, its process is not; the text is the laptop's own, and names the port.
    #[error("{0}")]
    NotListening(String),
    /// The laptop is there and could not take the connection: it shuts down, or knows no such target.
    #[error("{0}")]
    Unavailable(String),
}
