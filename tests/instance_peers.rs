//! Messages between instances, over real TCP and TLS on loopback addresses.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that can't go on should say so and stop"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use domicile::instance::peers::{LIMIT, PeerEvent, Peers, PeersConfig};
use domicile::instance::tls::Certificate;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};

const PORT: u16 = 18109;
const PATIENCE: Duration = Duration::from_secs(20);
const DETECTION: Duration = Duration::from_secs(1);

struct Authority {
    cert: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params
            .distinguished_name
            .push(DnType::CommonName, "test authority");
        let cert = params.self_signed(&key).unwrap().pem();
        Self {
            cert,
            issuer: Issuer::new(params, key),
        }
    }

    fn issue(&self, name: &str) -> Certificate {
        self.issue_as(name, &[name, "s-rw", "s-ro"], false)
    }

    fn issue_as(&self, common_name: &str, names: &[&str], expired: bool) -> Certificate {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, common_name);
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        if expired {
            params.not_before = rcgen::date_time_ymd(2020, 1, 1);
            params.not_after = rcgen::date_time_ymd(2020, 2, 1);
        }
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ca.crt"), &self.cert).unwrap();
        std::fs::write(dir.path().join("tls.crt"), cert.pem()).unwrap();
        std::fs::write(dir.path().join("tls.key"), key.serialize_pem()).unwrap();
        Certificate::read(dir.path()).unwrap().unwrap()
    }

    /// A client of the test's own, with the key of a certificate that it makes for this name.
    fn client(&self, name: &str) -> Arc<rustls::ClientConfig> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(self.cert.as_bytes()).unwrap())
            .unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(
                vec![cert.der().clone()],
                PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        config.alpn_protocols = vec![b"domicile-peers/1".to_vec()];
        Arc::new(config)
    }
}

/// Addresses of its own for each test.
struct Net(u8);

impl Net {
    fn new() -> Self {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }

    fn at(&self, host: u8) -> SocketAddr {
        let process = 64 + u8::try_from(std::process::id() % 128).unwrap();
        (Ipv4Addr::new(127, process, self.0, host), PORT).into()
    }
}

struct Node {
    peers: Peers,
    events: mpsc::Receiver<PeerEvent>,
    certificate: watch::Sender<Option<Certificate>>,
}

impl Node {
    fn start(name: &str, at: SocketAddr, certificate: Option<Certificate>) -> Self {
        Self::start_with(name, at, certificate, 256)
    }

    fn start_with(
        name: &str,
        at: SocketAddr,
        certificate: Option<Certificate>,
        room: usize,
    ) -> Self {
        let (certificate, receiver) = watch::channel(certificate);
        let (sender, events) = mpsc::channel(room);
        let config = PeersConfig {
            store: "s".into(),
            me: name.into(),
            listen: at,
            advertise: at,
            detection: DETECTION,
        };
        Self {
            peers: Peers::start(config, receiver, sender).unwrap(),
            events,
            certificate,
        }
    }

    fn knows(&self, peers: &[(&str, SocketAddr)]) {
        let mut all = BTreeMap::<String, BTreeSet<SocketAddr>>::new();
        for (name, at) in peers {
            all.entry((*name).to_owned()).or_default().insert(*at);
        }
        self.peers.set_peers(all);
    }

    async fn event(&mut self) -> PeerEvent {
        tokio::time::timeout(PATIENCE, self.events.recv())
            .await
            .expect("an event in time")
            .unwrap()
    }

    async fn until_up(&mut self, peer: &str) {
        let up = PeerEvent::Up { name: peer.into() };
        while self.event().await != up {}
    }

    /// The next message, whatever else happens before.
    async fn message(&mut self) -> (String, Vec<u8>) {
        loop {
            if let PeerEvent::Message { from, body } = self.event().await {
                return (from, body);
            }
        }
    }

    async fn until_down(&mut self, peer: &str) -> String {
        loop {
            if let PeerEvent::Down { name, why } = self.event().await
                && name == peer
            {
                return why;
            }
        }
    }

