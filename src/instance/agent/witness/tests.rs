use super::*;
use crate::failover::Configuration;
use crate::failover::{Durability, Rule};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::ConfigMap;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// An object with compare-and-swap, and everything that can go wrong with it.
#[derive(Debug, Default)]
struct Fake {
    object: Mutex<Option<ConfigMap>>,
    version: AtomicU32,
    reads: AtomicU32,
    writes: AtomicU32,
    away: AtomicBool,
    /// So many writes find that somebody else was first.
    contended: AtomicU32,
}

impl Fake {
    fn new(uid: &str) -> Arc<Self> {
        let fake = Self::default();
        fake.put(uid, None);
        Arc::new(fake)
    }

    fn put(&self, uid: &str, text: Option<String>) {
        let mut object = ConfigMap::default();
        object.metadata.uid = Some(uid.to_owned());
        object.metadata.resource_version = Some(self.next());
        object.data = text.map(|t| BTreeMap::from([(WITNESS_KEY.to_owned(), t)]));
        *self.object.lock().unwrap() = Some(object);
    }

    fn next(&self) -> String {
        (self.version.fetch_add(1, Ordering::SeqCst) + 1).to_string()
    }

    fn register(&self) -> Option<Register<String>> {
        let object = self.object.lock().unwrap();
        let text = object.as_ref()?.data.as_ref()?.get(WITNESS_KEY)?;
        Some(serde_json::from_str(text).unwrap())
    }
}

impl Shelf for Fake {
    fn read(&self) -> BoxFuture<'_, anyhow::Result<Option<ConfigMap>>> {
        async {
            self.reads.fetch_add(1, Ordering::SeqCst);
            anyhow::ensure!(!self.away.load(Ordering::SeqCst), "away");
            Ok(self.object.lock().unwrap().clone())
        }
        .boxed()
    }

    fn replace(&self, mut object: ConfigMap) -> BoxFuture<'_, anyhow::Result<bool>> {
        async move {
            let mut now = self.object.lock().unwrap();
            let Some(present) = now.as_mut() else {
                return Ok(false);
            };
            if self.contended.load(Ordering::SeqCst) > 0 {
                self.contended.fetch_sub(1, Ordering::SeqCst);
                present.metadata.resource_version = Some(self.next());
            }
            if present.metadata.uid != object.metadata.uid
                || present.metadata.resource_version != object.metadata.resource_version
            {
                return Ok(false);
            }
            object.metadata.resource_version = Some(self.next());
            self.writes.fetch_add(1, Ordering::SeqCst);
            *present = object;
            Ok(true)
        }
        .boxed()
    }
}

fn configuration(term: Term, primary: &str) -> Configuration<String> {
    Configuration {
        term,
        version: 1,
        primary: primary.to_owned(),
        voters: BTreeSet::from([
            "s-1/a".to_owned(),
            "s-2/b".to_owned(),
            "witness/u".to_owned(),
        ]),
        witness: Some("witness/u".to_owned()),
        sync: Rule::default(),
        durability: Durability::Required,
        may_be_primary: BTreeSet::new(),
    }
}

fn beat(term: Term, seq: u64) -> Message<String> {
    Message::Heartbeat {
        configuration: configuration(term, "s-1/a"),
        seq,
        history: Vec::new(),
        position: 0,
    }
}

fn vote(term: Term) -> Message<String> {
    Message::RequestVote {
        term,
        renewal: None,
        farewell: None,
    }
}

fn start(fake: &Arc<Fake>, me: &str) -> Witness {
    let witness = Witness::start(me.to_owned(), fake.clone());
    witness.brief(Facts {
        detection: 200,
        dead: None,
    });
    witness
}

/// The next answer.
async fn answer(witness: &mut Witness) -> Message<String> {
    loop {
        let said = timeout(Duration::from_secs(5), witness.said()).await;
        if let Said::Answer { from, message } = said.unwrap() {
            assert_eq!(from, "witness/u");
            return message;
        }
    }
}

/// Whatever comes until this does.
async fn until(witness: &mut Witness, wanted: Said) {
    while timeout(Duration::from_secs(5), witness.said())
        .await
        .unwrap()
        != wanted
    {}
}

const W: &str = "witness/u";

#[tokio::test]
async fn a_heartbeat_is_written_before_it_is_answered() {
    let fake = Fake::new("u");
    let mut witness = start(&fake, "s-1/a");
    witness.ask(W.into(), beat(3, 7));
    let Message::Heard {
        seq: 7, term: 3, ..
    } = answer(&mut witness).await
    else {
        panic!("another answer");
    };
    let register = fake.register().unwrap();
    assert_eq!((register.beat, register.promised), ((3, 7), 3));
    assert_eq!(register.me, W);
}

#[tokio::test]
async fn one_who_was_slower_reads_again_before_it_answers() {
    let fake = Fake::new("u");
    fake.contended.store(2, Ordering::SeqCst);
    let mut witness = start(&fake, "s-1/a");
    witness.ask(W.into(), beat(3, 7));
    answer(&mut witness).await;
    assert_eq!(fake.reads.load(Ordering::SeqCst), 3);
    assert_eq!(fake.writes.load(Ordering::SeqCst), 1);
    // And gives up at some time.
    fake.contended.store(100, Ordering::SeqCst);
    witness.ask(W.into(), beat(3, 8));
    until(
        &mut witness,
        Said::Trouble(Some("its object keeps changing".into())),
    )
    .await;
}

