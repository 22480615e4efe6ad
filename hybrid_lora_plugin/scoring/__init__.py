"""Criteria: pure functions from sensitivities ``[T, M]`` to module scores ``[M]``.

To add one, write a file beside ``hybrid.py`` whose function carries ``@register_criterion(name,
direction=...)`` and import it at the end of this file; then add its name to the ``choices`` of
``criterion`` in ``hybrid_lora_plugin/config.py``.

Dimension letters: T validation batches, M modules.
"""

from hybrid_lora_plugin.scoring.hybrid import ScoringError, has_signal, hybrid_score, moments  # noqa: F401
from hybrid_lora_plugin.scoring.registry import Criterion, get_criterion, register_criterion  # noqa: F401
