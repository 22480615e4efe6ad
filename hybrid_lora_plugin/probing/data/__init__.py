"""From the user's files to batches.

files         which files an entry of ``probe.files`` stands for
store         what a data file can do: one pass over it, then rows by number
json_files    JSON lines and arrays, also compressed
formats       Parquet, folders of ``datasets``, the hub
screen        checking whole columns at once
layout        which columns make a row
turns         the turns of a chat, checked
rows          checked rows by number
template      the chat template, given turns as a server would give them
conversation  where the responses lie in a rendered conversation
tokens        tokens of a row, and which are trained
findings      what the user is told
selection     which rows are held out and which are trained on
batches       batches that depend on the seed and their number only
"""
