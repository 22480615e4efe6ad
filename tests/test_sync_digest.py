"""Digests of tensors: what they take for equal."""

from __future__ import annotations

import itertools
import random
import re

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_lora_plugin.sync.digest import _WORDS, _mixed, digest_of, digest_soon, keyed_sum
from tests.support.tensors import DTYPES, bytes_of, drawn, with_flipped_bit


def keyed(tensor):
    return keyed_sum(bytes_of(tensor))


both_digests = pytest.mark.parametrize("digest", [digest_of, keyed], ids=["xxh3", "keyed"])


@both_digests
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_digest_is_of_the_bytes_whatever_the_strides(digest, dtype):
    wide = drawn(6, 10, dtype=dtype)
    views = [wide, wide.t(), wide[:, ::2], wide[1:5, 3:7], wide[3], wide[:, 3], wide[2:3].expand(4, 10), wide[0, 0]]
    for view in views:
        assert digest(view) == digest(view.clone(memory_format=torch.contiguous_format))
    assert digest(wide) == digest(wide.reshape(10, 6)) == digest(wide.flatten())
    assert digest(wide) != digest(wide.t())


def test_digest_says_which_kind_it_is():
    data = drawn(5, 7)
    assert digest_of(data) == "xxh3:" + xxhash.xxh3_128_hexdigest(bytes(bytes_of(data).numpy()))
    assert re.fullmatch("[0-9a-f]{16}", keyed(data))


@both_digests
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_single_flipped_bit_changes_the_digest(digest, dtype):
    # 11 elements: bf16, fp16 and uint8 then end in a tail that fills no 32-bit word.
    tensor = drawn(11, dtype=dtype)
    before, bits = digest(tensor), tensor.nbytes * 8
    after = {digest(with_flipped_bit(tensor, bit)) for bit in range(bits)}
    assert len(after) == bits and before not in after


@both_digests
def test_a_flipped_bit_changes_the_digest_wherever_it_is_in_a_tensor_of_several_chunks(digest):
    tensor = drawn(2 * 2 * _WORDS + 7, dtype=torch.bfloat16)
    before, bits, chunk = digest(tensor), tensor.nbytes * 8, 32 * _WORDS
    borders = [0, chunk - 1, chunk, 2 * chunk - 1, 2 * chunk, bits - 17, bits - 1]
    rng = random.Random(0)
    for bit in borders + [rng.randrange(bits) for _ in range(15)]:
        assert digest(with_flipped_bit(tensor, bit)) != before, bit


@both_digests
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_double_sign_flip_changes_the_digest_and_a_plain_sum_misses_many(digest, dtype):
    tensor = drawn(48, dtype=dtype)
    before, plain = digest(tensor), bytes_of(tensor).view(torch.int64).sum()
    missed = 0
    for pair in itertools.combinations(range(48), 2):
        flipped = tensor.clone()
        flipped[list(pair)] *= -1
        assert digest(flipped) != before, pair
        missed += bool(bytes_of(flipped).view(torch.int64).sum() == plain)
    # All pairs that are the highest bit of their 64-bit word, and elsewhere those of opposite signs.
    per_word = 8 // dtype.itemsize
    assert missed >= (48 // per_word) * (48 // per_word - 1) / 2


@both_digests
def test_double_sign_flips_in_a_long_tensor_change_the_digest_and_not_the_plain_sum(digest):
    tensor = drawn(2 * _WORDS + 6)
    before, plain = digest(tensor), bytes_of(tensor).view(torch.int64).sum()
    rng = random.Random(1)
    # Odd elements: the sign is the highest bit of a 64-bit word, and two of them add up to 2**64. One place in each
    # chunk, too, where both have the same factor of their own.
    pairs = [(1, _WORDS + 1), (_WORDS - 1, 2 * _WORDS - 1), (3, 2 * _WORDS + 3)]
    pairs += [[1 + 2 * element for element in rng.sample(range(_WORDS), 2)] for _ in range(10)]
    for pair in pairs:
        tensor[list(pair)] *= -1
        assert bytes_of(tensor).view(torch.int64).sum() == plain
        assert digest(tensor) != before, pair
        tensor[list(pair)] *= -1


@both_digests
def test_swapped_elements_and_rows_change_the_digest(digest):
    tensor = drawn(9, 5)
    before = digest(tensor)
    for one, other in itertools.combinations(range(9), 2):
        swapped = tensor.clone()
        swapped[[one, other]] = swapped[[other, one]]
        assert digest(swapped) != before, (one, other)
    flat = tensor.flatten()
    for one, other in itertools.combinations(range(45), 2):
        swapped = flat.clone()
        swapped[[one, other]] = swapped[[other, one]]
        assert digest(swapped) != before, (one, other)


@both_digests
def test_swapped_chunks_change_the_digest(digest):
    tensor = drawn(2 * _WORDS + 3)
    first, second, rest = tensor.split([_WORDS, _WORDS, 3])
    before = digest(tensor)
    assert digest(torch.cat([second, first, rest])) != before
    # One word from each side of the border, and the same place in both chunks.
    for one, other in ((_WORDS - 1, _WORDS), (5, _WORDS + 5), (0, 2 * _WORDS)):
        swapped = tensor.clone()
        swapped[[one, other]] = swapped[[other, one]]
        assert digest(swapped) != before, (one, other)


@both_digests
@pytest.mark.parametrize("byte", [0, 1, 0x80, 0xFF])
def test_lengths_of_one_repeated_byte_all_have_their_own_digest(digest, byte):
    # Of zeros above all: they add nothing to a sum, so only the length tells truncation and appended zeros.
    digests = {}
    for length in range(200):
        digests.setdefault(digest(torch.full((length,), byte, dtype=torch.uint8)), []).append(length)
    assert [lengths for lengths in digests.values() if len(lengths) > 1] == []


@both_digests
def test_truncation_and_appended_zeros_change_the_digest(digest):
    collisions = []
    for length, zeros in itertools.product(range(1, 30), range(5)):
        # Ending in zeros, so that what is cut off and what is appended looks like what is there.
        data = torch.cat([drawn(length, dtype=torch.uint8, seed=length) + 1, torch.zeros(zeros, dtype=torch.uint8)])
        versions = [data[:shorter] for shorter in range(max(0, len(data) - 9), len(data) + 1)]
        versions += [torch.cat([data, data.new_zeros(more)]) for more in range(1, 10)]
        by_digest = {digest(version): len(version) for version in versions}
        collisions += [(length, zeros)] if len(by_digest) < len(versions) else []
    assert collisions == []


@both_digests
def test_empty_tensors_have_the_digest_of_nothing(digest):
    empty = {digest(torch.empty(shape, dtype=dtype)) for shape in ((0,), (3, 0)) for dtype in DTYPES}
    assert len(empty) == 1
    assert digest(torch.zeros(1, dtype=torch.uint8)) not in empty


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=70), st.binary(max_size=70))
def test_digests_are_equal_exactly_for_equal_bytes(one, other):
    first, second = (torch.frombuffer(bytearray(b"\0" + b), dtype=torch.uint8)[1:] for b in (one, other))
    for digest in (digest_of, keyed):
        assert (digest(first) == digest(second)) == (one == other)


