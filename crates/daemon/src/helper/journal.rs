//! What a helper is about to change, written down before it does: so that whoever comes after a double kill can undo it.
//!
//! One file a helper under /run, which a reboot empties as it empties interfaces and routes.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::host::netlink::{Netlink, NetlinkError};
use crate::host::resolver::{self, ResolverError};

/// Where journals are; root's, mode 0700.
pub const FOLDER: &str = "/run/forkd";

/// A process that cannot be mistaken for a later one with the same number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pid: i32,
    /// Clock ticks after boot (field 22 of /proc/PID/stat, proc_pid_stat(5)).
    start: u64,
}

/// What one helper has changed, or is about to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The helper and its guard: while either lives, nobody else undoes anything.
    owners: Vec<Process>,
    /// Name of the TUN; its routes go with it.
    pub tun: Option<String>,
    /// The resolver's file.
    pub resolver: Option<resolver::Saved>,
}

/// A helper's journal. Dropped, the file is removed: what it names has been undone by then.
pub struct Journal {
    path: PathBuf,
    /// What stands in it.
    pub entry: Entry,
}

/// Why a journal failed.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The folder belongs to somebody else, or others may write there.
    #[error("{FOLDER} is not root's own folder")]
    Folder,
    /// A file of the folder.
    #[error("{what} {path}: {source}")]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The interface of a dead helper.
    #[error("delete the interface of a dead helper: {0}")]
    Netlink(#[from] NetlinkError),
    /// The resolver's file of a dead helper.
    #[error("put back the resolver's file of a dead helper: {0}")]
    Resolver(#[from] ResolverError),
}

impl Process {
    /// The process with this number, if there is one.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, field 2, is in parentheses and may contain anything.
        let (_, fields) = stat.rsplit_once(") ")?;
        let mut fields = fields.split(' ');
        // Fields 3 (state) and 22; a zombie does nothing any more.
        let state = fields.next()?;
        let start = fields.nth(18)?.parse().ok()?;
        (state != "Z" && state != "X").then_some(Self { pid, start })
    }

    fn is_alive(&self) -> bool {
        Self::of(self.pid).as_ref() == Some(self)
    }
}

impl Journal {
    /// An empty journal of this process and its guard; nothing is written yet.
    pub fn new(guard: i32) -> Self {
        let pid = std::process::id().cast_signed();
        let owners = [pid, guard].into_iter().filter_map(Process::of).collect();
        Self { path: file_of(pid), entry: Entry { owners, tun: None, resolver: None } }
    }

    /// Writes it down.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn write(&self) -> Result<(), JournalError> {
        let temporary = self.path.with_extension("new");
        let text =
            serde_json::to_vec(&self.entry).map_err(|error| file("write", &self.path, error.into()))?;
        fs::write(&temporary, text).map_err(|source| file("write", &temporary, source))?;
        fs::rename(&temporary, &self.path).map_err(|source| file("write", &self.path, source))
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, path = %self.path.display(), "the journal could not be removed");
        }
    }
}

/// Makes the folder if need be, and sees that it is root's own.
///
/// # Errors
/// [`JournalError`].
pub fn prepare() -> Result<(), JournalError> {
    let made = DirBuilder::new().mode(0o700).create(FOLDER);
    if let Err(source) = made
        && source.kind() != io::ErrorKind::AlreadyExists
    {
        return Err(file("make", Path::new(FOLDER), source));
    }
    let meta = fs::symlink_metadata(FOLDER).map_err(|source| file("look at", Path::new(FOLDER), source))?;
    if !meta.is_dir() || meta.uid() != 0 {
        return Err(JournalError::Folder);
    }
    if meta.mode() & 0o077 != 0 {
        // Root's own, but open to others: only its mode is wrong.
        fs::set_permissions(FOLDER, fs::Permissions::from_mode(0o700))
            .map_err(|source| file("close", Path::new(FOLDER), source))?;
    }
    Ok(())
}

/// One helper at a time changes things or sweeps.
///
/// # Errors
/// [`JournalError`].
pub fn lock() -> Result<Flock<File>, JournalError> {
    let path = Path::new(FOLDER).join("lock");
    let opened = File::options().create(true).write(true).truncate(false).open(&path);
    let opened = opened.map_err(|source| file("open", &path, source))?;
    Flock::lock(opened, FlockArg::LockExclusive).map_err(|(_, errno)| file("lock", &path, errno.into()))
}

/// Undoes what dead helpers left. `own` is a process that counts as dead: the one whose guard is asking.
/// Returns how many helpers were swept up after. The caller holds [`lock`].
///
/// # Errors
/// [`JournalError`]; a journal whose helper could not be swept up after is kept for the next try.
pub fn sweep(netlink: &Netlink, own: Option<i32>) -> Result<usize, JournalError> {
    let folder = Path::new(FOLDER);
    let mut live = Vec::new();
    let mut dead = Vec::new();
    let list = fs::read_dir(folder).map_err(|source| file("list", folder, source))?;
    for item in list {
        let path = item.map_err(|source| file("list", folder, source))?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let text = fs::read(&path).map_err(|source| file("read", &path, source))?;
        match serde_json::from_slice::<Entry>(&text) {
            Ok(entry) => {
                let asking = own.is_some_and(|own| path == file_of(own));
                let alive = !asking && entry.owners.iter().any(Process::is_alive);
                if alive { live.push(entry) } else { dead.push((path, entry)) }
            }
            Err(error) => {
                // Written by rename, so never half; of another version, then, and nothing to go by.
                tracing::warn!(%error, path = %path.display(), "unreadable journal removed");
                fs::remove_file(&path).map_err(|source| file("remove", &path, source))?;
            }
        }
    }
    let count = dead.len();
    for (path, entry) in dead {
        if let Some(saved) = &entry.resolver {
            resolver::restore(saved)?;
        }
        // A name may have passed on to a helper that lives.
        if let Some(tun) = entry.tun.filter(|tun| live.iter().all(|other| other.tun.as_ref() != Some(tun))) {
            netlink.delete_link(&tun)?;
        }
        fs::remove_file(&path).map_err(|source| file("remove", &path, source))?;
    }
    Ok(count)
}

fn file_of(pid: i32) -> PathBuf {
    Path::new(FOLDER).join(format!("helper-{pid}.json"))
}

fn file(what: &'static str, path: &Path, source: io::Error) -> JournalError {
    JournalError::File { what, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_number_used_again_is_another_process() {
        let own = Process::of(std::process::id().cast_signed()).unwrap();
        assert!(own.is_alive());
        assert!(!Process { start: own.start + 1, ..own }.is_alive());
        assert_eq!(Process::of(i32::MAX), None);
    }
}
