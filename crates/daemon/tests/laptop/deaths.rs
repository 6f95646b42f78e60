//! Whoever dies, however: routes, TUN and resolver are as before.

use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use forkd_daemon::helper::{HelperClient, HelperError, spawn_helper};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::world::{RESOLV_CONF, helper, ip, ip_says, log, ranges, search, set_up, wait_for};

pub fn cases() -> Vec<(&'static str, fn())> {
    vec![
        ("the_death_of_the_daemon_undoes_everything", the_death_of_the_daemon_undoes_everything),
        ("the_death_of_the_helper_undoes_everything", the_death_of_the_helper_undoes_everything),
        ("the_death_of_the_guard_undoes_everything", the_death_of_the_guard_undoes_everything),
        (
            "the_death_of_all_leaves_names_working_and_is_swept_up",
            the_death_of_all_leaves_names_working_and_is_swept_up,
        ),
        ("a_sweep_leaves_a_live_helper_alone", a_sweep_leaves_a_live_helper_alone),
        ("what_the_host_has_is_never_taken", what_the_host_has_is_never_taken),
        (
            "routes_are_replaced_and_a_refusal_changes_nothing",
            routes_are_replaced_and_a_refusal_changes_nothing,
        ),
        ("requests_that_ask_too_much_are_refused", requests_that_ask_too_much_are_refused),
        ("a_read_only_etc_is_an_error_with_a_way_out", a_read_only_etc_is_an_error_with_a_way_out),
        ("a_mounted_resolv_conf_is_written_in_place", a_mounted_resolv_conf_is_written_in_place),
    ]
}

/// A daemon of its own process, connected: it holds the helper's socket and the TUN, and says "up".
pub fn stand_in() {
    let helper = helper();
    block_on(async {
        let client = HelperClient::new(helper).expect("helper's socket");
        let (_info, _tun, _dns) = set_up(&client).await.unwrap_or_else(|error| panic!("{error:?}"));
        println!("up");
        std::future::pending::<()>().await;
    });
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime").block_on(future)
}

struct Processes {
    daemon: Child,
    worker: Pid,
    guard: Pid,
}

