"""Weights of the task's loss: one step of plain SGD against a loop over tokens, however the step is divided."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer

from holdfast.api.method import Method
from holdfast.errors import ConfigError, MethodError
from holdfast.losses.next_token import next_token_nll
from holdfast.training.chunked_trainer import ChunkedLossTrainer
from holdfast.training.loss_weights import weighted_nll
from holdfast.training.trainer import continual
from support.tiny import pad_rows, tiny_model, tiny_rows
from support.trained import trained, vector


class Tokens(Method, registered=False):
    """A weight for each token, by what it is and what stands before it."""

    name = "tokens"

    def loss_weights(self, step, batch, outputs):
        assert outputs.logits.shape[:2] == batch["labels"].shape
        return (batch["input_ids"] % 5 + batch["input_ids"].roll(1, 1) % 3).float()


class Rows(Method, registered=False):
    """A weight for each row, by its first token."""

    name = "rows"

    def loss_weights(self, step, batch, outputs):
        return (batch["input_ids"][:, 0] % 4).float()


class Silent(Method, registered=False):
    name = "silent"

    def loss_weights(self, step, batch, outputs):
        return None


def weight(row, place, methods):
    ids, product = row["input_ids"], 1.0
    for method in methods:
        product *= ids[0] % 4 if method is Rows else ids[place] % 5 + ids[place - 1] % 3
    return product


def one_step(rows, methods, lr=0.1):
    """The weights after a step of SGD on sum w nll / tokens, in a plain loop."""
    model, total, tokens = tiny_model(), 0.0, 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        for place in range(1, len(row["labels"])):
            if row["labels"][place] != -100:
                nll = F.cross_entropy(logits[place - 1], torch.tensor(row["labels"][place]))
                total, tokens = total + weight(row, place, methods) * nll, tokens + 1
    (total / tokens).backward()
    return torch.cat([(p - lr * p.grad).detach().flatten() for p in model.parameters()]), float(total.detach()) / tokens


PLAIN = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0}


@pytest.mark.parametrize("methods", [(Tokens,), (Rows,), (Rows, Tokens)], ids=lambda ms: "-".join(m.name for m in ms))
@pytest.mark.parametrize(("size", "count"), [(8, 1), (2, 4), (3, 3)])
def test_a_step_is_that_of_the_weighted_sum_over_all_tokens(methods, size, count, tmp_path):
    rows = tiny_rows(8)
    args = PLAIN | {"per_device_train_batch_size": size, "gradient_accumulation_steps": count}
    trainer = trained(tmp_path, rows=rows, args=args, method=[method() for method in methods])
    expected, loss = one_step(rows, methods)
    torch.testing.assert_close(vector(trainer.model), expected, rtol=1e-4, atol=1e-6)
    [line] = [line for line in trainer.state.log_history if "loss" in line]
    assert line["loss"] == pytest.approx(loss, rel=1e-4) and line["term/task"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("size", [8, 2])
def test_a_trainer_whose_loss_makes_no_logits_takes_a_second_pass(size, tmp_path):
    rows = tiny_rows(8)
    args = PLAIN | {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
    trainer = trained(tmp_path, cls=continual(ChunkedLossTrainer), rows=rows, args=args, method=Tokens())
    torch.testing.assert_close(vector(trainer.model), one_step(rows, [Tokens])[0], rtol=1e-4, atol=1e-6)


def test_rehearsal_beside_the_batch_is_not_weighed(tmp_path):
    """What replay adds to a step is the same with and without weights of the task's rows, which are all 0 here."""

    class Nothing(Method, registered=False):
        name = "nothing"

        def loss_weights(self, step, batch, outputs):
            return torch.zeros(len(batch["labels"]))

    replay = {"name": "replay", "ratio": 1.0}
    trainer = trained(tmp_path, rows=tiny_rows(8), args=PLAIN, method=[replay, Nothing()])
    torch.testing.assert_close(vector(trainer.model), vector(tiny_model()))  # nothing to learn, nothing to rehearse
    trainer.train_dataset = tiny_rows(8, seed=2)
    trainer.train()
    line = [line for line in trainer.state.log_history if "loss" in line][-1]
    assert line["term/task"] == 0 and line["term/replay"] > 0
    assert not torch.equal(vector(trainer.model), vector(tiny_model()))


def test_where_no_method_weighs_the_loss_is_trainers_own(tmp_path):
    ours = trained(tmp_path, method=Silent())
    assert torch.equal(vector(ours.model), vector(trained(tmp_path, method="sequential").model))


def test_the_weighted_sum_has_the_gradient_of_the_plain_formula():
    torch.manual_seed(0)
    labels = pad_rows(tiny_rows(5))["labels"]
    logits = torch.randn(*labels.shape, 11, requires_grad=True)
    labels = labels.clamp(max=10)
    weights = torch.rand(labels.shape)
    ours = weighted_nll(logits, labels, weights)
    supervised = (labels != -100).nonzero().tolist()
    plain = sum(weights[b, s] * F.cross_entropy(logits[b, s - 1], labels[b, s]) for b, s in supervised if s)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, plain)))
    ones = weighted_nll(logits, labels, torch.ones(labels.shape))
    torch.testing.assert_close(ones, next_token_nll(logits, labels)[0])


def test_what_cannot_be_weighed_is_refused(tmp_path):
    class Wrong(Method, registered=False):
        name = "wrong"

        def loss_weights(self, step, batch, outputs):
            return torch.ones(3, 3, 3)

    with pytest.raises(
        MethodError, match=r"its loss_weights are of shape \[3, 3, 3\]; they must be \[4, \d\], one for"
    ):
        trained(tmp_path, method=Wrong())

    class Twice(Trainer):
        def compute_loss(self, *args, **kwargs):
            loss, outputs = super().compute_loss(*args, **kwargs)
            return 2 * loss, outputs

    with pytest.raises(ConfigError, match=r"method tokens: .* this trainer's loss is another one \(8.*, not 4"):
        trained(tmp_path, cls=continual(Twice), method=Tokens())
    with pytest.raises(ConfigError, match="does not compute it from the labels of every token"):
        trained(tmp_path, method=Tokens(), args={"label_smoothing_factor": 0.2})
