"""Run by the interpreter that has vLLM: python vllm_logprobs.py FOLDER... prints one JSON line of logprobs per folder.

For each of three prompts: {token id: logprob} of the first generated token's 20 likeliest, and four greedy tokens.
"""

import gc
import json
import sys


def main(folders: list[str]) -> None:
    from vllm import LLM, SamplingParams

    prompts = [{"prompt_token_ids": [(7 * i + shift) * 13 % 512 for i in range(32)]} for shift in (0, 3, 11)]
    for folder in folders:
        llm = LLM(
            folder,
            dtype="bfloat16",
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=64,
            max_num_seqs=4,
        )
        sampling = SamplingParams(temperature=0, max_tokens=4, logprobs=20, detokenize=False)
        outputs = [output.outputs[0] for output in llm.generate(prompts, sampling, use_tqdm=False)]
        found = [
            {
                "first": {str(token): entry.logprob for token, entry in output.logprobs[0].items()},
                "tokens": list(output.token_ids),
            }
            for output in outputs
        ]
        print("LOGPROBS " + json.dumps({"folder": folder, "prompts": found}), flush=True)
        del llm
        gc.collect()


if __name__ == "__main__":
    main(sys.argv[1:])
