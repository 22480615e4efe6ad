"""The sending end of a weight sync: in the trainer's process, or beside an engine apart from it."""
