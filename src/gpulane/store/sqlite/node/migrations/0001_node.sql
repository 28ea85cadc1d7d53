-- What one machine must know by itself, whatever became of the queue's store.

CREATE TABLE node (one INTEGER PRIMARY KEY CHECK (one = 1), id TEXT NOT NULL, boot INTEGER NOT NULL) STRICT;

CREATE TABLE gpu_records (
    gpu        TEXT PRIMARY KEY,
    job        TEXT NOT NULL,
    token      TEXT NOT NULL,
    claim      TEXT NOT NULL,
    engine     TEXT NOT NULL,
    stage      TEXT NOT NULL,
    written_at REAL NOT NULL,
    meta       BLOB NOT NULL
) STRICT;

CREATE TABLE spool (
    job            TEXT NOT NULL,
    token          TEXT NOT NULL,
    state          TEXT NOT NULL,
    failure        TEXT,            -- JSON: core.model.Failure
    used_seconds   REAL NOT NULL,
    result         BLOB,
    file           TEXT,            -- where a large result is
    recorded_state TEXT,            -- what the store recorded, once it answered
    settled_at     REAL,
    PRIMARY KEY (job, token)
) STRICT;
CREATE INDEX spool_unsettled ON spool (job) WHERE settled_at IS NULL;
CREATE INDEX spool_settled ON spool (settled_at) WHERE settled_at IS NOT NULL;

CREATE TABLE learned (kind TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, PRIMARY KEY (kind, key))
    STRICT, WITHOUT ROWID;
CREATE TABLE account_values (account TEXT NOT NULL, kind TEXT NOT NULL, value BLOB NOT NULL, PRIMARY KEY (account, kind))
    STRICT;
