"""quantkit from Python: what each verb of the command does, as a function.

All of them raise UserError for bad input and RunError for a failed run, in the words of the command. Everything heavy
is imported inside: `quantkit.verify` needs no torch.
"""

import copy
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from quantkit.errors import DiskFullError, RunError, UserError
from quantkit.paths import user_path
from quantkit.progress import Mode, check_mode
from quantkit.recipe import load as recipe_files
from quantkit.recipe.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.report.allocation_record import AllocationRecord
    from quantkit.report.conversion_record import ConversionReport, ImatrixReport
    from quantkit.report.plan import Plan
    from quantkit.report.records import Report
    from quantkit.runtime.load import CausalLM
    from quantkit.verification import Verdict

LOG = logging.getLogger("quantkit.api")

RecipeLike = str | os.PathLike[str] | Mapping[str, Any] | Recipe


def quantize(
    model: "str | os.PathLike[str] | nn.Module | None",
    recipe: RecipeLike,
    output: str | os.PathLike[str] | None = None,
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    device: "str | torch.device" = "auto",
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Mode = "auto",
) -> "Report":
    """Quantize a model into a new folder; returns the report that lies in it as quantkit-report.json.

    model        folder or Hub id; None: the recipe's own. A module is taken as by `quantize_module`
    recipe       name of a shipped recipe or a scheme (`quantkit.recipes()`), a YAML file, the quantkit-report.json of a
                 run to repeat, plain data, or a Recipe
    output       new folder, never overwritten. The run works in OUTPUT.partial; called again after a crash, it goes on
                 after the last finished block and ends with the same bytes
    calibration  in place of the recipe's: a file or the name of a data set, a list of texts, a list of chats (lists of
                 {"role", "content"}), a datasets.Dataset, token ids int64 [samples, seq], or an iterable of such
                 tensors or of dicts with `input_ids`, as a DataLoader is
    tokenizer    for a module that is calibrated on text; a folder or Hub id has its own
    device       auto (a GPU where there is one), cpu, cuda, cuda:1 ...
    restart      drop what an earlier, interrupted run has done
    progress     auto: a bar on a terminal or in a notebook, else INFO lines of the logger `quantkit`; plain: those
                 lines on stderr; off. True and False stand for auto and off

    Raises UserError for bad input, before anything is written; RunError for a run that failed.
    """
    if is_module(model):
        return quantize_module(
            model,
            recipe,
            output,
            calibration=calibration,
            tokenizer=tokenizer,
            device=device,
            restart=restart,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )[0]
    if tokenizer is not None:
        raise UserError("tokenizer= is for a module in memory; a folder or Hub id has its own tokenizer")
    name = None if model is None else _path(model, "model", "a model folder, a Hub id or a transformers module")
    if output is None:
        raise UserError("no output folder: quantkit.quantize(model, recipe, OUTPUT)\nhint: OUTPUT is made by the run")
    place = user_path(_path(output, "output", "a folder's path"))
    found, device = as_recipe(recipe, name), _device(device)
    check_mode(progress)
    from quantkit.quantization import early_checks

    expected = None
    if calibration is None:
        folder = early_checks.check_before_torch(found, place, device=device, restart=restart)
        expected = expected_seconds(found, folder, device, trust_remote_code=trust_remote_code)
    from quantkit.quantization import pipeline

    return pipeline.quantize(
        found,
        place,
        calibration=calibration,
        device=device,
        restart=restart,
        trust_remote_code=trust_remote_code,
        progress=progress,
        expected_seconds=expected,
    )


def expected_seconds(recipe: Recipe, folder: Path, device: str, *, trust_remote_code: bool = False) -> float | None:
    """How long a run will take by the plan, shown until it can be measured; None on a GPU, which plans know nothing of.

    None, too, where the plan fails for any reason: the run says what is wrong, and an estimate must not end it.
    """
    import torch

    from quantkit.planner.estimate import estimate

    if not (device == "cpu" or (device == "auto" and not torch.cuda.is_available())):
        return None
    try:
        return estimate(recipe, folder, trust_remote_code=trust_remote_code, run_follows=True).seconds_total
    except Exception:
        return None


