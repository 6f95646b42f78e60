//! The environment of the application, as its running container has it.
//!
//! The agent's container shares the process namespace of the container that it targets (`targetContainerName`), whose
//! first process is number 1. Where the whole pod shares one namespace, number 1 is the pause process; then the first
//! processes of containers are those without a parent.

use std::fs;
use std::io;
use std::path::Path;

/// Why the environment cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum EnvironmentError {
    /// The kernel asks for ptrace access: the same user, and no capability that the reader lacks.
    #[error(
        "may not read the environment of process {pid} ({name}): the agent's container must run as the same user as the \
         application (its securityContext), and the application must be dumpable"
    )]
    Forbidden {
        /// Number in this process namespace.
        pid: u32,
        /// Its command.
        name: String,
    },
    /// The agent is alone: its container was made without `targetContainerName`, or the application has ended.
    #[error(
        "no process of the application is visible: the agent's container does not share its process namespace"
    )]
    NoProcess,
    /// The pod shares one process namespace among several containers.
    #[error("the pod shares one process namespace, and several processes could be the application's: {0}")]
    Several(String),
    /// Anything else.
    #[error("read {path}: {source}")]
    Failed {
        /// Which file.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The environment of the application's first process: `NAME=value` pairs, each ended by a zero byte, any bytes.
/// Secrets among them: it is for the laptop, never for a log or a file.
///
/// # Errors
/// [`EnvironmentError`].
pub fn read() -> Result<Vec<u8>, EnvironmentError> {
    read_in(Path::new("/proc"), std::process::id())
}

fn read_in(proc: &Path, own: u32) -> Result<Vec<u8>, EnvironmentError> {
    let process = application(proc, own)?;
    let path = proc.join(process.pid.to_string()).join("environ");
    fs::read(&path).map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => {
            EnvironmentError::Forbidden { pid: process.pid, name: process.name }
        }
        io::ErrorKind::NotFound => EnvironmentError::NoProcess,
        _ => failed(&path, source),
    })
}

struct Process {
    pid: u32,
    parent: u32,
    name: String,
}

/// The first process of the container that the agent targets.
fn application(proc: &Path, own: u32) -> Result<Process, EnvironmentError> {
    let first = process(proc, 1)?.filter(|p| p.pid != own).ok_or(EnvironmentError::NoProcess)?;
    if first.name != "pause" {
        return Ok(first);
    }
    let mut candidates = Vec::new();
    for entry in fs::read_dir(proc).map_err(|source| failed(proc, source))? {
        let entry = entry.map_err(|source| failed(proc, source))?;
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let found = pid.map(|pid| process(proc, pid)).transpose()?.flatten();
        candidates.extend(found.filter(|p| p.parent == 0 && p.pid != 1 && p.pid != own));
    }
    match candidates.len() {
        0 => Err(EnvironmentError::NoProcess),
        1 => candidates.pop().ok_or(EnvironmentError::NoProcess),
        _ => {
            candidates.sort_by_key(|p| p.pid);
            let names: Vec<String> = candidates.iter().map(|p| format!("{} ({})", p.name, p.pid)).collect();
            Err(EnvironmentError::Several(names.join(", ")))
        }
    }
}

/// `/proc/PID/stat`: `PID (COMM) STATE PPID …`; `None` if it is gone. The command may hold spaces and parentheses.
fn process(proc: &Path, pid: u32) -> Result<Option<Process>, EnvironmentError> {
    let path = proc.join(pid.to_string()).join("stat");
    let stat = match fs::read(&path) {
        Ok(stat) => String::from_utf8_lossy(&stat).into_owned(),
        // ESRCH: it ended between open and read.
        Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(3) => {
            return Ok(None);
        }
        Err(source) => return Err(failed(&path, source)),
    };
    let fields = stat.split_once('(').and_then(|(_, rest)| rest.rsplit_once(')'));
    let parsed = fields.and_then(|(name, rest)| Some((name, rest.split_whitespace().nth(1)?.parse().ok()?)));
    match parsed {
        Some((name, parent)) => Ok(Some(Process { pid, parent, name: name.to_owned() })),
        None => Err(failed(&path, io::ErrorKind::InvalidData.into())),
    }
}

