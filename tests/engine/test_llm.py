"""Offline generation: the server's loop without a server, over the scripted worker.

Its tokens are below 50, which in the bundled tokenizer are single characters.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from cli.config import PROJECT
from engine.llm import LLM
from scheduler.request import FinishReason, Request, SamplingParams, Speculation
from tests.engine.workers import build, model
from tests.fakes import Script
from text.tokenizer import Tokenizer

TOKENIZER = PROJECT / "assets" / "demo" / "target"
PARAMS = SamplingParams(max_tokens=24, seed=11)


@pytest.fixture(scope="module")
def llm():
    with LLM(model(), tokenizer=str(TOKENIZER), builder=build) as made:
        yield made


def expected(prompt, params=PARAMS, choice=0):
    return Script().answer(Request("r", tuple(prompt), params, arrival=0.0), choice)[0]


def test_many_prompts_more_than_run_at_a_time(llm):
    prompts = [list(range(1, 2 + i % 40)) for i in range(150)]
    params = [replace(PARAMS, max_tokens=1 + i % 9) for i in range(150)]
    completions = llm.generate(prompts, params, ignore_eos=True, progress=False)
    assert [c.prompt_tokens for c in completions] == [tuple(p) for p in prompts]
    for prompt, own, completion in zip(prompts, params, completions, strict=True):
        assert completion.choices[0].tokens == expected(prompt, own)


def test_choices_and_text(llm):
    (completion,) = llm.generate([1, 2, 3], PARAMS, n=3, ignore_eos=True)
    tokenizer = Tokenizer.load(TOKENIZER)
    for i, choice in enumerate(completion.choices):
        assert choice.tokens == expected([1, 2, 3], choice=i)
        assert choice.text == tokenizer.decode(choice.tokens)
        assert choice.finish_reason is FinishReason.LENGTH
    assert completion.text == completion.choices[0].text


def test_stop_string_ends_one_choice_and_frees_it(llm):
    prompt = [4, 5]
    (whole,) = llm.generate(prompt, replace(PARAMS, max_tokens=200), ignore_eos=True)
    stop = whole.text[6:9]
    (cut,) = llm.generate(prompt, replace(PARAMS, max_tokens=200), stop=[stop], ignore_eos=True)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.choices[0].finish_reason is FinishReason.STOP
    assert llm.generate([[1]], PARAMS, ignore_eos=True)[0].choices[0].tokens == expected([1])


def test_what_does_not_fit_is_refused_and_leaves_no_trace(llm):
    with pytest.raises(ValueError, match="600 tokens"):
        llm.generate([[1] * 600, [1, 2]], PARAMS)
    with pytest.raises(ValueError, match="between 0 and 49"):
        llm.generate([50], PARAMS)
    with pytest.raises(ValueError, match="2 sampling parameters for 1"):
        llm.generate([1], [PARAMS, PARAMS])
    assert llm.generate([1], PARAMS, ignore_eos=True)[0].choices[0].tokens == expected([1])


def test_speculation_may_be_declined_and_changes_no_text():
    prompts = [[1, 2, 3], [4, 5]]
    options = {"tokenizer": str(TOKENIZER), "builder": build, "fixed_draft_tokens": 3}
    with LLM(model(), **options) as llm:
        plain = llm.generate(prompts, PARAMS, ignore_eos=True, speculation=Speculation(False))
        assert llm.load().draft_tokens == 0
        drafted = llm.generate(prompts, PARAMS, ignore_eos=True)
        before = llm.load()
        assert before.draft_tokens > before.accepted_tokens > 0
        short = Speculation(max_draft_tokens=1)
        shorter = llm.generate(prompts, PARAMS, ignore_eos=True, speculation=short)
        after = llm.load()
    assert after.drafts - before.drafts == after.draft_tokens - before.draft_tokens > 0
    for made in (plain, drafted, shorter):
        assert [c.choices[0].tokens for c in made] == [expected(p) for p in prompts]


def test_a_drafter_that_is_not_there_is_refused(llm):
    with pytest.raises(ValueError, match="no drafter 'oracle': there are none"):
        llm.generate([1], PARAMS, speculation=Speculation(drafter="oracle"))


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="max_num_seq"):
        LLM(model(), builder=build, max_num_seq=3)
