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
