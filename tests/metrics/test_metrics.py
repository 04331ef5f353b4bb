"""The score matrix's figures against plain loops, hand calculation and published matrices; their intervals."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest

from holdfast.metrics import intervals, paired_difference, seed_intervals, task_intervals
from holdfast.metrics.intervals import rise_intervals
from holdfast.metrics.matrix import BY_TASK, FIGURES
from holdfast.metrics.seeds import seed_difference
from holdfast.metrics.summary import area_under_curve, by_task, clipped_backward_transfer, summarize
from support.paths import SHARED

PUBLISHED = SHARED / "data" / "cl_benchmark" / "published_matrices.json"

# Three tasks; row 0 is before training.
HAND = [
    [0.1, 0.2, 0.3],
    [0.9, 0.3, 0.3],
    [0.5, 0.8, 0.6],
    [0.7, 0.6, 0.9],
]


def brute_force(S: list[list[float]], lower: bool = False) -> dict[str, float | None]:
    """The definitions of the figures, one loop each, with tasks and stages numbered from 1."""
    T = len(S) - 1

    def score(t: int, j: int) -> float:
        return S[t][j - 1]

    average = sum(score(T, j) for j in range(1, T + 1)) / T
    new_task = sum(score(j, j) for j in range(1, T + 1)) / T
    learned = sum((score(j, j) - score(j - 1, j)) * (-1 if lower else 1) for j in range(1, T + 1)) / T
    if T == 1:
        return dict(zip(FIGURES, [average, new_task, learned, None, None, None], strict=True))
    forgetting = backward = forward = 0.0
    for j in range(1, T):
        earlier = [score(t, j) for t in range(j, T)]
        forgetting += score(T, j) - min(earlier) if lower else max(earlier) - score(T, j)
        backward += (score(j, j) - score(T, j)) if lower else (score(T, j) - score(j, j))
    for j in range(2, T + 1):
        forward += (score(0, j) - score(j - 1, j)) if lower else (score(j - 1, j) - score(0, j))
    values = [average, new_task, learned, forgetting / (T - 1), backward / (T - 1), forward / (T - 1)]
    return dict(zip(FIGURES, values, strict=True))


def needed(name: str, T: int) -> set[tuple[int, int]]:
    """Which entries (stage, task from 1) a figure needs."""
    tasks = range(1, T + 1)
    return {
        "average": {(T, j) for j in tasks},
        "new_task": {(j, j) for j in tasks},
        "learned": {(t, j) for j in tasks for t in (j, j - 1)},
        "forgetting": {(t, j) for j in range(1, T) for t in range(j, T + 1)},
        "backward_transfer": {(t, j) for j in range(1, T) for t in (T, j)},
        "forward_transfer": {(t, j) for j in range(2, T + 1) for t in (0, j - 1)},
    }[name]


def test_hand_calculation():
    summary = summarize(HAND)
    assert summary == pytest.approx(
        {
            "average": (0.7 + 0.6 + 0.9) / 3,
            "new_task": (0.9 + 0.8 + 0.9) / 3,
            "learned": ((0.9 - 0.1) + (0.8 - 0.3) + (0.9 - 0.6)) / 3,
            "forgetting": ((0.9 - 0.7) + (0.8 - 0.6)) / 2,
            "backward_transfer": ((0.7 - 0.9) + (0.6 - 0.8)) / 2,
            "forward_transfer": ((0.3 - 0.2) + (0.6 - 0.3)) / 2,
            "general_change": None,
        }
    )
    assert list(summary) == [*FIGURES, "general_change"]
    assert all(value is None or type(value) is float for value in summary.values())


def test_forgetting_counts_from_the_best_stage_not_from_the_first():
    S = [[0.0, 0.0, 0.0], [0.4, 0, 0], [0.9, 0.5, 0], [0.6, 0.5, 0.5]]
    summary = summarize(S)
    assert summary["forgetting"] == pytest.approx((0.9 - 0.6) / 2)
    assert summary["backward_transfer"] == pytest.approx((0.6 - 0.4) / 2)


def test_forgetting_may_be_negative():
    assert summarize([[0, 0], [0.5, 0], [0.75, 1]])["forgetting"] == -0.25


@pytest.mark.parametrize("T", [1, 2, 3, 7])
@pytest.mark.parametrize("metric", [None, "accuracy", "loss", "perplexity"])
@pytest.mark.parametrize("kind", ["lists", "array"])
def test_equals_brute_force(T: int, metric: str | None, kind: str):
    S = np.random.default_rng(T).random((T + 1, T))
    summary = summarize(S if kind == "array" else S.tolist(), metrics=metric)
    expected = brute_force(S.tolist(), lower=metric in ("loss", "perplexity"))
    assert {name: summary[name] for name in FIGURES} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("missing", [None, math.nan, np.float32("nan")])
def test_a_missing_score_nulls_exactly_the_figures_that_need_it(missing):
    T = 4
    S = np.random.default_rng(0).random((T + 1, T)).tolist()
    whole = summarize(S)
    for t in range(T + 1):
        for j in range(1, T + 1):
            holed = [[missing if (u, k) == (t, j) else S[u][k - 1] for k in range(1, T + 1)] for u in range(T + 1)]
            summary = summarize(holed)
            for name in FIGURES:
                assert summary[name] == (None if (t, j) in needed(name, T) else whole[name]), (name, t, j)


def test_losses_keep_the_meaning_of_the_signs():
    S = [[3.0, 4.0], [1.0, 3.5], [2.5, 0.5]]  # task 1 is forgotten: its loss rises from 1.0 to 2.5
    summary = summarize(S, metrics="loss")
    assert summary["forgetting"] == 1.5
    assert summary["backward_transfer"] == -1.5
    assert summary["forward_transfer"] == 0.5  # learning task 1 lowered the loss of task 2
    assert summary["average"] == 1.5
    assert summary["new_task"] == 0.75


@pytest.mark.parametrize(
    "metrics",
    [["accuracy", "loss", "accuracy"], {"a": "loss", "b": "accuracy", "c": "loss"}, ["loss", "perplexity", "loss"]],
)
def test_no_mean_over_accuracies_and_losses(metrics):
    assert set(summarize(HAND, metrics=metrics).values()) == {None}
    assert summarize(HAND, metrics=metrics, general={"mmlu": [0.5, 0, 0, 0.25]})["general_change"] == -0.25


def test_metrics_by_list_and_by_task_say_the_same_as_one_name():
    expected = summarize(HAND, metrics="loss")
    assert summarize(HAND, metrics=["loss"] * 3) == expected
    assert summarize(HAND, metrics={"a": "loss", "b": "loss", "c": "loss"}) == expected
    assert summarize(HAND, metrics=["accuracy", "rouge_l", "accuracy"]) == summarize(HAND)


def test_one_task_has_nothing_to_forget():
    assert summarize([[0.25], [0.75]]) == {
        "average": 0.75,
        "new_task": 0.75,
        "learned": 0.5,
        "forgetting": None,
        "backward_transfer": None,
        "forward_transfer": None,
        "general_change": None,
    }


def test_a_score_that_is_not_finite_gives_no_figure():
    summary = summarize([[9.0, 9.0], [math.inf, 9.0], [math.inf, 1.0]], metrics="loss")
    assert summary["average"] is None
    assert summary["forgetting"] is None
    assert summary["forward_transfer"] == 0


def test_general_change_is_over_accuracies_only():
    general = {"mmlu": [0.6, None, 0.5, 0.4], "arc": [0.5, 0.5, 0.5, 0.6], "perplexity/wiki": [10.0, 20, 30, 40]}
    assert summarize(HAND, general=general)["general_change"] == pytest.approx((-0.2 + 0.1) / 2)
    assert summarize(HAND, general={"perplexity/wiki": [1, 2, 3, 4]})["general_change"] is None
    assert summarize(HAND, general={"loss/wiki": [1, 2, 3, 4]})["general_change"] is None
    assert summarize(HAND, general=general | {"new": [None, 1, 1, 1]})["general_change"] is None


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (HAND[1:], r"3 rows; 3 tasks need 4: row 0 is before training"),
        ([*HAND, HAND[0]], r"5 rows; 3 tasks need 4"),
        ([[0.1, 0.2, 0.3], [0.1, 0.2], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3]], r"scores\[1\] has 2 scores"),
        ([[0.9], [0.5, 0.8]], r"scores\[1\] has 2 scores but scores\[0\] has 1"),
        ([[0.1, "0.2"], [0, 0], [0, 0]], r"scores\[0\]\[1\] must be a number or None, not '0.2'"),
        ([0.1, 0.2], r"scores\[0\] must be a row"),
        (["ab", "cd", "ef"], r"scores\[0\] must be a row"),
        (np.zeros(3), r"scores\[0\] must be a row"),
        ([], r"empty"),
        ([[]], r"empty"),
        (np.zeros((3, 2, 2)), r"scores\[0\]\[0\] must be a number"),
    ],
)
def test_wrong_shapes_are_explained(scores, message: str):
    with pytest.raises(ValueError, match=message):
        summarize(scores)


def test_wrong_metrics_and_general_are_explained():
    with pytest.raises(ValueError, match="metrics names 2 metrics; it needs one for each of the 3 tasks"):
        summarize(HAND, metrics=["loss", "loss"])
    with pytest.raises(ValueError, match=r"general\['mmlu'\] has 3 values; it needs 4"):
        summarize(HAND, general={"mmlu": [1, 2, 3]})
    with pytest.raises(ValueError, match=r"general\['mmlu'\]\[1\] must be a number"):
        summarize(HAND, general={"mmlu": [1, "x", 3, 4]})


def published() -> dict[str, dict]:
    if not PUBLISHED.exists():
        pytest.skip("the published matrices are not here")
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))


def test_published_matrices():
    for name, matrix in published().items():
        tasks, rows = matrix["steps"], matrix["exact_match"]
        T = len(tasks)
        summary = summarize([[None] * T, *[[row.get(task) for task in tasks] for row in rows]])

        average = sum(rows[-1][task] for task in tasks) / T
        assert summary["average"] == pytest.approx(average), name
        assert summary["forward_transfer"] is None, name
        backward = forgetting = 0.0
        missing_diagonal = missing_below = False
        for j in range(T - 1):
            column = [rows[t][tasks[j]] for t in range(j, T)]
            missing_diagonal |= column[0] is None
            missing_below |= None in column
            if not missing_diagonal:
                backward += (column[-1] - column[0]) / (T - 1)
            if not missing_below:
                forgetting += (max(column[:-1]) - column[-1]) / (T - 1)
        assert summary["backward_transfer"] == (None if missing_diagonal else pytest.approx(backward)), name
        assert summary["forgetting"] == (None if missing_below else pytest.approx(forgetting)), name


def test_published_figures_by_hand():
    matrices = published()

    def summary(name: str) -> dict[str, float | None]:
        tasks, rows = matrices[name]["steps"], matrices[name]["exact_match"]
        return summarize([[None] * 4, *[[row.get(task) for task in tasks] for row in rows]])

    seqft = summary("order1_seqft")
    assert seqft["average"] == pytest.approx((79.5263 + 52.6711 + 48.8421 + 90.0263) / 4)
    assert seqft["new_task"] == pytest.approx((97.0132 + 55.25 + 72.2763 + 90.0263) / 4)
    assert seqft["forgetting"] == pytest.approx((17.4869 + 2.5789 + 23.4342) / 3)
    olora = summary("order1_olora")  # the dip of dbpedia at stage 3 is not its best score; nor is its last
    assert olora["forgetting"] == pytest.approx((98.7105 - 97.7368 + 57.7632 - 56.0658 + 71.9079 - 71.0395) / 3)
    seqlora = summary("order1_seqlora")  # the third row was never measured
    assert seqlora["average"] == pytest.approx((59.0526 + 39.7105 + 62.5395 + 90.1974) / 4)
    assert [seqlora[k] for k in ("new_task", "forgetting", "backward_transfer", "forward_transfer")] == [None] * 4


def random_examples(T: int, n: int, seed: int = 0) -> list[list[np.ndarray | None]]:
    rng = np.random.default_rng(seed)
    return [[(rng.random(n + j) < 0.2 + 0.6 * rng.random()).astype(float) for j in range(T)] for _ in range(T + 1)]


def test_intervals_hold_the_figure_and_shrink_with_more_examples():
    few, many = random_examples(4, 50), random_examples(4, 5000)
    for examples in (few, many):
        summary = summarize([[entry.mean() for entry in row] for row in examples])
        for name, interval in intervals(examples).items():
            assert interval[0] < summary[name] < interval[1], name
    for name in FIGURES:
        low, high = intervals(few)[name]
        narrow_low, narrow_high = intervals(many)[name]
        assert narrow_high - narrow_low < 0.3 * (high - low), name


def test_intervals_of_a_mean_are_those_of_the_normal_approximation():
    n = 2000
    hits = np.zeros(n)
    hits[:600] = 1
    low, high = intervals([[np.zeros(n)], [hits]], resamples=4000)["average"]
    half = 1.96 * math.sqrt(0.3 * 0.7 / n)
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.1 * half)


def test_intervals_resample_the_same_examples_at_every_stage():
    """Two stages that answer the same examples rightly do not differ in any resample."""
    rng = np.random.default_rng(1)
    first, second = (rng.random(40) < 0.5).astype(float), (rng.random(30) < 0.5).astype(float)
    result = intervals([[first, second]] * 3)
    assert result["forgetting"] == [0, 0]
    assert result["backward_transfer"] == [0, 0]
    assert result["forward_transfer"] == [0, 0]
    assert result["average"][0] < result["average"][1]


@pytest.mark.parametrize("together", [1, 200, 100_000])
def test_intervals_equal_a_plain_loop_over_the_same_draws(together, monkeypatch):
    monkeypatch.setattr(sys.modules["holdfast.metrics.intervals"], "DRAWN_TOGETHER", together)
    T, resamples = 4, 60
    examples = random_examples(T, 17)
    weights = [np.arange(1.0, 18 + j) for j in range(T)]
    draws = [np.random.default_rng([5, j]) for j in range(T)]
    values = {name: [] for name in FIGURES}
    for _ in range(resamples):
        drawn = [draws[j].integers(17 + j, size=17 + j) for j in range(T)]
        S = [
            [np.average(examples[t][j][drawn[j]], weights=weights[j][drawn[j]]) for j in range(T)] for t in range(T + 1)
        ]
        for name, value in brute_force(S, lower=True).items():
            values[name].append(value)
    result = intervals(examples, metrics="loss", weights=weights, resamples=resamples, seed=5)
    for name in FIGURES:
        assert result[name] == pytest.approx(np.percentile(values[name], [2.5, 97.5]).tolist()), name


def test_rises_have_the_intervals_of_each_pair_alone():
    rng = np.random.default_rng(2)
    sizes = [20, 30, 20, 1, 20]
    pairs = [tuple(rng.random((n, 3)) for _ in range(2)) for n in sizes]
    totals = [geometric, geometric, geometric, geometric, lambda sums: sums[..., 0] / sums[..., 2]]
    found = rise_intervals([*pairs, None], [*totals, geometric])
    assert found[3] is None and found[5] is None
    for j in (0, 1, 2, 4):
        alone = paired_difference([pairs[j][0]], [pairs[j][1]], totals=[totals[j]], permutations=1)
        assert found[j] == pytest.approx(alone["interval"])


def geometric(sums: np.ndarray) -> np.ndarray:
    """A score that is no mean over examples."""
    return np.sqrt(sums[..., 0] * sums[..., 1]) / sums[..., 2]


def test_a_score_that_is_no_mean_is_computed_again_from_each_draw():
    T, n, resamples = 2, 15, 40
    rng = np.random.default_rng(4)
    statistics = [[rng.random((n, 3)) for _ in range(T)] for _ in range(T + 1)]
    statistics[0][1] = None  # not measured before training
    draws = [np.random.default_rng([3, j]) for j in range(T)]
    values = {name: [] for name in FIGURES}
    for _ in range(resamples):
        drawn = [draws[j].integers(n, size=n) for j in range(T)]
        S = [[None if x is None else geometric(x[drawn[j]].sum(axis=0)) for j, x in enumerate(r)] for r in statistics]
        for name, value in summarize(S).items():
            if name in values:
                values[name].append(value)
    result = intervals(statistics, totals=[geometric, geometric], resamples=resamples, seed=3)
    assert result.pop("forward_transfer") is None
    for name, interval in result.items():
        assert interval == pytest.approx(np.percentile(values[name], [2.5, 97.5]).tolist()), name


def test_totals_of_means_are_means():
    examples = random_examples(2, 30)
    pairs = [[np.stack([x, np.ones(len(x))], axis=1) for x in row] for row in examples]
    ratio = lambda sums: sums[..., 0] / sums[..., 1]  # noqa: E731
    assert intervals(pairs, totals=[ratio, ratio]) == intervals(examples)
    paired = paired_difference(pairs[0], pairs[1], totals=[ratio, ratio])
    assert paired == paired_difference(examples[0], examples[1])
    with pytest.raises(ValueError, match="totals has 1 entries"):
        intervals(pairs, totals=[ratio])
    with pytest.raises(ValueError, match="same test examples"):
        intervals(examples, totals=[ratio, ratio])


def test_intervals_are_seeded():
    examples = random_examples(3, 30)
    assert intervals(examples, seed=1) == intervals(examples, seed=1)
    assert intervals(examples, seed=1) != intervals(examples, seed=2)


def test_intervals_are_null_where_the_figure_is():
    examples = random_examples(3, 20)
    examples[0][2] = None
    result = intervals(examples)
    assert result["forward_transfer"] is None
    assert all(result[name] is not None for name in FIGURES if name != "forward_transfer")
    assert set(intervals(examples, metrics=["loss", "accuracy", "accuracy"]).values()) == {None}
    single = intervals(random_examples(1, 20))
    assert {name for name, interval in single.items() if interval} == {"average", "new_task", "learned"}
    for row in examples:
        row[1] = None
    assert set(intervals(examples).values()) == {None}


@pytest.mark.parametrize(
    ("examples", "arguments", "message"),
    [
        (random_examples(2, 5)[1:], {}, "row 0 is before training"),
        ([[[1, 0, 1]], [[1, 0]]], {}, "same test examples"),
        ([[[]], [[]]], {}, "same test examples, at least one"),
        ([[[1, 0, 1]], [[1, 0, 1]]], {"weights": [[1, 2]]}, "one number for each of the 3 test examples"),
        ([[[1, 0, 1]], [[1, 0, 1]]], {"weights": []}, "one for each of the 1 tasks"),
        ([[[1, 0, 1]], [[1, 0, 1]]], {"resamples": 0}, "at least 1"),
    ],
)
def test_wrong_examples_are_explained(examples, arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        intervals(examples, **arguments)


def test_terms_by_task_by_hand():
    assert by_task(HAND) == {
        "learned": pytest.approx([0.8, 0.5, 0.3]),
        "forgetting": [pytest.approx(0.2), pytest.approx(0.2), None],
        "backward_transfer": [pytest.approx(-0.2), pytest.approx(-0.2), None],
        "forward_transfer": [None, pytest.approx(0.1), pytest.approx(0.3)],
    }
    assert by_task([[0.25], [0.75]]) == {name: [None] for name in BY_TASK} | {"learned": [0.5]}


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_figures_are_the_means_of_their_terms(metric: str):
    S = np.random.default_rng(7).random((6, 5)).tolist()
    summary, terms = summarize(S, metrics=metric), by_task(S, metrics=metric)
    for name in BY_TASK:
        known = [value for value in terms[name] if value is not None]
        assert len(known) == (5 if name == "learned" else 4)
        assert summary[name] == pytest.approx(sum(known) / len(known)), name


def test_each_task_keeps_its_own_scale_by_task():
    S = [[3.0, 0.2, 0.2], [1.0, 0.2, 0.2], [2.5, 0.9, 0.2], [2.0, 0.6, 0.8]]
    terms = by_task(S, metrics=["loss", "accuracy", "accuracy"])
    assert terms["forgetting"][:2] == pytest.approx([1.0, 0.3]), "a loss that rose and an accuracy that fell"
    assert terms["backward_transfer"][:2] == pytest.approx([-1.0, -0.3])


def test_a_missing_score_nulls_the_terms_of_its_task_only():
    S = np.random.default_rng(0).random((5, 4)).tolist()
    whole = by_task(S)
    S[2][0] = None
    terms = by_task(S)
    assert terms["forgetting"] == [None, *whole["forgetting"][1:]]
    assert terms["backward_transfer"] == whole["backward_transfer"]


def test_clipped_backward_transfer():
    S = [[0.0, 0, 0], [0.4, 0, 0], [0.9, 0.5, 0], [0.6, 0.3, 0.5]]  # task 1 gained 0.2, task 2 lost 0.2
    assert summarize(S)["backward_transfer"] == pytest.approx(0)
    assert clipped_backward_transfer(S) == pytest.approx(-0.2 / 2)
    losses = [[4.0, 4.0, 4.0], [2.0, 4.0, 4.0], [1.0, 2.0, 4.0], [3.0, 1.0, 1.0]]
    assert clipped_backward_transfer(losses, metrics="loss") == pytest.approx(-1.0 / 2)
    assert clipped_backward_transfer([[0.25], [0.75]]) is None
    assert clipped_backward_transfer(S, metrics=["loss", "accuracy", "loss"]) is None
    S[1][0] = None
    assert clipped_backward_transfer(S) is None


def test_clipped_transfer_of_the_published_matrices():
    """Nothing was gained afterwards in these runs, so that clipping changes nothing."""
    for name, matrix in published().items():
        tasks, rows = matrix["steps"], matrix["exact_match"]
        S = [[None] * 4, *[[row.get(task) for task in tasks] for row in rows]]
        assert clipped_backward_transfer(S) == summarize(S)["backward_transfer"], name


def test_area_under_a_curve():
    assert area_under_curve([0, 10], [0.2, 0.6]) == pytest.approx(0.4)
    assert area_under_curve([0, 5, 20], [0.0, 0.8, 0.8]) == pytest.approx((5 * 0.4 + 15 * 0.8) / 20)
    assert area_under_curve([3, 7], [0.5, 0.5]) == 0.5
    for steps, scores in (([1], [0.5]), ([1, 1], [0.5, 0.5]), ([1, 2], [0.5]), ([2, 1], [0.1, 0.2])):
        with pytest.raises(ValueError, match="at least two scores, at steps that increase"):
            area_under_curve(steps, scores)


def test_intervals_by_task_hold_the_term():
    examples = random_examples(4, 60)
    terms, found = by_task([[entry.mean() for entry in row] for row in examples]), task_intervals(examples)
    assert set(found) == set(BY_TASK)
    for name in BY_TASK:
        for value, ends in zip(terms[name], found[name], strict=True):
            assert (value is None) == (ends is None)
            if value is not None and ends is not None and name != "forgetting":  # a maximum is biased upwards
                assert ends[0] < value < ends[1]
    examples[1][0] = None
    assert task_intervals(examples)["backward_transfer"][0] is None
    assert task_intervals(examples)["backward_transfer"][1] is not None


def test_seeds_that_differ_widen_the_interval():
    def runs(spread: float) -> list:
        rng = np.random.default_rng(0)
        return [[[np.zeros(400)], [(rng.random(400) < 0.5 + spread * (k - 2)).astype(float)]] for k in range(5)]

    def width(ends: list[float]) -> float:
        return ends[1] - ends[0]

    alike, apart = (seed_intervals(runs(spread))["average"] for spread in (0.0, 0.2))
    assert width(apart) > 4 * width(alike)


def test_a_paired_difference_by_hand():
    a, b = [[1, 0, 0, 0], [0.5, 0.5]], [[1, 1, 1, 0], [0.5, 0.0]]
    result = paired_difference(a, b)
    assert result["difference"] == pytest.approx((2 / 4 - 0.5 / 2) / 2)
    flipped = paired_difference(b, a)
    assert flipped["difference"] == -result["difference"]
    assert flipped["p"] == result["p"]
    # Of the 8 signs of the three pairs that differ, d = (+-1/4 +-1/4 -+1/4) / 2: |d| >= 1/8 always holds.
    assert result["p"] == 1


def test_the_permutation_test_gives_the_binomial_value():
    """Ten pairs that differ, all to one side: of 2^10 signs two are as far."""
    result = paired_difference([[0] * 30], [[1] * 10 + [0] * 20], permutations=200_000)
    assert result["p"] == pytest.approx(2 / 2**10, rel=0.2)
    assert result["interval"][0] > 0


def test_p_values_of_equal_methods_are_uniform():
    rng = np.random.default_rng(5)
    p = [
        paired_difference([rng.random(60)], [rng.random(60)], resamples=1, permutations=200, seed=k)["p"]
        for k in range(300)
    ]
    for level in (0.05, 0.25, 0.5):
        assert sum(value <= level for value in p) / 300 == pytest.approx(level, abs=3 * math.sqrt(level / 300))


def test_methods_with_the_same_scores_do_not_differ():
    result = paired_difference([[1.0, 0.0, 1.0]], [[1.0, 0.0, 1.0]])
    assert result == {"difference": 0, "interval": [0, 0], "p": 1}


def test_the_paired_difference_is_weighted_and_narrower_than_the_two_intervals():
    rng = np.random.default_rng(2)
    hard = rng.random(500)
    a = (rng.random(500) < hard).astype(float)
    b = np.where(rng.random(500) < 0.1, 1.0, a)
    result = paired_difference([a], [b])
    alone = [intervals([[a], [x]])["average"] for x in (a, b)]
    assert result["interval"][1] - result["interval"][0] < 0.6 * min(high - low for low, high in alone)
    weights = [np.arange(1.0, 501.0)]
    weighted = paired_difference([a], [b], weights=weights)["difference"]
    assert weighted == pytest.approx(np.average(b - a, weights=weights[0]))


@pytest.mark.parametrize(("a", "b"), [([], []), ([[1]], [[1], [1]]), ([[1, 0]], [[1]])])
def test_pairs_must_be_pairs(a, b):
    with pytest.raises(ValueError, match="same tasks with the same test examples"):
        paired_difference(a, b)


def test_runs_of_different_tests_have_no_interval_over_seeds():
    with pytest.raises(ValueError, match="same test examples"):
        seed_intervals([random_examples(2, 5), random_examples(2, 6)])
    with pytest.raises(ValueError, match="same number of tasks"):
        seed_intervals([random_examples(2, 5), random_examples(3, 5)])
    with pytest.raises(ValueError, match="at least one run"):
        seed_intervals([])


def test_one_test_example_gives_no_interval():
    """All of its resamples are the same, so that they would make an interval of no width."""
    one, many = [0.5], [0.2, 0.4, 0.9]
    assert paired_difference([one], [[0.9]])["interval"] is None
    assert paired_difference([many], [many])["interval"] is not None
    assert seed_difference([[np.array([0.5])]], [[np.array([0.9])]], paired=False)["detectable"] is None
    scores = [[one, many], [[0.6], many], [[0.7], many]]
    figures = intervals(scores)
    assert figures["average"] is None and figures["forward_transfer"] is not None, "which is of the second task alone"
    found = task_intervals(scores)
    assert found["learned"][0] is None and found["learned"][1] is not None
