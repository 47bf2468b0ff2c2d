"""Train a small Llama from nothing on the standard library of the running interpreter, on a CPU or a GPU.

The sizes are those of examples/tiny-llama. Modules that make_texts.py keeps for evaluation are never trained on, so the
perplexity printed at the end is of unseen files. 6000 steps take about an hour on two CPU cores.

    python examples/train_tiny_llama.py --output out/my-llama [--steps 6000] [--device cuda]
"""

import argparse
import math
import time
from pathlib import Path
from sysconfig import get_paths

import torch
from make_texts import is_eval, modules
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--context", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), help="of the matrices; default: by device")
    parser.add_argument("--schedule", choices=("linear", "cosine"), default="linear", help="decay after the warm-up")
    parser.add_argument("--library", type=Path, default=get_paths()["stdlib"], help="folder of Python files")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="more UTF-8 text files to train on")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # torch's Muon iterates in bfloat16, which takes a CPU without such units ten times as long as the model itself
    args.optimizer = args.optimizer or ("adamw" if args.device == "cpu" else "muon")
    return args


def train_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text can be written with it, so there is no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], enough: int) -> Tensor:
    """Texts, each followed by the end token, as one int64 [tokens]; stops once there are `enough`."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(ids) > enough:
            break
    return torch.tensor(ids)


def build(args: argparse.Namespace, vocabulary: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).to(args.device)


def optimizers(model: nn.Module, kind: str) -> list[torch.optim.Optimizer]:
    """The blocks' matrices by `kind`; embedding and norms always by AdamW."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    adamw = torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    if kind == "muon":
        return [torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.0, adjust_lr_fn="original"), adamw]
    return [torch.optim.AdamW(matrices, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1), adamw]


def rate(step: int, steps: int, schedule: str) -> float:
    """Share of the full learning rate at `step`: up over the first 2 %, then down to 0."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 1 - done if schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)


def train(model: LlamaForCausalLM, ids: Tensor, args: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(args.seed)
    chosen = optimizers(model, args.optimizer)
    full = [[group["lr"] for group in optimizer.param_groups] for optimizer in chosen]
    started = time.perf_counter()
    for step in range(args.steps):
        starts = torch.randint(len(ids) - args.context, (args.batch,), generator=generator)
        batch = torch.stack([ids[start : start + args.context] for start in starts.tolist()]).to(args.device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rates in zip(chosen, full, strict=True):
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * rate(step, args.steps, args.schedule)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % max(1, args.steps // 100) == 0 or step == args.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, ids: Tensor, context: int, device: str) -> float:
    """Per token, over consecutive windows; a last window that is not full is left out."""
    windows = ids[: len(ids) // context * context].view(-1, context)
    losses = [model(input_ids=w.to(device), labels=w.to(device)).loss.item() * len(w) for w in windows.split(16)]
    return math.exp(sum(losses) / len(windows))


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    sources = modules(Path(args.library))
    texts = [source for name, source in sources if not is_eval(name)]
    texts += [path.read_text(encoding="utf-8") for path in args.text]
    held_out = [source for name, source in sources if is_eval(name)]
    if args.output.exists() and any(args.output.iterdir()):
        raise SystemExit(f"{args.output} exists and is not empty")

    tokenizer = train_tokenizer(texts, args.vocabulary)
    ids = encode(tokenizer, texts, enough=args.steps * args.batch * args.context)
    model = build(args, len(tokenizer))
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(ids)} tokens, {args.steps} steps", flush=True)
    train(model, ids, args)
    model.eval()
    unseen = encode(tokenizer, held_out, enough=50_000)[:50_000]
    print(f"perplexity on unseen modules: {perplexity(model, unseen, args.context, args.device):.3f}")
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"saved {args.output}")


if __name__ == "__main__":
    main()
