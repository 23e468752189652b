"""Where texts part, on the bundled model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from benchmarks.divergence import first_divergence, noise_at
from engine.llm import LLM
from scheduler.request import SamplingParams


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(dtype="float32", compile=False, max_num_seqs=4, drafters=()) as made:
        yield made


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_was_chosen_is_ahead_of_whatever_else(llm: LLM, temperature: float) -> None:
    """With the sampler's own noise, at every position of a text."""
    prompt = llm.tokenize("The module os.path has")
    params = SamplingParams(max_tokens=12, temperature=temperature, seed=2**63 + 5)
    ranked = replace(params, logprobs=20)
    choice = llm.generate([prompt], ranked, ignore_eos=True)[0].choices[0]
    for i, found in enumerate(choice.logprobs):
        second = next(token for token, _ in found.top if token != found.token)
        other = [*choice.tokens[:i], second, *choice.tokens[i + 1 :]]
        divergence = first_divergence(llm, prompt, params, choice.tokens, other)
        assert divergence is not None
        assert divergence.at == i
        assert divergence.tokens == (found.token, second)
        assert divergence.margin >= 0.0
        if temperature:
            g = noise_at(params.seed, len(prompt) + i, llm.facts.vocab_size)
            scores = {token: score / temperature + float(g[token]) for token, score in found.top}
            if found.token in scores:
                assert max(scores, key=scores.__getitem__) == found.token


def test_texts_that_do_not_part(llm: LLM) -> None:
    assert first_divergence(llm, (5, 6), SamplingParams(max_tokens=3), (7, 8), (7, 8, 9)) is None
