"""Talks to engines: asks what they are and offer, runs an attempt and follows it to its proved end,
interrupts, unloads, probes.
"""
