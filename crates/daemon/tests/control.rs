//! The control protocol over a real unix socket: both ends as the product uses them, around a handler that records.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use forkd_daemon::control::{self, Client, Handler, Intercept, Leave, Progress, Reply, Request};
use forkd_daemon::failure::{Exit, Failure};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

/// Answers by the Service's name; tells of what was abandoned.
struct Recorder {
    abandoned: mpsc::UnboundedSender<Intercept>,
    dropped: mpsc::UnboundedSender<()>,
    started: mpsc::UnboundedSender<()>,
    handled: Mutex<Vec<Request>>,
}

impl Handler for Recorder {
    async fn handle(&self, request: Request, progress: Progress) -> Result<Value, Failure> {
        self.handled.lock().unwrap().push(request.clone());
        self.started.send(()).unwrap();
        match &request {
            Request::Intercept(wanted) if wanted.service == "hangs" => {
                let _told = TellDrop(self.dropped.clone());
                std::future::pending().await
            }
            Request::Intercept(wanted) if wanted.service == "fails" => {
                Err(Failure::new("cannot").because("of that").advice("this").exit(Exit::Refused))
            }
            _ => {
                progress.step("one");
                progress.note("two").await;
                Ok(json!("done"))
            }
        }
    }

    async fn abandoned(&self, intercept: Intercept) {
        self.abandoned.send(intercept).unwrap();
    }
}

struct TellDrop(mpsc::UnboundedSender<()>);

impl Drop for TellDrop {
    fn drop(&mut self) {
        self.0.send(()).unwrap();
    }
}

struct Fixture {
    socket: PathBuf,
    recorder: Arc<Recorder>,
    abandoned: mpsc::UnboundedReceiver<Intercept>,
    dropped: mpsc::UnboundedReceiver<()>,
    started: mpsc::UnboundedReceiver<()>,
}

impl Drop for Fixture {
    fn drop(&mut self) {
        std::fs::remove_file(&self.socket).unwrap();
    }
}

fn fixture() -> Fixture {
    let unique = forkd_daemon::state::random_hex().unwrap();
    let socket = std::env::temp_dir().join(format!("forkd-{}.sock", &unique[..8]));
    let listener = UnixListener::bind(&socket).unwrap();
    let (abandoned_tx, abandoned) = mpsc::unbounded_channel();
    let (dropped_tx, dropped) = mpsc::unbounded_channel();
    let (started_tx, started) = mpsc::unbounded_channel();
    let recorder = Arc::new(Recorder {
        abandoned: abandoned_tx,
        dropped: dropped_tx,
        started: started_tx,
        handled: Mutex::default(),
    });
    let handler = recorder.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let handler = handler.clone();
            tokio::spawn(async move { control::serve(stream, &*handler).await });
        }
    });
    Fixture { socket, recorder, abandoned, dropped, started }
}

fn intercept(service: &str, attached: bool) -> Request {
    Request::Intercept(Intercept {
        service: service.into(),
        namespace: Some("shop".into()),
        fork: None,
        ports: vec!["8080:http".parse().unwrap()],
        all: false,
        baseline_when_gone: false,
        environment: false,
        attached,
    })
}

async fn client(fixture: &Fixture) -> Client {
    Client::connect(&fixture.socket).await.unwrap().unwrap()
}

#[tokio::test]
async fn progress_and_notes_come_before_the_answer_and_requests_follow_each_other() {
    let fixture = fixture();
    let mut client = client(&fixture).await;
    let mut heard = Vec::new();
    for request in [Request::Connect { namespace: None }, intercept("cart", false), Request::Status] {
        let answer: String = client.call(request, |reply| heard.push(reply.clone())).await.unwrap();
        assert_eq!(answer, "done");
    }
    let step = Reply::Progress { message: "one".into() };
    assert_eq!(heard[..2], [step, Reply::Note { message: "two".into() }]);
    assert_eq!(heard.len(), 6);
    assert_eq!(fixture.recorder.handled.lock().unwrap()[1], intercept("cart", false), "unchanged on its way");
}

