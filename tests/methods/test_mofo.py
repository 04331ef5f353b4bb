"""MoFO: whole training against the paper's algorithm in a plain loop, and what moves in a step."""

from __future__ import annotations

import pytest
import torch

from holdfast.config.run import load_config
from holdfast.engines.shards import Shards
from holdfast.errors import ConfigError
from holdfast.methods import build
from holdfast.methods.mofo import MoFO, kth_largest
from holdfast.runner.setup import prepare, resolve
from holdfast.runner.stage import check_training
from holdfast.training.trainer import ContinualTrainer
from support.tiny import pad_rows, tiny_config, tiny_model, tiny_rows
from support.trained import trained, vector

ADAM = {"learning_rate": 0.01, "lr_scheduler_type": "constant", "max_grad_norm": 0.5}


class Ordered(ContinualTrainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def largest(m, fraction):
    """The mask of a tensor's largest entries, one by one."""
    count = max(1, int(fraction * m.numel()))
    order = sorted(range(m.numel()), key=lambda i: -abs(m.flatten()[i].item()))
    mask = torch.zeros(m.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return mask.reshape(m.shape) & (m != 0)


def plain_loop(rows, fraction, steps, beta1=0.9, beta2=0.999, eps=1e-8, lr=0.01, norm=0.5):
    """Algorithm 1 with AdamW's bias corrections and clipped gradients."""
    model = tiny_model()
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    for t in range(1, steps + 1):
        batch = pad_rows(rows[4 * (t - 1) : 4 * t])
        model.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
        with torch.no_grad():
            for name, p in model.named_parameters():
                m, v = moments[name]
                m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                step = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
                p.sub_(lr * step * largest(m, fraction))
    return model


@pytest.mark.parametrize("fraction", [0.05, 0.15, 0.7])
def test_training_is_the_algorithm_of_the_paper(fraction, tmp_path):
    rows = tiny_rows(16)
    ours = trained(tmp_path, cls=Ordered, rows=rows, args=ADAM, method={"name": "mofo", "fraction": fraction})
    expected = vector(plain_loop(rows, fraction, 4))
    torch.testing.assert_close(vector(ours.model), expected, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(expected, vector(plain_loop(rows, 1.0, 4)), atol=1e-3)


@pytest.mark.parametrize("optim", [{}, {"weight_decay": 0.1}, {"optim": "sgd", "optim_args": "momentum=0.9"}])
def test_so_many_weights_of_each_tensor_move_in_a_step(optim, tmp_path):
    start = tiny_model()
    args = {"max_steps": 1, "lr_scheduler_type": "constant"} | optim
    ours = trained(tmp_path, args=args, method={"name": "mofo", "fraction": 0.1})
    for p, q in zip(ours.model.parameters(), start.parameters(), strict=True):
        assert 0 < int((p != q).sum()) <= max(1, int(0.1 * p.numel()))


def test_a_weight_without_momentum_stays_though_weight_decay_would_move_it(tmp_path):
    """Almost all may move, and the embeddings of tokens that no row has never got a gradient."""
    rows, start = tiny_rows(16), tiny_model(tie_word_embeddings=False).model.embed_tokens.weight
    unseen = sorted(set(range(len(start))) - {token for row in rows for token in row["input_ids"]})
    args = {"max_steps": 2, "learning_rate": 0.1, "weight_decay": 0.5}
    ours = trained(
        tmp_path,
        model=tiny_model(tie_word_embeddings=False),
        rows=rows,
        args=args,
        method={"name": "mofo", "fraction": 0.999},
    )
    after = ours.model.model.embed_tokens.weight
    assert unseen and torch.equal(after[unseen], start[unseen])
    assert not torch.equal(after, start)


def test_an_optimizer_without_momentum_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"keeps no moving average of the gradients, .*; adamw_torch, or sgd with"):
        trained(tmp_path, args={"optim": "sgd"}, method="mofo")
    trained(tmp_path, args={"optim": "sgd", "max_steps": 1}, method={"name": "mofo", "fraction": 1.0})


def test_a_run_refuses_it_before_anything_is_measured(tmp_path):
    config = tiny_config(tmp_path, method="mofo")
    check_training(prepare(resolve(load_config(config))))
    config["training"] |= {"optimizer": "sgd"}
    with pytest.raises(ConfigError, match=r"^training\.optimizer: it keeps no moving average of the gradients"):
        check_training(prepare(resolve(load_config(config))))
    config["training"] |= {"arguments": {"optim_args": "momentum=0.9"}}
    check_training(prepare(resolve(load_config(config))))


class Divided:
    """A piece that is the whole: one process holds all of it."""

    def __init__(self, shape):
        self.shape = shape


def test_the_threshold_of_a_divided_tensor_is_found_bit_by_bit():
    torch.manual_seed(0)
    tensors = {f"t{i}": torch.rand(shape) * 10.0**i for i, shape in enumerate([(7, 5), (1,), (40,), (3, 3)], start=-2)}
    tensors["t1"] = torch.tensor([[0.0, 0.0, 2.0], [2.0, 1e-40, 0.0], [0.0, 0.0, 0.0]])
    pieces = {name: Divided(t.shape) for name, t in tensors.items()}
    for fraction in (0.01, 0.2, 0.3, 0.99):
        expected = kth_largest(Shards(tensors), fraction)
        assert kth_largest(Shards(tensors, pieces), fraction) == expected
        for name, t in tensors.items():
            assert expected[name] == sorted(t.flatten().tolist(), reverse=True)[max(1, int(fraction * t.numel())) - 1]


def test_it_acts_before_those_that_read_the_weights_after_a_step():
    first, *_ = build([("si", {}), ("cia", {}), ("mofo", {})])
    assert first.name == "mofo"
    assert MoFO().before is None
