"""The examples of clusters: the schema of a TrainJob, the options of sbatch, and commands that holdfast has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from support.command import holdfast
from support.paths import ROOT

SLURM = sorted((ROOT / "examples" / "slurm").iterdir())
DOCUMENTS = list(yaml.safe_load_all((ROOT / "examples/kubernetes/trainjob.yaml").read_text(encoding="utf-8")))
SBATCH = {
    "job-name": r"[\w-]+",
    "nodes": r"\d+",
    "ntasks": r"\d+",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "time": r"\d+:\d\d:\d\d",
    "signal": r"[A-Z]+@\d+",
    "requeue": "",
    "array": r"\d+-\d+",
    "output": r"[\w%.-]+",
}
"""Options of sbatch, and the form of their values (its manual page)."""


def unknown(given: Any, read: Any, path: str = "") -> Iterator[str]:
    """The keys of a document that its schema has no place for: what was read of it lacks them."""
    if isinstance(given, dict) and isinstance(read, dict):
        for key, value in given.items():
            yield from unknown(value, read[key], f"{path}.{key}") if key in read else [f"{path}.{key}"]
    elif isinstance(given, list) and isinstance(read, list):
        for number, (value, other) in enumerate(zip(given, read, strict=True)):
            yield from unknown(value, other, f"{path}[{number}]")
    elif isinstance(given, dict | list) or str(given) != str(read):
        yield path


def check(document: dict[str, Any], model: Any) -> list[str]:
    return list(unknown(document, model.from_dict(document).to_dict()))


def test_the_job_follows_kubeflows_schema():
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")
    [job] = [one for one in DOCUMENTS if one["kind"] == "TrainJob"]
    assert job["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    assert check(job, models.TrainerV1alpha1TrainJob) == []
    job["spec"]["trainer"]["numNode"] = 2
    assert check(job, models.TrainerV1alpha1TrainJob) == [".spec.trainer.numNode"]


def test_the_job_mounts_the_claim_that_the_file_makes():
    [claim], [job] = (
        [one for one in DOCUMENTS if one["kind"] == kind] for kind in ("PersistentVolumeClaim", "TrainJob")
    )
    [patch] = job["spec"]["runtimePatches"]
    [node] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["work"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    [container] = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]  # all nodes write into the run's directory


@pytest.mark.parametrize("path", SLURM, ids=lambda path: path.name)
def test_a_batch_script_has_options_of_sbatch(path):
    text = path.read_text(encoding="utf-8")
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?(.*)$", text, re.MULTILINE)
    assert len(lines) == text.count("#SBATCH") > 5
    for option, value, rest in lines:
        assert option in SBATCH and not rest, option
        assert re.fullmatch(SBATCH[option], value), f"{option}={value}"
    after = text[text.rindex("#SBATCH") :]
    assert text.startswith("#!/bin/bash\n") and "srun" in after and '"$@"' in after


def test_the_commands_that_they_start_are_there(capsys):
    [job] = [one for one in DOCUMENTS if one["kind"] == "TrainJob"]
    started = [" ".join(job["spec"]["trainer"]["args"]), *(path.read_text(encoding="utf-8") for path in SLURM)]
    for text in started:
        [command] = re.findall(r"holdfast (run|sweep) (?:\"\$@\"\n|run.yaml)", text)
        assert holdfast(command, "--help") == 0
        assert "KEY.PATH=VALUE" in capsys.readouterr().out
