-- Every statement of the queue's store. `-- name: what it is for` begins one.

-- insert_job: a job becomes durable and waits
INSERT INTO jobs (arrival, id, account, service, state, v, finished_at, size, digest, client_job_id, idempotency_key,
                  job, meta, story)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?);

-- move_job: a live job's claim, start, release, failed attempt ...
UPDATE jobs SET state = ?, v = ?, story = ? WHERE arrival = ?;

-- end_job: the end of a job, recorded once
UPDATE jobs SET state = ?, v = ?, story = ?, finished_at = ?, size = ? WHERE arrival = ?;

-- change_job: another band or priority
UPDATE jobs SET job = ? WHERE arrival = ?;

-- insert_body: the body, or the name of the file that it is in
INSERT INTO bodies (arrival, bytes, file) VALUES (?, ?, ?);

-- insert_result: the result, or the name of the file that it is in
INSERT OR REPLACE INTO results (arrival, bytes, file) VALUES (?, ?, ?);

-- set_account: an account's F
INSERT INTO accounts (band, account, f) VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET f = excluded.f;

-- drop_account: an account that V has overtaken
DELETE FROM accounts WHERE band = ? AND account = ?;

-- set_band: a band's V
INSERT INTO bands (band, v) VALUES (?, ?) ON CONFLICT DO UPDATE SET v = excluded.v;

-- set_node: a node that registered or left
INSERT OR REPLACE INTO nodes (id, boot, name, present, gpus) VALUES (?, ?, ?, ?, ?);

-- set_draining: a gpu drains
INSERT OR IGNORE INTO draining (gpu) VALUES (?);

-- drop_draining: a gpu takes work again
DELETE FROM draining WHERE gpu = ?;

-- set_queue: event number and pause, once per commit
UPDATE queue SET n = ?, paused = ? WHERE one = 1;

-- job_by_id: one record
SELECT arrival, state, v, finished_at, size, digest, client_job_id, idempotency_key, job, story FROM jobs WHERE id = ?;

-- job_by_client: a job by its client's own id
SELECT arrival, state, v, finished_at, size, digest, client_job_id, idempotency_key, job, story FROM jobs
WHERE account = ? AND service = ? AND client_job_id = ?;

-- job_by_key: a job by the idempotency key it came with
SELECT arrival, state, v, finished_at, size, digest, client_job_id, idempotency_key, job, story FROM jobs
WHERE account = ? AND idempotency_key = ?;

-- meta: what adapters and front doors left with a job
SELECT meta FROM jobs WHERE arrival = ?;

-- ended_page: ended jobs, newest first
SELECT arrival, state, v, finished_at, size, digest, client_job_id, idempotency_key, job, story, meta FROM jobs
WHERE arrival < ?1 AND finished_at IS NOT NULL AND (?2 IS NULL OR service = ?2)
  AND (?3 IS NULL OR state IN (SELECT value FROM json_each(?3)))
ORDER BY arrival DESC LIMIT ?4;

-- ended_page_of_state: ended jobs of one state, newest first
SELECT arrival, state, v, finished_at, size, digest, client_job_id, idempotency_key, job, story, meta FROM jobs
WHERE state = ?5 AND arrival < ?1 AND finished_at IS NOT NULL AND (?2 IS NULL OR service = ?2)
ORDER BY arrival DESC LIMIT ?4;

-- ended_page_of_account: ended jobs of one account, newest first
SELECT arrival, state, v, finished_at, size, digest, client_job_id, idempotency_key, job, story, meta FROM jobs
WHERE account = ?5 AND arrival < ?1 AND finished_at IS NOT NULL AND (?2 IS NULL OR service = ?2)
  AND (?3 IS NULL OR state IN (SELECT value FROM json_each(?3)))
ORDER BY arrival DESC LIMIT ?4;

-- body: of one job
SELECT p.bytes, p.file FROM jobs AS j JOIN bodies AS p ON p.arrival = j.arrival WHERE j.id = ?;

-- result: of one job
SELECT p.bytes, p.file FROM jobs AS j JOIN results AS p ON p.arrival = j.arrival WHERE j.id = ?;

-- oldest_ended: what may be forgotten, oldest end first
SELECT arrival, id, finished_at, size FROM jobs WHERE finished_at IS NOT NULL ORDER BY finished_at LIMIT ?;

-- ended_totals: how many ended jobs there are, and how large
SELECT count(*), coalesce(sum(size), 0) FROM jobs WHERE finished_at IS NOT NULL;

-- files_of: the files of a job
SELECT file FROM bodies WHERE arrival = ?1 AND file IS NOT NULL
UNION ALL SELECT file FROM results WHERE arrival = ?1 AND file IS NOT NULL;

-- drop_body: with its job
DELETE FROM bodies WHERE arrival = ?;

-- drop_result: with its job
DELETE FROM results WHERE arrival = ?;

-- drop_job: an ended job is forgotten
DELETE FROM jobs WHERE arrival = ?;

-- all_files: every file that is still somebody's
SELECT file FROM bodies WHERE file IS NOT NULL UNION ALL SELECT file FROM results WHERE file IS NOT NULL;

-- live_jobs: everything that waits or runs, in order of arrival
SELECT arrival, state, v, finished_at, size, digest, client_job_id, idempotency_key, job, story FROM jobs
WHERE finished_at IS NULL ORDER BY arrival;

-- all_accounts: F of everybody
SELECT band, account, f FROM accounts;

-- all_bands: V of every band
SELECT band, v FROM bands;

-- all_nodes: every node that ever registered
SELECT id, boot, name, present, gpus FROM nodes;

-- all_draining: drained gpus
SELECT gpu FROM draining;

-- queue: event number and pause
SELECT n, paused FROM queue WHERE one = 1;
