//! HTTP/2: each stream goes where its key says.

use bytes::BytesMut;
use tokio::net::TcpStream;

use super::baseline::{Baseline, Upstream, reset_on_close};
use super::{Connection, Deliver, pump};

/// Serves a connection that begins with HTTP/2's preface.
pub(super) async fn serve<D: Deliver>(
    connection: Connection<D>,
    client: TcpStream,
    sent: BytesMut,
    baseline: Option<Baseline>,
) {
    let baseline = match baseline {
        Some(baseline) => Ok(baseline),
        None => connection.shared.counters.own.dial(connection.original).await,
    };
    match baseline {
        Ok(baseline) => {
            pump::tunnel::<D::Stream>(client, Upstream::Baseline(baseline), sent, BytesMut::new()).await;
        }
        Err(_) => reset_on_close(&client),
    }
}
