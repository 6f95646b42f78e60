//! The redirect: one nftables table in the pod's network namespace that hands connections to the agent.
//!
//! ```text
//! table inet forkd {                                  owned by this process: the kernel removes it when it dies
//!   set ports { type inet_service; elements = { … } }
//!   chain pre { type nat hook prerouting priority -99; }    # behind Istio (-100): sees what Istio did not take
//!     iifname != "lo" tcp flags syn / fin,syn,rst,ack tcp dport @ports redirect to :AGENT
//!   chain out { type nat hook output priority -101; }       # what Envoy (uid 1337) hands to the application
//!     oifname "lo" meta skuid 1337 ip  saddr 127.0.0.6 … redirect to :AGENT
//!     oifname "lo" meta skuid 1337 ip  daddr 127.0.0.1 … redirect to :AGENT
//!     … and the same for ::6 and ::1
//! }
//! ```
//!
//! It is right with and without an Istio sidecar. Before Istio in `prerouting`, STRICT mTLS would be bypassed; without
//! the addresses in `output`, Envoy's outbound connections to the application's own Service would be caught too.
//! The agent's own connections to the application match none of the rules, so they cannot loop.
//!
//! Every change is one transaction. NAT is decided when a connection begins: a change moves no connection that is open.
//! The kernel translates open ones only while the chains are there: they stay, with an empty set, until the last
//! connection has ended.

use std::collections::BTreeSet;
use std::io;

use crate::netlink::{Attributes, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, Netlink, Refused, Requests};

/// Name of the table.
pub const TABLE: &str = "forkd";
/// Family `inet` (`NFPROTO_INET`): IPv4 and IPv6 in one table.
const INET: u8 = 1;
/// The user id of Istio's Envoy.
const ENVOY_UID: u32 = 1337;
/// Name of the set that holds the ports.
const PORTS: &str = "ports";

