"""The scheduling core: data in, data out. It never reads a clock, a socket or a random number, and never
logs.

Five primitives make it up:

Job       one unit of GPU work that a client asked for. Survives restarts. (`model`)
Event     a fact, in the past tense: a job was submitted, a gpu was claimed, an engine was lost. (`events`)
Book      everything the scheduler knows, as told by the events. `apply(event, now)` records a fact and
checks that it is
          legal; `check()` holds the book against its own invariants. (`book`)
Decision  a wish, in the imperative: start this job on that gpu; ask me again then. (`decisions`)
Policy    the settings by which `decide` ranks and places. (`policy`)

and one loop drives them, live or simulated:

    event -> book.apply(event, now) -> decide(book, policy, now) -> decisions -> the shell carries them out
    -> events

`decide` changes nothing. A decision is only a proposal until the store's compare-and-set has accepted it (the
claim); acceptance or refusal comes back as an event. Between proposal and answer the book marks the pair as
pending, so that it is not proposed again. Time is `now`, seconds of one monotonic clock, always passed in.
"""
