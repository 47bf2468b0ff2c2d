"""What a benchmark measures, as it is asked for, and what is refused before torch is imported."""

from dataclasses import dataclass
from pathlib import Path

from quantkit.checkpoint.gguf_path import open_found
from quantkit.checkpoint.header import read_json
from quantkit.checkpoint.hub import locate_config
from quantkit.errors import UserError
from quantkit.paths import user_path
from quantkit.runtime.early_checks import check_engine_options
from quantkit.suggestions import nearest

TRANSFORMERS = ("generate", "batched", "generate_batch")  # baselines that are no models
TOOLS = ("llama-bench",)
REQUESTS, LONGEST = 256, 1024
PREFILL, DECODE = 512, 128


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a request: least to most, uniformly; a fixed number where both are the same."""

    least: int
    most: int

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}:{self.most}"


def lengths(option: str, text: str) -> Lengths:
    """`64` or `8:128`; UserError for anything else."""
    parts = text.split(":")
    if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"{option} is {text!r}; expected a number of tokens, or LEAST:MOST")
    found = Lengths(int(parts[0]), int(parts[-1]))
    if not 1 <= found.least <= found.most:
        raise UserError(f"{option} is {text!r}; expected 1 token or more, the least before the most")
    return found


def batch_sizes(text: str) -> tuple[int, ...]:
    """`1,8,32`; UserError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--sweep-batch is {text!r}; expected numbers of sequences like 1,8,32")
    return tuple(dict.fromkeys(map(int, parts)))


@dataclass(frozen=True, slots=True)
class Scenario:
    """Requests that run together: how many, how long, at most `slots` at a time; None: as many as the engine takes."""

    name: str
    requests: int
    input: Lengths
    output: Lengths
    slots: int | None = None


@dataclass(frozen=True)
class BenchOptions:
    """A benchmark. rate: requests a second, None: all at once; shared_prefix: tokens that all prompts begin with.

    baselines  of TRANSFORMERS, and models; llamacpp: the folder of llama.cpp's tools
    """

    model: str
    scenarios: tuple[Scenario, ...]
    baselines: tuple[str, ...] = ()
    rate: float | None = None
    shared_prefix: int = 0
    seed: int = 0
    kv_cache: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    draft: str | None = None
    speculate: str | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    num_blocks: int | None = None
    enable_prefix_caching: bool = True
    trust_remote_code: bool = False
    llamacpp: Path | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and output together."""
        return max(s.input.most + s.output.most for s in self.scenarios)


def scenarios(
    context: int, *, requests: int | None = None, input: str | None = None, output: str | None = None,
    prefill: int | None = None, decode: int | None = None, sweep: str | None = None,
) -> tuple[Scenario, ...]:  # fmt: skip
    """Mixed requests, or batches of one length; UserError where both are asked for, or tokens are beyond the context.

    Lengths that are not given fit into the context.
    """
    mixed = {"--requests": requests, "--input": input, "--output": output}
    fixed = {"--prefill": prefill, "--decode": decode, "--sweep-batch": sweep}
    given = [[name for name, value in options.items() if value is not None] for options in (mixed, fixed)]
    if given[0] and given[1]:
        raise UserError(
            f"{given[0][0]} and {given[1][0]} are both given\nhint: {', '.join(mixed)} are for mixed requests, "
            f"{', '.join(fixed)} for batches of one length"
        )
    half = max(context // 2, 1)
    if given[1]:
        sizes = batch_sizes(sweep) if sweep is not None else (1,)
        for name, value in (("--prefill", prefill), ("--decode", decode)):
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; expected 1 token or more")
        in_, out = prefill or min(PREFILL, half), decode or min(DECODE, half)
        made = tuple(Scenario(f"batch {n}", n, Lengths(in_, in_), Lengths(out, out), n) for n in sizes)
    else:
        default = f"{min(100, half)}:{min(LONGEST, half)}"
        in_, out = lengths("--input", input or default), lengths("--output", output or default)
        made = (Scenario("requests", REQUESTS if requests is None else requests, in_, out),)
    for scenario in made:
        if scenario.requests < 1:
            raise UserError(f"--requests is {scenario.requests}; expected 1 or more")
        if (needed := scenario.input.most + scenario.output.most) > context:
            raise UserError(
                f"{scenario.input.most} tokens in and {scenario.output.most} out are {needed}; the model's context has "
                f"{context}\nhint: shorter {'--prefill or --decode' if given[1] else '--input or --output'}"
            )
    return made


def context_of(model: str) -> int:
    """Tokens of a model's context, by its config.json or the header of its GGUF file."""
    if (file := open_found(model)) is not None:
        found = file.metadata.get(f"{file.metadata['general.architecture']}.context_length")
    else:
        config = read_json(locate_config(model) / "config.json", "give a model folder")
        text = config.get("text_config") or config
        found = text.get("max_position_embeddings") or text.get("n_positions") or text.get("n_ctx")
    return found if isinstance(found, int) and found > 1 else 1 << 20


def check_baselines(options: BenchOptions) -> None:
    """UserError for a baseline that is neither of TRANSFORMERS nor a model, and for what does not go together."""
    for name in options.baselines:
        if name in TRANSFORMERS:
            continue
        near = nearest(name, TRANSFORMERS, cutoff=0.7)
        if near is not None and not user_path(name).exists():
            raise UserError(f"unknown baseline {name!r}\nhint: did you mean `{near}`? A model's folder is one, too")
        check_engine_options(name)
        if (context := context_of(name)) < options.longest:
            raise UserError(
                f"baseline {name}: its context has {context} tokens, and {options.longest} are asked for\n"
                "hint: shorter --input or --output"
            )
    if len(set(options.baselines)) < len(options.baselines):
        raise UserError("--baseline names one twice\nhint: name each once")


def check_options(options: BenchOptions) -> None:
    """UserError for what names, paths, numbers and JSON files show to be wrong; the Hub is asked last."""
    for name, value, least in (
        ("--max-num-seqs", options.max_num_seqs, 1),
        ("--max-num-batched-tokens", options.max_num_batched_tokens, 1),
        ("--num-blocks", 1 if options.num_blocks is None else options.num_blocks, 1),
        ("--shared-prefix", options.shared_prefix, 0),
    ):
        if value < least:
            raise UserError(f"{name} is {value}; expected {least} or more")
    if options.rate is not None and not 0 < options.rate < float("inf"):
        raise UserError(f"--rate is {options.rate}; expected requests a second, more than 0")
    if options.rate is not None and options.scenarios[0].slots is not None:
        raise UserError("--rate is for mixed requests\nhint: leave out --prefill, --decode and --sweep-batch")
    if options.rate is not None and "generate_batch" in options.baselines:
        raise UserError("generate_batch takes all requests at once\nhint: leave it out, or leave out --rate")
    shortest = min(scenario.input.least for scenario in options.scenarios)
    if options.shared_prefix >= shortest:
        raise UserError(
            f"--shared-prefix is {options.shared_prefix}, and the shortest prompt has {shortest} tokens\n"
            "hint: give a smaller one, or longer --input"
        )
    check_baselines(options)
    if options.llamacpp is not None:
        for tool in TOOLS:
            if not (options.llamacpp / tool).is_file():
                raise UserError(
                    f"{options.llamacpp}: no {tool} in it\nhint: give the folder of llama.cpp's built tools (build/bin)"
                )
