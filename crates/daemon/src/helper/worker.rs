//! The helper proper: answers requests of one daemon until its socket closes or the guard dies, then undoes everything.

use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use forkd_core::dns::Zones;
use forkd_core::ranges::{self, Kept};
use ipnet::IpNet;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{ControlMessage, MsgFlags, recv, sendmsg};

use super::journal::{self, Journal, JournalError};
use super::protocol::{DnsInfo, DnsMode, Failure, MAX_MESSAGE, MAX_RANGES, Reply, Request, TunInfo};
use crate::host::link::{Link, LinkError};
use crate::host::netlink::{Netlink, NetlinkError};
use crate::host::resolved;
use crate::host::resolver::{self, ResolverError, Setting};

/// RFC 8200 §5: the least that IPv6 needs of a link.
const MTU_MIN: u16 = 1280;
/// Suffixes of a search list: C libraries take six, or 256 bytes.
const SEARCH_MAX: usize = 6;

/// All that is changed on this machine; fields are dropped, and so undone, in this order.
struct Host {
    dns: Option<Dns>,
    link: Option<Link>,
    journal: Journal,
    netlink: Netlink,
}

/// The guard of either way to get at names.
enum Dns {
    Resolved(#[expect(dead_code, reason = "undone by Drop")] resolved::Guard),
    File(#[expect(dead_code, reason = "undone by Drop")] resolver::Guard),
}

/// Serves the daemon on fd 0.
///
/// # Errors
/// The socket or the signals cannot be waited for; everything is undone nevertheless.
pub fn run(guard: i32) -> anyhow::Result<()> {
    // SIGTERM comes when the guard dies; ^C in the terminal is for the command that runs there, not for us.
    prctl::set_pdeathsig(Signal::SIGTERM)?;
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block()?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    if nix::unistd::getppid().as_raw() != guard {
        // It died before the signal was ordered.
        return Ok(());
    }
    let socket: OwnedFd = io::stdin().as_fd().try_clone_to_owned()?;
    let mut host = Host { dns: None, link: None, journal: Journal::new(guard), netlink: Netlink::open()? };
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        let mut ready =
            [PollFd::new(socket.as_fd(), PollFlags::POLLIN), PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            other => other?,
        };
        if ready[1].any() == Some(true)
            && let Some(signal) = signals.read_signal()?
        {
            if signal.ssi_signo == Signal::SIGTERM as u32 {
                return Ok(());
            }
            continue;
        }
        let length = match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC)
        {
            Ok(0) | Err(Errno::ECONNRESET) => return Ok(()),
            Ok(length) => length,
            Err(Errno::EAGAIN | Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        let reply = match buffer.get(..length).map(serde_json::from_slice) {
            Some(Ok(request)) => host.serve(request).unwrap_or_else(Reply::Failed),
            Some(Err(error)) => Reply::Failed(failure("understand the request", &error, "")),
            None => Reply::Failed(failure("understand the request", &"it is too long", "")),
        };
        if !host.send(&socket, &reply)? {
            return Ok(());
        }
    }
}

impl Host {
    fn serve(&mut self, request: Request) -> Result<Reply, Failure> {
        let _lock = match request {
            Request::Undo => None,
            _ => Some(journal::lock().map_err(in_the_way)?),
        };
        match request {
            Request::CreateTun { mtu } => self.create_tun(mtu).map(Reply::Tun),
            Request::SetRoutes { ranges, keep, take } => {
                self.set_routes(&ranges, &keep, &take).map(|()| Reply::Routes)
            }
            Request::SetDns { server, domain, search } => {
                self.set_dns(server, &domain, search).map(Reply::Dns)
            }
            Request::Undo => {
                self.dns = None;
                self.link = None;
                Ok(Reply::Undone)
            }
        }
    }

    /// `false` when the daemon is gone.
    fn send(&self, socket: &OwnedFd, reply: &Reply) -> anyhow::Result<bool> {
        let message = serde_json::to_vec(reply)?;
        let device = self.link.as_ref().and_then(Link::device).map(AsRawFd::as_raw_fd);
        let fds: Vec<_> = device.filter(|_| matches!(reply, Reply::Tun(_))).into_iter().collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
        let parts = [IoSlice::new(&message)];
        match sendmsg::<()>(socket.as_raw_fd(), &parts, control, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(_) => Ok(true),
            Err(Errno::EPIPE | Errno::ECONNRESET) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    fn create_tun(&mut self, mtu: u16) -> Result<TunInfo, Failure> {
        if mtu < MTU_MIN {
            return Err(failure("create the TUN", &format!("an MTU of {mtu} is below {MTU_MIN}"), ""));
        }
        if self.link.is_some() {
            return Err(failure("create the TUN", &"there is one already", ""));
        }
        let journal = &mut self.journal;
        let made = Link::apply(&self.netlink, mtu, |name| {
            journal.entry.tun = Some(name.to_owned());
            journal.write().map_err(in_the_way)
        });
        let link = self.link.insert(made?);
        Ok(TunInfo {
            name: link.name().to_owned(),
            index: link.index(),
            mtu,
            addresses: link.addresses().to_vec(),
        })
    }

    fn set_routes(&mut self, wanted: &[IpNet], keep: &[IpAddr], take: &[IpNet]) -> Result<(), Failure> {
        let what = "route the cluster's addresses";
        if wanted.len() > MAX_RANGES || take.len() > MAX_RANGES || keep.len() > MAX_RANGES {
            return Err(failure(what, &format!("more than {MAX_RANGES} ranges"), ""));
        }
        let link = self.link.as_mut().ok_or_else(|| failure(what, &"there is no TUN yet", ""))?;
        let trouble = |error: NetlinkError| failure(what, &error, "");
        let mut host = self.netlink.routes().map_err(trouble)?;
        host.retain(|route| route.interface != link.name());
        let kept = |address: &IpAddr, what: &str| Kept { address: *address, what: what.to_owned() };
        let own = self.netlink.addresses().map_err(trouble)?;
        let resolvers = std::fs::read_to_string(resolver::PATH).unwrap_or_default();
        // Of the resolvers, ours may well be within: it is the cluster's.
        let ours = matches!(self.dns, Some(Dns::File(_)));
        let servers = resolver::name_servers(&resolvers).into_iter().skip(usize::from(ours));
        let mut kept: Vec<Kept> = [
            keep.iter().map(|ip| kept(ip, "the API server")).collect::<Vec<_>>(),
            own.iter().map(|ip| kept(ip, "this machine")).collect(),
            servers.map(|server| kept(&server.ip(), "this machine's name server")).collect(),
        ]
        .concat();
        kept.retain(|kept| !link.addresses().contains(&kept.address));
        let plan = ranges::plan(wanted, &host, &kept, take);
        if let Some(conflict) = plan.conflicts.first() {
            let all: Vec<String> = plan.conflicts.iter().map(ToString::to_string).collect();
            return Err(failure(what, &all.join("; "), &conflict.choices()));
        }
        link.set_routes(&plan.routes).map_err(trouble)
    }

    fn set_dns(&mut self, server: IpAddr, domain: &str, search: Vec<String>) -> Result<DnsInfo, Failure> {
        let what = "set the resolver";
        let link = self.link.as_ref().ok_or_else(|| failure(what, &"there is no TUN yet", ""))?;
        if !link.routes().iter().any(|range| range.contains(&server)) {
            return Err(failure(what, &format!("{server} is not routed to the cluster"), ""));
        }
        if search.len() > SEARCH_MAX {
            return Err(failure(what, &format!("more than {SEARCH_MAX} search domains"), ""));
        }
        for name in search.iter().map(String::as_str).chain([domain]) {
            let letters = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
            let within = name == domain || name.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.'));
            if !letters || !within || name.len() > 253 || Zones::new(name, Vec::new()).is_err() {
                return Err(failure(what, &format!("{name:?} is no name under the cluster's domain"), ""));
            }
        }
        self.dns = None;
        let stub = stub();
        if stub.is_some() && resolved::is_running(&self.netlink) {
            let guard = resolved::Guard::apply(&self.netlink, link.index(), server, domain, &search)
                .map_err(|error| failure(what, &error, "check `systemctl status systemd-resolved`"))?;
            self.dns = Some(Dns::Resolved(guard));
            return Ok(DnsInfo { mode: DnsMode::Resolved, upstream: stub.into_iter().collect() });
        }
        let setting = Setting { server, search };
        let saved =
            resolver::Guard::prepare(Path::new(resolver::PATH), &setting).map_err(resolver_failure)?;
        let upstream = resolver::Guard::upstream(&saved);
        self.journal.entry.resolver = Some(saved.clone());
        self.journal.write().map_err(in_the_way)?;
        self.dns = Some(Dns::File(resolver::Guard::apply(saved).map_err(resolver_failure)?));
        Ok(DnsInfo { mode: DnsMode::ResolvConf, upstream })
    }
}

/// The first name server of /etc/resolv.conf, if it is systemd-resolved's stub.
fn stub() -> Option<SocketAddr> {
    let text = std::fs::read_to_string(resolver::PATH).ok()?;
    resolver::name_servers(&text)
        .into_iter()
        .next()
        .filter(|first| resolved::STUBS.contains(&first.ip().to_string().as_str()))
}

fn failure(what: &str, because: &dyn std::fmt::Display, try_: &str) -> Failure {
    Failure { error: format!("cannot {what}"), because: because.to_string(), try_: try_.to_owned() }
}

fn in_the_way(error: JournalError) -> Failure {
    failure("note down what is changed", &error, "make sure that /run is writable and /run/forkd is root's")
}

fn resolver_failure(error: ResolverError) -> Failure {
    let try_ = match &error {
        ResolverError::Managed(_) => "end the other session with `forkd quit`",
        ResolverError::ReadOnly { .. } => {
            "use systemd-resolved, or make /etc/resolv.conf writable (in a container: mount it read-write)"
        }
        ResolverError::TooLong(_) | ResolverError::Io { .. } => "look at /etc/resolv.conf",
    };
    failure("set the resolver", &error, try_)
}

impl From<LinkError> for Failure {
    fn from(error: LinkError) -> Self {
        let try_ = match &error {
            LinkError::Device(_) => {
                "check that /dev/net/tun exists and that this process may use it (CAP_NET_ADMIN)"
            }
            LinkError::NoOffload => "use a kernel of 4.8 or later",
            LinkError::Exhausted(_) => {
                "see `ip address` and `ip route`: end other sessions with `forkd quit`"
            }
            LinkError::Netlink(_) => "",
        };
        failure("create the TUN", &error, try_)
    }
}
