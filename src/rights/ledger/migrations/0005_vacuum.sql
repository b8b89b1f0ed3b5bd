-- After a backlog is drained, or a standby with its dead rows is promoted, there is much to vacuum at once. Without a
-- pause a vacuum wrote 80 MB of WAL in three seconds, most of it whole pages after the promotion's checkpoint, and every
-- commit stood behind it: of requests that were filed meanwhile one in a hundred waited 130 ms rather than 20. So: a
-- thousand changed pages a second, of a million steps a minute or two.
ALTER TABLE ledger.request SET (autovacuum_vacuum_cost_delay = 10, autovacuum_vacuum_cost_limit = 200);
ALTER TABLE ledger.step SET (autovacuum_vacuum_cost_delay = 10, autovacuum_vacuum_cost_limit = 200);
