"""The probe on a real, local Ray."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_probe import _table, config  # noqa: F401  (fixtures)

from memlaw import cli
from memlaw.law.store import read_cells
from memlaw.probe.run import probe

ray = pytest.importorskip("ray", reason="Ray is not installed")


@pytest.fixture
def here(config):  # noqa: F811
    return dataclasses.replace(config, lengths=(6, 10), seeds=(0,))


@pytest.mark.slow
def test_ray_finds_what_one_process_finds(here, tmp_path):
    from memlaw.probe.ray_launcher import ray_launcher

    probe(tmp_path / "local", here)
    probe(tmp_path / "ray", dataclasses.replace(here, lengths=(6,)))
    with ThreadPoolExecutor() as pool:  # a server's, say: signals can be set from the main one only
        result = pool.submit(probe, tmp_path / "ray", here, launcher=ray_launcher(cpus=1)).result()
    assert (result.n_run, result.n_failed) == (2, 0)
    assert _table(tmp_path / "ray") == _table(tmp_path / "local")
    assert not ray.is_initialized()


@pytest.mark.slow
def test_a_worker_that_dies_leaves_failed_cells(here, tmp_path, monkeypatch):
    from memlaw.probe import ray_launcher

    def dies(*_):
        import os

        os._exit(1)

    monkeypatch.setattr(ray_launcher, "_run", dies)
    result = probe(tmp_path, here, launcher=ray_launcher.ray_launcher(cpus=1))
    assert result.n_failed == 4
    assert {row["status"] for row in read_cells(tmp_path)} == {"failed"}


@pytest.mark.slow
@pytest.mark.parametrize("whole_node", [False, True])
def test_a_worker_or_a_node_that_is_lost_costs_nothing(here, tmp_path, monkeypatch, whole_node):
    """The first task's process is killed, or the node that it runs on; another takes it over."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    from memlaw.probe import ray_launcher

    once, run = tmp_path / "once", ray_launcher._run

    def is_lost(*job):
        import os
        import signal

        try:
            once.touch(exist_ok=False)
        except FileExistsError:
            return run(*job)
        if whole_node:
            os.kill(os.getppid(), signal.SIGKILL)
        return os.kill(os.getpid(), signal.SIGKILL)

    probe(tmp_path / "local", here)
    monkeypatch.setattr(ray_launcher, "_run", is_lost)
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        launcher = ray_launcher.ray_launcher(address=cluster.address, cpus=1)
        result = probe(tmp_path / "ray", here, launcher=launcher)
        lost = [node for node in nodes if node.dead_processes()]
    finally:
        cluster.shutdown()
    assert once.exists()
    assert (result.n_run, result.n_failed) == (4, 0)
    assert len(lost) == whole_node
    assert _table(tmp_path / "ray") == _table(tmp_path / "local")


def test_without_ray_the_command_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.run(["probe", "-o", str(tmp_path), "--launcher", "ray"]) == 2
    assert "pip install 'memlaw[ray]'" in capsys.readouterr().err
