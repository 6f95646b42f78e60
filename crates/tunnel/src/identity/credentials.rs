//! A party's certificate and key in use, and the TLS configurations made of them. Certificates live for hours;
//! [`Credentials::replace`] puts in new ones beneath all configurations already handed out.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rcgen::PublicKeyData;
use rustls::RootCertStore;
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider, sign};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;

use super::authority::{Chain, KeyPair, Parsed};
use super::{Identity, IdentityError, identity_of};

/// Certificate, key and authority of one party. Cheap to clone; all clones see a replacement.
#[derive(Clone)]
pub struct Credentials(Arc<Shared>);

struct Shared {
    identity: Identity,
    authority: CertificateDer<'static>,
    held: RwLock<Held>,
}

struct Held {
    certified: Arc<CertifiedKey>,
    not_before: SystemTime,
    not_after: SystemTime,
}

/// Does a server insist on a client certificate?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientAuth {
    /// Without one there is no connection.
    Required,
    /// For the controller: a party that joins has none yet. One that is shown must be valid.
    Optional,
}

impl Credentials {
    /// Takes a certificate (leaf first, authority last) and its key. Who it is for is what the leaf says.
    ///
    /// # Errors
    /// [`IdentityError`] if the chain is not two certificates, cannot be read, is not signed by its authority, has
    /// ended, or the key is another's.
    pub fn new(chain: Chain, key: &KeyPair) -> Result<Self, IdentityError> {
        let [leaf, authority] = chain.0.as_slice() else {
            return Err(IdentityError::Certificate(format!(
                "{} certificates in the chain, not 2",
                chain.0.len()
            )));
        };
        let identity = identity_of(leaf)?;
        let authority = authority.clone();
        let held = Held::check(&chain, key, &authority)?;
        Ok(Self(Arc::new(Shared { identity, authority, held: RwLock::new(held) })))
    }

    /// Puts in a renewed certificate. Connections that are open stay; the next handshake shows the new one.
    ///
    /// # Errors
    /// As [`Self::new`]; and if it is for someone else, or of another authority. The old one then stays.
    pub fn replace(&self, chain: Chain, key: &KeyPair) -> Result<(), IdentityError> {
        let leaf = chain.0.first().ok_or(IdentityError::NoCertificate)?;
        self.0.identity.expect(&identity_of(leaf)?)?;
        let held = Held::check(&chain, key, &self.0.authority)?;
        *self.0.held.write().unwrap_or_else(PoisonError::into_inner) = held;
        Ok(())
    }

    /// Whose they are.
    pub fn identity(&self) -> &Identity {
        &self.0.identity
    }

    /// Whom they trust.
    pub fn authority(&self) -> &CertificateDer<'static> {
        &self.0.authority
    }

    /// When the certificate ends.
    pub fn expires_at(&self) -> SystemTime {
        self.held(|held| held.not_after)
    }

    /// When to ask for a new one: after two thirds of its life.
    pub fn renew_at(&self) -> SystemTime {
        self.held(|held| {
            let life = held.not_after.duration_since(held.not_before).unwrap_or_default();
            held.not_before + life * 2 / 3
        })
    }

    /// TLS 1.3 client that shows this certificate and trusts this authority. `alpn`: best first.
    ///
    /// # Errors
    /// [`IdentityError::Tls`], [`IdentityError::Certificate`] if rustls does not take the authority.
    pub fn client_config(&self, alpn: &[&[u8]]) -> Result<Arc<rustls::ClientConfig>, IdentityError> {
        let builder = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots(&self.0.authority)?);
        let mut config = builder.with_client_cert_resolver(Arc::new(Resolver(self.clone())));
        finish_client(&mut config, alpn);
        Ok(Arc::new(config))
    }

    /// TLS 1.3 server that shows this certificate and trusts clients of this authority. `alpn`: best first.
    ///
    /// # Errors
    /// As [`Self::client_config`].
    pub fn server_config(
        &self,
        alpn: &[&[u8]],
        client_auth: ClientAuth,
    ) -> Result<Arc<rustls::ServerConfig>, IdentityError> {
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots(&self.0.authority)?), provider());
        let verifier = match client_auth {
            ClientAuth::Required => verifier,
            ClientAuth::Optional => verifier.allow_unauthenticated(),
        };
        let verifier = verifier.build().map_err(|error| IdentityError::Certificate(error.to_string()))?;
        let mut config = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(Resolver(self.clone())));
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        // A resumed session would outlive the certificate that it was made with.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    /// [`Self::client_config`] for QUIC.
    ///
    /// # Errors
    /// As [`Self::client_config`].
    pub fn quic_client_config(&self, alpn: &[&[u8]]) -> Result<quinn::ClientConfig, IdentityError> {
        let crypto = QuicClientConfig::try_from(self.client_config(alpn)?).map_err(no_suite)?;
        Ok(quinn::ClientConfig::new(Arc::new(crypto)))
    }

    /// [`Self::server_config`] for QUIC; clients must show a certificate.
    ///
    /// # Errors
    /// As [`Self::client_config`].
    pub fn quic_server_config(&self, alpn: &[&[u8]]) -> Result<quinn::ServerConfig, IdentityError> {
        let tls = self.server_config(alpn, ClientAuth::Required)?;
        let crypto = QuicServerConfig::try_from(tls).map_err(no_suite)?;
        Ok(quinn::ServerConfig::with_crypto(Arc::new(crypto)))
    }

    fn held<T>(&self, of: impl FnOnce(&Held) -> T) -> T {
        of(&self.0.held.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({})", self.0.identity)
    }
}

