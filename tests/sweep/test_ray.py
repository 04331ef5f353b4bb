"""A sweep on a Ray cluster of two machines on loopback, one of which is lost in the middle."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from holdfast.config.run import load_config
from holdfast.errors import ConfigError
from holdfast.runner.run import run
from holdfast.sweep.plan import Resources, expand, load_sweep
from holdfast.sweep.work import work_off
from holdfast.system.files import read_json
from holdfast.system.progress import Progress
from support.sweeps import tiny_sweep

pytest.importorskip("ray", reason="needs Ray: the extra [ray]")


@pytest.mark.slow
def test_a_lost_machine_loses_no_run(tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    from holdfast.sweep.ray_pool import RayPool

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    values = tiny_sweep(tmp_path)
    values["run"]["training"]["max_steps"] = 40
    values["run"]["training"]["save_every"] = 5
    runs = expand(load_sweep(values))
    assert len(runs) == 12
    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    lost = cluster.add_node(**small)
    killed: list[list[str]] = []

    def lose() -> None:
        """Once two runs are done and another machine's is under way."""
        while sum(run.state == "done" for run in runs) < 2 or not list(tmp_path.glob("sweep/*/stages/01-*/checkpoint")):
            time.sleep(0.02)
        killed.append([run.name for run in runs if run.state == "done"])
        cluster.remove_node(lost, allow_graceful=False)

    watching = threading.Thread(target=lose, daemon=True)
    watching.start()
    try:
        with RayPool(Resources(cores=1, retries=-1), cluster.address) as workers:
            ended = work_off(runs, workers, Progress(quiet=True))
    finally:
        cluster.shutdown()
    assert [end.state for end in ended] == ["done"] * 12, [end.why for end in ended]
    assert killed and len(killed[0]) < 12
    for planned in (runs[0], runs[7]):
        alone = load_config(planned.config.model_dump() | {"output": str(tmp_path / "alone" / planned.name)})
        expected = run(alone, Progress(quiet=True))
        assert read_json(planned.path / "matrix.json")["scores"] == expected["scores"]
        ours, theirs = (read_json(next(p.glob("stages/01-*/stage.json"))) for p in (planned.path, Path(alone.output)))
        assert ours["weights"] == theirs["weights"]
    for planned in runs:  # nobody trained a step twice to the end: each step stands once in the events
        lines = (planned.path / "events.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [(json.loads(line)["stage"], json.loads(line)["step"]) for line in lines]
        assert len(steps) == len(set(steps))


def test_a_cluster_that_is_not_there_is_told_of():
    from holdfast.sweep.ray_pool import RayPool

    with pytest.raises(ConfigError, match=r"--ray: no cluster answers at '127\.0\.0\.1:9'"):
        RayPool(Resources(), "127.0.0.1:9")
