//! The command line as typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use forkd_daemon::kubernetes::Choice;
use forkd_daemon::ports::PortSpec;

/// Your own fork of a Kubernetes cluster: services you change run on this laptop, everything else stays where it is.
///
/// A fork costs nothing but a name. Requests that carry its key (`baggage: forkd=ID`) reach your process; all others
/// reach the cluster's own pods, untouched.
#[derive(Parser, Debug)]
#[command(
    name = "forkd",
    version,
    max_term_width = 100,
    after_help = "\
Examples:
  forkd connect                                      reach Services and pods by their cluster names
  forkd intercept cart --port 8080 -- cargo run      serve your fork's requests to `cart` from here
  curl -H 'baggage: forkd=alice' http://web.shop/    a request of the fork `alice`
  forkd quit                                         leave nothing behind

Exit codes: 0 done, 1 failed, 2 usage, 3 no daemon, 4 the cluster refused."
)]
pub struct Cli {
    /// What holds for every command.
    #[command(flatten)]
    pub global: Global,
    /// Which command.
    #[command(subcommand)]
    pub command: Command,
}

/// What holds for every command.
#[derive(Args, Debug, Clone)]
pub struct Global {
    /// Kubeconfig file [default: $KUBECONFIG, then ~/.kube/config]
    #[arg(long, global = true, help_heading = "Options of every command", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig [default: its current one]
    #[arg(long, global = true, help_heading = "Options of every command", value_name = "NAME")]
    pub context: Option<String>,
    /// Words for people, or JSON for programs: answers on stdout, failures on stderr
    #[arg(long, short, global = true, help_heading = "Options of every command", value_enum, default_value_t = Output::Text, value_name = "FORMAT")]
    pub output: Output,
    /// Log more, where this command starts the daemon (`forkd status` names the log)
    #[arg(long, short, global = true, help_heading = "Options of every command", action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// No colour [also: NO_COLOR]
    #[arg(long, global = true, help_heading = "Options of every command")]
    pub no_color: bool,
}

impl Global {
    /// Which cluster is meant.
    pub fn choice(&self) -> Choice {
        Choice { kubeconfig: self.kubeconfig.clone(), context: self.context.clone() }
    }
}

/// How answers look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// The commands, in the order in which one meets them.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Install forkd in the cluster
    Install(Install),
    /// Remove forkd from the cluster: no object stays behind
    Uninstall(Uninstall),
    /// Say which version this is, and which the cluster has
    Version,
    /// Reach the cluster's Services and pods from this laptop
    #[command(after_help = "\
Examples:
  forkd connect                      then: curl http://cart.shop:8080/
  forkd connect --namespace shop     then: curl http://cart:8080/

Only addresses of the cluster go to the cluster, only its names are asked there. `forkd quit` undoes
all of it; so does the end of the daemon, however it comes about.")]
    Connect(Connect),
    /// Say what the session is and does, and what is wrong
    Status,
    /// Leave all intercepts, undo what was done to this laptop, end the daemon
    Quit,
    /// Take a Service's requests to this laptop
    #[command(after_help = "\
Examples:
  forkd intercept cart --port 8080 -- cargo run
      Runs the command with the environment of cart's container, ends with it, returns its exit code.
  forkd intercept cart --port 3000:http
      Sends the Service port named `http` to port 3000 here, until `forkd leave cart`.
  forkd intercept redis --all --port 6379
      Takes every connection, of everybody: the way for ports that speak no HTTP.

Environment of the command: the container's, over this shell's own. This shell's stay PATH, HOME,
USER, LOGNAME, SHELL, PWD, OLDPWD, TERM, COLORTERM, LANG, LC_*, TMPDIR, XDG_*, SSH_*, LD_*, DISPLAY,
EDITOR and FORKD_*. FORKD_FORK, FORKD_NAMESPACE, FORKD_SERVICE and FORKD_BAGGAGE are added. Nothing
of it is logged or written to a file.")]
    Intercept(Intercept),
    /// Give a Service's requests back
    Leave(Leave),
    /// List the intercepts of this laptop
    List,
    /// Print a completion script
    #[command(after_help = "\