/// TLS 1.3 client of a party that has no certificate yet; it trusts `authority` only.
///
/// # Errors
/// As [`Credentials::client_config`].
pub fn joining_client_config(
    authority: &CertificateDer<'static>,
    alpn: &[&[u8]],
) -> Result<Arc<rustls::ClientConfig>, IdentityError> {
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots(authority)?)
        .with_no_client_auth();
    finish_client(&mut config, alpn);
    Ok(Arc::new(config))
}

impl Held {
    fn check(chain: &Chain, key: &KeyPair, authority: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let [leaf, last] = chain.0.as_slice() else {
            return Err(IdentityError::Certificate(format!(
                "{} certificates in the chain, not 2",
                chain.0.len()
            )));
        };
        if last != authority {
            return Err(IdentityError::Certificate("it is of another authority".to_owned()));
        }
        let parsed = Parsed::of(leaf)?;
        if parsed.public_key != key.0.der_bytes() {
            return Err(IdentityError::Key("it is not that of the certificate".to_owned()));
        }
        if parsed.not_after <= SystemTime::now() {
            return Err(IdentityError::Certificate("it has ended".to_owned()));
        }
        check_signature(leaf, authority)?;
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.0.serialize_der()));
        let signer = sign::any_ecdsa_type(&der)?;
        let certified = Arc::new(CertifiedKey::new(vec![leaf.clone()], signer));
        Ok(Self { certified, not_before: parsed.not_before, not_after: parsed.not_after })
    }
}

fn check_signature(leaf: &CertificateDer<'_>, authority: &CertificateDer<'_>) -> Result<(), IdentityError> {
    let read = |der| {
        x509_parser::parse_x509_certificate(der)
            .map(|(_, parsed)| parsed)
            .map_err(|error| IdentityError::Certificate(error.to_string()))
    };
    let (leaf, authority) = (read(leaf)?, read(authority)?);
    leaf.verify_signature(Some(authority.public_key()))
        .map_err(|_| IdentityError::Certificate("its authority did not sign it".to_owned()))
}

/// Shows whatever certificate is held at the moment.
#[derive(Debug)]
struct Resolver(Credentials);

impl ResolvesServerCert for Resolver {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.held(|held| held.certified.clone()))
    }
}

impl ResolvesClientCert for Resolver {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.held(|held| held.certified.clone()))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// aws-lc-rs with the suites of TLS 1.3; AES-128-GCM first: QUIC needs it, and CPUs with AES do it fastest.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..default_provider()
    })
}

fn roots(authority: &CertificateDer<'static>) -> Result<RootCertStore, IdentityError> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone())?;
    Ok(roots)
}

fn finish_client(config: &mut rustls::ClientConfig, alpn: &[&[u8]]) {
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    config.resumption = Resumption::disabled();
}

fn no_suite(_: quinn::crypto::rustls::NoInitialCipherSuite) -> IdentityError {
    IdentityError::Tls(rustls::Error::General("no AES-128-GCM".to_owned()))
}
