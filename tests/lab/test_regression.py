"""Regression in one dimension: the KL is that of Gaussians, and it keeps the old points."""

import pytest
import torch

from holdfast.lab.regression import RegressionConfig, experiment, gaussian_kl


def test_kl_of_gaussians_is_the_integral():
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    one, other = torch.distributions.Normal(0.3, 0.8), torch.distributions.Normal(-0.5, 1.4)
    integral = torch.trapezoid(one.log_prob(x).exp() * (one.log_prob(x) - other.log_prob(x)), x)
    kl = gaussian_kl(*(torch.tensor(value) for value in (0.3, 0.8, -0.5, 1.4)))
    assert kl.item() == pytest.approx(integral.item(), rel=1e-5)


def test_the_kl_keeps_the_old_points_and_the_same_seed_gives_the_same_rows():
    config = RegressionConfig(particles=3, old_steps=300, new_steps=200, weights=[0, 1])
    results, curves = experiment(config, seed=1)
    plain, kept = results
    assert plain["old_before"] < 0.15
    assert plain["new_rmse"] < 0.5 * plain["new_before"]
    assert kept["new_rmse"] < 0.5 * kept["new_before"]
    assert kept["old_rise"] < 0.5 * plain["old_rise"]
    assert {row["phase"] for row in curves} == {"old", "0", "1", "old points", "new points"}
    assert sum(row["phase"] == "old points" for row in curves) == 82
    assert experiment(config, seed=1) == (results, curves)
    assert experiment(config, seed=2)[0] != results
