"""Timings of weight syncs in a real colocated run; the harness they start from is in ``tests/support``."""
