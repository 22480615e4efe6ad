"""The probing run of criterion ``plop``: how large a module's output is beside that of a random input.

Forward passes of the model as it is; nothing is attached to it and nothing trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.probing.forward import Batch, Passes, negative_log_likelihood
from hybrid_lora_plugin.probing.method import ProbeMethod
from hybrid_lora_plugin.probing.weight_gradients import wide


class FeatureMethod(ProbeMethod):
    """Serves ``plop``. A batch costs one forward pass, and the only state is a number a module.

    The normalised feature norm of arXiv 2506.20629 is ``‖W z‖ / ‖W z'‖``, with z the input of a module at a token and
    z' a Gaussian vector of the same norm. Instead of a draw the root mean square over all of them stands here,
    ``‖W‖_F ‖z‖ / sqrt(d_in)``, so that nothing is left to chance. Biases are left out.

    Attributes:
        layers: the M modules by name.
    """

    warmup_steps = 0
    lr = 0.0

    def __init__(self, model: nn.Module, candidates: Sequence[Candidate], config: ProbeCommandConfig) -> None:
        """Freeze ``model``; it stays as it is."""
        self._model = model.requires_grad_(False).eval()
        self.layers = {candidate.name: model.get_submodule(candidate.name) for candidate in candidates}
        self.replicated = []
        self.rows, self._per_batch = config.probe.most_partitions, config.probe.partitions_per_batch
        self._norms: dict[int, Tensor] = {}
        self._loss = math.nan

    def start(self, passes: Passes) -> None:
        self._passes = passes

    def warm_up(self, batch: Batch, validation: Batch) -> float:
        raise NotImplementedError("this method reads the model as it is")

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        pass

    def finish_warmup(self) -> None:
        pass

    @torch.no_grad()
    def score(self, row: int, batch: Batch) -> tuple[dict[str, Tensor], float]:
        """Once a batch ``feature_norm``: the mean over all tokens that are not padding, ``[M]`` float64 on the CPU."""
        if row % self._per_batch:
            return {}, self._passes.loss(batch) if math.isnan(self._loss) else self._loss
        ranks = self._passes.ranks
        self._sums = torch.zeros(len(self.layers) + 1, dtype=torch.float64, device=ranks.device)
        # Once its own rows are used up, a rank repeats one to keep the others company; its tokens must not count.
        own_rows = len(range(ranks.rank, batch.rows, ranks.size))
        hooks = [
            layer.register_forward_hook(partial(self._on_output, index))
            for index, layer in enumerate(self.layers.values())
        ]
        try:
            for micro, _ in self._passes.micro_batches(batch):
                self._counted = micro.attention_mask.bool() & (own_rows > 0)  # [B', S']
                own_rows -= micro.rows
                self._sums[-1] += negative_log_likelihood(self._model, micro).double()
        finally:
            for hook in hooks:
                hook.remove()
        sums = ranks.sum_(self._sums).cpu()
        self._loss = float(sums[-1]) / batch.response_tokens
        return {"feature_norm": sums[:-1] / int(batch.attention_mask.sum())}, self._loss

    def _on_output(self, index: int, layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        if index not in self._norms:
            # Here and not before: a sharded model holds the whole weight only in a pass.
            self._norms[index] = torch.linalg.vector_norm(wide(layer.weight), dtype=torch.float64)
        z, features = (wide(tensor[self._counted]) for tensor in (inputs[0], output))  # [tokens, d_in], [tokens, d_out]
        if layer.bias is not None:
            features = features - layer.bias
        lengths = torch.linalg.vector_norm(z, dim=1, dtype=torch.float64)
        expected = self._norms[index] * lengths / math.sqrt(layer.in_features)
        ratios = torch.linalg.vector_norm(features, dim=1, dtype=torch.float64) / expected
        # An input of zeros has no direction.
        self._sums[index] += ratios.where(lengths > 0, ratios.new_zeros(())).sum()

    def results(self) -> dict[str, Tensor]:
        return {}
