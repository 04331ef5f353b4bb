"""Derived quantities, against values worked out by hand."""

import pytest

from holdfast.lab.derived import above_front, compute_multiplier, interval, loss_at_matched, slope


def test_old_loss_where_the_new_one_is_matched_lies_between_two_evaluations():
    new, old = [6.0, 5.0, 4.0], [3.0, 3.2, 4.0]
    assert loss_at_matched(new, old, 4.25) == pytest.approx(3.2 + 0.75 * 0.8)
    assert loss_at_matched(new, old, 5.0) == 3.2
    assert loss_at_matched(new, old, 7.0) == 3.0  # it starts below the target
    assert loss_at_matched(new, old, 3.9) is None


def test_the_first_time_counts_where_a_run_comes_to_the_target_twice():
    assert loss_at_matched([6.0, 4.0, 6.0, 4.0], [1.0, 2.0, 3.0, 4.0], 5.0) == 1.5


def test_compute_multiplier_is_the_share_of_pretraining_that_is_left():
    tokens, losses = [0, 100, 200, 400], [8.0, 4.0, 3.0, 2.0]
    assert compute_multiplier(tokens, losses, 2.0) == 1.0  # nothing forgotten
    assert compute_multiplier(tokens, losses, 1.5) == 1.0  # better than ever
    assert compute_multiplier(tokens, losses, 3.0) == 0.5
    assert compute_multiplier(tokens, losses, 2.5) == 0.75
    assert compute_multiplier(tokens, losses, 9.0) == 0.0  # worse than untrained


def test_height_over_a_front():
    front = [(5.0, 3.0), (3.0, 5.0), (4.0, 3.5)]
    assert above_front(front, (4.5, 3.25)) == 0.0
    assert above_front(front, (3.5, 4.0)) == pytest.approx(-0.25)
    assert above_front(front, (4.0, 4.0)) == 0.5
    assert above_front(front, (5.1, 4.0)) is None


def test_slope_of_a_line_and_of_its_noise():
    assert slope([1, 2, 4], [3, 5, 9]) == pytest.approx(2)
    assert slope([0, 1, 2], [1, -2, 1]) == pytest.approx(0)


def test_slope_at_equal_values_of_another_quantity():
    xs, held = [1, 2, 3, 4, 2], [0, 5, 1, 4, 2]
    assert slope(xs, [3 - 2 * x + 7 * z for x, z in zip(xs, held, strict=True)], held) == pytest.approx(-2)


@pytest.mark.parametrize(("count", "quantile"), [(2, 12.7062), (3, 4.3027), (5, 2.7764)])
def test_interval_is_student_s_t(count, quantile):
    values = [float(i) for i in range(count)]
    spread = (count * (count + 1) / 12) ** 0.5  # standard deviation of 0 ... n - 1
    mean, half = interval(values)
    assert mean == pytest.approx((count - 1) / 2)
    assert half == pytest.approx(quantile * spread / count**0.5, rel=1e-4)


def test_one_value_has_no_interval():
    assert interval([2.5]) == (2.5, None)