#[tokio::test]
async fn a_failure_arrives_with_its_three_parts_and_the_conversation_goes_on() {
    let fixture = fixture();
    let mut client = client(&fixture).await;
    let failure = client.call::<Value>(intercept("fails", true), |_| ()).await.unwrap_err();
    assert_eq!(failure, Failure::new("cannot").because("of that").advice("this").exit(Exit::Refused));
    client.call::<Value>(Request::Status, |_| ()).await.unwrap();
}

#[tokio::test]
async fn the_work_for_a_command_that_goes_away_is_dropped() {
    let mut fixture = fixture();
    let mut client = client(&fixture).await;
    tokio::select! {
        _ = client.call::<Value>(intercept("hangs", false), |_| ()) => panic!("it hangs"),
        started = fixture.started.recv() => started.unwrap(),
    }
    drop(client);
    fixture.dropped.recv().await.unwrap();
    assert!(fixture.abandoned.try_recv().is_err(), "it undoes itself");
}

#[tokio::test]
async fn only_an_attached_intercept_ends_with_its_connection() {
    let mut fixture = fixture();
    let mut one = client(&fixture).await;
    one.call::<Value>(intercept("stays", false), |_| ()).await.unwrap();
    drop(one);
    let mut two = client(&fixture).await;
    two.call::<Value>(intercept("cart", true), |_| ()).await.unwrap();
    two.call::<Value>(intercept("fails", true), |_| ()).await.unwrap_err();
    two.call::<Value>(intercept("left", true), |_| ()).await.unwrap();
    let leave = Leave { service: "left".into(), namespace: Some("shop".into()), fork: None };
    two.call::<Value>(Request::Leave(leave), |_| ()).await.unwrap();
    drop(two);
    let Request::Intercept(cart) = intercept("cart", true) else { unreachable!() };
    assert_eq!(fixture.abandoned.recv().await, Some(cart));
    assert!(fixture.abandoned.try_recv().is_err(), "nothing else");
}

#[tokio::test]
async fn another_version_is_told_so_but_may_quit() {
    let fixture = fixture();
    let mut stream = BufReader::new(UnixStream::connect(&fixture.socket).await.unwrap());
    stream.write_all(b"{\"version\":99,\"request\":\"status\"}\n").await.unwrap();
    let mut line = String::new();
    stream.read_line(&mut line).await.unwrap();
    assert!(line.contains("\"reply\":\"error\"") && line.contains("another version"), "{line}");
    stream.write_all(b"{\"version\":99,\"request\":\"quit\"}\n").await.unwrap();
    line.clear();
    while !line.contains("done") {
        stream.read_line(&mut line).await.unwrap();
    }
    assert_eq!(*fixture.recorder.handled.lock().unwrap(), [Request::Quit]);
}

#[tokio::test]
async fn bytes_that_are_no_request_end_the_conversation() {
    let fixture = fixture();
    let mut stream = UnixStream::connect(&fixture.socket).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut rest = Vec::new();
    // The unread second line may turn the end into a reset.
    let _ = stream.read_to_end(&mut rest).await;
    assert!(rest.is_empty());
    assert!(fixture.recorder.handled.lock().unwrap().is_empty());
}

#[tokio::test]
async fn no_daemon_is_no_error_and_a_dead_one_is_exit_3() {
    assert!(Client::connect(&std::env::temp_dir().join("forkd-nobody.sock")).await.unwrap().is_none());
    let unique = forkd_daemon::state::random_hex().unwrap();
    let socket = std::env::temp_dir().join(format!("forkd-{}.sock", &unique[..8]));
    let listener = UnixListener::bind(&socket).unwrap();
    let mut client = Client::connect(&socket).await.unwrap().unwrap();
    drop(listener.accept().await.unwrap());
    let failure = client.call::<Value>(Request::Status, |_| ()).await.unwrap_err();
    assert_eq!(failure.exit, Exit::NoDaemon);
    drop(listener);
    assert!(Client::connect(&socket).await.unwrap().is_none(), "a stale socket");
    std::fs::remove_file(&socket).unwrap();
}
