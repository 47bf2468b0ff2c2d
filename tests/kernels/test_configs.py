"""The heuristic table: parts of K are never empty, fit the workspace, and fill the GPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from quantkit_kernels import configs
from quantkit_kernels.common import WORKSPACE_FLOATS, WORKSPACE_TILES

SIZES = st.integers(1, 70000)


@given(st.integers(1, 5000), SIZES, SIZES, st.sampled_from([20, 108, 132]), st.sampled_from([99, 227]))
def test_splits(M: int, N: int, K: int, processors: int, kilobytes: int) -> None:
    weight_only = configs.weight_only_heuristic(M, N, K, processors, kilobytes * 1024)
    gemm = configs.gemm_heuristic("fp8", M, N, K, processors, kilobytes * 1024)
    for config, step in ((weight_only, 256), (gemm, 128)):
        steps = -(-K // step)
        part = -(-steps // config.splits)
        assert part * (config.splits - 1) < steps
        tiles = -(-N // config.block_n) * -(-M // config.block_m)
        if config.splits > 1:
            assert part >= 2
            assert tiles <= WORKSPACE_TILES
            assert tiles * config.splits * config.block_m * config.block_n <= WORKSPACE_FLOATS


def test_prime_counts_of_steps_are_split_too() -> None:
    assert configs.split_count(tiles=14, steps=19, wanted=528, floats_per_tile=1024) == 7  # six of 3 steps, one of 1
    assert configs.split_count(tiles=64, steps=16, wanted=528, floats_per_tile=1024) == 8


def test_measured_configs_come_first(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    config = '{"block_m": 16, "block_n": 128, "splits": 2, "num_warps": 8, "num_stages": 5}'
    (tmp_path / "interpreter.json").write_text(f'{{"weight_only": {{"int4/64x256": {{"16": {config}}}}}}}')
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    configs.measured.cache_clear()
    configs.weight_only_config.cache_clear()
    try:
        assert configs.weight_only_config("int4", 9, 64, 256, device).num_stages == 5
        assert configs.weight_only_config("int4", 17, 64, 256, device).block_m == 32
    finally:
        configs.measured.cache_clear()
        configs.weight_only_config.cache_clear()
