"""From scores to an allocation: the budget, the artifact on disk, its heat map and its report.

A new budget mode or overflow rule is a branch of its own in ``budget.py`` and a name in the ``choices`` of
``BudgetConfig``.
"""

from hybrid_lora_plugin.allocation.artifact import Allocation, load_allocation, save_allocation  # noqa: F401
from hybrid_lora_plugin.allocation.budget import Assignment, allocate  # noqa: F401
from hybrid_lora_plugin.allocation.errors import AllocationError  # noqa: F401
