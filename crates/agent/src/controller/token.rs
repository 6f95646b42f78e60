//! Join tokens: how an ephemeral container proves which pod it is in.
//!
//! A token is a statement signed by the controller (HMAC-SHA256 with a key of the Secret `forkd-ca`). It stands in the
//! container's environment, where everybody may read it who may read the pod; therefore it counts once, from the pod's own
//! address, for one container, and only around that container's start (see [`super::join`]).

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::{hmac, rand};
use prost::Message as _;

/// How long after it was made a token may be used: an image may have to be pulled first. What is short is the time
/// from the container's start ([`super::join::AFTER_START`]).
pub const LIFETIME: Duration = Duration::from_secs(15 * 60);
/// Tokens whose use is remembered; each for [`LIFETIME`]. Ten thousand pods may join in that time.
const MAX_USED: usize = 10_000;

/// What a token says.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Claims {
    /// `metadata.uid` of the pod.
    #[prost(string, tag = "1")]
    pub pod_uid: String,
    /// Namespace of the pod.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// Name of the pod.
    #[prost(string, tag = "3")]
    pub pod: String,
    /// Name of the ephemeral container.
    #[prost(string, tag = "4")]
    pub container: String,
    /// Makes each token another.
    #[prost(bytes = "vec", tag = "5")]
    pub nonce: Vec<u8>,
    /// Unix seconds.
    #[prost(uint64, tag = "6")]
    pub expires: u64,
}

/// Why a token does not count.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TokenError {
    /// Not ours, or changed.
    #[error("this is no join token of this cluster's controller")]
    Forged,
    /// Too old.
    #[error("the join token has expired")]
    Expired,
    /// Somebody has joined with it.
    #[error("the join token was used before")]
    Used,
    /// Too many joins at a time.
    #[error("too many agents join at the moment")]
    TooMany,
    /// The system has no random numbers.
    #[error("the system gives no random numbers")]
    NoRandom,
}

/// Makes tokens and takes each once.
pub struct Tokens {
    key: hmac::Key,
    /// Nonces of used tokens, with the time at which they expire anyway.
    used: Mutex<HashMap<Vec<u8>, u64>>,
}

impl Tokens {
    /// With the key of the Secret.
    pub fn new(key: hmac::Key) -> Self {
        Self { key, used: Mutex::default() }
    }

    /// A new token for one container. Hexadecimal text.
    ///
    /// # Errors
    /// [`TokenError::NoRandom`].
    pub fn issue(
        &self,
        pod: (&str, &str, &str),
        container: &str,
        now: SystemTime,
    ) -> Result<String, TokenError> {
        let mut nonce = vec![0; 16];
        rand::fill(&mut nonce).map_err(|_| TokenError::NoRandom)?;
        let (namespace, name, uid) = pod;
        let claims = Claims {
            pod_uid: uid.to_owned(),
            namespace: namespace.to_owned(),
            pod: name.to_owned(),
            container: container.to_owned(),
            nonce,
            expires: unix(now + LIFETIME),
        };
        let body = claims.encode_to_vec();
        let tag = hmac::sign(&self.key, &body);
        Ok(format!("{}.{}", hex(&body), hex(tag.as_ref())))
    }

    /// What a token says, if it is genuine and not expired. Does not use it up.
    ///
    /// # Errors
    /// [`TokenError::Forged`], [`TokenError::Expired`].
    pub fn read(&self, token: &str, now: SystemTime) -> Result<Claims, TokenError> {
        let (body, tag) = token.trim().split_once('.').ok_or(TokenError::Forged)?;
        let body = unhex(body).ok_or(TokenError::Forged)?;
        let tag = unhex(tag).ok_or(TokenError::Forged)?;
        hmac::verify(&self.key, &body, &tag).map_err(|_| TokenError::Forged)?;
        let claims = Claims::decode(body.as_slice()).map_err(|_| TokenError::Forged)?;
        if claims.expires <= unix(now) {
            return Err(TokenError::Expired);
        }
        Ok(claims)
    }

