//! `forkd intercept`, `leave`, `list`.

use forkd_daemon::control::{self, Client, Intercepted, Left, LeftTarget, Request};
use forkd_daemon::failure::{Exit, Failure};
use forkd_daemon::kubernetes::Target;
use forkd_daemon::status::{self, Status};

use crate::args::{Global, Intercept, Leave, OnUnavailable};
use crate::ui::{Ui, table};
use crate::{environment, launch, run};

/// `forkd intercept`. Returns the exit code.
pub async fn intercept(global: &Global, ui: &Ui, args: Intercept) -> Result<u8, Failure> {
    let target = Target::read(&global.choice())?;
    let mut client = launch::find_or_start(global, &target, ui).await?;
    let with_command = !args.command.is_empty();
    let connect = Request::Connect { namespace: None };
    let _connected: control::Connected = client.call(connect, |reply| ui.hear(reply)).await?;
    let request = Request::Intercept(control::Intercept {
        service: args.service,
        namespace: args.namespace,
        fork: args.fork,
        ports: args.ports,
        all: args.all,
        baseline_when_gone: args.on_unavailable == OnUnavailable::Baseline,
        environment: with_command && !args.no_env,
        attached: with_command,
    });
    let intercepted: Intercepted = client.call(request, |reply| ui.hear(reply)).await?;
    ui.settle();
    if !with_command {
        ui.answer(&without_secrets(&intercepted), || words(ui, &intercepted))?;
        return Ok(Exit::Done.into());
    }
    // stdout belongs to the command from here on.
    if !ui.json() {
        eprintln!("{}", words(ui, &intercepted));
    }
    let environment = environment::merge(std::env::vars_os(), &intercepted);
    let ended = run::run(&args.command, ui.json(), environment, client.closed(), || {
        ui.note("the daemon is gone: requests go to the cluster's own pods again, the command goes on");
    })
    .await;
    let left = leave_now(&mut client, ui, &intercepted).await;
    let code = ended?;
    if let Err(failure) = left {
        // The command's exit code is the answer; that something stayed behind is said all the same.
        ui.fail(&failure);
    }
    Ok(code)
}

async fn leave_now(client: &mut Client, ui: &Ui, intercepted: &Intercepted) -> Result<(), Failure> {
    let request = Request::Leave(control::Leave {
        service: intercepted.service.clone(),
        namespace: Some(intercepted.namespace.clone()),
        fork: Some(intercepted.fork.clone()),
    });
    let left: Result<Left, Failure> = client.call(request, |reply| ui.hear(reply)).await;
    ui.settle();
    match left {
        // A daemon that is gone has been mentioned; its helper has undone what there was.
        Err(failure) if failure.exit == Exit::NoDaemon => Ok(()),
        other => other.map(|_| ()),
    }
}

/// For stdout: the environment is nobody's business.
fn without_secrets(intercepted: &Intercepted) -> Intercepted {
    Intercepted { environment: Vec::new(), ..intercepted.clone() }
}

fn words(ui: &Ui, it: &Intercepted) -> String {
    let ports: Vec<String> =
        it.ports.iter().map(|port| format!("port {} → localhost:{}", port.port, port.laptop_port)).collect();
    let what = if it.all { "all requests" } else { "requests of the fork" };
    let mut text = format!(
        "{} {}.{}: {what} {} reach this laptop ({}; pods {}).",
        ui.bold("Intercepted"),
        it.service,
        it.namespace,
        if it.all { format!("(fork {})", it.fork) } else { ui.bold(&it.fork) },
        ports.join(", "),
        it.routed,
    );
    if let Some(port) = it.ports.iter().find(|port| port.http) {
        text += &format!("\n  {}", curl(it, port.port));
    }
    text
}

/// A line to copy: it carries the key.
fn curl(it: &Intercepted, port: u16) -> String {
    let port = if port == 80 { String::new() } else { format!(":{port}") };
    format!("curl -H 'baggage: {}={}' http://{}.{}{port}/", forkd_api::KEY, it.fork, it.service, it.namespace)
}

/// `forkd leave`
pub async fn leave(global: &Global, ui: &Ui, args: Leave) -> Result<(), Failure> {
    let mut client = launch::find(&Target::read(&global.choice())?).await?;
    let request =
        Request::Leave(control::Leave { service: args.service, namespace: args.namespace, fork: args.fork });
    let left: Left = client.call(request, |reply| ui.hear(reply)).await?;
    ui.answer(&left, || left.left.iter().map(|one| left_line(ui, one)).collect::<Vec<_>>().join("\n"))
}

/// One line for one intercept that ended.
pub fn left_line(ui: &Ui, left: &LeftTarget) -> String {
    format!("{} {}.{} (fork {}).", ui.bold("Left"), left.service, left.namespace, left.fork)
}

/// `forkd list`
pub async fn list(global: &Global, ui: &Ui) -> Result<(), Failure> {
    let mut client = launch::find(&Target::read(&global.choice())?).await?;
    let status: Status = client.call(Request::Status, |reply| ui.hear(reply)).await?;
    ui.answer(&status.intercepts, || list_words(&status.intercepts))
}

/// The intercepts as a table.
pub fn list_words(intercepts: &[status::Intercept]) -> String {
    if intercepts.is_empty() {
        return "No intercepts.".to_owned();
    }
    let mut rows = vec![
        ["SERVICE", "NAMESPACE", "FORK", "TRAFFIC", "PORTS", "PODS", "READY"].map(str::to_owned).to_vec(),
    ];
    rows.extend(intercepts.iter().map(|one| {
        let ports: Vec<String> =
            one.ports.iter().map(|port| format!("{}→{}", port.port, port.laptop_port)).collect();
        vec![
            one.service.clone(),
            one.namespace.clone(),
            one.fork.clone(),
            if one.all { "all" } else { "keyed" }.to_owned(),
            ports.join(","),
            one.routed.clone(),
            if one.ready { "yes".to_owned() } else { format!("no: {}", one.message) },
        ]
    }));
    table(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkd_daemon::control::InterceptedPort;

    fn intercepted(port: u16) -> Intercepted {
        Intercepted {
            fork: "alice".into(),
            namespace: "shop".into(),
            service: "cart".into(),
            ports: vec![InterceptedPort { port, laptop_port: 3000, http: true }],
            all: false,
            routed: "2/2".into(),
            environment: vec![b"PASSWORD=secret".to_vec()],
        }
    }

    #[test]
    fn the_curl_line_carries_the_key_and_the_port() {
        assert_eq!(curl(&intercepted(8080), 8080), "curl -H 'baggage: forkd=alice' http://cart.shop:8080/");
        assert_eq!(curl(&intercepted(80), 80), "curl -H 'baggage: forkd=alice' http://cart.shop/");
    }

    #[test]
    fn the_answer_on_stdout_never_has_the_environment() {
        let json = serde_json::to_string(&without_secrets(&intercepted(80))).unwrap();
        assert!(!json.contains("environment"), "{json}");
    }
}
