//! `forkd install` and `forkd uninstall`: an administrator's commands, with the administrator's own rights.
//!
//! Expected flow of an uninstall: claims go first, so that agents give the ports back; then agents are told to end, while
//! the controller that tells them is still there; then everything else, in the reverse order of the install.

use std::time::{Duration, Instant};

use forkd_api::manifests::{MANAGED_BY, Options, kind_of, render, to_yaml};
use forkd_api::{Fork, ForkTarget, MANAGER, SIGNER, SYSTEM_NAMESPACE};
use forkd_daemon::failure::{Exit, Failure};
use forkd_daemon::kubernetes::{self, Target};
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use k8s_openapi::api::core::v1::{ConfigMap, Event, Pod};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, PropagationPolicy};
use kube::core::{ApiResource, DynamicObject};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;

use crate::args::{self, Global};
use crate::ui::Ui;

/// How long parts may take to become ready, or to go.
const PATIENCE: Duration = Duration::from_secs(180);
/// How long agents may take to end; those that do not end by themselves when the controller stays away.
const AGENTS: Duration = Duration::from_secs(45);
/// Between two looks at something that is awaited.
const LOOK: Duration = Duration::from_millis(300);
/// The ConfigMap by which the controller hears that all agents are to end.
const RETIRE: &str = "forkd-retire";
/// Names of the containers that forkd adds to pods begin with one of these.
const CONTAINERS: [&str; 2] = ["forkd-agent-", "forkd-env-"];

/// `forkd install`
pub async fn install(global: &Global, ui: &Ui, args: &args::Install) -> Result<(), Failure> {
    let defaults = Options::default();
    let options = Options {
        image: args.image.clone().unwrap_or(defaults.image),
        image_pull_policy: format!("{:?}", args.image_pull_policy),
        relays: args.relays,
    };
    let objects = render(&options)
        .map_err(|error| Failure::new("cannot make the manifests").caused_by(&error).exit(Exit::Usage))?;
    if args.print {
        let yaml = to_yaml(&objects)
            .map_err(|error| Failure::new("cannot print the manifests").caused_by(&error))?;
        return ui.print(&yaml);
    }
    let client = Target::read(&global.choice())?.client().await?;
    // All are looked at before the first is applied: half an installation helps nobody.
    for object in &objects {
        may_apply(&client, object).await?;
    }
    let mut applied = Vec::new();
    for object in &objects {
        let name = describe(object);
        ui.step(&format!("applying {name}"));
        match apply(&client, object, args.dry_run).await {
            Ok(change) => applied.push(json!({ "object": name, "change": change })),
            Err(failure) => return Err(failure.while_doing(format!("cannot apply {name}"))),
        }
    }
    if !args.dry_run {
        // An uninstall that was interrupted has left it; agents would be sent away as soon as they come.
        let maps = Api::<ConfigMap>::namespaced(client.clone(), SYSTEM_NAMESPACE);
        fine_if_gone(maps.delete(RETIRE, &DeleteParams::default()).await.map(drop))
            .map_err(|error| kubernetes::failure("cannot clear what an earlier uninstall left", &error))?;
        ready(&client, ui).await?;
    }
    let done = if args.dry_run { "would be applied" } else { "applied; forkd is ready" };
    ui.answer(&json!({ "dryRun": args.dry_run, "image": options.image, "objects": applied }), || {
        let note = "bind the ClusterRole and the Role `forkd-user` to those who may connect: kubectl create clusterrolebinding …";
        format!("{} objects {done} ({})\n{}", applied.len(), options.image, if args.dry_run { "" } else { note })
    })
}

/// An object that is not there, or is forkd's own.
async fn may_apply(client: &Client, object: &DynamicObject) -> Result<(), Failure> {
    let (name, api) = (describe(object), api_of(client, object)?);
    let cannot = |error: kube::Error| kubernetes::failure(format!("cannot look for {name}"), &error);
    match api.get_opt(&object.name_any()).await.map_err(cannot)? {
        Some(found) if !is_own(&found) => {
            Err(Failure::new(format!("cannot apply {name}: there is one that forkd did not make"))
                .because(format!("it lacks the label {MANAGED_BY}={MANAGER}; nothing was applied"))
                .advice("remove or rename it, or label it if it is forkd's")
                .exit(Exit::Refused))
        }
        _ => Ok(()),
    }
}