    /// All that happens within this time.
    async fn during(&mut self, time: Duration) -> Vec<PeerEvent> {
        let until = tokio::time::Instant::now() + time;
        let mut all = Vec::new();
        while let Ok(Some(event)) = tokio::time::timeout_at(until, self.events.recv()).await {
            all.push(event);
        }
        all
    }
}

/// Two that know each other and are connected.
async fn pair(net: &Net, authority: &Authority) -> (Node, Node) {
    let mut a = Node::start("s-1", net.at(1), Some(authority.issue("s-1")));
    let mut b = Node::start("s-2", net.at(2), Some(authority.issue("s-2")));
    a.knows(&[("s-2", net.at(2))]);
    b.knows(&[("s-1", net.at(1))]);
    a.until_up("s-2").await;
    b.until_up("s-1").await;
    (a, b)
}

fn downs(events: &[PeerEvent]) -> usize {
    let down = |e: &&PeerEvent| matches!(e, PeerEvent::Down { .. });
    events.iter().filter(down).count()
}

fn message(from: &str, body: &[u8]) -> PeerEvent {
    PeerEvent::Message {
        from: from.into(),
        body: body.into(),
    }
}

#[tokio::test]
async fn messages_arrive_under_the_senders_certified_name() {
    let (net, authority) = (Net::new(), Authority::new());
    let (mut a, mut b) = pair(&net, &authority).await;
    assert!(a.peers.send("s-2", b"one"));
    assert!(a.peers.send("s-2", b""));
    assert!(b.peers.send("s-1", &vec![7; LIMIT]));
    assert!(!a.peers.send("s-2", &vec![7; LIMIT + 1]), "too long");
    assert!(!a.peers.send("s-3", b"nobody"));
    assert!(!a.peers.send("s-1", b"itself"));
    assert_eq!(b.message().await, ("s-1".into(), b"one".to_vec()));
    assert_eq!(b.message().await, ("s-1".into(), Vec::new()));
    assert_eq!(a.message().await, ("s-2".into(), vec![7; LIMIT]));
    // The ports are free again after a shutdown, and at once.
    a.peers.shutdown().await;
    TcpListener::bind(net.at(1)).await.unwrap();
}

#[tokio::test]
async fn without_a_certificate_it_waits() {
    let (net, authority) = (Net::new(), Authority::new());
    let mut a = Node::start("s-1", net.at(1), None);
    let mut b = Node::start("s-2", net.at(2), Some(authority.issue("s-2")));
    a.knows(&[("s-2", net.at(2))]);
    b.knows(&[("s-1", net.at(1))]);
    assert_eq!(a.during(Duration::from_millis(600)).await, []);
    assert_eq!(
        b.during(Duration::from_millis(1)).await,
        [],
        "silence is no sign"
    );
    a.certificate.send_replace(Some(authority.issue("s-1")));
    a.until_up("s-2").await;
    b.until_up("s-1").await;
}

