"""The demo: a small arithmetic task, a base model that can almost do it, and a reward to repair it with."""
