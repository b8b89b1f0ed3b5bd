-- What is kept. Everything here belongs to the ledger's owner, as whom nobody logs in. Gateways, workers and
-- observers get nothing on these tables: each has a schema of functions of its own, and that is all it can call.

-- Before any function is made: PostgreSQL lets everybody call a new one.
ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC;

CREATE SCHEMA gateway;
CREATE SCHEMA worker;
CREATE SCHEMA observer;
-- What all three may call.
CREATE SCHEMA shared;

-- A target together with the regions whose workers may touch it. A step points here rather than naming both, so that
-- a claim for one target and one region is a walk along one index, also after a target's regions were changed.
-- Rows are never deleted, and steps have no foreign key to here: a check of it would lock the same few rows for every
-- filing at once.
CREATE TABLE ledger.lane (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    target text NOT NULL CHECK (target <> ''),
    regions text[] NOT NULL CHECK (cardinality(regions) >= 1),
    UNIQUE (target, regions)
);

-- Requests that are not ended. Ended ones move to ledger.closed, so that this table stays as small as the work that is
-- left, however many were ever closed: its indexes stay in memory, and a vacuum, which is what finally removes the
-- ciphertext of closed requests, is over in no time.
CREATE TABLE ledger.request (
    id uuid PRIMARY KEY,
    kind text NOT NULL CHECK (kind IN ('deletion', 'access', 'correction', 'opt-out')),
    regimes text[] NOT NULL CHECK (cardinality(regimes) >= 1),
    channel text NOT NULL CHECK (channel IN ('api', 'operator', 'agent', 'registry')),
    state text NOT NULL CHECK (state IN ('awaiting-approval', 'open')),
    received_at timestamptz NOT NULL,
    filed_at timestamptz NOT NULL DEFAULT now(),
    acknowledge_by timestamptz,
    answer_by timestamptz NOT NULL,
    extended_to timestamptz CHECK (extended_to > answer_by),
    extension_reason text CHECK (extension_reason ~ '^[a-z][a-z0-9-]{0,63}$'),
    deadline timestamptz NOT NULL GENERATED ALWAYS AS (coalesce(extended_to, answer_by)) STORED,
    -- Keyed hashes: of all identifiers together, of the idempotency key, of what was asked.
    subject bytea NOT NULL CHECK (octet_length(subject) = 32),
    idempotency bytea CHECK (octet_length(idempotency) = 32),
    content bytea NOT NULL CHECK (octet_length(content) = 32),
    -- The day whose key wraps the request's own key, the wrapped key, and the identifiers under the request's own key.
    epoch date NOT NULL,
    wrapped_key bytea NOT NULL CHECK (octet_length(wrapped_key) > 32),
    sealed bytea NOT NULL CHECK (octet_length(sealed) > 28),
    -- Names of the identifiers, and their keyed hashes of 32 bytes each, one after the other.
    names text[] NOT NULL CHECK (cardinality(names) >= 1),
    hashes bytea NOT NULL,
    CHECK ((extended_to IS NULL) = (extension_reason IS NULL)),
    CHECK (octet_length(hashes) = 32 * cardinality(names))
) WITH (
    -- A row is inserted, hardly ever changed, and deleted.
    fillfactor = 100,
    -- By the number of dead rows and not by the table's size: after a closing, what is dead is somebody's ciphertext.
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
    autovacuum_analyze_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0
);
-- Ciphertext can't be compressed.
ALTER TABLE ledger.request ALTER COLUMN sealed SET STORAGE EXTERNAL;
CREATE UNIQUE INDEX request_idempotency ON ledger.request (idempotency) WHERE idempotency IS NOT NULL;
CREATE INDEX request_by_deadline ON ledger.request (state, deadline, id);
CREATE INDEX request_by_epoch ON ledger.request (epoch);

