//! Fork and ForkTarget: what outsiders type, in YAML or through the `forkd` command.
//!
//! The CRD YAML in `crates/api/crds/` is generated from these types; a test holds the two together.

pub mod manifests;
pub mod names;

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// API group of all kinds here.
pub const GROUP: &str = "forkd.dev";
/// The one version there is.
pub const VERSION: &str = "v1alpha1";
/// Namespace of controller, relay and gateway.
pub const SYSTEM_NAMESPACE: &str = "forkd";
/// Signer of laptops' certificate requests (CertificateSigningRequest API).
pub const SIGNER: &str = "forkd.dev/laptop";
/// `app.kubernetes.io/managed-by` of everything that forkd makes, and its server-side apply field manager.
pub const MANAGER: &str = "forkd";
/// The baggage member (W3C Baggage), tracestate key (W3C Trace Context) whose value is the fork's id.
pub const KEY: &str = "forkd";
/// The header that carries the fork's id for services that drop baggage.
pub const KEY_HEADER: &str = "x-forkd-id";
/// Response header that says who answered inside a fork.
pub const SERVED_BY_HEADER: &str = "forkd-served-by";
/// Label of a ForkTarget, and annotation-safe name of its fork.
pub const FORK_LABEL: &str = "forkd.dev/fork";

/// A named virtual copy of the cluster. `metadata.name` is its id and the value of its key.
#[derive(CustomResource, Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[kube(
    group = "forkd.dev",
    version = "v1alpha1",
    kind = "Fork",
    plural = "forks",
    shortname = "fk",
    category = "forkd",
    status = "ForkStatus",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Owner","type":"string","jsonPath":".spec.owner"}"#,
    printcolumn = r#"{"name":"Targets","type":"integer","jsonPath":".status.targets"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].status"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#,
    validation = "self.metadata.name.size() <= 40 && self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')"
)]
#[serde(rename_all = "camelCase")]
pub struct ForkSpec {
    /// The Kubernetes user whose fork this is. An admission policy holds it to the requester.
    #[schemars(length(min = 1))]
    pub owner: String,
}

/// What the controller sees of a Fork.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ForkStatus {
    /// Number of ForkTargets in this fork.
    pub targets: i32,
    /// `Ready`: every target is.
    #[schemars(schema_with = "conditions_schema")]
    pub conditions: Vec<Condition>,
}

/// One Service of a fork whose requests go to a laptop. Lives in the namespace of the Service, so that plain RBAC
/// decides who may replace what. `metadata.name` is [`names::target`]: one object per fork and Service, so creating
/// it is the claim.
#[derive(CustomResource, Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[kube(
    group = "forkd.dev",
    version = "v1alpha1",
    kind = "ForkTarget",
    plural = "forktargets",
    shortname = "ft",
    category = "forkd",
    namespaced,
    status = "ForkTargetStatus",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Fork","type":"string","jsonPath":".spec.fork"}"#,
    printcolumn = r#"{"name":"Service","type":"string","jsonPath":".spec.service"}"#,
    printcolumn = r#"{"name":"Traffic","type":"string","jsonPath":".spec.traffic"}"#,
    printcolumn = r#"{"name":"Owner","type":"string","jsonPath":".spec.owner"}"#,
    printcolumn = r#"{"name":"Laptop","type":"string","jsonPath":".spec.laptop.host"}"#,
    printcolumn = r#"{"name":"Pods","type":"string","jsonPath":".status.routed"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].status"}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".status.conditions[?(@.type==\"Ready\")].reason","priority":1}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct ForkTargetSpec {
    /// `metadata.name` of the Fork.
    #[schemars(length(min = 1, max = 40))]
    pub fork: String,
    /// The Kubernetes user who holds the target. An admission policy holds it to the requester.
    #[schemars(length(min = 1))]
    pub owner: String,
    /// The Service in this namespace whose requests are taken.
    #[schemars(length(min = 1, max = 63))]
    pub service: String,
    /// Which ports of the Service; at least one.
    #[schemars(length(min = 1, max = 32))]
    pub ports: Vec<TargetPort>,
    /// Only what carries the fork's key, or everything.
    #[serde(default)]
    pub traffic: Traffic,
    /// What keyed requests get while the laptop is gone.
    #[serde(default)]
    pub on_unavailable: OnUnavailable,
    /// Who serves the target.
    pub laptop: Laptop,
    /// Let the laptop read the environment of this container of a pod ("" for the container that has the port).
    /// Asks the owner for `create pods/exec` in the namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub environment_of: Option<String>,
}

