//! A client that writes through whoever takes it, and knows what was acknowledged.
//!
//! Owns the table `t`'s rows while it runs: keys from 1 on, each tried once. Never: repeats a key, so that what is there
//! twice was written twice by the store.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::{Bed, Node, PASSWORD, PORT};

/// One that writes a row every few milliseconds.
pub struct Writer {
    stop: watch::Sender<bool>,
    task: JoinHandle<(Vec<i64>, Duration)>,
}

impl Writer {
    /// Begins, through whichever of so many instances is primary.
    pub fn start(bed: &Bed, instances: u8) -> Self {
        let (stop, stopped) = watch::channel(false);
        let hosts = (1..=instances)
            .map(|n| (format!("s-{n}"), bed.address(n)))
            .collect();
        let ca = std::fs::read(bed.path(1, "tls/ca.crt")).unwrap();
        let task = tokio::spawn(write(hosts, ca, stopped));
        Self { stop, task }
    }

    /// Stops it; every row that was acknowledged is there, once. The longest time in which none was.
    pub async fn finish(self, what: &str, node: &Node) -> Duration {
        self.stop.send_replace(true);
        let (acknowledged, gap) = self.task.await.unwrap();
        println!("{what}: {} rows, longest gap {gap:?}", acknowledged.len());
        assert!(!acknowledged.is_empty());
        let sql = "SELECT string_agg(v::text, ',' ORDER BY v) FROM t WHERE v > 0";
        let all = node.sql_in("app", sql).await.unwrap();
        let there: Vec<i64> = all.split(',').map(|v| v.parse().unwrap()).collect();
        let lost: Vec<&i64> = acknowledged
            .iter()
            .filter(|k| there.binary_search(k).is_err())
            .collect();
        assert!(lost.is_empty(), "acknowledged and lost: {lost:?}");
        assert!(there.windows(2).all(|w| w[0] < w[1]), "twice");
        gap
    }
}

async fn write(
    hosts: Vec<(String, IpAddr)>,
    ca: Vec<u8>,
    stopped: watch::Receiver<bool>,
) -> (Vec<i64>, Duration) {
    let mut acknowledged = Vec::new();
    let (mut gap, mut last) = (Duration::ZERO, Instant::now());
    let mut key = 0_i64;
    let mut client: Option<tokio_postgres::Client> = None;
    while !*stopped.borrow() {
        if client.is_none() {
            for (name, address) in &hosts {
                client = connect(name, *address, &ca).await;
                if client.is_some() {
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
}

/// A session with a primary at this address, over TLS.
pub async fn connect(name: &str, address: IpAddr, ca: &[u8]) -> Option<tokio_postgres::Client> {
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
