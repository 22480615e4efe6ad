r"""Gold answers of real evaluation sets against themselves, rewritten, and against wrong neighbours: who is right?

    python -m benchmarks.reward_accuracy DATA_FOLDER [--out FOLDER] [--write docs/rewards.md] [--scorers ours,…]

DATA_FOLDER has ``math500.jsonl``, ``aime24.jsonl``, ``aime25.jsonl`` and ``gsm8k.jsonl``, one object with ``answer`` a
line (GSM8K's ends with ``#### N``). A rewriting means the same as its gold, a neighbour something else; both are made
from the gold's text by rule and put into a box, so that what is measured is the comparison. verl 0.9.1's own scorers
get the same answers, each in the form that it looks for: ``gsm8k`` behind ``####``, ``math_dapo`` behind ``Answer:``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

from benchmarks.pages import save_figures, write_page
from hybrid_lora_plugin.rewards.scorer import Scorer

BEGIN, END = "<!-- accuracy: begin -->", "<!-- accuracy: end -->"
#: file: name of the set, verl's data_source for it, kind of its answers
SETS = {
    "math500": ("MATH-500", "HuggingFaceH4/MATH-500", "math"),
    "aime24": ("AIME-24", "HuggingFaceH4/aime_2024", "integer"),
    "aime25": ("AIME-25", "math-ai/aime25", "integer"),
    "gsm8k": ("GSM8K", "openai/gsm8k", "integer"),
}
Rule = Callable[[str], str | None]


@dataclass(frozen=True)
class Pair:
    """A gold, an answer made from it by a rule, and whether that is right."""

    gold: str
    answer: str
    rule: str
    right: bool


# -- kinds of golds ---------------------------------------------------------------------------------------------------

_FRACTION = re.compile(r"(-?)\\[dt]?frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))")
_LIST = re.compile(r"(?!.*[(\[{]).*,.*")
_PAIR = re.compile(r"(?:\\left)?\s*([(\[])(.*?)(?:\\right)?\s*([)\]])")


def integer(gold: str) -> int | None:
    """A whole number, with or without separators of thousands."""
    text = gold.removeprefix("\\$").replace(",\\!", ",").replace(" ", "")
    return int(text.replace(",", "")) if re.fullmatch(r"-?\d{1,3}(,\d{3})+|-?\d+", text) else None


def number(gold: str) -> Fraction | None:
    """A whole number, a decimal, or a fraction of whole numbers."""
    if (whole := integer(gold)) is not None:
        return Fraction(whole)
    if re.fullmatch(r"-?\d*\.\d+", gold):
        return Fraction(gold)
    if match := _FRACTION.fullmatch(gold):
        upper, lower = int(match[2] or match[3]), int(match[4] or match[5])
        return Fraction(-upper if match[1] else upper, lower)
    return None


def decimal(value: Fraction) -> str | None:
    """A number as a decimal, if it has one that ends."""
    for places in range(12):
        if (value * 10**places).denominator == 1:
            digits = f"{abs(int(value * 10**places)):0{places + 1}d}"
            point = f"{digits[:-places]}.{digits[-places:]}" if places else digits
            return ("-" if value < 0 else "") + point
    return None


def grouped(gold: str, separator: str) -> str | None:
    """A whole number of four digits or more with separators of thousands."""
    whole = integer(gold)
    return None if whole is None or abs(whole) < 1000 else f"{whole:,}".replace(",", separator)


def parts(gold: str) -> tuple[str, list[str], str] | None:
    """Brackets and elements of a pair or an interval."""
    match = _PAIR.fullmatch(gold.strip())
    if match is None or any(bracket in match[2] for bracket in "()[]"):
        return None
    return match[1], [part.strip() for part in match[2].split(",")], match[3]


# -- rewritings -------------------------------------------------------------------------------------------------------


def _of_number(make: Callable[[Fraction], str | None]) -> Rule:
    def rule(gold: str) -> str | None:
        value = number(gold)
        made = None if value is None else make(value)
        return None if made == gold else made

    return rule


def _replaced(pattern: str, by: str) -> Rule:
    def rule(gold: str) -> str | None:
        made = re.sub(pattern, by, gold)
        return None if made == gold else made

    return rule


def _whole(form: str) -> Rule:
    return lambda gold: None if integer(gold) is None else form.format(integer(gold))


def _interval_as_inequality(gold: str) -> str | None:
    found = parts(gold.removeprefix(r"x \in").strip())
    if found is None or len(found[1]) != 2 or not (gold.startswith("x") or "[" in gold or "]" in gold):
        return None
    left, (low, high), right = found
    up_to, from_on = ("<" if right == ")" else r"\le"), (">" if left == "(" else r"\ge")
    if low == r"-\infty":
        return f"x {up_to} {high}"
    if high == r"\infty":
        return f"x {from_on} {low}"
    return f"{low} {'<' if left == '(' else 'LE'} x {up_to} {high}".replace("LE", r"\le")


def _listed_otherwise(gold: str) -> str | None:
    # A number with separators is no list.
    if integer(gold) is not None or not _LIST.fullmatch(gold):
        return None
    return ", ".join(reversed([part.strip() for part in gold.split(",")]))


def _terms_otherwise(gold: str) -> str | None:
    terms = re.findall(r"[+-]?\s*[^+\-]+", gold) if re.fullmatch(r"[\w\s^{}+\-\\]*[a-z][\w\s^{}+\-\\]*", gold) else []
    if len(terms) < 2 or re.search(r"\\text|\\mbox|\{[^}]*[+-]|\\(?!sqrt|pi)", gold):
        return None
    signed = [term if term[0] in "+-" else "+" + term for term in terms]
    return "".join(reversed(signed)).removeprefix("+")


def _proper(gold: str) -> bool:
    return not re.search(r"text|mbox|_", gold)


REWRITINGS: dict[str, Rule] = {
    "between dollars": lambda gold: f"${gold}$",
    "in braces": lambda gold: f"{{{gold}}}",
    "with a full stop": lambda gold: gold + ".",
    "with thin spaces": lambda gold: rf"\,{gold}\," if _proper(gold) else None,
    r"as \displaystyle": lambda gold: rf"\displaystyle {gold}" if _proper(gold) else None,
    "named": lambda gold: f"x = {gold}" if number(gold) is not None else None,
    r"as \dfrac": _replaced(r"\\frac", r"\\dfrac"),
    r"as \tfrac": _replaced(r"\\d?frac", r"\\tfrac"),
    "fraction with a slash": _of_number(lambda v: None if v.denominator == 1 else f"{v.numerator}/{v.denominator}"),
    "fraction not reduced": lambda gold: (
        rf"\frac{{{2 * number(gold).numerator}}}{{{2 * number(gold).denominator}}}"
        if number(gold) is not None and number(gold).denominator > 1
        else None
    ),
    "sign in the numerator": _replaced(r"^-\\frac\{(\d+)\}", r"\\frac{-\1}"),
    "decimal": _of_number(decimal),
    "decimal as a fraction": lambda gold: (
        rf"\frac{{{number(gold).numerator}}}{{{number(gold).denominator}}}" if "." in gold and number(gold) else None
    ),
    "decimal with a zero": lambda gold: gold + "0" if re.fullmatch(r"-?\d*\.\d+", gold) else None,
    "whole number with decimals": _whole("{}.0"),
    "whole number with zeros in front": lambda gold: f"{integer(gold):04d}" if (integer(gold) or -1) > 0 else None,
    "thousands with a comma": lambda gold: grouped(gold, ","),
    "thousands with {,}": lambda gold: grouped(gold, "{,}"),
    r"thousands with ,\!": lambda gold: grouped(gold, ",\\!"),
    "thousands without a comma": lambda gold: str(integer(gold)) if "," in gold and integer(gold) is not None else None,
    "whole number with a unit": _whole(r"{}\text{{ units}}"),
    "whole number in dollars": _whole(r"\${}"),
    "without its unit": _replaced(r"(?<=.)\s*\\(?:text|mbox)\{[^}]*\}(?:\^2)?$|\^\\circ|^\\\$", ""),
    "degrees in words": _replaced(r"\^\\circ", r"\\text{ degrees}"),
    "degrees in braces": _replaced(r"\^\\circ", r"^{\\circ}"),
    "words without their command": _replaced(r"^\\text\{\(?(\w+)\)?\}$", r"\1"),
    "words in bold": _replaced(r"^\\text\{(.*)\}$", r"\\textbf{\1}"),
    "product with a point": _replaced(r"(\d)\s*(\\(?:pi|sqrt))", r"\1 \\cdot \2"),
    "root in braces": _replaced(r"\\sqrt(\d)", r"\\sqrt{\1}"),
    "terms in another order": _terms_otherwise,
    "list in another order": _listed_otherwise,
    "list as a set": lambda gold: rf"\{{{gold}\}}" if _listed_otherwise(gold) else None,
    "brackets with sizes": lambda gold: (
        rf"\left{parts(gold)[0]} {', '.join(parts(gold)[1])} \right{parts(gold)[2]}" if parts(gold) else None
    ),
    "brackets without spaces": lambda gold: (
        f"{parts(gold)[0]}{','.join(parts(gold)[1])}{parts(gold)[2]}" if parts(gold) else None
    ),
    "interval as an inequality": _interval_as_inequality,
    "matrix in other brackets": _replaced("pmatrix", "bmatrix"),
    "base in braces": _replaced(r"_(\d)$", r"_{\1}"),
    "base without braces": _replaced(r"_\{(\d)\}$", r"_\1"),
    "plus and minus apart": _replaced(r"^([^,{]*?)(\S+) \\pm (.*)$", r"\1\2 + \3, \1\2 - \3"),
    "without what it solves for": _replaced(r"^[xy] (?:=|\\in) ?|^x=", ""),
}
#: For whole numbers, which are compared as digits: neither fractions nor terms.
OF_DIGITS = (
    "between dollars", "in braces", "with a full stop", "with thin spaces", "named", "whole number with decimals",
    "whole number with zeros in front", "thousands with a comma", "thousands with {,}", r"thousands with ,\!",
    "whole number with a unit", "whole number in dollars",
)  # fmt: skip


# -- neighbours -------------------------------------------------------------------------------------------------------


def _approximated(gold: str) -> str | None:
    if re.fullmatch(r"\d*\s*\\pi", gold):
        return f"{int(gold.split(chr(92))[0] or 1) * 3.141592653589793:.8f}"
    if match := re.fullmatch(r"(-?\d*)\s*\\sqrt\{?(\d+)\}?", gold):
        return f"{int(match[1] + '1' if match[1] in ('', '-') else match[1]) * int(match[2]) ** 0.5:.8f}"
    value = number(gold)
    return f"{float(value):.6f}" if value is not None and decimal(value) is None else None


def _swapped(gold: str) -> str | None:
    found = parts(gold)
    if found is None or found[1] == found[1][::-1]:
        return None
    return f"{found[0]}{', '.join(reversed(found[1]))}{found[2]}"


NEIGHBOURS: dict[str, Rule] = {
    "one more": lambda gold: (
        f"{gold} + 1" if _proper(gold) and not re.search(r"[,=()\[]|matrix|circ|\\\$", gold) else None
    ),
    "whole number one more": lambda gold: str(integer(gold) + 1) if integer(gold) is not None else None,
    "the other sign": lambda gold: decimal(-number(gold)) if number(gold) else None,
    "ten times": _of_number(lambda v: decimal(10 * v) if v else None),
    "upside down": lambda gold: (
        rf"\frac{{{number(gold).denominator}}}{{{number(gold).numerator}}}"
        if number(gold) and abs(number(gold).numerator) != number(gold).denominator and number(gold).denominator > 1
        else None
    ),
    "rounded": _approximated,
    "or another": lambda gold: rf"{gold} \text{{ or }} 77" if number(gold) is not None else None,
    "beside another": lambda gold: f"{gold}, 77" if number(gold) is not None else None,
    "an equation that ends with it": lambda gold: f"7 = 77 = {gold}" if number(gold) is not None else None,
    "an equation of numbers": lambda gold: f"77 = {gold}" if number(gold) is not None else None,
    "elements swapped": _swapped,
    "other brackets": lambda gold: (
        f"{'[' if parts(gold)[0] == '(' else '('}{', '.join(parts(gold)[1])}{parts(gold)[2]}" if parts(gold) else None
    ),
    "an element missing": lambda gold: gold.rpartition(",")[0] if _listed_otherwise(gold) else None,
    "an element more": lambda gold: f"{gold}, 77" if _listed_otherwise(gold) else None,
    "as a tuple": lambda gold: f"({gold})" if _listed_otherwise(gold) else None,
    "other words": lambda gold: r"\text{other}" if re.fullmatch(r"\\text\{.*\}", gold) else None,
    "letters in another order": lambda gold: (
        rf"\text{{{match[1][::-1]}}}"
        if (match := re.fullmatch(r"\\text\{(\w{3,})\}", gold)) and match[1] != match[1][::-1]
        else None
    ),
    "another base": _replaced(r"_\{?(\d)\}?$", "_3"),
    "no base": _replaced(r"_\{?(\d)\}?$", ""),
    "another unit": _replaced(r"\\(text|mbox)\{ (cents|cm|inches)\}", r"\\text{ miles}"),
    "a sign turned": lambda gold: (
        gold.replace("+", "-", 1) if "+" in gold and "\\pm" not in gold and "," not in gold else None
    ),
    "one of two": _replaced(r"^([^,{]*?\S+) \\pm (.*)$", r"\1 + \2"),
    "a matrix turned": lambda gold: gold.replace("-", "") if "matrix" in gold and "-" in gold else None,
    "an operation not done": lambda gold: rf"\int_0^{{{gold}}} dx" if integer(gold) is not None else None,
    "nothing": lambda gold: " ",
}
OF_WRONG_DIGITS = (
    "whole number one more", "the other sign", "ten times", "or another", "beside another",
    "an equation that ends with it", "an equation of numbers", "an operation not done", "nothing",
)  # fmt: skip


def pairs_of(gold: str, kind: str) -> list[Pair]:
    """All that the rules make of a gold."""
    made = [Pair(gold, gold, "itself", True)]
    for rules, digits, right in ((REWRITINGS, OF_DIGITS, True), (NEIGHBOURS, OF_WRONG_DIGITS, False)):
        for name, rule in rules.items():
            if (kind == "math" or name in digits) and (answer := rule(gold)) is not None:
                made.append(Pair(gold, answer, name, right))
    return made


# -- scorers ----------------------------------------------------------------------------------------------------------

Judge = Callable[[Pair, str, str], bool]


def verl_judges() -> dict[str, Judge]:
    """verl's own scorers, each given an answer in the form that it looks for."""
    from verl.utils import reward_score
    from verl.utils.reward_score import gsm8k, math_dapo, math_reward, math_verify

    # One process instead of four, started before anything counts: by itself it scores 0 what it judges at its start.
    math_verify._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    math_verify.compute_score("\\boxed{1}", "1", timeout=300)

    def default(pair: Pair, source: str, kind: str) -> bool:
        response = f"#### {pair.answer}" if source == "openai/gsm8k" else boxed(pair)
        found = reward_score.default_compute_score(source, response, pair.gold)
        return (found["score"] if isinstance(found, dict) else found) > 0

    return {
        "verl's default": default,
        "math_reward": lambda pair, *_: math_reward.compute_score(boxed(pair), pair.gold) > 0,
        "math_dapo": lambda pair, *_: math_dapo.compute_score(f"Answer: {pair.answer}", pair.gold)["score"] > 0,
        "math_verify": lambda pair, *_: math_verify.compute_score(boxed(pair), pair.gold) > 0,
        "gsm8k": lambda pair, *_: gsm8k.compute_score(f"#### {pair.answer}", pair.gold) > 0,
    }