/// One port of the Service.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TargetPort {
    /// The Service's port number.
    #[schemars(range(min = 1, max = 65535))]
    pub port: i32,
    /// The port on the laptop; for people who read this object, forkd in the cluster does not use it.
    #[schemars(range(min = 1, max = 65535))]
    pub laptop_port: i32,
}

/// Which requests a target takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum Traffic {
    /// HTTP requests that carry the fork's key.
    #[default]
    Keyed,
    /// Every connection and request. One target of a Service at a time.
    All,
}

/// What keyed requests get while the laptop is gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum OnUnavailable {
    /// A 503 that says why.
    #[default]
    Error,
    /// The baseline's answer.
    Baseline,
}

/// The laptop behind a target.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Laptop {
    /// Its id: stable per user and machine, the id in its certificate's URI.
    #[schemars(length(min = 1, max = 63))]
    pub id: String,
    /// Its host name, for people.
    #[serde(default)]
    pub host: String,
}

/// What the controller sees of a ForkTarget.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ForkTargetStatus {
    /// `Routed` (every ready pod's agent has the redirect in place), `LaptopConnected` (to every one of these agents),
    /// `Ready` (both; its reason names what is missing: `NoSuchService`, `NoPods`, `NoSuchPort`, `Claimed`,
    /// `AgentForbidden`, `AgentStarting`, `AgentFailed`, `LaptopGone` …).
    #[schemars(schema_with = "conditions_schema")]
    pub conditions: Vec<Condition>,
    /// "2/3": pods that are routed, of pods that are ready.
    pub routed: String,
    /// By pod name, what its agent says.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub pods: BTreeMap<String, PodStatus>,
    /// URI of the agent that serves the environment, once it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub environment_agent: Option<String>,
}

/// One pod of a target.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PodStatus {
    /// `metadata.uid` of the pod, which is also the id of its agent.
    pub uid: String,
    /// The redirect is in place.
    pub routed: bool,
    /// The laptop has a live connection to this agent.
    pub laptop_connected: bool,
    /// Connections that predate the redirect and stay with the application.
    pub older_connections: u32,
    /// Connections that were not HTTP and therefore went to the baseline.
    pub opaque_connections: u32,
    /// Why it is not routed; empty when it is.
    pub message: String,
}

/// Conditions as in the Kubernetes API conventions: a list that merges by type.
fn conditions_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({
        "type": "array",
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
        "items": {
            "type": "object",
            "required": ["type", "status", "lastTransitionTime", "reason", "message"],
            "properties": {
                "type": {"type": "string"},
                "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
                "observedGeneration": {"type": "integer", "format": "int64"},
                "lastTransitionTime": {"type": "string", "format": "date-time"},
                "reason": {"type": "string"},
                "message": {"type": "string"}
            }
        }
    })
}

/// Condition types of this API.
pub mod condition {
    /// The object does what its spec says.
    pub const READY: &str = "Ready";
    /// Every ready pod has its redirect.
    pub const ROUTED: &str = "Routed";
    /// The laptop is connected to every agent.
    pub const LAPTOP_CONNECTED: &str = "LaptopConnected";
    /// An agent reads the container's environment. Only where `environmentOf` asks for it.
    pub const ENVIRONMENT: &str = "Environment";
}

/// The CRDs of this API, as `forkd install` applies them.
pub fn crds()
-> Vec<k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition> {
    use kube::CustomResourceExt;
    vec![Fork::crd(), ForkTarget::crd()]
}
