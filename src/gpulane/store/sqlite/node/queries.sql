-- Every statement of the node's store. `-- name: what it is for` begins one.

-- next_boot: the node's id, made once, and the count of its starts
INSERT INTO node (one, id, boot) VALUES (1, ?, 1) ON CONFLICT DO UPDATE SET boot = boot + 1 RETURNING id, boot;

-- put_gpu_record: the gpu is occupied by this attempt
INSERT OR REPLACE INTO gpu_records (gpu, job, token, claim, engine, stage, written_at, meta)
VALUES (?, ?, ?, ?, ?, ?, ?, ?);

-- drop_gpu_record: the gpu is known idle
DELETE FROM gpu_records WHERE gpu = ? AND token = ?;

-- gpu_records: what ran when the program ended
SELECT gpu, job, token, claim, engine, stage, written_at, meta FROM gpu_records ORDER BY gpu;

-- put_spool: an outcome that the store has not recorded yet
INSERT OR REPLACE INTO spool (job, token, state, failure, used_seconds, result, file) VALUES (?, ?, ?, ?, ?, ?, ?);

-- file_of_spool: the file of an entry, if it has one
SELECT file FROM spool WHERE job = ? AND token = ? AND file IS NOT NULL;

-- spool_unsettled: outcomes to be recorded
SELECT job, token, state, failure, used_seconds, result, file, recorded_state, settled_at FROM spool
WHERE settled_at IS NULL ORDER BY job;

-- spool_settled: outcomes recorded lately, which a store that lost its tail must hear again
SELECT job, token, state, failure, used_seconds, result, file, recorded_state, settled_at FROM spool
WHERE settled_at IS NOT NULL ORDER BY settled_at;

-- settle_spool: the store has recorded it
UPDATE spool SET recorded_state = ?, settled_at = ? WHERE job = ? AND token = ? AND settled_at IS NULL;

-- prune_spool: recorded long enough ago
DELETE FROM spool WHERE settled_at IS NOT NULL AND settled_at <= ? RETURNING file;

-- spool_files: every file that is still some entry's
SELECT file FROM spool WHERE file IS NOT NULL;

-- learn: a value measured here
INSERT OR REPLACE INTO learned (kind, key, value) VALUES (?, ?, ?);

-- learned: all values of a kind
SELECT key, value FROM learned WHERE kind = ? ORDER BY key;

-- put_account_value: something an account set for itself
INSERT OR REPLACE INTO account_values (account, kind, value) VALUES (?, ?, ?);

-- account_value: and wants back
SELECT value FROM account_values WHERE account = ? AND kind = ?;
