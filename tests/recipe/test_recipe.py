"""Recipes: strict at every level, every mistake at once with its line, and the same after a round trip."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from quantkit.errors import UserError
from quantkit.recipe.load import from_data, load, recipe_names, recipe_text, schema
from quantkit.recipe.number_formats import Weights
from quantkit.recipe.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "recipes").rglob("*.yaml"))
CALIBRATION = "calibration: {data: text.txt}\n"


def errors(tmp_path: Path, text: str, *sets: str) -> list[str]:
    """The messages of a bad recipe, with the folder cut off the file's name."""
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load(file, sets)
    head, *messages = str(caught.value).replace(f"{tmp_path}/", "").splitlines()
    assert head.startswith("recipe r.yaml has ")
    return messages


def good(tmp_path: Path, text: str, *sets: str, **options: Any) -> Recipe:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    return load(file, sets, **options)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_load(path: Path) -> None:
    recipe = load(path)
    assert load(path.stem) == recipe
    header = recipe_text(path.stem).splitlines()
    assert header[0].startswith("# ")
    assert any(line.startswith("# Measured: ") for line in header)
    assert recipe.model is None
    assert "examples/" not in path.read_text().partition("\n\n")[2]  # no file of the repository
    assert recipe.calibration is None or recipe.calibration.data == "general"


def test_the_promised_recipes_are_shipped() -> None:
    promised = {"rtn-w4a16", "rtn-w8a16", "gptq-w4a16", "gptq-w4a16-g32", "awq", "awq-gptq-w4a16", "gptq-w3a16"}
    assert promised <= set(recipe_names())
    scheme = {name: load(name).weights for name in promised}
    assert [scheme[n].symmetric for n in ("awq", "awq-gptq-w4a16", "gptq-w4a16")] == [False, False, True]
    assert (scheme["rtn-w8a16"].group_columns, load("rtn-w8a16").calibration) == (-1, None)
    assert (scheme["gptq-w4a16-g32"].group_columns, scheme["gptq-w3a16"].bits) == (32, 3)
    assert [load("awq-gptq-w4a16").transforms[0].name, scheme["awq-gptq-w4a16"].algorithm] == ["awq", "gptq"]


TYPOS = {
    "top": ("weigths: {bits: 4}", "r.yaml:1: weigths: unknown key; did you mean 'weights'?"),
    "calibration": (
        "calibration:\n  data: x\n  sampels: 3",
        "r.yaml:3: calibration.sampels: unknown key; did you mean 'samples'?",
    ),
    "weights": ("weights:\n  grup_size: 64", "r.yaml:2: weights.grup_size: unknown key; did you mean 'group_size'?"),
    "algorithm": (
        "weights:\n  algorithm: gtpq",
        "r.yaml:2: weights.algorithm.gtpq: unknown name; did you mean 'gptq'?",
    ),
    "algorithm option": (
        f"{CALIBRATION}weights:\n  algorithm:\n    gptq:\n      dampening: 0.1",
        "r.yaml:5: weights.algorithm.gptq.dampening: unknown key; did you mean 'damping'?",
    ),
    "transform": (f"{CALIBRATION}transforms:\n- awk", "r.yaml:3: transforms.0.awk: unknown name; did you mean 'awq'?"),
    "transform option": (
        f"{CALIBRATION}transforms:\n- awq:\n    candidate: 3",
        "r.yaml:4: transforms.0.awq.candidate: unknown key; did you mean 'candidates'?",
    ),
    "override": (
        "overrides:\n- match: a\n  skp: true\n  skip: true",
        "r.yaml:3: overrides.0.skp: unknown key; did you mean 'skip'?",
    ),
    "override weights": (
        "overrides:\n- match: a\n  weights:\n    bit: 8",
        "r.yaml:4: overrides.0.weights.bit: unknown key; did you mean 'bits'?",
    ),
    "output": ("output:\n  engin: vllm", "r.yaml:2: output.engin: unknown key; did you mean 'engine'?"),
    "no near name": (
        "output:\n  zzz: 1",
        "r.yaml:2: output.zzz: unknown key; valid here: format, engine, tp, max_shard_gb",
    ),
    "far value": (
        "output: {engine: zzz}",
        "r.yaml:1: output.engine: got the text 'zzz'; "
        "must be one of vllm, sglang, transformers, llama.cpp, tensorrt-llm",
    ),
    "value": (
        "output: {engine: vlm}",
        "r.yaml:1: output.engine: unknown value 'vlm'; did you mean 'vllm'?",
    ),
}