Examples:
  forkd completion bash > ~/.local/share/bash-completion/completions/forkd
  forkd completion zsh > ~/.zfunc/_forkd
  forkd completion fish > ~/.config/fish/completions/forkd.fish")]
    Completion {
        /// Which shell
        #[arg(value_enum)]
        shell: Shell,
    },
    /// The daemon's process; started by the other commands.
    #[command(hide = true)]
    Daemon(Daemon),
    /// The privileged process; started by the other commands.
    #[command(hide = true)]
    Helper,
    /// Becomes the command of an intercept; started by `intercept`.
    #[command(hide = true)]
    Exec {
        /// The command.
        #[arg(last = true, required = true)]
        command: Vec<std::ffi::OsString>,
    },
}

/// `forkd install`
#[derive(Args, Debug)]
pub struct Install {
    /// The agent image [default: docker.io/forkd/agent with this version's tag]
    #[arg(long, value_name = "REF")]
    pub image: Option<String>,
    /// When the kubelet pulls the image
    #[arg(long, value_enum, default_value_t = PullPolicy::IfNotPresent, value_name = "POLICY")]
    pub image_pull_policy: PullPolicy,
    /// How many relays
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=9))]
    pub relays: u16,
    /// Ask the API server, change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Print the YAML and do nothing else, e.g. for GitOps
    #[arg(long, conflicts_with = "dry_run")]
    pub print: bool,
    /// Do not ask
    #[arg(long, short)]
    pub yes: bool,
}

/// `forkd uninstall`
#[derive(Args, Debug)]
pub struct Uninstall {
    /// Say what would go, change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Do not ask
    #[arg(long, short)]
    pub yes: bool,
}

/// `imagePullPolicy`, as Kubernetes spells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "PascalCase")]
pub enum PullPolicy {
    /// Where it is not on the node yet.
    IfNotPresent,
    /// At every start.
    Always,
    /// It is on the node.
    Never,
}

/// `forkd connect`
#[derive(Args, Debug)]
pub struct Connect {
    /// Where short names are looked up [default: the context's namespace]
    #[arg(long, short, value_name = "NS")]
    pub namespace: Option<String>,
}

/// `forkd intercept`
#[derive(Args, Debug)]
pub struct Intercept {
    /// Name of the Service
    #[arg(value_name = "SERVICE")]
    pub service: String,
    /// Port here, and which port of the Service, by number or name; may be given several times
    /// [default: the Service's only port, same number as in the container]
    #[arg(long = "port", short, value_name = "LAPTOP[:REMOTE]")]
    pub ports: Vec<PortSpec>,
    /// Id of the fork, the value of its key [default: your user name]
    #[arg(long, value_name = "ID")]
    pub fork: Option<String>,
    /// Namespace of the Service [default: the session's]
    #[arg(long, short, value_name = "NS")]
    pub namespace: Option<String>,
    /// Take everything, not only requests that carry the fork's key
    #[arg(long)]
    pub all: bool,
    /// What requests of the fork get while this laptop is gone: an error that says why, or the cluster's own answer
    #[arg(long, value_enum, default_value_t = OnUnavailable::Error, value_name = "WHAT")]
    pub on_unavailable: OnUnavailable,
    /// Run the command with this shell's environment only (needs no `pods/exec`)
    #[arg(long)]
    pub no_env: bool,
    /// Command to run as the Service
    #[arg(last = true, value_name = "CMD")]
    pub command: Vec<std::ffi::OsString>,
}

/// See [`Intercept::on_unavailable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnUnavailable {
    /// 503, with the reason.
    Error,
    /// As the pod's application answers.
    Baseline,
}

/// `forkd leave`
#[derive(Args, Debug)]
pub struct Leave {
    /// Name of the Service
    #[arg(value_name = "SERVICE")]
    pub service: String,
    /// Id of the fork [default: whichever it is intercepted in]
    #[arg(long, value_name = "ID")]
    pub fork: Option<String>,
    /// Namespace of the Service [default: the session's]
    #[arg(long, short, value_name = "NS")]
    pub namespace: Option<String>,
}

/// `forkd daemon`
#[derive(Args, Debug)]
pub struct Daemon {}

/// Shells that know completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    /// GNU Bash
    Bash,
    /// Z shell
    Zsh,
    /// fish
    Fish,
}
