"""Engines side by side in one process group, and what they hold and take."""
