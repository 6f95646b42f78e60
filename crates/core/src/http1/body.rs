//! Where a body ends (RFC 9112 §6 and §7.1).

/// How the end of a body is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// This many bytes; zero for a message without a body.
    Length(u64),
    /// Chunks and trailers.
    Chunked,
    /// Everything until the connection ends. Responses only.
    UntilClose,
    /// No message any more: both directions carry raw bytes from here on (101, or 2xx to CONNECT).
    Tunnel,
}

/// The bytes are no valid chunked body: where it ends is a matter of opinion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed chunked body: {0}")]
pub struct BodyError(&'static str);

/// A chunk-size line or a whole trailer section of more bytes than this is an attack, not a message.
const MAX_LINE: usize = 16 * 1024;
const MAX_TRAILERS: usize = super::MAX_HEAD;

/// Counts the bytes of one body off.
#[derive(Clone, Debug)]
pub struct Body(State);

#[derive(Clone, Debug)]
enum State {
    Done,
    Length(u64),
    UntilClose,
    /// At the digits of a chunk size: the value so far, digits and bytes seen.
    Size {
        value: u64,
        digits: u32,
    },
    /// Behind the digits, in an extension.
    Extension {
        value: u64,
        seen: usize,
    },
    /// Behind the CR of a size line.
    SizeLf(u64),
    Data(u64),
    DataCr,
    DataLf,
    /// At the start of (`column` 0) or in a trailer line; `seen` counts the whole section.
    Trailer {
        column: usize,
        seen: usize,
    },
    /// Behind the CR of a trailer line; `empty` when that line is the end.
    TrailerLf {
        empty: bool,
        seen: usize,
    },
}

impl Body {
    /// A body that has this framing. A tunnel has no end: it counts like [`Framing::UntilClose`].
    pub fn new(framing: Framing) -> Self {
        Self(match framing {
            Framing::Length(0) => State::Done,
            Framing::Length(len) => State::Length(len),
            Framing::Chunked => State::Size { value: 0, digits: 0 },
            Framing::UntilClose | Framing::Tunnel => State::UntilClose,
        })
    }

    /// True once the last byte was counted.
    pub fn is_done(&self) -> bool {
        matches!(self.0, State::Done)
    }

    /// True when the end of the connection is a valid end of this body.
    pub fn may_end_here(&self) -> bool {
        matches!(self.0, State::Done | State::UntilClose)
    }

    /// How many of the leading bytes of `input` belong to this body. Less than all of them only when it is done.
    ///
    /// # Errors
    /// [`BodyError`]: `input` holds, and all bytes before it were, a body that cannot be told from what follows.
    pub fn advance(&mut self, input: &[u8]) -> Result<usize, BodyError> {
        let mut at = 0;
        while at < input.len() {
            match &mut self.0 {
                State::Done => break,
                State::UntilClose => return Ok(input.len()),
                State::Length(left) | State::Data(left) => {
                    let take = usize::try_from(*left).unwrap_or(usize::MAX).min(input.len() - at);
                    at += take;
                    *left -= take as u64;
                    if *left == 0 {
                        self.0 = if matches!(self.0, State::Data(_)) { State::DataCr } else { State::Done };
                    }
                }
                _ => {
                    self.0 = self.0.clone().byte(input[at])?;
                    at += 1;
                }
            }
        }
        Ok(at)
    }
}

impl State {
    /// One byte of what stands between the chunks' data.
    fn byte(self, byte: u8) -> Result<Self, BodyError> {
        Ok(match (self, byte) {
            (Self::Size { value, digits }, b) if b.is_ascii_hexdigit() => {
                let digit = char::from(b).to_digit(16).unwrap_or(0);
                // Sixteen digits are all that fit; a leading zero is legal, a line of them is not.
                if digits == 16 {
                    return Err(BodyError("chunk size of more than 16 digits"));
                }
                Self::Size { value: value << 4 | u64::from(digit), digits: digits + 1 }
            }
            (Self::Size { digits: 0, .. }, _) => return Err(BodyError("chunk size without digits")),
            (Self::Size { value, .. }, b'\r') => Self::SizeLf(value),
            (Self::Size { value, .. }, b';' | b' ' | b'\t') => Self::Extension { value, seen: 0 },
            (Self::Size { .. }, _) => return Err(BodyError("chunk size is not hexadecimal")),
            (Self::Extension { value, .. }, b'\r') => Self::SizeLf(value),
            (Self::Extension { .. }, b'\n' | 0) => {
                return Err(BodyError("bare LF or NUL in a chunk extension"));
            }
            (Self::Extension { seen, .. }, _) if seen >= MAX_LINE => {
                return Err(BodyError("chunk extension too long"));
            }
            (Self::Extension { value, seen }, _) => Self::Extension { value, seen: seen + 1 },
            (Self::SizeLf(0), b'\n') => Self::Trailer { column: 0, seen: 0 },
            (Self::SizeLf(size), b'\n') => Self::Data(size),
            (Self::DataCr, b'\r') => Self::DataLf,
            (Self::DataLf, b'\n') => Self::Size { value: 0, digits: 0 },
            (Self::Trailer { seen, .. }, _) if seen >= MAX_TRAILERS => {
                return Err(BodyError("trailers too long"));
            }
            (Self::Trailer { column, seen }, b'\r') => Self::TrailerLf { empty: column == 0, seen: seen + 1 },
            (Self::Trailer { .. }, b'\n') => return Err(BodyError("bare LF in the trailers")),
            (Self::Trailer { column, seen }, _) => Self::Trailer { column: column + 1, seen: seen + 1 },
            (Self::TrailerLf { empty: true, .. }, b'\n') => Self::Done,
            (Self::TrailerLf { empty: false, seen }, b'\n') => Self::Trailer { column: 0, seen: seen + 1 },
            (Self::SizeLf(_) | Self::TrailerLf { .. }, _) => return Err(BodyError("CR without LF")),
            (Self::DataCr | Self::DataLf, _) => return Err(BodyError("chunk is longer than its size")),
            (done @ (Self::Done | Self::Length(_) | Self::UntilClose | Self::Data(_)), _) => done,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(framing: Framing, input: &[u8]) -> Result<(usize, bool), BodyError> {
        let mut body = Body::new(framing);
        Ok((body.advance(input)?, body.is_done()))
    }

    /// The same, torn at `cut`; what is behind the end in the first part is never consumed.
    fn torn(framing: Framing, input: &[u8], cut: usize) -> Result<(usize, bool), BodyError> {
        let mut body = Body::new(framing);
        let mut taken = body.advance(&input[..cut])?;
        if taken == cut {
            taken += body.advance(&input[cut..])?;
        }
        Ok((taken, body.is_done()))
    }

    #[test]
    fn every_framing_ends_where_rfc_9112_says_torn_anywhere() {
        let next = "GET / HTTP/1.1";
        for (framing, body) in [
            (Framing::Length(0), ""),
            (Framing::Length(5), "hello"),
            (Framing::Chunked, "0\r\n\r\n"),
            (Framing::Chunked, "5\r\nhello\r\n0\r\n\r\n"),
            (
                Framing::Chunked,
                "05;a=b;c=\"d;e\"\r\nhe\r\no\r\n1 ; x\r\nx\r\n000\r\nTrailer: 1\r\nb: 2\r\n\r\n",
            ),
            (Framing::Chunked, "a\r\n0123456789\r\nA;x\r\n0123456789\r\n0;last\r\n\r\n"),
        ] {
            let input = format!("{body}{next}");
            assert_eq!(whole(framing, input.as_bytes()), Ok((body.len(), true)), "{body:?}");
            for cut in 0..=input.len() {
                assert_eq!(torn(framing, input.as_bytes(), cut), Ok((body.len(), true)), "{body:?} at {cut}");
            }
            for cut in 0..body.len() {
                assert_eq!(
                    whole(framing, &body.as_bytes()[..cut]),
                    Ok((cut, false)),
                    "{body:?} cut at {cut}"
                );
            }
        }
        assert_eq!(whole(Framing::UntilClose, b"anything"), Ok((8, false)));
    }

    #[test]
    fn what_two_readers_could_end_in_two_places_is_an_error_torn_anywhere() {
        for input in [
            "\r\n",
            ";x\r\n",
            "g\r\n",
            "-1\r\n",
            "+1\r\n",
            "0x5\r\nhello\r\n",
            "5\nhello\n0\n\n",
            "5\r\rhello",
            "5;a\nhello",
            "5\r\nhello!\r\n",
            "5\r\nhello\n0\r\n\r\n",
            "11111111111111111\r\n",
            "0\r\na: b\n\r\n",
            "0\r\na: b\rc\r\n",
        ] {
            assert!(whole(Framing::Chunked, input.as_bytes()).is_err(), "{input:?}");
            for cut in 0..=input.len() {
                assert!(torn(Framing::Chunked, input.as_bytes(), cut).is_err(), "{input:?} at {cut}");
            }
        }
        let endless = |start: &str, n: usize| format!("{start}{}", "x".repeat(n));
        assert!(whole(Framing::Chunked, endless("5;", MAX_LINE + 1).as_bytes()).is_err());
        assert!(whole(Framing::Chunked, endless("0\r\n", MAX_TRAILERS + 1).as_bytes()).is_err());
    }
}
