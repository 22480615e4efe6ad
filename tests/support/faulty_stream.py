"""Imported by a run's workers as ``external_lib``: one bit of one sync is flipped on its way.

Which sync and which tensor the environment says; without it, importing this changes nothing.
"""

import os

from hybrid_lora_plugin.sync import wire

_pairs = wire.OutgoingWeights._pairs


def _pairs_with_a_flipped_bit(self, tensors, device):
    for name, tensor in _pairs(self, tensors, device):
        if self.header.number == int(os.environ["FAULTY_SYNC"]) and name.startswith(os.environ["FAULTY_TENSOR"]):
            tensor = tensor.clone()
            tensor.reshape(-1).view(wire.torch.uint8)[5] ^= 16
        yield name, tensor


if "FAULTY_SYNC" in os.environ:
    wire.OutgoingWeights._pairs = _pairs_with_a_flipped_bit
