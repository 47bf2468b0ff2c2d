"""AWQ's two searches against plain float64 arithmetic, and the promise that they never make a layer worse."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantkit.algorithms import awq
from quantkit.algorithms.awq import search_scale, storable
from quantkit.errors import RunError, UserError
from quantkit.grids.clip import search_clip
from quantkit.grids.dequantize import (
    dequantize,
)
from quantkit.grids.integer import IntegerGrid, RangeSearch
from quantkit.types import TensorSpec

SPECS = [TensorSpec(4, 16, False), TensorSpec(4, 32, True), TensorSpec(3, -1, True), TensorSpec(3, -1, False)]


def clip(w_NK: Tensor, hessian_KK: Tensor, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
    """search_clip with the diagonal blocks of a whole Hessian."""
    K = w_NK.shape[1]
    size = K // grid.spec.groups(K)
    return search_clip(w_NK, torch.stack([hessian_KK[i : i + size, i : i + size] for i in range(0, K, size)]), grid)


def grid_of(spec: TensorSpec, **options: object) -> IntegerGrid:
    return replace(IntegerGrid(spec, torch.bfloat16), **options)


def layer(N: int = 24, K: int = 64, *, loud: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [N, K] and correlated inputs [512, K]; every ninth input channel is `loud` times larger."""
    generator = torch.Generator().manual_seed(seed)
    w_NK = torch.randn(N, K, generator=generator)
    x_MK = torch.randn(512, K, generator=generator) @ (torch.eye(K) + 0.15 * torch.randn(K, K, generator=generator))
    x_MK[:, ::9] *= loud
    return w_NK, x_MK


