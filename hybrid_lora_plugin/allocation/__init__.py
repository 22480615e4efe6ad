"""From measurements to an allocation: the budget, the decision, the artifact on disk and what people read of it.

    budget             who is fully fine-tuned, within what is allowed
    decision           criterion, normalisation and budget in one step
    artifact           the folder on disk; consistency, census and measurement_file are its parts
    heatmap score_plot report compare    for people

A new budget mode is a branch of ``open_account`` in ``budget.py`` and a name in the ``choices`` of ``BudgetConfig``.
``decision`` is not imported here: who only reads an allocation needs no criteria.
"""

from hybrid_lora_plugin.allocation.budget import Assignment, allocate  # noqa: F401
from hybrid_lora_plugin.allocation.measurement_file import load_measurements  # noqa: F401
from hybrid_lora_plugin.allocation.storage import Allocation, load_allocation, save_allocation  # noqa: F401
from hybrid_lora_plugin.errors import AllocationError  # noqa: F401
