"""A discrete-event simulator of the core: the same book and the same decide, in virtual time, with seeded
faults.

`run(seed)` plays users, store, engines and operators, checks after every event, and returns a Report. The
same seed gives the same trace, byte for byte. `chaos` plays cards that several engines share, with all that
can go wrong there, and judges by the cards' own logs. Neither knows a socket, the product's store, or a real
clock.
"""

from gpulane.sim.run import Faults, Report, Workload, run

__all__ = ["Faults", "Report", "Workload", "run"]
