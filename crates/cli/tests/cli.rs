//! The command as outsiders see it: help, exit codes, errors, completions. `FORKD_UPDATE=1` writes the golden files.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// A home without kubeconfig and daemon; removed at the end.
struct Home(PathBuf);

impl Home {
    fn new() -> Self {
        let unique = forkd_daemon::state::random_hex().unwrap();
        let home = std::env::temp_dir().join(format!("forkd-cli-{unique}"));
        fs::create_dir(&home).unwrap();
        Self(home)
    }

    /// With a kubeconfig whose cluster nobody serves.
    fn with_kubeconfig() -> Self {
        let home = Self::new();
        fs::create_dir(home.0.join(".kube")).unwrap();
        let config = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "nobody",
            "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}],
            "contexts": [{"name": "nobody", "context": {"cluster": "c", "user": "u"}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
        });
        fs::write(home.0.join(".kube/config"), config.to_string()).unwrap();
        home
    }

    fn forkd(&self, arguments: &[&str]) -> Output {
        let dir = |name: &str| self.0.join(name);
        fs::create_dir_all(dir("run")).unwrap();
        Command::new(env!("CARGO_BIN_EXE_forkd"))
            .args(arguments)
            .env_clear()
            .env("HOME", &self.0)
            .env("XDG_RUNTIME_DIR", dir("run"))
            .env("XDG_STATE_HOME", dir("state"))
            .output()
            .unwrap()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn the_help_of_every_command_is_as_agreed() {
    let home = Home::new();
    for command in [
        "",
        "install",
        "uninstall",
        "version",
        "connect",
        "status",
        "quit",
        "intercept",
        "leave",
        "list",
        "completion",
    ] {
        let arguments: Vec<&str> = [command, "--help"].into_iter().filter(|word| !word.is_empty()).collect();
        let output = home.forkd(&arguments);
        assert_eq!(output.status.code(), Some(0));
        let now = text(&output.stdout);
        let name = if command.is_empty() { "forkd" } else { command };
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/help").join(format!("{name}.txt"));
        if std::env::var_os("FORKD_UPDATE").is_some() {
            fs::write(&path, &now).unwrap();
        }
        let before = fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(now, before, "{}: FORKD_UPDATE=1 accepts it", path.display());
        assert!(now.lines().all(|line| line.chars().count() <= 120), "{name} is too wide");
        assert!(!now.contains("helper\n"), "hidden commands stay hidden");
    }
}

#[test]
fn a_command_line_that_makes_no_sense_ends_with_2_in_words_and_in_json() {
    let home = Home::new();
    for wrong in [
        &["intercept"][..],
        &["intercept", "cart", "--port", "0"],
        &["nonsense"],
        &["install", "--relays", "0"],
    ] {
        let output = home.forkd(wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
        assert!(text(&output.stderr).starts_with("error: "), "{wrong:?}");
    }
    let output = home.forkd(&["intercept", "cart", "--port", "x", "-o", "json"]);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0));
    let failure: Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(failure["exit"], 2);
    assert!(failure["error"].as_str().unwrap().contains("--port"), "{failure}");
}

#[test]
fn without_a_kubeconfig_the_failure_says_what_is_missing_and_ends_with_1() {
    let home = Home::new();
    let output = home.forkd(&["status", "--kubeconfig", "/no/such/file"]);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0));
    let said = text(&output.stderr);
    assert!(said.starts_with("error: cannot tell which cluster is meant\nbecause: "), "{said}");
    assert!(said.contains("/no/such/file") && said.contains("\ntry: "), "{said}");
    assert!(!said.contains('\x1b'), "no colour where there is no terminal");
}

#[test]
fn without_a_daemon_what_needs_one_ends_with_3_and_quit_is_content() {
    let home = Home::with_kubeconfig();
    for command in [&["status"][..], &["list"], &["leave", "cart"]] {
        let output = home.forkd(command);
        assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
        assert!(text(&output.stderr).contains("`forkd connect` starts one"));
    }
    let output = home.forkd(&["status", "--output", "json"]);
    let failure: Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!((output.status.code(), &failure["exit"]), (Some(3), &Value::from(3)));
    assert_eq!(failure["error"], "there is no session with nobody");

    let output = home.forkd(&["quit", "-o", "json"]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap(), serde_json::json!({"left": []}));
}

#[test]
fn a_state_directory_that_others_can_enter_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let home = Home::with_kubeconfig();
    let run = home.0.join("run/forkd");
    fs::create_dir_all(&run).unwrap();
    fs::set_permissions(&run, fs::Permissions::from_mode(0o777)).unwrap();
    let output = home.forkd(&["status"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("not to you alone"), "{}", text(&output.stderr));
}

#[test]
fn the_version_is_told_without_a_cluster_too() {
    let home = Home::with_kubeconfig();
    let output = home.forkd(&["version", "-o", "json"]);
    assert_eq!(output.status.code(), Some(0));
    let version: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(version["client"], env!("CARGO_PKG_VERSION"));
    assert!(version["problem"].as_str().unwrap().contains("refused"), "{version}");
}

#[test]
fn a_daemon_by_hand_says_how_it_is_started_and_leaves_no_socket() {
    let home = Home::with_kubeconfig();
    // Standard input is no helper's socket: the first request would fail, so nobody comes, and nothing is served.
    let output = home.forkd(&["daemon", "--context", "elsewhere"]);
    assert_eq!(output.status.code(), Some(1));
    let reply: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&reply["reply"], &reply["exit"]), (&Value::from("error"), &Value::from(1)));
    assert!(reply["because"][0].as_str().unwrap().contains("no context elsewhere"), "{reply}");
}

#[test]
fn a_command_has_the_given_environment_and_one_that_is_not_there_is_named() {
    let home = Home::new();
    let output = home.forkd(&["exec", "--", "sh", "-c", "echo \"$XDG_STATE_HOME|$FORKD_FORK\"; exit 7"]);
    assert_eq!(output.status.code(), Some(7));
    assert_eq!(text(&output.stdout).trim(), format!("{}|", home.0.join("state").display()));
    let output = home.forkd(&["exec", "--", "/no/such/program"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).starts_with("error: cannot run /no/such/program\nbecause: "));
}

#[test]
fn a_command_ends_when_the_forkd_that_started_it_is_killed() {
    // The shell stands for that forkd. It keeps the command's output open, so the end of both is the end of the pipe.
    let script = "\"$0\" exec -- sleep 600 & echo started; wait";
    let mut shell = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_forkd")])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = std::io::BufReader::new(shell.stdout.take().unwrap());
    let children = format!("/proc/{0}/task/{0}/children", shell.id());
    let asleep = || {
        let pid = fs::read_to_string(&children).unwrap();
        fs::read_to_string(format!("/proc/{}/comm", pid.trim())).is_ok_and(|name| name.trim() == "sleep")
    };
    while !asleep() {
        std::thread::yield_now();
    }
    shell.kill().unwrap();
    shell.wait().unwrap();
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut output, &mut rest).unwrap();
    assert_eq!(rest, "started\n");
}

#[test]
fn every_shell_gets_a_completion_script_with_the_commands_in_it() {
    let home = Home::new();
    for shell in ["bash", "zsh", "fish"] {
        let output = home.forkd(&["completion", shell]);
        assert_eq!(output.status.code(), Some(0));
        let script = text(&output.stdout);
        assert!(script.contains("intercept") && script.contains("on-unavailable"), "{shell}");
    }
}
