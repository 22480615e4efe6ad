"""The error of everything that makes, writes or reads an allocation."""

from hybrid_lora_plugin.config import ConfigurationError


class AllocationError(ConfigurationError):
    """An allocation that cannot be made, written, read or used with this model."""
