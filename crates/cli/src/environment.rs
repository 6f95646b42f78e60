//! The environment of the command: the container's over the shell's own.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use forkd_daemon::control::Intercepted;

/// Variables that say where things are on this laptop, or who sits in front of it: the container's would break the
/// shell's tools. Those that end in `*` are prefixes. Documented in `forkd intercept --help`.
const STAYS: &[&str] = &[
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "PWD",
    "OLDPWD",
    "TERM",
    "COLORTERM",
    "LANG",
    "LC_*",
    "TMPDIR",
    "XDG_*",
    "SSH_*",
    "LD_*",
    "DISPLAY",
    "EDITOR",
    "FORKD_*",
];

fn stays(name: &[u8]) -> bool {
    STAYS.iter().any(|entry| match entry.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix.as_bytes()),
        None => name == entry.as_bytes(),
    })
}

/// The container's environment over `own`, plus what tells the command which fork it serves. Entries of the container
/// without `=` or without name are no variables and are left out.
pub fn merge(
    own: impl IntoIterator<Item = (OsString, OsString)>,
    intercepted: &Intercepted,
) -> BTreeMap<OsString, OsString> {
    let mut merged: BTreeMap<OsString, OsString> = own.into_iter().collect();
    for entry in &intercepted.environment {
        let Some(equals) = entry.iter().position(|byte| *byte == b'=') else { continue };
        let (name, value) = (&entry[..equals], &entry[equals + 1..]);
        if !name.is_empty() && !stays(name) {
            merged.insert(OsStr::from_bytes(name).to_owned(), OsString::from_vec(value.to_vec()));
        }
    }
    for (name, value) in [
        ("FORKD_FORK", intercepted.fork.clone()),
        ("FORKD_NAMESPACE", intercepted.namespace.clone()),
        ("FORKD_SERVICE", intercepted.service.clone()),
        ("FORKD_BAGGAGE", format!("{}={}", forkd_api::KEY, intercepted.fork)),
    ] {
        merged.insert(name.into(), value.into());
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn intercepted(environment: &[&[u8]]) -> Intercepted {
        Intercepted {
            fork: "alice".into(),
            namespace: "shop".into(),
            service: "cart".into(),
            ports: vec![],
            all: false,
            routed: "1/1".into(),
            environment: environment.iter().map(|entry| entry.to_vec()).collect(),
        }
    }

    fn own(entries: &[(&str, &str)]) -> Vec<(OsString, OsString)> {
        entries.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
    }

    #[test]
    fn the_containers_value_wins_but_for_what_belongs_to_the_laptop() {
        let merged = merge(
            own(&[("PATH", "/usr/bin"), ("DB", "laptop"), ("RUST_LOG", "debug"), ("LC_ALL", "C")]),
            &intercepted(&[
                b"PATH=/app",
                b"DB=cluster",
                b"LC_ALL=xx",
                b"XDG_RUNTIME_DIR=/x",
                b"LD_PRELOAD=/evil.so",
            ]),
        );
        let value = |name: &str| merged.get(OsStr::new(name)).and_then(|value| value.to_str());
        assert_eq!(value("PATH"), Some("/usr/bin"));
        assert_eq!(value("DB"), Some("cluster"));
        assert_eq!(value("RUST_LOG"), Some("debug"));
        assert_eq!(value("LC_ALL"), Some("C"));
        assert_eq!((value("XDG_RUNTIME_DIR"), value("LD_PRELOAD")), (None, None));
        assert_eq!((value("FORKD_FORK"), value("FORKD_BAGGAGE")), (Some("alice"), Some("forkd=alice")));
    }

    #[test]
    fn values_may_be_any_bytes_and_entries_that_are_no_variables_are_left_out() {
        let merged = merge(own(&[]), &intercepted(&[b"A=b=c", b"RAW=\xff\n", b"=x", b"nothing", b"EMPTY="]));
        assert_eq!(merged.get(OsStr::new("A")).unwrap(), "b=c");
        assert_eq!(merged.get(OsStr::new("RAW")).unwrap().as_bytes(), b"\xff\n");
        assert_eq!(merged.get(OsStr::new("EMPTY")).unwrap(), "");
        assert_eq!(merged.len(), 3 + 4);
    }
}
