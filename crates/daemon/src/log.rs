//! The daemon's log: a file that never grows beyond a bound.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// The most bytes of the file; the one before it is kept as `.old`. Weeks of a developer's day at INFO.
const MAX_BYTES: u64 = 5 * 1024 * 1024;

/// Appends to a file; moves it aside when it is full.
pub struct BoundedLog {
    path: PathBuf,
    file: File,
    bytes: u64,
    max: u64,
}

impl BoundedLog {
    /// Opens the file, or makes it, for this user only: it names hosts and ports.
    ///
    /// # Errors
    /// As the system says.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::with_max(path, MAX_BYTES)
    }

    fn with_max(path: &Path, max: u64) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
        let bytes = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file, bytes, max })
    }

    fn rotate(&mut self) -> io::Result<()> {
        fs::rename(&self.path, self.path.with_extension("log.old"))?;
        *self = Self::with_max(&self.path, self.max)?;
        Ok(())
    }
}

impl Write for BoundedLog {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.bytes + line.len() as u64 > self.max {
            self.rotate()?;
        }
        self.file.write_all(line)?;
        self.bytes += line.len() as u64;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_and_its_predecessor_stay_within_the_bound() {
        let dir = std::env::temp_dir().join(format!("forkd-log-{}", crate::state::random_hex().unwrap()));
        fs::create_dir(&dir).unwrap();
        let path = dir.join("daemon.log");
        let mut log = BoundedLog::with_max(&path, 100).unwrap();
        for number in 0..50 {
            writeln!(log, "line {number:02}").unwrap();
        }
        assert!(fs::metadata(&path).unwrap().len() <= 100);
        assert!(fs::metadata(dir.join("daemon.log.old")).unwrap().len() <= 100);
        assert!(fs::read_to_string(&path).unwrap().ends_with("line 49\n"));
        fs::remove_dir_all(dir).unwrap();
    }
}
