//! `forkd connect`, `status`, `quit`.

use forkd_daemon::control::{Connected, Left, Request};
use forkd_daemon::failure::{Exit, Failure};
use forkd_daemon::kubernetes::Target;
use forkd_daemon::status::Status;

use crate::args::{Connect, Global};
use crate::ui::{Ui, table};
use crate::{intercept, launch};

/// `forkd connect`
pub async fn connect(global: &Global, ui: &Ui, args: &Connect) -> Result<(), Failure> {
    let target = Target::read(&global.choice())?;
    let mut client = launch::find_or_start(global, &target, ui).await?;
    let request = Request::Connect { namespace: args.namespace.clone() };
    let connected: Connected = client.call(request, |reply| ui.hear(reply)).await?;
    ui.answer(&connected, || {
        let head = if connected.already { "Already connected" } else { "Connected" };
        format!(
            "{} to {} as {}.\nNames of the cluster resolve here, short ones in the namespace {}; {} go there.",
            ui.bold(head),
            connected.context,
            connected.user,
            connected.namespace,
            connected.routes.join(", ")
        )
    })
}

/// `forkd status`
pub async fn status(global: &Global, ui: &Ui) -> Result<(), Failure> {
    let mut client = launch::find(&Target::read(&global.choice())?).await?;
    let status: Status = client.call(Request::Status, |reply| ui.hear(reply)).await?;
    ui.answer(&status, || words(ui, &status))
}

/// `forkd quit`
pub async fn quit(global: &Global, ui: &Ui) -> Result<(), Failure> {
    let target = Target::read(&global.choice())?;
    let mut client = match launch::find(&target).await {
        Ok(client) => client,
        // Nothing to end is what was asked for; other failures are not.
        Err(failure) if failure.exit == Exit::NoDaemon => {
            return ui.answer(&Left::default(), || format!("There is no session with {}.", target.context));
        }
        Err(failure) => return Err(failure),
    };
    let left: Left = client.call(Request::Quit, |reply| ui.hear(reply)).await?;
    client.closed().await;
    ui.answer(&left, || {
        let mut lines: Vec<String> = left.left.iter().map(|one| intercept::left_line(ui, one)).collect();
        lines.push(format!("The session with {} is over.", target.context));
        lines.join("\n")
    })
}

fn words(ui: &Ui, status: &Status) -> String {
    let mut rows: Vec<(&str, String)> = vec![
        ("Cluster", format!("{} ({})", status.context, status.server)),
        ("Namespace", status.namespace.clone()),
        ("User", status.user.clone()),
        ("Laptop", status.laptop.clone()),
        ("Since", status.since.clone()),
        ("Path", if status.path.is_empty() { "none at the moment".to_owned() } else { status.path.clone() }),
        ("Routes", status.routes.join(", ")),
    ];
    if let Some(dns) = &status.dns {
        rows.push(("DNS", format!("{} for {} by {}", dns.server, dns.domain, dns.mode)));
    }
    let wide = rows.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    let mut text: String = rows
        .iter()
        .map(|(name, value)| format!("{}  {value}\n", ui.bold(&format!("{name:wide$}"))))
        .collect();
    let mut agents = vec![["AGENT", "NAMESPACE", "POD", "ROUND TRIP"].map(str::to_owned).to_vec()];
    agents.extend(status.agents.iter().map(|agent| {
        let rtt = format!("{}.{} ms", agent.rtt_us / 1000, agent.rtt_us % 1000 / 100);
        vec![agent.role.clone(), agent.namespace.clone(), agent.pod.clone(), rtt]
    }));
    text += &format!("\n{}\n\n{}", table(&agents), intercept::list_words(&status.intercepts));
    for problem in &status.problems {
        text += &format!("\n{} {problem}", ui.bold("problem:"));
    }
    text
}