/// Why the redirect is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// The process may not change the network namespace.
    #[error("may not set nftables rules: the agent's container lacks the capability NET_ADMIN")]
    NoPermission,
    /// Another live process owns the table.
    #[error("the table `inet {TABLE}` belongs to another agent that still runs in this pod")]
    Taken,
    /// The kernel has no nftables, or not the part that is needed.
    #[error(
        "the node's kernel cannot {what}: it lacks nf_tables with nft_redir and nft_chain_nat ({source})"
    )]
    Unsupported {
        /// What was asked of it.
        what: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// Anything else.
    #[error("{what}: {source}")]
    Failed {
        /// What was asked of the kernel.
        what: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

/// The redirect of a pod's ports to the agent. Dropping it removes it ([`Redirect::remove`]).
pub struct Redirect {
    netlink: Netlink,
    to: u16,
    ports: BTreeSet<u16>,
    /// The table is there and ours.
    set: bool,
}

// linux/netfilter/nfnetlink.h and nf_tables.h
const NETLINK_NETFILTER: isize = 12;
const NFNL_MSG_BATCH_BEGIN: u16 = 16;
const NFNL_MSG_BATCH_END: u16 = 17;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_GETTABLE: u16 = 1;
const NFT_MSG_DELTABLE: u16 = 2;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_NEWRULE: u16 = 6;
const NFT_MSG_NEWSET: u16 = 9;
const NFT_MSG_NEWSETELEM: u16 = 12;
const NFT_MSG_DELSETELEM: u16 = 14;
/// The table goes when the socket that made it does (Linux 5.12).
const NFT_TABLE_F_OWNER: u32 = 2;
const NFT_REG_1: u32 = 1;
const LIST_ELEM: u16 = 1;
/// TCP's flags (RFC 9293 §3.1).
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;
const NF_ACCEPT: u32 = 1;

const ENOENT: i32 = 2;
const EPERM: i32 = 1;
const EINVAL: i32 = 22;
const EOPNOTSUPP: i32 = 95;
const EPROTONOSUPPORT: i32 = 93;

impl Redirect {
    /// Prepares a redirect to the agent's port `to` of this network namespace; nothing is redirected yet.
    ///
    /// # Errors
    /// [`NftError::Unsupported`] if the kernel has no netfilter.
    pub fn new(to: u16) -> Result<Self, NftError> {
        let netlink = Netlink::open(NETLINK_NETFILTER).map_err(|source| match source.raw_os_error() {
            Some(EPROTONOSUPPORT) => NftError::Unsupported { what: "speak netfilter netlink", source },
            _ => NftError::Failed { what: "open a netfilter socket", source },
        })?;
        Ok(Self { netlink, to, ports: BTreeSet::new(), set: false })
    }

    /// The ports that are redirected.
    pub fn ports(&self) -> &BTreeSet<u16> {
        &self.ports
    }

    /// Redirects exactly these ports from here on; none is allowed, and leaves redirected connections alive. Calling it
    /// again is harmless and puts back what somebody else removed.
    ///
    /// # Errors
    /// [`NftError`]; then everything is as it was before the call.
    pub fn apply(&mut self, ports: &BTreeSet<u16>) -> Result<(), NftError> {
        if ports.is_empty() && !self.set {
            return Ok(());
        }
        if self.set && self.exists()? {
            if self.ports != *ports {
                self.commit(&change_ports(ports), "change the redirected ports")?;
            }
        } else {
            let stale = self.exists()?;
            match self.commit(&whole_table(stale, self.to, ports, NFT_TABLE_F_OWNER), "set the redirect") {
                // Before Linux 5.12 tables have no owner: a successor replaces what a killed agent leaves.
                Err(NftError::Unsupported { .. }) => {
                    self.commit(&whole_table(stale, self.to, ports, 0), "set the redirect")?;
                }
                other => other?,
            }
        }
        self.set = true;
        self.ports.clone_from(ports);
        Ok(())
    }

    /// Removes the table. Connections that it redirected break with it: first [`Self::apply`] no ports and let
    /// [`Proxy::run`](crate::proxy::Proxy::run) end.
    ///
    /// # Errors
    /// [`NftError`]; then the redirect is still there.
    pub fn remove(&mut self) -> Result<(), NftError> {
        if self.set && self.exists()? {
            let mut batch = Batch::begin();
            batch.table(NFT_MSG_DELTABLE, 0);
            self.commit(&batch.end(), "remove the redirect")?;
        }
        self.set = false;
        self.ports.clear();
        Ok(())
    }

    fn exists(&mut self) -> Result<bool, NftError> {
        let mut request = Requests::default();
        let kind = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETTABLE;
        request.add(kind, NLM_F_ACK, &[INET, 0, 0, 0], |a| {
            a.text(1, TABLE);
        });
        match self.netlink.exchange(&request) {
            Ok((_, None)) => Ok(true),
            Ok((_, Some(refused))) if refused.error.raw_os_error() == Some(ENOENT) => Ok(false),
            Ok((_, Some(refused))) => Err(explain(refused, "look for the table", request.len())),
            Err(source) => Err(NftError::Failed { what: "look for the table", source }),
        }
    }

    fn commit(&mut self, batch: &Requests, what: &'static str) -> Result<(), NftError> {
        match self.netlink.exchange(batch) {
            Ok((answers, None)) if answers.len() + 2 == batch.len() => Ok(()),
            Ok((answers, None)) => {
                let source =
                    io::Error::other(format!("{} answers to {} requests", answers.len(), batch.len() - 2));
                Err(NftError::Failed { what, source })
            }
            Ok((_, Some(refused))) => Err(explain(refused, what, batch.len())),
            Err(source) => Err(NftError::Failed { what, source }),
        }
    }
}

impl Drop for Redirect {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            // The owner flag removes the table with this process anyway, where the kernel knows it.
            tracing::error!(%error, "remove the redirect");
        }
    }
}

