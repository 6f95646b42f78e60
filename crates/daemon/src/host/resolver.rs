//! /etc/resolv.conf, guarded: ours while the session lives, then byte for byte what it was.
//!
//! What is written keeps the original name servers behind ours, so that a machine on which everything of forkd was
//! killed still resolves names until the next start sweeps up.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The file.
pub const PATH: &str = "/etc/resolv.conf";
/// The most bytes we take on: resolv.conf files have some hundred.
const MAX: u64 = 64 * 1024;
const BEGIN: &str = "# forkd begin: written by `forkd connect`, taken out by `forkd quit`";
const END: &str = "# forkd end";
/// In front of lines of the original that ours replace.
const OFF: &str = "# forkd off: ";

/// What the file was, and what we made of it; kept in the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    path: PathBuf,
    original: Original,
    /// The file that we wrote.
    written: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Original {
    Missing,
    File { content: Vec<u8>, mode: u32, uid: u32, gid: u32 },
    Symlink { target: Vec<u8> },
}

/// Why the file was not changed.
#[derive(Debug, thiserror::Error)]
pub enum ResolverError {
    /// Another session of ours has it.
    #[error("another forkd session on this machine manages {0}")]
    Managed(PathBuf),
    /// Longer than any resolv.conf.
    #[error("{0} is longer than {MAX} bytes")]
    TooLong(PathBuf),
    /// The file or its folder cannot be written.
    #[error("write {path}: {source}")]
    ReadOnly {
        /// The file.
        path: PathBuf,
        /// EROFS or EACCES.
        source: io::Error,
    },
    /// Any other trouble with the file.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// What is to stand in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Asked first.
    pub server: IpAddr,
    /// In front of the original search list.
    pub search: Vec<String>,
}

/// The file while it is ours; dropped, it is put back.
pub struct Guard(Saved);

impl Guard {
    /// Reads the file and works out what to write. `apply` does it; in between, the journal is written.
    ///
    /// # Errors
    /// [`ResolverError`].
    pub fn prepare(path: &Path, setting: &Setting) -> Result<Saved, ResolverError> {
        let original = read_original(path)?;
        let text = match &original {
            Original::Missing => Vec::new(),
            Original::File { content, .. } => content.clone(),
            Original::Symlink { .. } => match read_bounded(path) {
                Ok(content) => content,
                // A link to nowhere is an empty file to every resolver.
                Err(ResolverError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                    Vec::new()
                }
                Err(error) => return Err(error),
            },
        };
        let text = String::from_utf8_lossy(&text);
        if text.lines().any(|line| line == BEGIN) {
            return Err(ResolverError::Managed(path.to_owned()));
        }
        Ok(Saved { path: path.to_owned(), original, written: compose(&text, setting) })
    }

    /// Writes the file.
    ///
    /// # Errors
    /// [`ResolverError`]; the file is then as before.
    pub fn apply(saved: Saved) -> Result<Self, ResolverError> {
        // Readable by everyone: every program on the machine resolves names.
        replace(&saved.path, saved.written.as_bytes(), 0o644, None)?;
        Ok(Self(saved))
    }

    /// Name servers that the file had before.
    pub fn upstream(saved: &Saved) -> Vec<SocketAddr> {
        name_servers(&unwind(&saved.written))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Err(error) = restore(&self.0) {
            tracing::error!(%error, "the resolver's file could not be put back");
        }
    }
}

/// Puts the original back. If somebody else has changed the file meanwhile, only our lines are taken out; if none of
/// ours is left, nothing is done.
///
/// # Errors
/// [`ResolverError`].
pub fn restore(saved: &Saved) -> Result<(), ResolverError> {
    let is_link = fs::symlink_metadata(&saved.path).is_ok_and(|meta| meta.is_symlink());
    let current = match read_bounded(&saved.path) {
        Ok(current) if !is_link => current,
        // Gone, or a link that somebody put there: it is not what we wrote.
        Ok(_) => return Ok(()),
        Err(ResolverError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if current != saved.written.as_bytes() {
        let text = String::from_utf8_lossy(&current);
        if !text.lines().any(|line| line == BEGIN) {
            return Ok(());
        }
        let mode = fs::metadata(&saved.path).map_or(0o644, |meta| meta.mode() & 0o7777);
        return replace(&saved.path, unwind(&text).as_bytes(), mode, None);
    }
    match &saved.original {
        Original::File { content, mode, uid, gid } => {
            replace(&saved.path, content, *mode, Some((*uid, *gid)))
        }
        Original::Missing => {
            fs::remove_file(&saved.path).map_err(|source| trouble("remove", &saved.path, source))
        }
        Original::Symlink { target } => {
            let beside = beside(&saved.path);
            let io = |source| trouble("link", &saved.path, source);
            remove_leftover(&beside)?;
            symlink(OsString::from_vec(target.clone()), &beside).map_err(io)?;
            fs::rename(&beside, &saved.path).map_err(io)
        }
    }
}

/// Name servers of a resolv.conf, in order.
pub fn name_servers(text: &str) -> Vec<SocketAddr> {
    let servers = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next())?
    });
    servers.filter_map(parse_server).collect()
}

