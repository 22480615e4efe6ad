"""The probing run of criteria about the gradient of a frozen weight over batches: is it the same one each time?

Of each batch and module a sketch is kept and the signs of sampled entries; what batches have in common is read off
their products, so no gradient is stored and no sum of squares is mistaken for a signal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hybrid_lora_plugin.candidates import Candidate
from hybrid_lora_plugin.config import ProbeCommandConfig
from hybrid_lora_plugin.probing.forward import Batch
from hybrid_lora_plugin.probing.method import warmup_steps
from hybrid_lora_plugin.probing.methods.svd_lora import SvdLoraMethod
from hybrid_lora_plugin.probing.sketch import WIDTH, GradientSketch
from hybrid_lora_plugin.probing.weight_gradients import weight_gradients


class WeightGradientMethod(SvdLoraMethod):
    """Serves ``signal_to_noise`` and ``sign_consistency`` on the model as it is, and ``residual_gradient`` after the
    warm-up of the paper's probe.

    A batch costs one forward and one backward pass with the products for the weights, and one more of both for
    ``residual_gradient``. State, for M modules and T batches: 5 × 8191 bytes a module and batch (a sketch in float32
    and signs), 9 × 8191 with ``residual_gradient``; 161 and 289 MB of 196 modules and 20 batches. For a moment one
    module's gradient in float32.
    """

    def __init__(self, model: nn.Module, candidates: Sequence[Candidate], config: ProbeCommandConfig) -> None:
        super().__init__(model, candidates, config)
        self._residual = config.criterion == "residual_gradient"
        self.warmup_steps = warmup_steps(config)
        self._loss: float | None = None

    def finish_warmup(self) -> None:
        if self._residual:
            super().finish_warmup()
        else:
            self._optimizer.release()
            self.prepare_scoring()

    def begin_scoring(self, validation_batch: Callable[[int], Batch]) -> None:
        layers = list(self.layers.values())
        self._width = min(WIDTH, max(layer.base.weight.numel() for layer in layers))
        self._sketches = [
            GradientSketch(
                (layer.base.out_features, layer.base.in_features),
                self._width,
                self._probe.seed,
                index,
                self._passes.ranks.device,
            )
            for index, layer in enumerate(layers)
        ]
        if self._residual:
            self._spans = [(span(layer.B.T), span(layer.A)) for layer in layers]

    def score(self, row: int, batch: Batch) -> tuple[dict[str, Tensor], float]:
        """Once a batch ``gradient_sketch`` ``[M, k]`` and ``gradient_signs`` ``[M, k]`` int8 of the base model, and
        ``residual_sketch`` ``[M, k]`` where the adapters were warmed up; on the CPU.
        """
        if row % self._probe.partitions_per_batch:
            return {}, self._passes.loss(batch) if self._loss is None else self._loss
        for layer in self.layers.values():
            layer.active = False
        try:
            self._loss, sketch, sample = self._measure(batch, sampled=True)
        finally:
            for layer in self.layers.values():
                layer.active = True
        measured = {"gradient_sketch": sketch, "gradient_signs": sample.sign().to(torch.int8)}
        if self._residual:
            self._loss, measured["residual_sketch"], _ = self._measure(batch, residual=True)
        return measured, self._loss

    def _measure(
        self, batch: Batch, sampled: bool = False, residual: bool = False
    ) -> tuple[float, Tensor, Tensor | None]:
        layers, ranks = list(self.layers.values()), self._passes.ranks
        dtype = torch.promote_types(layers[0].base.weight.dtype, torch.float32)
        sketches, samples = torch.zeros(2, len(layers), self._width, dtype=dtype, device=ranks.device)

        def add(index: int, delta: Tensor, x: Tensor) -> None:
            if residual:
                outputs, inputs = self._spans[index]
                delta, x = without(delta, outputs), without(x, inputs)
            self._sketches[index].add_(sketches[index], samples[index] if sampled else None, delta, x)

        with weight_gradients(layers, add), _inputs_require_gradients(self._model):
            loss = self._passes.backward(batch, ())
        for layer in layers:
            layer.e.grad = None
        # Sketches are linear: this is the sketch of the whole batch's gradient.
        sketch = ranks.sum_(sketches).cpu()
        return loss, sketch, ranks.sum_(samples).cpu() if sampled else None

    def measurements(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """``gradient_signal``, ``gradient_energy``, ``sign_agreement`` and perhaps ``residual_signal``, ``[T, M]``."""
        return signals_of(rows, [sketch.sampled for sketch in self._sketches])

    def results(self) -> dict[str, Tensor]:
        return super().results() if self._residual else {}


@contextmanager
def _inputs_require_gradients(model: nn.Module) -> Iterator[None]:
    """Let the embeddings require a gradient, so that it reaches each module's output with every parameter frozen."""
    hook = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def span(matrix: Tensor) -> Tensor:
    """An orthonormal basis of what the columns of ``[d, r]`` span: ``[d, ≤ r]``."""
    basis, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    return basis[:, values > 1e-6 * values.max()].to(matrix.dtype)


