//! Redis and Valkey: keys by name, and keys that are found by walking through the keyspace.
//!
//! Owns: which of the two a batch needs, and what a replica's acknowledgement is worth. Every key that a walk brings is
//! compared here again before it is removed: what is a person's isn't left to how a server reads a glob.
//! Never: asks a replica; shows a key, or the text of an error (it may quote one).

mod keys;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use jiff::Timestamp;
use redis::aio::MultiplexedConnection;
use redis::{
    AsyncConnectionConfig, Client, ErrorKind, RedisError, RedisResult, ServerErrorKind,
    TlsCertificates,
};
use serde_json::json;
use tokio::sync::Mutex;

use self::keys::{Guard, Index, Pattern, Template, fill};
use super::{Answer, Connector, Failure, Limits, Presence, Reason, Residue, Subject, residue_of};
use crate::rights::config::Target;
use crate::rights::model::Evidence;

/// Keys that the server looks at per step of a walk. It serves nobody else meanwhile.
const STEP: usize = 1000;
/// Commands per pipeline, and keys per command.
const MANY: usize = 500;
/// Up to so many patterns, each is looked for by itself: only its keys come over the network. Beyond, one walk per
/// template brings everybody's keys, and they are sorted here.
const FEW: usize = 4;
/// How evidence names the server's process.
const SERVER: &str = "server";

/// A Redis or Valkey server.
pub struct Redis {
    /// A directory with `url`, and maybe `ca.crt`.
    credentials: PathBuf,
    templates: Vec<Template>,
    guard: Guard,
    residue: Option<Residue>,
    limits: Limits,
    eraser: Mutex<Option<MultiplexedConnection>>,
    prober: Mutex<Option<MultiplexedConnection>>,
}

/// A person's keys.
struct Person {
    place: usize,
    /// By template.
    patterns: Vec<Pattern>,
}

/// What a server says of itself.
struct Server {
    run_id: String,
    replicas: usize,
    at: Option<Timestamp>,
}

/// What is done with keys that were found.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Doing {
    Erasing,
    Reading,
}

/// Per person: by template how many keys, or why not.
type Counts = Vec<Result<Vec<u64>, Failure>>;

impl Redis {
    /// A connector that hasn't connected yet.
    ///
    /// # Errors
    /// If a key isn't understood.
    pub fn new(
        target: &Target,
        keys: &[String],
        credentials: &Path,
        limits: Limits,
    ) -> anyhow::Result<Self> {
        let templates = keys
            .iter()
            .map(|key| Template::parse(key))
            .collect::<anyhow::Result<Vec<_>>>()?;
        Ok(Self {
            credentials: credentials.join(&target.name),
            guard: Guard::of(&templates),
            templates,
            residue: residue_of(target),
            limits,
            eraser: Mutex::new(None),
            prober: Mutex::new(None),
        })
    }