#[tokio::test]
async fn only_the_stores_own_instances_are_let_in() {
    let (net, authority, foreign) = (Net::new(), Authority::new(), Authority::new());
    let strangers = [
        ("of another authority", foreign.issue("s-2")),
        ("expired", authority.issue_as("s-2", &["s-2"], true)),
        ("of another name", authority.issue("s-3")),
        ("of another store", authority.issue("other-2")),
        (
            "of no instance",
            authority.issue_as("s-rw", &["s-rw"], false),
        ),
        (
            "of two instances",
            authority.issue_as("s-2", &["s-2", "s-3"], false),
        ),
        ("with two names", authority.issue_as("s-3", &["s-2"], false)),
        ("of the acceptor itself", authority.issue("s-1")),
    ];
    for (what, certificate) in strangers {
        let mut a = Node::start("s-1", net.at(1), Some(authority.issue("s-1")));
        // It takes itself for s-2, and listens where a expects s-2.
        let mut b = Node::start("s-2", net.at(2), Some(certificate));
        a.knows(&[("s-2", net.at(2))]);
        b.knows(&[("s-1", net.at(1))]);
        a.peers.send("s-2", b"secret");
        b.peers.send("s-1", b"forged");
        let (of_a, of_b) = tokio::join!(
            a.during(Duration::from_millis(700)),
            b.during(Duration::from_millis(700))
        );
        match what {
            // Both are who they say they are; only it isn't the one that a meant.
            "of another name" => {
                // a has learned of it, and dials it as what it is.
                let up = PeerEvent::Up { name: "s-3".into() };
                assert!(of_a.len() == 2 && of_a.contains(&up), "{what}: {of_a:?}");
                assert!(of_a.contains(&message("s-3", b"forged")), "{what}");
                assert_eq!(of_b, [PeerEvent::Up { name: "s-1".into() }], "{what}");
            }
            // Its name can be verified when it's dialled; it's refused when it dials.
            "of two instances" | "with two names" => {
                assert_eq!(of_a, [PeerEvent::Up { name: "s-2".into() }], "{what}");
                assert_eq!(of_b, [message("s-1", b"secret")], "{what}");
            }
            _ => {
                assert_eq!(of_a, [], "{what}");
                assert_eq!(of_b, [], "{what}");
            }
        }
        a.peers.shutdown().await;
        b.peers.shutdown().await;
    }
}

#[tokio::test]
async fn an_end_is_seen_at_once_and_told_once_a_second_while_it_lasts() {
    let (net, authority) = (Net::new(), Authority::new());
    let (mut a, b) = pair(&net, &authority).await;
    let begun = Instant::now();
    b.peers.shutdown().await;
    let why = a.until_down("s-2").await;
    let took = begun.elapsed();
    println!("seen after {took:?}: {why}");
    assert!(took < Duration::from_millis(300));
    let more = a.during(Duration::from_millis(3500)).await;
    println!("{more:?}");
    assert!((1..=3).contains(&downs(&more)) && more.len() == downs(&more));
    // It comes back at the same place.
    let mut b = Node::start("s-2", net.at(2), Some(authority.issue("s-2")));
    b.knows(&[("s-1", net.at(1))]);
    a.until_up("s-2").await;
    b.until_up("s-1").await;
    a.peers.send("s-2", b"again");
    assert_eq!(b.message().await, ("s-1".into(), b"again".to_vec()));
}

/// A listener of the test's own that stands in for a peer, and counts who comes.
async fn forward(from: SocketAddr, to: SocketAddr) -> tokio::task::JoinHandle<()> {
    let listener = TcpListener::bind(from).await.unwrap();
    tokio::spawn(async move {
        let mut links = tokio::task::JoinSet::new();
        while let Ok((mut near, _)) = listener.accept().await {
            links.spawn(async move {
                let mut far = TcpStream::connect(to).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
            });
        }
    })
}

#[tokio::test]
async fn an_end_is_no_death_if_the_next_dial_succeeds() {
    let (net, authority) = (Net::new(), Authority::new());
    let mut a = Node::start("s-1", net.at(1), Some(authority.issue("s-1")));
    let mut b = Node::start("s-2", net.at(2), Some(authority.issue("s-2")));
    let link = forward(net.at(9), net.at(2)).await;
    a.knows(&[("s-2", net.at(9))]);
    a.until_up("s-2").await;
    // All its connections end, and at once there is another.
    link.abort();
    let _ = link.await;
    let link = forward(net.at(9), net.at(2)).await;
    let events = a.during(Duration::from_millis(800)).await;
    assert_eq!(events, [], "neither down nor up");
    a.peers.send("s-2", b"still");
    assert_eq!(b.message().await, ("s-1".into(), b"still".to_vec()));
    link.abort();
}

