//! Three instances on a real PostgreSQL that fail over among themselves, without operator and API server.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that can't go on should say so and stop"
)]

mod instance_bed;

use std::time::{Duration, Instant};

use domicile::api::privacy_data_store::InstanceRole;
use instance_bed::*;

async fn bounded(test: impl Future<Output = ()>) {
    tokio::time::timeout(Duration::from_secs(240), test)
        .await
        .expect("the test ends in time");
}

/// A store of three, all streaming, all voting.
async fn three() -> (Bed, Vec<Option<Node>>) {
    let bed = Bed::new(3, "Required");
    let nodes: Vec<Option<Node>> = (1..=3).map(|n| Some(bed.start(n))).collect();
    for n in 1..=3 {
        bed.until_ready(n).await;
    }
    settled(&nodes, 2).await;
    (bed, nodes)
}

/// Until the primary's rule names so many, and nobody else says it is one. Its index.
async fn settled(nodes: &[Option<Node>], members: usize) -> usize {
    let mut leader = 0;
    until("one primary, and its rule whole", async || {
        let mut found = Vec::new();
        for (i, node) in nodes.iter().enumerate() {
            let Some(node) = node else { continue };
            if let Some(status) = node.status().await
                && status.role == InstanceRole::Primary
                && status.ready
            {
                let rule = status.synchronous.clone().unwrap_or_default();
                found.push((i, rule.members.len(), rule.in_force));
            }
        }
        match found[..] {
            [(i, count, true)] if count == members => {
                leader = i;
                true
            }
            _ => false,
        }
    })
    .await;
    leader
}

/// Writes a row every few milliseconds through whoever takes it, until told to stop; what was acknowledged, and the
/// longest time without.
fn writer(
    bed: &Bed,
) -> (
    tokio::sync::watch::Sender<bool>,
    tokio::task::JoinHandle<(Vec<i64>, Duration)>,
) {
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let hosts: Vec<(String, std::net::IpAddr)> = (1..=3)
        .map(|n| (format!("s-{n}"), bed.address(u8::try_from(n).unwrap())))
        .collect();
    let ca = std::fs::read(bed.path(1, "tls/ca.crt")).unwrap();
    let task = tokio::spawn(async move {
        let mut acknowledged = Vec::new();
        let mut gap = Duration::ZERO;
        let mut last = Instant::now();
        let mut key = 0_i64;
        let mut client: Option<tokio_postgres::Client> = None;
        while !*stopped.borrow() {
            if client.is_none() {
                for (name, address) in &hosts {
                    if let Some(found) = connect(name, *address, &ca).await {
                        client = Some(found);
                        break;
                    }
                }
            }
            let Some(session) = &client else {
                tokio::time::sleep(Duration::from_millis(5)).await;
                continue;
            };
            key += 1;
            let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 1] = [&key];
            let insert = session.execute("INSERT INTO t VALUES ($1)", &parameters);
            match tokio::time::timeout(Duration::from_secs(1), insert).await {
                Ok(Ok(1)) => {
                    acknowledged.push(key);
                    gap = gap.max(last.elapsed());
                    last = Instant::now();
                }
                _ => client = None,
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        (acknowledged, gap)
    });
    (stop, task)
}

async fn connect(
    name: &str,
    address: std::net::IpAddr,
    ca: &[u8],
) -> Option<tokio_postgres::Client> {
    use rustls::pki_types::pem::PemObject as _;
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(rustls::pki_types::CertificateDer::from_pem_slice(ca).unwrap())
        .unwrap();
    let tls = rustls::ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut config = tokio_postgres::Config::new();
    config
        .host(name)
        .hostaddr(address)
        .port(PORT)
        .user("app")
        .dbname("app")
        .password(PASSWORD)
        .ssl_mode(tokio_postgres::config::SslMode::Require)
        .target_session_attrs(tokio_postgres::config::TargetSessionAttrs::ReadWrite)
        .connect_timeout(Duration::from_millis(500));
    let connecting = config.connect(tokio_postgres_rustls::MakeRustlsConnect::new(tls));
    let (client, connection) = tokio::time::timeout(Duration::from_secs(1), connecting)
        .await
        .ok()?
        .ok()?;
    tokio::spawn(async move {
        let _ = connection.await;
    });
    Some(client)
}

/// Every acknowledged row is there, once.
async fn check(node: &Node, acknowledged: &[i64]) {
    let all = node
        .sql_in("app", "SELECT string_agg(v::text, ',' ORDER BY v) FROM t")
        .await
        .unwrap();
    let there: Vec<i64> = all.split(',').map(|v| v.parse().unwrap()).collect();
    let lost: Vec<i64> = acknowledged
        .iter()
        .filter(|k| there.binary_search(k).is_err())
        .copied()
        .collect();
    assert!(lost.is_empty(), "acknowledged and lost: {lost:?}");
    assert!(there.windows(2).all(|w| w[0] < w[1]), "twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_primary_is_replaced_and_comes_back_as_a_standby() {
    bounded(async {
        let (bed, mut nodes) = three().await;
        let leader = settled(&nodes, 2).await;
        nodes[leader]
            .as_ref()
            .unwrap()
            .app_sql("CREATE TABLE t (v bigint)")
            .await
            .unwrap();
        let (stop, writing) = writer(&bed);
        tokio::time::sleep(Duration::from_millis(500)).await;
        let began = Instant::now();
        nodes[leader].take().unwrap().kill().await;
        let next = settled(&nodes, 1).await;
        println!("served again after {:?}", began.elapsed());
        assert_ne!(next, leader);
        let name = u32::try_from(leader).unwrap() + 1;
        nodes[leader] = Some(bed.start(name));
        bed.until_ready(name).await;
        let last = settled(&nodes, 2).await;
        stop.send_replace(true);
        let (acknowledged, gap) = writing.await.unwrap();
        println!("{} rows, longest gap {gap:?}", acknowledged.len());
        check(nodes[last].as_ref().unwrap(), &acknowledged).await;
        for node in nodes.into_iter().flatten() {
            node.stop().await;
        }
    })
    .await;
}
