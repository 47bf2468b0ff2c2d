"""The model card: read by the Hub's own parser, ours until somebody edits it, and without anybody's paths."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import EvalResult

from quantkit.report.card import base_model, card_is_ours, model_card
from quantkit.report.measurements import Measurements
from tests.synthetic_reports import document, measurements, run


def read(content: str) -> ModelCard:
    return ModelCard(content)


def test_the_hubs_parser_reads_it() -> None:
    original = "---\nlicense: llama3.1\nlicense_link: LICENSE\nlanguage: [en]\ntags: [chat]\n---\nHello"
    card = read(model_card(document(), None, original))
    data = card.data.to_dict()
    assert data["base_model"] == "meta-llama/Llama-3.1-70B"
    assert data["base_model_relation"] == "quantized"
    assert (data["license"], data["license_link"], data["language"]) == ("llama3.1", "LICENSE", ["en"])
    assert data["library_name"] == "transformers"
    assert {"quantkit", "quantized", "gptq", "awq", "int4", "compressed-tensors"} <= set(data["tags"])
    results = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results or []}
    assert results["wikitext2", "kl_divergence"] == 0.021
    assert results["general", "perplexity"] == 3.21
    assert results["arc_easy", "acc"] == 0.801
    assert all(isinstance(one, EvalResult) and one.metric_name for one in card.data.eval_results or [])
    assert "| KL from the original, nats | 0.034 (0.0306 to 0.0374) | at most 0.05 |" in card.text
    assert "vllm serve" in card.text
    assert "trtllm-serve" not in card.text  # it refuses the folder


def test_what_was_not_measured_is_no_result() -> None:
    card = read(model_card(document(run(1), Measurements()), None, None))
    assert "model-index" not in card.content
    assert "license" not in card.data.to_dict()
    assert "License: missing here" in card.text
    assert "| flips | missing |" in card.text


def test_ours_until_it_is_edited() -> None:
    content = model_card(document(), None, None)
    assert card_is_ours(content)
    assert not card_is_ours(content.replace("## Use", "## How I use it"))
    assert not card_is_ours(content.replace("base_model_relation: quantized", "base_model_relation: finetune"))
    assert not card_is_ours("# A card of somebody\n")


def test_names_are_text() -> None:
    report = run(1)
    text = measurements(report).texts[0]
    evil = "/home/somebody/secret/a|b <script>\n# x.txt"
    measured = measurements(report, texts=(type(text)(evil, *[getattr(text, name) for name in text.__slots__[1:]]),))
    content = model_card(document(report, measured), None, None)
    assert read(content).data.eval_results
    assert "somebody" not in read(content).text.replace("wikitext2", "") or "/home/somebody" not in content
    assert "<script>" not in read(content).text.replace(r"\<script\>", "")


@pytest.mark.parametrize("card", ["no metadata", "---\nlicense: [\n---\n", "---\n- a\n---\n", ""])
def test_cards_that_say_nothing(card: str) -> None:
    assert "license" not in read(model_card(document(), None, card)).data.to_dict()


@pytest.mark.parametrize(
    ("model", "folder", "expected"),
    [
        ("org/model", None, "org/model"),
        ("models/My-Llama", "models/My-Llama", "My-Llama"),
        ("/data/My-Llama", None, "My-Llama"),
        ("/cache/models--org--model/snapshots/8f1", "models--org--model/snapshots/8f1", "org/model"),
        (None, None, None),
    ],
)
def test_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, folder: str, expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    place = None
    if folder is not None:
        place = tmp_path / folder
        place.mkdir(parents=True)
    assert base_model(model, place) == expected
