"""From measurements to an allocation: the budget, the selection, the records and their files.

    schema              the records of an allocation; schema_v1 reads older files
    budget              who is fully fine-tuned, within what is allowed; budget_modes says what that is
    select              criterion, normalisation and budget in one step
    storage             allocation.json; measurement_file, strict_json and validate are its parts

A new budget mode is a class in ``budget_modes`` and a row of ``BUDGET_AMOUNTS`` in ``config_selection``.
``select`` is not imported here: who only reads an allocation needs no criteria. ``report.artifact`` writes the folder
with everything people read.
"""

from hybrid_lora_plugin.allocation.budget import Assignment, allocate  # noqa: F401
from hybrid_lora_plugin.allocation.measurement_file import load_measurements  # noqa: F401
from hybrid_lora_plugin.allocation.schema import Allocation  # noqa: F401
from hybrid_lora_plugin.allocation.storage import load_allocation  # noqa: F401
from hybrid_lora_plugin.errors import AllocationError  # noqa: F401
