//! Everything that `forkd install` puts into a cluster, in the order in which it is applied.
//!
//! The YAML in `crates/api/manifests/` is the source; what differs between installations stands there as a string
//! `${NAME}` and is filled in here, value by value, so that no text can break out of its place.

use std::collections::BTreeMap;

use kube::core::{DynamicObject, GroupVersionKind, TypeMeta};
use serde::Deserialize as _;
use serde_json::Value;

use crate::MANAGER;

/// Label of everything that forkd owns: [`MANAGER`] is its value.
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Repository of the image; the tag is the version of this binary.
pub const IMAGE_REPOSITORY: &str = "docker.io/forkd/agent";
/// Relays that users may reach at least, so that RBAC need not change when some are added.
const NAMED_RELAYS: u16 = 3;

/// The files, in the order in which they are applied.
const FILES: &[(&str, &str)] = &[
    ("10-namespace.yaml", include_str!("../manifests/10-namespace.yaml")),
    ("20-controller-rbac.yaml", include_str!("../manifests/20-controller-rbac.yaml")),
    ("30-user-rbac.yaml", include_str!("../manifests/30-user-rbac.yaml")),
    ("40-admission.yaml", include_str!("../manifests/40-admission.yaml")),
    ("50-controller.yaml", include_str!("../manifests/50-controller.yaml")),
    ("60-relay.yaml", include_str!("../manifests/60-relay.yaml")),
    ("70-gateway.yaml", include_str!("../manifests/70-gateway.yaml")),
];

/// What differs between installations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Image of agent, gateway, relay and controller.
    pub image: String,
    /// `Always`, `IfNotPresent` or `Never`.
    pub image_pull_policy: String,
    /// Number of relays, at least 1.
    pub relays: u16,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            image: format!("{IMAGE_REPOSITORY}:{}", env!("CARGO_PKG_VERSION")),
            image_pull_policy: "IfNotPresent".to_owned(),
            relays: 2,
        }
    }
}