fn is_own(object: &DynamicObject) -> bool {
    object.labels().get(MANAGED_BY).map(String::as_str) == Some(MANAGER)
}

async fn apply(client: &Client, object: &DynamicObject, dry_run: bool) -> Result<&'static str, Failure> {
    let api = api_of(client, object)?;
    let name = object.name_any();
    let cannot = |error: kube::Error| kubernetes::failure("the API server refused", &error);
    let before = api.get_opt(&name).await.map_err(cannot)?;
    let params = PatchParams { dry_run, ..PatchParams::apply(MANAGER).force() };
    match api.patch(&name, &params, &Patch::Apply(object)).await {
        Ok(after) => Ok(match before {
            None => "created",
            Some(before) if before.metadata.resource_version == after.metadata.resource_version => {
                "unchanged"
            }
            Some(_) => "changed",
        }),
        // A dry run makes no namespace for what comes after it.
        Err(kube::Error::Api(status)) if dry_run && status.code == 404 => Ok("created"),
        Err(error) => Err(cannot(error)),
    }
}

/// Waits until every part runs, and says which one it waits for.
async fn ready(client: &Client, ui: &Ui) -> Result<(), Failure> {
    let deployments = Api::<Deployment>::namespaced(client.clone(), SYSTEM_NAMESPACE);
    let sets = Api::<StatefulSet>::namespaced(client.clone(), SYSTEM_NAMESPACE);
    let cannot = |error: kube::Error| kubernetes::failure("cannot see whether forkd runs", &error);
    let began = Instant::now();
    loop {
        let mut waits = Vec::new();
        for name in ["forkd-controller", "forkd-gateway"] {
            let found = deployments.get(name).await.map_err(cannot)?;
            let status = found.status.unwrap_or_default();
            let wanted = found.spec.replicas.unwrap_or(1);
            if status.observed_generation < found.metadata.generation
                || status.updated_replicas.unwrap_or(0) < wanted
                || status.available_replicas.unwrap_or(0) < wanted
                || status.replicas.unwrap_or(0) > wanted
            {
                waits.push(name);
            }
        }
        let relay = sets.get("forkd-relay").await.map_err(cannot)?;
        let status = relay.status.unwrap_or_default();
        let wanted = relay.spec.replicas.unwrap_or(1);
        if status.observed_generation < relay.metadata.generation
            || status.ready_replicas.unwrap_or(0) < wanted
            || status.updated_replicas.unwrap_or(0) < wanted
        {
            waits.push("forkd-relay");
        }
        if waits.is_empty() {
            return Ok(());
        }
        if began.elapsed() > PATIENCE {
            return Err(Failure::new(format!(
                "{} is not ready after {} s",
                waits.join(", "),
                PATIENCE.as_secs()
            ))
            .because("applied, but it does not run")
            .advice(format!("kubectl -n {SYSTEM_NAMESPACE} get pods,events")));
        }
        ui.step(&format!("waiting for {}", waits.join(", ")));
        tokio::time::sleep(LOOK).await;
    }
}

/// `forkd uninstall`
pub async fn uninstall(global: &Global, ui: &Ui, args: &args::Uninstall) -> Result<(), Failure> {
    let client = Target::read(&global.choice())?.client().await?;
    let objects = render(&Options::default())
        .map_err(|error| Failure::new("cannot tell what forkd's objects are").caused_by(&error))?;
    let mut there = Vec::new();
    for object in objects.iter().rev() {
        if let Some(found) = own(&client, object).await? {
            there.push((describe(object), found));
        }
    }
    if args.dry_run {
        let names: Vec<_> = there.iter().map(|(name, _)| name.as_str()).collect();
        return ui.answer(&json!({ "dryRun": true, "objects": names }), || {
            format!("would go:\n{}", names.join("\n"))
        });
    }
    if !args.yes && !there.is_empty() {
        confirm(there.len())?;
    }
    let count = there.len();
    end_claims(&client, ui).await?;
    end_agents(&client, ui).await?;
    for (name, object) in there {
        ui.step(&format!("deleting {name}"));
        delete(&client, &object).await?;
    }
    end_requests(&client).await?;
    end_events(&client).await?;
    for object in objects.iter().rev() {
        gone(&client, ui, object).await?;
    }
    ui.answer(&json!({ "dryRun": false, "deleted": count }), || match count {
        0 => "forkd was not installed".to_owned(),
        _ => format!("forkd is gone: {count} objects deleted"),
    })
}

