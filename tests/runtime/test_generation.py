"""A prompt's text piece by piece: whoever stops reading early frees the request."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantkit.runtime.engine.llm import LLM
from quantkit.runtime.engine.request import SamplingParams
from quantkit.runtime.generation import Writer

BUNDLED = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
CHAT = "{% for m in messages %}<{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(BUNDLED, dtype="float32", num_blocks=8)


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize("how", ["closed", "interrupted", "dropped"])
def test_stopping_early_frees_the_request(llm: LLM, how: str, chat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, also where something else (a debugger, a traceback) still holds the engine's stream."""
    held: list[Iterator[Any]] = []

    def stream(*arguments: Any) -> Iterator[Any]:
        held.append(LLM.stream(llm, *arguments))
        return held[-1]

    monkeypatch.setattr(llm, "stream", stream)
    monkeypatch.setattr(llm.tokenizer, "chat_template", CHAT)
    writer = Writer(llm, SamplingParams(temperature=0, max_tokens=40))
    pieces: Any = writer.answer("def ") if chat else writer.write("def ")
    assert next(pieces)
    assert llm.unfinished == 1
    if how == "closed":
        pieces.close()
    elif how == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            pieces.throw(KeyboardInterrupt)
    else:
        del pieces
    assert llm.unfinished == 0
    assert llm.scheduler.blocks.free == llm.scheduler.blocks.blocks
    assert writer.last is not None
    assert writer.last.finish_reason is None or writer.last.finish_reason == "abort"
    assert 0 < len(writer.last.token_ids) < 40
    llm.scheduler.check()