    /// Uses a token up.
    ///
    /// # Errors
    /// [`TokenError::Used`], [`TokenError::TooMany`].
    pub fn spend(&self, claims: &Claims, now: SystemTime) -> Result<(), TokenError> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        if used.len() >= MAX_USED {
            let now = unix(now);
            used.retain(|_, expires| *expires > now);
        }
        if used.contains_key(&claims.nonce) {
            return Err(TokenError::Used);
        }
        if used.len() >= MAX_USED {
            return Err(TokenError::TooMany);
        }
        used.insert(claims.nonce.clone(), claims.expires);
        Ok(())
    }
}

fn unix(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> =
        text.chars().map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok())).collect();
    let (pairs, []) = digits.as_deref()?.as_chunks::<2>() else { return None };
    Some(pairs.iter().map(|[high, low]| high << 4 | low).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens() -> Tokens {
        Tokens::new(hmac::Key::new(hmac::HMAC_SHA256, &[7; 32]))
    }

    const POD: (&str, &str, &str) = ("shop", "cart-1", "0b7e");

    #[test]
    fn a_token_says_which_container_of_which_pod_and_counts_once() {
        let (tokens, now) = (tokens(), SystemTime::now());
        let token = tokens.issue(POD, "forkd-agent-1", now).unwrap();
        let claims = tokens.read(&token, now).unwrap();
        assert_eq!((claims.namespace.as_str(), claims.pod.as_str(), claims.pod_uid.as_str()), POD);
        assert_eq!(claims.container, "forkd-agent-1");
        assert_eq!(tokens.spend(&claims, now), Ok(()));
        assert_eq!(tokens.spend(&claims, now), Err(TokenError::Used));
        let other = tokens.read(&tokens.issue(POD, "forkd-agent-1", now).unwrap(), now).unwrap();
        assert_eq!(tokens.spend(&other, now), Ok(()), "another token of the same container");
    }

    #[test]
    fn a_token_with_any_character_changed_is_forged() {
        let (tokens, now) = (tokens(), SystemTime::now());
        let token = tokens.issue(POD, "forkd-agent-1", now).unwrap();
        for at in 0..token.len() {
            let mut changed = token.clone().into_bytes();
            changed[at] = if changed[at] == b'0' { b'1' } else { b'0' };
            assert_eq!(
                tokens.read(&String::from_utf8(changed).unwrap(), now),
                Err(TokenError::Forged),
                "at {at}"
            );
        }
        let other = Tokens::new(hmac::Key::new(hmac::HMAC_SHA256, &[8; 32]));
        assert_eq!(other.read(&token, now), Err(TokenError::Forged));
        for garbage in ["", ".", "é.é", "0.0", "00"] {
            assert_eq!(tokens.read(garbage, now), Err(TokenError::Forged));
        }
    }

    #[test]
    fn a_token_expires() {
        let (tokens, now) = (tokens(), SystemTime::now());
        let token = tokens.issue(POD, "forkd-agent-1", now).unwrap();
        assert!(tokens.read(&token, now + LIFETIME - Duration::from_secs(1)).is_ok());
        assert_eq!(tokens.read(&token, now + LIFETIME), Err(TokenError::Expired));
    }

    #[test]
    fn what_is_remembered_of_used_tokens_is_bounded() {
        let (tokens, now) = (tokens(), SystemTime::now());
        let claims = |number: usize, expires| Claims {
            nonce: number.to_be_bytes().to_vec(),
            expires,
            ..Claims::default()
        };
        for number in 0..MAX_USED {
            tokens.spend(&claims(number, unix(now) + 10), now).unwrap();
        }
        assert_eq!(tokens.spend(&claims(MAX_USED, unix(now) + 10), now), Err(TokenError::TooMany));
        let later = now + Duration::from_secs(20);
        assert_eq!(tokens.spend(&claims(MAX_USED, unix(later) + 10), later), Ok(()));
    }
}
