-- A queue of format 1, dumped: one job waits, one runs its second attempt, one has ended.
BEGIN TRANSACTION;
CREATE TABLE accounts (band INTEGER NOT NULL, account TEXT NOT NULL, f REAL NOT NULL, PRIMARY KEY (band, account))
    STRICT, WITHOUT ROWID;
INSERT INTO "accounts" VALUES(1,'ann',10.0);
INSERT INTO "accounts" VALUES(1,'bob',20.0);
CREATE TABLE bands (band INTEGER PRIMARY KEY, v REAL NOT NULL) STRICT;
CREATE TABLE bodies (arrival INTEGER PRIMARY KEY, bytes BLOB, file TEXT) STRICT;
INSERT INTO "bodies" VALUES(2,X'626F6479',NULL);
INSERT INTO "bodies" VALUES(3,X'7B7D',NULL);
INSERT INTO "bodies" VALUES(4,X'7B7D',NULL);
CREATE TABLE draining (gpu TEXT PRIMARY KEY) STRICT;
INSERT INTO "draining" VALUES('box/gpu0');
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
INSERT INTO "jobs" VALUES(2,'00000000-0000-4000-8000-000000000001','ann','comfyui','queued',2,NULL,4,'d','mine','key','{"id":"00000000-0000-4000-8000-000000000001","account":"ann","service":"comfyui","kind":"prompt","model":"","signature":"","work":{"steps":1,"pixels":1,"images":1},"needs":["node:KSampler"],"labels":[],"engine":null,"band":1,"priority":0,"weight":2.0,"held":false,"holder":"","max_attempts":3,"rerun_lost":true,"arrival":2,"submitted_at":1750000000.0}',X'7B2261223A317D',NULL);
INSERT INTO "jobs" VALUES(3,'00000000-0000-4000-8000-000000000002','bob','comfyui','running',9,NULL,2,'d',NULL,NULL,'{"id":"00000000-0000-4000-8000-000000000002","account":"bob","service":"comfyui","kind":"prompt","model":"","signature":"","work":{"steps":1,"pixels":1,"images":1},"needs":[],"labels":[],"engine":null,"band":1,"priority":0,"weight":1.0,"held":false,"holder":"","max_attempts":3,"rerun_lost":true,"arrival":3,"submitted_at":1750000000.0}',X'7B7D','{"attempts":[{"number":1,"token":"5.c1","claim":"c1","gpu":"box/gpu0","node":"n1","boot":1,"engine":"http://127.0.0.1:7860","state":"failed","claimed_at":1750000000.0,"lease_until":1750000030.0,"charged":10.0,"started_at":1750000000.0,"ended_at":1750000000.0,"suspect_at":null,"failure":{"kind":"engine","code":"out_of_memory","message":"CUDA out of memory","killed_engine":false}},{"number":2,"token":"8.c2","claim":"c2","gpu":"box/gpu1","node":"n1","boot":1,"engine":"http://127.0.0.1:7860","state":"started","claimed_at":1750000000.0,"lease_until":1750000030.0,"charged":10.0,"started_at":1750000000.0,"ended_at":null,"suspect_at":null,"failure":null}],"attempts_counted":2,"avoid":["box/gpu0"],"failure":{"kind":"engine","code":"out_of_memory","message":"CUDA out of memory","killed_engine":false}}');
INSERT INTO "jobs" VALUES(4,'00000000-0000-4000-8000-000000000003','ann','comfyui','succeeded',12,1750000000.0,6,'d',NULL,NULL,'{"id":"00000000-0000-4000-8000-000000000003","account":"ann","service":"comfyui","kind":"prompt","model":"","signature":"","work":{"steps":1,"pixels":1,"images":1},"needs":[],"labels":[],"engine":null,"band":1,"priority":0,"weight":1.0,"held":false,"holder":"","max_attempts":3,"rerun_lost":true,"arrival":4,"submitted_at":1750000000.0}',X'7B7D','{"attempts":[{"number":1,"token":"10.c3","claim":"c3","gpu":"box/gpu0","node":"n1","boot":1,"engine":"http://127.0.0.1:7860","state":"finished","claimed_at":1750000000.0,"lease_until":1750000030.0,"charged":10.0,"started_at":1750000000.0,"ended_at":1750000000.0,"suspect_at":null,"failure":null}],"attempts_counted":1,"ended_by":"10.c3"}');
CREATE TABLE nodes (
    id      TEXT PRIMARY KEY,
    boot    INTEGER NOT NULL,
    name    TEXT NOT NULL,
    present INTEGER NOT NULL,
    gpus    TEXT NOT NULL                 -- JSON: id to UUID
) STRICT;
INSERT INTO "nodes" VALUES('n1',1,'box',1,'{"box/gpu0":"uuid-0","box/gpu1":"uuid-1"}');
CREATE TABLE queue (one INTEGER PRIMARY KEY CHECK (one = 1), n INTEGER NOT NULL, paused INTEGER NOT NULL) STRICT;
INSERT INTO "queue" VALUES(1,13,0);
CREATE TABLE results (arrival INTEGER PRIMARY KEY, bytes BLOB, file TEXT) STRICT;
INSERT INTO "results" VALUES(4,X'646F6E65',NULL);
CREATE UNIQUE INDEX jobs_by_client ON jobs (account, service, client_job_id) WHERE client_job_id IS NOT NULL;
CREATE UNIQUE INDEX jobs_by_key ON jobs (account, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX jobs_ended ON jobs (finished_at, size) WHERE finished_at IS NOT NULL;
CREATE INDEX jobs_ended_by_state ON jobs (state, arrival) WHERE finished_at IS NOT NULL;
CREATE INDEX jobs_ended_by_account ON jobs (account, arrival) WHERE finished_at IS NOT NULL;
CREATE INDEX jobs_live ON jobs (arrival) WHERE finished_at IS NULL;
CREATE INDEX bodies_in_files ON bodies (file) WHERE file IS NOT NULL;
CREATE INDEX results_in_files ON results (file) WHERE file IS NOT NULL;
PRAGMA user_version = 1;
COMMIT;
