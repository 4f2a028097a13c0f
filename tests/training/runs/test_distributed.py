"""Gradients are summed over processes, and devices are the ones that were asked for."""

import multiprocessing
import os
import socket

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from scripts import free_port, held

from lighthubert_training.runs.distributed import (
    any_process,
    build_accelerator,
    choose_device,
    hide_gpus_from_processes,
    locked,
    locked_by_main_process,
    on_main_process,
    sum_gradients,
    sum_over_processes,
)
from modeling_lighthubert.errors import UserError


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def parameters() -> list[torch.nn.Parameter]:
    """One that all processes use, one of the second alone, one of none, one that is frozen."""
    return [torch.nn.Parameter(torch.zeros(2, 3), requires_grad=number < 3) for number in range(4)]


def of_two_processes(rank: int, port: int, answers: multiprocessing.Queue) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    used_by_all, used_by_second, *_ = trained = parameters()
    used_by_all.grad = torch.arange(6.0).view(2, 3) * (rank + 1)
    if rank == 1:
        used_by_second.grad = torch.ones(2, 3)
    sum_gradients(trained, accelerator)
    sum_gradients(parameters(), accelerator)  # of which no process used any
    gradients = [each.grad if each.grad is None else each.grad.tolist() for each in trained]
    flags = [any_process(flag) for flag in (rank == 1, False)]
    answers.put((gradients, flags, sum_over_processes([rank, 2**40])))
    accelerator.end_training()


@pytest.mark.parametrize("bucket_size", [1, 6, 7, 100])
def test_two_processes_sum_their_gradients_and_a_weight_that_none_used_keeps_none(monkeypatch, bucket_size):
    monkeypatch.setattr("lighthubert_training.runs.distributed.BUCKET_SIZE", bucket_size)
    context, port = multiprocessing.get_context("fork"), free_port()
    answers = context.Queue()
    processes = [context.Process(target=of_two_processes, args=(rank, port, answers)) for rank in range(2)]
    for process in processes:
        process.start()
    first, second = (answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    total = [[0.0, 3.0, 6.0], [9.0, 12.0, 15.0]]
    assert first == second == ([total, [[1.0] * 3] * 2, None, None], [True, False], [1, 2**41])


def test_one_process_keeps_its_gradients():
    (parameter, *_) = trained = parameters()
    parameter.grad = gradient = torch.ones(2, 3)
    sum_gradients(trained, Accelerator(cpu=True))
    assert parameter.grad is gradient
    assert [each.grad for each in trained[1:]] == [None] * 3
    assert any_process(True)
    assert not any_process(False)
    assert sum_over_processes([3, 4]) == [3, 4]


def test_the_device_is_the_one_that_was_asked_for(monkeypatch):
    assert build_accelerator("cpu").device == torch.device("cpu")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert build_accelerator("meta:0").device == torch.device("meta")
    assert "ACCELERATE_TORCH_DEVICE" not in os.environ
    assert choose_device("cpu") == "cpu"
    for available, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert choose_device() == device


@pytest.mark.parametrize(("processes", "visible"), [("1", "0"), ("2", "")])
def test_processes_on_cpus_see_no_gpu(monkeypatch, processes, visible):
    """Else Accelerate's barrier takes one for each of them: the runs with two processes fail on a machine with one."""
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    hide_gpus_from_processes()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


@pytest.mark.parametrize("device", ["gpu", "gpu:0", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(UserError, match=f"device {device} cannot be used"):
        build_accelerator(device)
    with pytest.raises(UserError, match=f"device {device} cannot be used"):
        choose_device(device)


# Two runs


@pytest.mark.parametrize("name", ["", "all.jsonl"])
def test_a_run_is_refused_while_another_writes_there_and_named_not_after_it_was_killed(tmp_path, name):
    folder = tmp_path / "new"
    with held(folder, name) as pid:
        whole = f"^{folder / name} is being written by process {pid} on {socket.gethostname()}: wait until"
        with pytest.raises(UserError, match=whole), locked(folder, name):
            pass
        with locked(folder, "other.jsonl"):
            pass
    with locked(folder, name):
        pass
    assert not list(folder.iterdir())


def test_a_lock_is_given_back_on_an_error_and_a_folder_that_cannot_be_made_is_named(tmp_path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="file/out cannot be written: .*Not a directory"),
        locked(tmp_path / "file/out"),
    ):
        pass


def test_what_the_main_process_finds_out_all_know(tmp_path):
    assert on_main_process(lambda: 7) == 7
    with locked_by_main_process(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]

    def mistake():
        raise UserError("no such folder")

    with pytest.raises(UserError, match="no such folder"):
        on_main_process(mistake)