def statistics(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    return x_MK.mT @ x_MK, x_MK.abs().mean(0)


def rounded_alone(w_NK: Tensor, s_K: Tensor, spec: TensorSpec) -> Tensor:
    """Q(W s) / s with min-max ranges, one candidate, through the grid's public face."""
    grid = IntegerGrid(spec, torch.bfloat16, None)
    return dequantize(grid.quantize(w_NK * s_K, *grid.fit(w_NK * s_K))).float() / s_K


def output_error(w_NK: Tensor, other_NK: Tensor, x_MK: Tensor) -> float:
    return (x_MK.double() @ (other_NK.double() - w_NK.double()).mT).square().sum().item()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_losses_are_the_output_error_of_the_scale_that_is_returned(spec: TensorSpec) -> None:
    w_NK, x_MK = layer(loud=20)
    v_NK, _ = layer(N=8, seed=1)
    result = search_scale([w_NK, v_NK], *statistics(x_MK), grid_of(spec))
    for scale_K, loss in ((torch.ones(64), result.loss_identity), (result.scale_C, result.loss_best)):
        expected = sum(output_error(w, rounded_alone(w, scale_K, spec), x_MK) for w in (w_NK, v_NK))
        assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_best_of_all_candidates_measured_one_by_one(spec: TensorSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    w_NK, x_MK = layer(loud=20)
    result = search_scale([w_NK], *statistics(x_MK), grid_of(spec))
    x_K = x_MK.abs().mean(0).double()
    size_K = (w_NK / w_NK.abs().amax(1, keepdim=True)).abs().mean(0).double()
    errors = {(0.0, 0.0): output_error(w_NK, rounded_alone(w_NK, torch.ones(64), spec), x_MK)}
    for a, b in [(i / 10, 0.0) for i in range(1, 11)] + [(i / 10, 1 - i / 10) for i in range(10)]:
        s_K = x_K**a / size_K**b
        s_K = (s_K / (s_K.max() * s_K.min()).sqrt()).float()
        errors[a, b] = output_error(w_NK, rounded_alone(w_NK, s_K, spec), x_MK)
    assert result.loss_best == pytest.approx(min(errors.values()), rel=1e-3)
    assert errors[result.exponents] == pytest.approx(min(errors.values()), rel=1e-3)

    monkeypatch.setattr(awq, "CHUNK", 1)  # one candidate at a time
    alone = search_scale([w_NK], *statistics(x_MK), grid_of(spec))
    torch.testing.assert_close(alone.scale_C, result.scale_C, rtol=0, atol=0)
    assert alone.exponents == result.exponents
    assert alone.loss_best == pytest.approx(result.loss_best, rel=1e-5)


def test_wins_clearly_where_inputs_are_loud() -> None:
    """The paper's case: a few channels carry the output, their weights are like the others."""
    w_NK, x_MK = layer(loud=50)
    result = search_scale([w_NK], *statistics(x_MK), grid_of(TensorSpec(4, 64, False)))
    assert result.loss_best < 0.35 * result.loss_identity
    assert result.scale_C[::9].min() > 2 * result.scale_C[1:9].max()


def test_identity_stays_where_nothing_beats_it() -> None:
    """Weights already on the grid round without error: any scale is worse, and a tie is no reason to scale."""
    w_NK, x_MK = layer(loud=20)
    spec = TensorSpec(4, 16, False)
    on_grid_NK = rounded_alone(w_NK, torch.ones(64), spec)
    on_grid_NK = rounded_alone(on_grid_NK, torch.ones(64), spec)
    result = search_scale([on_grid_NK], *statistics(x_MK), grid_of(spec))
    assert torch.equal(result.scale_C, torch.ones(64))
    assert result.exponents == (0, 0)
    assert result.loss_best == result.loss_identity


def test_given_loss_decides_and_never_loses_to_the_identity() -> None:
    w_NK, x_MK = layer(loud=20)
    v_NK, _ = layer(N=8, seed=1)
    seen: list[list[Tensor]] = []

    def dislikes_change(weights: list[Tensor]) -> float:
        seen.append(weights)
        return float(len(seen))  # the first measured is the identity

    result = search_scale([w_NK, v_NK], *statistics(x_MK), grid_of(SPECS[0]), loss=dislikes_change, finalists=3)
    assert torch.equal(result.scale_C, torch.ones(64))
    assert (result.loss_identity, result.loss_best) == (1, 1)
    assert len(seen) == 4  # and three finalists
    assert [w.shape for w in seen[0]] == [w_NK.shape, v_NK.shape]
    torch.testing.assert_close(seen[0][1], rounded_alone(v_NK, torch.ones(64), SPECS[0]), rtol=0, atol=0)

    likes_third = iter([3.0, math.nan, 2.0, 4.0])
    result = search_scale([w_NK], *statistics(x_MK), grid_of(SPECS[0]), loss=lambda _: next(likes_third), finalists=3)
    assert (result.loss_identity, result.loss_best) == (3, 2)
    assert not torch.equal(result.scale_C, torch.ones(64))


def test_many_rows_are_screened_on_some_and_decided_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    w_NK, x_MK = layer(N=50, loud=20)
    w_NK[25:] *= 10  # the first rows alone would tell little
    whole = search_scale([w_NK], *statistics(x_MK), grid_of(SPECS[0]))
    monkeypatch.setattr(awq, "PROBE_ROWS", 20)
    probed = search_scale([w_NK], *statistics(x_MK), grid_of(SPECS[0]), finalists=8)
    assert probed.loss_identity == pytest.approx(whole.loss_identity, rel=1e-5)
    assert probed.loss_best == pytest.approx(whole.loss_best, rel=0.02)
    expected = output_error(w_NK, rounded_alone(w_NK, probed.scale_C, SPECS[0]), x_MK)
    assert probed.loss_best == pytest.approx(expected, rel=1e-4)
    estimate = awq._hessian_losses([w_NK], x_MK.mT @ x_MK, torch.ones(1, 64), grid_of(SPECS[0]), 20)
    assert estimate.item() == pytest.approx(whole.loss_identity, rel=0.3)  # of all rows, not of those probed


@pytest.mark.parametrize("repeats", [2, 4])
def test_columns_that_share_a_channel_share_its_scale(repeats: int) -> None:
    w_NK, x_MK = layer(loud=20)
    heads, size = 8 // repeats, 8
    columns_K = (torch.arange(heads).repeat_interleave(repeats)[:, None] * size + torch.arange(size)).flatten()
    result = search_scale([w_NK], *statistics(x_MK), grid_of(SPECS[0]), columns_K=columns_K)
    assert result.scale_C.shape == (heads * size,)
    assert result.loss_best < result.loss_identity
    expected = output_error(w_NK, rounded_alone(w_NK, result.scale_C[columns_K], SPECS[0]), x_MK)
    assert result.loss_best == pytest.approx(expected, rel=1e-4)


def test_shared_channel_sees_the_mean_of_its_columns() -> None:
    """Columns around the mean of their channel give the candidates of a layer that has that mean once."""
    w_NK, x_MK = layer(K=32, loud=20)
    plain, exponents = awq._candidates([w_NK], x_MK.abs().mean(0), torch.arange(32), 20)
    columns_K = torch.cat([torch.arange(32), torch.arange(8)])  # an uneven share: sums would not do
    magnitude_K = x_MK.abs().mean(0)[columns_K]
    magnitude_K[:8] *= 0.5
    magnitude_K[32:] *= 1.5
    shared, same = awq._candidates([w_NK[:, columns_K]], magnitude_K, columns_K, 20)
    torch.testing.assert_close(shared, plain)
    assert same == exponents


def test_all_weights_have_a_say_in_the_weight_magnitude() -> None:
    w_NK, x_MK = layer(loud=20)
    one, _ = awq._candidates([w_NK], x_MK.abs().mean(0), torch.arange(64), 20)
    split, _ = awq._candidates([w_NK[:3], w_NK[3:]], x_MK.abs().mean(0), torch.arange(64), 20)
    torch.testing.assert_close(split, one)


def test_identity_columns_are_the_default() -> None:
    w_NK, x_MK = layer(loud=20)
    plain = search_scale([w_NK], *statistics(x_MK), grid_of(SPECS[0]))
    mapped = search_scale([w_NK], *statistics(x_MK), grid_of(SPECS[0]), columns_K=torch.arange(64))
    assert torch.equal(plain.scale_C, mapped.scale_C)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_storable_scale_divides_without_rounding(offset: float) -> None:
    generator = torch.Generator().manual_seed(3)
    norm_C = (torch.rand(256, generator=generator) * 2 + 0.05 - offset).bfloat16()
    wanted_C = torch.exp(torch.randn(256, generator=generator))
    scale_C = storable(wanted_C, norm_C, torch.bfloat16, offset=offset)
    stored_C = ((norm_C.double() + offset) / scale_C.double() - offset).bfloat16()
    torch.testing.assert_close(
        (stored_C.double() + offset) * scale_C.double(), norm_C.double() + offset, rtol=2e-7, atol=0
    )
    assert not torch.equal(scale_C, wanted_C)
    if not offset:  # with an offset the step between stored values is coarser where w is large and 1 + w small
        torch.testing.assert_close(scale_C, wanted_C, rtol=2**-8, atol=0)
    assert torch.equal(storable(torch.ones(256), norm_C, torch.bfloat16, offset=offset), torch.ones(256))


def test_storable_leaves_what_cannot_be_scaled() -> None:
    norm_C = torch.tensor([0.0, 1.0, -2.0, 1e-38, 1e38], dtype=torch.bfloat16)
    scale_C = storable(torch.tensor([2.0, 2.0, 4.0, 1e30, 1e-30]), norm_C, torch.bfloat16)
    assert scale_C.tolist() == [1, 2, 4, 1, 1]  # the last two would be stored as 0 and as infinity


def test_snap_is_applied_to_what_is_measured() -> None:
    w_NK, x_MK = layer(loud=20)
    result = search_scale(
        [w_NK], *statistics(x_MK), grid_of(SPECS[0]), snap=lambda s_C: torch.exp2(torch.log2(s_C).round())
    )
    assert result.loss_best < result.loss_identity
    assert torch.equal(torch.log2(result.scale_C), torch.log2(result.scale_C).round())
    expected = output_error(w_NK, rounded_alone(w_NK, result.scale_C, SPECS[0]), x_MK)
    assert result.loss_best == pytest.approx(expected, rel=1e-4)


def test_identity_is_measured_unscaled_whatever_snap_does() -> None:
    w_NK, x_MK = layer(loud=20)
    odd_C = torch.linspace(0.5, 3, 64)
    result = search_scale([w_NK], *statistics(x_MK), grid_of(SPECS[0]), snap=lambda _: odd_C)
    expected = output_error(w_NK, rounded_alone(w_NK, torch.ones(64), SPECS[0]), x_MK)
    assert result.loss_identity == pytest.approx(expected, rel=1e-4)


def group_errors(w_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor, x_MK: Tensor, grid: IntegerGrid) -> Tensor:
    """|E_g X_g^T|^2 of each row's groups in float64, from the inputs themselves, [N, G]."""
    error_NK = dequantize(grid.quantize(w_NK, scale_NG, zero_NG)).double() - w_NK.double()
    G = scale_NG.shape[1]
    pairs = zip(error_NK.chunk(G, 1), x_MK.double().chunk(G, 1), strict=True)
    return torch.stack([(x @ e.mT).square().sum(0) for e, x in pairs], 1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_clip_beats_every_shrunken_range_in_every_group(spec: TensorSpec) -> None:
    w_NK, x_MK = layer()
    grid = grid_of(spec)
    ours_NG = group_errors(w_NK, *clip(w_NK, x_MK.mT @ x_MK, grid), x_MK, grid)
    w_NGg = w_NK.reshape(24, spec.groups(64), -1)
    low_NG, high_NG = w_NGg.amin(2).clamp(max=0), w_NGg.amax(2).clamp(min=0)
    for i in range(10):
        shrink = 1 - 0.5 * i / 9
        squeezed_NK = torch.stack([low_NG, high_NG], -1).flatten(1) * shrink
        plain = IntegerGrid(TensorSpec(spec.bits, 2, spec.symmetric), torch.bfloat16, None)
        scale_NG, zero_NG = plain.fit(squeezed_NK)
        for sign in (1, -1) if spec.symmetric else (1,):
            theirs_NG = group_errors(w_NK, sign * scale_NG, zero_NG, x_MK, grid)
            assert (ours_NG <= theirs_NG * 1.0001).all(), f"{shrink=} {sign=}"


def naive_clip(w_g: Tensor, h_gg: Tensor, spec: TensorSpec, steps: int = 10, refits: int = 2) -> float:
    """The least error the search of one group arrives at: float64, one candidate after another, scales in bf16."""
    grid = IntegerGrid(spec, torch.bfloat16, None)
    spans = torch.linspace(-0.25, 0.25, steps).tolist()

    def error(scale: Tensor, zero: int) -> float:
        code_g = ((w_g / scale.double()).round() + zero).clamp(0, spec.levels - 1) - zero
        e_g = (code_g.to(torch.bfloat16) * scale).double() - w_g
        return (e_g @ h_gg @ e_g).item()

    def candidate(low: float, high: float, sign: int = 1) -> tuple[float, Tensor, int, float, float]:
        scale_11, zero_11 = replace(grid, spec=replace(spec, group_size=2)).fit(torch.tensor([[low, high]]))
        scale, zero = sign * scale_11[0, 0], int(zero_11)
        return error(scale, zero), scale, zero, low, high

    low, high = min(w_g.min().item(), 0), max(w_g.max().item(), 0)
    shrinks = torch.linspace(1, 0.5, steps).tolist()
    signs = (1, -1) if spec.symmetric else (1,)
    best = min((candidate(low * s, high * s, sign) for sign in signs for s in shrinks), key=lambda c: c[0])
    for down, up in [(1, 1)] if spec.symmetric else [(1, 0), (0, 1)]:
        sign = -1 if best[1] < 0 else 1
        moved = [candidate(best[3] * (1 + down * s), best[4] * (1 + up * s), sign) for s in spans]
        best = min([best, *moved], key=lambda c: c[0])
    loss, scale, zero, *_ = best
    for _ in range(refits):
        code_g = ((w_g / scale.double()).round() + zero).clamp(0, spec.levels - 1) - zero
        solved = ((code_g @ h_gg @ w_g) / (code_g @ h_gg @ code_g)).bfloat16()
        if error(solved, zero) < loss:
            loss, scale = error(solved, zero), solved
    return loss


@pytest.mark.parametrize("spec", [TensorSpec(4, 32, False), TensorSpec(4, 32, True), TensorSpec(2, 32, False)], ids=str)
def test_clip_is_the_search_it_says_it_is(spec: TensorSpec) -> None:
    w_NK, x_MK = layer()
    w_NK = w_NK + 0.5 * (w_NK > 2)  # one-sided extremes: both ends of a range matter
    hessian_KK = x_MK.mT.double() @ x_MK.double()
    grid = grid_of(spec)
    ours_NG = group_errors(w_NK, *clip(w_NK, hessian_KK.float(), grid), x_MK, grid)
    theirs = [
        [naive_clip(w_NK[n, g : g + 32].double(), hessian_KK[g : g + 32, g : g + 32], spec) for g in (0, 32)]
        for n in range(24)
    ]
    # a tie broken the other way in float32 may lead elsewhere, in a group or two
    close_NG = torch.isclose(ours_NG, torch.tensor(theirs, dtype=torch.float64), rtol=1e-3)
    assert close_NG.float().mean() > 0.95


@pytest.mark.parametrize(("spec", "gain"), list(zip(SPECS, [0.93, 0.93, 0.9, 0.9], strict=True)), ids=str)
def test_clip_counts_correlations(spec: TensorSpec, gain: float) -> None:
    """The grid's own search knows E[x^2] only: on correlated inputs the group's Hessian must do better in sum."""
    w_NK, x_MK = layer(N=64)
    x_MK = x_MK + 1.5 * x_MK[:, :1]
    grid = grid_of(spec, search=RangeSearch())
    ours_NG = group_errors(w_NK, *clip(w_NK, x_MK.mT @ x_MK, grid), x_MK, grid)
    theirs_NG = group_errors(w_NK, *grid.fit(w_NK, x_MK.square().sum(0)), x_MK, grid)
    assert ours_NG.sum() < gain * theirs_NG.sum()


def test_clip_in_chunks_of_rows_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    w_NK, x_MK = layer()
    whole = clip(w_NK, x_MK.mT @ x_MK, grid_of(SPECS[0]))
    monkeypatch.setattr(awq, "CHUNK", 1)
    for a, b in zip(whole, clip(w_NK, x_MK.mT @ x_MK, grid_of(SPECS[0])), strict=True):
        assert torch.equal(a, b)


def test_clip_writes_what_the_format_can_hold() -> None:
    w_NK, x_MK = layer()
    for spec in SPECS:
        scale_NG, zero_NG = clip(w_NK, x_MK.mT @ x_MK, grid_of(spec, signed=False))
        assert scale_NG.dtype == torch.bfloat16
        assert zero_NG.dtype == torch.uint8
        assert scale_NG.shape == zero_NG.shape == (24, spec.groups(64))
        assert (scale_NG > 0).all()
        assert (zero_NG < spec.levels).all()
        if spec.symmetric:
            assert (zero_NG == spec.levels // 2).all()
            assert (clip(w_NK, x_MK.mT @ x_MK, grid_of(spec))[0] < 0).any()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_degenerate_inputs(spec: TensorSpec) -> None:
    w_NK, x_MK = layer(loud=20)
    grid = grid_of(spec)
    silent = search_scale([w_NK], torch.zeros(64, 64), torch.zeros(64), grid)
    assert torch.equal(silent.scale_C, torch.ones(64))
    assert (silent.loss_identity, silent.loss_best) == (0, 0)

    x_MK[:, 5] = 0  # a channel never seen, and one no weight reads
    w_NK[:, 7] = 0
    result = search_scale([w_NK], *statistics(x_MK), grid)
    assert torch.isfinite(result.scale_C).all()
    assert (result.scale_C > 0).all()
    assert result.scale_C[5] == 1
    live_C = result.scale_C[torch.arange(64) != 5]
    assert (live_C.max() * live_C.min()).item() == pytest.approx(1, rel=1e-4)  # the dead one has no say in this
    assert result.loss_best < result.loss_identity
    assert search_scale([torch.zeros(4, 64)], *statistics(x_MK), grid).exponents == (0, 0)

    for hessian_KK in (torch.zeros(64, 64), x_MK.mT @ x_MK):
        for weight_NK in (torch.zeros(3, 64), w_NK[:1], torch.full((2, 64), 0.7)):
            scale_NG, zero_NG = clip(weight_NK, hessian_KK, grid)
            assert torch.isfinite(scale_NG).all()
            assert (scale_NG != 0).all()
            back_NK = dequantize(grid.quantize(weight_NK, scale_NG, zero_NG))
            assert (back_NK.float() - weight_NK).abs().max() <= 0.5 * weight_NK.abs().max() + 1e-6


def test_bad_numbers_and_shapes_are_named() -> None:
    w_NK, x_MK = layer()
    hessian_KK, magnitude_K = statistics(x_MK)
    grid = grid_of(SPECS[0])
    with pytest.raises(RunError, match="Hessian holds NaN"):
        search_scale([w_NK], hessian_KK * math.nan, magnitude_K, grid)
    with pytest.raises(RunError, match="mean magnitude of the input holds NaN"):
        search_scale([w_NK], hessian_KK, magnitude_K / 0, grid)
    with pytest.raises(RunError, match="hold NaN or Inf"):
        clip(w_NK * math.inf, hessian_KK, grid)
    with pytest.raises(UserError, match=r"\(24, 64\).*\(64, 64\).*32 magnitudes"):
        search_scale([w_NK], hessian_KK, magnitude_K[:32], grid)
    with pytest.raises(UserError, match=r"\(24, 64\), \(24, 63\)"):
        search_scale([w_NK, w_NK[:, :63]], hessian_KK, magnitude_K, grid)
    with pytest.raises(UserError, match="group_size 48 does not divide 64"):
        clip(w_NK, hessian_KK, grid_of(TensorSpec(4, 48, True)))
