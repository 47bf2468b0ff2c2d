"""How often a model's guesses are right when it drafts for its original: speculative decoding as a measure.

The original goes on greedily from pieces of a text, by the paged engine; the model guesses DRAFT_TOKENS tokens ahead.
Where its first wrong guess stands, those behind it count as wrong, as they do when tokens are served.
"""

from typing import Any

import numpy as np
import torch

from quantkit.errors import UserError
from quantkit.library_output import quiet_libraries
from quantkit.runtime.engine.llm import LLM
from quantkit.runtime.engine.request import SamplingParams
from quantkit_eval import bootstrap
from quantkit_eval.perplexity import Windows
from quantkit_eval.results import Acceptance

DRAFT_TOKENS = 4  # guessed at a time, as `quantkit generate --draft` does
PROMPTS = 16  # at most, spread over the text
NEW_TOKENS = 64  # behind each prompt, at most


def acceptance(original: Any, draft: Any, windows: Windows) -> Acceptance:
    """The share of the draft's guesses that the original would have chosen, with an interval over prompts.

    original, draft  models of transformers, which compute as before when this returns. Prompts are the first halves
    of windows. UserError for models that the paged engine does not run.
    """
    W, T = windows.ids_WT.shape
    chosen = torch.linspace(0, W - 1, min(W, PROMPTS)).round().long()
    prompts = windows.ids_WT[chosen, : T // 2].tolist()
    new = min(NEW_TOKENS, T - T // 2)
    kept = [(model, model.config._attn_implementation) for model in (original, draft)]
    try:
        with quiet_libraries():
            llm = LLM(original, draft=draft, num_speculative_tokens=DRAFT_TOKENS, max_num_seqs=PROMPTS, max_model_len=T)
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True))
    finally:
        for model, attention in kept:
            model.set_attn_implementation(attention)
    for output in outputs:
        if output.error is not None:
            raise UserError(output.error)
    accepted, drafted = (
        np.array([getattr(output.metrics, name) for output in outputs], np.float64) for name in ("accepted", "drafted")
    )
    rate = bootstrap.ratio(accepted, drafted, bootstrap.draw(len(prompts)))
    return Acceptance(rate, DRAFT_TOKENS, len(prompts), T // 2, new)
