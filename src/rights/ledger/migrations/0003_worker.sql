-- What a worker may do.

-- Claims up to so many steps of a target for a worker in a region, the earliest deadline first. Each call draws a
-- new lease, and only with it does a result count.
--
-- The commit doesn't wait for the quorum. So a failover may forget a claim, and the new primary may give the same step
-- to another worker; but under another lease, drawn at random, so the first one's result isn't taken. A number that
-- counts up would be the same for both.
CREATE FUNCTION worker.claim(wanted text, region text, who text, most integer, seconds double precision)
RETURNS TABLE (request uuid, lane integer, lease uuid, until timestamptz, kind text, received_at timestamptz,
               filed_at timestamptz, deadline timestamptz, attempts integer, failures integer, settling boolean,
               erasure jsonb, epoch date, wrapped_key bytea, sealed bytea)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
#variable_conflict use_column
DECLARE
    lanes integer[];
    picked tid[];
    token uuid := gen_random_uuid();
BEGIN
    PERFORM set_config('synchronous_commit', 'local', true);
    SELECT array_agg(l.id) INTO lanes FROM ledger.lane l
    WHERE l.target = wanted AND l.regions @> ARRAY[region];
    IF lanes IS NULL THEN
        RETURN;
    END IF;

    -- What is due again goes back among the ready ones first, so that it takes its place by deadline. A lease that
    -- ran out counts as a failure: a step at which workers die must become visible. No more at once than takes a moment.
    SELECT array_agg(d.ctid) INTO picked
    FROM unnest(lanes) AS l (id) CROSS JOIN LATERAL (
        SELECT s.ctid FROM ledger.step s
        WHERE s.lane = l.id AND s.state IN ('leased', 'waiting') AND s.due_at <= now()
        ORDER BY s.due_at LIMIT 1000
        FOR UPDATE SKIP LOCKED) d;
    IF picked IS NOT NULL THEN
        UPDATE ledger.step s
        SET state = 'ready', due_at = NULL, lease = NULL, worker = NULL,
            failures = s.failures + CASE s.state WHEN 'leased' THEN 1 ELSE 0 END,
            last_failure = CASE s.state WHEN 'leased' THEN 'lease-expired' ELSE s.last_failure END
        WHERE s.ctid = ANY (picked);
    END IF;

    -- Locked first and changed by a second statement, which goes straight to the rows.
    SELECT array_agg(p.ctid) INTO picked
    FROM (SELECT x.ctid FROM unnest(lanes) AS l (id) CROSS JOIN LATERAL (
              SELECT s.ctid, s.deadline, s.received_at, s.request FROM ledger.step s
              WHERE s.lane = l.id AND s.state = 'ready'
              ORDER BY s.deadline, s.received_at, s.request LIMIT most
              FOR UPDATE SKIP LOCKED) x
          ORDER BY x.deadline, x.received_at, x.request LIMIT most) p;
    IF picked IS NULL THEN
        RETURN;
    END IF;
    RETURN QUERY
    WITH claimed AS (
        UPDATE ledger.step s
        SET state = 'leased', lease = token, worker = who, attempts = s.attempts + 1,
            due_at = now() + make_interval(secs => seconds)
        WHERE s.ctid = ANY (picked)
        RETURNING s.*)
    SELECT c.request, c.lane, c.lease, c.due_at, r.kind, c.received_at, r.filed_at, c.deadline, c.attempts, c.failures,
           c.settling, c.erasure, r.epoch, r.wrapped_key, r.sealed
    FROM claimed c JOIN ledger.request r ON r.id = c.request
    ORDER BY c.deadline, c.received_at, c.request;
END
$$;

-- Keeps leases for so many seconds from now. True: still held.
CREATE FUNCTION worker.renew(requests uuid[], lanes integer[], leases uuid[], seconds double precision)
RETURNS boolean[]
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE held bigint[];
BEGIN
    PERFORM set_config('synchronous_commit', 'local', true);
    WITH renewed AS (
        UPDATE ledger.step s SET due_at = now() + make_interval(secs => seconds)
        FROM unnest(requests, lanes, leases) WITH ORDINALITY AS g (request, lane, lease, n)
        WHERE s.request = g.request AND s.lane = g.lane AND s.lease = g.lease
        RETURNING g.n)
    SELECT array_agg(n) INTO held FROM renewed;
    RETURN ARRAY(SELECT n = ANY (coalesce(held, '{}')) FROM generate_series(1, cardinality(requests)) n ORDER BY n);
