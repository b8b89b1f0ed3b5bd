//! That what is closed, leased or backing off costs nothing: counted in rows that PostgreSQL touched, not in time.

use domicile::api::names::rights::Role;
use tokio_postgres::Client;

use crate::bounded;
use crate::ledger_bed::*;

/// Open requests that are leased, back off, are ready; and closed ones. Written directly, since it is the ledger's
/// answers that are looked at here.
async fn fill(root: &Client, leased: u32, waiting: u32, ready: u32, closed: u32) {
    let open = leased + waiting + ready;
    root.batch_execute(&format!(
        "SET synchronous_commit = off; \
         INSERT INTO ledger.lane (target, regions) VALUES ('crm', '{{here}}'), ('cache', '{{here}}'); \
         INSERT INTO ledger.request (id, kind, regimes, channel, state, received_at, answer_by, subject, idempotency, \
             content, epoch, wrapped_key, sealed, names, hashes) \
         SELECT ('00000000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, 'deletion', '{{eu-gdpr}}', 'api', 'open', \
             now(), now() + interval '30 days' + n * interval '1 ms', sha256(n::text::bytea), sha256(n::text::bytea), \
             sha256('x'), current_date - n % 3, decode(repeat('ab', 61), 'hex'), decode(repeat('cd', 93), 'hex'), \
             '{{email}}', sha256(n::text::bytea) \
         FROM generate_series(1, {open}) n; \
         INSERT INTO ledger.step (request, lane, state, deadline, received_at, due_at, lease, worker, attempts, failures, last_failure) \
         SELECT id, 1, CASE WHEN n <= {leased} THEN 'leased' WHEN n <= {leased} + {waiting} THEN 'waiting' ELSE 'ready' END, \
             deadline, received_at, CASE WHEN n <= {leased} + {waiting} THEN now() + interval '1 hour' END, \
             CASE WHEN n <= {leased} THEN gen_random_uuid() END, CASE WHEN n <= {leased} THEN 'w' END, 1, \
             CASE WHEN n > {leased} AND n <= {leased} + {waiting} THEN 1 ELSE 0 END, 'unreachable' \
         FROM (SELECT *, row_number() OVER (ORDER BY id) AS n FROM ledger.request) r; \
         INSERT INTO ledger.closed (id, kind, regimes, channel, state, received_at, filed_at, answer_by, subject, \
             idempotency, content, closed_at, steps) \
         SELECT ('00000000-0000-7000-9000-' || lpad(to_hex(n), 12, '0'))::uuid, 'deletion', '{{eu-gdpr}}', 'api', 'closed', \
             now() - interval '1 year', now() - interval '1 year', now() - interval '11 months', sha256(n::text::bytea), \
             sha256(('c' || n)::bytea), sha256('x'), now() - interval '1 year' + n * interval '1 s', \
             '[{{\"target\": \"crm\", \"regions\": [\"here\"], \"state\": \"done\", \"attempts\": 1, \"failures\": 0, \
                \"outcome\": {{\"outcome\": \"absent\"}}, \"evidence\": {{\"rows\": 3}}}}]' \
         FROM generate_series(1, {closed}) n; \
         RESET synchronous_commit"
    ))
    .await
    .unwrap();
}

/// What one statement touched: sequential scans and rows of each table.
async fn touched(root: &mut Client, sql: &str) -> Vec<(String, i64, i64)> {
    let so_far = "SELECT relname::text, coalesce(seq_scan, 0), coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0) \
         FROM pg_stat_xact_user_tables WHERE schemaname = 'ledger' ORDER BY 1";
    let transaction = root.transaction().await.unwrap();
    // They hold what earlier transactions did, too, as long as that isn't passed on.
    let before = transaction.query(so_far, &[]).await.unwrap();
    transaction.batch_execute(sql).await.unwrap();
    let after = transaction.query(so_far, &[]).await.unwrap();
    transaction.rollback().await.unwrap();
    let number = |row: &tokio_postgres::Row, column: usize| row.get::<_, i64>(column);
    before
        .iter()
        .zip(&after)
        .map(|(b, a)| {
            (
                a.get(0),
                number(a, 1) - number(b, 1),
                number(a, 2) - number(b, 2),
            )
        })
        .collect()
}

