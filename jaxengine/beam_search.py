"""Beam search over one-token requests: the prefix cache holds what the beams share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxengine.frontend import Frontend
from jaxengine.progress import counting_bar
from jaxengine.request import BeamSearchParams, FinishReason, RequestOutput, SamplingParams


@dataclass(frozen=True)
class Beam:
    """A completion and the sum of its tokens' log-probabilities."""

    tokens: list[int]  # prompt and output, the end-of-sequence token included
    num_prompt: int
    cum_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    text: str | None = None  # of the output; None: the model has no tokenizer

    def score(self, length_penalty: float) -> float:
        """cum_logprob / length ** length_penalty; as in vLLM the prompt counts, the end-of-sequence token does not."""
        length = len(self.tokens) - (self.finish_reason == "stop")
        return self.cum_logprob / max(1, length) ** length_penalty


@dataclass(frozen=True)
class BeamSearchOutput:
    """A prompt's beams, the best first."""

    sequences: list[Beam]


def beam_search(
    generate: Callable[..., Sequence[RequestOutput]],
    frontend: Frontend,
    prompts: Sequence[Mapping[str, Any]],
    params: BeamSearchParams,
    show: bool,
) -> list[BeamSearchOutput]:
    """`generate` is LLM.generate; prompts come from `frontend.token_ids`. Raises RequestError."""
    width = params.beam_width
    # Log-probabilities are reported at temperature 1: another one needs them all, to normalize anew.
    whole = 2 * width > frontend.max_logprobs or params.temperature not in (0.0, 1.0)
    one = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1 if whole else 2 * width, detokenize=False)
    for prompt in prompts:
        frontend.request(prompt, one)  # a bad prompt is refused before any work
    live = [[Beam(list(prompt["prompt_token_ids"]), len(prompt["prompt_token_ids"]))] for prompt in prompts]
    done: list[list[Beam]] = [[] for _ in prompts]
    ends = () if params.ignore_eos else frontend.eos_token_ids
    with counting_bar("Beam search", show) as progress:
        for step in range(params.max_tokens):
            asked = [
                {"prompt_token_ids": beam.tokens, "cache_salt": prompt["cache_salt"]}
                for prompt, beams in zip(prompts, live)
                for beam in beams
            ]
            outputs = iter(generate(asked, one, use_tqdm=False))
            for i, beams in enumerate(live):
                grown = [new for beam in beams for new in _grow(beam, next(outputs), 2 * width, params.temperature)]
                grown.sort(key=lambda beam: -beam.cum_logprob)
                live[i] = []
                for beam in grown:
                    if len(live[i]) == width:
                        break
                    if beam.tokens[-1] in ends:
                        done[i].append(replace(beam, finish_reason="stop"))
                    elif step + 1 == params.max_tokens or len(beam.tokens) >= frontend.max_model_len:
                        done[i].append(replace(beam, finish_reason="length"))
                    else:
                        live[i].append(beam)
            progress(step + 1, params.max_tokens)
            if not any(live):
                break
    best = [sorted(beams, key=lambda beam: -beam.score(params.length_penalty))[:width] for beams in done]
    return [BeamSearchOutput([_with_text(beam, frontend) for beam in beams]) for beams in best]


def _grow(beam: Beam, output: RequestOutput, count: int, temperature: float) -> Iterator[Beam]:
    """The beam with each of its `count` best next tokens. Raises the request's error."""
    if output.error is not None:
        raise output.error
    found = output.outputs[0].logprobs
    assert found is not None
    ids, logprobs = found.top_token_ids[0], found.top_logprobs[0].astype(np.float64)
    if temperature not in (0.0, 1.0):
        scaled = logprobs / temperature
        logprobs = scaled - np.logaddexp.reduce(scaled)
    for token, logprob in zip(ids[:count].tolist(), logprobs[:count].tolist()):
        yield replace(beam, tokens=[*beam.tokens, token], cum_logprob=beam.cum_logprob + logprob)


def _with_text(beam: Beam, frontend: Frontend) -> Beam:
    if frontend.tokenizer is None:
        return beam
    return replace(beam, text=frontend.tokenizer.decode(beam.tokens[beam.num_prompt :]))
