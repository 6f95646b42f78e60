//! Which names are the cluster's, and what a DNS answer must look like to get back to the one who asked.
//!
//! Short names (`cart`, `cart.shop`) arrive expanded by the host's search list, so only names under the cluster's
//! domain and reverse names of its ranges are the cluster's. All record types pass, unread.

use std::net::IpAddr;

use hickory_proto::op::{Message, MessageType, ResponseCode};
use hickory_proto::rr::Name;
use ipnet::IpNet;

/// The most bytes of a DNS message: its length prefix over TCP has two bytes (RFC 1035 §4.2.2).
pub const MESSAGE_MAX: usize = 65535;
/// What everyone takes over UDP (RFC 1035 §4.2.1).
const UDP_SURE: u16 = 512;
/// DNS header, bytes.
const HEADER: usize = 12;

/// The cluster's names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Zones {
    domain: Name,
    ranges: Vec<IpNet>,
}

/// Who is to be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The cluster's DNS.
    Cluster,
    /// The resolver that the laptop had before.
    Laptop,
}

/// Why a domain or a message cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DnsError {
    /// A cluster domain that is no domain name, or the root: everything would be the cluster's.
    #[error("{0:?} is no cluster domain")]
    Domain(String),
    /// No DNS query with exactly one question.
    #[error("malformed DNS query")]
    Malformed,
}

impl Zones {
    /// Names under `domain` (e.g. `cluster.local`), and reverse names of addresses in `ranges`.
    ///
    /// # Errors
    /// [`DnsError::Domain`].
    pub fn new(domain: &str, ranges: Vec<IpNet>) -> Result<Self, DnsError> {
        let mut name = Name::from_ascii(domain).map_err(|_| DnsError::Domain(domain.to_owned()))?;
        if name.num_labels() == 0 {
            return Err(DnsError::Domain(domain.to_owned()));
        }
        name.set_fqdn(true);
        Ok(Self { domain: name, ranges })
    }

    /// Who answers this message.
    ///
    /// # Errors
    /// [`DnsError::Malformed`]: to be answered by [`failure`] with FORMERR.
    pub fn place(&self, query: &[u8]) -> Result<Place, DnsError> {
        let message = Message::from_vec(query).map_err(|_| DnsError::Malformed)?;
        let [question] = &message.queries[..] else { return Err(DnsError::Malformed) };
        if message.metadata.message_type != MessageType::Query {
            return Err(DnsError::Malformed);
        }
        let name = question.name();
        let ours = self.domain.zone_of(name) || self.has_reverse(name);
        Ok(if ours { Place::Cluster } else { Place::Laptop })
    }

    /// A reverse name of an address in one of the ranges, or of a network within one.
    fn has_reverse(&self, name: &Name) -> bool {
        name.parse_arpa_name().is_ok_and(|net| {
            // The types of two versions of ipnet would not compare; addresses do.
            let (address, length): (IpAddr, u8) = (net.addr(), net.prefix_len());
            self.ranges.iter().any(|range| range.contains(&address) && length >= range.prefix_len())
        })
    }
}

/// The answer as it goes over UDP: cut down to header and question with the TC bit set (RFC 2181 §9) if it is longer
/// than the query allows, so that the resolver comes again over TCP.
pub fn fit_udp(query: &[u8], answer: Vec<u8>) -> Vec<u8> {
    let limit = Message::from_vec(query).map_or(UDP_SURE, |query| query.max_payload().max(UDP_SURE));
    if answer.len() <= limit.into() {
        return answer;
    }
    let cut = Message::from_vec(&answer).map(|answer| {
        let mut cut = answer.truncate();
        cut.answers.clear();
        cut.authorities.clear();
        cut.additionals.clear();
        cut
    });
    // An answer that is no DNS message is none: SERVFAIL is.
    cut.ok()
        .and_then(|cut| cut.to_vec().ok())
        .or_else(|| failure(query, Failure::ServFail))
        .unwrap_or_default()
}

/// Reasons to answer without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The query makes no sense.
    FormErr,
    /// Nobody could be asked.
    ServFail,
}