@pytest.mark.parametrize("case", TYPOS, ids=str)
def test_typos_at_every_level(tmp_path: Path, case: str) -> None:
    text, message = TYPOS[case]
    assert errors(tmp_path, text) == [message]


WRONG = {
    "bits too many": ("weights: {bits: 9}", "weights.bits: must be at most 8, got 9"),
    "bits too few": ("weights: {bits: 1}", "weights.bits: must be at least 2, got 1"),
    "bits text": ('weights: {bits: "4"}', "weights.bits: must be a whole number, got the text '4'"),
    "bits bool": ("weights: {bits: true}", "weights.bits: must be a whole number, got true"),
    "bits float": ("weights: {bits: 4.5}", "weights.bits: must be a whole number, got 4.5"),
    "no is text": ("weights: {symmetric: no}", "weights.symmetric: must be true or false, got the text 'no'"),
    "empty section": ("weights:", "weights: must be a mapping of keys, got nothing"),
    "section is text": ("output: vllm", "output: must be a mapping of keys, got the text 'vllm'"),
    "list is text": ("ignore: lm_head", "ignore: must be a list, got the text 'lm_head'"),
    "group size": (
        "weights: {group_size: 0}",
        "weights.group_size: must be a positive whole number, "
        "channel (one scale per output row), tensor or block, got 0",
    ),
    "nan": ("output: {max_shard_gb: .nan}", "output.max_shard_gb: must be a number, got nan"),
    "two algorithms": (
        f"{CALIBRATION}weights: {{algorithm: {{rtn: , gptq: }}}}",
        "weights.algorithm: name exactly one of rtn, gptq, got 2",
    ),
    "algorithm is a number": (
        "weights: {algorithm: 3}",
        "weights.algorithm: must be a name (rtn, gptq) or {name: {option: value}}, got 3",
    ),
    "override without match": ("overrides: [{skip: true}]", "overrides.0.match: this key is required"),
    "override that does nothing": (
        "overrides: [{match: a}]",
        "overrides.0: give either weights: {keys to change}, activations or a scheme, or skip: true",
    ),
    "bad regex": (
        'ignore: ["re:("]',
        "ignore.0: '(' is not a regular expression: missing ), unterminated subpattern at position 0",
    ),
    "glob": (
        'ignore: ["*.down_proj"]',
        r"ignore.0: '*.down_proj' looks like a glob: write it as a regular expression, 're:.*\.down_proj'",
    ),
    "tag": ("model: !!python/name:os.system x", "model: tags (tag:yaml.org,2002:python/name:os.system) are not read"),
    "alias": ("model: &a x\nignore: [*a]", "ignore.0: aliases (*name) are not read: write the value out"),
}


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_wrong_values(tmp_path: Path, case: str) -> None:
    text, message = WRONG[case]
    (found,) = errors(tmp_path, text)
    assert message in found


