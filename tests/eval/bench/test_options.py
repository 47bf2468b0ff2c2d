"""What a benchmark is asked for: lengths, scenarios, and what does not go together."""

from pathlib import Path
from typing import Any

import pytest
from quantkit_eval.bench.options import (
    BenchOptions,
    Lengths,
    batch_sizes,
    check_options,
    context_of,
    lengths,
    scenarios,
)

from quantkit.errors import UserError

MODEL = str(Path(__file__).resolve().parents[3] / "examples" / "tiny-llama")


def test_lengths() -> None:
    assert lengths("--input", "64") == Lengths(64, 64)
    assert lengths("--input", "8:128") == Lengths(8, 128)
    assert (str(Lengths(64, 64)), str(Lengths(8, 128))) == ("64", "8:128")
    for text in ("", "0", "a", "8:", "9:8", "1:2:3", "-1", "1.5"):
        with pytest.raises(UserError, match="--input is"):
            lengths("--input", text)


def test_batch_sizes() -> None:
    assert batch_sizes("1, 8,32,8") == (1, 8, 32)
    for text in ("", "1,", "0", "x"):
        with pytest.raises(UserError, match="--sweep-batch"):
            batch_sizes(text)


def test_scenarios_fit_the_context() -> None:
    (mixed,) = scenarios(1024)
    assert (mixed.requests, mixed.input, mixed.output) == (256, Lengths(100, 512), Lengths(100, 512))
    (wide,) = scenarios(1 << 17)
    assert (wide.input, wide.output) == (Lengths(100, 1024), Lengths(100, 1024))
    (tiny,) = scenarios(64)
    assert (tiny.input, tiny.output) == (Lengths(32, 32), Lengths(32, 32))
    (single,) = scenarios(1024, prefill=512)
    assert (single.requests, single.slots, single.input, single.output) == (1, 1, Lengths(512, 512), Lengths(128, 128))
    assert [(s.requests, s.slots) for s in scenarios(1024, sweep="1,8")] == [(1, 1), (8, 8)]
    with pytest.raises(UserError, match="1000 tokens in and 64 out are 1064; the model's context has 1024"):
        scenarios(1024, input="8:1000", output="64")
    with pytest.raises(UserError, match="--requests and --prefill are both given"):
        scenarios(1024, requests=3, prefill=9)


def options(**changes: Any) -> BenchOptions:
    return BenchOptions(MODEL, scenarios(1024, requests=4, input="8:64", output="8"), **changes)


def test_the_context_is_the_models() -> None:
    assert context_of(MODEL) == 1024
    assert options().longest == 72


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rate": 0.0}, "--rate is 0.0"),
        ({"rate": 3.0, "baselines": ("generate_batch",)}, "generate_batch takes all requests at once"),
        ({"shared_prefix": 8}, "--shared-prefix is 8, and the shortest prompt has 8 tokens"),
        ({"shared_prefix": -1}, "--shared-prefix is -1"),
        ({"max_num_seqs": 0}, "--max-num-seqs is 0"),
        ({"num_blocks": 0}, "--num-blocks is 0"),
        ({"baselines": ("genrate",)}, "did you mean `generate`"),
        ({"baselines": ("./nope",)}, "nope: no such folder"),
        ({"baselines": ("generate", "generate")}, "names one twice"),
        ({"llamacpp": Path(MODEL)}, "no llama-bench in it"),
    ],
)
def test_what_does_not_go_together(changes: dict[str, Any], words: str) -> None:
    check_options(options())
    with pytest.raises(UserError) as refused:
        check_options(options(**changes))
    assert words in str(refused.value)
