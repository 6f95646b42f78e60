//! TCP as applications see it.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::libc;
use sha2::{Digest, Sha256};

use crate::world::{FORBIDDEN, FORBIDDEN_V6, NOBODY, NOWHERE, SERVICE, SERVICE_V6, World, at, wait_for};

pub fn cases() -> Vec<(&'static str, fn())> {
    vec![
        ("connect_sees_what_it_would_see_in_the_pod", connect_sees_what_it_would_see_in_the_pod),
        ("thirty_megabytes_come_back_unchanged", thirty_megabytes_come_back_unchanged),
        ("half_close_passes_in_both_directions", half_close_passes_in_both_directions),
        ("a_reset_passes_in_both_directions", a_reset_passes_in_both_directions),
        ("a_reset_after_half_close_still_passes", a_reset_after_half_close_still_passes),
        ("a_slow_server_holds_the_application_back", a_slow_server_holds_the_application_back),
        ("a_slow_application_holds_the_server_back", a_slow_application_holds_the_server_back),
        ("a_thousand_connections_leave_nothing_behind", a_thousand_connections_leave_nothing_behind),
        ("quitting_resets_what_is_open", quitting_resets_what_is_open),
    ]
}

/// Not tests: `cargo test --test laptop -- case NAME` prints numbers.
pub fn measurements() -> Vec<(&'static str, fn())> {
    vec![("measure_throughput", measure_throughput), ("measure_memory", measure_memory)]
}

const PORT: u16 = 7;
const BULK: usize = 30_000_000;

/// Serves each connection on a thread of its own.
fn serve(address: SocketAddr, handle: impl Fn(TcpStream) + Send + Sync + Clone + 'static) {
    let listener = TcpListener::bind(address).expect("listen");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, handle) = (stream.expect("accept"), handle.clone());
            std::thread::spawn(move || handle(stream));
        }
    });
}

fn echo(mut stream: TcpStream) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => stream.write_all(&buffer[..length]).expect("write"),
            // The application may reset it.
            Err(_) => return,
        }
    }
}

fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as u8
        })
        .collect()
}

fn errno(address: SocketAddr) -> i32 {
    TcpStream::connect(address).expect_err("must not connect").raw_os_error().expect("an errno")
}

fn reset_on_close(stream: &TcpStream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    nix::sys::socket::setsockopt(&stream.as_fd(), nix::sys::socket::sockopt::Linger, &linger)
        .expect("linger");
}

fn connect_sees_what_it_would_see_in_the_pod() {
    let world = World::connect(|| {});
    for (address, expected) in [
        (at(SERVICE, 81), libc::ECONNREFUSED),
        (at(SERVICE_V6, 81), libc::ECONNREFUSED),
        (at(NOWHERE, 80), libc::ENETUNREACH),
        (at(NOBODY, 80), libc::EHOSTUNREACH),
        (at(FORBIDDEN, 80), libc::EHOSTUNREACH),
        (at(FORBIDDEN_V6, 80), libc::EACCES),
    ] {
        assert_eq!(errno(address), expected, "{address}");
    }
    wait_for("an end of all flows", || world.look().flows == 0);
}

fn thirty_megabytes_come_back_unchanged() {
    let _world = World::connect(|| {
        serve(at(SERVICE, PORT), echo);
        serve(at(SERVICE_V6, PORT), echo);
    });
    let sent = pattern(BULK);
    for ip in [SERVICE, SERVICE_V6] {
        let mut stream = TcpStream::connect(at(ip, PORT)).expect("connect");
        let (mut writer, data) = (stream.try_clone().expect("clone"), sent.clone());
        let writing = std::thread::spawn(move || {
            writer.write_all(&data).expect("write");
            writer.shutdown(Shutdown::Write).expect("shutdown");
        });
        let mut received = Vec::new();
        stream.read_to_end(&mut received).expect("read");
        writing.join().expect("writer");
        assert_eq!(received.len(), sent.len(), "{ip}");
        assert_eq!(Sha256::digest(&received), Sha256::digest(&sent), "{ip}");
    }
}

fn half_close_passes_in_both_directions() {
    let world = World::connect(|| {
        // Reads to the end, then says how much it was.
        serve(at(SERVICE, PORT), |mut stream| {
            let mut all = Vec::new();
            stream.read_to_end(&mut all).expect("read");
            stream.write_all(all.len().to_string().as_bytes()).expect("write");
        });
        // Closes its side first, then reads on.
        serve(at(SERVICE, PORT + 1), |mut stream| {
            stream.write_all(b"go on").expect("write");
            stream.shutdown(Shutdown::Write).expect("shutdown");
            let mut all = Vec::new();
            stream.read_to_end(&mut all).expect("read");
            assert_eq!(all.len(), 1_000_000);
        });
    });
    let mut stream = TcpStream::connect(at(SERVICE, PORT)).expect("connect");
    stream.write_all(&pattern(100_001)).expect("write");
    stream.shutdown(Shutdown::Write).expect("shutdown");
    let mut count = String::new();
    stream.read_to_string(&mut count).expect("read");
    assert_eq!(count, "100001");

    let mut stream = TcpStream::connect(at(SERVICE, PORT + 1)).expect("connect");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("read");
    assert_eq!(text, "go on");
    stream.write_all(&pattern(1_000_000)).expect("write after the server's FIN");
    drop(stream);
    wait_for("an end of all flows", || world.look().flows == 0);
}

