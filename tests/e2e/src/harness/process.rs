//! Commands with a bounded life and all of their output.

use std::fmt;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::wait::eventually;

/// The longest that a command may take: installing forkd, with the cluster's other work beside it.
const LONGEST: Duration = Duration::from_secs(180);
/// Between two looks at a running command.
const BETWEEN: Duration = Duration::from_millis(5);

/// What a command left.
#[derive(Clone, Debug)]
pub struct Output {
    /// The command as it was typed.
    pub command: String,
    /// Its exit code; 128 + n if signal n ended it, as in a shell.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "$ {}\n  exit code {} after {} ms", self.command, self.code, self.took.as_millis())?;
        for (name, text) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            if !text.trim().is_empty() {
                writeln!(f, "  {name}:")?;
                text.lines().try_for_each(|line| writeln!(f, "    {line}"))?;
            }
        }
        Ok(())
    }
}

impl Output {
    /// Its standard output, if it succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(self.code == 0, "this should have succeeded:\n{self}");
        self.stdout
    }

    /// Its standard output as JSON, if it succeeded.
    #[track_caller]
    pub fn json(self) -> Value {
        let text = self.clone().ok();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("this is no JSON ({error}):\n{self}"))
    }

    /// Itself, if it failed with this code and said all of these, in any case of letters.
    #[track_caller]
    pub fn fails(self, code: i32, says: &[&str]) -> Self {
        assert!(self.code == code, "this should have ended with {code}:\n{self}");
        let said = self.stderr.to_lowercase();
        for part in says {
            assert!(said.contains(&part.to_lowercase()), "this should have said `{part}`:\n{self}");
        }
        self
    }
}

/// Runs a command to its end. Its standard input is `input`, or nothing.
#[track_caller]
pub fn run(command: &mut Command, input: Option<&str>) -> Output {
    let text = typed(command);
    let begin = Instant::now();
    let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
    let mut child = command
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start `{text}`: {error}"));
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        // A command that does not want its input says so by its exit code.
        let _ = stdin.write_all(input.as_bytes());
    }
    let stdout = drain(child.stdout.take());
    let stderr = drain(child.stderr.take());
    let Some(status) = ended(&mut child, LONGEST) else {
        let _ = child.kill();
        let _ = child.wait();
        panic!("`{text}` did not end within {} s\n{}", LONGEST.as_secs(), taken(&stdout, &stderr));
    };
    // What a command leaves running must not hold on to its output, or `$(forkd …)` in a script hangs.
    let held = Instant::now();
    while !(stdout.1.is_finished() && stderr.1.is_finished()) {
        if held.elapsed() > Duration::from_secs(10) {
            panic!("`{text}` ended, but something it started holds its output\n{}", taken(&stdout, &stderr));
        }
        sleep(BETWEEN);
    }
    Output {
        command: text,
        code: code(status),
        stdout: text_of(&stdout.0),
        stderr: text_of(&stderr.0),
        took: begin.elapsed(),
    }
}

type Drained = (Arc<Mutex<Vec<u8>>>, JoinHandle<()>);

fn drain(source: Option<impl Read + Send + 'static>) -> Drained {
    let bytes = Arc::new(Mutex::new(Vec::new()));
    let into = Arc::clone(&bytes);
    let thread = thread::spawn(move || {
        let Some(mut source) = source else { return };
        let mut buffer = [0; 8192];
        while let Ok(n @ 1..) = source.read(&mut buffer) {
            into.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&buffer[..n]);
        }
    });
    (bytes, thread)
}

fn text_of(bytes: &Mutex<Vec<u8>>) -> String {
    String::from_utf8_lossy(&bytes.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
}

fn taken(stdout: &Drained, stderr: &Drained) -> String {
    format!("stdout:\n{}\nstderr:\n{}", text_of(&stdout.0), text_of(&stderr.0))
}

fn ended(child: &mut Child, within: Duration) -> Option<ExitStatus> {
    let begin = Instant::now();
    while begin.elapsed() < within {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            return Some(status);
        }
        sleep(BETWEEN);
    }
    None
}

fn code(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(-1)
}

/// The command as a person would type it: without the scaffolding that leads into the laptop.
fn typed(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|word| word.to_string_lossy().into_owned()));
    words.join(" ")
}

/// A command that runs beside the test. Killed when dropped.
pub struct Process {
    name: String,
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
    status: Option<i32>,
}

impl Process {
    /// Starts it.
    #[track_caller]
    pub fn start(command: &mut Command) -> Self {
        let name = typed(command);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start `{name}`: {error}"));
        let lines = Arc::new(Mutex::new(Vec::new()));
        follow(child.stdout.take(), &lines);
        follow(child.stderr.take(), &lines);
        Self { name, child, lines, status: None }
    }

    /// All it has said, both streams.
    pub fn said(&self) -> String {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).join("\n")
    }

    /// Waits for a line that contains `text`.
    #[track_caller]
    pub fn says(&mut self, text: &str) -> String {
        let what = format!("`{}` says `{text}`", self.name);
        eventually(&what, || {
            if let Some(line) = self.said().lines().find(|line| line.contains(text)) {
                return Ok(line.to_owned());
            }
            // Its last words may arrive after its end.
            match self.try_code() {
                Some(code) if !self.said().contains(text) => {
                    Err(format!("it ended with {code}, having said\n{}", self.said()))
                }
                _ => Err(format!("it said\n{}", self.said())),
            }
        })
    }

    /// Its process id: the command's own, since everything on the way execs.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("process ids are small")
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).expect("the process is there");
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        self.try_code().is_none()
    }

    /// Waits for its end.
    #[track_caller]
    pub fn code(&mut self) -> i32 {
        let what = format!("`{}` ends", self.name);
        eventually(&what, || self.try_code().ok_or_else(|| format!("it said\n{}", self.said())))
    }

    fn try_code(&mut self) -> Option<i32> {
        if self.status.is_none() {
            self.status = self.child.try_wait().expect("a child can be waited for").map(code);
        }
        self.status
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.status.is_none() {
            // Gone already is as good.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn follow(source: Option<impl Read + Send + 'static>, lines: &Arc<Mutex<Vec<String>>>) {
    let Some(source) = source else { return };
    let lines = Arc::clone(lines);
    thread::spawn(move || {
        for line in BufReader::new(source).lines().map_while(Result::ok) {
            lines.lock().unwrap_or_else(PoisonError::into_inner).push(line);
        }
    });
}
