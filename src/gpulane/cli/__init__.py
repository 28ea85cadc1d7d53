"""The `gpulane` command. Commands are thin: they read options and call `service`, the API client or a
simulated engine.

Exit status: 0 well, 1 the thing asked for failed (a job that failed, an engine that does not answer), 2
wrong use or settings.
Heavy modules are imported inside the commands, so that `gpulane --help` is quick.
"""

from gpulane.cli.main import main, program

__all__ = ["main", "program"]