fn parse_server(text: &str) -> Option<SocketAddr> {
    let (address, scope) =
        text.split_once('%').map_or((text, None), |(address, scope)| (address, Some(scope)));
    match (address.parse::<IpAddr>().ok()?, scope) {
        (IpAddr::V6(ip), Some(scope)) => {
            let index = scope.parse().ok().or_else(|| nix::net::if_::if_nametoindex(scope).ok())?;
            Some(SocketAddrV6::new(ip, 53, 0, index).into())
        }
        (ip, _) => Some(SocketAddr::new(ip, 53)),
    }
}

/// The file that we write over `original`: our name server first, theirs behind it, our search list before theirs.
/// Only one `search` (or `domain`) line counts for a resolver, the last, so theirs is switched off and taken into ours.
fn compose(original: &str, setting: &Setting) -> String {
    let mut search = setting.search.clone();
    let mut rest = String::new();
    let mut theirs: Vec<String> = Vec::new();
    for line in original.lines() {
        let mut words = line.split_whitespace();
        if matches!(words.next(), Some("search" | "domain")) {
            theirs = words.map(str::to_owned).collect();
            rest.push_str(OFF);
        }
        rest.push_str(line);
        rest.push('\n');
    }
    if !original.is_empty() && !original.ends_with('\n') {
        rest.pop();
    }
    search.extend(theirs.into_iter().filter(|domain| !setting.search.contains(domain)));
    let search = if search.is_empty() { String::new() } else { format!("search {}\n", search.join(" ")) };
    format!("{BEGIN}\nnameserver {}\n{search}{END}\n{rest}", setting.server)
}

/// Takes our lines out of any text.
fn unwind(text: &str) -> String {
    let mut ours = false;
    let mut result = String::new();
    for line in text.split_inclusive('\n') {
        match line.trim_end_matches('\n') {
            BEGIN => ours = true,
            END if ours => ours = false,
            _ if ours => {}
            _ => result.push_str(line.strip_prefix(OFF).unwrap_or(line)),
        }
    }
    result
}

fn read_original(path: &Path) -> Result<Original, ResolverError> {
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Original::Missing),
        Err(source) => return Err(trouble("look at", path, source)),
    };
    if meta.is_symlink() {
        let target = fs::read_link(path).map_err(|source| trouble("read", path, source))?;
        return Ok(Original::Symlink { target: target.into_os_string().into_vec() });
    }
    let content = read_bounded(path)?;
    Ok(Original::File { content, mode: meta.mode() & 0o7777, uid: meta.uid(), gid: meta.gid() })
}

fn read_bounded(path: &Path) -> Result<Vec<u8>, ResolverError> {
    use io::Read;
    let mut content = Vec::new();
    let file = File::open(path).map_err(|source| trouble("read", path, source))?;
    file.take(MAX + 1).read_to_end(&mut content).map_err(|source| trouble("read", path, source))?;
    if content.len() as u64 > MAX { Err(ResolverError::TooLong(path.to_owned())) } else { Ok(content) }
}

/// Puts a new file in the place of `path` at once; where `path` is a mount of its own (containers), writes into it.
fn replace(path: &Path, content: &[u8], mode: u32, owner: Option<(u32, u32)>) -> Result<(), ResolverError> {
    let temporary = beside(path);
    let made = (|| {
        remove_leftover(&temporary)?;
        let io = |source| trouble("write", path, source);
        let mut file = File::options().write(true).create_new(true).open(&temporary).map_err(io)?;
        file.write_all(content).map_err(io)?;
        file.set_permissions(fs::Permissions::from_mode(mode)).map_err(io)?;
        if let Some((uid, gid)) = owner {
            std::os::unix::fs::fchown(&file, Some(uid), Some(gid)).map_err(io)?;
        }
        file.sync_all().map_err(io)?;
        fs::rename(&temporary, path).map_err(io)
    })();
    let Err(error) = made else { return Ok(()) };
    // Of the original error, this one is only the aftermath.
    let _ = fs::remove_file(&temporary);
    match error {
        ResolverError::Io { source, .. } if source.kind() == io::ErrorKind::ResourceBusy => {
            fs::write(path, content).map_err(|source| trouble("write", path, source))
        }
        error => Err(error),
    }
}