-- One step per request and target, of requests that are not ended.
--   parked   the request waits for its approval
--   ready    may be claimed
--   leased   a worker has it until due_at
--   waiting  may be claimed from due_at on: it failed, or it settles (erased, and to be looked at once more)
--   done     ended, with outcome and evidence
CREATE TABLE ledger.step (
    -- The foreign key is what makes it impossible to end a request over a step that is left.
    request uuid NOT NULL REFERENCES ledger.request (id),
    lane integer NOT NULL,
    state text NOT NULL CHECK (state IN ('parked', 'ready', 'leased', 'waiting', 'done')),
    deadline timestamptz NOT NULL,
    received_at timestamptz NOT NULL,
    due_at timestamptz,
    -- Drawn anew for every claim; a result counts only with it.
    lease uuid,
    worker text,
    settling boolean NOT NULL DEFAULT false,
    attempts integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    failures integer NOT NULL DEFAULT 0 CHECK (failures BETWEEN 0 AND attempts),
    last_failure text CHECK (last_failure ~ '^[a-z][a-z0-9-]{0,63}$'),
    outcome text CHECK (outcome IN ('absent', 'bounded', 'excepted')),
    until timestamptz,
    section text CHECK (section <> ''),
    evidence jsonb,
    -- What was said of the erasure of a step that settles: part of its evidence when it ends.
    erasure jsonb CHECK (jsonb_typeof(erasure) = 'object'),
    finished_at timestamptz,
    PRIMARY KEY (request, lane),
    CHECK ((state = 'leased') = (lease IS NOT NULL)),
    CHECK ((state = 'leased') = (worker IS NOT NULL)),
    CHECK ((state IN ('leased', 'waiting')) = (due_at IS NOT NULL)),
    CHECK ((state = 'done') = (outcome IS NOT NULL)),
    CHECK ((state = 'done') = (finished_at IS NOT NULL)),
    CHECK ((state = 'done') = (evidence IS NOT NULL)),
    CHECK (evidence IS NULL OR (jsonb_typeof(evidence) = 'object' AND evidence <> '{}')),
    CHECK ((outcome IS NOT DISTINCT FROM 'bounded') = (until IS NOT NULL)),
    CHECK ((outcome IS NOT DISTINCT FROM 'excepted') = (section IS NOT NULL)),
    CHECK (failures = 0 OR last_failure IS NOT NULL),
    CHECK (NOT (settling AND state IN ('parked', 'done'))),
    CHECK (settling OR erasure IS NULL)
) WITH (
    -- A step is claimed, perhaps put back, and done. All of these change the index it is in (see below), so no room
    -- for updates within the page would make them cheaper; but a page that has room keeps a step's versions together.
    fillfactor = 80,
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000,
    autovacuum_analyze_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0
);
-- Two indexes, so that what can't be claimed isn't in the one that claims walk along. With one index, a claim would
-- have to step over everything that is leased or backs off, and these are precisely the earliest ones: with a dead
-- target, all of its backlog, at every claim.
CREATE INDEX step_ready ON ledger.step (lane, deadline, received_at, request) WHERE state = 'ready';
CREATE INDEX step_due ON ledger.step (lane, due_at) WHERE state IN ('leased', 'waiting');

-- Ended requests: no key, no ciphertext, no hash of an identifier by itself, because there is no column for any.
-- Not partitioned: rows come at the end and go at the beginning, a few thousand at a time (worker.forget), so that
-- the space is used again; partitions would need somebody at run time who may make and drop tables.
CREATE TABLE ledger.closed (
    id uuid PRIMARY KEY,
    kind text NOT NULL,
    regimes text[] NOT NULL,
    channel text NOT NULL,
    state text NOT NULL CHECK (state IN ('closed', 'withdrawn')),
    received_at timestamptz NOT NULL,
    filed_at timestamptz NOT NULL,
    acknowledge_by timestamptz,
    answer_by timestamptz NOT NULL,
    extended_to timestamptz,
    extension_reason text,
    subject bytea NOT NULL,
    idempotency bytea,
    content bytea NOT NULL,
    closed_at timestamptz NOT NULL DEFAULT now(),
    -- As ledger.step_view has them.
    steps jsonb NOT NULL,
    CHECK (jsonb_typeof(steps) = 'array' AND jsonb_array_length(steps) >= 1),
    -- Closed: every step has its outcome and evidence. Withdrawn: none has.
    CHECK (state <> 'closed' OR NOT jsonb_path_exists(steps, '$[*] ? (!exists(@.outcome.outcome) || !exists(@.evidence.*))')),
    CHECK (state <> 'withdrawn' OR NOT jsonb_path_exists(steps, '$[*] ? (exists(@.outcome.outcome) || exists(@.evidence))'))
) WITH (
    autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_insert_scale_factor = 0.02,
    autovacuum_analyze_scale_factor = 0.02
);
CREATE UNIQUE INDEX closed_idempotency ON ledger.closed (idempotency) WHERE idempotency IS NOT NULL;
CREATE INDEX closed_by_time ON ledger.closed (state, closed_at, id);

