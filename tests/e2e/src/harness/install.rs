//! forkd in the cluster, and the developers who may use it.

use std::sync::OnceLock;

use super::cluster::{SHOP, administrator, apply, kubectl, rolled_out};
use super::laptop::Laptop;
use super::process::Output;

/// The image that `tests/e2e/run` has loaded.
pub fn image() -> String {
    std::env::var("FORKD_IMAGE").expect("FORKD_IMAGE is set: run tests/e2e/run")
}

/// Panics unless `tests/e2e/run` has prepared everything.
#[track_caller]
pub fn present() {
    static LOOKED: OnceLock<()> = OnceLock::new();
    LOOKED.get_or_init(|| {
        assert!(std::env::var_os("FORKD_BIN_DIR").is_some(), "FORKD_BIN_DIR is not set: run tests/e2e/run");
        rolled_out(SHOP, "deployment");
        rolled_out("forkd", "deployment");
        developers();
    });
}

/// Installs forkd as the administrator would.
#[track_caller]
pub fn install(more: &[&str]) -> Output {
    let image = image();
    let mut args = vec!["install", "--yes", "--image", &image, "--image-pull-policy", "Never"];
    args.extend(more);
    Laptop::of(administrator()).forkd(&args)
}

/// Lets the developers use forkd, as its documentation tells the administrator to.
#[track_caller]
pub fn developers() {
    apply(include_str!("../../developers.yaml"));
}

/// Whether forkd's namespace is there.
#[track_caller]
pub fn installed() -> bool {
    kubectl(&["get", "namespace", "forkd", "--ignore-not-found", "--output=name"]).ok().contains("forkd")
}
