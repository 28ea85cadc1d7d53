"""Durability: one contract (`base`), several stores, one conformance suite. The job's record is the
store's; the gpu is not.
"""