impl Processes {
    fn start() -> Self {
        let mut daemon = Command::new("/proc/self/exe")
            .arg("stand-in")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start the stand-in");
        let mut line = String::new();
        BufReader::new(daemon.stdout.take().expect("piped")).read_line(&mut line).expect("read");
        assert_eq!(line, "up\n");
        assert!(ip_says("link").contains("forkd0"));
        assert!(ip_says("route").contains("10.96.0.0/15 dev forkd0"), "{}", ip_says("route"));
        assert!(resolv_conf().contains("nameserver 10.96.0.10\n"));
        let journal = journals().pop().expect("a journal");
        let name = journal.file_stem().expect("a name").to_string_lossy().into_owned();
        let worker: i32 = name.trim_start_matches("helper-").parse().expect("a number");
        let status = std::fs::read_to_string(format!("/proc/{worker}/status")).expect("the helper lives");
        let guard = status
            .lines()
            .find_map(|line| line.strip_prefix("PPid:\t"))
            .expect("PPid")
            .parse()
            .expect("a number");
        Self { daemon, worker: Pid::from_raw(worker), guard: Pid::from_raw(guard) }
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

fn journals() -> Vec<PathBuf> {
    let Ok(list) = std::fs::read_dir("/run/forkd") else { return Vec::new() };
    list.map(|item| item.expect("list").path())
        .filter(|path| path.extension().is_some_and(|is| is == "json"))
        .collect()
}

fn resolv_conf() -> String {
    std::fs::read_to_string("/etc/resolv.conf").expect("read resolv.conf")
}

fn wait_until_clean() {
    wait_for("a machine as before", || {
        !ip_says("link").contains("forkd")
            && !ip_says("route").contains("10.96")
            && resolv_conf() == RESOLV_CONF
    });
    wait_for("an end of the journals", || journals().is_empty());
}

fn dead(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.map_or(true, |stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')))
}

fn the_death_of_the_daemon_undoes_everything() {
    let processes = Processes::start();
    kill(Pid::from_raw(processes.daemon.id() as i32), Signal::SIGKILL).expect("kill");
    wait_until_clean();
    wait_for("an end of helper and guard", || dead(processes.worker) && dead(processes.guard));
}

fn the_death_of_the_helper_undoes_everything() {
    let processes = Processes::start();
    kill(processes.worker, Signal::SIGKILL).expect("kill");
    // The daemon lives and holds the TUN open: it is deleted all the same.
    wait_until_clean();
    wait_for("an end of the guard", || dead(processes.guard));
}

fn the_death_of_the_guard_undoes_everything() {
    let processes = Processes::start();
    kill(processes.guard, Signal::SIGKILL).expect("kill");
    wait_until_clean();
    wait_for("an end of the helper", || dead(processes.worker));
}

fn the_death_of_all_leaves_names_working_and_is_swept_up() {
    let processes = Processes::start();
    for pid in [processes.guard, processes.worker] {
        // Stopped first, so that none of them gets to see the others die.
        kill(pid, Signal::SIGSTOP).expect("stop");
    }
    for pid in [processes.guard, processes.worker, Pid::from_raw(processes.daemon.id() as i32)] {
        kill(pid, Signal::SIGKILL).expect("kill");
    }
    wait_for("an end of all", || dead(processes.worker) && dead(processes.guard));
    drop(processes);
    // The TUN goes with its last descriptor; the resolver's file is left with the original servers in it.
    wait_for("an end of the TUN", || !ip_says("link").contains("forkd"));
    assert!(resolv_conf().contains("nameserver 192.0.2.53\n"));
    assert_eq!(journals().len(), 1);
    let next = helper();
    assert_eq!(resolv_conf(), RESOLV_CONF);
    assert!(journals().is_empty());
    drop(next);
}

fn a_sweep_leaves_a_live_helper_alone() {
    let processes = Processes::start();
    let before = resolv_conf();
    block_on(async {
        let other = started().await;
        assert_eq!((journals().len(), resolv_conf()), (1, before.clone()));
        let (info, _tun) = other.create_tun(1500).await.expect("a TUN beside the other");
        assert_eq!(info.name, "forkd1");
        let taken =
            other.set_routes(ranges(), vec![], vec![]).await.expect_err("ranges of the other session");
        assert!(taken.to_string().contains("forkd0"), "{taken}");
        let free = vec!["10.200.0.0/16".parse().expect("a range")];
        other.set_routes(free, vec![], vec![]).await.expect("ranges of its own");
        let server = "10.200.0.10".parse().expect("an address");
        let held =
            other.set_dns(server, "cluster.local".to_owned(), search()).await.expect_err("held by the other");
        assert!(held.to_string().contains("another forkd session"), "{held}");
    });
    wait_for("an end of the second TUN", || !ip_says("link").contains("forkd1"));
    assert!(ip_says("link").contains("forkd0") && resolv_conf() == before);
    drop(processes);
    wait_until_clean();
}

/// A client of a helper that has done nothing yet.
async fn started() -> HelperClient {
    let socket = spawn_helper(log()).await.unwrap_or_else(|failure| panic!("{failure:?}"));
    HelperClient::new(socket).expect("helper's socket")
}

/// A client with a TUN.
async fn client() -> (HelperClient, OwnedFd) {
    let client = started().await;
    let (_, tun) = client.create_tun(1500).await.expect("a TUN");
    (client, tun)
}

fn refusal(result: Result<impl std::fmt::Debug, HelperError>) -> (String, String) {
    match result {
        Err(HelperError::Failed(failure)) => (failure.because, failure.try_),
        other => panic!("not refused: {other:?}"),
    }
}

fn what_the_host_has_is_never_taken() {
    ip("tuntap add vpn0 mode tun");
    ip("addr add 10.97.3.1/24 dev vpn0");
    ip("link set vpn0 up");
    ip("route add 172.16.0.0/12 dev vpn0");
    let before = ip_says("route");
    block_on(async {
        let (client, _tun) = client().await;
        let net = |text: &str| vec![text.parse().expect("a range")];
        for range in [
            "10.97.0.0/16",
            "10.97.3.0/24",
            "172.20.0.0/16",
            "0.0.0.0/0",
            "8.0.0.0/5",
            "127.0.0.0/8",
            "192.0.2.0/24",
        ] {
            let (because, try_) = refusal(client.set_routes(net(range), vec![], vec![]).await);
            assert!(because.contains(range) && try_.contains("--skip"), "{because} {try_}");
        }
        let api = vec!["10.96.0.1".parse().expect("an address")];
        let (because, _) = refusal(client.set_routes(net("10.96.0.0/16"), api, vec![]).await);
        assert!(because.contains("the API server"), "{because}");
        assert!(!ip_says("route").contains("dev forkd0"));
        client
            .set_routes(net("172.20.0.0/16"), vec![], net("172.20.0.0/16"))
            .await
            .expect("taken explicitly");
        assert!(ip_says("route").contains("172.20.0.0/16 dev forkd0"));
        client.undo().await.expect("undo");
    });
    assert_eq!(ip_says("route"), before);
}

fn routes_are_replaced_and_a_refusal_changes_nothing() {
    block_on(async {
        let (client, _tun) = client().await;
        let nets =
            |texts: &[&str]| texts.iter().map(|text| text.parse().expect("a range")).collect::<Vec<_>>();
        client.set_routes(nets(&["10.96.0.0/16", "10.98.0.0/16"]), vec![], vec![]).await.expect("first");
        client.set_routes(nets(&["10.96.0.0/16", "10.99.0.0/16"]), vec![], vec![]).await.expect("second");
        let after = ip_says("route");
        assert!(after.contains("10.99.0.0/16") && !after.contains("10.98.0.0/16"), "{after}");
        refusal(client.set_routes(nets(&["10.100.0.0/16", "0.0.0.0/0"]), vec![], vec![]).await);
        assert_eq!(ip_says("route"), after);
    });
}

fn requests_that_ask_too_much_are_refused() {
    block_on(async {
        let bare = started().await;
        let server = "10.96.0.10".parse().expect("an address");
        refusal(bare.set_routes(ranges(), vec![], vec![]).await);
        refusal(bare.set_dns(server, "cluster.local".to_owned(), vec![]).await);
        refusal(bare.create_tun(100).await);
        let (client, _tun) = client().await;
        refusal(client.create_tun(1500).await);
        refusal(client.set_dns(server, "cluster.local".to_owned(), vec![]).await);
        client.set_routes(ranges(), vec![], vec![]).await.expect("routes");
        for (domain, search) in [
            ("", ""),
            (".", "."),
            ("cluster.local", "example.com"),
            ("cluster.local", "evilcluster.local"),
            ("cluster.local\nnameserver 192.0.2.66", "cluster.local"),
        ] {
            refusal(client.set_dns(server, domain.to_owned(), vec![search.to_owned()]).await);
        }
        refusal(
            client
                .set_dns("192.0.2.66".parse().expect("an address"), "cluster.local".to_owned(), vec![])
                .await,
        );
        let long = vec!["10.96.0.0/16".parse().expect("a range"); 5000];
        refusal(client.set_routes(long, vec![], vec![]).await);
        assert_eq!(resolv_conf(), RESOLV_CONF);
    });
}

fn a_read_only_etc_is_an_error_with_a_way_out() {
    let none: Option<&str> = None;
    mount(none, "/etc", none, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, none).expect("remount");
    block_on(async {
        let (client, _tun) = client().await;
        client.set_routes(ranges(), vec![], vec![]).await.expect("routes");
        let server = "10.96.0.10".parse().expect("an address");
        let (because, try_) = refusal(client.set_dns(server, "cluster.local".to_owned(), search()).await);
        assert!(
            because.contains("/etc/resolv.conf") && try_.contains("systemd-resolved"),
            "{because} {try_}"
        );
    });
    assert_eq!(resolv_conf(), RESOLV_CONF);
}

fn a_mounted_resolv_conf_is_written_in_place() {
    std::fs::write("/run/resolv.conf", RESOLV_CONF).expect("write");
    let none: Option<&str> = None;
    mount(Some("/run/resolv.conf"), "/etc/resolv.conf", none, MsFlags::MS_BIND, none).expect("bind");
    let processes = Processes::start();
    let mut other = String::new();
    std::fs::File::open("/run/resolv.conf").expect("open").read_to_string(&mut other).expect("read");
    assert!(other.contains("10.96.0.10"), "the same file");
    drop(processes);
    wait_until_clean();
}
