import pytest

from worker.sizing import MIB, BudgetError, plan_budget

BASE = {
    "total": 1000 * MIB,
    "available": 800 * MIB,
    "fraction": 0.5,
    "weights": 100 * MIB,
    "activations": 100 * MIB,
    "page_bytes": MIB,
    "page_size": 16,
    "max_model_len": 160,
    "max_num_seqs": 1000,
    "default_cap": None,
    "kv_bytes": None,
    "num_pages": None,
}


def test_fraction_of_what_is_available_less_the_largest_step() -> None:
    budget = plan_budget(**BASE)
    assert budget.num_pages == 300
    assert budget.limit == "memory_fraction"
    assert budget.positions == 299 * 16


def test_never_more_than_all_sequences_at_full_length() -> None:
    assert plan_budget(**BASE | {"max_num_seqs": 3}).num_pages == 3 * 10 + 1


def test_explicit_sizes_win() -> None:
    assert plan_budget(**BASE | {"kv_bytes": 50 * MIB}).num_pages == 50
    assert plan_budget(**BASE | {"num_pages": 11, "kv_bytes": 50 * MIB}).num_pages == 11


def test_default_cap_applies_unless_a_size_was_asked_for() -> None:
    assert plan_budget(**BASE | {"default_cap": 40 * MIB}).num_pages == 40
    capped = BASE | {"default_cap": 40 * MIB, "kv_bytes": 60 * MIB}
    assert plan_budget(**capped).num_pages == 60


@pytest.mark.parametrize("change", [{"num_pages": 10}, {"kv_bytes": MIB}, {"available": 0}])
def test_a_pool_too_small_for_one_sequence_is_one_clear_sentence(change: dict[str, int]) -> None:
    with pytest.raises(BudgetError, match=r"one sequence of max_model_len 160 needs 11\.0 MiB"):
        plan_budget(**BASE | change)


def test_the_printed_table_names_every_part() -> None:
    text = str(plan_budget(**BASE))
    assert "0 pages to swap to" in text
    for part in ("device memory", "weights", "activations", "KV pool: 300 pages", "4,784 token"):
        assert part in text


def test_host_memory_is_counted_in_whole_pages_and_changes_nothing_else() -> None:
    plain, swapping = plan_budget(**BASE), plan_budget(**BASE, swap_bytes=10 * MIB + 1)
    assert (plain.host_pages, swapping.host_pages) == (0, 10)
    assert swapping.num_pages == plain.num_pages
    line = next(line for line in str(swapping).splitlines() if "10 pages to swap to" in line)
    assert line.endswith("10.0 MiB")


def test_dense_windows_are_paid_for_before_pages() -> None:
    windows = {"window_bytes": 20 * MIB}
    assert plan_budget(**BASE, **windows).num_pages == 280
    assert plan_budget(**BASE | {"kv_bytes": 50 * MIB}, **windows).num_pages == 30
    assert plan_budget(**BASE | {"default_cap": 40 * MIB}, **windows).num_pages == 20
    assert "dense windows" in str(plan_budget(**BASE, **windows))
    with pytest.raises(BudgetError, match=r"beside 20\.0 MiB of dense windows"):
        plan_budget(**BASE | {"kv_bytes": 25 * MIB}, **windows)


def test_graphs_are_set_aside_and_named_only_where_there_are_any() -> None:
    budget = plan_budget(**BASE, graphs=50 * MIB)
    assert budget.num_pages == 250
    assert "CUDA graphs" in str(budget)
    assert "CUDA graphs" not in str(plan_budget(**BASE))
