"""Seconds of lm-eval's `hf` model by ours, and how far log-likelihoods lie apart, on quantkit's own tasks.

    python eval/bench/lm_eval_speed.py examples/tiny-llama --batch-sizes 1,8

Both compute in float32 on the CPU, in turns within one process; the ratio is of processor time, medians of the turns.
"""

import argparse
import statistics
import time
from typing import Any

from lm_eval.models.huggingface import HFLM
from quantkit_eval.lm_eval_model import QuantkitLM
from quantkit_eval.tasks.selection import load_tasks, quiet_lm_eval


def seconds(lm: Any, kind: str, requests: list[Any]) -> tuple[float, list[Any]]:
    """Of the processor, and the answers."""
    started = time.process_time()
    found = getattr(lm, kind)(requests, disable_tqdm=True)
    return time.process_time() - started, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tasks", default="qk_cloze,qk_choice,qk_code")
    parser.add_argument("--include-path")
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batch-sizes", default="1,8")
    given = parser.parse_args()
    print("| task | batch size | hf / ours | hf, s | ours, s | apart, nats |\n|---|---|---|---|---|---|")
    for size in map(int, given.batch_sizes.split(",")):
        models = (
            HFLM(given.model, device="cpu", dtype="float32", batch_size=size),
            QuantkitLM(given.model, device="cpu", batch_size=size),
        )
        for task in load_tasks(given.tasks, given.include_path):
            task.set_config(key="num_fewshot", value=0)
            with quiet_lm_eval():
                task.build_all_requests(limit=given.limit)
                requests = task.instances
                kind = requests[0].request_type
                times: tuple[list[float], list[float]] = ([], [])
                answers: list[list[Any]] = [[], []]
                for turn in range(given.turns + 1):
                    for which, lm in enumerate(models):
                        took, answers[which] = seconds(lm, kind, requests)
                        if turn:  # the first warms up
                            times[which].append(took)
            theirs, ours = (statistics.median(each) for each in times)
            if kind == "loglikelihood":
                pairs = zip(*answers, strict=True)
                apart = f"{max(abs(one[0] - other[0]) for one, other in pairs):.0e}"
            else:
                apart = f"{sum(one != other for one, other in zip(*answers, strict=True))} texts differ"
            print(
                f"| {task.task_name} | {size} | {theirs / ours:.2f} | {theirs:.2f} | {ours:.2f} | {apart} |", flush=True
            )


if __name__ == "__main__":
    main()
