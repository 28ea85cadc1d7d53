"""The live half of the loop: events into the book, decisions carried out on this node's gpus, held calls,
leases, restarts.

`loop` is the step without an await; `gpu` the life of one gpu; `recovery` what a restart finds; `leases` the
heartbeat and the
sweep; `held` the calls whose clients wait; `artifacts` the files of results; `gateway` puts them together
for `service`.
"""
