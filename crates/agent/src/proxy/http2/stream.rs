//! One stream: its request to where it belongs, its answer back.

use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use forkd_core::key::{self, Carried, HEADER, MEMBER};
use forkd_wire::control::{OnUnavailable, Route};
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::header::{ACCEPT, CONTENT_TYPE, USER_AGENT};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};

use super::lane::{Lanes, NoLane};
use crate::proxy::answer::{self, Failure, SERVED_BY};
use crate::proxy::{Deliver, DeliverError};

/// Serves one stream to its end. Whatever goes wrong becomes a reset of the other side.
pub(super) async fn serve<D: Deliver>(
    lanes: Arc<Lanes<D>>,
    mut request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) {
    let Head { carried, probe, says } = read(request.headers());
    let table = lanes.connection.table();
    let port = lanes.connection.port();
    let route = table.route(port, carried.key()).filter(|_| !probe).cloned();
    add_carriers(request.headers_mut(), &carried);

    let by_baseline = carried.key().map(|key| answer::by_baseline(table.service(port), key));
    drop(table);
    let (sender, served_by) = match &route {
        None => (lanes.baseline().await, by_baseline),
        Some(route) => match lanes.laptop(route).await {
            Err(error) => match fall_back(route, &carried, error) {
                None => (lanes.baseline().await, by_baseline),
                Some(failure) => return fail(&failure, says, &mut respond),
            },
            sender => (sender, Some(answer::by_laptop(route))),
        },
    };
    let mut sender = match sender {
        Ok(sender) => sender,
        Err(error) => {
            tracing::debug!(%error, "no upstream for a stream");
            // Nothing of it was processed: safe to try again (RFC 9113 §8.7).
            return respond.send_reset(Reason::REFUSED_STREAM);
        }
    };
    let (mut parts, body) = request.into_parts();
    if parts.uri.scheme().is_none() && parts.method != http::Method::CONNECT {
        // No :authority but a host header: h2 keeps that shape only for what it takes for HTTP/1.1.
        parts.version = http::Version::HTTP_11;
    }
    let ended = body.is_end_stream();
    let (response, up) = match sender.send_request(Request::from_parts(parts, ()), ended) {
        Ok(sent) => sent,
        Err(error) => {
            tracing::debug!(%error, "open a stream upstream");
            return respond.send_reset(Reason::REFUSED_STREAM);
        }
    };
    drop(sender);
    let upload = async {
        if ended {
            return std::future::pending().await;
        }
        match pass(body, up).await {
            // The answer decides what becomes of the stream; a caller that reset it has no use for one.
            Ok(()) | Err(Broken::To) => std::future::pending().await,
            Err(Broken::From(reason)) => reason,
        }
    };
    let download = answer(response, &mut respond, served_by);
    tokio::select! {
        biased;
        answered = download => match answered {
            Ok(()) | Err(Answered::Caller) => {}
            Err(Answered::Upstream(error)) => match &route {
                Some(route) if !error.is_reset() => {
                    fail(&Failure::broken(route, &error.to_string()), says, &mut respond);
                }
                _ => respond.send_reset(reason(&error)),
            },
        },
        reason = upload => tracing::debug!(%reason, "a caller reset its stream"),
    }
}

/// What routing needs to know of a request.
struct Head {
    carried: Carried,
    probe: bool,
    says: Speech,
}

fn read(headers: &HeaderMap) -> Head {
    let begins = |name: HeaderName, prefix: &[u8]| {
        headers.get(name).is_some_and(|value| value.as_bytes().starts_with(prefix))
    };
    Head {
        carried: key::carried(
            headers.iter().map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes())),
        ),
        probe: begins(USER_AGENT, b"kube-probe/"),
        says: Speech {
            grpc: begins(CONTENT_TYPE, b"application/grpc"),
            json: begins(ACCEPT, b"application/json"),
        },
    }
}

/// `None`: the application answers instead.
fn fall_back(route: &Route, carried: &Carried, error: NoLane) -> Option<Failure> {
    let own = carried.key().is_some_and(|key| key.as_str() == route.fork);
    let error = match error {
        NoLane::Deliver(error) => error,
        other => DeliverError::Unavailable(other.to_string()),
    };
    let gone = !matches!(error, DeliverError::NotListening(_));
    if gone && (!own || route.on_unavailable == OnUnavailable::Baseline as i32) {
        return None;
    }
    Some(Failure::deliver(route, &error))
}

fn add_carriers(headers: &mut HeaderMap, carried: &Carried) {
    let Some(key) = carried.key() else { return };
    let add = carried.to_add();
    // An id is a DNS label, so these are valid header values.
    let member = HeaderValue::from_str(&format!("{MEMBER}={key}"));
    let id = HeaderValue::from_str(key.as_str());
    if let Ok(member) = member {
        if add.baggage {
            headers.append(HeaderName::from_static("baggage"), member.clone());
        }
        if add.tracestate {
            let name = HeaderName::from_static("tracestate");
            let others: Vec<HeaderValue> = headers.get_all(&name).iter().cloned().collect();
            headers.insert(name.clone(), member);
            others.into_iter().for_each(|value| {
                headers.append(name.clone(), value);
            });
        }
    }
    if let (true, Ok(id)) = (add.header, id) {
        headers.insert(HeaderName::from_static(HEADER), id);
    }
}