fn a_reset_passes_in_both_directions() {
    let (seen, sees) = mpsc::channel();
    let world = World::connect(move || {
        serve(at(SERVICE, PORT), |mut stream| {
            stream.read_exact(&mut [0]).expect("read");
            reset_on_close(&stream);
        });
        serve(at(SERVICE, PORT + 1), move |mut stream| {
            stream.read_exact(&mut [0]).expect("read");
            stream.write_all(b"!").expect("write");
            seen.send(stream.read(&mut [0]).map_err(|error| error.kind())).expect("the test waits");
        });
    });
    let mut stream = TcpStream::connect(at(SERVICE, PORT)).expect("connect");
    stream.write_all(b"?").expect("write");
    assert_eq!(stream.read(&mut [0]).expect_err("reset").kind(), ErrorKind::ConnectionReset);

    let mut stream = TcpStream::connect(at(SERVICE, PORT + 1)).expect("connect");
    stream.write_all(b"?").expect("write");
    stream.read_exact(&mut [0]).expect("read");
    reset_on_close(&stream);
    drop(stream);
    assert_eq!(sees.recv().expect("the server saw an end"), Err(ErrorKind::ConnectionReset));
    wait_for("an end of all flows", || world.look().flows == 0);
}

fn a_reset_after_half_close_still_passes() {
    let (go, gone) = mpsc::channel::<()>();
    let gone = std::sync::Arc::new(std::sync::Mutex::new(gone));
    let world = World::connect(move || {
        serve(at(SERVICE, PORT), move |stream| {
            stream.shutdown(Shutdown::Write).expect("shutdown");
            gone.lock().expect("lock").recv().expect("told to");
            reset_on_close(&stream);
        });
    });
    let mut stream = TcpStream::connect(at(SERVICE, PORT)).expect("connect");
    assert_eq!(stream.read(&mut [0]).expect("FIN"), 0);
    go.send(()).expect("the server waits");
    // A write may still go out before the reset arrives; one of the next ones must not.
    wait_for("a reset at the application", || stream.write(b"x").is_err());
    wait_for("an end of all flows", || world.look().flows == 0);
}

/// Writes until nothing moves for a second, and returns how much went.
fn write_until_full(stream: &mut TcpStream) -> usize {
    stream.set_write_timeout(Some(Duration::from_secs(1))).expect("timeout");
    let chunk = pattern(64 * 1024);
    let mut written = 0;
    loop {
        match stream.write(&chunk[written % chunk.len()..]) {
            Ok(length) => written += length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return written,
            Err(error) => panic!("{error}"),
        }
    }
}

/// The kernels' socket buffers (at most 6 MiB each by default, four of them here) and our two rings.
const ABSORBED: usize = 26 * 1024 * 1024;

fn check(chunks: usize, mut stream: impl Read) {
    let chunk = pattern(64 * 1024);
    let mut received = Vec::new();
    stream.read_to_end(&mut received).expect("read");
    assert_eq!(received.len(), chunks);
    assert!(received.iter().zip(chunk.iter().cycle()).all(|(one, other)| one == other), "bytes in order");
}

fn a_slow_server_holds_the_application_back() {
    let (tell, told) = mpsc::channel::<usize>();
    let (done, is_done) = mpsc::channel();
    let told = std::sync::Arc::new(std::sync::Mutex::new(told));
    let _world = World::connect(move || {
        serve(at(SERVICE, PORT), move |stream| {
            check(told.lock().expect("lock").recv().expect("told"), stream);
            done.send(()).expect("the test waits");
        });
    });
    let mut stream = TcpStream::connect(at(SERVICE, PORT)).expect("connect");
    let written = write_until_full(&mut stream);
    assert!(written < ABSORBED, "{written} bytes were taken although nobody reads");
    stream.shutdown(Shutdown::Write).expect("shutdown");
    tell.send(written).expect("the server waits");
    is_done.recv().expect("the server has it all");
}

fn a_slow_application_holds_the_server_back() {
    let (tell, told) = mpsc::channel();
    let _world = World::connect(move || {
        serve(at(SERVICE, PORT), move |mut stream| {
            tell.send(write_until_full(&mut stream)).expect("the test waits");
        });
    });
    let stream = TcpStream::connect(at(SERVICE, PORT)).expect("connect");
    let written = told.recv().expect("the server is held back");
    assert!(written < ABSORBED, "{written} bytes were taken although nobody reads");
    check(written, stream);
}