#[tokio::test]
async fn a_vote_is_given_only_after_it_was_watched_for_the_detection_time() {
    let fake = Fake::new("u");
    let mut first = start(&fake, "s-1/a");
    first.ask(W.into(), beat(3, 7));
    answer(&mut first).await;
    let mut second = start(&fake, "s-2/b");
    second.ask(W.into(), vote(4));
    let Message::Refused { .. } = answer(&mut second).await else {
        panic!("granted at once");
    };
    tokio::time::sleep(Duration::from_millis(220)).await;
    second.ask(W.into(), vote(4));
    let Message::Vote {
        term: 4,
        copy: None,
        ..
    } = answer(&mut second).await
    else {
        panic!("refused");
    };
    assert_eq!(fake.register().unwrap().promised, 4);
    // The old primary hears of it.
    first.ask(W.into(), beat(3, 8));
    let Message::Heard { promised: 4, .. } = answer(&mut first).await else {
        panic!("another answer");
    };
}

#[tokio::test]
async fn who_knows_the_primary_dead_need_not_watch() {
    let fake = Fake::new("u");
    let mut first = start(&fake, "s-1/a");
    first.ask(W.into(), beat(3, 7));
    answer(&mut first).await;
    let mut second = start(&fake, "s-2/b");
    second.brief(Facts {
        detection: 60_000,
        dead: Some(3),
    });
    second.ask(W.into(), Message::PreVote { term: 4 });
    let Message::PreVoted { granted: true, .. } = answer(&mut second).await else {
        panic!("refused");
    };
    // Of another term it knows nothing.
    second.brief(Facts {
        detection: 60_000,
        dead: Some(2),
    });
    second.ask(W.into(), Message::PreVote { term: 4 });
    let Message::PreVoted { granted: false, .. } = answer(&mut second).await else {
        panic!("granted");
    };
}

#[tokio::test]
async fn an_object_made_anew_is_another_voter() {
    let fake = Fake::new("u");
    let mut witness = start(&fake, "s-1/a");
    witness.ask(W.into(), beat(3, 7));
    answer(&mut witness).await;
    let kept = serde_json::to_string(&fake.register().unwrap()).unwrap();
    // Brought back with what the first one held.
    fake.put("v", Some(kept));
    witness.ask(W.into(), beat(3, 8));
    until(&mut witness, Said::Seen(Some("witness/v".into()))).await;
    witness.ask("witness/v".into(), vote(9));
    loop {
        if let Said::Answer { from, message } = witness.said().await {
            // Nothing of what the first one had promised or heard.
            assert_eq!(from, "witness/v");
            assert_eq!(
                message,
                Message::Refused {
                    term: 9,
                    promised: 0
                }
            );
            break;
        }
    }
    *fake.object.lock().unwrap() = None;
    witness.look();
    until(&mut witness, Said::Seen(None)).await;
}

#[tokio::test]
async fn one_that_cannot_be_read_or_reached_says_nothing() {
    let fake = Fake::new("u");
    fake.away.store(true, Ordering::SeqCst);
    let mut witness = start(&fake, "s-1/a");
    witness.ask(W.into(), beat(3, 7));
    let Said::Trouble(Some(why)) = witness.said().await else {
        panic!("no trouble");
    };
    assert!(
        why.contains("can't read its object in the API server: away"),
        "{why}"
    );
    fake.away.store(false, Ordering::SeqCst);
    fake.put("u", Some("{".into()));
    witness.ask(W.into(), beat(3, 8));
    until(&mut witness, Said::Seen(Some(W.into()))).await;
    let Said::Trouble(Some(why)) = witness.said().await else {
        panic!("no trouble");
    };
    assert!(why.contains("delete the ConfigMap"), "{why}");
    assert_eq!(fake.writes.load(Ordering::SeqCst), 0);
    fake.put("u", None);
    witness.ask(W.into(), beat(3, 9));
    answer(&mut witness).await;
    until(&mut witness, Said::Trouble(None)).await;
}

#[test]
fn of_each_sort_only_the_newest_is_asked() {
    let mut pending = Pending::default();
    for seq in 1..100 {
        let sort = |m: &Message<String>| matches!(m, Message::Heartbeat { .. });
        for message in [beat(3, seq), vote(seq)] {
            pending
                .messages
                .insert((W.to_owned(), sort(&message)), message);
        }
    }
    assert_eq!(pending.messages.len(), 2);
}

#[test]
fn questions_that_change_nothing_are_paced() {
    let mut pending = Pending {
        look: true,
        ..Pending::default()
    };
    assert!(pending.patient());
    pending
        .messages
        .insert((W.to_owned(), false), Message::PreVote { term: 4 });
    assert!(pending.patient());
    pending.messages.insert((W.to_owned(), false), vote(4));
    assert!(!pending.patient());
}
