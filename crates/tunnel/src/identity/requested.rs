//! Who a certificate request asks to be.

use rcgen::{CertificateSigningRequestParams, SanType};
use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::PemObject as _;

use super::{Identity, IdentityError};

/// The identity whose URI stands in a request (PKCS#10, PEM). It is a wish: what of it to believe is the signer's
/// decision. The request's signature by its own key is checked.
///
/// # Errors
/// [`IdentityError::Request`] unless it can be read and has exactly one URI, [`IdentityError::Uri`] if that is no party.
pub fn requested(csr_pem: &[u8]) -> Result<Identity, IdentityError> {
    let request_error = |error: &dyn std::fmt::Display| IdentityError::Request(error.to_string());
    let der = CertificateSigningRequestDer::from_pem_slice(csr_pem).map_err(|error| request_error(&error))?;
    let request = CertificateSigningRequestParams::from_der(&der).map_err(|error| request_error(&error))?;
    let mut uris = request.params.subject_alt_names.iter().filter_map(|name| match name {
        SanType::URI(uri) => Some(uri.as_str()),
        _ => None,
    });
    match (uris.next(), uris.next()) {
        (Some(uri), None) => Identity::parse(uri),
        (None, _) => Err(IdentityError::Request("it has no URI".to_owned())),
        (Some(_), Some(_)) => Err(IdentityError::Request("it has more than one URI".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::super::KeyPair;
    use super::*;

    #[test]
    fn a_request_says_who_it_asks_to_be() {
        let wish = Identity::Laptop { id: "l1".to_owned(), user: "alice".to_owned(), groups: Vec::new() };
        let request = KeyPair::generate().unwrap().request(&wish).unwrap();
        assert_eq!(requested(request.pem.as_bytes()).unwrap(), wish);
        assert!(requested(b"").is_err());
        assert!(
            requested(b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n")
                .is_err()
        );
    }
}