fn failed(path: &Path, source: io::Error) -> EnvironmentError {
    EnvironmentError::Failed { path: path.display().to_string(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    /// A `/proc` of these processes: number, parent, command.
    fn proc(name: &str, processes: &[(u32, u32, &str)]) -> std::path::PathBuf {
        let root = std::env::temp_dir().join(format!("forkd-environment-{}-{name}", std::process::id()));
        for (pid, parent, command) in processes {
            let dir = root.join(pid.to_string());
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("stat"), format!("{pid} ({command}) S {parent} 1 1 0 -1")).unwrap();
            fs::write(dir.join("environ"), format!("PID={pid}\0BYTES=\u{1}\nx\0")).unwrap();
        }
        root
    }

    #[test]
    fn number_one_is_the_applications_process() {
        let root = proc("one", &[(1, 0, "app) R 7 (x"), (7, 1, "worker"), (30, 0, "forkd-agent")]);
        assert_eq!(read_in(&root, 30).unwrap(), b"PID=1\0BYTES=\x01\nx\0");
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn with_a_shared_namespace_it_is_the_only_other_first_process_or_a_question() {
        let root =
            proc("shared", &[(1, 0, "pause"), (7, 0, "app"), (8, 7, "worker"), (30, 0, "forkd-agent")]);
        assert_eq!(read_in(&root, 30).unwrap(), b"PID=7\0BYTES=\x01\nx\0");
        fs::remove_dir_all(root).unwrap();
        let root =
            proc("several", &[(1, 0, "pause"), (7, 0, "app"), (9, 0, "envoy"), (30, 0, "forkd-agent")]);
        let error = read_in(&root, 30).unwrap_err().to_string();
        assert!(error.ends_with("app (7), envoy (9)"), "{error}");
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn an_agent_that_is_alone_says_so() {
        let root = proc("alone", &[(1, 0, "forkd-agent")]);
        assert!(matches!(read_in(&root, 1), Err(EnvironmentError::NoProcess)));
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn the_running_processs_environment_is_read_or_the_refusal_explained() {
        for (privileges, expected) in [
            ("", "environment: APP=yes"),
            // Like this, root may read only processes that have no capabilities either.
            ("setpriv --bounding-set=-all", "refused: may not read the environment of process 1 (sh)"),
        ] {
            let reader = std::env::current_exe().unwrap();
            let reader = format!("{privileges} {} --exact --nocapture {READER}", reader.display());
            // `sh` stays process 1 of the namespace, and so the application.
            let script = format!("FORKD_TEST_READER=1 {reader}; true");
            let output = Command::new("unshare")
                .args(["--pid", "--fork", "--mount-proc", "sh", "-c", &script])
                .env_clear()
                .envs([("APP", "yes"), ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")])
                .stdin(Stdio::null())
                .output()
                .expect("unshare and setpriv of util-linux");
            let said = String::from_utf8_lossy(&output.stdout).into_owned()
                + &String::from_utf8_lossy(&output.stderr);
            assert!(said.contains(expected), "this test needs root: {said}");
        }
    }

    const READER: &str = "environment::tests::reader";

    /// What the test above runs inside a process namespace of its own; by itself, it reads this machine's first process.
    #[test]
    fn reader() {
        if std::env::var_os("FORKD_TEST_READER").is_none() {
            match (read(), fs::read("/proc/1/environ")) {
                (Ok(bytes), Ok(expected)) => assert_eq!(bytes, expected),
                (Err(EnvironmentError::Forbidden { pid: 1, .. }), Err(_)) => {}
                (read, expected) => panic!("{read:?} instead of {expected:?}"),
            }
            return;
        }
        match read() {
            Ok(bytes) => {
                let app = bytes.split(|b| *b == 0).find(|pair| pair.starts_with(b"APP="));
                println!("environment: {}", String::from_utf8_lossy(app.unwrap_or_default()));
            }
            Err(error) => println!("refused: {error}"),
        }
    }
}
