-- The queue: a row per job, live and ended; fair share; nodes and drained gpus; the event number.

CREATE TABLE jobs (
    arrival         INTEGER PRIMARY KEY,  -- event number of its submission
    id              TEXT NOT NULL UNIQUE,
    account         TEXT NOT NULL,
    service         TEXT NOT NULL,
    state           TEXT NOT NULL,
    v               INTEGER NOT NULL,     -- event number of its last change
    finished_at     REAL,                 -- seconds since 1970; NULL while it lives
    size            INTEGER NOT NULL,     -- bytes of body and result
    digest          TEXT NOT NULL,
    client_job_id   TEXT,
    idempotency_key TEXT,
    job             TEXT NOT NULL,        -- JSON: core.model.Job
    meta            BLOB NOT NULL,        -- as it was given
    story           TEXT                  -- JSON: attempts and what they left; NULL before the first claim
) STRICT;

CREATE UNIQUE INDEX jobs_by_client ON jobs (account, service, client_job_id) WHERE client_job_id IS NOT NULL;
CREATE UNIQUE INDEX jobs_by_key ON jobs (account, idempotency_key) WHERE idempotency_key IS NOT NULL;
-- Those of ended jobs are touched once in a job's life.
CREATE INDEX jobs_ended ON jobs (finished_at, size) WHERE finished_at IS NOT NULL;
CREATE INDEX jobs_ended_by_state ON jobs (state, arrival) WHERE finished_at IS NOT NULL;
CREATE INDEX jobs_ended_by_account ON jobs (account, arrival) WHERE finished_at IS NOT NULL;
-- What a start of the program loads, without a look at the ended.
CREATE INDEX jobs_live ON jobs (arrival) WHERE finished_at IS NULL;

-- Bodies and results apart, so that moving a job on does not rewrite them. Over 64 KiB they are files.
CREATE TABLE bodies (arrival INTEGER PRIMARY KEY, bytes BLOB, file TEXT) STRICT;
CREATE TABLE results (arrival INTEGER PRIMARY KEY, bytes BLOB, file TEXT) STRICT;
CREATE INDEX bodies_in_files ON bodies (file) WHERE file IS NOT NULL;
CREATE INDEX results_in_files ON results (file) WHERE file IS NOT NULL;

CREATE TABLE accounts (band INTEGER NOT NULL, account TEXT NOT NULL, f REAL NOT NULL, PRIMARY KEY (band, account))
    STRICT, WITHOUT ROWID;
CREATE TABLE bands (band INTEGER PRIMARY KEY, v REAL NOT NULL) STRICT;
CREATE TABLE nodes (
    id      TEXT PRIMARY KEY,
    boot    INTEGER NOT NULL,
    name    TEXT NOT NULL,
    present INTEGER NOT NULL,
    gpus    TEXT NOT NULL                 -- JSON: id to UUID
) STRICT;
CREATE TABLE draining (gpu TEXT PRIMARY KEY) STRICT;
CREATE TABLE queue (one INTEGER PRIMARY KEY CHECK (one = 1), n INTEGER NOT NULL, paused INTEGER NOT NULL) STRICT;
INSERT INTO queue (one, n, paused) VALUES (1, 0, 0);
