"""`node.db`: its statements (queries.sql), its migrations, and the thread's side of it (database)."""
