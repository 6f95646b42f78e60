//! Keys, certificate requests, and the authority that signs them.

use std::fmt;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
    SerialNumber,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};

use super::{ANY_RELAY, Identity, IdentityError};

/// Life of a new authority. It outlives clusters; its key never leaves the Secret and the controller.
const AUTHORITY_LIFETIME: Duration = Duration::from_secs(10 * 365 * 86_400);
/// Certificates count from this long before they are signed: clocks of laptop and cluster differ by seconds.
const BACKDATED: Duration = Duration::from_secs(60);

/// An ECDSA P-256 key.
pub struct KeyPair(pub(super) rcgen::KeyPair);

impl KeyPair {
    /// A new key, from the system's random numbers.
    ///
    /// # Errors
    /// [`IdentityError::Key`] if the system has no randomness to give.
    pub fn generate() -> Result<Self, IdentityError> {
        rcgen::KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map(Self).map_err(key_error)
    }

    /// Reads a PKCS#8 PEM.
    ///
    /// # Errors
    /// [`IdentityError::Key`] if it is none, or not of P-256.
    pub fn from_pem(pem: &str) -> Result<Self, IdentityError> {
        rcgen::KeyPair::from_pkcs8_pem_and_sign_algo(pem, &PKCS_ECDSA_P256_SHA256)
            .map(Self)
            .map_err(key_error)
    }

    /// PKCS#8 PEM. Secret.
    pub fn to_pem(&self) -> String {
        self.0.serialize_pem()
    }

    /// A certificate request (PKCS#10, RFC 2986) with the identity's URI. What the certificate says in the end is the
    /// authority's decision.
    ///
    /// # Errors
    /// [`IdentityError::Request`] if it cannot be signed.
    pub fn request(&self, identity: &Identity) -> Result<Request, IdentityError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(identity);
        params.subject_alt_names = subject_names(identity).map_err(request_error)?;
        let csr = params.serialize_request(&self.0).map_err(request_error)?;
        Ok(Request { pem: csr.pem().map_err(request_error)?, der: csr.der().to_vec() })
    }
}

impl fmt::Debug for KeyPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyPair(secret)")
    }
}

/// A certificate request, in both forms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// For `spec.request` of a CertificateSigningRequest.
    pub pem: String,
    /// For the control channel.
    pub der: Vec<u8>,
}

/// Certificates, leaf first, authority last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain(pub Vec<CertificateDer<'static>>);

impl Chain {
    /// Reads concatenated PEM certificates.
    ///
    /// # Errors
    /// [`IdentityError::Certificate`] if there is none, or one cannot be read.
    pub fn from_pem(pem: &str) -> Result<Self, IdentityError> {
        let chain = CertificateDer::pem_slice_iter(pem.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| IdentityError::Certificate(error.to_string()))?;
        if chain.is_empty() {
            return Err(IdentityError::Certificate("there is none in the PEM".to_owned()));
        }
        Ok(Self(chain))
    }

    /// Takes DER certificates as they come in [`forkd_wire::control::Certificate::chain`].
    pub fn from_der(chain: Vec<Vec<u8>>) -> Self {
        Self(chain.into_iter().map(CertificateDer::from).collect())
    }

    /// For [`forkd_wire::control::Certificate::chain`].
    pub fn to_der(&self) -> Vec<Vec<u8>> {
        self.0.iter().map(|certificate| certificate.to_vec()).collect()
    }

    /// Concatenated PEM: for `status.certificate` of a CertificateSigningRequest.
    pub fn to_pem(&self) -> String {
        self.0.iter().map(|certificate| pem("CERTIFICATE", certificate)).collect()
    }

    /// The authority's certificate.
    pub fn authority(&self) -> Option<&CertificateDer<'static>> {
        self.0.last()
    }
}

/// The certificate authority of one cluster.
pub struct Authority {
    issuer: Issuer<'static, rcgen::KeyPair>,
    certificate: CertificateDer<'static>,
    not_after: SystemTime,
}