def test_every_problem_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = (
        "model: 3\ntransforms: [awq]\nweights:\n  bits: 4\n  bits: 12\n  symetric: true\n"
        "overrides:\n- match: a\n  weights: {bits: 1}\noutput: {format: gguf}\ncalibration: null\n"
    )
    found = errors(tmp_path, text, "ignore=x", "nothing")
    assert [message.split(": ")[:2] for message in found] == [
        ["r.yaml:1", "model"],
        ["r.yaml:2", "transforms.0"],
        ["r.yaml:5", "weights.bits"],
        ["r.yaml:6", "weights.symetric"],
        ["r.yaml:9", "overrides.0.weights.bits"],
        ["r.yaml:10", "output.format"],
        ["--set nothing", "write it as key.path=value, like weights.group_size=64"],
        ["--set ignore=x", "ignore"],
    ]
    assert "awq needs calibration text: add a section like calibration:" in found[1]
    assert "duplicate key, already given on line 4" in found[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [a,\nweights: 3", "r.yaml:2: not valid YAML: "),
        ("model: a: b", "r.yaml:1: not valid YAML: mapping values are not allowed here"),
        ("model: x\n\tweights: 1", "r.yaml:2: not valid YAML: "),
        ("model: x\n---\nmodel: y", "r.yaml:2: not valid YAML: expected a single document"),
        ("", "r.yaml:1: the file is empty"),
        ("- model", "r.yaml:1: a recipe is a mapping of keys like weights:, this is a list"),
        ("[" * 600, "r.yaml:1: not valid YAML: nested too deeply"),
        ("1: x", "r.yaml:1: recipe: the key 1 is not text"),
    ],
    ids=["flow", "colon", "tab", "documents", "empty", "list", "deep", "key"],
)
def test_not_a_recipe(tmp_path: Path, text: str, message: str) -> None:
    assert errors(tmp_path, text)[0].startswith(message)


def test_a_syntax_error_shows_its_line(tmp_path: Path) -> None:
    assert errors(tmp_path, "weights:\n  bits: 4: 5\n")[1] == "      bits: 4: 5"


def test_yaml_1_2_numbers(tmp_path: Path) -> None:
    recipe = good(tmp_path, CALIBRATION + "weights: {algorithm: {gptq: {damping: 1e-4}}, bits: 0x3, group_size: 0o40}")
    assert recipe.weights.options.damping == 1e-4  # type: ignore[union-attr]
    assert (recipe.weights.bits, recipe.weights.group_size) == (3, 32)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"model: \xff\n")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 7\)"):
        load(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(UserError, match="this is not a recipe"):
        load(tmp_path / "r.yaml")
    with pytest.raises(UserError, match="is a folder, not a recipe file"):
        load(tmp_path)
    with pytest.raises(
        UserError, match=r"no recipe or file named `recipes/gptq-w4a.yaml`\nhint: did you mean `gptq-w4a16`\?"
    ):
        load("recipes/gptq-w4a.yaml")
    with pytest.raises(UserError, match="did you mean `awq`"):
        load("awk")


def test_settings_on_top(tmp_path: Path) -> None:
    recipe = good(
        tmp_path,
        CALIBRATION + "transforms: [awq]\nweights: {bits: 4, algorithm: rtn}\noverrides: [{match: a, skip: true}]",
        "weights.group_size=64",
        "weights.algorithm.gptq.damping=1e-3",
        "weights.algorithm.gptq.act_order=false",
        "transforms.0.awq.candidates=5",
        "calibration.seed=null",
        "overrides.0.match=re:x=y",
        "ignore=[a, b]",
        "output.engine=vllm",
        model="elsewhere",
    )
    options = recipe.weights.options
    assert (recipe.weights.group_size, recipe.weights.algorithm, recipe.weights.bits) == (64, "gptq", 4)
    assert (options.damping, options.act_order) == (1e-3, False)  # type: ignore[union-attr]
    assert recipe.transforms[0].options.candidates == 5
    assert recipe.calibration is not None
    assert (recipe.calibration.seed, recipe.calibration.data) == (None, "text.txt")
    assert (recipe.overrides[0].match, recipe.ignore, recipe.output.engine) == ("re:x=y", ["a", "b"], "vllm")
    assert recipe.model == "elsewhere"


def test_settings_of_a_mix_given_in_short(tmp_path: Path) -> None:
    recipe = good(tmp_path, "gguf: q4_k_m\n", "gguf.output=q8_0", "gguf.imatrix=m.gguf")
    assert recipe.gguf is not None
    assert (recipe.gguf.mix, recipe.gguf.output, recipe.gguf.imatrix) == ("Q4_K_M", "Q8_0", "m.gguf")
    other = good(tmp_path, "gguf: q4_k_m\n", "gguf.mix={size: 3.6MB}").gguf
    assert other is not None
    assert other.model_dump()["mix"] == {"size": 3600000}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("weights.grop_size=64", "weights.grop_size: unknown key; did you mean 'group_size'?"),
        ("wieghts.bits=4", "wieghts: unknown key; did you mean 'weights'?"),
        ("weights.bits=12", "weights.bits: must be at most 8, got 12"),
        ("weights.algorithm.gtpq.damping=1", "weights.algorithm.gtpq: unknown name; did you mean 'gptq'?"),
        ("weights.bits", "write it as key.path=value, like weights.group_size=64"),
        ("weights..bits=3", "write it as key.path=value, like weights.group_size=64"),
        ("weights.bits=[3", "'[3' is not a YAML value"),
        ("model.name=x", "model holds 'm', which has no keys"),
        ("ignore.3=x", "ignore is a list with positions 0 to 0, not '3'"),
    ],
    ids=str,
)
def test_bad_settings(tmp_path: Path, setting: str, message: str) -> None:
    text = "model: m\nweights: {bits: 4}\nignore: [lm_head]\n"
    assert errors(tmp_path, text, setting) == [f"--set {setting}: {message}"]