-- Who was erased, by keyed hash: what a restored backup must be cleansed of before it serves, and who must not be
-- taken in again. Kept for good.
CREATE TABLE ledger.erased (
    name text NOT NULL,
    hash bytea NOT NULL CHECK (octet_length(hash) = 32),
    request uuid NOT NULL,
    erased_at timestamptz NOT NULL DEFAULT now(),
    -- Not unique by hash alone: a person may ask again, and two closings at once would wait for each other.
    PRIMARY KEY (hash, name, request)
);
-- It grows in the order of time, and is asked "since when": a few bytes per megabyte do.
CREATE INDEX erased_by_time ON ledger.erased USING brin (erased_at);

-- A step as others see it.
CREATE FUNCTION ledger.step_view(s ledger.step) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT jsonb_strip_nulls(jsonb_build_object(
        'target', l.target,
        'regions', to_jsonb(l.regions),
        'state', s.state,
        'settling', CASE WHEN s.settling THEN true END,
        'attempts', s.attempts,
        'failures', s.failures,
        'last_failure', s.last_failure,
        'due_at', s.due_at,
        'outcome', CASE WHEN s.outcome IS NOT NULL THEN
            jsonb_build_object('outcome', s.outcome, 'until', s.until, 'section', s.section) END,
        'finished_at', s.finished_at))
        -- As it was given, with whatever is null in it.
        || CASE WHEN s.evidence IS NULL THEN '{}' ELSE jsonb_build_object('evidence', s.evidence) END
    FROM ledger.lane l WHERE l.id = s.lane
$$;

-- The end of requests, all of whose steps are done, or none. What identified the person goes with the row.
CREATE FUNCTION ledger.end_requests(ids uuid[], how text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
BEGIN
    INSERT INTO ledger.closed (id, kind, regimes, channel, state, received_at, filed_at, acknowledge_by, answer_by,
                               extended_to, extension_reason, subject, idempotency, content, steps)
    SELECT r.id, r.kind, r.regimes, r.channel, how, r.received_at, r.filed_at, r.acknowledge_by, r.answer_by,
           r.extended_to, r.extension_reason, r.subject, r.idempotency, r.content,
           (SELECT jsonb_agg(ledger.step_view(s) ORDER BY s.lane) FROM ledger.step s WHERE s.request = r.id)
    FROM ledger.request r WHERE r.id = ANY (ids);
    IF how = 'closed' THEN
        INSERT INTO ledger.erased (name, hash, request)
        SELECT r.names[i], substring(r.hashes FROM 32 * i - 31 FOR 32), r.id
        FROM ledger.request r CROSS JOIN LATERAL generate_series(1, cardinality(r.names)) i
        WHERE r.id = ANY (ids) AND r.kind = 'deletion';
    END IF;
    DELETE FROM ledger.step WHERE request = ANY (ids);
    DELETE FROM ledger.request WHERE id = ANY (ids);
END
$$;

-- What the caller is about to be told must be on the quorum when it is: also if the caller's connection says
-- otherwise, and also if this transaction only found what another one wrote, perhaps without getting there.
CREATE FUNCTION ledger.durably() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF current_setting('synchronous_commit') NOT IN ('on', 'remote_apply') THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    -- A commit that wrote nothing waits for nobody.
    PERFORM pg_logical_emit_message(true, 'domicile', '');
END
$$;

-- Which schema this is, and the oldest one that a program may know and still work with it.
CREATE FUNCTION shared.version(OUT version integer, OUT compatible_since integer)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT v.version, v.compatible_since FROM ledger.schema_version v ORDER BY v.version DESC LIMIT 1
$$;
