"""`plan` refuses what `quantize` refuses, in the same words: one run of both for each mistake."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.errors import UserError
from quantkit.planner.estimate import plan
from quantkit.quantization.pipeline import quantize
from quantkit.recipe.load import from_data
from tests.tiny_models import tiny_model

MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama"
TEXT = {"data": str(MODEL / "calibration.txt"), "samples": 16, "seq_len": 32}
GPTQ = {"weights": {"group_size": 16, "algorithm": "gptq"}, "calibration": TEXT}
PLAIN = {"weights": {"group_size": 16}}


def edited(folder: Path, **changes: Any) -> None:
    """config.json with other values; None removes a key."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def without(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def renamed_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["module.lm_head.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def document(folder: Path) -> None:
    (folder / "text.pdf").write_bytes(b"%PDF-1.7\n")


def short(folder: Path) -> None:
    (folder / "text.txt").write_text("too short a text " * 20)
    (folder / "rows.jsonl").write_text('{"text": "one"}\n{"text": two}\n')
    (folder / "other.jsonl").write_text('{"title": "one"}\n')


FOLDERS: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "an encoder": (lambda f: edited(f, model_type="bert", architectures=["BertForMaskedLM"]), PLAIN),
    "an encoder-decoder": (lambda f: edited(f, model_type="t5", architectures=["T5ForConditionalGeneration"]), PLAIN),
    "no such architecture": (lambda f: edited(f, model_type="nonesuch", architectures=["NoneForCausalLM"]), PLAIN),
    "no model_type": (lambda f: edited(f, model_type=None), PLAIN),
    "quantized": (lambda f: edited(f, quantization_config={"quant_method": "fp8"}), PLAIN),
    "damaged config": (lambda f: (f / "config.json").write_text("{"), PLAIN),
    "no config": (without("config.json"), PLAIN),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), GPTQ),
    "no weights": (lambda f: None, PLAIN),  # of config.json alone plan can say something; see below
    "empty": (emptied, PLAIN),
    "damaged weights": (cut_short, PLAIN),
    "other weights": (renamed_weight, PLAIN),
    "a PDF": (document, GPTQ | {"calibration": TEXT | {"data": "MODEL/text.pdf"}}),
    "a short text": (short, GPTQ | {"calibration": TEXT | {"data": "MODEL/text.txt"}}),
    "damaged rows": (short, GPTQ | {"calibration": TEXT | {"data": "MODEL/rows.jsonl"}}),
    "rows without text": (short, GPTQ | {"calibration": TEXT | {"data": "MODEL/other.jsonl"}}),
    "a folder of nothing": (lambda f: (f / "texts").mkdir(), GPTQ | {"calibration": TEXT | {"data": "MODEL/texts"}}),
    "a long seq_len": (lambda f: None, GPTQ | {"calibration": TEXT | {"seq_len": 1 << 19}}),
    "no calibration": (lambda f: None, GPTQ | {"calibration": TEXT | {"data": "./absent.txt"}}),
    "groups": (lambda f: None, {"weights": {"group_size": 96}}),
    "no linear": (lambda f: None, PLAIN | {"ignore": ["re:.*"]}),
    "an ignored name": (lambda f: None, PLAIN | {"ignore": ["re:.*q_prj"]}),
    "the format's groups": (lambda f: None, {"weights": {"bits": 3, "group_size": 16}, "output": {"format": "awq"}}),
    "the engine's tp": (lambda f: None, {"scheme": "FP8_DYNAMIC", "output": {"engine": "vllm", "tp": 3}}),
    "sglang": (lambda f: None, {"weights": {"bits": 3, "group_size": 32}, "output": {"engine": "sglang"}}),
}


def model_folder(folder: Path) -> Path:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder)
    return folder


def refusals(folder: Path, data: dict[str, Any], out: Path) -> list[str]:
    """What quantize and plan say; "" where they refuse nothing."""
    data = json.loads(json.dumps(data).replace("MODEL", str(folder)))
    data = data | {"model": str(folder), "output": {"engine": None} | data.get("output", {})}
    words = []
    for run in (lambda recipe: quantize(recipe, out, progress=False), lambda recipe: plan(None, recipe)):
        try:
            run(from_data(data))
            words.append("")
        except UserError as error:
            words.append(str(error))
    return words


@pytest.mark.parametrize("case", [case for case in FOLDERS if case != "no weights"])
def test_in_the_same_words(tmp_path: Path, case: str) -> None:
    damage, data = FOLDERS[case]
    damage(model_folder(tmp_path / "m"))
    of_quantize, of_plan = refusals(tmp_path / "m", data, tmp_path / "out")
    assert of_quantize
    assert of_plan == of_quantize
    assert not (tmp_path / "out").exists()


def test_neither_refuses_what_is_well(tmp_path: Path) -> None:
    assert refusals(model_folder(tmp_path / "m"), PLAIN, tmp_path / "out") == ["", ""]


def test_config_alone_is_enough(tmp_path: Path) -> None:
    without("model.safetensors", "tokenizer.json", "tokenizer_config.json")(model_folder(tmp_path / "m"))
    found = plan(tmp_path / "m", GPTQ | {"output": {"engine": None}})
    assert not found.weights_seen
    assert found.calibration is not None
    assert found.calibration.tokens == 16 * 32
