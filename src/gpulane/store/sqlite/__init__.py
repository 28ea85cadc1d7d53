"""The embedded store: stdlib sqlite3, WAL, synchronous=FULL; one writer thread, one commit for all that
wait.
"""

from gpulane.store.sqlite.store import SqliteStore as SqliteStore
