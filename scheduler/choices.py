"""From a request to its sequences."""

from __future__ import annotations

from scheduler.fair_share import Account
from scheduler.policy import order_of
from scheduler.prefix import HashChain, chain_root
from scheduler.request import Request, SchedulerConfig
from scheduler.sequence import Sequence


def choices_of(
    request: Request,
    config: SchedulerConfig,
    max_len: int,
    serial: int,
    account: Account | None = None,
) -> list[Sequence]:
    """The sequences of a request's open choices: `serial` is the number of the first choice,
    `max_len` their bound, `account` their tenant's; without, they get one of their own."""
    account = account or Account(request.tenant)
    group = root = chain_root(
        config.hash_root, request.cache_salt, request.adapter.encode(), request.tenant.encode()
    )
    sequences: list[Sequence] = []
    for choice in request.open_choices:
        if not config.enable_prefix_cache:  # names that nobody shares
            root = chain_root(config.hash_root, (serial + choice).to_bytes(8, "little"))
        produced = (request.produced[choice] or ()) if request.produced else ()
        # One choice brings the prompt's log-probabilities, and not again after a restart.
        wanted = request.params.prompt_logprobs is not None and choice == 0 and not produced
        sequences.append(
            Sequence(
                request=request,
                choice=choice,
                account=account,
                tokens=[*request.prompt, *produced],
                order=order_of(request, serial + choice, config.priority_ageing),
                limit=min(len(request.prompt) + request.params.max_tokens, max_len),
                chain=HashChain(root, config.page_size),
                group=group,
                prompt_logprobs=[None] if wanted else None,
            )
        )
    return sequences
