//! The fork's key in a request: where it stands, how it is read, and what is added so that it travels on.
//!
//! Three carriers, read in this order; the first that holds a valid id decides, the others are left as they are:
//!
//! 1. `baggage: …,forkd=ID;props,…` (W3C Baggage §3.3), any number of lines;
//! 2. `tracestate: …,forkd=ID,…` (W3C Trace Context §3.3), any number of lines;
//! 3. `x-forkd-id: ID`.
//!
//! All are read as lists of bytes. A member that is malformed is skipped: it is somebody else's business, and never
//! makes a request fail.

use std::fmt;

/// The member of `baggage` and `tracestate` that holds the id.
pub const MEMBER: &str = "forkd";
/// The header for services that drop baggage.
pub const HEADER: &str = "x-forkd-id";
/// The longest id, bytes; the Fork CRD says the same.
pub const MAX_ID: usize = 40;

/// W3C Baggage §3.3.2: a propagator may drop what goes beyond these, so nothing is added that would.
const BAGGAGE_MEMBERS: usize = 64;
const BAGGAGE_BYTES: usize = 8192;
/// W3C Trace Context §3.3.1.1.
const TRACESTATE_MEMBERS: usize = 32;

/// A fork's id, valid by construction: a DNS label (RFC 1123) in lower case of at most [`MAX_ID`] bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(Box<str>);

impl Key {
    /// The id in these bytes, or `None` if they are not exactly one.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let alphanumeric = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let valid = bytes.len() <= MAX_ID
            && bytes.first().is_some_and(alphanumeric)
            && bytes.last().is_some_and(alphanumeric)
            && bytes.iter().all(|b| alphanumeric(b) || *b == b'-');
        valid.then(|| str::from_utf8(bytes).ok()).flatten().map(|id| Self(id.into()))
    }

    /// The id.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({self})")
    }
}

/// What a request says about forks: everything about its key that routing needs, from one pass over its headers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    baggage: Option<Key>,
    tracestate: Option<Key>,
    header: Option<Key>,
    has_header: bool,
    baggage_members: usize,
    baggage_bytes: usize,
    tracestate_members: usize,
    has_traceparent: bool,
}

/// Which carriers a keyed request lacks and may be given. Each becomes one line of its own: `baggage` and
/// `x-forkd-id` anywhere, `tracestate` before the first line of that name (W3C Trace Context §3.5: in front).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CarriersToAdd {
    /// `baggage: forkd=ID`.
    pub baggage: bool,
    /// `tracestate: forkd=ID`; only beside a `traceparent`, without which receivers ignore it.
    pub tracestate: bool,
    /// `x-forkd-id: ID`.
    pub header: bool,
}

impl Carried {
    /// Takes note of one header line. Names are compared without regard to case.
    pub fn see(&mut self, name: &[u8], value: &[u8]) {
        if name.eq_ignore_ascii_case(b"baggage") {
            self.baggage_bytes += value.len() + usize::from(self.baggage_members > 0);
            for member in members(value) {
                self.baggage_members += 1;
                if self.baggage.is_none() {
                    self.baggage = baggage_member(member);
                }
            }
        } else if name.eq_ignore_ascii_case(b"tracestate") {
            for member in members(value) {
                self.tracestate_members += 1;
                if self.tracestate.is_none() {
                    self.tracestate = tracestate_member(member);
                }
            }
        } else if name.eq_ignore_ascii_case(HEADER.as_bytes()) {
            self.has_header = true;
            if self.header.is_none() {
                self.header = Key::parse(trim(value));
            }
        } else if name.eq_ignore_ascii_case(b"traceparent") {
            self.has_traceparent = true;
        }
    }

    /// The fork the request belongs to.
    pub fn key(&self) -> Option<&Key> {
        self.baggage.as_ref().or(self.tracestate.as_ref()).or(self.header.as_ref())
    }

    /// What an agent adds on the way; nothing when there is no key. Carriers that are there stay as they are, even
    /// with another id: reading order settles it the same way at every hop that keeps them.
    pub fn to_add(&self) -> CarriersToAdd {
        let Some(key) = self.key() else { return CarriersToAdd::default() };
        let member = MEMBER.len() + 1 + key.as_str().len();
        CarriersToAdd {
            baggage: self.baggage.is_none()
                && self.baggage_members < BAGGAGE_MEMBERS
                && self.baggage_bytes + 1 + member <= BAGGAGE_BYTES,
            tracestate: self.tracestate.is_none()
                && self.has_traceparent
                && self.tracestate_members < TRACESTATE_MEMBERS,
            header: !self.has_header,
        }
    }
}

