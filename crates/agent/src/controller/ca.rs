//! The authority of the cluster: made by the first controller, loaded by all others.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail};
use aws_lc_rs::{hmac, rand};
use forkd_api::manifests::MANAGED_BY;
use forkd_api::{MANAGER, SYSTEM_NAMESPACE};
use forkd_tunnel::identity::Authority;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{Patch, PatchParams, PostParams};
use kube::core::ObjectMeta;
use kube::{Api, Client};

/// Name of the Secret with the authority, and of the ConfigMap with its certificate.
pub const NAME: &str = "forkd-ca";
/// Key in Secret and ConfigMap: the certificate, PEM.
const CERTIFICATE: &str = "ca.crt";
/// Key in the Secret: the private key, PKCS#8 PEM.
const KEY: &str = "ca.key";
/// Key in the Secret: 32 random bytes that sign join tokens.
const TOKEN_KEY: &str = "token.key";

/// What makes a controller the authority.
pub struct Ca {
    /// Signs certificates.
    pub authority: Authority,
    /// Signs join tokens.
    pub token_key: hmac::Key,
}

/// Loads the authority; makes it if there is none. Whoever creates the Secret first wins; the others load theirs.
///
/// # Errors
/// If the API server refuses, or the Secret is damaged: it is not replaced then, since all certificates hang on it.
pub async fn load_or_create(client: &Client) -> anyhow::Result<Ca> {
    let api: Api<Secret> = Api::namespaced(client.clone(), SYSTEM_NAMESPACE);
    let secret = match api.get_opt(NAME).await.context("read Secret forkd-ca")? {
        Some(secret) => secret,
        None => match api.create(&PostParams::default(), &new_secret()?).await {
            Ok(secret) => {
                tracing::info!("created the certificate authority of this cluster");
                secret
            }
            Err(kube::Error::Api(status)) if status.code == 409 => {
                api.get(NAME).await.context("read Secret forkd-ca")?
            }
            Err(error) => return Err(error).context("create Secret forkd-ca"),
        },
    };
    let data = secret.data.unwrap_or_default();
    let field = |name: &str| {
        data.get(name)
            .map(|value| value.0.as_slice())
            .with_context(|| format!("Secret forkd-ca has no {name}"))
    };
    let text = |name: &str| {
        std::str::from_utf8(field(name)?).with_context(|| format!("{name} of Secret forkd-ca is no text"))
    };
    let authority =
        Authority::load(text(CERTIFICATE)?, text(KEY)?).context("load the authority from Secret forkd-ca")?;
    let token_key = field(TOKEN_KEY)?;
    if token_key.len() < 32 {
        bail!("{TOKEN_KEY} of Secret forkd-ca is too short");
    }
    Ok(Ca { authority, token_key: hmac::Key::new(hmac::HMAC_SHA256, token_key) })
}

/// Publishes the authority's certificate for relay and gateway, which mount it.
///
/// # Errors
/// If the API server refuses.
pub async fn publish(client: &Client, authority: &Authority) -> anyhow::Result<()> {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), SYSTEM_NAMESPACE);
    let map = ConfigMap {
        metadata: meta(),
        data: Some(BTreeMap::from([(CERTIFICATE.to_owned(), authority.certificate_pem())])),
        ..ConfigMap::default()
    };
    let params = PatchParams::apply(super::FIELD_MANAGER).force();
    api.patch(NAME, &params, &Patch::Apply(map)).await.context("write ConfigMap forkd-ca")?;
    Ok(())
}

fn new_secret() -> anyhow::Result<Secret> {
    let authority = Authority::create().context("create the authority")?;
    let mut token_key = vec![0; 32];
    rand::fill(&mut token_key).ok().context("get random bytes")?;
    Ok(Secret {
        metadata: meta(),
        type_: Some("Opaque".to_owned()),
        data: Some(BTreeMap::from([
            (CERTIFICATE.to_owned(), ByteString(authority.certificate_pem().into_bytes())),
            (KEY.to_owned(), ByteString(authority.key_pem().into_bytes())),
            (TOKEN_KEY.to_owned(), ByteString(token_key)),
        ])),
        ..Secret::default()
    })
}

fn meta() -> ObjectMeta {
    ObjectMeta {
        name: Some(NAME.to_owned()),
        namespace: Some(SYSTEM_NAMESPACE.to_owned()),
        labels: Some(BTreeMap::from([(MANAGED_BY.to_owned(), MANAGER.to_owned())])),
        ..ObjectMeta::default()
    }
}