def quantize_module(
    model: "nn.Module",
    recipe: RecipeLike,
    output: str | os.PathLike[str] | None = None,
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    device: "str | torch.device" = "auto",
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Mode = "auto",
) -> "tuple[Report, CausalLM]":
    """Quantize a transformers module in memory; returns the report and a new module with packed weights.

    model      a causal language model of transformers. It is left as it was, bit for bit
    output     folder that the checkpoint is kept in; None: it lies in a temporary folder, for as long as the module
               lives. `quantkit.save(module, DIR)` and `module.save_pretrained(DIR)` write it elsewhere at any time
    tokenizer  the model's, where the calibration data is text; it is saved beside the checkpoint
    Other arguments: as in `quantize`.

    The module's tensors are read where they lie. Where transformers would convert them as it saves them, or they are
    spread over devices, the model is first written to a temporary folder, which the log names, and removed afterwards.
    The new module is on the source's device and in its dtype; it can be moved, copied and saved. Of a GGUF file, which
    needs an output and a tokenizer, it is decoded.

    Raises UserError for bad input, RunError for a failed run; nothing is left behind then but OUTPUT.partial, from
    which a run with the same arguments goes on.
    """
    source = _transformers_module(model)
    name = getattr(source, "name_or_path", None) or None
    found = as_recipe(recipe, name)
    device = _device(device)
    check_mode(progress)
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise UserError(f"tokenizer is {_shown(tokenizer)}; expected a tokenizer of transformers")
    place = None if output is None else user_path(_path(output, "output", "a folder's path"))
    if found.gguf is not None and (place is None or tokenizer is None):
        needs = "output=FOLDER, which keeps the file" if place is None else "tokenizer=, which the file holds"
        raise UserError(f"quantize_module: a GGUF file needs a folder and a tokenizer\nhint: pass {needs}")
    from quantkit.quantization import pipeline
    from quantkit.runtime.load import load, load_quantized

    kept = tempfile.TemporaryDirectory(prefix="quantkit-quantized-") if place is None else None
    target = Path(kept.name) / "model" if kept is not None else Path(place or "")
    try:
        with _checkpoint(source, tokenizer) as checkpoint, _without(checkpoint.folder, target if kept else None):
            report = pipeline.quantize(
                found,
                target,
                checkpoint=checkpoint,
                calibration=calibration,
                device=device,
                restart=restart,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
            if found.gguf is not None:
                quantized = load(target, source.dtype, source.device)
            else:
                quantized = load_quantized(target, source.device, trust_remote_code=trust_remote_code, owner=kept)
    except BaseException:
        if kept is not None:
            kept.cleanup()
        raise
    if kept is not None:
        LOG.info("the packed checkpoint is in %s, for as long as the quantized module lives", target)
        quantized.name_or_path = quantized.config._name_or_path = name or ""
    if source.can_generate():
        quantized.generation_config = copy.deepcopy(source.generation_config)
    return report, quantized


def save(model: "PreTrainedModel", folder: str | os.PathLike[str]) -> None:
    """Write the packed checkpoint of a module that `load` or `quantize_module` returned into `folder`.

    Works before and after the module ran, wherever it lies: packed tensors, configuration, tokenizer and report come
    out byte for byte. A module that is not quantized is saved by transformers.
    folder  new, or one that holds no model yet; all of it is written or nothing

    Raises UserError where the folder holds a model or cannot be made, where unquantized weights of the module were
    changed since it was loaded, and where the folder it came from is gone; RunError where writing fails.
    """
    _path(folder, "folder", "a folder's path")
    from quantkit.runtime.save import save as run

    run(model, Path(folder))


def auto(
    model: str | os.PathLike[str] | None,
    max_size: str,
    output: str | os.PathLike[str],
    *,
    candidates: str | Sequence[str] | None = None,
    calibration: Mapping[str, Any] | None = None,
    engine: str | None = None,
    tp: int = 1,
    device: "str | torch.device" = "auto",
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Mode = "auto",
) -> "AllocationRecord":
    """Quantize a model to a size with the least harm: each linear gets the number format that its output can bear.

    model       folder or Hub id
    max_size    "4.5bpw": bits per weight, scales included, of the linears of the decoder blocks; "3.6MB" or "5GB":
                bytes of all .safetensors files, embedding, head and headers included
    output      new folder, never overwritten, with the recipe that made it in recipe.yaml; harms are kept in
                OUTPUT.harms until it is finished, so that a killed run goes on
    candidates  names of formats, or one text with commas: W4A16 (of groups of 32, 64, 128 and a whole row), W4A16:g64,
                FP8_DYNAMIC, ...; None: W2A16 to W6A16 and W8A16, of which an engine keeps those that it loads. Any
                linear may also stay as it is stored
    calibration the keys of a recipe's calibration section: data, samples, seq_len, ...
    engine, tp  the engine that is to load it, over so many devices

    Raises UserError for bad input and a size that cannot be, before anything is measured; RunError for a failed run.
    """
    name = None if model is None else _path(model, "model", "a model folder or a Hub id")
    place = user_path(_path(output, "output", "a folder's path"))
    from quantkit.recipe import candidates as names
    from quantkit.sizes import limit_of

    limit = limit_of(max_size)
    given = candidates.split(",") if isinstance(candidates, str) else candidates
    found = names.candidates(names.DEFAULT if given is None else given)
    base = names.base_recipe(name, dict(calibration or {}), engine, tp)
    check_mode(progress)
    from quantkit.quantization.early_checks import check_before_torch

    check_before_torch(base, place, device=_device(device), restart=True)
    from quantkit.quantization.allocation.run import quantize_to_size

    return quantize_to_size(
        base,
        limit,
        found,
        place,
        device=_device(device),
        restart=restart,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )


def plan(model: str | os.PathLike[str] | None, recipe: RecipeLike, *, trust_remote_code: bool = False) -> "Plan":
    """What quantizing `model` by `recipe` will make and take on this machine, before any weight is read.

    model, recipe  as in `quantize`; of a model, config.json is enough. Bytes and seconds; `Plan.fits` is the verdict.
    Raises UserError for whatever `quantize` would refuse before it reads weights.
    """
    name = None if model is None else _path(model, "model", "a model folder or a Hub id")
    found = as_recipe(recipe, name)
    from quantkit.planner.estimate import plan as run

    return run(found.model, found, trust_remote_code=trust_remote_code)


def verify(
    path: str | os.PathLike[str],
    engine: str | None = None,
    *,
    tp: int = 1,
    hardware: str | None = None,
    checksums: bool = False,
) -> "Verdict":
    """Whether an engine will load a model folder or a GGUF file, on which hardware and with which kernel.

    From headers and JSON alone; of a GGUF file the scales are read as well.

    engine     vllm, sglang, transformers, llama.cpp or tensorrt-llm; None: each of them, and one that loads is enough
    tp         devices each layer is spread over
    hardware   also whether it runs there: cpu, h100, mi300, cuda:8.6 ...
    checksums  also read every file and compare its sha256 with the report's

    Raises UserError for an unknown engine or hardware, a tp below 1, and a path that is no model folder: absent, empty,
    a LoRA adapter, a file with a damaged GGUF header. A model folder that engines refuse is a verdict, not an error.
    """
    name = _path(path, "path", "a model folder's path")
    from quantkit.checkpoint.early_checks import check_verifiable
    from quantkit.verification import verify_folder

    check_verifiable(Path(name))
    return verify_folder(user_path(name), engine, tp, checksums=checksums, hardware=hardware)


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a model folder holds: number formats, bits per weight, bytes by kind, and what is not quantized and why.

    Of a GGUF file: types, bits per weight, keys, shards, and what is odd.

    Plain data, as `quantkit inspect --json` prints. No weight is read.
    Raises UserError for what is neither a readable checkpoint nor a sound GGUF file.
    """
    name = _path(path, "path", "a model folder's path")
    from quantkit.inspection import inspect_folder

    return inspect_folder(user_path(name))


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    format: str | None = None,
    *,
    requantize: bool | str = False,
    token_embedding: str | None = None,
    output_type: str | None = None,
    pre: str | None = None,
    max_shard: str | None = None,
) -> "ConversionReport":
    """Write a folder, ours or another tool's, in another format or as a GGUF file: the same codes and scales exactly.

    output      a new folder, or a new file NAME.gguf
    format      compressed-tensors, awq, gptq, gptq_v2, fp8, fp8_tensor or modelopt; gguf, or None, for NAME.gguf
    requantize  let scales be rounded to numbers that the format can hold; the report says how far. For GGUF the name
                of a mix or of F32, F16 or BF16: all weights are decoded and rounded again (True: the mix of about as
                many bits as the folder has). Without it int4 and int8 in symmetric groups of 32, MXFP4 and NVFP4 keep
                their codes, and dense tensors their dtype; a folder that is not quantized is dense
    token_embedding, output_type  GGUF types of the embedding table and of the head; None: as stored
    pre         llama.cpp's name of the pre-tokenizer; None: found by what the tokenizer does
    max_shard   "4G": several files where one would be larger

    Raises UserError, with nothing left behind, where the source is damaged or, but for GGUF, not quantized, where the
    format cannot hold what is there, or where `output` exists.
    """
    given, place = (
        _path(source, "source", "a model folder's path"),
        _path(output, "output", "a folder's or file's path"),
    )
    from quantkit.gguf_conversion.choices import Choices, is_gguf

    mix = requantize if isinstance(requantize, str) else "auto" if requantize else None
    choices = Choices(mix, token_embedding, output_type, pre, max_shard)
    if is_gguf(Path(place), format):
        from quantkit.gguf_conversion.convert import convert_to_gguf

        return convert_to_gguf(Path(given), Path(place), choices)
    choices.refuse()
    from quantkit.conversion import convert as run

    return run(Path(given), Path(place), str(format), requantize=bool(requantize))


def imatrix(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    calibration: Mapping[str, Any] | None = None,
    device: "str | torch.device" = "auto",
    trust_remote_code: bool = False,
    progress: Mode = "auto",
) -> "ImatrixReport":
    """Write an importance matrix for llama.cpp's tools: E[x^2] of each linear's input, as the original model runs.

    model        folder or Hub id, not quantized
    output       new file, never overwritten: GGUF, or llama.cpp's older form where it ends in .dat
    calibration  the keys of a recipe's calibration section: data, samples, seq_len, ...

    Raises UserError for bad input and for an architecture without GGUF names, before any weight is read.
    """
    name, place = _path(model, "model", "a model folder or a Hub id"), _path(output, "output", "a file's path")
    recipe = as_recipe({"calibration": dict(calibration or {}), "weights": {"algorithm": "gptq"}}, name)
    check_mode(progress)
    from quantkit.quantization.imatrix import make_imatrix

    return make_imatrix(
        recipe, user_path(place), device=_device(device), trust_remote_code=trust_remote_code, progress=progress
    )


def _path(value: Any, what: str, expected: str) -> str:
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise UserError(f"{what} is {_shown(value)}; expected {expected}")
    return os.fspath(value) if isinstance(os.fspath(value), str) else os.fsdecode(value)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, str | int | float | bool):
        return repr(value)
    kind = type(value).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


def as_recipe(recipe: RecipeLike, model: str | None) -> Recipe:
    """The recipe, for this model where one is named."""
    if isinstance(recipe, Mapping):
        recipe = recipe_files.from_data(recipe)
    if isinstance(recipe, Recipe):
        return recipe if model is None else recipe.model_copy(update={"model": model})
    name = _path(recipe, "recipe", "the name of a shipped recipe, a file, a mapping of keys or a quantkit.Recipe")
    return recipe_files.load(name, model=model)


def _device(device: Any) -> str:
    from quantkit.device_names import check_device_name

    check_device_name(str(device))
    return str(device)


def is_module(model: Any) -> "TypeGuard[nn.Module]":
    """Whether it is a torch module; torch is not imported for the question."""
    return any(base.__module__ == "torch.nn.modules.module" for base in type(model).__mro__)


def _transformers_module(model: Any) -> "PreTrainedModel":
    """UserError for what is no module of transformers with its weights in memory, unquantized and without adapters."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        inner = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
        kind, wrapped = type(model).__name__, inner.get(type(model).__name__)
        hint = f"pass model.{wrapped}" if wrapped else "pass a model of transformers, or a folder to quantkit.quantize"
        if kind.startswith("Peft"):
            hint = "pass model.merge_and_unload()"
        raise UserError(f"model is {_shown(model)}, not a transformers model\nhint: {hint}")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            "the model you passed has adapters attached, which a quantized checkpoint cannot hold\n"
            "hint: merge them with PeftModel.merge_and_unload(), and pass the result"
        )
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "_quantkit_origin", None) is not None:
        raise UserError("the model you passed is already quantized\nhint: pass the original model")
    if all(parameter.is_meta for parameter in model.parameters()):
        raise UserError("the model you passed is on the meta device, without weights\nhint: load it with its weights")
    return model


