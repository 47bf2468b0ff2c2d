"""quantkit lm-eval: EleutherAI's lm-eval with the model `quantkit`."""

import typer


def lm_eval(context: typer.Context) -> None:
    """EleutherAI's lm-eval with `--model quantkit`; all arguments are its own, --help too.

    Example: quantkit lm-eval --model quantkit --model_args pretrained=llama-w4 --tasks arc_easy
    """
    from quantkit_eval.tasks.command import run_lm_eval

    run_lm_eval(context.args)