fn confirm(count: usize) -> Result<(), Failure> {
    use std::io::{BufRead as _, IsTerminal as _, Write as _};
    let no = || Failure::new("nothing was changed").advice("forkd uninstall --yes").exit(Exit::Usage);
    if !std::io::stdin().is_terminal() {
        return Err(no().because("nobody is there to ask"));
    }
    eprint!("Delete forkd ({count} objects), with all forks and intercepts of all users? [y/N] ");
    // A terminal that cannot be written to will not answer either.
    let _ = std::io::stderr().flush();
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).map_err(|error| no().caused_by(&error))?;
    if answer.trim().eq_ignore_ascii_case("y") { Ok(()) } else { Err(no()) }
}

/// Deletes all claims of all users; the controller then tells the agents to give the ports back.
async fn end_claims(client: &Client, ui: &Ui) -> Result<(), Failure> {
    ui.step("ending all intercepts");
    let cannot = |error: kube::Error| kubernetes::failure("cannot end the intercepts", &error);
    let targets = Api::<ForkTarget>::all(client.clone());
    for target in list(&targets).await.map_err(cannot)? {
        let api = Api::<ForkTarget>::namespaced(client.clone(), &target.namespace().unwrap_or_default());
        fine_if_gone(api.delete(&target.name_any(), &DeleteParams::default()).await.map(drop))
            .map_err(cannot)?;
    }
    let forks = Api::<Fork>::all(client.clone());
    for fork in list(&forks).await.map_err(cannot)? {
        fine_if_gone(forks.delete(&fork.name_any(), &DeleteParams::default()).await.map(drop))
            .map_err(cannot)?;
    }
    Ok(())
}

/// Tells all agents to end and waits until they have.
async fn end_agents(client: &Client, ui: &Ui) -> Result<(), Failure> {
    let cannot = |error: kube::Error| kubernetes::failure("cannot tell the agents to end", &error);
    let maps = Api::<ConfigMap>::namespaced(client.clone(), SYSTEM_NAMESPACE);
    let mut order = ConfigMap::default();
    order.metadata.name = Some(RETIRE.to_owned());
    order.metadata.labels = Some([(MANAGED_BY.to_owned(), MANAGER.to_owned())].into());
    match maps.create(&PostParams::default(), &order).await {
        Ok(_) => {}
        // 404: the namespace is gone already, and the controller with it.
        Err(kube::Error::Api(status)) if status.code == 409 || status.code == 404 => {}
        Err(error) => return Err(cannot(error)),
    }
    let pods = Api::<Pod>::all(client.clone());
    let began = Instant::now();
    loop {
        let running =
            pods.list(&ListParams::default()).await.map_err(cannot)?.into_iter().filter(has_agent).count();
        if running == 0 {
            return Ok(());
        }
        if began.elapsed() > AGENTS {
            ui.note(&format!(
                "agents in {running} pods did not end in time; without a controller they end by themselves"
            ));
            return Ok(());
        }
        ui.step(&format!("waiting for the agents in {running} pods to end"));
        tokio::time::sleep(LOOK).await;
    }
}

fn has_agent(pod: &Pod) -> bool {
    let statuses = pod.status.as_ref().and_then(|status| status.ephemeral_container_statuses.as_deref());
    statuses.unwrap_or_default().iter().any(|container| {
        CONTAINERS.iter().any(|name| container.name.starts_with(name))
            && container.state.as_ref().is_some_and(|state| state.running.is_some())
    })
}