def boxed(pair: Pair) -> str:
    """A response that ends with the answer in a box."""
    return rf"So it is $\boxed{{{pair.answer}}}$."


def measure(folder: Path, names: list[str]) -> dict:
    """Judge every pair by every scorer."""
    result: dict = {"sets": {}, "rules": {}, "wrong": []}
    with Scorer() as scorer:
        scorer.prepare(["math"])
        judges: dict[str, Judge] = {"ours": lambda pair, _, kind: scorer.score(kind, boxed(pair), pair.gold).correct}
        judges |= verl_judges() if names != ["ours"] else {}
        judges = {name: judge for name, judge in judges.items() if name in names or not names}
        known: dict = {}
        rules = {name: Counter() for name in judges}
        for file, (title, source, kind) in SETS.items():
            rows = [json.loads(line)["answer"] for line in (folder / f"{file}.jsonl").read_text("utf-8").splitlines()]
            golds = [
                str(answer).rpartition("####")[2].replace(",", "" if kind == "integer" else ",").strip()
                for answer in rows
            ]
            pairs = [pair for gold in golds for pair in pairs_of(gold, kind)]
            counts = {name: Counter() for name in judges}
            started = {name: 0.0 for name in judges}
            for pair in pairs:
                for name, judge in judges.items():
                    key = (name, source if name == "verl's default" else kind, pair)
                    if key not in known:
                        begin = time.perf_counter()
                        with contextlib.redirect_stdout(io.StringIO()):
                            try:
                                known[key] = "accepted" if judge(pair, source, kind) else "rejected"
                            except NotImplementedError:
                                known[key] = "refused"
                        started[name] += time.perf_counter() - begin
                    said = known[key]
                    sort = "itself" if pair.rule == "itself" else "rewriting" if pair.right else "neighbour"
                    counts[name][f"{sort} {said}"] += 1
                    rules[name][f"{pair.rule}|{pair.right}|{said}"] += 1
                    wrong = said == ("rejected" if pair.right else "accepted")
                    if name == "ours" and wrong and {**asdict(pair), "set": title} not in result["wrong"]:
                        result["wrong"].append({**asdict(pair), "set": title})
            result["sets"][title] = {
                "golds": len(golds),
                "pairs": len(pairs),
                "counts": {name: dict(count) for name, count in counts.items()},
                "seconds": {name: round(value, 2) for name, value in started.items()},
            }
            print(f"{title}: {len(pairs)} pairs", file=sys.stderr, flush=True)
        result["rules"] = {name: dict(count) for name, count in rules.items()}
    return result


