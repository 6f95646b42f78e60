//! What the agent itself says: who answered, and why nobody could.

use forkd_core::key::Key;
use forkd_wire::control::Route;

use super::DeliverError;

/// The response header that says who answered inside a fork.
pub(super) const SERVED_BY: &str = forkd_api::SERVED_BY_HEADER;

/// `laptop=OWNER/LAPTOP; service=NAMESPACE/SERVICE; fork=ID`.
pub(super) fn by_laptop(route: &Route) -> String {
    let value = format!(
        "laptop={}/{}; service={}; fork={}",
        plain(&route.owner),
        plain(&route.laptop),
        plain(&route.service),
        plain(&route.fork)
    );
    value
}

/// `baseline; service=NAMESPACE/SERVICE; fork=ID`.
pub(super) fn by_baseline(service: Option<&str>, key: &Key) -> String {
    match service {
        Some(service) => format!("baseline; service={}; fork={key}", plain(service)),
        None => format!("baseline; fork={key}"),
    }
}

/// Text that is safe in a header: what is not visible ASCII, or would end the parameter, is percent-encoded.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b';' | b',' | b'%' | b'"' => out.push_str(&format!("%{byte:02X}")),
            0x21..=0x7e => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// A request that belongs on a laptop and could not get there.
pub(super) struct Failure {
    pub(super) status: u16,
    what: String,
    because: String,
    tip: String,
}

impl Failure {
    /// The laptop cannot be reached, or its process does not listen.
    pub(super) fn deliver(route: &Route, error: &DeliverError) -> Self {
        let Route { owner, laptop, service, fork, .. } = route;
        let name = service.rsplit('/').next().unwrap_or(service);
        let (status, because, tip) = match error {
            DeliverError::LaptopGone => (
                503,
                format!("laptop {laptop} of {owner} is not connected to this pod"),
                format!(
                    "run `forkd connect` on that laptop, or `forkd leave {name}` to get the cluster's version"
                ),
            ),
            DeliverError::NotListening(reason) => (
                502,
                format!("nothing listens on laptop {laptop} of {owner}: {reason}"),
                format!(
                    "start the process on the laptop, or `forkd leave {name}` to get the cluster's version"
                ),
            ),
            DeliverError::Unavailable(reason) => (
                503,
                format!("laptop {laptop} of {owner} could not take the request: {reason}"),
                "look at `forkd status` on that laptop".to_owned(),
            ),
        };
        Self { status, what: format!("{service} in fork {fork} did not answer"), because, tip }
    }

    /// The connection to the laptop's process ended before it answered.
    pub(super) fn broken(route: &Route, error: &str) -> Self {
        let Route { owner, laptop, service, fork, .. } = route;
        Self {
            status: 502,
            what: format!("{service} in fork {fork} did not answer"),
            because: format!("the process on laptop {laptop} of {owner} closed the connection: {error}"),
            tip: "look at the output of that process".to_owned(),
        }
    }

    /// Three lines for a person, or the same as JSON. Type and body.
    pub(super) fn body(&self, json: bool) -> (&'static str, Vec<u8>) {
        let Self { what, because, tip, .. } = self;
        if json {
            let body = serde_json::json!({"error": what, "because": because, "try": tip});
            ("application/json", format!("{body}\n").into_bytes())
        } else {
            let body = format!("error: {what}\nbecause: {because}\ntry: {tip}\n");
            ("text/plain; charset=utf-8", body.into_bytes())
        }
    }

    /// One line, for `grpc-message`, percent-encoded as gRPC wants it.
    pub(super) fn line(&self) -> String {
        let line = format!("{}: {}; try: {}", self.what, self.because, self.tip);
        let mut out = String::with_capacity(line.len());
        for byte in line.bytes() {
            match byte {
                b'%' => out.push_str("%25"),
                0x20..=0x7e => out.push(char::from(byte)),
                _ => out.push_str(&format!("%{byte:02X}")),
            }
        }
        out
    }

    /// A whole HTTP/1 response.
    pub(super) fn http1(&self, json: bool, head_only: bool, keep_alive: bool) -> Vec<u8> {
        let (kind, body) = self.body(json);
        let reason = if self.status == 503 { "Service Unavailable" } else { "Bad Gateway" };
        let connection = if keep_alive { "" } else { "connection: close\r\n" };
        let mut response = format!(
            "HTTP/1.1 {} {reason}\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n{SERVED_BY}: agent\r\n{connection}\r\n",
            self.status,
            body.len()
        )
        .into_bytes();
        if !head_only {
            response.extend_from_slice(&body);
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_a_name_can_break_out_of_the_header() {
        let route = Route {
            owner: "eve\r\nset-cookie: x; fork=bob".to_owned(),
            laptop: "ü".to_owned(),
            service: "shop/cart".to_owned(),
            fork: "eve".to_owned(),
            ..Route::default()
        };
        let value = by_laptop(&route);
        assert_eq!(
            value,
            "laptop=eve%0D%0Aset-cookie:%20x%3B%20fork=bob/%C3%BC; service=shop/cart; fork=eve"
        );
        let message = Failure::deliver(&route, &DeliverError::LaptopGone).line();
        assert!(message.bytes().all(|b| (0x20..0x7f).contains(&b)), "{message}");
    }
}