/// The answer that says so; `None` if the query has not even an id, or is itself an answer (which nobody answers).
pub fn failure(query: &[u8], why: Failure) -> Option<Vec<u8>> {
    if query.len() < HEADER || query[2] & 0x80 != 0 {
        return None;
    }
    let code = match why {
        Failure::FormErr => ResponseCode::FormErr,
        Failure::ServFail => ResponseCode::ServFail,
    };
    if let Ok(message) = Message::from_vec(query) {
        let mut answer = Message::error_msg(message.metadata.id, message.metadata.op_code, code);
        answer.metadata.recursion_desired = message.metadata.recursion_desired;
        answer.metadata.recursion_available = true;
        answer.add_queries(message.queries);
        if let Ok(answer) = answer.to_vec() {
            return Some(answer);
        }
    }
    // Id and opcode of the query, QR, RA, no sections.
    let flags = 0x80 | (query[2] & 0x79);
    Some(vec![query[0], query[1], flags, 0x80 | code.low(), 0, 0, 0, 0, 0, 0, 0, 0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::op::{Edns, Query};
    use hickory_proto::rr::rdata::{A, TXT};
    use hickory_proto::rr::{RData, Record, RecordType};

    fn query(name: &str, kind: RecordType) -> Vec<u8> {
        let mut message = Message::query();
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        message.to_vec().unwrap()
    }

    fn zones() -> Zones {
        let ranges = vec!["10.96.0.0/12".parse().unwrap(), "fd10::/112".parse().unwrap()];
        Zones::new("cluster.local", ranges).unwrap()
    }

    #[test]
    fn only_names_under_the_domain_and_reverse_names_of_the_ranges_are_the_clusters() {
        for (name, kind, place) in [
            ("cart.shop.svc.cluster.local.", RecordType::A, Place::Cluster),
            ("CART.Shop.SVC.Cluster.Local.", RecordType::AAAA, Place::Cluster),
            ("_http._tcp.cart.shop.svc.cluster.local.", RecordType::SRV, Place::Cluster),
            ("cluster.local.", RecordType::NS, Place::Cluster),
            ("10.0.96.10.in-addr.arpa.", RecordType::PTR, Place::Cluster),
            ("1.0.0.10.in-addr.arpa.", RecordType::PTR, Place::Laptop),
            ("10.in-addr.arpa.", RecordType::NS, Place::Laptop),
            ("cart.", RecordType::A, Place::Laptop),
            ("cart.shop.", RecordType::A, Place::Laptop),
            ("cart.shop.svc.", RecordType::A, Place::Laptop),
            ("notcluster.local.", RecordType::A, Place::Laptop),
            ("cluster.local.example.com.", RecordType::A, Place::Laptop),
            (".", RecordType::NS, Place::Laptop),
        ] {
            assert_eq!(zones().place(&query(name, kind)).unwrap(), place, "{name}");
        }
    }

    #[test]
    fn the_root_is_no_cluster_domain() {
        assert!(Zones::new(".", vec![]).is_err());
        assert!(Zones::new("", vec![]).is_err());
        assert!(Zones::new("a..b", vec![]).is_err());
    }

    #[test]
    fn bytes_that_are_no_query_are_refused_and_never_panic() {
        let whole = query("cart.shop.svc.cluster.local.", RecordType::A);
        for cut in 0..whole.len() {
            assert!(zones().place(&whole[..cut]).is_err(), "cut at {cut}");
            assert_eq!(failure(&whole[..cut], Failure::FormErr).is_some(), cut >= 12);
        }
        let mut answer = whole;
        answer[2] |= 0x80;
        assert!(zones().place(&answer).is_err(), "an answer is not answered");
        assert_eq!(failure(&answer, Failure::FormErr), None);
    }

    #[test]
    fn a_failure_keeps_id_and_question() {
        let asked = query("cart.shop.svc.cluster.local.", RecordType::A);
        let answer = Message::from_vec(&failure(&asked, Failure::ServFail).unwrap()).unwrap();
        let asked = Message::from_vec(&asked).unwrap();
        assert_eq!(answer.metadata.id, asked.metadata.id);
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
        assert_eq!(answer.queries, asked.queries);
    }

    #[test]
    fn an_answer_longer_than_the_query_allows_is_truncated_over_udp() {
        let name = Name::from_ascii("big.cluster.local.").unwrap();
        let asked = query("big.cluster.local.", RecordType::TXT);
        let mut answer = Message::from_vec(&asked).unwrap().into_response();
        answer.metadata.id = Message::from_vec(&asked).unwrap().metadata.id;
        for at in 0..20 {
            let text = TXT::new(vec![format!("{at}{}", "x".repeat(100))]);
            answer.add_answer(Record::from_rdata(name.clone(), 5, RData::TXT(text)));
        }
        let answer = answer.to_vec().unwrap();
        let cut = Message::from_vec(&fit_udp(&asked, answer.clone())).unwrap();
        assert!(cut.metadata.truncation && cut.answers.is_empty());
        assert_eq!(cut.queries.len(), 1);

        let mut with_edns = Message::from_vec(&asked).unwrap();
        let mut edns = Edns::new();
        edns.set_max_payload(4096);
        with_edns.set_edns(edns);
        assert_eq!(fit_udp(&with_edns.to_vec().unwrap(), answer.clone()), answer);

        let mut small = Message::from_vec(&asked).unwrap().into_response();
        small.add_answer(Record::from_rdata(name, 5, RData::A(A::new(10, 0, 0, 1))));
        let small = small.to_vec().unwrap();
        assert_eq!(fit_udp(&asked, small.clone()), small);
    }
}
