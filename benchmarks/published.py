"""The published code of "Forgetting in Language Models" at work, in an environment of its own: seconds of its steps.

`lab.py --against-jax` starts it there, beside a checkout of the code. A line of JSON on standard input names a turn
(precision, method, steps); a line on standard output has the seconds of each step. In between it waits and uses no
processor. The train step, the model and the sampler are the published ones, and what surrounds them is as in the
published loop: rows go to the device, samples of the starting model are drawn for a buffer of steps at a time.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, PartitionSpec

PEAK, DECAY, WEIGHT = 1e-3, 0.02, 10
ROWS = PartitionSpec("data", None)


class Steps:
    """One kind of training, which lasts from turn to turn, so that it is compiled once.

    Args:
        shape: width, depth, head_size, context, vocab, batch, replayed and buffer.
        precision: of the activations.
        method: "ntp_pre" or "kl_pre", with rows that the starting model draws; or None.
    """

    def __init__(self, shape: dict[str, int], precision: str, method: str | None):
        self.code, self.model = (importlib.import_module(name) for name in ("train_single", "model"))
        self.shape, self.method = SimpleNamespace(**shape), method
        size = self.shape
        settings = SimpleNamespace(
            D=size.width,
            L=size.depth,
            H=size.head_size,
            T=size.context,
            V=size.vocab,
            activ_dtype=precision,
            remat=False,
            dp_shard=False,
        )
        self.key = jax.random.key(0)
        self.chance = np.random.default_rng(0)
        self.start = self.model.create_sharded_model(settings, self.key)
        self.weights = jax.tree.map(jax.numpy.copy, self.start)
        self.forward, self.cache = partial(self.model.forward, settings), partial(self.model.init_kv, settings)
        self.optimizer = optax.adamw(PEAK, weight_decay=DECAY)
        self.state = self.optimizer.init(self.weights)
        self.drawn = self.draws()
        self.step()
        self.drawn = self.draws()  # a turn begins with drawing, so that it spans whole buffers

    def draws(self) -> Iterator[Any]:
        """The samples of each step."""
        size = self.shape
        while True:
            self.key, key = jax.random.split(self.key)
            count = size.buffer * size.replayed
            rows = self.code.sample_synthetic_batch(
                key, self.forward, self.cache, self.start, count, size.context, data_token_id=0
            )
            shape = (size.buffer, size.replayed, size.context)
            rows = jax.numpy.reshape(rows, shape, out_sharding=PartitionSpec(None, "data", None))
            yield from (rows[number] for number in range(size.buffer))

    def step(self) -> None:
        size = self.shape
        rows = self.chance.integers(size.vocab, size=(size.batch, size.context), dtype=np.uint16)
        batch = jax.device_put(rows, ROWS)
        replayed = next(self.drawn) if self.method else None
        self.weights, self.state, loss, *_ = self.code.train_step(
            self.forward,
            self.forward,
            self.optimizer,
            self.weights,
            self.start,
            self.state,
            batch,
            replayed,
            self.method,
            WEIGHT,
        )
        jax.block_until_ready(loss)
        jax.block_until_ready(self.weights)


def main() -> None:
    """Answer every line until there are no more."""
    folder, shape, clock = sys.argv[1:]
    now: Callable[[], float] = time.process_time if clock == "busy" else time.perf_counter
    sys.path.insert(0, folder)
    sys.modules["wandb"] = ModuleType("wandb")  # it is imported, and not used by a step
    jax.set_mesh(jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Explicit, AxisType.Explicit)))
    kinds: dict[tuple[str, str | None], Steps] = {}
    for line in sys.stdin:
        turn = json.loads(line)
        kind = turn["precision"], turn["method"]
        if kind not in kinds:
            kinds[kind] = Steps(json.loads(shape), *kind)
        times = [now()]
        for _ in range(turn["steps"]):
            kinds[kind].step()
            times.append(now())
        print(json.dumps(np.diff(times).tolist()), flush=True)


if __name__ == "__main__":
    main()
