//! Names of objects: always valid, never cut to something that points nowhere.

use sha2::{Digest, Sha256};

/// The longest name that is also a label value and a DNS label (RFC 1123).
pub const MAX: usize = 63;

/// Name of the ForkTarget for a Service in a fork: `FORK-SERVICE-HASH`. The hash keeps `a-b`+`c` and `a`+`b-c` apart.
pub fn target(fork: &str, service: &str) -> String {
    hashed(&format!("{fork}-{service}"), &[fork, service])
}

/// `prefix`, shortened to fit, followed by ten hex digits that stand for all `parts`.
pub fn hashed(prefix: &str, parts: &[&str]) -> String {
    let mut digest = Sha256::new();
    for part in parts {
        digest.update(part.as_bytes());
        digest.update([0]);
    }
    let hash: String = digest.finalize()[..5].iter().map(|byte| format!("{byte:02x}")).collect();
    let room = MAX - 1 - hash.len();
    let cut = prefix
        .char_indices()
        .map(|(at, c)| at + c.len_utf8())
        .take_while(|end| *end <= room)
        .last()
        .unwrap_or(0);
    format!("{}-{hash}", prefix[..cut].trim_end_matches(['-', '.']))
}

/// A fork id made of any text, e.g. a login: lower case, at most 40 characters, letters, digits and inner hyphens.
/// `None` when nothing usable is left.
pub fn fork_id(text: &str) -> Option<String> {
    let mut id = String::new();
    for c in text.chars().flat_map(char::to_lowercase) {
        match c {
            'a'..='z' | '0'..='9' => id.push(c),
            _ if !id.is_empty() && !id.ends_with('-') => id.push('-'),
            _ => {}
        }
        if id.len() == 40 {
            break;
        }
    }
    let id = id.trim_end_matches('-');
    (!id.is_empty()).then(|| id.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_stay_distinct_and_within_63_characters() {
        let service = "a".repeat(63);
        let (one, two) = (target("alice", &service), target("alicf", &service));
        assert!(one.len() <= MAX && two.len() <= MAX);
        assert_ne!(one, two);
        assert_ne!(target("a-b", "c"), target("a", "b-c"));
    }

    #[test]
    fn a_fork_id_is_made_of_any_login() {
        assert_eq!(fork_id("Alice.Doe@example.com").as_deref(), Some("alice-doe-example-com"));
        assert_eq!(fork_id("ユーザ"), None);
        assert_eq!(fork_id(&"x-".repeat(60)).map(|id| id.len()), Some(39));
    }
}
