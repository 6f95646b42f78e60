use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::*;

fn laptop(id: &str, user: &str, groups: &[&str]) -> Identity {
    Identity::Laptop {
        id: id.to_owned(),
        user: user.to_owned(),
        groups: groups.iter().map(|&group| group.to_owned()).collect(),
    }
}

fn agent(uid: &str, role: AgentRole) -> Identity {
    Identity::Agent { pod_uid: uid.to_owned(), namespace: "shop".to_owned(), pod: "cart-1".to_owned(), role }
}

const HOUR: Duration = Duration::from_secs(3600);

fn credentials(authority: &Authority, identity: &Identity) -> Credentials {
    let key = KeyPair::generate().unwrap();
    let chain = authority.sign(&key.request(identity).unwrap().der, identity, HOUR).unwrap();
    Credentials::new(chain, &key).unwrap()
}

#[test]
fn every_identity_survives_its_uri() {
    let strange =
        ["a", "x y", "a/b?c=d&e#f", "%41", "ünïcödé ☃", "system:serviceaccount:a:b", "+", "..", "\u{0}\n"];
    for id in strange {
        for user in strange {
            let identity = laptop(id, user, &[user, "", id, "dev"]);
            assert_eq!(Identity::parse(&identity.uri()).unwrap(), identity);
            assert!(identity.uri().is_ascii());
        }
        for role in [AgentRole::Pod, AgentRole::Env, AgentRole::Gateway] {
            let identity = agent(id, role);
            assert_eq!(Identity::parse(&identity.uri()).unwrap(), identity);
        }
        let relay = Identity::Relay { name: id.to_owned() };
        assert_eq!(Identity::parse(&relay.uri()).unwrap(), relay);
    }
    assert_eq!(Identity::parse("forkd://controller/forkd").unwrap(), Identity::Controller);
}

#[test]
fn every_byte_survives_percent_encoding() {
    for text in (0..=0x2ff).filter_map(char::from_u32).map(|c| format!("a{c}%{c}")) {
        let mut encoded = String::new();
        percent_encode(&text, &mut encoded);
        assert_eq!(percent_decode(&encoded).as_deref(), Some(text.as_str()));
    }
    for broken in ["%", "%4", "%zz", "a%+1", "%ff", "%-1", "%é"] {
        assert_eq!(percent_decode(broken), None, "{broken}");
    }
}

#[test]
fn a_user_cannot_smuggle_a_second_user_or_group_into_the_uri() {
    let identity = laptop("l1", "eve&group=system:masters", &[]);
    let Identity::Laptop { user, groups, .. } = Identity::parse(&identity.uri()).unwrap() else { panic!() };
    assert_eq!((user.as_str(), groups.len()), ("eve&group=system:masters", 0));
}

#[test]
fn uris_that_name_nobody_are_refused() {
    for uri in [
        "",
        "forkd://",
        "forkd://laptop",
        "forkd://laptop/",
        "forkd://laptop/a",
        "forkd://laptop/a?user=",
        "forkd://laptop/a?user=x&user=y",
        "forkd://laptop/a?user",
        "forkd://laptop/%?user=x",
        "forkd://agent/u?namespace=n&pod=p",
        "forkd://agent/u?namespace=n&pod=p&role=root",
        "forkd://agent/u?namespace=n&pod=p&role=env",
        "forkd://agent/u.env?namespace=n&pod=p&role=pod",
        "forkd://agent/.env?namespace=n&pod=p&role=env",
        "forkd://controller/other",
        "forkd://king/forkd",
        "https://laptop/a?user=x",
    ] {
        assert!(Identity::parse(uri).is_err(), "{uri}");
    }
}

#[test]
fn unknown_query_keys_of_later_versions_are_skipped() {
    let parsed = Identity::parse("forkd://agent/u?role=pod&later=1&namespace=shop&pod=cart-1").unwrap();
    assert_eq!(parsed, agent("u", AgentRole::Pod));
}

#[test]
fn dns_names_are_always_labels_and_never_meet() {
    let ids =
        ["abc", "A", "x-0011223344556677", "a.b", "-a", "a_b", "", &"a".repeat(64), &"a".repeat(63), "é"];
    let mut seen = std::collections::HashSet::new();
    for id in ids {
        let name = laptop(id, "u", &[]).dns_name();
        assert!(name.ends_with(".laptop.forkd.internal"));
        assert!(rustls::pki_types::DnsName::try_from(name.as_str()).is_ok(), "{name}");
        assert!(seen.insert(name));
    }
    assert_eq!(agent("0b7e", AgentRole::Pod).dns_name(), "0b7e.agent.forkd.internal");
    assert_ne!(agent("0b7e", AgentRole::Pod).peer_id(), agent("0b7e", AgentRole::Env).peer_id());
}

#[test]
fn a_signed_certificate_says_what_the_authority_decided() {
    let authority = Authority::create().unwrap();
    let key = KeyPair::generate().unwrap();
    let wanted = laptop("mine", "root", &["system:masters"]);
    let given = laptop("l1", "alice", &["dev"]);
    let chain = authority.sign(key.request(&wanted).unwrap().pem.as_bytes(), &given, HOUR).unwrap();
    let credentials = Credentials::new(chain.clone(), &key).unwrap();
    assert_eq!(credentials.identity(), &given);
    let now = SystemTime::now();
    assert!(credentials.expires_at() <= now + HOUR && credentials.expires_at() > now + HOUR * 9 / 10);
    assert!(credentials.renew_at() > now + HOUR / 2 && credentials.renew_at() < now + HOUR * 7 / 10);
    assert_eq!(Chain::from_pem(&chain.to_pem()).unwrap(), chain);
    assert_eq!(Chain::from_der(chain.to_der()), chain);
}

