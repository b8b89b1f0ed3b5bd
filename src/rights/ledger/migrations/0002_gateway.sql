-- What a gateway may do.

-- Takes requests in, each with a step for every target. All or none. For each of the arrays' entries, by number from 1:
--   new       it is in the ledger
--   same      it was there already: the same id or idempotency key, with the same content
--   conflict  the same id or idempotency key, with another content: nothing was done
-- and the id that it has. Regimes, names and regions are lists with commas.
CREATE FUNCTION gateway.file(
    ids uuid[], kinds text[], regimes text[], channels text[], approvals boolean[], received timestamptz[],
    acknowledge timestamptz[], answer timestamptz[], subjects bytea[], idempotencies bytea[], contents bytea[],
    epochs date[], wrapped_keys bytea[], sealeds bytea[], names text[], hashes bytea[],
    targets text[], target_regions text[])
RETURNS TABLE (number integer, how text, request uuid)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
#variable_conflict use_column
DECLARE
    lanes integer[];
    fresh uuid[];
    again uuid[];
BEGIN
    PERFORM ledger.durably();
    IF coalesce(cardinality(targets), 0) = 0 OR cardinality(targets) <> cardinality(target_regions) THEN
        RAISE EXCEPTION 'a request needs a target' USING ERRCODE = 'DR001';
    END IF;

    SELECT array_agg(l.id) INTO lanes
    FROM unnest(targets, target_regions) AS t (target, regions)
    LEFT JOIN ledger.lane l ON l.target = t.target AND l.regions = string_to_array(t.regions, ',');
    IF array_position(lanes, NULL) IS NOT NULL THEN
        INSERT INTO ledger.lane (target, regions)
        SELECT t.target, string_to_array(t.regions, ',') FROM unnest(targets, target_regions) AS t (target, regions)
        ORDER BY 1, 2
        ON CONFLICT DO NOTHING;
        SELECT array_agg(l.id) INTO lanes
        FROM unnest(targets, target_regions) AS t (target, regions)
        JOIN ledger.lane l ON l.target = t.target AND l.regions = string_to_array(t.regions, ',');
    END IF;

    -- In one order, so that two that file the same don't wait for each other in a circle.
    WITH inserted AS (
        INSERT INTO ledger.request (id, kind, regimes, channel, state, received_at, acknowledge_by, answer_by, subject,
                                    idempotency, content, epoch, wrapped_key, sealed, names, hashes)
        SELECT g.id, g.kind, string_to_array(g.regimes, ','), g.channel,
               CASE WHEN g.approval THEN 'awaiting-approval' ELSE 'open' END, g.received, g.acknowledge, g.answer,
               g.subject, g.idempotency, g.content, g.epoch, g.wrapped_key, g.sealed,
               string_to_array(g.names, ','), g.hashes
        FROM unnest(ids, kinds, regimes, channels, approvals, received, acknowledge, answer, subjects, idempotencies,
                    contents, epochs, wrapped_keys, sealeds, names, hashes)
             AS g (id, kind, regimes, channel, approval, received, acknowledge, answer, subject, idempotency,
                   content, epoch, wrapped_key, sealed, names, hashes)
        ORDER BY g.idempotency, g.id
        ON CONFLICT DO NOTHING
        RETURNING id)
    SELECT coalesce(array_agg(id), '{}') INTO fresh FROM inserted;

    -- Those that are ended lie in another table. To be looked for only now, with a new view of the data: whoever
    -- was moving one there had committed before the insert above could succeed.
    SELECT array_agg(r.id) INTO again FROM ledger.request r
    WHERE r.id = ANY (fresh)
      AND (EXISTS (SELECT FROM ledger.closed c WHERE c.id = r.id)
           OR r.idempotency IS NOT NULL
              AND EXISTS (SELECT FROM ledger.closed c WHERE c.idempotency = r.idempotency));
    IF again IS NOT NULL THEN
        DELETE FROM ledger.request WHERE id = ANY (again);
        fresh := ARRAY(SELECT f FROM unnest(fresh) f WHERE f <> ALL (again));
    END IF;

    INSERT INTO ledger.step (request, lane, state, deadline, received_at)
    SELECT r.id, l, CASE r.state WHEN 'open' THEN 'ready' ELSE 'parked' END, r.deadline, r.received_at
    FROM ledger.request r CROSS JOIN unnest(lanes) l WHERE r.id = ANY (fresh);

    IF cardinality(fresh) = cardinality(ids) THEN
        RETURN QUERY SELECT g.n::integer, 'new', g.id FROM unnest(ids) WITH ORDINALITY AS g (id, n);
        RETURN;
    END IF;
    RETURN QUERY
    SELECT g.n::integer,
           CASE WHEN g.id = ANY (fresh) AND g.n = array_position(ids, g.id) THEN 'new'
                WHEN f.content = g.content THEN 'same'
                WHEN f.content IS NOT NULL THEN 'conflict'
                ELSE 'unknown' END,
           coalesce(f.id, g.id)
    FROM unnest(ids, idempotencies, contents) WITH ORDINALITY AS g (id, idempotency, content, n)
    LEFT JOIN LATERAL (
        SELECT x.id, x.content FROM (
            SELECT 1 AS rank, r.id, r.content FROM ledger.request r WHERE r.idempotency = g.idempotency
            UNION ALL SELECT 2, c.id, c.content FROM ledger.closed c WHERE c.idempotency = g.idempotency
            UNION ALL SELECT 3, r.id, r.content FROM ledger.request r WHERE r.id = g.id
            UNION ALL SELECT 4, c.id, c.content FROM ledger.closed c WHERE c.id = g.id) x
        ORDER BY x.rank LIMIT 1) f ON true;