fn of<'a>(touched: &'a [(String, i64, i64)], table: &str) -> &'a (String, i64, i64) {
    touched.iter().find(|t| t.0 == table).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_walks_over_what_is_closed_leased_or_backing_off() {
    bounded(async {
        let bed = Bed::start(&[("fsync", "off")]).await;
        let mut root = bed.workflow("w").await;
        fill(&root, 20_000, 20_000, 10_000, 50_000).await;
        let one = "'00000000-0000-7000-8000-000000000001'";
        let file = format!(
            "SELECT * FROM gateway.file(ARRAY['00000000-0000-7000-8000-ffffffffffff', {one}]::uuid[], \
             '{{deletion,deletion}}', '{{eu-gdpr,eu-gdpr}}', '{{api,api}}', '{{f,f}}', ARRAY[now(), now()], \
             ARRAY[NULL, NULL]::timestamptz[], ARRAY[now(), now()], ARRAY[sha256('a'), sha256('a')], \
             ARRAY[sha256('new'), sha256('1')], ARRAY[sha256('x'), sha256('x')], ARRAY[current_date, current_date], \
             ARRAY[repeat('k', 61)::bytea, repeat('k', 61)::bytea], ARRAY[repeat('s', 93)::bytea, repeat('s', 93)::bytea], \
             '{{email,email}}', ARRAY[sha256('a'), sha256('a')], '{{crm,cache}}', '{{here,here}}')"
        );
        let finish = "SELECT worker.finish(array_agg(request), array_agg(lane), array_agg(lease), array_agg('done'::text), \
             array_agg(0::float8), array_agg(NULL::text), array_agg('absent'::text), array_agg(NULL::timestamptz), \
             array_agg(NULL::text), array_agg('{\"rows\": 1}'::jsonb)) \
             FROM public.held";
        // Before and after PostgreSQL knows how large the tables are: a plan of the first day must not last.
        for analyzed in [false, true] {
            if analyzed {
                root.batch_execute("ANALYZE ledger.request, ledger.step, ledger.closed").await.unwrap();
            }
            root.batch_execute(
                "DROP TABLE IF EXISTS public.held; \
                 CREATE TABLE public.held AS SELECT * FROM worker.claim('crm', 'here', 'w', 50, 3600)",
            )
            .await
            .unwrap();
            for (what, sql, request, step, closed) in [
                ("claim", "SELECT * FROM worker.claim('crm', 'here', 'w', 50, 30)", 60, 160, 0),
                ("claim of nothing", "SELECT * FROM worker.claim('cache', 'here', 'w', 50, 30)", 0, 0, 0),
                ("finish", finish, 250, 250, 0),
                ("file", &file, 20, 10, 10),
                ("read", &format!("SELECT gateway.read({one})"), 2, 2, 1),
                ("withdraw", &format!("SELECT gateway.withdraw({one})"), 5, 10, 1),
                (
                    "list",
                    "SELECT * FROM gateway.list_open('{awaiting-approval,open}', 'infinity', '-infinity', \
                     '00000000-0000-0000-0000-000000000000', 50)",
                    120,
                    120,
                    0,
                ),
                (
                    "list of ended ones",
                    "SELECT * FROM gateway.list_ended('closed', now() - interval '364 days 20 hours', \
                     '00000000-0000-0000-0000-000000000000', 50)",
                    0,
                    0,
                    60,
                ),
                ("forget", "SELECT worker.forget(11, 100)", 0, 0, 400),
                ("forget nothing", "SELECT worker.forget(24, 100)", 0, 0, 0),
            ] {
                let touched = touched(&mut root.client, sql).await;
                for (table, most) in [("request", request), ("step", step), ("closed", closed)] {
                    let (_, scans, rows) = of(&touched, table);
                    assert_eq!(*scans, 0, "{what} scans {table} (analyzed: {analyzed})");
                    assert!(*rows <= most, "{what} touches {rows} rows of {table} (analyzed: {analyzed})");
                }
            }
            // Counts look at what is open, all of it, and at nothing else.
            let touched = touched(&mut root.client, "SELECT observer.counts()").await;
            assert_eq!((of(&touched, "closed").1, of(&touched, "closed").2), (0, 0));
            assert!(of(&touched, "step").2 <= 110_000);
        }
        let counts = bed.ledger("w", Role::Observer).counts().await.unwrap();
        assert_eq!((counts.open(), counts.epochs.len()), (50_000, 3));
        let crm = &counts.steps[0];
        assert_eq!((crm.leased, crm.waiting, crm.ready), (20_100, 20_000, 9_900));
    })
    .await;
}

