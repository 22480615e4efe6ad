"""From the user's files to batches.

files      which files an entry of ``probe.files`` stands for
formats    random access to JSONL, Parquet and ``datasets`` folders
screen     checking whole columns at once
rows       checked rows by number
batches    tokens, the validation split, and batches that depend on the seed and their number only
"""
