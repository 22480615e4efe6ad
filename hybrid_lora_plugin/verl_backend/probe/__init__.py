"""Probing inside a verl run."""