/// The fork's key among these headers (name, value), if one carries it.
pub fn key<'a>(headers: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> Option<Key> {
    carried(headers).key().cloned()
}

/// See [`Carried::to_add`].
pub fn carriers_to_add<'a>(headers: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> CarriersToAdd {
    carried(headers).to_add()
}

/// Everything that these headers (name, value) say about forks.
pub fn carried<'a>(headers: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> Carried {
    let mut carried = Carried::default();
    headers.into_iter().for_each(|(name, value)| carried.see(name, value));
    carried
}

/// List members, without the empty ones that RFC 9110 §5.6.1 tells recipients to ignore.
fn members(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|b| *b == b',').map(trim).filter(|member| !member.is_empty())
}

/// `key OWS = OWS value *( OWS ; OWS property )`, the value percent-encoded.
fn baggage_member(member: &[u8]) -> Option<Key> {
    let pair = member.split(|b| *b == b';').next()?;
    let (name, value) = split_pair(pair)?;
    if trim(name) != MEMBER.as_bytes() {
        return None;
    }
    let mut decoded = [0; MAX_ID];
    percent_decode(trim(value), &mut decoded).and_then(Key::parse)
}

/// `key=value`; the value may itself contain `=`.
fn tracestate_member(member: &[u8]) -> Option<Key> {
    let (name, value) = split_pair(member)?;
    (name == MEMBER.as_bytes()).then(|| Key::parse(value)).flatten()
}

fn split_pair(pair: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = pair.iter().position(|b| *b == b'=')?;
    Some((&pair[..at], &pair[at + 1..]))
}

/// Without optional whitespace (RFC 9110 §5.6.3) at both ends.
fn trim(mut bytes: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] = bytes {
        bytes = rest;
    }
    while let [rest @ .., b' ' | b'\t'] = bytes {
        bytes = rest;
    }
    bytes
}