def test_bad_model_option(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--model: model: must be some text"):
        good(tmp_path, "weights: {bits: 4}", model="")


def calibration_data(recipe: Recipe) -> Any:
    assert recipe.calibration is not None
    return recipe.calibration.data


def test_paths_of_a_file_are_found_here_or_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes, here = tmp_path / "root" / "recipes", tmp_path / "here"
    for folder in (recipes, here):
        folder.mkdir(parents=True)
    (recipes / "r.yaml").write_text("model: ./m\ncalibration: {data: d.txt}\n")
    monkeypatch.chdir(here)
    for elsewhere in (recipes.parent, tmp_path):  # neither the folder above nor any other one is looked into
        (elsewhere / "d.txt").write_text("x")
    recipe = load(recipes / "r.yaml")
    assert (recipe.model, calibration_data(recipe)) == ("./m", "d.txt")
    (recipes / "d.txt").write_text("x")
    (recipes / "m").mkdir()
    recipe = load(recipes / "r.yaml")
    assert (recipe.model, calibration_data(recipe)) == (str(recipes / "m"), str(recipes / "d.txt"))
    (here / "d.txt").write_text("x")
    assert calibration_data(load(recipes / "r.yaml")) == "d.txt"


def test_an_importance_matrix_lies_here_or_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "r.yaml").write_text("gguf: {mix: q4_0, imatrix: m.gguf}\n")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    recipe = load(tmp_path / "r.yaml")
    assert recipe.gguf is not None
    assert recipe.gguf.imatrix == str(tmp_path / "m.gguf")
    assert recipe.settings()["gguf"]["imatrix"] == "m.gguf"  # what is in it counts, not where it lies
    assert recipe.resolved()["gguf"]["imatrix"] == str(tmp_path / "m.gguf")


def test_a_file_may_be_called_like_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wikitext").write_text("x")
    for data in ("./wikitext", "wikitext"):
        (tmp_path / "r.yaml").write_text(f"calibration: {{data: {data}}}\n")
        assert calibration_data(load("r.yaml")) == data
    (tmp_path / "r.yaml").write_text("calibration: {data: [{data: d.txt, weight: 2}, general]}\n")
    (tmp_path / "d.txt").write_text("x")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert [source.data for source in calibration_data(load("../r.yaml"))] == ["../d.txt", "general"]


def test_settings_are_not_looked_for_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "r.yaml").write_text("calibration: {}\n")
    (tmp_path / "d.txt").write_text("x")
    recipe = load(tmp_path / "r.yaml", ["calibration.data=d.txt"], "d.txt")
    assert (recipe.model, calibration_data(recipe)) == ("d.txt", "d.txt")


