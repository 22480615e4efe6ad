"""The error of a probing run."""

from hybrid_lora_plugin.config import ConfigurationError


class ProbeError(ConfigurationError):
    """A probe that cannot give a meaningful answer with these data and settings."""