END
$$;

-- A request as others see it; NULL: there is none. Nothing in it identifies the person.
CREATE FUNCTION gateway.read(wanted uuid) RETURNS jsonb
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT jsonb_strip_nulls(jsonb_build_object(
        'id', r.id, 'kind', r.kind, 'regimes', to_jsonb(r.regimes), 'channel', r.channel, 'state', r.state,
        'received_at', r.received_at, 'acknowledge_by', r.acknowledge_by, 'answer_by', r.answer_by,
        'extended_to', r.extended_to, 'extension_reason', r.extension_reason))
        || jsonb_build_object('steps',
            (SELECT jsonb_agg(ledger.step_view(s) ORDER BY s.lane) FROM ledger.step s WHERE s.request = r.id))
    FROM ledger.request r WHERE r.id = wanted
    UNION ALL
    SELECT jsonb_strip_nulls(jsonb_build_object(
        'id', c.id, 'kind', c.kind, 'regimes', to_jsonb(c.regimes), 'channel', c.channel, 'state', c.state,
        'received_at', c.received_at, 'acknowledge_by', c.acknowledge_by, 'answer_by', c.answer_by,
        'extended_to', c.extended_to, 'extension_reason', c.extension_reason, 'closed_at', c.closed_at))
        || jsonb_build_object('steps', c.steps)
    FROM ledger.closed c WHERE c.id = wanted
$$;

-- The subject takes the request back. Possible as long as nothing of theirs can have been erased with a result on
-- record or under way: no step is done, settles, or is in a worker's hands. What was tried and failed stays in the
-- record of the withdrawn request.
CREATE FUNCTION gateway.withdraw(wanted uuid) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE ended text;
BEGIN
    PERFORM ledger.durably();
    PERFORM FROM ledger.request WHERE id = wanted FOR UPDATE;
    IF NOT FOUND THEN
        SELECT state INTO ended FROM ledger.closed WHERE id = wanted;
        RETURN CASE ended WHEN 'withdrawn' THEN 'already' WHEN 'closed' THEN 'too-late' ELSE 'unknown' END;
    END IF;
    -- A claim doesn't lock the request, but it locks its step: after this, none is under way unseen.
    PERFORM FROM ledger.step WHERE request = wanted ORDER BY lane FOR UPDATE;
    IF EXISTS (SELECT FROM ledger.step WHERE request = wanted AND (state IN ('leased', 'done') OR settling)) THEN
        RETURN 'too-late';
    END IF;
    PERFORM ledger.end_requests(ARRAY[wanted], 'withdrawn');
    RETURN 'changed';
END
$$;