@pytest.mark.parametrize("how", ["file", "options"])
def test_the_home_folder_is_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    named = "model: ~/m\ncalibration: {data: ~/d.txt}\n"
    (tmp_path / "r.yaml").write_text(named if how == "file" else "calibration: {}\n")
    recipe = load("~/r.yaml") if how == "file" else load("~/r.yaml", ["calibration.data=~/d.txt"], "~/m")
    assert (recipe.model, calibration_data(recipe)) == (f"{tmp_path}/m", f"{tmp_path}/d.txt")
    with pytest.raises(UserError, match="no home folder for '~nobody-here'"):
        load("~/r.yaml", model="~nobody-here/m")


def test_the_report_of_a_run_is_a_recipe(tmp_path: Path) -> None:
    recipe = good(tmp_path, CALIBRATION + "weights: {group_size: 32, algorithm: {gptq: {sweeps: 1}}}", model="org/m")
    for data in (recipe.resolved(), {k: v for k, v in recipe.resolved().items() if k != "model"}):
        report = {"quantkit": "1.0", "model": "org/m", "recipe": data, "blocks": [{"pad": "x" * (2 << 20)}]}
        (tmp_path / "again.json").write_text(json.dumps(report, indent=2))
        assert load(tmp_path / "again.json") == recipe
    assert load(tmp_path / "again.json", ["weights.bits=3"], "other").weights.bits == 3
    data = {"quantkit": "1.0", "recipe": {"weights": {"bitz": 4}}}
    (tmp_path / "again.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"again.json: weights.bitz: unknown key; did you mean 'bits'\?"):
        load(tmp_path / "again.json")


LINEARS = {
    "model.layers.0.self_attn.q_proj": "Linear",
    "model.layers.0.mlp.down_proj": "Linear",
    "model.layers.1.mlp.down_proj": "Linear",
    "model.layers.1.mlp.experts": "Experts",
    "lm_head": "Linear",
}


def test_the_first_override_that_matches_counts(tmp_path: Path) -> None:
    recipe = good(
        tmp_path,
        """
calibration: {data: x}
weights: {bits: 4, group_size: 32, algorithm: {gptq: {damping: 0.05, act_order: false}}}
overrides:
- {match: model.layers.0.mlp.down_proj, weights: {bits: 8, algorithm: {gptq: {damping: 0.5}}}}
- {match: "re:.*down_proj", weights: {algorithm: rtn, group_size: -1}}
- {match: Experts, skip: true}
- {match: "re:down_proj", weights: {bits: 2}}
""",
    )
    q, first, second, experts, head = (recipe.weights_for(*linear) for linear in LINEARS.items())
    assert q == recipe.weights
    assert first is not None
    assert (first.bits, first.group_size, first.algorithm) == (8, 32, "gptq")
    assert (first.options.damping, first.options.act_order) == (0.5, False)  # type: ignore[union-attr]
    assert second is not None
    assert (second.bits, second.group_columns, second.algorithm) == (4, -1, "rtn")
    assert experts is None
    assert head is None
    assert recipe.unmatched(LINEARS) == [  # anchored at the start of the name, as re.match is
        "overrides.3.match: 're:down_proj' matches no linear; did you mean 'down_proj'?"
    ]


def test_patterns_without_effect_are_named(tmp_path: Path) -> None:
    text = """
ignore: [lm_head, "re:.*down_prj", model.layers.0.self_attn.q_prj, Conv1D]
overrides:
- {match: "re:.*zzz", skip: true}
- {match: Experts, weights: {bits: 8}}
- {match: "re:.*(q|down)_proj", weights: {bits: 8}}
- {match: "re:.*layers.1.mlp.down_proj", weights: {bits: 3}}
"""
    found = good(tmp_path, text, "ignore.0=Experts").unmatched(LINEARS)
    assert found == [
        "ignore.1: 're:.*down_prj' matches no linear; did you mean 'down_proj'?",
        "ignore.2: 'model.layers.0.self_attn.q_prj' matches no linear; did you mean 'model.layers.0.self_attn.q_proj'?",
        "ignore.3: 'Conv1D' matches no linear",
        "overrides.0.match: 're:.*zzz' matches no linear; names end in down_proj, experts, lm_head, q_proj",
        "overrides.1.match: 'Experts' matches only what `ignore` leaves out (model.layers.1.mlp.experts): "
        "remove that from `ignore`",
        "overrides.3.match: 're:.*layers.1.mlp.down_proj' matches only what overrides.2 already covers "
        "(model.layers.1.mlp.down_proj): the first match counts",
    ]
    assert good(tmp_path, "weights: {bits: 4}").unmatched({"h.0.fc": "Linear"}) == []


NEVER = {"lm_head": "outside the decoder blocks", "model.layers.0.mlp.gate": "router"}
LIMIT = "quantkit quantizes the linears of the decoder blocks"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ignore: []", f"ignore: [] cannot have an effect: lm_head is never quantized ({NEVER['lm_head']}); {LIMIT}"),
        ("overrides: [{match: lm_head, weights: {bits: 8}}]", f"lm_head is never quantized ({NEVER['lm_head']})"),
        ("overrides: [{match: 're:.*gate$', scheme: FP8_DYNAMIC}]", "model.layers.0.mlp.gate is never quantized (rout"),
        ("ignore: ['re:.*']\noverrides: [{match: lm_head, activations: {type: fp8}}]", LIMIT),
    ],
    ids=["ignore", "head", "router", "ignored too"],
)
def test_what_is_never_quantized_is_named_as_the_limit(tmp_path: Path, text: str, message: str) -> None:
    (found,) = good(tmp_path, text).unmatched({"model.layers.0.mlp.up_proj": "Linear"}, NEVER)
    assert message in found


