//! Where the daemon keeps what it keeps: socket, lock, log, and the id of the laptop.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Why a place cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Neither the variable nor a home directory says where.
    #[error("neither {0} nor HOME is set")]
    Nowhere(&'static str),
    /// Someone else could read or replace what is in there.
    #[error("{path} belongs to user {owner} with mode {mode:o}, not to you alone")]
    NotOurs {
        /// The directory.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Its permission bits.
        mode: u32,
    },
    /// The system said no.
    #[error("{path}")]
    Io {
        /// Where.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
}

fn io_at(path: &Path) -> impl FnOnce(io::Error) -> StateError + '_ {
    move |source| StateError::Io { path: path.to_owned(), source }
}

/// The places of one daemon: one per user and cluster.
#[derive(Clone, Debug)]
pub struct Places {
    /// The control socket.
    pub socket: PathBuf,
    /// Held with flock(2) while the daemon lives, so that two never share a socket.
    pub lock: PathBuf,
    /// The log.
    pub log: PathBuf,
}

impl Places {
    /// The places of the daemon for the cluster known as `cluster` (see `kubernetes::Target::key`). Creates the directories.
    ///
    /// # Errors
    /// [`StateError`] when a directory cannot be made or is not the user's alone.
    pub fn of(cluster: &str) -> Result<Self, StateError> {
        let name = hex(&Sha256::digest(cluster.as_bytes())[..8]);
        let (run, state) = (runtime_dir()?, state_dir()?);
        Ok(Self {
            socket: run.join(format!("{name}.sock")),
            lock: run.join(format!("{name}.lock")),
            log: state.join(format!("daemon-{name}.log")),
        })
    }
}

/// Sockets of all daemons of this user, whatever their cluster.
///
/// # Errors
/// [`StateError`] as for [`Places::of`].
pub fn sockets() -> Result<Vec<PathBuf>, StateError> {
    let run = runtime_dir()?;
    let entries = fs::read_dir(&run).map_err(io_at(&run))?;
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|end| end == "sock"))
        .collect();
    found.sort();
    Ok(found)
}

/// `$XDG_RUNTIME_DIR/forkd`, else `/tmp/forkd-UID`.
fn runtime_dir() -> Result<PathBuf, StateError> {
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty()) {
        Some(dir) => private_dir(PathBuf::from(dir).join("forkd")),
        None => private_dir(PathBuf::from(format!("/tmp/forkd-{}", nix::unistd::getuid()))),
    }
}

/// `$XDG_STATE_HOME/forkd`, else `~/.local/state/forkd` (XDG Base Directory Specification).
fn state_dir() -> Result<PathBuf, StateError> {
    let variable = |name| std::env::var_os(name).filter(|dir| !dir.is_empty()).map(PathBuf::from);
    let base = variable("XDG_STATE_HOME")
        .or_else(|| variable("HOME").map(|home| home.join(".local/state")))
        .ok_or(StateError::Nowhere("XDG_STATE_HOME"))?;
    private_dir(base.join("forkd"))
}

/// Makes a directory that only this user can enter, or checks that it is one. /tmp belongs to everybody: a directory
/// that was there before us may be someone's trap.
fn private_dir(path: PathBuf) -> Result<PathBuf, StateError> {
    DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(io_at(&path))?;
    let meta = fs::symlink_metadata(&path).map_err(io_at(&path))?;
    let mode = meta.mode() & 0o7777;
    if !meta.is_dir() || meta.uid() != nix::unistd::getuid().as_raw() || mode & 0o077 != 0 {
        return Err(StateError::NotOurs { path, owner: meta.uid(), mode });
    }
    Ok(path)
}

/// The id of this laptop: the same for one Kubernetes user on one machine for good, so that a claim survives the daemon.
/// 20 hex digits made of a random seed (`laptop-id` in the state directory), the machine's id, since a home directory
/// may be shared between machines, and the user, since the cluster gives an id to one user only.
///
/// # Errors
/// [`StateError`] when the seed can neither be read nor written.
pub fn laptop_id(user: &str) -> Result<String, StateError> {
    let path = state_dir()?.join("laptop-id");
    let seed = match read_seed(&path)? {
        Some(seed) => seed,
        None => write_seed(&path)?,
    };
    // Absent in some containers; the seed alone is unique enough there.
    let machine = fs::read("/etc/machine-id").unwrap_or_default();
    Ok(id_of(&seed, &machine, user))
}

fn id_of(seed: &str, machine: &[u8], user: &str) -> String {
    let mut digest = Sha256::new();
    for part in [seed.as_bytes(), machine, user.as_bytes()] {
        digest.update((part.len() as u64).to_be_bytes());
        digest.update(part);
    }
    hex(&digest.finalize()[..10])
}

fn read_seed(path: &Path) -> Result<Option<String>, StateError> {
    match fs::read_to_string(path) {
        Ok(text) if text.trim().len() == 32 => Ok(Some(text.trim().to_owned())),
        Ok(_) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_at(path)(error)),
    }
}

/// Writes a new seed by rename, so that no reader ever sees half of one; the first of two writers wins.
fn write_seed(path: &Path) -> Result<String, StateError> {
    let seed = random_hex()?;
    let draft = path.with_extension(&seed);
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft).map_err(io_at(&draft))?;
    file.write_all(seed.as_bytes()).map_err(io_at(&draft))?;
    let linked = fs::hard_link(&draft, path);
    fs::remove_file(&draft).map_err(io_at(&draft))?;
    match linked {
        Ok(()) => Ok(seed),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => match read_seed(path)? {
            Some(seed) => Ok(seed),
            None => {
                fs::remove_file(path).map_err(io_at(path))?;
                write_seed(path)
            }
        },
        Err(error) => Err(io_at(path)(error)),
    }
}

/// 16 random bytes as hex.
///
/// # Errors
/// [`StateError::Io`] when the kernel has no randomness to give.
pub fn random_hex() -> Result<String, StateError> {
    let source = Path::new("/dev/urandom");
    let mut bytes = [0; 16];
    fs::File::open(source).and_then(|mut file| file.read_exact(&mut bytes)).map_err(io_at(source))?;
    Ok(hex(&bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn scratch() -> PathBuf {
        let dir = std::env::temp_dir().join(format!("forkd-state-{}", random_hex().unwrap()));
        DirBuilder::new().mode(0o700).create(&dir).unwrap();
        dir
    }

    #[test]
    fn a_directory_that_others_may_enter_is_refused() {
        let dir = scratch();
        let open = dir.join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(private_dir(open), Err(StateError::NotOurs { mode: 0o755, .. })));
        assert!(private_dir(dir.join("new")).is_ok());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn an_id_is_of_one_user_on_one_machine() {
        let id = id_of("seed", b"machine", "alice");
        assert_eq!((id.len(), &id), (20, &id_of("seed", b"machine", "alice")));
        let others = [
            id_of("seed", b"machine", "bob"),
            id_of("seed", b"machin", "ealice"),
            id_of("", b"machine", "alice"),
        ];
        assert!(!others.contains(&id));
    }

    #[test]
    fn the_first_seed_stays_and_a_broken_one_is_replaced() {
        let dir = scratch();
        let path = dir.join("laptop-id");
        let first = write_seed(&path).unwrap();
        assert_eq!(write_seed(&path).unwrap(), first, "a second writer keeps the first seed");
        fs::write(&path, "half").unwrap();
        assert_eq!(read_seed(&path).unwrap(), None);
        let second = write_seed(&path).unwrap();
        assert_eq!(read_seed(&path).unwrap(), Some(second));
        fs::remove_dir_all(dir).unwrap();
    }
}