END
$$;

-- What became of claimed steps; by how:
--   done     ended, with outcome and evidence
--   settle   erased and seen absent; to be looked at once more after so many seconds, with what was said so far as evidence
--   retry    failed; again after so many seconds, from the beginning
--   release  given back untouched
-- True: it counts. False: the lease is another's by now, and nothing was changed. A request whose last step is done
-- is closed in the same transaction.
CREATE FUNCTION worker.finish(
    requests uuid[], lanes integer[], leases uuid[], hows text[], seconds double precision[], reasons text[],
    outcomes text[], untils timestamptz[], sections text[], evidences jsonb[])
RETURNS boolean[]
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    counted bigint[];
    touched uuid[];
    whole uuid[];
BEGIN
    PERFORM ledger.durably();
    -- One at a time per request, or two workers that finish its last two steps would each see the other's undone,
    -- and nobody would close it. In one order, so that they don't wait for each other in a circle.
    PERFORM FROM ledger.request WHERE id = ANY (requests) ORDER BY id FOR UPDATE;

    WITH ended AS (
        UPDATE ledger.step s SET
            state = CASE g.how WHEN 'done' THEN 'done' WHEN 'release' THEN 'ready' ELSE 'waiting' END,
            lease = NULL,
            worker = NULL,
            due_at = CASE WHEN g.how IN ('retry', 'settle') THEN now() + make_interval(secs => g.seconds) END,
            settling = CASE g.how WHEN 'settle' THEN true WHEN 'release' THEN s.settling ELSE false END,
            attempts = s.attempts - CASE g.how WHEN 'release' THEN 1 ELSE 0 END,
            failures = s.failures + CASE g.how WHEN 'retry' THEN 1 ELSE 0 END,
            last_failure = CASE g.how WHEN 'retry' THEN g.reason ELSE s.last_failure END,
            outcome = CASE g.how WHEN 'done' THEN g.outcome END,
            until = CASE g.how WHEN 'done' THEN g.until END,
            section = CASE g.how WHEN 'done' THEN g.section END,
            evidence = CASE g.how WHEN 'done' THEN g.evidence END,
            erasure = CASE g.how WHEN 'settle' THEN g.evidence WHEN 'release' THEN s.erasure END,
            finished_at = CASE g.how WHEN 'done' THEN now() END
        FROM unnest(requests, lanes, leases, hows, seconds, reasons, outcomes, untils, sections, evidences)
             WITH ORDINALITY AS g (request, lane, lease, how, seconds, reason, outcome, until, section, evidence, n)
        -- Who has a lease is leased. Said, it would let the index of what is leased seem a way to find these.
        WHERE s.request = g.request AND s.lane = g.lane AND s.lease = g.lease
        RETURNING g.n, s.request, g.how)
    SELECT array_agg(n), array_agg(DISTINCT request) FILTER (WHERE how = 'done') INTO counted, touched FROM ended;

    IF touched IS NOT NULL THEN
        SELECT array_agg(t) INTO whole FROM unnest(touched) t
        WHERE NOT EXISTS (SELECT FROM ledger.step s WHERE s.request = t AND s.state <> 'done');
        IF whole IS NOT NULL THEN
            PERFORM ledger.end_requests(whole, 'closed');
        END IF;
    END IF;
    RETURN ARRAY(SELECT n = ANY (coalesce(counted, '{}')) FROM generate_series(1, cardinality(requests)) n ORDER BY n);
END
$$;

-- Removes records of requests that ended more than so many months ago, a few at a time; says how many. The list of
-- who was erased stays.
CREATE FUNCTION worker.forget(months integer, most integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    old uuid[];
BEGIN
    PERFORM set_config('synchronous_commit', 'local', true);
    IF months < 1 THEN
        RAISE EXCEPTION 'records are kept for a month at least' USING ERRCODE = 'DR003';
    END IF;
    SELECT array_agg(o.id) INTO old
    FROM unnest(ARRAY['closed', 'withdrawn']) AS t (state) CROSS JOIN LATERAL (
        SELECT c.id FROM ledger.closed c
        WHERE c.state = t.state AND c.closed_at < now() - make_interval(months => months)
        ORDER BY c.closed_at, c.id LIMIT most
        FOR UPDATE SKIP LOCKED) o;
    DELETE FROM ledger.closed WHERE id = ANY (old);
    RETURN coalesce(cardinality(old), 0);
END
$$;