fn explain(refused: Refused, what: &'static str, requests: usize) -> NftError {
    let source = refused.error;
    match source.raw_os_error() {
        // Without the capability the kernel refuses the whole datagram, in the name of its first message.
        Some(EPERM) if refused.index == 0 => NftError::NoPermission,
        Some(EPERM) => NftError::Taken,
        Some(EOPNOTSUPP | EINVAL | EPROTONOSUPPORT) => NftError::Unsupported { what, source },
        Some(ENOENT) if requests > 3 => NftError::Unsupported { what, source },
        _ => NftError::Failed { what, source },
    }
}

fn change_ports(ports: &BTreeSet<u16>) -> Requests {
    let mut batch = Batch::begin();
    batch.message(NFT_MSG_DELSETELEM, 0, |a| {
        a.text(1, TABLE).text(2, PORTS); // no elements: all of them
    });
    batch.elements(ports);
    batch.end()
}

fn whole_table(stale: bool, to: u16, ports: &BTreeSet<u16>, flags: u32) -> Requests {
    let mut batch = Batch::begin();
    if stale {
        batch.table(NFT_MSG_DELTABLE, 0);
    }
    batch.table(NFT_MSG_NEWTABLE, flags);
    batch.message(NFT_MSG_NEWSET, NLM_F_CREATE, |a| {
        // flags 0, key type 13 (inet_service, for `nft list`), key of two bytes, id 1 within this batch
        a.text(1, TABLE).text(2, PORTS).number(3, 0).number(4, 13).number(5, 2).number(10, 1);
    });
    batch.elements(ports);
    batch.nat_chain("pre", 0, -99); // NF_INET_PRE_ROUTING
    batch.nat_chain("out", 3, -101); // NF_INET_LOCAL_OUT
    batch.rule("pre", |rule| {
        rule.interface(Meta::IifName, Compare::NotEqual);
        rule.redirect(to);
    });
    let (v4, v6) = ([127, 0, 0], |last| {
        let mut address = [0; 16];
        address[15] = last;
        address
    });
    for (family, offset, address) in [
        (2, 12, &[v4[0], v4[1], v4[2], 6][..]), // NFPROTO_IPV4, source
        (2, 16, &[v4[0], v4[1], v4[2], 1][..]), // destination
        (10, 8, &v6(6)[..]),                    // NFPROTO_IPV6, source
        (10, 24, &v6(1)[..]),                   // destination
    ] {
        batch.rule("out", |rule| {
            rule.interface(Meta::OifName, Compare::Equal);
            rule.meta(Meta::SkUid, Compare::Equal, &ENVOY_UID.to_ne_bytes());
            rule.meta(Meta::NfProto, Compare::Equal, &[family]);
            rule.payload(1, offset, address.len() as u32);
            rule.compare(Compare::Equal, address);
            rule.redirect(to);
        });
    }
    batch.end()
}

/// One transaction.
struct Batch(Requests);

impl Batch {
    fn begin() -> Self {
        let mut requests = Requests::default();
        requests.add(NFNL_MSG_BATCH_BEGIN, 0, &Self::edge(), |_| {});
        Self(requests)
    }

    fn end(mut self) -> Requests {
        self.0.add(NFNL_MSG_BATCH_END, 0, &Self::edge(), |_| {});
        self.0
    }

    /// `nfgenmsg` whose resource id names the subsystem.
    fn edge() -> [u8; 4] {
        let [high, low] = NFNL_SUBSYS_NFTABLES.to_be_bytes();
        [0, 0, high, low]
    }

    fn message(&mut self, kind: u16, flags: u16, attributes: impl FnOnce(&mut Attributes)) {
        self.0.add(NFNL_SUBSYS_NFTABLES << 8 | kind, flags | NLM_F_ACK, &[INET, 0, 0, 0], attributes);
    }

    fn table(&mut self, kind: u16, flags: u32) {
        let create = if kind == NFT_MSG_NEWTABLE { NLM_F_CREATE } else { 0 };
        self.message(kind, create, |a| {
            a.text(1, TABLE);
            if flags != 0 {
                a.number(2, flags);
            }
        });
    }

