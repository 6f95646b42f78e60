//! What the Service is that a person wants to intercept, read with their own credentials.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Pod, Service};
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt};

use crate::control::Intercept;
use crate::failure::{Exit, Failure};
use crate::kubernetes;
use crate::ports::{self, Mapping, PortError, TargetPort};

/// The Service's ports, and the numbers that they have in containers.
///
/// # Errors
/// [`Failure`] with `cannot` as what failed: there is no such Service, no pod, no such port.
pub async fn resolve(
    client: &Client,
    namespace: &str,
    wanted: &Intercept,
    cannot: &str,
) -> Result<(Vec<Mapping>, BTreeMap<u16, u16>), Failure> {
    let services = Api::<Service>::namespaced(client.clone(), namespace);
    let service = match services.get_opt(&wanted.service).await {
        Ok(Some(service)) => service,
        Ok(None) => return Err(no_such_service(&services, namespace, &wanted.service, cannot).await),
        Err(error) => return Err(kubernetes::failure(cannot, &error)),
    };
    let selector = service.spec.as_ref().and_then(|spec| spec.selector.clone()).unwrap_or_default();
    if selector.is_empty() {
        return Err(Failure::new(cannot)
            .because("the Service selects no pods (it has no selector), so there is no pod to act as")
            .advice("intercept the Service that its traffic goes to"));
    }
    let mappings = ports::resolve(&service, &wanted.ports, wanted.all).map_err(|error| {
        let failure = Failure::new(cannot).because(&error);
        match error {
            PortError::Ambiguous { .. } => {
                failure.advice("say which: --port LAPTOP:REMOTE").exit(Exit::Usage)
            }
            PortError::NoSuchPort { .. } => {
                failure.advice("--port LAPTOP:REMOTE with one of them").exit(Exit::Usage)
            }
            PortError::Twice { .. } => failure.exit(Exit::Usage),
            PortError::NotHttp { .. } => {
                failure.advice("take everything that comes to it, of everybody: --all").exit(Exit::Usage)
            }
            PortError::NoPorts | PortError::NotTcp { .. } => failure,
        }
    })?;
    let labels: Vec<String> = selector.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let only = ListParams::default().labels(&labels.join(","));
    let pods = Api::<Pod>::namespaced(client.clone(), namespace)
        .list(&only)
        .await
        .map_err(|error| kubernetes::failure(cannot, &error))?;
    if pods.items.is_empty() {
        return Err(Failure::new(cannot)
            .because(format!(
                "no pod runs for it: nothing in {} has the labels {}",
                namespace,
                labels.join(",")
            ))
            .advice(format!("start one, e.g. `kubectl scale deployment -n {} --replicas=1 …`", namespace)));
    }
    let container_ports = container_ports(&mappings, &pods.items);
    if container_ports.is_empty() {
        return Err(
            Failure::new(cannot).because("no container has a port of the name that the Service names")
        );
    }
    Ok((mappings, container_ports))
}

/// Container port → laptop port. A name may stand for another number in each pod.
fn container_ports(mappings: &[Mapping], pods: &[Pod]) -> BTreeMap<u16, u16> {
    let mut ports = BTreeMap::new();
    for mapping in mappings {
        match &mapping.target {
            TargetPort::Number(number) => {
                ports.insert(*number, mapping.laptop);
            }
            TargetPort::Name(name) => {
                let containers = pods.iter().filter_map(|pod| pod.spec.as_ref()).flat_map(|spec| {
                    // A sidecar is an init container that goes on; it may have the port, too.
                    spec.containers.iter().chain(spec.init_containers.iter().flatten())
                });
                let named = containers
                    .flat_map(|container| container.ports.iter().flatten())
                    .filter(|port| port.name.as_deref() == Some(name))
                    .filter_map(|port| u16::try_from(port.container_port).ok());
                ports.extend(named.map(|number| (number, mapping.laptop)));
            }
        }
    }
    ports
}

async fn no_such_service(services: &Api<Service>, namespace: &str, service: &str, cannot: &str) -> Failure {
    let failure = Failure::new(cannot)
        .because(format!("there is no Service {} in the namespace {}", service, namespace));
    // Only to help: users who may not list get the message without it.
    let names: Vec<String> = match services.list(&ListParams::default()).await {
        Ok(list) => list.items.iter().map(ResourceExt::name_any).collect(),
        Err(_) => Vec::new(),
    };
    let near = similar(service, &names);
    match (near.is_empty(), names.is_empty()) {
        (false, _) => failure.advice(format!("did you mean {}?", near.join(" or "))),
        (true, false) => failure.advice(format!("there are: {}; others with --namespace", names.join(", "))),
        (true, true) => failure.advice("name the Service's namespace with --namespace"),
    }
}

/// Names that a typing error or a left-out part may have come from, best first, three at most.
fn similar(wanted: &str, names: &[String]) -> Vec<String> {
    let mut near: Vec<(usize, &String)> = names
        .iter()
        .filter_map(|name| {
            let distance = edits(wanted, name);
            let part = name.contains(wanted) || wanted.contains(name.as_str());
            (part || distance <= wanted.len().div_ceil(3)).then_some((distance, name))
        })
        .collect();
    near.sort_unstable();
    near.into_iter().take(3).map(|(_, name)| name.clone()).collect()
}

/// Edits from one text to the other (Levenshtein), by bytes: names of Services are ASCII.
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let change = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{Container, ContainerPort, PodSpec};

    fn pod(name: &str, number: i32) -> Pod {
        let port = ContainerPort { name: Some(name.into()), container_port: number, ..Default::default() };
        let container = Container { ports: Some(vec![port]), ..Default::default() };
        Pod {
            spec: Some(PodSpec { containers: vec![container], ..Default::default() }),
            ..Default::default()
        }
    }

    #[test]
    fn a_named_port_leads_to_the_laptop_by_every_number_it_has() {
        let mapping = Mapping { port: 80, target: TargetPort::Name("web".into()), laptop: 3000, http: true };
        let pods = [pod("web", 8080), pod("web", 9090), pod("admin", 1)];
        assert_eq!(container_ports(&[mapping], &pods), [(8080, 3000), (9090, 3000)].into());
    }

    #[test]
    fn a_typing_error_is_met_with_the_names_that_come_near() {
        let names = ["cart", "card", "price", "web", "cart-admin"].map(str::to_owned);
        assert_eq!(similar("crat", &names), ["cart"]);
        assert_eq!(similar("cart-v2", &names), ["cart"]);
        assert!(similar("stock", &names).is_empty());
        assert_eq!((edits("", "abc"), edits("cart", "cart"), edits("kitten", "sitting")), (3, 0, 3));
    }
}