#[tokio::test]
async fn refusal_is_death_and_silence_is_not() {
    let (net, authority) = (Net::new(), Authority::new());
    let mut a = Node::start("s-1", net.at(1), Some(authority.issue("s-1")));
    // Accepts by its kernel alone, as a frozen process does.
    let frozen = TcpListener::bind(net.at(2)).await.unwrap();
    a.knows(&[("s-2", net.at(2)), ("s-3", net.at(3))]);
    let events = a.during(Duration::from_millis(2500)).await;
    println!("{events:?}");
    assert!(
        events
            .iter()
            .all(|e| matches!(e, PeerEvent::Down { name, .. } if name == "s-3"))
    );
    assert!((2..=3).contains(&events.len()));
    // A connection that ended, and then no handshake.
    drop(frozen);
    a.until_down("s-2").await;
    let mut b = Node::start("s-2", net.at(2), Some(authority.issue("s-2")));
    a.until_up("s-2").await;
    drop(b.during(Duration::from_millis(1)).await);
    b.peers.shutdown().await;
    let frozen = TcpListener::bind(net.at(2)).await.unwrap();
    println!("{}", a.until_down("s-2").await);
    drop(frozen);
}

#[tokio::test]
async fn a_new_certificate_makes_new_connections_without_an_interruption() {
    let (net, authority) = (Net::new(), Authority::new());
    let (mut a, mut b) = pair(&net, &authority).await;
    // Both, one after the other, to another authority: as its Secrets reach the pods.
    let next = Authority::new();
    let mut events = Vec::new();
    for round in 0..20u8 {
        if round == 4 {
            a.certificate.send_replace(Some(next.issue("s-1")));
        }
        if round == 10 {
            b.certificate.send_replace(Some(next.issue("s-2")));
        }
        a.peers.send("s-2", &[round]);
        b.peers.send("s-1", &[round]);
        events.extend(a.during(Duration::from_millis(50)).await);
        events.extend(b.during(Duration::from_millis(50)).await);
    }
    events.extend(a.during(Duration::from_millis(3000)).await);
    events.extend(b.during(Duration::from_millis(10)).await);
    for round in 0..20u8 {
        for from in ["s-1", "s-2"] {
            let said = message(from, &[round]);
            assert_eq!(
                events.iter().filter(|e| **e == said).count(),
                1,
                "{round} of {from}"
            );
        }
    }
    assert_eq!(events.len(), 40, "neither up nor down: {events:?}");
    // New connections are under the new authority only, and so, by now, are those that stood.
    assert!(
        hello(&authority.client("s-3"), net.at(1), "s-1")
            .await
            .is_err()
    );
    assert!(hello(&next.client("s-3"), net.at(1), "s-1").await.is_ok());
    let port = format!("{PORT:04X}");
    let of = |host: u8| {
        let sockets = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let SocketAddr::V4(at) = net.at(host) else {
            panic!("IPv4")
        };
        let ip = u32::from_ne_bytes(at.ip().octets());
        let local = format!(" {ip:08X}:{port} ");
        sockets
            .lines()
            .filter(|l| l.contains(&local) && l.contains(" 01 "))
            .count()
    };
    // Both ends of one connection each way.
    let deadline = Instant::now() + PATIENCE;
    while (of(1), of(2)) != (2, 2) {
        assert!(Instant::now() < deadline, "{} and {} ends", of(1), of(2));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Dials as a client of the test's own, and says a hello.
async fn hello(
    client: &Arc<rustls::ClientConfig>,
    at: SocketAddr,
    name: &str,
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let stream = TcpStream::connect(at).await?;
    let server = ServerName::try_from(name.to_owned()).unwrap();
    let mut stream = tokio_rustls::TlsConnector::from(client.clone())
        .connect(server, stream)
        .await?;
    let body = br#"{"address":"127.0.0.1:9"}"#;
    stream.write_u32(u32::try_from(body.len()).unwrap()).await?;
    stream.write_all(body).await?;
    stream.flush().await?;
    let length = tokio::time::timeout(PATIENCE, stream.read_u32()).await??;
    let mut answer = vec![0; usize::try_from(length).unwrap()];
    stream.read_exact(&mut answer).await?;
    Ok(stream)
}

#[tokio::test]
async fn a_new_address_is_learned_from_the_peer_itself() {
    let (net, authority) = (Net::new(), Authority::new());
    let mut a = Node::start("s-1", net.at(1), Some(authority.issue("s-1")));
    // Nobody tells a of s-2 at all.
    let mut b = Node::start("s-2", net.at(2), Some(authority.issue("s-2")));
    b.knows(&[("s-1", net.at(1))]);
    b.until_up("s-1").await;
    a.until_up("s-2").await;
    // The pod is killed, and back elsewhere; the old address is given to something that never answers.
    b.peers.shutdown().await;
    let silent = TcpListener::bind(net.at(2)).await.unwrap();
    a.until_down("s-2").await;
    let mut b = Node::start("s-2", net.at(3), Some(authority.issue("s-2")));
    b.knows(&[("s-1", net.at(1))]);
    let begun = Instant::now();
    a.until_up("s-2").await;
    println!("found again after {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(1));
    a.peers.send("s-2", b"found");
    assert_eq!(b.message().await, ("s-1".into(), b"found".to_vec()));
    drop(silent);

    // Its predecessor comes back as well: what is said goes to the one heard last, and nothing is interrupted.
    let c = Node::start("s-2", net.at(4), Some(authority.issue("s-2")));
    c.knows(&[("s-1", net.at(1))]);
    let mut c = c;
    c.until_up("s-1").await;
    let deadline = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < deadline);
        a.peers.send("s-2", b"to the latest");
        let got = c.during(Duration::from_millis(50)).await;
        if got.contains(&message("s-1", b"to the latest")) {
            break;
        }
    }
    assert_eq!(a.during(Duration::from_millis(300)).await, []);
}

#[tokio::test]
async fn a_frame_that_is_too_long_ends_its_connection_only() {
    let (net, authority) = (Net::new(), Authority::new());
    let (mut a, b) = pair(&net, &authority).await;
    let client = authority.client("s-3");
    let mut stream = hello(&client, net.at(1), "s-1").await.unwrap();
    stream
        .write_u32(u32::try_from(LIMIT + 1).unwrap())
        .await
        .unwrap();
    stream.flush().await.unwrap();
    let end = tokio::time::timeout(PATIENCE, stream.read_u8())
        .await
        .unwrap();
    assert!(end.is_err(), "closed");
    b.peers.send("s-1", b"unharmed");
    assert_eq!(a.message().await, ("s-2".into(), b"unharmed".to_vec()));
}

#[tokio::test]
async fn strangers_that_hang_keep_nobody_out() {
    let (net, authority) = (Net::new(), Authority::new());
    let mut a = Node::start("s-1", net.at(1), Some(authority.issue("s-1")));
    let mut strangers = Vec::new();
    for _ in 0..100 {
        strangers.push(TcpStream::connect(net.at(1)).await.unwrap());
    }
    let begun = Instant::now();
    let mut b = Node::start("s-2", net.at(2), Some(authority.issue("s-2")));
    b.knows(&[("s-1", net.at(1))]);
    b.until_up("s-1").await;
    println!("let in after {:?}", begun.elapsed());
    a.until_up("s-2").await;
    // All of them are dropped in time.
    for mut stranger in strangers {
        let end = tokio::time::timeout(Duration::from_secs(4), stranger.read_u8()).await;
        assert!(end.unwrap().is_err());
    }
}

fn rss_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_peer_that_never_reads_harms_nobody() {
    let (net, authority) = (Net::new(), Authority::new());
    // b's reader takes nothing, so that its connections fill up.
    let b = Node::start_with("s-2", net.at(2), Some(authority.issue("s-2")), 1);
    let mut c = Node::start("s-3", net.at(3), Some(authority.issue("s-3")));
    let mut a = Node::start("s-1", net.at(1), Some(authority.issue("s-1")));
    a.knows(&[("s-2", net.at(2)), ("s-3", net.at(3))]);
    a.until_up("s-3").await;
    c.until_up("s-1").await;
    let before = rss_kib();
    let body = vec![1; LIMIT];
    let mut longest = Duration::ZERO;
    for round in 0..300u32 {
        let begun = Instant::now();
        for _ in 0..10 {
            a.peers.send("s-2", &body);
        }
        longest = longest.max(begun.elapsed());
        a.peers.send("s-3", &round.to_be_bytes());
        assert_eq!(c.message().await.1, round.to_be_bytes());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let grown = rss_kib().saturating_sub(before);
    println!("190 MiB sent in vain: {grown} KiB more, ten sends take at most {longest:?}");
    assert!(grown < 64 << 10);
    assert_eq!(downs(&a.during(Duration::from_millis(50)).await), 0);
    drop(b);
}

#[tokio::test]
async fn a_flood_is_bounded_and_others_are_heard() {
    let (net, authority) = (Net::new(), Authority::new());
    let mut a = Node::start_with("s-1", net.at(1), Some(authority.issue("s-1")), 16);
    let mut b = Node::start("s-2", net.at(2), Some(authority.issue("s-2")));
    b.knows(&[("s-1", net.at(1))]);
    b.until_up("s-1").await;
    let client = authority.client("s-3");
    let mut flood = hello(&client, net.at(1), "s-1").await.unwrap();
    let flooding = tokio::spawn(async move {
        let mut frame = 60_000u32.to_be_bytes().to_vec();
        frame.extend(vec![0; 60_000]);
        let mut sent = 0u64;
        while flood.write_all(&frame).await.is_ok() {
            sent += 1;
            if sent.is_multiple_of(64) {
                tokio::task::yield_now().await;
            }
        }
    });
    // Nobody takes the events for a while.
    let before = rss_kib();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let grown = rss_kib().saturating_sub(before);
    println!("{grown} KiB more while nobody takes the flood");
    assert!(grown < 32 << 10);
    // The slow reader gets s-2's message among the first of those that come then.
    b.peers.send("s-1", b"heard");
    let heard = message("s-2", b"heard");
    let mut taken = 0;
    loop {
        let event = a.event().await;
        taken += 1;
        if event == heard {
            break;
        }
        assert!(taken < 1000, "others are heard");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    println!("heard after {taken} events");
    flooding.abort();
}

/// What it costs: run by hand, `cargo test --release --test instance_peers -- --ignored --nocapture idle`.
#[tokio::test]
#[ignore = "a measurement of half a minute"]
async fn idle_cost() {
    let (net, authority) = (Net::new(), Authority::new());
    let names = ["s-1", "s-2", "s-3"];
    let mut nodes: Vec<Node> = (1u8..=3)
        .zip(names)
        .map(|(n, name)| Node::start(name, net.at(n), Some(authority.issue(name))))
        .collect();
    for node in &nodes {
        node.knows(&[("s-1", net.at(1)), ("s-2", net.at(2)), ("s-3", net.at(3))]);
    }
    for node in &mut nodes {
        drop(node.during(Duration::from_millis(300)).await);
    }
    let cpu = || {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        let fields: Vec<&str> = stat
            .rsplit_once(')')
            .unwrap()
            .1
            .split_whitespace()
            .collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        Duration::from_millis(ticks * 10)
    };
    let (begun, before) = (Instant::now(), cpu());
    let mut got = 0;
    let body = vec![b'x'; 300];
    for _ in 0..120 {
        for node in &nodes {
            for name in names {
                node.peers.send(name, &body);
            }
        }
        for node in &mut nodes {
            got += node.during(Duration::from_millis(80)).await.len();
        }
    }
    let (elapsed, used) = (begun.elapsed(), cpu() - before);
    println!(
        "three instances, {got} messages in {elapsed:?}: {used:?} of CPU, {:.3} % of a core each",
        used.as_secs_f64() / elapsed.as_secs_f64() / 3.0 * 100.0
    );
}
