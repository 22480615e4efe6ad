"""Tensors with drawn values, and their bytes."""

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8]


def bytes_of(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def drawn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(*shape, generator=generator).to(dtype)
    return torch.randint(0, 100, shape, generator=generator, dtype=dtype)


def with_flipped_bit(tensor, bit):
    """A copy with bit ``bit`` of its bytes inverted."""
    copy = tensor.clone(memory_format=torch.contiguous_format)
    bytes_of(copy)[bit // 8] ^= 1 << bit % 8
    return copy
