//! The `forkd` command: arguments → request to the daemon → words or JSON.

mod args;
mod environment;
mod install;
mod intercept;
mod launch;
mod run;
mod session;
mod ui;
mod version;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use forkd_daemon::failure::{Exit, Failure};

use args::{Cli, Command, Shell};
use ui::Ui;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return explain(&error),
    };
    match &cli.command {
        // These two are processes of their own and bring their own runtime.
        Command::Daemon(_) => return forkd_daemon::daemon::main(&cli.global.choice(), cli.global.verbose),
        Command::Helper => return forkd_daemon::helper::main(),
        _ => {}
    }
    let ui = Ui::new(&cli.global);
    if let Command::Exec { command } = &cli.command {
        return ui.fail(&run::exec(command)).into_code();
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            return ui.fail(&Failure::new("cannot start").caused_by(&error)).into_code();
        }
    };
    let result = runtime.block_on(dispatch(cli, &ui));
    // Blocking reads, e.g. of a terminal, must not hold up the end.
    runtime.shutdown_background();
    match result {
        Ok(code) => code.into(),
        Err(failure) => ui.fail(&failure).into_code(),
    }
}

/// Help and version as they are; a command line that makes no sense as JSON, where it says that it wants JSON.
fn explain(error: &clap::Error) -> ExitCode {
    let wants_json = std::env::args().collect::<Vec<_>>().windows(2).any(|pair| {
        matches!(pair[0].as_str(), "-o" | "--output") && pair[1] == "json"
            || pair[1] == "--output=json"
            || pair[1] == "-ojson"
    });
    if !(error.use_stderr() && wants_json) {
        error.exit();
    }
    let text = error.to_string();
    let said = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
    let failure =
        Failure::new(said).advice("`forkd help` and `forkd help COMMAND` have examples").exit(Exit::Usage);
    match serde_json::to_string(&failure) {
        Ok(json) => eprintln!("{json}"),
        Err(_) => eprintln!("{text}"),
    }
    failure.exit.into_code()
}

trait IntoCode {
    fn into_code(self) -> ExitCode;
}

impl IntoCode for Exit {
    fn into_code(self) -> ExitCode {
        u8::from(self).into()
    }
}

async fn dispatch(cli: Cli, ui: &Ui) -> Result<u8, Failure> {
    let global = &cli.global;
    match cli.command {
        Command::Connect(args) => session::connect(global, ui, &args).await?,
        Command::Status => session::status(global, ui).await?,
        Command::Quit => session::quit(global, ui).await?,
        Command::Intercept(args) => return intercept::intercept(global, ui, args).await,
        Command::Leave(args) => intercept::leave(global, ui, args).await?,
        Command::List => intercept::list(global, ui).await?,
        Command::Completion { shell } => ui.print(&completion(shell))?,
        Command::Version => version::version(global, ui).await?,
        Command::Install(args) => install::install(global, ui, &args).await?,
        Command::Uninstall(args) => install::uninstall(global, ui, &args).await?,
        Command::Daemon(_) | Command::Helper | Command::Exec { .. } => {}
    }
    Ok(Exit::Done.into())
}

fn completion(shell: Shell) -> String {
    let shell = match shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "forkd", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}