/// `DOMICILE_LEDGER_CLOSED=10000000 cargo test --test rights_ledger -- --ignored --nocapture large`
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement: a million open requests and, by default, a million closed ones; minutes, and gigabytes in /tmp"]
async fn large() {
    let number =
        |name: &str, default: u32| std::env::var(name).map_or(default, |v| v.parse().unwrap());
    let closed = number("DOMICILE_LEDGER_CLOSED", 1_000_000);
    let open = number("DOMICILE_LEDGER_OPEN", 1_000_000);
    let bed = Bed::start(&[("fsync", "off"), ("shared_buffers", "512MB")]).await;
    let root = bed.workflow("w").await;
    fill(&root, 100_000, 100_000, open - 200_000, closed).await;
    root.batch_execute("VACUUM ANALYZE ledger.request, ledger.step, ledger.closed")
        .await
        .unwrap();
    println!("{open} open, of which 100000 leased and 100000 backing off; {closed} closed");
    let (gateway, worker) = (
        bed.ledger("w", Role::Gateway),
        bed.ledger("w", Role::Worker),
    );
    let (_dir, keyring) = keys();
    let targets = [target("crm", &["here"]), target("cache", &["here"])];
    let mut times: std::collections::BTreeMap<&str, Vec<f64>> = std::collections::BTreeMap::new();
    let mut note = |what, began: std::time::Instant| {
        times
            .entry(what)
            .or_default()
            .push(began.elapsed().as_secs_f64() * 1e3);
    };
    for n in 0..200 {
        let it = sealed(&keyring, &filing(&format!("{n}@example.org")), 45);
        let began = std::time::Instant::now();
        gateway
            .file(std::slice::from_ref(&it), &targets)
            .await
            .unwrap();
        note("file one", began);
        let began = std::time::Instant::now();
        let claimed = crate::claim(&worker, "crm", 100).await;
        note("claim 100", began);
        let results: Vec<_> = claimed.iter().map(crate::absent).collect();
        let began = std::time::Instant::now();
        assert!(worker.finish(&results).await.unwrap().iter().all(|b| *b));
        note("finish 100", began);
        let began = std::time::Instant::now();
        gateway.read(it.id).await.unwrap();
        note("read", began);
        let began = std::time::Instant::now();
        gateway
            .list(&domicile::rights::ledger::ListFilter::default(), None, 100)
            .await
            .unwrap();
        note("list 100", began);
    }
    for _ in 0..5 {
        let began = std::time::Instant::now();
        bed.ledger("w", Role::Observer).counts().await.unwrap();
        note("counts", began);
    }
    for n in 0..10 {
        let some: Vec<_> = (0..1_000)
            .map(|i| sealed(&keyring, &filing(&format!("{n}-{i}@example.org")), 45))
            .collect();
        let began = std::time::Instant::now();
        gateway.file(&some, &targets).await.unwrap();
        note("file 1000", began);
    }
    for (what, mut of) in times {
        of.sort_by(f64::total_cmp);
        let at = |p: usize| of[(of.len() - 1) * p / 100];
        println!("{what:12} p50 {:8.2} ms   p99 {:8.2} ms", at(50), at(99));
    }
}