def without(vectors: Tensor, basis: Tensor) -> Tensor:
    """The part of ``[tokens, d]`` orthogonal to an orthonormal basis ``[d, r]``."""
    return vectors - vectors @ basis @ basis.T


def signals_of(rows: Mapping[str, Tensor], sampled: Sequence[int]) -> dict[str, Tensor]:
    """``gradient_signal``, ``gradient_energy``, ``sign_agreement`` and perhaps ``residual_signal``, ``[T, M]`` float64.

    Args:
        rows: ``gradient_sketch`` and ``gradient_signs``, ``[T, M, k]``, and perhaps ``residual_sketch``.
        sampled: how many of the k entries are there, for each module.
    """
    products = products_of(rows["gradient_sketch"])
    measured = {
        "gradient_signal": mean_square_of_mean(products),
        "gradient_energy": products.diagonal(dim1=1, dim2=2).T.contiguous(),
        "sign_agreement": agreement(rows["gradient_signs"], sampled),
    }
    if "residual_sketch" in rows:
        measured["residual_signal"] = mean_square_of_mean(products_of(rows["residual_sketch"]))
    return measured


def products_of(sketches: Tensor) -> Tensor:
    """Products of every two batches, ``⟨G_t, G_u⟩``: ``[T, M, k] -> [M, T, T]`` float64."""
    return torch.stack([module @ module.T for module in (sketches[:, m].double() for m in range(sketches.shape[1]))])


def mean_square_of_mean(products: Tensor) -> Tensor:
    """``‖E G‖²`` without the noise's share, one value a batch.

    The estimate is the mean product of two different batches, ``U = (‖Σ G_t‖² − Σ ‖G_t‖²) / (T (T − 1))``, which can be
    negative. Row t is its jackknife pseudo-value ``T U − (T − 1) U without t``: their mean is U and their spread that
    of U, where a batch's own mean product would show half of it.

    Args:
        products: ``[M, T, T]`` float64.

    Returns:
        ``[T, M]``. With two batches both rows are U, the one product there is.
    """
    count = products.shape[1]
    own = (products.sum(dim=2) - products.diagonal(dim1=1, dim2=2)) / (count - 1)  # [M, T], with all others
    if count == 2:
        return own.T.contiguous()
    estimate = own.mean(dim=1, keepdim=True)
    return ((2 * (count - 1) * own - count * estimate) / (count - 2)).T.contiguous()


def agreement(signs: Tensor, sampled: Sequence[int]) -> Tensor:
    """Mean over entries of each batch's sign times the sign of their sum; a column's mean is that of ``|Σ_t s_t| / T``.

    Args:
        signs: ``[T, M, k]`` int8.
        sampled: how many of the k entries are there, for each module.

    Returns:
        ``[T, M]`` float64.
    """
    majority = signs.sum(dim=0, dtype=torch.int32).sign()
    counts = torch.tensor(sampled, dtype=torch.float64)
    return torch.stack([(row * majority).sum(dim=1, dtype=torch.int64).double() for row in signs]) / counts
