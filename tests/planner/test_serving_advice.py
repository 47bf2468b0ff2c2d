"""The rules of the advice, one test each, on figures that are made up for it."""

from dataclasses import replace

import pytest

from quantkit.planner.serving_advice import Asked, advise
from quantkit.report.serving_plan import PhaseTime, SchemeServing

ASKED = Asked(None, 8, 4096, 1, 1, 77e9, ("bf16", "fp8", "int8"), "fp8")
COMPUTE = PhaseTime(1e-2, 1e-3, 0, 0, 1e-3, 1e-2, "compute")
MEMORY = PhaseTime(1e-3, 1e-2, 0, 0, 1e-3, 1e-2, "memory bandwidth")


def scheme(name: str, gigabytes: float, *, fits: bool = True, token: float = 1e-2, rate: float = 100) -> SchemeServing:
    return SchemeServing(
        scheme=name,
        recipe=None,
        kv_cache="bf16",
        bits=16,
        weight_bytes=int(gigabytes * 1e9),
        weight_bytes_per_device=gigabytes * 1e9,
        weights_fit=fits,
        fits=fits,
        max_concurrency=dict.fromkeys(("bf16", "fp8", "int8"), 100 if fits else 0),
        prefill=COMPUTE,
        decode=MEMORY,
        ttft_seconds=1e-2,
        token_seconds=token,
        request_seconds=1e-2 + 256 * token,
        decode_tokens_per_second=rate,
        tokens_per_second=rate,
        cost_per_million_output_tokens=None,
        cost_per_million_tokens=None,
        refused=None,
        warnings=(),
    )


def rows(**changed: SchemeServing) -> dict[str, SchemeServing]:
    """A model of 16 GB: fewer bytes are faster in decode, 8-bit products in prefill."""
    found = {
        "bf16": scheme("bf16", 16, token=16e-3, rate=100),
        "W8A16": scheme("W8A16", 9, token=9e-3, rate=120),
        "W8A8": scheme("W8A8", 9, token=9e-3, rate=180),
        "FP8_DYNAMIC": scheme("FP8_DYNAMIC", 9, token=9e-3, rate=180),
        "W4A16": scheme("W4A16", 5.7, token=5e-3, rate=185),
    }
    return found | changed


def large(*fitting: str) -> dict[str, SchemeServing]:
    """The same where only some fit."""
    return {name: replace(each, weights_fit=name in fitting, fits=name in fitting) for name, each in rows().items()}


@pytest.mark.parametrize(("fitting", "taken"), [(("W8A16", "W4A16"), "W8A16"), (("W4A16",), "W4A16")])
def test_weights_that_do_not_fit_become_integers(fitting: tuple[str, ...], taken: str) -> None:
    found = advise(large(*fitting), ASKED)
    assert (found.scheme, found.rows[0].rule) == (taken, "weights")
    assert "16.0 GB" in found.why


def test_int4_where_int8_leaves_no_room_for_caches() -> None:
    given = large("W8A16", "W4A16")
    given["W8A16"] = replace(given["W8A16"], max_concurrency=dict.fromkeys(("bf16", "fp8", "int8"), 4))
    assert advise(given, ASKED).scheme == "W4A16"


def test_nothing_fits() -> None:
    found = advise(large(), ASKED)
    assert found.scheme is None
    assert "--tp" in found.why


def test_decode_bound_by_memory_bandwidth_becomes_w4a16() -> None:
    found = advise(rows(), replace(ASKED, profile="interactive"))
    assert (found.scheme, found.rows[0].rule) == ("W4A16", "decode")
    assert "memory bandwidth" in found.why


@pytest.mark.parametrize(
    ("peaks", "taken"), [(("bf16", "fp8", "int8"), "FP8_DYNAMIC"), (("bf16", "int8"), "W8A8")], ids=["h100", "a100"]
)
def test_prefill_bound_by_products_becomes_eight_bits_by_hardware(peaks: tuple[str, ...], taken: str) -> None:
    found = advise(rows(), replace(ASKED, profile="batch", peaks=peaks))
    assert (found.scheme, found.rows[0].rule) == (taken, "prefill")


def test_batch_of_long_answers_becomes_w4a16() -> None:
    given = rows(W4A16=scheme("W4A16", 5.7, token=5e-3, rate=300))
    assert advise(given, replace(ASKED, profile="batch")).scheme == "W4A16"


@pytest.mark.parametrize("cache", ["fp8", "int8"])
def test_too_few_caches_become_eight_bits(cache: str) -> None:
    few = {"bf16": 5, "fp8": 10, "int8": 10}
    given = {name: replace(each, max_concurrency=few) for name, each in rows().items()}
    found = advise(given, replace(ASKED, cache=cache))
    assert (found.scheme, found.cache) == ("FP8_DYNAMIC", cache)
    row = next(row for row in found.rows if row.rule == "capacity")
    assert row.change == f"{cache} cache"
    assert "5 sequences of 4096 tokens fit" in row.why


def test_caches_that_no_format_makes_room_for() -> None:
    none = dict.fromkeys(("bf16", "fp8", "int8"), 5)
    found = advise({name: replace(each, max_concurrency=none) for name, each in rows().items()}, ASKED)
    assert found.cache == "bf16"
    assert "lower --concurrency to 5" in next(row.why for row in found.rows if row.rule == "capacity")


@pytest.mark.parametrize(("weights", "change"), [(16, "--tp 4, or --tp 4 --pp 2"), (400, "--tp 4 --pp 2")])
def test_links_become_fewer_devices_or_a_pipeline(weights: float, change: str) -> None:
    linked = PhaseTime(1e-3, 1e-3, 1e-4, 8e-3, 1e-3, 9.1e-3, "interconnect latency")
    given = {name: replace(each, weight_bytes=int(weights * 1e9)) for name, each in rows().items()}
    given["bf16"] = replace(given["bf16"], decode=linked)
    found = advise(given, replace(ASKED, tp=8))
    row = next(row for row in found.rows if row.rule == "interconnect")
    assert row.change == change
    assert "89% of decode" in row.why


@pytest.mark.parametrize(("peaks", "taken"), [(("bf16", "fp8", "int8"), "FP8_DYNAMIC"), (("bf16", "int8"), "W8A8")])
def test_quality_first_without_a_profile(peaks: tuple[str, ...], taken: str) -> None:
    found = advise(rows(), replace(ASKED, peaks=peaks))
    assert (found.scheme, found.rows[0].rule, found.cache) == (taken, "quality", "bf16")
    assert [row.change for row in found.rows[1:]] == ["fp8 cache", "W4A16"]  # one by one


def test_no_gain_no_loss() -> None:
    """Where the host takes the time, a larger error buys nothing."""
    given = {name: replace(each, request_seconds=1.0, tokens_per_second=10.0) for name, each in rows().items()}
    assert advise(given, replace(ASKED, profile="interactive")).scheme == "FP8_DYNAMIC"


def test_what_is_not_faster_is_no_next_step() -> None:
    given = {name: replace(each, token_seconds=5e-3) for name, each in rows().items()}
    assert [row.change for row in advise(given, ASKED).rows[1:]] == ["fp8 cache"]


def test_what_the_engine_refuses_is_never_taken() -> None:
    given = rows()
    for name in ("W4A16", "FP8_DYNAMIC"):
        given[name] = replace(given[name], refused="no kernel")
    for profile in (None, "interactive", "batch"):
        assert advise(given, replace(ASKED, profile=profile)).scheme == "W8A8"
    assert advise({name: replace(each, refused="no") for name, each in rows().items()}, ASKED).scheme is None
