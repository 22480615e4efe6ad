"""The error of everything that turns measurements into scores."""

from hybrid_lora_plugin.config import ConfigurationError


class ScoringError(ConfigurationError):
    """Measurements from which no ranking can be made."""