fn remove_leftover(path: &Path) -> Result<(), ResolverError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(trouble("remove", path, source)),
        _ => Ok(()),
    }
}

fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".forkd-new");
    name.into()
}

fn trouble(what: &'static str, path: &Path, source: io::Error) -> ResolverError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
            ResolverError::ReadOnly { path, source }
        }
        _ => ResolverError::Io { what, path, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORIGINAL: &str = "# by dhcp\ndomain old.example\nsearch corp.example example.com\nnameserver 192.0.2.1\nnameserver fe80::1%1\noptions edns0 trust-ad";

    fn setting() -> Setting {
        Setting {
            server: "10.96.0.10".parse().unwrap(),
            search: vec!["shop.svc.cluster.local".to_owned(), "svc.cluster.local".to_owned()],
        }
    }

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("forkd-resolver-{}-{name}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn our_server_is_first_theirs_stay_and_the_search_lists_are_joined() {
        let text = compose(ORIGINAL, &setting());
        let servers: Vec<_> = name_servers(&text).iter().map(SocketAddr::ip).collect();
        assert_eq!(servers[0], setting().server);
        assert_eq!(servers[1].to_string(), "192.0.2.1");
        let search: Vec<_> =
            text.lines().filter(|line| line.starts_with("search") || line.starts_with("domain")).collect();
        assert_eq!(search, ["search shop.svc.cluster.local svc.cluster.local corp.example example.com"]);
        assert!(text.ends_with("options edns0 trust-ad"));
        assert_eq!(unwind(&text), ORIGINAL);
    }

    #[test]
    fn a_file_comes_back_byte_for_byte_with_its_mode() {
        let path = folder("bytes").join("resolv.conf");
        let content = b"nameserver 192.0.2.1\n\xff not utf-8";
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let saved = Guard::prepare(&path, &setting()).unwrap();
        let guard = Guard::apply(saved).unwrap();
        assert!(fs::read_to_string(&path).is_ok_and(|text| text.contains("10.96.0.10")));
        drop(guard);
        assert_eq!(fs::read(&path).unwrap(), content);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o640);
    }

    #[test]
    fn a_symlink_comes_back_as_one_and_its_target_is_never_written() {
        let folder = folder("symlink");
        let (path, target) = (folder.join("resolv.conf"), folder.join("stub.conf"));
        fs::write(&target, ORIGINAL).unwrap();
        let _ = fs::remove_file(&path);
        symlink("stub.conf", &path).unwrap();
        let saved = Guard::prepare(&path, &setting()).unwrap();
        assert_eq!(Guard::upstream(&saved)[0].ip().to_string(), "192.0.2.1");
        let guard = Guard::apply(saved).unwrap();
        assert!(fs::symlink_metadata(&path).unwrap().is_file());
        drop(guard);
        assert_eq!(fs::read_link(&path).unwrap(), Path::new("stub.conf"));
        assert_eq!(fs::read_to_string(&target).unwrap(), ORIGINAL);
    }

    #[test]
    fn a_missing_file_is_missing_again() {
        let path = folder("missing").join("resolv.conf");
        drop(Guard::apply(Guard::prepare(&path, &setting()).unwrap()).unwrap());
        assert!(!path.exists());
    }

    #[test]
    fn what_others_wrote_meanwhile_stays_without_our_lines() {
        let path = folder("others").join("resolv.conf");
        fs::write(&path, ORIGINAL).unwrap();
        let guard = Guard::apply(Guard::prepare(&path, &setting()).unwrap()).unwrap();
        let changed = fs::read_to_string(&path).unwrap().replace("192.0.2.1", "192.0.2.99");
        fs::write(&path, changed).unwrap();
        drop(guard);
        assert_eq!(fs::read_to_string(&path).unwrap(), ORIGINAL.replace("192.0.2.1", "192.0.2.99"));

        let guard = Guard::apply(Guard::prepare(&path, &setting()).unwrap()).unwrap();
        fs::write(&path, "nameserver 192.0.2.7\n").unwrap();
        drop(guard);
        assert_eq!(fs::read_to_string(&path).unwrap(), "nameserver 192.0.2.7\n");
    }

    #[test]
    fn a_second_session_is_told_about_the_first() {
        let path = folder("second").join("resolv.conf");
        fs::write(&path, ORIGINAL).unwrap();
        let _guard = Guard::apply(Guard::prepare(&path, &setting()).unwrap()).unwrap();
        assert!(matches!(Guard::prepare(&path, &setting()), Err(ResolverError::Managed(_))));
    }
}