@contextmanager
def _checkpoint(model: "PreTrainedModel", tokenizer: Any) -> "Iterator[Checkpoint]":
    """The module as a checkpoint: its tensors where they lie, or in a temporary folder where that cannot be."""
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.library_output import quiet_libraries
    from quantkit.model.module_checkpoint import ModuleCheckpoint, held_tensors, write_config

    held = held_tensors(model)
    with tempfile.TemporaryDirectory(prefix="quantkit-source-") as name, quiet_libraries():
        folder = Path(name)
        if isinstance(held, str):
            LOG.info("the model is first written to %s, and removed afterwards: %s", folder, held)
            _save_module(model, folder)
        write_config(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        yield Checkpoint.open(folder) if isinstance(held, str) else ModuleCheckpoint(folder, held)


def _save_module(model: "PreTrainedModel", folder: Path) -> None:
    """Save the module by transformers, which sets fields of its config on the way."""
    from transformers import GenerationConfig

    config = model.config
    settings = getattr(model, "generation_config", None)
    try:
        model.config = copy.deepcopy(config)
        if settings is not None:  # transformers refuses to save settings it would warn about; they are written later
            model.generation_config = GenerationConfig()
        model.save_pretrained(folder)
    except OSError as error:
        free = shutil.disk_usage(folder).free
        raise DiskFullError(
            f"{folder}: the model you passed cannot be written there, {free / 2**30:.2f} GiB are free: {error}\n"
            "hint: point TMPDIR at a disk with more room"
        ) from error
    finally:
        model.config = config
        if settings is not None:
            model.generation_config = settings


@contextmanager
def _without(source: Path, target: Path | None) -> Iterator[None]:
    """Errors raised inside name the model and its result instead of temporary folders."""
    try:
        yield
    except (UserError, RunError) as error:
        text = str(error).replace(str(source), "the model you passed")
        if target is not None:
            text = text.replace(f"{target}.partial", "the result").replace(str(target), "the result")
            if isinstance(error, DiskFullError):
                text = (
                    f"{str(error).replace(f'{target}.partial', str(target.parent))}\nhint: pass output=, or set TMPDIR"
                )
        if "no tokenizer" in text:
            text = (
                "the model you passed comes without a tokenizer, and calibration on text needs one\n"
                "hint: pass tokenizer=AutoTokenizer.from_pretrained(...), or token ids as calibration="
            )
        if text == str(error):
            raise
        raise type(error)(text) from None
