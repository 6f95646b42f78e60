//! `/healthz` and `/readyz` for the kubelet: the least HTTP that it takes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// Probes at a time; more wait in the listener's queue.
const MAX_PROBES: usize = 16;
/// A request's first line is far shorter.
const MAX_HEAD: usize = 1024;

/// Serves until the listener fails. `ready`: this controller leads, and has seen the cluster.
///
/// # Errors
/// If the listener can take no more connections.
pub async fn serve(listener: TcpListener, ready: Arc<AtomicBool>) -> std::io::Result<()> {
    let free = Arc::new(Semaphore::new(MAX_PROBES));
    loop {
        let Ok(permit) = Arc::clone(&free).acquire_owned().await else { return Ok(()) };
        let (stream, _) = listener.accept().await?;
        let ready = Arc::clone(&ready);
        tokio::spawn(async move {
            let answer = tokio::time::timeout(Duration::from_secs(5), answer(stream, &ready)).await;
            if !matches!(answer, Ok(Ok(()))) {
                tracing::debug!("a health probe went away");
            }
            drop(permit);
        });
    }
}

async fn answer(mut stream: TcpStream, ready: &AtomicBool) -> std::io::Result<()> {
    let mut head = Vec::with_capacity(MAX_HEAD);
    while !head.contains(&b'\n') && head.len() < MAX_HEAD {
        if stream.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let (status, body) = match head.split(|byte| *byte == b' ').nth(1) {
        Some(b"/healthz") => ("200 OK", "ok\n"),
        Some(b"/readyz") if ready.load(Ordering::Acquire) => ("200 OK", "ok\n"),
        Some(b"/readyz") => ("503 Service Unavailable", "not the leader, or still looking around\n"),
        _ => ("404 Not Found", "only /healthz and /readyz\n"),
    };
    let length = body.len();
    let text = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    );
    stream.write_all(text.as_bytes()).await?;
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ready_is_said_only_when_it_is() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let ready = Arc::new(AtomicBool::new(false));
        let server = tokio::spawn(serve(listener, Arc::clone(&ready)));
        let get = async |path: &str| {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer.split(' ').nth(1).unwrap().to_owned()
        };
        assert_eq!(get("/readyz").await, "503");
        assert_eq!(get("/healthz").await, "200");
        ready.store(true, Ordering::Release);
        assert_eq!(get("/readyz").await, "200");
        assert_eq!(get("/").await, "404");
        server.abort();
    }
}
