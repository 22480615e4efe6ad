"""Hydra search-path plugin of Hybrid-LoRA."""
