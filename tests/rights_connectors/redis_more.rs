//! What is particular to Redis.

use std::path::Path;
use std::time::Duration;

use domicile::rights::connectors::{Connector, Limits, Presence, Reason, connect_within};

use crate::instance_bed::until;
use crate::redis::{KEYS, Redis, Server, all_keys, target, write_url};
use crate::suite::{LIMITS, World, erase, erased, identifiers, person, probe, proven};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_batch_in_a_large_keyspace() {
    let world = Redis::new().await;
    let mut c = world.server.admin().await;
    let mut pipeline = redis::pipe();
    for n in 0..50_000 {
        pipeline.set(format!("session:x{n}:{n}"), 1).ignore();
    }
    let _: () = pipeline.query_async(&mut c).await.unwrap();
    let people: Vec<_> = (0..600).map(person).collect();
    let mut pipeline = redis::pipe();
    for one in &people {
        let id = &one.0["customerId"];
        for n in 0..3 {
            pipeline.set(format!("session:{id}:{n}"), 1).ignore();
        }
        pipeline.set(format!("profile:{id}"), 1).ignore();
    }
    let _: () = pipeline.query_async(&mut c).await.unwrap();
    let connector = world.connector();
    let evidence = erased(&*connector, &people).await;
    for evidence in &evidence {
        assert_eq!(evidence.0["keys"]["session:{customerId}:*"], 3);
        assert_eq!(evidence.0["keys"]["profile:{customerId}"], 1);
    }
    proven(&*connector, &people, &evidence).await;
    assert_eq!(all_keys(&mut c).await.len(), 50_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_acknowledge_or_are_said_not_to() {
    let world = Redis::new().await;
    let connector = world.connector();
    let _stale = world.stale().await;
    let people = [person(1)];
    world.plant(&people[0]).await;
    until("the replica is connected", async || {
        let mut c = world.server.admin().await;
        let info: String = redis::cmd("INFO")
            .arg("replication")
            .query_async(&mut c)
            .await
            .unwrap();
        info.contains("connected_slaves:1") && info.contains("state=online")
    })
    .await;
    let evidence = erased(&*connector, &people).await;
    assert_eq!(evidence[0].0["replicas"], 1);
    assert_eq!(evidence[0].0["replicasAcknowledged"], 1);
    world.freeze_replica();
    // Something that it hasn't acknowledged yet.
    world.plant(&people[0]).await;
    let evidence = erased(&*connector, &people).await;
    assert_eq!(evidence[0].0["replicas"], 1);
    assert_eq!(evidence[0].0["replicasAcknowledged"], 0);
    proven(&*connector, &people, &evidence).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_identifier_that_could_be_two_people_erases_neither() {
    let world = Redis::new().await;
    let twelve = identifiers(&[("customerId", "12"), ("email", "a@example.org")]);
    world.plant(&twelve).await;
    let before = world.everything().await;
    let both = identifiers(&[("customerId", "12:a"), ("email", "b@example.org")]);
    let answers = erase(&*world.connector(), &[both]).await.unwrap();
    let failure = answers[0].as_ref().unwrap_err();
    assert_eq!(failure.reason, Reason::Identifier);
    assert!(!failure.detail.contains("12:a"), "{failure}");
    assert_eq!(world.everything().await, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_is_refused() {
    let server = Server::start(&["--cluster-enabled", "yes"]).await;
    let dir = tempfile::Builder::new().prefix("dom").tempdir().unwrap();
    write_url(dir.path(), "cache", &server.url());
    let c = connect_within(
        &target("cache", &KEYS),
        Path::new("/"),
        dir.path(),
        "x",
        LIMITS,
    )
    .unwrap();
    for failure in [
        erase(&*c, &[person(1)]).await.unwrap_err(),
        probe(&*c, &[person(1)], &[]).await.unwrap_err(),
    ] {
        assert_eq!(failure.reason, Reason::Refused);
        assert!(failure.detail.contains("cluster"), "{failure}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_was_restarted_proves_nothing_of_before() {
    let mut world = Redis::new().await;
    let people = [person(1)];
    world.plant(&people[0]).await;
    let c = world.connector();
    let evidence = erased(&*c, &people).await;
    proven(&*c, &people, &evidence).await;
    world.down().await;
    world.up().await;
    let seen = probe(&*c, &people, &evidence).await.unwrap();
    assert_eq!(seen[0].as_ref().unwrap_err().reason, Reason::Protocol);
    let evidence = erased(&*c, &people).await;
    proven(&*c, &people, &evidence).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_walk_has_an_end() {
    let world = Redis::new().await;
    let mut c = world.server.admin().await;
    let mut pipeline = redis::pipe();
    for n in 0..5_000 {
        pipeline.set(format!("x:{n}"), 1).ignore();
    }
    let _: () = pipeline.query_async(&mut c).await.unwrap();
    let limits = Limits {
        whole: Duration::ZERO,
        ..LIMITS
    };
    let c: Box<dyn Connector> = connect_within(
        &target("cache", &KEYS),
        Path::new("/"),
        world.credentials.path(),
        "x",
        limits,
    )
    .unwrap();
    assert_eq!(
        erase(&*c, &[person(1)]).await.unwrap_err().reason,
        Reason::Timeout
    );
    assert_eq!(
        probe(&*c, &[person(1)], &[]).await.unwrap_err().reason,
        Reason::Timeout
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_url_may_be() {
    let world = Redis::new().await;
    let people = [person(1)];
    world.plant(&people[0]).await;
    let dir = world.credentials.path();
    for bad in [
        "",
        "http://x",
        "redis://",
        "rediss://localhost:1#insecure",
        "unix:///run/x",
        "rediss://geheim@",
    ] {
        write_url(dir, "cache", bad);
        let failure = erase(&*world.connector(), &people).await.unwrap_err();
        assert!(
            matches!(failure.reason, Reason::Credentials | Reason::Unreachable),
            "{bad}: {failure}"
        );
        assert!(!failure.detail.contains("geheim"), "{failure}");
    }
    std::fs::remove_file(dir.join("cache/url")).unwrap();
    let failure = erase(&*world.connector(), &people).await.unwrap_err();
    assert_eq!(failure.reason, Reason::Credentials);
    assert!(failure.detail.contains("cache/url"), "{failure}");
    // TLS to who speaks none.
    let plain = world.server.url().replace("redis://", "rediss://");
    write_url(dir, "cache", &plain);
    let failure = erase(&*world.connector(), &people).await.unwrap_err();
    assert!(
        matches!(failure.reason, Reason::Unreachable | Reason::Credentials),
        "{failure}"
    );
    world.mend();
    let seen = probe(&*world.connector(), &people, &[]).await.unwrap();
    assert_eq!(seen, [Ok(Presence::StillThere)]);
}
