use super::*;
use proptest::prelude::*;

fn store() -> StoreSeen {
    StoreSeen {
        source: Source::Live,
        primary: Some("s-1".into()),
        system_identifier: None,
        any_identifier: false,
        governed: false,
    }
}

fn known() -> StoreSeen {
    StoreSeen {
        system_identifier: Some("7".into()),
        any_identifier: true,
        governed: true,
        ..store()
    }
}

fn cluster(id: &str, standby: bool) -> Content {
    Content::Cluster(Cluster {
        major: 17,
        system_identifier: id.into(),
        standby,
    })
}

fn remains() -> Content {
    Content::Remains("it has neither PG_VERSION nor global/pg_control".into())
}

fn seen(me: &str, store: Option<StoreSeen>, content: Content) -> Seen {
    Seen {
        me: me.into(),
        store,
        content,
        leftover: false,
        programs: Programs::Major(17),
        process: Process::Stopped,
        job: None,
        certificate: true,
        credentials: true,
        parameters_tried: true,
        backing_off: None,
        duty: Duty::Unknown,
        held: false,
    }
}

fn with(duty: Duty, mut seen: Seen) -> Seen {
    seen.duty = duty;
    seen
}

fn is_wait(step: &Step) -> bool {
    matches!(step, Step::Wait(_))
}

fn failure(step: &Step) -> &str {
    match step {
        Step::Fail(why) => why,
        other => panic!("{other:?} is no failure"),
    }
}

#[test]
fn an_empty_volume() {
    let of = |me, store| next(&seen(me, Some(store), Content::Empty));
    assert_eq!(of("s-1", store()), Step::InitDb);
    let ungoverned = StoreSeen {
        governed: false,
        ..known()
    };
    assert!(failure(&of("s-1", ungoverned)).contains("volume is lost"));
    // A standby of it has data, even if nobody wrote the store's own identifier yet.
    let reported = StoreSeen {
        any_identifier: true,
        ..store()
    };
    assert!(failure(&of("s-1", reported)).contains("volume is lost"));
    assert!(is_wait(&of(
        "s-1",
        StoreSeen {
            source: Source::Remembered,
            ..store()
        }
    )));
    assert!(is_wait(&of("s-2", store())));
    assert!(is_wait(&next(&seen("s-1", None, Content::Empty))));
    assert!(is_wait(&of(
        "s-1",
        StoreSeen {
            primary: None,
            ..store()
        }
    )));
    // Whoever was the first: once the instances agree on another, its lost volume is a copy to be made anew.
    for me in ["s-1", "s-2"] {
        let copy = |ready| {
            let duty = Duty::Copy { ready };
            next(&with(duty, seen(me, Some(known()), Content::Empty)))
        };
        assert_eq!(copy(true), Step::Clone { replace: false });
        assert!(is_wait(&copy(false)));
    }
}

#[test]
fn a_volume_with_data() {
    let of = |me, store, content| next(&with(Duty::Standby, seen(me, Some(store), content)));
    for standby in [false, true] {
        assert_eq!(
            of("s-1", known(), cluster("7", standby)),
            Step::Start(Mode::Standby),
            "whatever it was before"
        );
    }
    assert!(failure(&of("s-1", known(), cluster("8", false))).contains("another database cluster"));
    assert!(failure(&of("s-1", known(), Content::Unusable("no".into()))).contains("no"));
    let mut other = with(
        Duty::Standby,
        seen("s-1", Some(known()), cluster("7", false)),
    );
    other.programs = Programs::Major(18);
    assert!(failure(&next(&other)).contains("PostgreSQL 17, but the image has PostgreSQL 18"));
    // Its memory of votes is gone, and the others have gone on: no first voter a second time.
    assert_eq!(
        next(&seen("s-1", Some(known()), cluster("7", false))),
        Step::Start(Mode::Standby)
    );
}

#[test]
fn without_the_api_server_what_was_serves_again() {
    for source in [Source::Remembered, Source::Asking] {
        let store = StoreSeen { source, ..known() };
        assert_eq!(
            next(&with(
                Duty::Standby,
                seen("s-1", Some(store), cluster("7", false))
            )),
            Step::Start(Mode::Standby)
        );
    }
    let asking = StoreSeen {
        source: Source::Asking,
        ..store()
    };
    assert!(is_wait(&next(&seen(
        "s-1",
        Some(asking),
        cluster("7", false)
    ))));
}

