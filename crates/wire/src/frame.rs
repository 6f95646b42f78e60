//! Length-delimited messages: how a message is cut out of a byte stream.

use bytes::{Buf, BytesMut};
use prost::Message;

/// The most bytes one message may have. Desired state of an agent with hundreds of forks is far below;
/// a peer that announces more is hostile or broken, and gets its connection closed.
pub const MAX_MESSAGE: usize = 256 * 1024;

/// Why bytes are not a message.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DecodeError {
    /// The length prefix announces more than [`MAX_MESSAGE`] bytes.
    #[error("message of {0} bytes announced, at most {MAX_MESSAGE} are allowed")]
    TooLong(u64),
    /// The bytes are no valid protobuf of the expected type.
    #[error("malformed message: {0}")]
    Malformed(#[from] prost::DecodeError),
}

/// Appends `message` with its length prefix to `out`.
pub fn encode_delimited<M: Message>(message: &M, out: &mut BytesMut) {
    out.reserve(message.encoded_len() + 10);
    message.encode_length_delimited(out).expect("BytesMut grows as needed");
}

/// Takes one message off the front of `input`, or `None` (and consumes nothing) while bytes are missing.
///
/// # Errors
/// [`DecodeError`]: the stream cannot be trusted from there on, and must be closed.
pub fn decode_delimited<M: Message + Default>(input: &mut BytesMut) -> Result<Option<M>, DecodeError> {
    let mut peek = &input[..];
    let len = match prost::encoding::decode_varint(&mut peek) {
        Ok(len) => len,
        // A varint has at most 10 bytes: with fewer, the rest may still come.
        Err(_) if input.len() < 10 => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if len > MAX_MESSAGE as u64 {
        return Err(DecodeError::TooLong(len));
    }
    let (prefix, len) = (input.len() - peek.len(), len as usize);
    if peek.len() < len {
        return Ok(None);
    }
    input.advance(prefix);
    Ok(Some(M::decode(input.split_to(len))?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::{Dial, Open, open};

    fn dial() -> Open {
        Open { kind: Some(open::Kind::Dial(Dial { ip: vec![10, 96, 0, 1], port: 443 })) }
    }

    #[test]
    fn a_message_cut_at_any_byte_is_waited_for() {
        let mut whole = BytesMut::new();
        encode_delimited(&dial(), &mut whole);
        for cut in 0..whole.len() {
            let mut part = BytesMut::from(&whole[..cut]);
            assert_eq!(decode_delimited::<Open>(&mut part), Ok(None), "cut at {cut}");
            assert_eq!(part.len(), cut, "nothing is consumed");
        }
        whole.extend_from_slice(b"raw bytes");
        assert_eq!(decode_delimited::<Open>(&mut whole), Ok(Some(dial())));
        assert_eq!(&whole[..], b"raw bytes");
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_it_is_buffered() {
        let mut input = BytesMut::from(&[0xff, 0xff, 0xff, 0x7f][..]);
        assert!(matches!(decode_delimited::<Open>(&mut input), Err(DecodeError::TooLong(_))));
    }

    #[test]
    fn unknown_fields_are_skipped() {
        let mut input = BytesMut::new();
        encode_delimited(&dial(), &mut input);
        input[0] += 3;
        input.extend_from_slice(&[0xf8, 0x07, 0x01]); // field 127, varint
        assert_eq!(decode_delimited::<Open>(&mut input), Ok(Some(dial())));
    }
}
