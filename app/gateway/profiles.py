"""What is known of how often models are wrong, by the kind of a prompt; and which kind a prompt is of. Pure.

The figures are published ones: the shares of right answers in benchmarks that OpenAI's simple-evals reports, each model by
its newest snapshot there (github.com/openai/simple-evals, README.md, "Benchmark Results"). A model that is not in that
table has no figure, and is compared with no other. There is no benchmark of creative writing among them: a prompt for
that is judged by general knowledge, as every other is.
"""

import re
from enum import IntEnum
from typing import Final


class Cluster(IntEnum):
    """A kind of prompts, and the number that the wire has for it."""

    CODE = 0
    MATH = 1
    LONG_CONTEXT = 2
    CREATIVE = 3
    FACTUAL = 4
    OTHER = 5


_MMLU, _MATH, _HUMAN_EVAL, _DROP, _SIMPLE_QA = range(5)
JUDGED_BY: Final = {
    Cluster.CODE: ("HumanEval", _HUMAN_EVAL), Cluster.MATH: ("MATH", _MATH), Cluster.LONG_CONTEXT: ("DROP", _DROP),
    Cluster.CREATIVE: ("MMLU", _MMLU), Cluster.FACTUAL: ("SimpleQA", _SIMPLE_QA), Cluster.OTHER: ("MMLU", _MMLU),
}  # fmt: skip
_RIGHT_PERMILLE: Final = {
    "gpt-4o": (857, 685, 902, 815, 388), "gpt-4o-mini": (820, 702, 872, 797, 95),
    "gpt-4.1": (902, 821, 945, 794, 416), "gpt-4.1-mini": (875, 814, 938, 810, 168),
    "gpt-4-turbo": (867, 734, 882, 860, 242), "claude-3.5-sonnet": (883, 711, 920, 871, 289),
    "o1": (918, 964, None, 902, 426), "o3": (929, 978, 874, 806, 494), "o3-mini": (859, 973, 963, 792, 134),
    "o4-mini": (900, 975, 973, 777, 202), "llama-3.1-8b": (684, 519, 726, 595, None),
}  # fmt: skip
PROFILED: Final = tuple(sorted(_RIGHT_PERMILLE))
_LONG_BYTES: Final = 32_000
_KINDS: Final = (
    (Cluster.CODE, re.compile(
        r"```|\b(?:python|javascript|typescript|java|rust|golang|c\+\+|sql|html|css|regex|bash|code|function|class|"
        r"bug|debug|compile|refactor|api|unit tests?)\b", re.IGNORECASE)),
    (Cluster.MATH, re.compile(
        r"\d\s*[-+*/^=]\s*\d|\b(?:solve|equation|integral|derivative|prove|theorem|probability|calculate|compute|"
        r"matrix|polynomial|percent(?:age)?)\b", re.IGNORECASE)),
    (Cluster.CREATIVE, re.compile(
        r"\b(?:poem|haiku|story|joke|song|lyrics|slogan|limerick|fiction|rhyme|screenplay)\b", re.IGNORECASE)),
    (Cluster.FACTUAL, re.compile(
        r"^\s*(?:who|what|when|where|which)\b|\b(?:capital|year|born|population|founded|invented)\b", re.IGNORECASE)),
)  # fmt: skip
_WHY: Final = {
    Cluster.CODE: "it speaks of code", Cluster.MATH: "it speaks of mathematics",
    Cluster.LONG_CONTEXT: f"it is longer than {_LONG_BYTES:,} bytes", Cluster.CREATIVE: "it asks for creative writing",
    Cluster.FACTUAL: "it asks for a fact", Cluster.OTHER: "it is of no particular kind",
}  # fmt: skip


def cluster_of(text: str) -> Cluster:
    """By its length, then by the first kind whose words stand in it."""
    if len(text.encode("utf-8", "surrogatepass")) > _LONG_BYTES:
        return Cluster.LONG_CONTEXT
    return next((cluster for cluster, words in _KINDS if words.search(text)), Cluster.OTHER)


def why(cluster: Cluster) -> str:
    return _WHY[cluster]


def expected_error(model: str, cluster: Cluster) -> float | None:
    """The share of wrong answers, None where nothing was published of this model."""
    figures = _RIGHT_PERMILLE.get(model.rpartition("/")[2])
    right = figures[JUDGED_BY[cluster][1]] if figures is not None else None
    return None if right is None else (1000 - right) / 1000