/// How the caller wants to be spoken to.
#[derive(Clone, Copy)]
struct Speech {
    grpc: bool,
    json: bool,
}

/// Answers in the agent's own name: to gRPC with UNAVAILABLE, to others with 503 or 502.
fn fail(failure: &Failure, says: Speech, respond: &mut SendResponse<Bytes>) {
    let mut response = Response::builder().header(SERVED_BY, "agent");
    let body = if says.grpc {
        let content_type = "application/grpc";
        response = response
            .header(CONTENT_TYPE, content_type)
            .header("grpc-status", "14")
            .header("grpc-message", failure.line());
        None
    } else {
        let (kind, body) = failure.body(says.json);
        let status = StatusCode::from_u16(failure.status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
        response = response.status(status).header(CONTENT_TYPE, kind);
        Some(Bytes::from(body))
    };
    let sent = response.body(()).map_err(|error| error.to_string()).and_then(|response| {
        let mut stream =
            respond.send_response(response, body.is_none()).map_err(|error| error.to_string())?;
        // Small, and within any window: h2 keeps it until the caller's window opens.
        body.map_or(Ok(()), |body| stream.send_data(body, true)).map_err(|error| error.to_string())
    });
    if let Err(error) = sent {
        tracing::debug!(%error, "answer a stream");
        respond.send_reset(Reason::INTERNAL_ERROR);
    }
}

/// Why an answer did not come to its end.
enum Answered {
    /// The caller does not want it any more, or has been told.
    Caller,
    /// Upstream broke before the answer's head.
    Upstream(h2::Error),
}

async fn answer(
    response: h2::client::ResponseFuture,
    respond: &mut SendResponse<Bytes>,
    served_by: Option<String>,
) -> Result<(), Answered> {
    // Dropping the response when the caller is gone resets it upstream.
    let (mut parts, body) = head(response, respond).await?.into_parts();
    if let Some(value) = served_by.and_then(|value| HeaderValue::from_str(&value).ok()) {
        parts.headers.append(HeaderName::from_static(SERVED_BY), value);
    }
    let ended = body.is_end_stream();
    let down = respond.send_response(Response::from_parts(parts, ()), ended).map_err(|_| Answered::Caller)?;
    if !ended {
        // A reset from upstream was passed on; one from the caller resets upstream by dropping `body`.
        pass(body, down).await.map_err(|_| Answered::Caller)?;
    }
    Ok(())
}

/// The head of the answer. Those before it (1xx) go to the caller as they come: it may hold its body back until "100
/// Continue" (RFC 9110 §10.1.1).
async fn head(
    mut response: h2::client::ResponseFuture,
    respond: &mut SendResponse<Bytes>,
) -> Result<Response<RecvStream>, Answered> {
    std::future::poll_fn(|cx| {
        loop {
            match response.poll_informational(cx) {
                Poll::Ready(Some(Ok(interim))) => {
                    respond.send_informational(interim).map_err(|_| Answered::Caller)?;
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(Answered::Upstream(error))),
                Poll::Ready(None) => return Pin::new(&mut response).poll(cx).map_err(Answered::Upstream),
                Poll::Pending => return respond.poll_reset(cx).map(|_| Err(Answered::Caller)),
            }
        }
    })
    .await
}

/// Which side ended a stream before its time.
enum Broken {
    /// The sender, for this reason; the receiver was told.
    From(Reason),
    /// The receiver.
    To,
}

/// Passes data and trailers. The sender may send more when the receiver has room for it.
async fn pass(mut from: RecvStream, mut to: SendStream<Bytes>) -> Result<(), Broken> {
    loop {
        let data = tokio::select! {
            biased;
            data = from.data() => data,
            _ = std::future::poll_fn(|cx| to.poll_reset(cx)) => return Err(Broken::To),
        };
        let Some(data) = data else { break };
        let mut data = data.map_err(|error| broken(&error, &mut to))?;
        let len = data.len();
        let last = from.is_end_stream();
        if data.is_empty() && last {
            return to.send_data(data, true).map_err(|_| Broken::To);
        }
        while !data.is_empty() {
            to.reserve_capacity(data.len());
            let room = match std::future::poll_fn(|cx| to.poll_capacity(cx)).await {
                Some(Ok(room)) => room.min(data.len()),
                Some(Err(_)) | None => return Err(Broken::To),
            };
            let part = data.split_to(room);
            let end = last && data.is_empty();
            to.send_data(part, end).map_err(|_| Broken::To)?;
        }
        from.flow_control().release_capacity(len).map_err(|error| broken(&error, &mut to))?;
        if last {
            return Ok(());
        }
    }
    match from.trailers().await.map_err(|error| broken(&error, &mut to))? {
        Some(trailers) => to.send_trailers(trailers).map_err(|_| Broken::To),
        None => to.send_data(Bytes::new(), true).map_err(|_| Broken::To),
    }
}

fn broken(error: &h2::Error, to: &mut SendStream<Bytes>) -> Broken {
    let reason = reason(error);
    tracing::debug!(%error, %reason, "a stream broke");
    to.send_reset(reason);
    Broken::From(reason)
}

/// A stream's own reason passes through; a connection that broke is an error of ours towards the other side.
fn reason(error: &h2::Error) -> Reason {
    match error.reason() {
        Some(reason) if error.is_reset() => reason,
        _ => Reason::INTERNAL_ERROR,
    }
}