def reference_keyed_sum(data: bytes) -> str:
    """keyed_sum as its docstrings define it, in Python's unbounded integers, word by word."""

    def mixed(value):
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    generator = torch.Generator().manual_seed(0x5EED)
    drawn = torch.randint(-(2**63), 2**63 - 1, (_WORDS,), generator=generator, dtype=torch.int64)
    factors = [factor | 1 for factor in drawn.tolist()]
    words = len(data) // 4
    total = 0
    for place in range(words):
        word = int.from_bytes(data[4 * place : 4 * place + 4], "little", signed=True)
        total += word * factors[place % _WORDS] * (mixed(place // _WORDS) | 1)
    for position, byte in enumerate(data[4 * words :]):
        total += byte * (mixed(-1 - position) | 1)
    return f"{mixed(mixed(total) ^ len(data)):016x}"


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8, 63, 4 * (_WORDS + 5) + 3])
def test_keyed_sum_is_what_it_is_defined_to_be(length):
    rng = random.Random(length)
    data = rng.randbytes(length)
    # One byte more: frombuffer takes no empty buffer.
    assert keyed_sum(torch.frombuffer(bytearray(data + b"\0"), dtype=torch.uint8)[:-1]) == reference_keyed_sum(data)


def test_no_two_chunks_of_sixteen_gigabytes_cancel_opposite_changes_at_one_place():
    # The same change at one place of two chunks cancels where sum or difference of their multipliers has 33 or more
    # low zero bits; a sign is bit 31 of a word.
    low = [(_mixed(index) | 1) % 2**33 for index in range(4096)]
    assert len(set(low)) == len(low) and not set(low) & {2**33 - value for value in low}


@both_digests
@pytest.mark.parametrize("offset", range(1, 9))
def test_unaligned_views_have_the_digest_of_an_aligned_copy(digest, offset):
    # As in a transfer buffer, where a bf16 tensor may begin in the middle of a 32-bit word.
    buffer = drawn(120, dtype=torch.uint8, seed=offset)
    view = buffer.view(torch.bfloat16)[offset : offset + 33]
    assert digest(view) == digest(view.clone())
    assert digest(buffer[offset : offset + 41]) == digest(buffer[offset : offset + 41].clone())


@pytest.mark.parametrize("numel", [0, 1, 1 << 18, (1 << 18) + 1, 1 << 20])
def test_a_digest_begun_is_the_digest(numel):
    tensors = [drawn(numel, seed=seed) for seed in range(9)]
    waiting = [digest_soon(tensor) for tensor in tensors]
    assert [digest() for digest in waiting] == [digest_of(tensor) for tensor in tensors]
