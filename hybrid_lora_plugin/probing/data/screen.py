"""A whole Arrow batch checked at once: which rows are certainly usable, so that no Python object is made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy

from hybrid_lora_plugin.probing.data.layout import TEMPLATE_COLUMNS, Layout

if TYPE_CHECKING:
    import pyarrow

# A text with one of these is not blank for `str.strip`; the few without are left to it.
_VISIBLE = r"[!-~\pL]"


def unproven(batch: pyarrow.RecordBatch, layout: Layout | None = None) -> list[int]:
    """Positions of the rows that must be looked at one by one.

    Never proves a row that ``rows.row_of`` would refuse; the others may be good all the same, such as a column
    of a type not known here, or one with tools.

    Args:
        batch: n rows with any of the columns that ``layout`` names.
        layout: which columns make a row.
    """
    import pyarrow.compute as compute

    layout = layout or Layout()
    names = batch.schema.names
    if not layout.plain:
        return list(range(batch.num_rows))
    chat = pair = numpy.zeros(batch.num_rows, dtype=bool)
    if layout.prompt in names and layout.response in names:
        pair = _has_prompt(batch.column(layout.prompt)) & _is_visible(batch.column(layout.response))
    if layout.messages in names:
        messages = batch.column(layout.messages)
        chat = _ends_with_response(messages)
        # Prompt and response count only in a row without messages.
        pair = pair & _truth(compute.is_null(messages))
    proven = chat | pair
    for name in TEMPLATE_COLUMNS:
        if name in names:
            proven = proven & _truth(compute.is_null(batch.column(name)))
    return numpy.flatnonzero(~proven).tolist()


class _Turns:
    """A column of chats, flattened to turns.

    Attributes:
        chat: ``[turns]`` the row of each turn.
        place: ``[turns]`` its position in that row.
        lengths: ``[n]`` turns of each row, 0 for a null.
        sound: ``[n]`` whether there is at least one turn, all with a text as role and content.
    """

    def __init__(self, column: pyarrow.Array) -> None:
        import pyarrow.compute as compute

        values = column.flatten()
        self.role, self.content = (compute.struct_field(values, name) for name in ("role", "content"))
        self.lengths = compute.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
        self.starts = numpy.cumsum(self.lengths) - self.lengths
        self.chat = numpy.repeat(numpy.arange(len(column)), self.lengths)
        self.place = numpy.arange(len(values)) - self.starts[self.chat]
        self.sound = self.lengths > 0
        textless = ~(_truth(self.role.is_valid()) & _truth(self.content.is_valid()))
        self.sound[self.chat[textless]] = False


def _turns(column: pyarrow.Array) -> _Turns | None:
    """The turns of a column of lists of ``{role, content, …}``; None for any other type."""
    import pyarrow

    if not (pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type)):
        return None
    turn = column.type.value_type
    if not pyarrow.types.is_struct(turn) or any(turn.get_field_index(name) < 0 for name in ("role", "content")):
        return None
    if not all(_is_text(turn.field(name).type) for name in ("role", "content")):
        return None
    return _Turns(column)


def _ends_with_response(column: pyarrow.Array) -> numpy.ndarray:
    """``[n]`` chats with a visible assistant turn after a prompt."""
    import pyarrow
    import pyarrow.compute as compute

    turns = _turns(column)
    if turns is None:
        return numpy.zeros(len(column), dtype=bool)
    assistant = _truth(compute.equal(turns.role, "assistant"))
    last = numpy.zeros(len(column), dtype=numpy.int64)
    numpy.maximum.at(last, turns.chat[assistant], turns.place[assistant])
    good = turns.sound & (last > 0)
    responses = turns.content.take(pyarrow.array((turns.starts + last)[good]))
    good[good] = _is_visible(responses)
    return good


def _has_prompt(column: pyarrow.Array) -> numpy.ndarray:
    """``[n]`` texts that are not empty, or chats."""
    import pyarrow.compute as compute

    if _is_text(column.type):
        return _truth(compute.greater(compute.binary_length(column), 0))
    turns = _turns(column)
    return numpy.zeros(len(column), dtype=bool) if turns is None else turns.sound


def _is_visible(column: pyarrow.Array) -> numpy.ndarray:
    import pyarrow.compute as compute

    if not _is_text(column.type):
        return numpy.zeros(len(column), dtype=bool)
    return _truth(compute.match_substring_regex(column, _VISIBLE))


def _is_text(kind: pyarrow.DataType) -> bool:
    import pyarrow

    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def _truth(values: pyarrow.BooleanArray) -> numpy.ndarray:
    """As NumPy; a null is false."""
    return values.fill_null(False).to_numpy(zero_copy_only=False)