-- A person has made sure that the subject is who they say they are.
CREATE FUNCTION gateway.approve(wanted uuid) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE now_is text;
BEGIN
    PERFORM ledger.durably();
    SELECT state INTO now_is FROM ledger.request WHERE id = wanted FOR UPDATE;
    IF NOT FOUND THEN
        SELECT state INTO now_is FROM ledger.closed WHERE id = wanted;
        RETURN CASE now_is WHEN 'closed' THEN 'already' WHEN 'withdrawn' THEN 'too-late' ELSE 'unknown' END;
    ELSIF now_is = 'open' THEN
        RETURN 'already';
    END IF;
    UPDATE ledger.request SET state = 'open' WHERE id = wanted;
    UPDATE ledger.step SET state = 'ready' WHERE request = wanted AND state = 'parked';
    RETURN 'changed';
END
$$;

-- The law's extension, once.
CREATE FUNCTION gateway.extend(wanted uuid, extended timestamptz, reason text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    former timestamptz;
    first timestamptz;
BEGIN
    PERFORM ledger.durably();
    SELECT extended_to, answer_by INTO former, first FROM ledger.request WHERE id = wanted FOR UPDATE;
    IF NOT FOUND THEN
        RETURN CASE WHEN EXISTS (SELECT FROM ledger.closed WHERE id = wanted) THEN 'too-late' ELSE 'unknown' END;
    ELSIF former IS NOT NULL THEN
        RETURN CASE WHEN former = extended THEN 'already' ELSE 'too-late' END;
    ELSIF extended <= first THEN
        RAISE EXCEPTION 'an extension is later than what it extends' USING ERRCODE = 'DR002';
    END IF;
    UPDATE ledger.request SET extended_to = extended, extension_reason = reason WHERE id = wanted;
    UPDATE ledger.step SET deadline = extended WHERE request = wanted AND state <> 'done';
    RETURN 'changed';
END
$$;

-- Requests that are not ended, by deadline, after the given one; of the states given, due before the given time.
CREATE FUNCTION gateway.list_open(states text[], due_before timestamptz, after_time timestamptz, after_id uuid, most integer)
RETURNS TABLE (id uuid, kind text, regimes text[], channel text, state text, received_at timestamptz,
               acknowledge_by timestamptz, deadline timestamptz, extended boolean,
               steps integer, steps_done integer, steps_failing integer)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
    SELECT r.id, r.kind, r.regimes, r.channel, r.state, r.received_at, r.acknowledge_by, r.deadline,
           r.extended_to IS NOT NULL, s.n::integer, s.done::integer, s.failing::integer
    FROM (SELECT x.* FROM unnest(states) AS t (state)
          CROSS JOIN LATERAL (
              SELECT q.* FROM ledger.request q
              WHERE q.state = t.state AND (q.deadline, q.id) > (after_time, after_id) AND q.deadline < due_before
              ORDER BY q.deadline, q.id LIMIT most) x
          ORDER BY x.deadline, x.id LIMIT most) r
    CROSS JOIN LATERAL (
        SELECT count(*) AS n, count(*) FILTER (WHERE p.state = 'done') AS done,
               count(*) FILTER (WHERE p.state <> 'done' AND p.failures > 0) AS failing
        FROM ledger.step p WHERE p.request = r.id) s
    ORDER BY r.deadline, r.id
$$;

-- Ended requests, in the order in which they ended, after the given one.
CREATE FUNCTION gateway.list_ended(wanted text, after_time timestamptz, after_id uuid, most integer)
RETURNS TABLE (id uuid, kind text, regimes text[], channel text, state text, received_at timestamptz,
               acknowledge_by timestamptz, deadline timestamptz, extended boolean, closed_at timestamptz,
               steps integer)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off AS $$
    SELECT c.id, c.kind, c.regimes, c.channel, c.state, c.received_at, c.acknowledge_by,
           coalesce(c.extended_to, c.answer_by), c.extended_to IS NOT NULL, c.closed_at, jsonb_array_length(c.steps)
    FROM ledger.closed c
    WHERE c.state = wanted AND (c.closed_at, c.id) > (after_time, after_id)
    ORDER BY c.closed_at, c.id LIMIT most
$$;