    async fn connect(&self) -> Result<MultiplexedConnection, Failure> {
        let (url, ca) = super::credentials(&self.credentials)?;
        let setup = |words: &str| Failure::new(Reason::Credentials, words);
        let url = url.trim();
        let tls = url.starts_with("rediss://") || url.starts_with("valkeys://");
        if !tls && !url.starts_with("redis://") && !url.starts_with("valkey://") {
            return Err(setup(
                "the URL of the server begins neither with redis:// nor with rediss://",
            ));
        }
        if url.contains("#insecure") {
            return Err(setup(
                "the URL of the server says #insecure: give its authority as ca.crt beside the URL instead",
            ));
        }
        let client = if tls {
            let certificates = TlsCertificates {
                client_tls: None,
                root_cert: ca,
            };
            Client::build_with_tls(url, certificates)
        } else {
            Client::open(url)
        };
        let client = client.map_err(|_| {
            setup(
                "the URL of the server or its ca.crt isn't understood: redis://USER:PASSWORD@HOST:PORT/NUMBER, with \
                 special characters of the password as %XX",
            )
        })?;
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.limits.connect))
            .set_response_timeout(Some(self.limits.answer));
        let connecting = client.get_multiplexed_async_connection_with_config(&config);
        match tokio::time::timeout(self.limits.connect, Box::pin(connecting)).await {
            Ok(connection) => connection.map_err(|e| match failure(&e, "connecting") {
                // An error of no special code, of a server that we have asked nothing yet.
                f if e.code() == Some("ERR") => Failure::new(Reason::Unreachable, f.detail),
                f if f.reason == Reason::Timeout => silence(),
                f => f,
            }),
            Err(_) => Err(silence()),
        }
    }

    /// A connection, and what answers there. It is out of its slot until the work is done.
    async fn server(
        &self,
        slot: &mut Option<MultiplexedConnection>,
    ) -> Result<(MultiplexedConnection, Server), Failure> {
        let mut kept = slot.take();
        loop {
            let fresh = kept.is_none();
            let mut connection = match kept.take() {
                Some(connection) => connection,
                None => self.connect().await?,
            };
            match about(&mut connection).await {
                Ok(server) => return Ok((connection, server?)),
                // It went and came back since the last time.
                Err(e) if !fresh && !e.is_timeout() => {}
                Err(e) => return Err(failure(&e, "asking what it is")),
            }
        }
    }

    /// Sorts out who lacks an identifier, or has one that can't be used.
    fn people(&self, subjects: &[Subject<'_>]) -> (Vec<Person>, Vec<Option<Failure>>) {
        let mut people = Vec::with_capacity(subjects.len());
        let mut failures = Vec::with_capacity(subjects.len());
        for (place, subject) in subjects.iter().enumerate() {
            match fill(&self.templates, &self.guard, subject.identifiers) {
                Ok(patterns) => {
                    people.push(Person { place, patterns });
                    failures.push(None);
                }
                Err(failure) => failures.push(Some(failure)),
            }
        }
        (people, failures)
    }

    /// Erases or counts the keys of these people.
    async fn go(
        &self,
        connection: &mut MultiplexedConnection,
        people: &[Person],
        doing: Doing,
    ) -> Result<Counts, Failure> {
        let mut counts: Counts = vec![Ok(vec![0; self.templates.len()]); people.len()];
        let mut named = Vec::new();
        // By template: whose, and which.
        let mut open: BTreeMap<usize, Vec<(usize, &Pattern)>> = BTreeMap::new();
        for (who, person) in people.iter().enumerate() {
            for (template, pattern) in person.patterns.iter().enumerate() {
                match pattern.exact() {
                    Some(key) => named.push((who, template, vec![key.to_vec()])),
                    None => open.entry(template).or_default().push((who, pattern)),
                }
            }
        }
        self.act(connection, &named, doing, &mut counts).await?;
        let begun = Instant::now();
        let patterns: usize = open.values().map(Vec::len).sum();
        for (template, patterns_of) in &open {
            let Some(everybody) = self.templates.get(*template) else {
                continue;
            };
            if patterns <= FEW {
                for one in patterns_of {
                    let walk = Walk {
                        glob: one.1.glob(),
                        index: Index::new(std::slice::from_ref(one)),
                        template: *template,
                        begun,
                    };
                    self.walk(connection, &walk, doing, &mut counts).await?;
                }
            } else {
                let walk = Walk {
                    glob: everybody.everybody(),
                    index: Index::new(patterns_of),
                    template: *template,
                    begun,
                };
                self.walk(connection, &walk, doing, &mut counts).await?;
            }
        }
        Ok(counts)
    }

    /// Goes through the keyspace once.
    async fn walk(
        &self,
        connection: &mut MultiplexedConnection,
        walk: &Walk<'_>,
        doing: Doing,
        counts: &mut Counts,
    ) -> Result<(), Failure> {
        let mut cursor = 0_u64;
        loop {
            let mut scan = redis::cmd("SCAN");
            scan.arg(cursor).arg("MATCH").arg(walk.glob.as_slice());
            scan.arg("COUNT").arg(STEP);
            let answer: RedisResult<(u64, Vec<Vec<u8>>)> = scan.query_async(connection).await;
            let (next, keys) = answer.map_err(|e| failure(&e, "walking through the keys"))?;
            let mut found: BTreeMap<usize, Vec<Vec<u8>>> = BTreeMap::new();
            for key in keys {
                for who in walk.index.whose(&key) {
                    found.entry(who).or_default().push(key.clone());
                }
            }
            let mut named = Vec::new();
            for (who, keys) in found {
                for keys in keys.chunks(MANY) {
                    named.push((who, walk.template, keys.to_vec()));
                }
            }
            self.act(connection, &named, doing, counts).await?;
            cursor = next;
            if cursor == 0 {
                return Ok(());
            }
            if walk.begun.elapsed() > self.limits.whole {
                return Err(Failure::new(
                    Reason::Timeout,
                    "walking through all keys takes too long: name keys without '*' where it can be done",
                ));
            }
        }
    }

    /// Removes keys, or counts those that exist.
    async fn act(
        &self,
        connection: &mut MultiplexedConnection,
        named: &[(usize, usize, Vec<Vec<u8>>)],
        doing: Doing,
        counts: &mut Counts,
    ) -> Result<(), Failure> {
        let (command, words) = match doing {
            Doing::Erasing => ("UNLINK", "removing keys"),
            Doing::Reading => ("EXISTS", "reading keys"),
        };
        for some in named.chunks(MANY) {
            let mut pipeline = redis::pipe();
            // One person's error isn't everybody's.
            pipeline.ignore_errors();
            for (_, _, keys) in some {
                let command = pipeline.cmd(command);
                for key in keys {
                    command.arg(key.as_slice());
                }
            }
            let answers: RedisResult<Vec<RedisResult<u64>>> =
                pipeline.query_async(connection).await;
            let answers = answers.map_err(|e| failure(&e, words))?;
            if answers.len() != some.len() {
                return Err(Failure::new(
                    Reason::Protocol,
                    format!("the server gave another number of answers while {words}"),
                ));
            }
            for ((who, template, _), answer) in some.iter().zip(answers) {
                let Some(count) = counts.get_mut(*who) else {
                    continue;
                };
                match (answer, &mut *count) {
                    (Ok(n), Ok(by_template)) => {
                        if let Some(of) = by_template.get_mut(*template) {
                            *of += n;
                        }
                    }
                    (Err(e), _) => *count = Err(failure(&e, words)),
                    (Ok(_), Err(_)) => {}
                }
            }
        }
        Ok(())
    }

    async fn erase_all(&self, subjects: &[Subject<'_>]) -> Result<Answer<Evidence>, Failure> {
        let (people, mut failures) = self.people(subjects);
        let mut slot = self.eraser.lock().await;
        let (mut connection, server) = self.server(&mut slot).await?;
        let counts = self.go(&mut connection, &people, Doing::Erasing).await?;
        let mut acknowledged = 0;
        if server.replicas > 0 && !people.is_empty() {
            let limit = self.limits.standbys.min(self.limits.answer / 2);
            let mut wait = redis::cmd("WAIT");
            wait.arg(server.replicas)
                .arg(u64::try_from(limit.as_millis()).unwrap_or(u64::MAX).max(1));
            let answer: RedisResult<usize> = wait.query_async(&mut connection).await;
            acknowledged = answer.map_err(|e| failure(&e, "waiting for replicas"))?;
        }
        *slot = Some(connection);
        let mut done = Vec::with_capacity(subjects.len());
        let mut counts = people.iter().zip(counts).peekable();
        for (place, failure) in failures.iter_mut().enumerate() {
            let counted = counts.next_if(|(person, _)| person.place == place);
            done.push(match (failure.take(), counted) {
                (Some(failure), _) | (None, Some((_, Err(failure)))) => Err(failure),
                (None, Some((_, Ok(counts)))) => Ok(self.evidence(&counts, &server, acknowledged)),
                (None, None) => Err(forgotten()),
            });
        }
        Ok(done)
    }

    fn evidence(&self, counts: &[u64], server: &Server, acknowledged: usize) -> Evidence {
        let keys: serde_json::Map<_, _> = self
            .templates
            .iter()
            .zip(counts)
            .map(|(template, count)| (template.text.clone(), json!(count)))
            .collect();
        let mut evidence = serde_json::Map::new();
        evidence.insert("keys".into(), keys.into());
        evidence.insert(SERVER.into(), json!(server.run_id));
        evidence.insert("replicas".into(), json!(server.replicas));
        evidence.insert("replicasAcknowledged".into(), json!(acknowledged));
        if let Some(at) = server.at {
            evidence.insert("erasedAt".into(), json!(at));
        }
        Evidence(evidence)
    }

    async fn probe_all(
        &self,
        subjects: &[Subject<'_>],
        erased: &[Evidence],
    ) -> Result<Answer<Presence>, Failure> {
        let (people, mut failures) = self.people(subjects);
        let mut slot = self.prober.lock().await;
        let (mut connection, server) = self.server(&mut slot).await?;
        let counts = self.go(&mut connection, &people, Doing::Reading).await?;
        *slot = Some(connection);
        let mut seen = Vec::with_capacity(subjects.len());
        let mut counts = people.iter().zip(counts).peekable();
        for (place, failure) in failures.iter_mut().enumerate() {
            let counted = counts.next_if(|(person, _)| person.place == place);
            seen.push(match (failure.take(), counted) {
                (Some(failure), _) | (None, Some((_, Err(failure)))) => Err(failure),
                (None, Some((_, Ok(counts)))) => {
                    if counts.iter().any(|n| *n > 0) {
                        Ok(Presence::StillThere)
                    } else {
                        server.proves(erased.get(place))
                    }
                }
                (None, None) => Err(forgotten()),
            });
        }
        Ok(seen)
    }
}

/// One walk through the keyspace.
struct Walk<'p> {
    glob: Vec<u8>,
    index: Index<'p>,
    template: usize,
    begun: Instant,
}

impl Server {
    /// That a person isn't here, if it is here that they were erased.
    fn proves(&self, erased: Option<&Evidence>) -> Result<Presence, Failure> {
        let erased = erased.and_then(|e| e.0.get(SERVER)?.as_str());
        if erased.is_some_and(|run_id| run_id != self.run_id) {
            // It may have read an older snapshot, or be a replica that was promoted without the last commands: what is
            // absent here now may come back from where it was erased.
            return Err(Failure::new(
                Reason::Protocol,
                "another server process answers than the one erased from: the person must be erased again",
            ));
        }
        let mut evidence = serde_json::Map::new();
        evidence.insert("readFrom".into(), json!("primary"));
        if let Some(at) = self.at {
            evidence.insert("readAt".into(), json!(at));
        }
        Ok(Presence::Absent {
            evidence: Evidence(evidence),
            bounded: None,
        })
    }
}

/// What the server is; an inner error if it is none that may be asked.
async fn about(connection: &mut MultiplexedConnection) -> RedisResult<Result<Server, Failure>> {
    let text: String = redis::cmd("INFO").query_async(connection).await?;
    Ok(understand(&text))
}

fn understand(info: &str) -> Result<Server, Failure> {
    let field = |name: &str| {
        info.lines()
            .filter_map(|line| line.split_once(':'))
            .find_map(|(key, value)| (key == name).then(|| value.trim()))
    };
    let (Some(role), Some(run_id)) = (field("role"), field("run_id")) else {
        return Err(Failure::new(
            Reason::Protocol,
            "the server doesn't say in INFO whether it is a primary",
        ));
    };
    if field("cluster_enabled") == Some("1") {
        return Err(Failure::new(
            Reason::Refused,
            "the server is part of a cluster, which this version can't erase from: people must be erased by hand",
        ));
    }
    if role != "master" {
        return Err(Failure::new(
            Reason::Refused,
            "the server is a replica: give the URL of its primary",
        ));
    }
    let micros = field("server_time_usec").and_then(|t| t.parse().ok());
    Ok(Server {
        run_id: run_id.to_owned(),
        replicas: field("connected_slaves")
            .and_then(|n| n.parse().ok())
            .unwrap_or(0),
        at: micros.and_then(|m| Timestamp::from_microsecond(m).ok()),
    })
}

fn silence() -> Failure {
    Failure::new(
        Reason::Unreachable,
        "the server doesn't answer (if its URL begins with rediss://: does it speak TLS at this port?)",
    )
}

fn forgotten() -> Failure {
    Failure::new(Reason::Protocol, "the batch gave no answer for this person")
}

/// What an error means. Its text is left out: it may quote a key.
fn failure(error: &RedisError, doing: &str) -> Failure {
    use ServerErrorKind as Kind;
    let (reason, words) = match error.kind() {
        _ if error.is_timeout() => (Reason::Timeout, "the server didn't answer in time"),
        ErrorKind::AuthenticationFailed => (
            Reason::Credentials,
            "the server refuses the URL's user and password",
        ),
        ErrorKind::Server(Kind::NoPerm) => (
            Reason::Refused,
            "the server's access list doesn't allow the URL's user this: it needs INFO, SCAN, UNLINK, EXISTS and WAIT, \
             and the keys",
        ),
        ErrorKind::Server(Kind::ReadOnly) => (
            Reason::Refused,
            "the server is a read-only replica: give the URL of its primary",
        ),
        ErrorKind::Server(
            Kind::Moved | Kind::Ask | Kind::CrossSlot | Kind::ClusterDown | Kind::TryAgain,
        ) => (
            Reason::Refused,
            "the server is part of a cluster, which this version can't erase from",
        ),
        ErrorKind::Server(Kind::BusyLoading | Kind::MasterDown) => {
            (Reason::Unreachable, "the server isn't ready yet")
        }
        ErrorKind::Io => (Reason::Unreachable, "the connection to the server failed"),
        ErrorKind::InvalidClientConfig => (Reason::Credentials, "the URL can't be used"),
        ErrorKind::Server(_) | ErrorKind::Extension => match error.code() {
            Some("WRONGPASS" | "NOAUTH") => (
                Reason::Credentials,
                "the server refuses the URL's user and password",
            ),
            Some("BUSY") => (Reason::Locked, "the server runs somebody's script"),
            Some("NOREPLICAS") => (
                Reason::Unreachable,
                "the server takes no writes, since replicas are away",
            ),
            Some("MISCONF") => (
                Reason::Unreachable,
                "the server takes no writes, since it can't save them",
            ),
            _ => (Reason::Refused, "the server refused a command"),
        },
        _ => (Reason::Protocol, "the server's answer wasn't understood"),
    };
    Failure::new(reason, format!("{words} (while {doing})"))
}

impl Connector for Redis {
    fn erase<'a>(
        &'a self,
        subjects: &'a [Subject<'a>],
    ) -> BoxFuture<'a, Result<Answer<Evidence>, Failure>> {
        self.erase_all(subjects).boxed()
    }

    fn probe<'a>(
        &'a self,
        subjects: &'a [Subject<'a>],
        erased: &'a [Evidence],
    ) -> BoxFuture<'a, Result<Answer<Presence>, Failure>> {
        self.probe_all(subjects, erased).boxed()
    }

    fn residue(&self) -> Option<Residue> {
        self.residue
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &str = "# Server\r\nredis_version:7.0.15\r\nrun_id:abc\r\nserver_time_usec:1700000000000000\r\n\r\n\
                        # Replication\r\nrole:master\r\nconnected_slaves:2\r\n\r\n# Cluster\r\ncluster_enabled:0\r\n";

    #[test]
    fn a_primary_is_one_that_says_so() {
        let server = understand(INFO).map_err(|f| f.to_string()).unwrap();
        assert_eq!((server.run_id.as_str(), server.replicas), ("abc", 2));
        assert_eq!(server.at.unwrap().as_second(), 1_700_000_000);
        let replica = INFO.replace("role:master", "role:slave");
        let cluster = INFO.replace("cluster_enabled:0", "cluster_enabled:1");
        for (info, reason, words) in [
            (replica.as_str(), Reason::Refused, "is a replica"),
            (cluster.as_str(), Reason::Refused, "cluster"),
            ("", Reason::Protocol, "INFO"),
            ("redis_version:1\r\n", Reason::Protocol, "INFO"),
        ] {
            let Err(failure) = understand(info) else {
                panic!("{info} is taken for a primary")
            };
            assert_eq!(failure.reason, reason);
            assert!(failure.detail.contains(words), "{failure}");
        }
    }

    #[test]
    fn what_another_process_says_proves_nothing() {
        let server = understand(INFO).map_err(|f| f.to_string()).unwrap();
        let erased = |run_id: &str| Evidence(json!({SERVER: run_id}).as_object().unwrap().clone());
        assert!(server.proves(Some(&erased("abc"))).is_ok());
        assert!(server.proves(None).is_ok());
        let failure = server.proves(Some(&erased("abd"))).unwrap_err();
        assert_eq!(failure.reason, Reason::Protocol);
    }
}