#[test]
fn a_request_that_its_key_did_not_sign_is_refused() {
    let authority = Authority::create().unwrap();
    let identity = agent("u", AgentRole::Pod);
    let mut csr = KeyPair::generate().unwrap().request(&identity).unwrap().der;
    for garbage in [&b""[..], b"-----BEGIN", b"hello", &csr[..csr.len() - 1]] {
        assert!(authority.sign(garbage, &identity, HOUR).is_err());
    }
    let at = csr.len() - 3;
    csr[at] ^= 1;
    assert!(matches!(authority.sign(&csr, &identity, HOUR), Err(IdentityError::Request(_))));
}

#[test]
fn an_authority_is_the_same_after_saving_and_loading() {
    let authority = Authority::create().unwrap();
    let loaded = Authority::load(&authority.certificate_pem(), &authority.key_pem()).unwrap();
    assert_eq!(loaded.certificate(), authority.certificate());
    let key = KeyPair::generate().unwrap();
    let identity = agent("u", AgentRole::Gateway);
    let chain = loaded.sign(&key.request(&identity).unwrap().der, &identity, HOUR).unwrap();
    assert_eq!(chain.authority(), Some(authority.certificate()));
    let other = Authority::create().unwrap();
    assert!(matches!(
        Authority::load(&other.certificate_pem(), &authority.key_pem()),
        Err(IdentityError::Key(_))
    ));
    assert!(Authority::load("", "").is_err());
    assert!(Authority::load(&Chain(vec![chain.0[0].clone()]).to_pem(), &key.to_pem()).is_err(), "a leaf");
}

#[test]
fn no_certificate_outlives_its_authority() {
    let authority = Authority::create().unwrap();
    let key = KeyPair::generate().unwrap();
    let century = HOUR * 24 * 365 * 100;
    let chain =
        authority.sign(&key.request(&Identity::Controller).unwrap().der, &Identity::Controller, century);
    assert!(Credentials::new(chain.unwrap(), &key).unwrap().expires_at() <= authority.expires_at());
}

#[test]
fn only_a_renewal_of_the_same_party_replaces_credentials() {
    let authority = Authority::create().unwrap();
    let identity = agent("u", AgentRole::Pod);
    let held = credentials(&authority, &identity);
    let key = KeyPair::generate().unwrap();
    let sign =
        |by: &Authority, who: &Identity| by.sign(&key.request(who).unwrap().der, who, HOUR * 2).unwrap();
    let before = held.expires_at();
    assert!(held.replace(sign(&authority, &agent("v", AgentRole::Pod)), &key).is_err(), "another party");
    assert!(held.replace(sign(&Authority::create().unwrap(), &identity), &key).is_err(), "another authority");
    let mut forged = sign(&Authority::create().unwrap(), &identity);
    forged.0[1] = authority.certificate().clone();
    assert!(held.replace(forged, &key).is_err(), "not signed by the authority it names");
    let good = sign(&authority, &identity);
    assert!(held.replace(good.clone(), &KeyPair::generate().unwrap()).is_err(), "another key");
    assert_eq!(held.expires_at(), before);
    held.replace(good, &key).unwrap();
    assert!(held.expires_at() > before);
}

/// Runs a handshake in memory; the identity each side sees of the other.
fn handshake(
    client: Arc<rustls::ClientConfig>,
    server: Arc<rustls::ServerConfig>,
    name: &str,
) -> Result<(Identity, Result<Identity, IdentityError>), rustls::Error> {
    let name = rustls::pki_types::ServerName::try_from(name.to_owned()).unwrap();
    let mut client = rustls::ClientConnection::new(client, name)?;
    let mut server = rustls::ServerConnection::new(server)?;
    while client.is_handshaking() || server.is_handshaking() {
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        server.read_tls(&mut bytes.as_slice()).unwrap();
        server.process_new_packets()?;
        let mut bytes = Vec::new();
        server.write_tls(&mut bytes).unwrap();
        client.read_tls(&mut bytes.as_slice()).unwrap();
        client.process_new_packets()?;
    }
    Ok((
        identity_of_chain(client.peer_certificates()).unwrap(),
        identity_of_chain(server.peer_certificates()),
    ))
}

#[test]
fn two_parties_of_one_authority_know_each_other_and_others_stay_out() {
    let authority = Authority::create().unwrap();
    let (controller, agent) = (Identity::Controller, agent("u", AgentRole::Pod));
    let server = credentials(&authority, &controller);
    let client = credentials(&authority, &agent).client_config(&[b"x"]).unwrap();
    let required = server.server_config(&[b"x"], ClientAuth::Required).unwrap();
    let optional = server.server_config(&[b"x"], ClientAuth::Optional).unwrap();
    let name = controller.dns_name();

    let (seen_server, seen_client) = handshake(client.clone(), required.clone(), &name).unwrap();
    assert_eq!((seen_server, seen_client.unwrap()), (controller, agent.clone()));

    let joining = joining_client_config(authority.certificate(), &[b"x"]).unwrap();
    assert!(handshake(joining.clone(), required.clone(), &name).is_err());
    let (_, nobody) = handshake(joining, optional.clone(), &name).unwrap();
    assert!(matches!(nobody, Err(IdentityError::NoCertificate)));

    let stranger = credentials(&Authority::create().unwrap(), &agent).client_config(&[b"x"]).unwrap();
    assert!(handshake(stranger, optional, &name).is_err(), "the client trusts another authority");
    assert!(handshake(client, required.clone(), "other.relay.forkd.internal").is_err(), "wrong name");
    let other_alpn = credentials(&authority, &agent).client_config(&[b"y"]).unwrap();
    assert!(handshake(other_alpn, required, &name).is_err(), "no common version");
}