#[test]
fn a_founding_primary_opens_once_the_store_knows_it() {
    let mut s = seen("s-1", Some(store()), cluster("7", false));
    s.process = Process::Running(Mode::Founding);
    assert_eq!(next(&s), Step::Serve(Mode::Founding));
    s.store = Some(StoreSeen {
        governed: false,
        ..known()
    });
    assert_eq!(next(&s), Step::Found);
    s.process = Process::Stopped;
    assert_eq!(
        next(&s),
        Step::Found,
        "also one from before there were votes"
    );
    s.duty = Duty::Standby;
    s.process = Process::Running(Mode::Founding);
    assert!(matches!(next(&s), Step::Stop(_)));
    s.process = Process::Stopped;
    assert_eq!(next(&s), Step::Start(Mode::Standby));
    s.duty = Duty::Primary;
    assert!(is_wait(&next(&s)), "never started as a primary");
    for mode in [Mode::Standby, Mode::Primary] {
        s.process = Process::Running(mode);
        assert_eq!(next(&s), Step::Serve(mode));
    }
}

#[test]
fn a_running_server_is_not_taken_down_for_what_only_a_start_needs() {
    let mut s = with(
        Duty::Primary,
        seen("s-1", Some(known()), cluster("7", false)),
    );
    s.process = Process::Running(Mode::Primary);
    s.programs = Programs::Major(18);
    s.certificate = false;
    assert_eq!(next(&s), Step::Serve(Mode::Primary));
    assert!(
        complaint(&s)
            .unwrap()
            .contains("the image has PostgreSQL 18")
    );
    s.store = None;
    assert_eq!(next(&s), Step::Serve(Mode::Primary));
}

#[test]
fn a_copy_that_does_not_count_is_replaced_when_somebody_serves() {
    let mut s = with(
        Duty::Copy { ready: true },
        seen("s-2", Some(known()), cluster("7", true)),
    );
    s.process = Process::Running(Mode::Standby);
    assert!(matches!(next(&s), Step::Stop(_)));
    s.process = Process::Stopped;
    assert_eq!(next(&s), Step::Clone { replace: true });
    s.leftover = true;
    assert_eq!(next(&s), Step::ClearLeftover);
    s.leftover = false;
    s.duty = Duty::Copy { ready: false };
    assert!(is_wait(&next(&s)));
    s.process = Process::Running(Mode::Standby);
    assert_eq!(next(&s), Step::Serve(Mode::Standby));
}

#[test]
fn what_is_left_of_a_copy_is_replaced_when_somebody_serves() {
    let of = |duty, held| {
        let mut s = with(duty, seen("s-1", Some(known()), remains()));
        s.held = held;
        next(&s)
    };
    let copy = |ready| Duty::Copy { ready };
    assert_eq!(of(copy(true), true), Step::Clone { replace: true });
    for duty in [copy(false), Duty::Standby, Duty::Primary] {
        assert!(failure(&of(duty, true)).contains("as soon as a primary serves"));
    }
    // Nobody knows whose that is.
    for duty in [copy(true), copy(false), Duty::Standby, Duty::Unknown] {
        assert!(failure(&of(duty, false)).contains("nothing was touched"));
    }
    assert!(is_wait(&of(Duty::Fenced, true)));
}

#[test]
fn a_fenced_instance_is_stopped() {
    let mut s = with(Duty::Fenced, seen("s-2", Some(known()), cluster("7", true)));
    s.process = Process::Running(Mode::Standby);
    assert!(matches!(next(&s), Step::Stop(_)));
    s.process = Process::Stopped;
    assert!(is_wait(&next(&s)));
}

