"""Run by the interpreter that has vLLM: python vllm_logprobs.py FOLDER...

Prints which 4-bit kernel runs, then one JSON line per folder: for each of three prompts the logprobs of the first
generated token's 20 likeliest values, and four greedy tokens.
"""

import gc
import json
import sys

import torch
from torch import Tensor


def main(folders: list[str]) -> None:
    from vllm import LLM, SamplingParams

    prompts = [{"prompt_token_ids": [(7 * i + shift) * 13 % 512 for i in range(32)]} for shift in (0, 3, 11)]
    sampling = SamplingParams(temperature=0, max_tokens=4, logprobs=20, detokenize=False)
    for folder in folders:
        llm = LLM(
            folder,
            dtype="bfloat16",
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=64,
            max_num_seqs=4,
        )
        if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
            stand_in_for_kernel()
        outputs = [output.outputs[0] for output in llm.generate(prompts, sampling, use_tqdm=False)]
        found = [
            {
                "first": {str(token): entry.logprob for token, entry in output.logprobs[0].items()},
                "tokens": list(output.token_ids),
            }
            for output in outputs
        ]
        print("LOGPROBS " + json.dumps({"prompts": found}), flush=True)
        del llm
        gc.collect()


def stand_in_for_kernel() -> None:
    """Multiply what vLLM read, fused and repacked for its 4-bit kernel, which it builds for AVX512 only.

    So all but the kernel's own arithmetic is proved. q_weight [N / 16, 2 K]: per k two words of 16 output channels.
    """
    print("KERNEL a stand-in, this CPU has no AVX512", flush=True)
    library = torch.library.Library("_C", "FRAGMENT")
    library.define(
        "cpu_gemm_wna16(Tensor x, Tensor q_weight, Tensor(a!) out, Tensor scales, Tensor? zeros, Tensor? bias, "
        "int pack_factor, str isa_hint) -> ()"
    )

    def nibbles(words: Tensor) -> Tensor:
        return (words[..., None] >> torch.arange(0, 32, 4)) & 15

    def gemm(x, q_weight, out, scales, zeros, bias, pack_factor, isa_hint) -> None:
        (G, N), K = scales.shape, x.shape[1]
        codes_KN = nibbles(q_weight).reshape(N // 16, K, 16).permute(1, 0, 2).reshape(K, N)
        zero_GN = torch.full((G, N), 8) if zeros is None else nibbles(zeros).reshape(G, N)
        zero_KN, scale_KN = (t.repeat_interleave(K // G, 0) for t in (zero_GN, scales.float()))
        w_KN = ((codes_KN - zero_KN) * scale_KN).to(x.dtype)
        out.copy_(torch.nn.functional.linear(x, w_KN.T, bias))

    library.impl("cpu_gemm_wna16", gemm, "CPU")
    globals()["_keep"] = library  # a library's kernels go when it does


if __name__ == "__main__":
    main(sys.argv[1:])
