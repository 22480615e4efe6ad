"""verl's custom reward function for every task of this package.

    reward.custom_reward_function.path=pkg://hybrid_lora_plugin.rewards.verl_reward
    reward.custom_reward_function.name=compute_score

verl calls it in threads of its reward workers, once a response. A worker starts the process that compares expressions
at the first one that needs it.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hybrid_lora_plugin.errors import ConfigurationError
from hybrid_lora_plugin.rewards.scorer import Scorer, ScoringLimits
from hybrid_lora_plugin.rewards.terms import excess_length, has_form
from hybrid_lora_plugin.tasks.problem import KINDS

#: Kind by ``data_source``, for rows that do not say theirs in ``extra_info["kind"]``.
KINDS_OF_SOURCES = {
    "HuggingFaceH4/MATH-500": "math",
    "HuggingFaceH4/aime_2024": "integer",
    "Maxwell-Jia/AIME_2024": "integer",
    "math-ai/aime24": "integer",
    "math-ai/aime25": "integer",
    "opencompass/AIME2025": "integer",
    "openai/gsm8k": "integer",
    "TIGER-Lab/MMLU-Pro": "letter",
    "Idavidrein/gpqa": "letter",
    "newfacade/LeetCodeDataset": "code",
}
#: What verl's reward manager hands over beside; only a reward model needs it.
_OF_A_REWARD_MODEL = ("reward_router_address", "reward_model_tokenizer")
_LIMITS = {field.name for field in fields(ScoringLimits)}


@dataclass(frozen=True)
class RewardOptions:
    """What ``reward.custom_reward_function.reward_kwargs`` may say, beside the fields of ``ScoringLimits``.

    Attributes:
        format_weight: added where the response has the form that the prompt asks for.
        require_think: the form also begins with one ``<think>…</think>``.
        length_weight: subtracted from a response of ``length_most`` characters or more, a part of it from
            ``length_free`` on.
        length_free: characters that cost nothing.
        length_most: characters that cost all of ``length_weight``.
        unsandboxed_code: run programs with the rights of the run's user, in no sandbox.

    Raises:
        ConfigurationError: a value that is no number of its kind.
    """

    format_weight: float = 0.0
    require_think: bool = False
    length_weight: float = 0.0
    length_free: int = 8000
    length_most: int = 16000
    unsandboxed_code: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(getattr(RewardOptions, name), bool):
                wanted, usable = "true or false", isinstance(value, bool)
            else:
                wanted = "a finite number, 0 or more"
                usable = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
            if not usable:
                raise ConfigurationError(
                    f"reward.custom_reward_function.reward_kwargs.{name}: {value!r}; wanted {wanted}",
                    see="reward-option-not-usable",
                )
        if self.length_most <= self.length_free:
            raise ConfigurationError(
                f"reward.custom_reward_function.reward_kwargs.length_most: {self.length_most}; wanted more than "
                f"length_free, {self.length_free}",
                see="reward-option-not-usable",
            )


def settings(reward_kwargs: Mapping[str, Any]) -> tuple[RewardOptions, ScoringLimits]:
    """``reward_kwargs`` as options and limits.

    Raises:
        ConfigurationError: one that does not exist, or whose value cannot be used.
    """
    given = {name: value for name, value in reward_kwargs.items() if name not in _OF_A_REWARD_MODEL}
    options = {field.name for field in fields(RewardOptions)}
    unknown = sorted(set(given) - options - _LIMITS)
    if unknown:
        raise ConfigurationError(
            f"reward.custom_reward_function.reward_kwargs.{unknown[0]}: no option of this reward; there are "
            f"{', '.join(sorted(options | _LIMITS))}",
            see="reward-option-not-usable",
        )
    try:
        limits = ScoringLimits(**{name: value for name, value in given.items() if name in _LIMITS})
    except (ConfigurationError, TypeError) as error:
        raise ConfigurationError(
            f"reward.custom_reward_function.reward_kwargs: {error}", see="reward-option-not-usable"
        ) from error
    return RewardOptions(**{name: value for name, value in given.items() if name in options}), limits


def kind_of(data_source: str, extra_info: Mapping[str, Any] | None) -> str:
    """How a row's answer is judged.

    Raises:
        ConfigurationError: the row does not say, and its source is not known.
    """
    kind = (extra_info or {}).get("kind") or KINDS_OF_SOURCES.get(data_source)
    if kind not in KINDS:
        raise ConfigurationError(
            f"data_source: {data_source!r} is not known, and extra_info['kind'] is {kind!r}; write the rows with "
            f"hybrid-lora-data, or give each one of {', '.join(KINDS)} there",
            see="reward-option-not-usable",
        )
    return kind


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    **reward_kwargs: Any,
) -> dict[str, float]:
    """The reward of one response.

    Args:
        data_source: name of the data set.
        solution_str: the decoded response, without special tokens.
        ground_truth: the gold answer, as ``tasks.problem.Problem`` has it.
        extra_info: ``kind``, one of ``tasks.problem.KINDS``, and ``options_count`` of a question with options.
        reward_kwargs: fields of ``RewardOptions`` and of ``ScoringLimits``.

    Returns:
        Always the same keys, all numbers, or verl could not stack them over a batch: ``score``, the reward; ``acc``, 1
        where the answer is right; ``answered``, 1 where there is one; ``format``, 1 where the response has the form
        asked for; ``timed_out``, 1 where judging it took too long; ``length``, in characters.

    Raises:
        ConfigurationError: an option, a kind or a gold that cannot be used.
        RewardError: the response could not be judged.
    """
    options, limits = settings(reward_kwargs)
    kind = kind_of(data_source, extra_info)
    response = solution_str or ""
    count = int((extra_info or {}).get("options_count") or 0) or None
    verdict = scorer(limits, options.unsandboxed_code).score(kind, response, str(ground_truth), count)
    form = has_form(kind, response, options.require_think)
    score = float(verdict.correct) + options.format_weight * form
    score -= options.length_weight * excess_length(len(response), options.length_free, options.length_most)
    return {
        "score": score,
        "acc": float(verdict.correct),
        "answered": float(verdict.answer is not None),
        "format": float(form),
        "timed_out": float(verdict.timed_out),
        "length": float(len(response)),
    }


_STARTING = threading.Lock()


def scorer(limits: ScoringLimits, unsandboxed_code: bool) -> Scorer:
    """The one scorer of this process with these settings; it lives as long as the process."""
    # Two threads that come first at the same time would each start one.
    with _STARTING:
        return _scorer(limits, unsandboxed_code)


@functools.lru_cache(maxsize=4)
def _scorer(limits: ScoringLimits, unsandboxed_code: bool) -> Scorer:
    made = Scorer(limits, unsandboxed_code=unsandboxed_code)
    if unsandboxed_code:
        made.prepare(["code"])
    return made