@pytest.mark.parametrize(
    "text",
    [
        "weights: {bits: 4}",
        "ignore: [lm_head, 're:.*gate$']",
        "overrides: [{match: lm_head, skip: true}]",
        "overrides: [{match: 're:.*(lm_head|up_proj)', weights: {bits: 8}}]",
    ],
)
def test_patterns_that_agree_with_the_limit_are_fine(tmp_path: Path, text: str) -> None:
    assert good(tmp_path, text).unmatched({"model.layers.0.mlp.up_proj": "Linear"}, NEVER) == []
    assert good(tmp_path, "ignore: []").unmatched({"h.0.fc": "Linear"}) == []  # no head: nothing was promised


CONTRADICTIONS = {
    "bits": ("scheme: W4A16\nweights: {bits: 8}", [], "r.yaml:2: weights.bits: 8 contradicts `scheme: W4A16`, which m"),
    "type": ("scheme: FP8\nweights: {type: int, group_size: 8}", [], "weights.type: int contradicts `scheme: FP8`"),
    "zero points": ("scheme: W4A16_ASYM\nweights: {symmetric: true}", [], "which means symmetric: false"),
    "blocks": ("scheme: FP8_BLOCK\nweights: {group_size: channel}", [], "which means group_size: block"),
    "inputs": ("scheme: W4A16\nactivations: {type: int8}", [], "which means inputs in 16 bits"),
    "no inputs": (
        "scheme: W8A8\nactivations: null",
        [],
        "null contradicts `scheme: W8A8`, which means activations: int8",
    ),
    "static": ("scheme: FP8_DYNAMIC\nactivations: {dynamic: false}", [], "false contradicts `scheme: FP8_DYNAMIC`"),
    "override": (
        "overrides:\n- match: a\n  scheme: W4A16\n  weights:\n    bits: 3",
        [],
        "r.yaml:5: overrides.0.weights",
    ),
    "set over file": ("scheme: W4A16", ["weights.bits=8"], "--set weights.bits=8: weights.bits: 8 contradicts"),
    "set and set": (
        "weights: {bits: 4}",
        ["weights.bits=8", "scheme=W4A16"],
        "--set weights.bits=8: weights.bits: 8 co",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS, ids=str)
def test_a_key_that_contradicts_the_scheme_beside_it(tmp_path: Path, case: str) -> None:
    text, sets, message = CONTRADICTIONS[case]
    found = errors(tmp_path, CALIBRATION + text.replace("r.yaml:2", ""), *sets)
    expected = message.replace("r.yaml:2", "r.yaml:3").replace("r.yaml:5", "r.yaml:6")
    assert any(expected in line for line in found), found
    with pytest.raises(UserError, match="contradict"):
        from_data({"scheme": "W4A16", "weights": {"bits": 8}})
    with pytest.raises(ValidationError, match="contradicts"):
        Recipe.model_validate({"overrides": [{"match": "a", "scheme": "W8A16", "weights": {"bits": 4}}]})


@pytest.mark.parametrize(
    "text",
    [
        "scheme: W4A16\nweights: {bits: 4, group_size: 32, symmetric: false}",
        "scheme: W8A16\nweights: {group_size: 128}",
        "scheme: W8A8\nactivations: {symmetric: false, observer: mse}",
        "scheme: MXFP4\nactivations: null",
        "scheme: FP8_DYNAMIC\nweights: {type: fp8, group_size: tensor, algorithm: gptq}",
    ],
)
def test_a_key_that_agrees_with_the_scheme_or_that_it_leaves_open(tmp_path: Path, text: str) -> None:
    recipe = good(tmp_path, CALIBRATION + text)
    assert from_data(recipe.resolved()) == recipe


def test_a_scheme_given_as_a_setting_replaces_the_files_format(tmp_path: Path) -> None:
    recipe = good(tmp_path, "weights: {bits: 8, group_size: 32}\nactivations: {type: int8}", "scheme=W4A16")
    assert (recipe.weights.bits, recipe.weights.group_size, recipe.activations) == (4, 128, None)


def test_recipes_from_python_are_checked_too() -> None:
    with pytest.raises(ValidationError, match="gptq needs calibration text"):
        Recipe.model_validate({"weights": {"algorithm": "gptq"}, "calibration": None})
    with pytest.raises(ValidationError, match="frozen"):
        Weights().bits = 3  # type: ignore[misc]
    assert Weights.model_validate({"group_size": -1}) == Weights(group_size="channel")


OPTIONS = {
    "rtn": st.fixed_dictionaries({}, optional={"range": st.sampled_from(["mse", "minmax"])}),
    "gptq": st.fixed_dictionaries(
        {}, optional={"damping": st.floats(0, 1), "act_order": st.booleans(), "block_size": st.integers(1, 512)}
    ),
    "awq": st.fixed_dictionaries({}, optional={"candidates": st.integers(1, 99)}),
}


def choice(*names: str) -> st.SearchStrategy[Any]:
    return st.one_of(st.sampled_from(names), *(st.fixed_dictionaries({n: OPTIONS[n] | st.none()}) for n in names))


WEIGHTS = st.fixed_dictionaries(
    {},
    optional={
        "bits": st.integers(2, 8),
        "group_size": st.integers(1, 4096) | st.sampled_from(["channel", -1]),
        "symmetric": st.booleans(),
        "algorithm": choice("rtn", "gptq"),
        "on_misfit": st.sampled_from(["error", "channel", "skip", "smaller-group"]),
    },
)
MATCH = st.sampled_from(["lm_head", "re:.*down_proj", "Linear"])
OVERRIDE = st.fixed_dictionaries({"match": MATCH, "skip": st.just(True)}) | st.fixed_dictionaries(
    {"match": MATCH, "weights": WEIGHTS}
)
RECIPES = st.fixed_dictionaries(
    {"calibration": st.fixed_dictionaries({"data": st.just("x.txt")}, optional={"seed": st.integers(0) | st.none()})},
    optional={
        "model": st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1),
        "transforms": st.lists(choice("awq"), max_size=2),
        "weights": WEIGHTS,
        "overrides": st.lists(OVERRIDE, max_size=3),
        "ignore": st.lists(MATCH),
        "output": st.fixed_dictionaries({}, optional={"max_shard_gb": st.floats(0.001, 100)}),
    },
)


