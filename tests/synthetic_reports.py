"""Whole reports without a run: of any number of layers, with everything measured, or with next to nothing."""

import random
from dataclasses import replace

from quantkit.report.block_records import (
    BlockRecord,
    FoldRecord,
    GptqErrors,
    LinearRecord,
    Outliers,
    RejectedFold,
    SkippedLinear,
)
from quantkit.report.document import Document
from quantkit.report.measurements import (
    Continuation,
    EngineVerdict,
    Measurements,
    OriginalOutliers,
    Sample,
    Speed,
    SpeedComparison,
    TaskResult,
)
from quantkit.report.records import CalibrationRecord, CalibrationSource, HeldOutRecord, Report
from quantkit.report.text_results import Divergence, Interval, PositionSurprise, Surprise, TextResult
from quantkit.report.verdict import judge

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
KINDS = (*(f"self_attn.{name}" for name in ATTENTION), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def around(value: float, share: float = 0.1) -> Interval:
    """An interval of +- share around a value."""
    return Interval(value, value * (1 - share), value * (1 + share))


def block(index: int, seed: random.Random) -> BlockRecord:
    """A block of a Llama that GPTQ quantized behind AWQ's folds."""
    linears = []
    for kind in KINDS:
        rounding = 0.004 * (1 + index / 20) * seed.uniform(0.5, 2) * (3 if kind == "mlp.down_proj" else 1)
        gptq = GptqErrors(rounding, 0.01, 65536)
        peaks = Outliers(seed.uniform(5, 14), seed.uniform(3, 60))
        name = f"model.layers.{index}.{kind}"
        linears.append(LinearRecord(name, "int4 sym g128", (8192, 8192), "gptq", rounding * 0.6, gptq, outliers=peaks))
    norm, layer = f"model.layers.{index}.input_layernorm", f"model.layers.{index}"
    readers = tuple(f"{layer}.self_attn.{name}" for name in ATTENTION[:3])
    folds = (
        FoldRecord(norm, readers, (0.5, 0.5), loss_unscaled=2.0, loss=seed.uniform(1, 1.8)),
        FoldRecord(f"{layer}.mlp.up_proj", (f"{layer}.mlp.down_proj",), (0.4, 0.4), loss_unscaled=1.0, loss=0.7),
    )
    return BlockRecord(index, folds, tuple(linears))


def run(layers: int = 4) -> Report:
    """What a run of GPTQ leaves."""
    seed = random.Random(0)
    recipe = {
        "model": "meta-llama/Llama-3.1-70B",
        "calibration": {"data": "general", "samples": 256, "seq_len": 2048},
        "transforms": [{"awq": {"grid": 20}}],
        "weights": {"type": "int", "bits": 4, "group_size": 128, "algorithm": {"gptq": {"damping": 0.01}}},
        "overrides": [],
        "output": {"format": "compressed-tensors", "engine": "vllm", "tp": 1},
    }
    return Report(
        quantkit="0.1.0",
        model="meta-llama/Llama-3.1-70B",
        model_revision="8f1a0b3c",
        model_fingerprint="5" * 64,
        recipe=recipe,
        calibration=CalibrationRecord("a" * 64, 256, 2048, True, (CalibrationSource("general", "b" * 64, rows=512),)),
        versions={"quantkit": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0"},
        device="cuda",
        coverage=f"{7 * layers} of {7 * layers + 1} linears quantized",
        weights_quantized=1.0,
        bits_per_weight=4.125,
        bytes_before=141_107_412_992,
        bytes_after=39_799_169_024,
        blocks=tuple(block(index, seed) for index in range(layers)),
        held_out=HeldOutRecord(8192, 0.021, 0.941),
        skipped=(SkippedLinear("lm_head", "outside the decoder blocks"),),
        rotation=None,
        kv_cache=None,
        folds_rejected=tuple(
            RejectedFold(f"model.layers.{i}.self_attn.v_proj -> model.layers.{i}.self_attn.o_proj", "heads are shared")
            for i in range(layers)
        ),
        warnings=("3 of 560 linears saw fewer than 8 calibration tokens per input feature",),
        seconds={"quantize": 5230.0},
        peak_memory_bytes=21_000_000_000,
        files={f"model-{i:05}-of-00009.safetensors": f"{i:064x}" for i in range(1, 10)},
    )


def text_result(name: str = "wikitext2", kl: float = 0.021) -> TextResult:
    """A text with everything that an evaluation finds."""
    surprise = Surprise(around(3.21, 0.02), around(0.55, 0.02), around(0.61, 0.01))
    original = Surprise(around(3.14, 0.02), around(0.54, 0.02), around(0.62, 0.01))
    ratio, shares = around(1.02, 0.004), (around(0.942, 0.004), around(0.021), around(0.013), around(0.008))
    d = Divergence(ratio, around(kl), around(0.22, 0.2), *shares, original)
    places = tuple(
        PositionSurprise(
            64 * i + 1,
            64 * i + 64,
            around(5.0 - 0.2 * i, 0.05),
            around(4.9 - 0.2 * i, 0.05),
            around(1.02 + i / 900, 0.01),
        )
        for i in range(8)
    )
    return TextResult(name, "c" * 64, 4.4, 64, 32_704, surprise, d, places)


def measurements(report: Report, **changed: object) -> Measurements:
    """Everything measured."""
    sample = Sample(
        'def area(radius):\n    """The area of a circle."""\n',
        24,
        9,
        Continuation("    return math.pi * radius", " **", " 2\n\n\ndef volume(radius):\n    return 4 / 3"),
        Continuation("    return math.pi * radius", " *", " radius\n\n\ndef volume(radius):\n"),
    )
    same = Sample("The capital of France is", 6, 6, Continuation(" Paris.", "", ""), Continuation(" Paris.", "", ""))

    def paired(value: float) -> Interval:
        return Interval(value, value - 0.008, value + 0.008)

    tasks = (
        TaskResult(
            "arc_easy", "acc", 0.801, 0.008, 2376, 0.812, 0.008, 0.986, 0.25, paired(-0.011), 0.004, 51, 25, "lost"
        ),
        TaskResult(
            "piqa", "acc", 0.823, 0.009, 1838, 0.825, 0.009, 0.998, 0.5, paired(-0.002), 0.004, 27, 23, "cannot tell"
        ),
    )
    made = Measurements(
        ref="meta-llama/Llama-3.1-70B",
        context=512,
        bos=True,
        device="cuda",
        dtype="bfloat16",
        texts=(text_result(), text_result("general", 0.034)),
        speed=SpeedComparison(Speed(1900, 61.0), Speed(2050, 31.5), 4, 64, 48, "cuda", "bfloat16"),
        samples=(sample, same),
        tasks=tasks,
        original_outliers=tuple(
            OriginalOutliers(one.name, one.outliers.weight * 1.5, (one.outliers.input or 1) * 4)
            for one in report.linears
            if one.outliers
        ),
        engines=(
            EngineVerdict("vllm", "loads"),
            EngineVerdict("tensorrt-llm", "refused", "no kernel for groups of 128"),
        ),
        versions={"python": "3.12.1", "torch": "2.13.0"},
        files=report.files,
    )
    return replace(made, **changed)  # type: ignore[arg-type]


def document(report: Report | None = None, measured: Measurements | None = None) -> Document:
    """Run, measurements and the verdict on them; complete unless something is given."""
    report = report or run()
    measured = measured or measurements(report)
    return Document("out/Llama-3.1-70B-W4A16", report, measured, judge(report, measured))