impl Authority {
    /// A new authority for ten years.
    ///
    /// # Errors
    /// [`IdentityError::Key`] if no key can be made or used.
    pub fn create() -> Result<Self, IdentityError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        let now = SystemTime::now();
        params.not_before = (now - BACKDATED).into();
        params.not_after = (now + AUTHORITY_LIFETIME).into();
        params.serial_number = Some(random_serial()?);
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "forkd");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let certificate = params.self_signed(&key.0).map_err(key_error)?.der().clone();
        Self::new(certificate, key)
    }

    /// Reads what [`Self::certificate_pem`] and [`Self::key_pem`] wrote.
    ///
    /// # Errors
    /// [`IdentityError::Certificate`], [`IdentityError::Key`] if either cannot be read, or they do not belong together.
    pub fn load(certificate_pem: &str, key_pem: &str) -> Result<Self, IdentityError> {
        let certificate = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
            .map_err(|error| IdentityError::Certificate(error.to_string()))?;
        Self::new(certificate, KeyPair::from_pem(key_pem)?)
    }

    fn new(certificate: CertificateDer<'static>, key: KeyPair) -> Result<Self, IdentityError> {
        let parsed = Parsed::of(&certificate)?;
        if parsed.public_key != key.0.der_bytes() {
            return Err(IdentityError::Key("it is not that of the authority's certificate".to_owned()));
        }
        if !parsed.is_authority {
            return Err(IdentityError::Certificate("it is no authority's".to_owned()));
        }
        let not_after = parsed.not_after;
        let issuer = Issuer::from_ca_cert_der(&certificate, key.0)
            .map_err(|error| IdentityError::Certificate(error.to_string()))?;
        Ok(Self { issuer, certificate, not_after })
    }

    /// The authority's certificate: what parties trust.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// [`Self::certificate`] as PEM.
    pub fn certificate_pem(&self) -> String {
        pem("CERTIFICATE", &self.certificate)
    }

    /// The authority's key, PKCS#8 PEM. Whoever has it is everybody.
    pub fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// When the authority's certificate ends.
    pub fn expires_at(&self) -> SystemTime {
        self.not_after
    }

    /// Signs a certificate for `identity` with the public key of `csr` (PKCS#10, DER or PEM), whose signature is
    /// checked first. Nothing else of the request counts. The certificate serves as client and as server, counts from a
    /// minute ago, and ends after `lifetime` or with the authority.
    ///
    /// # Errors
    /// [`IdentityError::Request`] if the request cannot be read, is not signed by its own key, or that is not of P-256.
    pub fn sign(&self, csr: &[u8], identity: &Identity, lifetime: Duration) -> Result<Chain, IdentityError> {
        let der = if csr.trim_ascii_start().starts_with(b"-----BEGIN") {
            CertificateSigningRequestDer::from_pem_slice(csr)
                .map_err(|error| IdentityError::Request(error.to_string()))?
        } else {
            CertificateSigningRequestDer::from(csr)
        };
        let request = CertificateSigningRequestParams::from_der(&der).map_err(request_error)?;
        if PublicKeyData::algorithm(&request.public_key) != &PKCS_ECDSA_P256_SHA256 {
            return Err(IdentityError::Request("its key is not of ECDSA P-256".to_owned()));
        }
        let now = SystemTime::now();
        let mut params = CertificateParams::default();
        params.not_before = (now - BACKDATED).into();
        params.not_after = (now + lifetime).min(self.not_after).into();
        params.serial_number = Some(random_serial()?);
        params.distinguished_name = common_name(identity);
        params.subject_alt_names = subject_names(identity).map_err(request_error)?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let leaf = params.signed_by(&request.public_key, &self.issuer).map_err(request_error)?;
        Ok(Chain(vec![leaf.der().clone(), self.certificate.clone()]))
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

/// What is needed of a certificate.
pub(super) struct Parsed {
    pub(super) public_key: Vec<u8>,
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
    pub(super) is_authority: bool,
}

impl Parsed {
    pub(super) fn of(certificate: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let (_, parsed) = x509_parser::parse_x509_certificate(certificate)
            .map_err(|error| IdentityError::Certificate(error.to_string()))?;
        let validity = parsed.validity();
        Ok(Self {
            public_key: parsed.public_key().subject_public_key.data.to_vec(),
            not_before: validity.not_before.to_datetime().into(),
            not_after: validity.not_after.to_datetime().into(),
            is_authority: parsed.is_ca(),
        })
    }
}

/// The URI says who it is; the DNS name is what TLS checks.
fn subject_names(identity: &Identity) -> Result<Vec<SanType>, rcgen::Error> {
    let mut names = vec![
        SanType::URI(identity.uri().as_str().try_into()?),
        SanType::DnsName(identity.dns_name().as_str().try_into()?),
    ];
    if let Identity::Relay { .. } = identity {
        names.push(SanType::DnsName(ANY_RELAY.try_into()?));
    }
    Ok(names)
}

/// For people who look at certificates; nothing reads it.
fn common_name(identity: &Identity) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    let kind = match identity {
        Identity::Laptop { .. } => "forkd laptop",
        Identity::Agent { .. } => "forkd agent",
        Identity::Relay { .. } => "forkd relay",
        Identity::Controller => "forkd controller",
    };
    name.push(DnType::CommonName, kind);
    name
}

/// 127 random bits: unguessable and unique (RFC 5280 §4.1.2.2), positive.
fn random_serial() -> Result<SerialNumber, IdentityError> {
    let mut bytes = [0; 16];
    rustls::crypto::aws_lc_rs::default_provider()
        .secure_random
        .fill(&mut bytes)
        .map_err(|_| IdentityError::Key("the system gives no random numbers".to_owned()))?;
    bytes[0] &= 0x7f;
    Ok(SerialNumber::from_slice(&bytes))
}

/// PEM (RFC 7468).
fn pem(label: &str, der: &[u8]) -> String {
    let lines = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new(label, der), lines)
}

fn key_error(error: rcgen::Error) -> IdentityError {
    IdentityError::Key(error.to_string())
}

fn request_error(error: rcgen::Error) -> IdentityError {
    IdentityError::Request(error.to_string())
}
