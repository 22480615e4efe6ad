"""The texts of ``sync_check=logprobs``; trainer and rollout engine turn them into the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

from hybrid_lora_plugin.errors import ConfigurationError

#: tokens of a text below, at most; about 500 are scored with a tokenizer of words and with one of characters
LENGTH = 64
#: tokens of a text of the user's, at most
OWN_LENGTH = 256
#: tokens of the first text whose log-probabilities are compared as they are, from its beginning
GROSS = 32

#: Any texts would do; they only have to stay the same. Those of the task move most: ``hybrid_lora.sync_texts``.
TEXTS = (
    "To add 27 and 58, add the tens and the ones: 20 + 50 = 70 and 7 + 8 = 15, so the sum is 85. To check it, take 58 "
    "away from 85: 85 - 50 = 35 and 35 - 8 = 27, which is the number we began with.",
    "A train leaves at 9:40 and arrives at 12:15. From 9:40 to 12:00 it travels for 2 hours and 20 minutes, and then "
    "for 15 minutes more. The journey takes 2 hours and 35 minutes, or 155 minutes in all. At 80 km an hour it covers "
    "about 207 km.",
    "Let x be the price of one ticket. Three tickets and a drink for 4 dollars cost 31 dollars, so 3x + 4 = 31. "
    "Subtracting 4 from both sides gives 3x = 27, and dividing by 3 gives x = 9. Each ticket costs 9 dollars.",
    'def mean(values):\n    """The average of a list of numbers."""\n    total = 0.0\n    for value in values:\n'
    '        total += value\n    if not values:\n        raise ValueError("no values")\n'
    "    return total / len(values)\n\nprint(mean([1, 2, 3, 4]))\n",
    "Water boils when the pressure of its vapour equals that of the air above it. On a high mountain the air is thin, "
    "so water boils below 100 degrees there, and an egg takes longer to cook. In a pressure cooker the opposite "
    "happens, and food is done sooner.",
    "Question: Why do we see lightning before we hear the thunder? Answer: Light travels far faster than sound. The "
    "flash reaches us at once, while the sound needs about three seconds for every kilometre. Counting the seconds in "
    "between tells how far away the storm is.",
    "The old harbour was quiet in the morning. A fisherman mended his nets, two children threw bread to the gulls, and "
    "somewhere a radio played. When the ferry came in at eight, the square filled with people, and for an hour nobody "
    "remembered how still it had been.",
    "First, wash the rice until the water runs clear. Put it into a pot with one and a half times as much water and a "
    "little salt. Bring it to the boil, cover it, and let it simmer for twelve minutes. Then take it off the heat and "
    "wait ten minutes more before you open the lid.",
)


def fixed_prompts(tokenizer, own: Sequence[str] = ()) -> list[list[int]]:
    """Tokens of each text; a text of which the tokenizer makes fewer than two is left out.

    Args:
        tokenizer: of the model.
        own: ``hybrid_lora.sync_texts``, in place of those above.

    Raises:
        ConfigurationError: the tokenizer makes nothing of any of them.
    """
    texts, length = (own, OWN_LENGTH) if own else (TEXTS, LENGTH)
    # Cut here: asked to, the tokenizer would write that length into the checkpoint's tokenizer.json.
    encoded = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:length] for text in texts]
    prompts = [tokens for tokens in encoded if len(tokens) > 1]
    if not prompts:
        raise ConfigurationError(
            "hybrid_lora.sync_texts: 'logprobs' compares log-probabilities of texts, and of none does the model's "
            "tokenizer make two tokens; give texts that it can encode",
            see="fixed-prompts-without-tokens",
        )
    return prompts
