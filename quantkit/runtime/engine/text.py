"""Text of generated tokens, and where a sequence ends."""

from collections.abc import Collection

from transformers import PreTrainedTokenizerBase

from quantkit.runtime.engine.request import Request

CONTEXT = 5  # tokens of the prompt that new ones are decoded behind: whether a space comes first depends on them


def check_end(request: Request, tokenizer: PreTrainedTokenizerBase | None, ends: Collection[int]) -> None:
    """Set `finish_reason` where the last token ends the request."""
    params, token = request.params, request.tokens[-1]
    if params.stop or request.on_output is not None:
        decode(request, tokenizer)
    if not params.ignore_eos and token in ends:
        request.finish_reason = "stop"
    elif token in (params.stop_token_ids or []):
        request.finish_reason, request.stop_reason = "stop", token
    elif params.stop and len(request.output) >= params.min_tokens and _stopped(request):
        request.finish_reason = "stop"
    elif len(request.tokens) >= request.limit:
        request.finish_reason = "length"


def _stopped(request: Request) -> bool:
    """Whether the text holds a stop string; it is cut there."""
    places = [(request.text.find(stop), stop) for stop in request.params.stop or []]
    at, stop = min(((at, stop) for at, stop in places if at >= 0), default=(-1, ""))
    if at < 0:
        return False
    request.stop_reason = stop
    request.text = request.text[: at + (len(stop) if request.params.include_stop_str_in_output else 0)]
    return True


def decode(request: Request, tokenizer: PreTrainedTokenizerBase | None, *, last: bool = False) -> None:
    """Bring request.text up to its tokens; half a character waits for its other half."""
    if tokenizer is None:
        return
    start, read = request.decoded
    before, after = (
        str(tokenizer.decode(tokens, skip_special_tokens=request.params.skip_special_tokens))
        for tokens in (request.tokens[start:read], request.tokens[start:])
    )
    if last or (len(after) > len(before) and not after.endswith("\ufffd")):
        request.text += after[len(before) :]
        request.decoded = read, len(request.tokens)
