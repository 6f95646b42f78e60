//! `forkd version`.

use std::time::Duration;

use forkd_api::SYSTEM_NAMESPACE;
use forkd_daemon::failure::Failure;
use forkd_daemon::kubernetes::{self, Target};
use k8s_openapi::api::apps::v1::Deployment;
use kube::Api;
use serde::Serialize;

use crate::args::Global;
use crate::ui::Ui;

/// `forkd version` is often run where no cluster is near: it does not wait for one for long.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Serialize)]
struct Version {
    client: &'static str,
    /// Absent when it cannot be told; then `problem` says why.
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster: Option<Cluster>,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

#[derive(Serialize)]
struct Cluster {
    context: String,
    /// Tag (or digest) of the controller's image.
    forkd: String,
    kubernetes: String,
}

/// `forkd version`
pub async fn version(global: &Global, ui: &Ui) -> Result<(), Failure> {
    let asked = tokio::time::timeout(PATIENCE, cluster(global)).await;
    let asked = asked.unwrap_or_else(|_| {
        Err(Failure::new("cannot reach the cluster")
            .because(format!("no answer within {} s", PATIENCE.as_secs())))
    });
    let client = env!("CARGO_PKG_VERSION");
    let version = match asked {
        Ok(cluster) => Version { client, cluster: Some(cluster), problem: None },
        Err(failure) => Version { client, cluster: None, problem: Some(failure.one_line()) },
    };
    ui.answer(&version, || match (&version.cluster, &version.problem) {
        (Some(cluster), _) => format!(
            "forkd {client}\ncluster {}: forkd {}, Kubernetes {}",
            cluster.context, cluster.forkd, cluster.kubernetes
        ),
        (None, problem) => {
            format!("forkd {client}\ncluster: unknown ({})", problem.as_deref().unwrap_or("no reason"))
        }
    })
}

async fn cluster(global: &Global) -> Result<Cluster, Failure> {
    let target = Target::read(&global.choice())?;
    let client = target.client().await?;
    let cannot = |error: kube::Error| kubernetes::failure("cannot tell the cluster's version", &error);
    let kubernetes = client.apiserver_version().await.map_err(cannot)?.git_version;
    let deployments = Api::<Deployment>::namespaced(client, SYSTEM_NAMESPACE);
    let forkd = match deployments.get_opt("forkd-controller").await {
        Ok(Some(controller)) => image_version(&controller).unwrap_or_else(|| "unknown".to_owned()),
        Ok(None) => "not installed".to_owned(),
        // Users of the cluster need not see what runs in the namespace forkd.
        Err(kube::Error::Api(status)) if status.code == 403 => "not visible to you".to_owned(),
        Err(error) => return Err(cannot(error)),
    };
    Ok(Cluster { context: target.context, forkd, kubernetes })
}

fn image_version(controller: &Deployment) -> Option<String> {
    let image = controller.spec.template.spec.as_ref()?.containers.first()?.image.as_deref()?;
    Some(tag(image).to_owned())
}

/// Tag or digest of an image reference; the whole of one that has neither.
fn tag(image: &str) -> &str {
    if let Some((_, digest)) = image.split_once('@') {
        return digest;
    }
    // A colon before the last slash belongs to the registry's port.
    match image.rsplit_once('/').map_or(image, |(_, name)| name).split_once(':') {
        Some((_, tag)) => tag,
        None => image,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tag_is_told_from_the_registrys_port() {
        assert_eq!(tag("docker.io/forkd/agent:0.1.0"), "0.1.0");
        assert_eq!(tag("registry:5000/forkd/agent"), "registry:5000/forkd/agent");
        assert_eq!(tag("registry:5000/forkd/agent:1.2"), "1.2");
        assert_eq!(tag("forkd/agent@sha256:0a1b"), "sha256:0a1b");
    }
}