fn any_store() -> impl Strategy<Value = StoreSeen> {
    (
        prop_oneof![
            Just(Source::Live),
            Just(Source::Remembered),
            Just(Source::Asking)
        ],
        prop_oneof![
            Just(None),
            Just(Some("s-1".to_owned())),
            Just(Some("s-2".to_owned()))
        ],
        prop_oneof![
            Just(None),
            Just(Some("7".to_owned())),
            Just(Some("8".to_owned()))
        ],
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(
            |(source, primary, system_identifier, any_identifier, governed)| StoreSeen {
                source,
                primary,
                any_identifier: any_identifier || system_identifier.is_some(),
                system_identifier,
                governed,
            },
        )
}

fn any_content() -> impl Strategy<Value = Content> {
    prop_oneof![
        Just(Content::Empty),
        Just(Content::Unusable("x".into())),
        Just(remains()),
        (15u32..=18, "[78]", any::<bool>()).prop_map(|(major, system_identifier, standby)| {
            Content::Cluster(Cluster {
                major,
                system_identifier,
                standby,
            })
        }),
    ]
}

fn any_mode() -> impl Strategy<Value = Mode> {
    prop_oneof![
        Just(Mode::Primary),
        Just(Mode::Founding),
        Just(Mode::Standby)
    ]
}

fn any_seen() -> impl Strategy<Value = Seen> {
    (
        (
            proptest::option::of(any_store()),
            any_content(),
            any::<bool>(),
            prop_oneof![
                (15u32..=18).prop_map(Programs::Major),
                Just(Programs::Missing("x".into()))
            ],
            prop_oneof![
                Just(Process::Stopped),
                any_mode().prop_map(Process::Running)
            ],
        ),
        (
            proptest::option::of(Just("job".to_owned())),
            any::<bool>(),
            any::<bool>(),
            any::<bool>(),
            proptest::option::of(Just(("x".to_owned(), Duration::from_secs(1)))),
            prop_oneof![
                Just(Duty::Unknown),
                Just(Duty::Standby),
                Just(Duty::Primary),
                any::<bool>().prop_map(|ready| Duty::Copy { ready }),
                Just(Duty::Fenced),
            ],
            any::<bool>(),
        ),
    )
        .prop_map(
            |(
                (store, content, leftover, programs, process),
                (job, certificate, credentials, parameters_tried, backing_off, duty, held),
            )| Seen {
                me: "s-1".into(),
                store,
                content,
                leftover,
                programs,
                process,
                job,
                certificate,
                credentials,
                parameters_tried,
                backing_off,
                duty,
                held,
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]
    #[test]
    fn whatever_is_seen(s in any_seen()) {
        let step = next(&s);
        let store = s.store.as_ref();
        let identifier = store.and_then(|x| x.system_identifier.as_deref());
        let foreign = matches!((&s.content, identifier),
            (Content::Cluster(c), Some(k)) if c.system_identifier != k);
        let running = s.process != Process::Stopped;
        let primary = store.and_then(|x| x.primary.as_deref()) == Some("s-1");

        if s.job.is_some() {
            prop_assert!(is_wait(&step), "two pieces of work at once");
        }
        match step {
            Step::InitDb => {
                prop_assert!(store.is_some_and(|x| !x.any_identifier && x.source == Source::Live));
                prop_assert!(identifier.is_none() && primary && !running);
                prop_assert_eq!(s.content, Content::Empty);
            }
            Step::Clone { replace } => {
                prop_assert!(!running && !foreign && identifier.is_some());
                prop_assert_eq!(s.duty, Duty::Copy { ready: true });
                prop_assert_eq!(replace, s.content != Content::Empty);
                prop_assert!(match s.content {
                    Content::Empty | Content::Cluster(_) => true,
                    Content::Remains(_) => s.held,
                    Content::Unusable(_) => false,
                }, "nobody knows whose that is");
                prop_assert!(!s.leftover);
            }
            Step::Start(mode) => {
                prop_assert!(!running && !foreign && !s.leftover);
                prop_assert!(mode != Mode::Primary, "a primary is promoted, never started");
                prop_assert!(matches!(&s.content, Content::Cluster(c)
                    if Programs::Major(c.major) == s.programs));
                if mode == Mode::Founding {
                    prop_assert!(primary && identifier.is_none());
                    prop_assert!(s.duty == Duty::Unknown && store.is_some_and(|x| !x.governed));
                }
            }
            Step::Found => {
                prop_assert!(primary && identifier.is_some() && !foreign);
                prop_assert!(s.duty == Duty::Unknown && store.is_some_and(|x| !x.governed));
            }
            Step::Serve(mode) => prop_assert_eq!(s.process, Process::Running(mode)),
            Step::Stop(_) => prop_assert!(running),
            Step::ClearLeftover => prop_assert!(s.leftover && !running),
            Step::Wait(_) | Step::Fail(_) => {}
        }
    }
}
