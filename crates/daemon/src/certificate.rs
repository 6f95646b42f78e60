//! The laptop's certificate: from the cluster's own CertificateSigningRequest API, so that the API server vouches for
//! who the user is.

use std::time::{Duration, SystemTime};

use forkd_tunnel::identity::{Chain, Credentials, Identity, KeyPair};
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::time::Instant;

use crate::control::Progress;
use crate::failure::Failure;
use crate::kubernetes::{self, WaitError, Watched};
use crate::state;

/// The controller signs within milliseconds; this long means that it does not run.
const SIGNING: Duration = Duration::from_secs(20);
/// What is asked for, in seconds; the controller may give less.
const LIFE_SECONDS: i32 = 12 * 3600;
/// Pause before a failed renewal is tried again. A third of the life (4 h) is left when it is first tried.
const RENEWAL_PAUSE: Duration = Duration::from_secs(60);

/// Gets a certificate for this laptop.
///
/// # Errors
/// [`Failure`] that says which step failed: the request, the decision, or the signature.
pub async fn obtain(
    client: &Client,
    laptop: &str,
    user: &str,
    progress: &Progress,
) -> Result<Credentials, Failure> {
    progress.step("getting a certificate for this laptop");
    let (chain, key) = request(client, laptop, user).await?;
    Credentials::new(chain, &key)
        .map_err(|error| Failure::new("cannot use the certificate that the cluster gave").caused_by(&error))
}

/// Renews the certificate after two thirds of its life, for good. Connections that are open stay.
pub async fn keep(client: Client, laptop: String, user: String, credentials: Credentials) {
    loop {
        let wait = credentials.renew_at().duration_since(SystemTime::now()).unwrap_or_default();
        tokio::time::sleep(wait).await;
        let renewed = request(&client, &laptop, &user).await.and_then(|(chain, key)| {
            credentials
                .replace(chain, &key)
                .map_err(|error| Failure::new("cannot use the renewed certificate").caused_by(&error))
        });
        match renewed {
            Ok(()) => tracing::info!("certificate renewed"),
            Err(failure) => {
                tracing::warn!(failure = failure.one_line(), "certificate not renewed");
                tokio::time::sleep(RENEWAL_PAUSE).await;
            }
        }
    }
}

async fn request(client: &Client, laptop: &str, user: &str) -> Result<(Chain, KeyPair), Failure> {
    let own = |error: &(dyn std::error::Error + 'static)| Failure::new("cannot make a key").caused_by(error);
    let key = KeyPair::generate().map_err(|error| own(&error))?;
    // The signer takes user and groups from what the API server wrote into the request, not from here.
    let identity = Identity::Laptop { id: laptop.to_owned(), user: user.to_owned(), groups: Vec::new() };
    let pem = key.request(&identity).map_err(|error| own(&error))?.pem;
    let suffix = state::random_hex().map_err(|error| own(&error))?;
    let name = format!("forkd-{laptop}-{}", &suffix[..8]);

    let api = Api::<CertificateSigningRequest>::all(client.clone());
    let object = CertificateSigningRequest {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            labels: Some([("app.kubernetes.io/managed-by".to_owned(), forkd_api::MANAGER.to_owned())].into()),
            ..ObjectMeta::default()
        },
        spec: CertificateSigningRequestSpec {
            request: ByteString(pem.into_bytes()),
            signer_name: forkd_api::SIGNER.to_owned(),
            expiration_seconds: Some(LIFE_SECONDS),
            usages: Some(vec!["digital signature".to_owned(), "client auth".to_owned()]),
            ..CertificateSigningRequestSpec::default()
        },
        status: None,
    };
    let cannot = "cannot get a certificate for this laptop";
    api.create(&PostParams::default(), &object).await.map_err(|error| kubernetes::failure(cannot, &error))?;
    let signed = kubernetes::wait_for(&api, &name, Instant::now() + SIGNING, |request| match request {
        Watched::Object(request) => decision(request),
        Watched::Absent | Watched::Deleted => {
            Some(Err("the request was deleted before it was signed".to_owned()))
        }
    })
    .await;
    match signed {
        Ok(Ok(pem)) => {
            let chain = Chain::from_pem(&pem)
                .map_err(|error| Failure::new("cannot read the certificate that the cluster gave").caused_by(&error))?;
            Ok((chain, key))
        }
        Ok(Err(why)) => Err(Failure::new(cannot).because(why).exit(crate::failure::Exit::Refused)),
        Err(WaitError::Api(error)) => Err(kubernetes::failure(cannot, &error)),
        Err(WaitError::TimedOut) => Err(Failure::new(cannot)
            .because(format!("nobody signed the request {name} within {} s", SIGNING.as_secs()))
            .advice("see whether forkd is installed and its controller runs: `kubectl get pods -n forkd`; `forkd install`")),
    }
}

/// What the signer said: a certificate (PEM), or why there is none.
fn decision(request: &CertificateSigningRequest) -> Option<Result<String, String>> {
    let status = request.status.as_ref()?;
    let no = status
        .conditions
        .iter()
        .flatten()
        .find(|condition| matches!(condition.type_.as_str(), "Denied" | "Failed"));
    if let Some(no) = no {
        let why = no.message.as_deref().or(no.reason.as_deref()).unwrap_or("no reason given");
        return Some(Err(format!("the controller refused it: {why}")));
    }
    let certificate = status.certificate.as_ref()?;
    Some(String::from_utf8(certificate.0.clone()).map_err(|_| "the certificate is no PEM".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::certificates::v1::{
        CertificateSigningRequestCondition, CertificateSigningRequestStatus,
    };

    fn with(conditions: &[(&str, &str)], certificate: Option<&str>) -> CertificateSigningRequest {
        let conditions = conditions
            .iter()
            .map(|(type_, message)| CertificateSigningRequestCondition {
                type_: (*type_).to_owned(),
                message: Some((*message).to_owned()),
                ..Default::default()
            })
            .collect();
        CertificateSigningRequest {
            status: Some(CertificateSigningRequestStatus {
                conditions: Some(conditions),
                certificate: certificate.map(|pem| ByteString(pem.into())),
            }),
            ..Default::default()
        }
    }

    #[test]
    fn an_approved_request_is_waited_for_until_it_is_signed() {
        assert_eq!(decision(&CertificateSigningRequest::default()), None);
        assert_eq!(decision(&with(&[("Approved", "")], None)), None);
        assert_eq!(decision(&with(&[("Approved", "")], Some("PEM"))), Some(Ok("PEM".into())));
    }

    #[test]
    fn a_refusal_says_what_the_controller_said() {
        let refused = decision(&with(&[("Denied", "laptop id is no name")], None));
        assert_eq!(refused, Some(Err("the controller refused it: laptop id is no name".into())));
        let failed = decision(&with(&[("Approved", ""), ("Failed", "no CA")], None));
        assert_eq!(failed, Some(Err("the controller refused it: no CA".into())));
    }
}
