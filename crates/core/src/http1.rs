//! HTTP/1 on raw bytes (RFC 9112): where heads end, how long bodies are, which fork a request belongs to.
//!
//! Nothing is re-encoded. A caller keeps its bytes, asks [`HeadEnd`] for the end of a head, reads it with [`request`]
//! or [`response`], and counts the body off with [`Body`]. What two implementations could read in two ways
//! ([`Ambiguous`]) is never routed: the bytes go to the application as they are.

mod body;
mod head;

pub use body::{Body, BodyError, Framing};
pub use head::{
    Ambiguous, HeadEnd, MAX_HEAD, Method, Request, Response, TooLong, request, response, with_lines,
};