    fn elements(&mut self, ports: &BTreeSet<u16>) {
        if ports.is_empty() {
            return;
        }
        self.message(NFT_MSG_NEWSETELEM, NLM_F_CREATE, |a| {
            a.text(1, TABLE).text(2, PORTS).number(4, 1).nest(3, |list| {
                for port in ports {
                    list.nest(LIST_ELEM, |element| {
                        element.nest(1, |key| {
                            key.bytes(1, &port.to_be_bytes());
                        });
                    });
                }
            });
        });
    }

    fn nat_chain(&mut self, name: &str, hook: u32, priority: i32) {
        self.message(NFT_MSG_NEWCHAIN, NLM_F_CREATE, |a| {
            a.text(1, TABLE).text(3, name).text(7, "nat").number(5, NF_ACCEPT).nest(4, |h| {
                h.number(1, hook).bytes(2, &priority.to_be_bytes());
            });
        });
    }

    fn rule(&mut self, chain: &str, build: impl FnOnce(&mut Rule<'_>)) {
        self.message(NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, |a| {
            a.text(1, TABLE).text(2, chain).nest(4, |expressions| build(&mut Rule(expressions)));
        });
    }
}

#[derive(Clone, Copy)]
enum Meta {
    IifName = 6,
    OifName = 7,
    SkUid = 10,
    NfProto = 15,
    L4Proto = 16,
}

#[derive(Clone, Copy)]
enum Compare {
    Equal = 0,
    NotEqual = 1,
}

/// The expressions of one rule; register 1 carries every value.
struct Rule<'a>(&'a mut Attributes);

impl Rule<'_> {
    fn expression(&mut self, name: &str, data: impl FnOnce(&mut Attributes)) {
        self.0.nest(LIST_ELEM, |e| {
            e.text(1, name).nest(2, data);
        });
    }

    fn interface(&mut self, key: Meta, compare: Compare) {
        let mut name = [0; 16]; // IFNAMSIZ
        name[..2].copy_from_slice(b"lo");
        self.meta(key, compare, &name);
    }

    fn meta(&mut self, key: Meta, compare: Compare, value: &[u8]) {
        self.expression("meta", |a| {
            a.number(1, NFT_REG_1).number(2, key as u32);
        });
        self.compare(compare, value);
    }

    /// Loads from the network (1) or transport (2) header.
    fn payload(&mut self, base: u32, offset: u32, len: u32) {
        self.expression("payload", |a| {
            a.number(1, NFT_REG_1).number(2, base).number(3, offset).number(4, len);
        });
    }

    fn compare(&mut self, compare: Compare, value: &[u8]) {
        self.expression("cmp", |a| {
            a.number(1, NFT_REG_1).number(2, compare as u32).nest(3, |data| {
                data.bytes(1, value);
            });
        });
    }

    /// `tcp flags syn / fin,syn,rst,ack tcp dport @ports redirect to :TO`.
    fn redirect(&mut self, to: u16) {
        self.meta(Meta::L4Proto, Compare::Equal, &[6]);
        // Without the flags, connections from before the table would be cut: it switches on connection tracking, which
        // takes their next packet for the first one of a connection.
        self.payload(2, 13, 1);
        self.expression("bitwise", |a| {
            a.number(1, NFT_REG_1).number(2, NFT_REG_1).number(3, 1);
            a.nest(4, |mask| {
                mask.bytes(1, &[FIN | SYN | RST | ACK]);
            });
            a.nest(5, |xor| {
                xor.bytes(1, &[0]);
            });
        });
        self.compare(Compare::Equal, &[SYN]);
        self.payload(2, 2, 2);
        self.expression("lookup", |a| {
            a.text(1, PORTS).number(2, NFT_REG_1).number(4, 1);
        });
        self.expression("immediate", |a| {
            a.number(1, NFT_REG_1).nest(2, |data| {
                data.bytes(1, &to.to_be_bytes());
            });
        });
        self.expression("redir", |a| {
            a.number(1, NFT_REG_1);
        });
    }
}