/// RFC 3986 §2.1 into `out`; `None` when a triplet is malformed or the result is longer than any id.
fn percent_decode<'o>(mut bytes: &[u8], out: &'o mut [u8; MAX_ID]) -> Option<&'o [u8]> {
    let hex = |b: u8| char::from(b).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let mut len = 0;
    while let [first, rest @ ..] = bytes {
        let (byte, rest) = match (*first, rest) {
            (b'%', [high, low, rest @ ..]) => (hex(*high)? << 4 | hex(*low)?, rest),
            (b'%', _) => return None,
            (byte, rest) => (byte, rest),
        };
        *out.get_mut(len)? = byte;
        len += 1;
        bytes = rest;
    }
    Some(&out[..len])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(lines: &[(&str, &str)]) -> Option<String> {
        key(lines.iter().map(|(n, v)| (n.as_bytes(), v.as_bytes()))).map(|key| key.to_string())
    }

    fn add(lines: &[(&str, &str)]) -> CarriersToAdd {
        carriers_to_add(lines.iter().map(|(n, v)| (n.as_bytes(), v.as_bytes())))
    }

    #[test]
    fn baggage_is_read_as_a_list() {
        for value in [
            "forkd=alice",
            "a=b, forkd=alice;p=1,c=d",
            "\ta=b\t,\tforkd\t=\talice\t;\tp",
            "forkd=%61lice",
            ",,forkd=alice,,",
            "x=\"forkd=bob\";q,forkd=alice",
            "forkd=BAD,forkd=alice",
            "a=forkd=bob,forkd=alice,forkd=carol",
            "broken,=,;,forkd=alice",
        ] {
            assert_eq!(of(&[("Baggage", value)]).as_deref(), Some("alice"), "{value:?}");
        }
    }

    #[test]
    fn what_only_looks_like_the_key_is_none() {
        for value in [
            "",
            "forkd",
            "forkd=",
            "forkd=-a",
            "forkd=a-",
            "forkd=Alice",
            "forkd=al ice",
            "forkd=a%2",
            "forkd=a%zz",
            "forkd=a%2Cb",
            "forkd=ali%00ce",
            "Forkd=alice",
            "forkd2=alice",
            "xforkd=alice",
            "a=1;forkd=alice",
            "forkd=12345678901234567890123456789012345678901",
        ] {
            assert_eq!(of(&[("baggage", value)]), None, "{value:?}");
            assert_eq!(add(&[("baggage", value)]), CarriersToAdd::default(), "{value:?}");
        }
        assert_eq!(of(&[("x-baggage", "forkd=alice"), ("x-forkd-idx", "bob")]), None);
    }

    #[test]
    fn several_lines_are_one_list() {
        assert_eq!(
            of(&[("baggage", "a=b"), ("x", "y"), ("BAGGAGE", "forkd=alice")]).as_deref(),
            Some("alice")
        );
    }

    #[test]
    fn tracestate_values_are_not_decoded_and_may_hold_equal_signs() {
        assert_eq!(of(&[("tracestate", "a@b=x=y, forkd=alice ,c=d")]).as_deref(), Some("alice"));
        assert_eq!(of(&[("tracestate", "forkd=%61lice")]), None);
        assert_eq!(of(&[("tracestate", "forkd=alice=x")]), None);
    }

    #[test]
    fn baggage_beats_tracestate_beats_the_header_and_invalid_ids_beat_nothing() {
        let all = [("x-forkd-id", "carol"), ("tracestate", "forkd=bob"), ("baggage", "forkd=alice")];
        assert_eq!(of(&all).as_deref(), Some("alice"));
        assert_eq!(of(&all[..2]).as_deref(), Some("bob"));
        assert_eq!(of(&all[..1]).as_deref(), Some("carol"));
        assert_eq!(of(&[("x-forkd-id", " \tcarol ")]).as_deref(), Some("carol"));
        assert_eq!(of(&[("baggage", "forkd=NO"), ("x-forkd-id", "carol")]).as_deref(), Some("carol"));
        assert_eq!(of(&[("x-forkd-id", "a,b")]), None);
    }

    #[test]
    fn missing_carriers_are_added_within_the_limits_of_w3c() {
        let parent = ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        let header = ("x-forkd-id", "alice");
        assert_eq!(add(&[header]), CarriersToAdd { baggage: true, ..Default::default() });
        assert_eq!(
            add(&[header, parent]),
            CarriersToAdd { baggage: true, tracestate: true, ..Default::default() }
        );
        assert_eq!(
            add(&[("baggage", "forkd=alice")]),
            CarriersToAdd { header: true, ..Default::default() },
            "without traceparent no tracestate"
        );
        let many = |n: usize| (0..n).map(|i| format!("k{i}=v")).collect::<Vec<_>>().join(",");
        assert!(add(&[header, ("baggage", &many(63))]).baggage);
        assert!(!add(&[header, ("baggage", &many(64))]).baggage);
        assert!(add(&[header, parent, ("tracestate", &many(31))]).tracestate);
        assert!(!add(&[header, parent, ("tracestate", &many(32))]).tracestate);
        let room = BAGGAGE_BYTES - ",forkd=alice".len();
        assert!(add(&[header, ("baggage", &format!("a={}", "x".repeat(room - 2)))]).baggage);
        assert!(!add(&[header, ("baggage", &format!("a={}", "x".repeat(room - 1)))]).baggage);
    }

    /// A small deterministic generator: the cases are the same on every run.
    struct Random(u64);
    impl Random {
        fn below(&mut self, n: usize) -> usize {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) as usize % n
        }
    }

    #[test]
    fn any_bytes_give_an_answer_and_a_key_is_always_valid() {
        let alphabet = b"forkd=ali,; \t%6-\"\\\x00\xff";
        let names: [&[u8]; 4] = [b"baggage", b"tracestate", b"x-forkd-id", b"traceparent"];
        let mut random = Random(7);
        for _ in 0..50_000 {
            let lines: Vec<(&[u8], Vec<u8>)> = (0..random.below(4))
                .map(|_| {
                    let len = random.below(30);
                    (
                        names[random.below(4)],
                        (0..len).map(|_| alphabet[random.below(alphabet.len())]).collect(),
                    )
                })
                .collect();
            let found = carried(lines.iter().map(|(n, v)| (*n, &v[..])));
            if let Some(key) = found.key() {
                assert_eq!(Key::parse(key.as_str().as_bytes()).as_ref(), Some(key));
            }
        }
    }

    #[test]
    fn a_member_among_any_others_is_found_wherever_it_stands() {
        let others = ["a=b", "userId=Am%C3%A9lie;x=y", "forkdx=no", "k=v;p;q=forkd", "", " "];
        let mut random = Random(3);
        for round in 0..2_000 {
            let mut list: Vec<&str> =
                (0..random.below(8)).map(|_| others[random.below(others.len())]).collect();
            let at = random.below(list.len() + 1);
            list.insert(at, " forkd=me-2 ;p=1");
            let cut = random.below(list.len() + 1);
            let lines = [list[..cut].join(","), list[cut..].join(" , ")];
            let found = key(lines.iter().map(|line| (&b"baggage"[..], line.as_bytes())));
            assert_eq!(found.as_ref().map(Key::as_str), Some("me-2"), "round {round}: {lines:?}");
            let carried = carried(lines.iter().map(|line| (&b"baggage"[..], line.as_bytes())));
            assert!(!carried.to_add().baggage && carried.to_add().header);
        }
    }
}
