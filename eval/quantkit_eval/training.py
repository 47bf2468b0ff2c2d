"""What a model that is being trained will be worth once it is quantized, measured at its saves."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from quantkit.api import as_recipe, quantize_module
from quantkit.errors import RunError, UserError
from quantkit.recipe.recipe import Recipe
from quantkit_eval.early_checks import check_windows, text_names
from quantkit_eval.evaluation import evaluate
from quantkit_eval.held_modules import same_randomness, without_training

TOKENS = 1 << 14  # of the text, unless a number is given: a save must not wait for an hour
PREFIX = "eval_quantized"  # trackers put what begins with eval_ among the results of evaluations
LOG = logging.getLogger("quantkit.eval")


class QuantizedEvaluation(TrainerCallback):
    """A callback of transformers' Trainer: KL and perplexity of the quantized copy, logged at each save.

    recipe       a shipped name, a file, plain data or a Recipe; weights are read where they lie, and a copy is made
    text         what `evaluate` takes: a file, a name, lines of text, or several of these
    every        at each save, each second one, ...
    calibration  what `quantize_module` takes; None: the recipe's own
    tokenizer    None: the Trainer's processing_class
    context, tokens  of a window, and of the text at most

    The Trainer logs `eval_quantized_kl`, `eval_quantized_perplexity`, `eval_perplexity`, `eval_quantized_top1` (in
    several texts by the text's name behind them) to whatever `report_to` names, and into its log history. Weights,
    optimizer, gradients, random numbers and the mode of every part of the model stay as they are: training goes on as
    if nothing had been measured. One process measures.

    UserError at once for a recipe or a text that cannot be used. A save at which quantizing fails is logged as a
    warning and skipped: no training ends because of a measurement.
    """

    def __init__(
        self,
        recipe: str | Path | Mapping[str, Any] | Recipe,
        text: Any = "general",
        every: int = 1,
        *,
        calibration: Any = None,
        tokenizer: Any = None,
        context: int = 256,
        tokens: int = TOKENS,
    ) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise UserError(f"every is {every!r}; expected a whole number of saves, at least 1")
        self.recipe = as_recipe(recipe, None)
        self.text, self.every = text, every
        check_windows(text_names(text), context, tokens)
        self.calibration, self.tokenizer = calibration, tokenizer
        self.context, self.tokens = context, tokens
        self.saves = 0

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **found: Any) -> None:
        """Measures and logs; called by the Trainer after each checkpoint."""
        self.saves += 1
        if self.saves % self.every or not state.is_world_process_zero:
            return
        try:
            logs = self.measure(found["model"], self.tokenizer or found.get("processing_class"))
        except (UserError, RunError) as failure:
            LOG.warning("step %d: the quantized copy was not measured: %s", state.global_step, failure)
            return
        if (trainer := _calling_trainer(state)) is not None:
            trainer.log(logs)
        else:  # another loop that speaks the Trainer's protocol
            state.log_history.append(logs | {"step": state.global_step})

    def measure(self, model: Any, tokenizer: Any = None) -> dict[str, float]:
        """What is logged of a model in memory, which is left as it is. tokenizer: None: of the folder it came from."""
        with same_randomness(), without_training(model):
            _, quantized = quantize_module(
                model, self.recipe, calibration=self.calibration, tokenizer=tokenizer, progress=False
            )
            found = evaluate(
                quantized,
                ref=model,
                text=self.text,
                context=self.context,
                tokens=self.tokens,
                tokenizer=tokenizer,
                progress=False,
            )
        logs: dict[str, float] = {}
        for each in found.texts:
            assert each.divergence is not None
            end = "" if len(found.texts) == 1 else f"_{Path(each.name).stem}"
            logs |= {
                f"{PREFIX}_kl{end}": each.divergence.kl_mean.value,
                f"{PREFIX}_perplexity{end}": each.model.perplexity.value,
                f"eval_perplexity{end}": each.divergence.reference.perplexity.value,
                f"{PREFIX}_top1{end}": each.divergence.top1_agreement.value,
            }
        return logs


def _calling_trainer(state: TrainerState) -> Trainer | None:
    """The Trainer whose callback is running: it gives its callbacks everything but itself, and only it can log."""
    frame = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and caller.state is state:
            return caller
        frame = frame.f_back
    return None