def table(result: dict) -> str:
    """The figures in Markdown."""
    names = list(result["rules"])
    lines = [
        "Not accepted although right, and accepted although wrong:",
        "",
        "| set | answers | of | " + " | ".join(names) + " |",
        "| --- | --- | ---: | " + " | ".join("---:" for _ in names) + " |",
    ]
    for title, found in result["sets"].items():
        for sort, verb, label in (
            ("itself", "accepted", "the gold itself, rejected"),
            ("rewriting", "accepted", "rewritings, rejected"),
            ("neighbour", "rejected", "wrong neighbours, accepted"),
        ):
            cells, total = [], 0
            for name in names:
                count = found["counts"][name]
                total = sum(value for key, value in count.items() if key.startswith(sort))
                refused = count.get(f"{sort} refused", 0)
                cells.append("raises" if refused == total else str(total - count.get(f"{sort} {verb}", 0) - refused))
            lines.append(f"| {title} | {label} | {total} | {' | '.join(cells)} |")
    lines += ["", "By rule, all sets together, ours and verl's best two:", ""]
    shown = [name for name in ("ours", "math_verify", "math_reward") if name in names]
    lines += [
        "| rule | answers | " + " | ".join(f"wrong by {name}" for name in shown) + " |",
        "| --- | ---: | " + " | ".join("---:" for _ in shown) + " |",
    ]
    order = [("itself", True), *((name, True) for name in REWRITINGS), *((name, False) for name in NEIGHBOURS)]
    for rule, right in order:
        of = {name: result["rules"][name] for name in shown}
        total = sum(of[shown[0]].get(f"{rule}|{right}|{said}", 0) for said in ("accepted", "rejected", "refused"))
        wrong = [of[name].get(f"{rule}|{right}|{'rejected' if right else 'accepted'}", 0) for name in shown]
        if total:
            mark = "" if right else "✗ "
            lines.append(f"| {mark}{rule} | {total} | {' | '.join(map(str, wrong))} |")
    lines += ["", "✗: a wrong neighbour, where accepting is wrong; everywhere else rejecting is."]
    return "\n".join(lines)


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write", type=Path, help="page of docs with the markers")
    parser.add_argument("--scorers", default="", help="names, with commas; all where there are none")
    given = parser.parse_args()
    result = measure(given.data, [name for name in given.scorers.split(",") if name])
    print(table(result))
    for wrong in result["wrong"]:
        print(json.dumps(wrong), file=sys.stderr)
    if given.out:
        save_figures(given.out, "reward_accuracy", result)
    if given.write:
        write_page(given.write, table(result), BEGIN, END)


if __name__ == "__main__":
    main()