/// Why there are no manifests.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// An option makes no sense.
    #[error("{0}")]
    Option(String),
    /// A file in the binary is no YAML of Kubernetes objects.
    #[error("reading {file}: {why}")]
    File {
        /// Its name.
        file: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// An object cannot be printed.
    #[error("printing YAML: {0}")]
    Print(#[from] serde_yaml_ng::Error),
}

/// All objects, in the order in which they are to be applied: what others need comes first. Each carries the label
/// [`MANAGED_BY`].
///
/// # Errors
/// [`ManifestError::Option`] if an option makes no sense.
pub fn render(options: &Options) -> Result<Vec<DynamicObject>, ManifestError> {
    if options.image.trim().is_empty() || options.image.contains(char::is_whitespace) {
        return Err(ManifestError::Option(format!("`{}` is no image reference", options.image)));
    }
    if !matches!(options.image_pull_policy.as_str(), "Always" | "IfNotPresent" | "Never") {
        return Err(ManifestError::Option(format!(
            "`{}` is no image pull policy: Always, IfNotPresent or Never",
            options.image_pull_policy
        )));
    }
    if options.relays == 0 {
        return Err(ManifestError::Option("there has to be at least one relay".to_owned()));
    }
    let mut objects = Vec::new();
    for crd in crate::crds() {
        let value = serde_json::to_value(crd)
            .map_err(|error| ManifestError::File { file: "crds", why: error.to_string() })?;
        objects.push(object("crds", value)?);
    }
    for (file, text) in FILES {
        for document in serde_yaml_ng::Deserializer::from_str(text) {
            let mut value = Value::deserialize(document)
                .map_err(|error| ManifestError::File { file, why: error.to_string() })?;
            fill(&mut value, options);
            objects.push(object(file, value)?);
        }
    }
    Ok(objects)
}

/// The objects as one stream of YAML documents: for `--print`, GitOps and `kubectl apply --server-side`.
///
/// # Errors
/// [`ManifestError::Print`] if one cannot be written as YAML.
pub fn to_yaml(objects: &[DynamicObject]) -> Result<String, ManifestError> {
    let mut text = String::new();
    for object in objects {
        text.push_str("---\n");
        text.push_str(&serde_yaml_ng::to_string(object)?);
    }
    Ok(text)
}

/// Group, version and kind of a rendered object.
pub fn kind_of(object: &DynamicObject) -> Option<GroupVersionKind> {
    GroupVersionKind::try_from(object.types.as_ref()?).ok()
}

/// Types and labels of one document.
fn object(file: &'static str, value: Value) -> Result<DynamicObject, ManifestError> {
    let types = TypeMeta::deserialize(&value)
        .map_err(|error| ManifestError::File { file, why: format!("no apiVersion or kind: {error}") })?;
    let mut object: DynamicObject = serde_json::from_value(value)
        .map_err(|error| ManifestError::File { file, why: error.to_string() })?;
    object.types = Some(types);
    let labels = object.metadata.labels.get_or_insert_with(BTreeMap::new);
    labels.insert(MANAGED_BY.to_owned(), MANAGER.to_owned());
    labels.insert("app.kubernetes.io/part-of".to_owned(), MANAGER.to_owned());
    labels.insert("app.kubernetes.io/version".to_owned(), env!("CARGO_PKG_VERSION").to_owned());
    Ok(object)
}

/// Replaces the strings `${NAME}`, wherever they stand, by what the options say.
fn fill(value: &mut Value, options: &Options) {
    match value {
        Value::Array(items) => {
            if items.iter().any(|item| item == "${RELAY_NAMES}") {
                *items = (0..options.relays.max(NAMED_RELAYS))
                    .map(|number| Value::from(format!("forkd-relay-{number}")))
                    .collect();
            }
            items.iter_mut().for_each(|item| fill(item, options));
        }
        Value::Object(fields) => fields.values_mut().for_each(|field| fill(field, options)),
        Value::String(text) => match text.as_str() {
            "${IMAGE}" => *value = Value::from(options.image.as_str()),
            "${PULL_POLICY}" => *value = Value::from(options.image_pull_policy.as_str()),
            "${RELAYS}" => *value = Value::from(options.relays),
            _ => {}
        },
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn default_yaml() -> String {
        let options = Options { image: format!("{IMAGE_REPOSITORY}:VERSION"), ..Options::default() };
        to_yaml(&render(&options).unwrap()).unwrap().replace(env!("CARGO_PKG_VERSION"), "VERSION")
    }

    /// Compares with a file in the crate, or writes it if `FORKD_BLESS` is set.
    fn golden(path: &str, now: &str) {
        let path = format!("{}/{path}", env!("CARGO_MANIFEST_DIR"));
        if std::env::var_os("FORKD_BLESS").is_some() {
            std::fs::write(&path, now).unwrap();
        }
        let then = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            then == now,
            "{path} is not what the code makes: look at it after FORKD_BLESS=1 cargo test -p forkd-api"
        );
    }

    #[test]
    fn the_manifests_are_those_of_the_golden_file() {
        golden("tests/install.yaml", &default_yaml());
    }

    #[test]
    fn the_crds_are_those_of_the_golden_files() {
        for crd in crate::crds() {
            let name = crd.spec.names.plural.clone();
            golden(&format!("crds/{name}.yaml"), &serde_yaml_ng::to_string(&crd).unwrap());
        }
    }

    #[test]
    fn nothing_is_left_to_fill_in() {
        assert!(!default_yaml().contains("${"), "{}", default_yaml());
    }

    #[test]
    fn an_image_reference_stays_one_string_whatever_is_in_it() {
        let image = "example.org/a:1\"}";
        let objects = render(&Options { image: image.to_owned(), ..Options::default() }).unwrap();
        let deployment = objects.iter().find(|object| kind_of(object).unwrap().kind == "Deployment").unwrap();
        assert_eq!(deployment.data["spec"]["template"]["spec"]["containers"][0]["image"], image);
        assert!(render(&Options { image: "a b".to_owned(), ..Options::default() }).is_err());
        assert!(
            render(&Options { image_pull_policy: "Sometimes".to_owned(), ..Options::default() }).is_err()
        );
        assert!(render(&Options { relays: 0, ..Options::default() }).is_err());
    }

    #[test]
    fn every_relay_can_be_named_by_its_users() {
        let objects = render(&Options { relays: 5, ..Options::default() }).unwrap();
        let role = objects
            .iter()
            .find(|object| {
                kind_of(object).unwrap().kind == "Role"
                    && object.metadata.name.as_deref() == Some("forkd-user")
            })
            .unwrap();
        for rule in role.data["rules"].as_array().unwrap() {
            assert_eq!(rule["resourceNames"].as_array().unwrap().len(), 5);
            assert_eq!(rule["resourceNames"][4], "forkd-relay-4");
        }
    }

    #[test]
    fn every_pod_passes_the_restricted_standard() {
        for object in render(&Options::default()).unwrap() {
            let Some(pod) = object.data.pointer("/spec/template/spec") else { continue };
            assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
            assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
            for container in pod["containers"].as_array().unwrap() {
                let context = &container["securityContext"];
                assert_eq!(context["allowPrivilegeEscalation"], false);
                assert_eq!(context["readOnlyRootFilesystem"], true);
                assert_eq!(context["capabilities"]["drop"][0], "ALL");
            }
        }
    }

    #[test]
    fn relay_and_gateway_have_no_rights_in_the_api() {
        for object in render(&Options::default()).unwrap() {
            for subject in object.data["subjects"].as_array().into_iter().flatten() {
                assert_eq!(subject["name"], "forkd-controller");
            }
        }
    }
}
