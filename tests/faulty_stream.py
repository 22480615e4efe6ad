"""Imported by a run's workers as ``external_lib``: one bit of the third sync is flipped on its way."""

from hybrid_lora_plugin.sync import wire

VICTIM = "model.layers.1.mlp.down_proj"
FAULTY_SYNC = 3

_pairs = wire.OutgoingWeights._pairs


def _pairs_with_a_flipped_bit(self, tensors, device):
    for name, tensor in _pairs(self, tensors, device):
        if self.header.number == FAULTY_SYNC and name.startswith(VICTIM):
            tensor = tensor.clone()
            tensor.reshape(-1).view(wire.torch.uint8)[5] ^= 16
        yield name, tensor


wire.OutgoingWeights._pairs = _pairs_with_a_flipped_bit