/// Deletes certificate requests of laptops that the controller has not cleared away yet.
async fn end_requests(client: &Client) -> Result<(), Failure> {
    let cannot = |error: kube::Error| kubernetes::failure("cannot delete certificate requests", &error);
    let requests = Api::<CertificateSigningRequest>::all(client.clone());
    let ours = ListParams::default().fields(&format!("spec.signerName={SIGNER}"));
    for request in requests.list(&ours).await.map_err(cannot)? {
        let deleted = requests.delete(&request.name_any(), &DeleteParams::default()).await;
        fine_if_gone(deleted.map(drop)).map_err(cannot)?;
    }
    Ok(())
}

/// Deletes the controller's events: they are about objects of a kind that the cluster knows no longer.
async fn end_events(client: &Client) -> Result<(), Failure> {
    let cannot = |error: kube::Error| kubernetes::failure("cannot delete forkd's events", &error);
    let ours = ListParams::default().fields("reportingComponent=forkd-controller");
    for event in Api::<Event>::all(client.clone()).list(&ours).await.map_err(cannot)? {
        let api = Api::<Event>::namespaced(client.clone(), &event.namespace().unwrap_or_default());
        fine_if_gone(api.delete(&event.name_any(), &DeleteParams::default()).await.map(drop))
            .map_err(cannot)?;
    }
    Ok(())
}

/// The object as it is in the cluster, if it is there and forkd's.
async fn own(client: &Client, object: &DynamicObject) -> Result<Option<DynamicObject>, Failure> {
    let cannot = |error| kubernetes::failure(format!("cannot look for {}", describe(object)), &error);
    let found = api_of(client, object)?.get_opt(&object.name_any()).await.map_err(cannot)?;
    Ok(found.filter(is_own).map(|mut found| {
        found.types.clone_from(&object.types);
        found
    }))
}

async fn delete(client: &Client, object: &DynamicObject) -> Result<(), Failure> {
    let params =
        DeleteParams { propagation_policy: Some(PropagationPolicy::Background), ..DeleteParams::default() };
    let deleted = api_of(client, object)?.delete(&object.name_any(), &params).await;
    fine_if_gone(deleted.map(drop))
        .map_err(|error| kubernetes::failure(format!("cannot delete {}", describe(object)), &error))
}

/// Waits until an object is really gone: a namespace or a CRD takes its time.
async fn gone(client: &Client, ui: &Ui, object: &DynamicObject) -> Result<(), Failure> {
    let began = Instant::now();
    while own(client, object).await?.is_some() {
        if began.elapsed() > PATIENCE {
            return Err(Failure::new(format!(
                "{} is still there after {} s",
                describe(object),
                PATIENCE.as_secs()
            ))
            .because("something holds it back, e.g. a finalizer")
            .advice(format!("kubectl get {} -o yaml", describe(object))));
        }
        ui.step(&format!("waiting for {} to go", describe(object)));
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

fn api_of(client: &Client, object: &DynamicObject) -> Result<Api<DynamicObject>, Failure> {
    let kind = kind_of(object).ok_or_else(|| Failure::new("an object of forkd has no kind"))?;
    let resource = ApiResource::from_gvk(&kind);
    Ok(match object.namespace() {
        Some(namespace) => Api::namespaced_with(client.clone(), &namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    })
}

/// `kind/name`, as kubectl takes it.
fn describe(object: &DynamicObject) -> String {
    let kind = object.types.as_ref().map_or("object", |types| types.kind.as_str()).to_lowercase();
    match object.namespace() {
        Some(namespace) => format!("{kind}/{} -n {namespace}", object.name_any()),
        None => format!("{kind}/{}", object.name_any()),
    }
}

fn fine_if_gone(result: Result<(), kube::Error>) -> Result<(), kube::Error> {
    match result {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        result => result,
    }
}

/// All objects of a kind; none where the cluster does not know the kind (any more).
async fn list<K>(api: &Api<K>) -> Result<Vec<K>, kube::Error>
where
    K: Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    let began = Instant::now();
    loop {
        match api.list(&ListParams::default()).await {
            Ok(list) => return Ok(list.items),
            Err(kube::Error::Api(status)) if status.code == 404 => return Ok(Vec::new()),
            // The storage of a kind that was defined a moment ago is being set up.
            Err(error) if kubernetes::transient(&error) && began.elapsed() < PATIENCE => {
                tokio::time::sleep(LOOK).await;
            }
            Err(error) => return Err(error),
        }
    }
}