fn a_thousand_connections_leave_nothing_behind() {
    let world = World::connect(|| serve(at(SERVICE, PORT), echo));
    let threads: Vec<_> = (0..20)
        .map(|_| {
            std::thread::spawn(|| {
                for _ in 0..50 {
                    let mut stream = TcpStream::connect(at(SERVICE, PORT)).expect("connect");
                    stream.write_all(b"hello").expect("write");
                    let mut answer = [0; 5];
                    stream.read_exact(&mut answer).expect("read");
                    assert_eq!(&answer, b"hello");
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("a thread's connections");
    }
    let open: Vec<_> = (0..1000).map(|_| TcpStream::connect(at(SERVICE, PORT)).expect("connect")).collect();
    assert_eq!(world.look().flows, 1000);
    drop(open);
    wait_for("an end of all flows", || world.look().flows == 0);
}

fn quitting_resets_what_is_open() {
    let world = World::connect(|| serve(at(SERVICE, PORT), echo));
    let mut stream = TcpStream::connect(at(SERVICE, PORT)).expect("connect");
    stream.write_all(b"hello").expect("write");
    stream.read_exact(&mut [0; 5]).expect("read");
    drop(world);
    assert_eq!(stream.read(&mut [0]).expect_err("reset").kind(), ErrorKind::ConnectionReset);
}

fn measure_throughput() {
    const TOTAL: usize = 4 << 30;
    let _world = World::connect(|| {
        serve(at(SERVICE, PORT), |mut stream| {
            let mut buffer = vec![0; 256 * 1024];
            while stream.read(&mut buffer).expect("read") > 0 {}
            stream.write_all(b"!").expect("write");
        });
        serve(at(SERVICE, PORT + 1), |mut stream| {
            let buffer = vec![0; 256 * 1024];
            for _ in 0..TOTAL / buffer.len() {
                stream.write_all(&buffer).expect("write");
            }
        });
        serve(at(SERVICE, PORT + 2), echo);
    });
    let gigabits = |begun: Instant| TOTAL as f64 * 8e-9 / begun.elapsed().as_secs_f64();
    let mut buffer = vec![0; 256 * 1024];
    for _ in 0..3 {
        let mut stream = TcpStream::connect(at(SERVICE, PORT)).expect("connect");
        let begun = Instant::now();
        for _ in 0..TOTAL / buffer.len() {
            stream.write_all(&buffer).expect("write");
        }
        stream.shutdown(Shutdown::Write).expect("shutdown");
        stream.read_exact(&mut [0]).expect("read");
        eprintln!("up {:.1} Gbit/s", gigabits(begun));
        let mut stream = TcpStream::connect(at(SERVICE, PORT + 1)).expect("connect");
        let begun = Instant::now();
        while stream.read(&mut buffer).expect("read") > 0 {}
        eprintln!("down {:.1} Gbit/s", gigabits(begun));
        let mut stream = TcpStream::connect(at(SERVICE, PORT + 2)).expect("connect");
        stream.set_nodelay(true).expect("nodelay");
        let mut times: Vec<_> = (0..5000)
            .map(|_| {
                let begun = Instant::now();
                stream.write_all(&[0; 64]).expect("write");
                stream.read_exact(&mut [0; 64]).expect("read");
                begun.elapsed()
            })
            .collect();
        times.sort();
        let mut connects: Vec<_> = (0..1000)
            .map(|_| {
                let begun = Instant::now();
                TcpStream::connect(at(SERVICE, PORT + 2)).expect("connect");
                begun.elapsed()
            })
            .collect();
        connects.sort();
        eprintln!("echo p50 {:?} p99 {:?}; connect p50 {:?}", times[2500], times[4950], connects[500]);
    }
}

fn measure_memory() {
    let rss = || {
        let status = std::fs::read_to_string("/proc/self/status").expect("read");
        let line = status.lines().find(|line| line.starts_with("VmRSS")).expect("VmRSS").to_owned();
        line.split_whitespace().nth(1).expect("a number").parse::<usize>().expect("a number")
    };
    // The servers' threads are of this process too: one that keeps its connections without one.
    let _world = World::connect(|| {
        let listener = TcpListener::bind(at(SERVICE, PORT)).expect("listen");
        std::thread::spawn(move || {
            let _kept: Vec<_> = listener.incoming().take(4000).collect();
            std::thread::park();
        });
    });
    let before = rss();
    let mut open = Vec::new();
    for step in 1..=3 {
        while open.len() < step * 1000 {
            let mut stream = TcpStream::connect(at(SERVICE, PORT)).expect("connect");
            stream.write_all(b"hello").expect("write");
            open.push(stream);
        }
        eprintln!("{} idle flows: {} KiB each", open.len(), (rss() - before) as f64 / open.len() as f64);
    }
}
