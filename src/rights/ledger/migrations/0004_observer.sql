-- What an observer may do: count what is not ended. Never who.

-- Counted when it is asked for, along indexes that hold only what is not ended. Counters kept up to date by every
-- filing and finishing would be rows that all of them wait for, through the quorum's acknowledgement.
CREATE FUNCTION observer.counts() RETURNS jsonb
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    WITH RECURSIVE
    epochs AS (
        (SELECT epoch FROM ledger.request ORDER BY epoch LIMIT 1)
        UNION ALL
        SELECT (SELECT r.epoch FROM ledger.request r WHERE r.epoch > e.epoch ORDER BY r.epoch LIMIT 1)
        FROM epochs e WHERE e.epoch IS NOT NULL),
    requests AS (
        SELECT r.state, count(*) AS n, min(r.deadline) AS nearest,
               count(*) FILTER (WHERE r.deadline < now()) AS overdue,
               count(*) FILTER (WHERE r.deadline < now() + interval '1 day') AS day,
               count(*) FILTER (WHERE r.deadline < now() + interval '7 days') AS week,
               count(*) FILTER (WHERE r.deadline < now() + interval '30 days') AS month
        FROM ledger.request r GROUP BY r.state),
    steps AS (
        SELECT s.lane,
               count(*) FILTER (WHERE s.state = 'parked') AS parked,
               count(*) FILTER (WHERE s.state = 'ready') AS ready,
               count(*) FILTER (WHERE s.state = 'leased') AS leased,
               count(*) FILTER (WHERE s.state = 'waiting' AND NOT s.settling) AS waiting,
               count(*) FILTER (WHERE s.state = 'waiting' AND s.settling) AS settling,
               count(*) FILTER (WHERE s.state = 'done') AS done,
               count(*) FILTER (WHERE s.state <> 'done' AND s.failures > 0) AS failing,
               count(*) FILTER (WHERE s.state <> 'done' AND s.failures > 0
                                AND now() > s.deadline - 0.2 * (s.deadline - s.received_at)) AS raised,
               count(*) FILTER (WHERE s.state <> 'done' AND s.deadline < now()) AS overdue,
               min(s.deadline) FILTER (WHERE s.state <> 'done') AS nearest,
               min(s.received_at) FILTER (WHERE s.state <> 'done') AS oldest
        FROM ledger.step s GROUP BY s.lane)
    SELECT jsonb_build_object(
        'at', now(),
        -- Whether anything here rests on the workflow's keys.
        'empty', NOT EXISTS (SELECT FROM ledger.request) AND NOT EXISTS (SELECT FROM ledger.closed)
            AND NOT EXISTS (SELECT FROM ledger.erased),
        'requests', coalesce((SELECT jsonb_agg(jsonb_strip_nulls(jsonb_build_object(
            'state', q.state, 'count', q.n, 'nearest_deadline', q.nearest, 'overdue', q.overdue,
            'within_day', q.day, 'within_week', q.week, 'within_month', q.month))) FROM requests q), '[]'),
        'steps', coalesce((SELECT jsonb_agg(jsonb_strip_nulls(jsonb_build_object(
            'target', l.target, 'regions', to_jsonb(l.regions), 'parked', t.parked, 'ready', t.ready, 'leased', t.leased,
            'waiting', t.waiting, 'settling', t.settling, 'done', t.done, 'failing', t.failing, 'raised', t.raised,
            'overdue', t.overdue, 'nearest_deadline', t.nearest, 'oldest_received', t.oldest)) ORDER BY l.target, l.id)
            FROM steps t JOIN ledger.lane l ON l.id = t.lane), '[]'),
        'epochs', coalesce((SELECT jsonb_agg(e.epoch ORDER BY e.epoch) FROM epochs e WHERE e.epoch IS NOT NULL), '[]'))
$$;