def test_resolved_overrides_keep_only_what_they_change(tmp_path: Path) -> None:
    text = CALIBRATION + (
        "weights: {bits: 3, algorithm: {gptq: {damping: 0.5, act_order: false}}}\n"
        "overrides: [{match: Linear, weights: {group_size: 32, algorithm: {gptq: {damping: 0.25}}}}]"
    )
    recipe = good(tmp_path, text)
    changes = {"group_size": 32, "algorithm": {"gptq": {"damping": 0.25}}}
    assert recipe.resolved()["overrides"] == [{"match": "Linear", "weights": changes}]
    again = Recipe.model_validate(recipe.resolved())
    assert again.weights_for("a", "Linear") == recipe.weights_for("a", "Linear")


@settings(max_examples=60, deadline=None)
@given(RECIPES)
def test_resolved_recipes_are_the_same_recipe(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(data)
    plain = recipe.resolved()
    file = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    file.write_text(json.dumps(plain))  # JSON is YAML 1.2
    again = load(file)
    assert again == recipe
    assert again.resolved() == plain
    for name, kind in LINEARS.items():
        assert again.weights_for(name, kind) == recipe.weights_for(name, kind)


def accepts(rule: dict[str, Any], value: Any, definitions: dict[str, Any]) -> bool:
    """The part of JSON Schema that recipes use: enough to see that shipped files pass and typos do not."""
    if "$ref" in rule:
        return accepts(definitions[rule["$ref"].rsplit("/", 1)[-1]], value, definitions)
    if "anyOf" in rule:
        return any(accepts(part, value, definitions) for part in rule["anyOf"])
    if value not in rule.get("enum", [value]) or value != rule.get("const", value):
        return False
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
    if "type" in rule and not (value is None if rule["type"] == "null" else isinstance(value, kinds[rule["type"]])):
        return False
    if isinstance(value, dict):
        known, other = rule.get("properties", {}), rule.get("additionalProperties")
        if not (rule.get("minProperties", 0) <= len(value) <= rule.get("maxProperties", 99)):
            return False
        rules = [(known.get(k, other), v) for k, v in value.items()]
        return all(isinstance(r, dict) and accepts(r, v, definitions) for r, v in rules)
    if isinstance(value, list):
        return all(accepts(rule["items"], item, definitions) for item in value)
    return not isinstance(value, int | float) or rule.get("minimum", value) <= value <= rule.get("maximum", value)


def test_schema_describes_the_recipes() -> None:
    from ruamel.yaml import YAML

    rules = schema()
    json.dumps(rules)
    definitions = rules["$defs"]
    for path in SHIPPED:
        data = YAML(typ="safe").load(path.read_text())
        assert accepts(rules, data, definitions), path
        assert accepts(rules, load(path).resolved(), definitions), path
    for good in ({"mix": {"size": "3.6MB"}}, {"mix": {"bits_per_weight": 4.5}}, {"tensor_types": {"attn_v": "q6_k"}}):
        assert accepts(rules, {"gguf": good}, definitions), good
    bad_gguf = {"gguf": {"tensor_types": {"attn_v": 6}}}, {"gguf": {"mix": {"size": -1}}}, {"gguf": {"mixes": "q4_0"}}
    bad_weights = {"weights": {"bits": 9}}, {"weights": {"algorithm": "gtpq"}}
    for bad in ({"weigths": {}}, {"transforms": [{}]}, *bad_weights, *bad_gguf):
        assert not accepts(rules, bad, definitions), bad
    for name, part in {"Recipe": rules, **definitions}.items():
        for rule in [part, *part.get("anyOf", [])]:
            for key, field in rule.get("properties", {}).items():
                text = field.get("description") or "$ref" in str(field)
                assert text, f"{name}.{key} has no description"
                assert rule["additionalProperties"] is False
