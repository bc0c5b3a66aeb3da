"""Images that do not fit: fetched batch by batch, they are the same batches."""

from pathlib import Path

import pytest
import torch
from networks import small_network
from test_data import UNCHANGED, numbered

from training.evaluate import Evaluator
from utils import parallel
from utils.data import images, memory
from utils.data.augment import colour_histogram, normalisation_of
from utils.data.batches import TrainingBatches, plain_batches, split_data, training_normalisation
from utils.data.folder import load_data
from utils.data.images import FetchedSet, HostPixels, ImageSet

CPU = torch.device("cpu")


@pytest.fixture
def streamed(shapes: Path, monkeypatch: pytest.MonkeyPatch):
    """The data set as it is where it does not fit into memory."""
    monkeypatch.setattr(memory, "available_memory", lambda: 1000.0)
    return load_data(str(shapes), "png", 8, 2)


def test_the_rule_is_a_third_of_the_available_memory(shapes: Path, monkeypatch: pytest.MonkeyPatch):
    needed = (120 + 30) * 3 * 8 * 8
    for available, kind in ((3 * needed, ImageSet), (3 * needed - 3, FetchedSet)):
        monkeypatch.setattr(memory, "available_memory", lambda available=available: float(available))
        data = load_data(str(shapes), "png", 8, 2)
        assert type(data.train) is type(data.test) is kind
    monkeypatch.setattr(memory, "available_memory", lambda: 3.0 * needed)
    monkeypatch.setattr(parallel, "local_world_size", lambda: 2)
    assert type(load_data(str(shapes), "png", 8, 2).train) is FetchedSet


def test_memory_is_measured():
    assert 2**20 < memory.available_memory() < 2**50


@pytest.mark.parametrize(
    ("line", "folder", "limit", "used", "cached"),
    [
        ("0::/slurm/job_7/step_0", "slurm/job_7", "memory.max", "memory.current", "inactive_file"),
        ("4:memory:/slurm/job_7", "memory/slurm/job_7", "memory.limit_in_bytes", "memory.usage_in_bytes",
         "total_inactive_file"),
        ("0::/elsewhere", "", "memory.max", "memory.current", "inactive_file"),
    ],
    ids=["job, version 2", "job, version 1", "container"],
)  # fmt: skip
def test_the_limit_of_a_job_or_container_counts(tmp_path: Path, line, folder, limit, used, cached):
    """By the kernel's documentation of control groups: limit less use, in which cached files do not count."""
    group = tmp_path / "sys/fs/cgroup" / folder
    (tmp_path / "proc/self").mkdir(parents=True)
    group.mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 900 kB\nMemAvailable:   100 kB\n")
    assert memory.available_memory(tmp_path) == 102400
    (tmp_path / "proc/self/cgroup").write_text(f"9:name=systemd:/\n{line}\n")
    (group / limit).write_text("50000\n")
    (group / used).write_text("30000\n")
    (group / "memory.stat").write_text(f"active_file 7\n{cached} 4000\nunevictable 0\n")
    assert memory.available_memory(tmp_path) == 24000
    (group / limit).write_text("max\n")
    assert memory.available_memory(tmp_path) == 102400


def test_streamed_batches_equal_those_in_memory(shapes: Path, streamed):
    assert type(streamed.train) is FetchedSet
    assert torch.equal(streamed.train.pixels, loaded(shapes).train.pixels)
    splits, expected = (split_data(d, 0.2, 3) for d in (streamed, loaded(shapes)))
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    for _ in range(2):  # epochs
        a, b = (
            list(TrainingBatches(s.train, 16, g, UNCHANGED, flip=True))
            for s, g in zip((splits, expected), generators, strict=True)
        )
        assert len(a) == 6
        for (x, y), (x_held, y_held) in zip(a, b, strict=True):
            assert torch.equal(x, x_held) and torch.equal(y, y_held)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    for a, b in zip(plain_batches(splits.val, 7, UNCHANGED), plain_batches(expected.val, 7, UNCHANGED), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert training_normalisation(splits.train, 10) == normalisation_of(colour_histogram(expected.train.pixels))


def test_passes_over_images_on_disk_show_their_progress(streamed, monkeypatch: pytest.MonkeyPatch):
    shown = []
    monkeypatch.setattr(images, "tqdm", lambda batches, title, count, **_: (shown.append((title, count)), batches)[1])
    splits = split_data(streamed, 0.2, 3)
    training_normalisation(splits.train, 10)
    assert shown == [("identifying images", 1), ("identifying images", 1), ("measuring colours", 10)]


def loaded(shapes: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "available_memory", lambda: float("inf"))
        return load_data(str(shapes), "png", 8, 2)


def test_subsets_and_evaluations_are_those_of_images_in_memory():
    held = numbered(range(1, 31))
    fetched = FetchedSet(HostPixels(held.pixels), torch.arange(30), held.labels, CPU)
    for index in (slice(3, 20), slice(None, None, 4), torch.tensor([5, 1, 28])):
        assert torch.equal(fetched[index].pixels, held[index].pixels)
        assert torch.equal(fetched[index][1:].labels, held[index][1:].labels)
    assert len(fetched) == 30
    network = small_network()
    a, b = (Evaluator(s, UNCHANGED, 8, batch_size=8)(network) for s in (fetched, held))
    assert (a.loss, a.accuracy) == (b.loss, b.accuracy) and torch.equal(a.decisions, b.decisions)


def test_a_process_may_have_no_image_of_a_batch(streamed):
    (pixels,) = streamed.test[:0].batches([torch.arange(0)])
    assert pixels.shape == (0, 3, 8, 8) and pixels.dtype == torch.uint8


def test_only_a_few_batches_are_fetched_ahead(monkeypatch: pytest.MonkeyPatch, streamed):
    seen = []
    original = images.read_image
    monkeypatch.setattr(images, "read_image", lambda path, size: (seen.append(path), original(path, size))[1])
    batches = streamed.train.batches(torch.arange(120).split(10))
    next(batches)
    batches.close()
    assert 10 <= len(seen) <= 10 * (images.AHEAD + 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_images_that_do_not_fit_on_the_gpu_come_there_batch_by_batch(monkeypatch: pytest.MonkeyPatch):
    device, held = torch.device("cuda"), numbered(range(1, 31))
    resident = held.to(device)
    monkeypatch.setattr(images, "fits_on", lambda device, size: False)
    fetched = held.to(device)
    assert (type(resident), type(fetched)) == (ImageSet, FetchedSet)
    epochs = [
        list(TrainingBatches(s, 8, torch.Generator().manual_seed(0), UNCHANGED, flip=True)) for s in (resident, fetched)
    ]
    for (x, y), (x_fetched, y_fetched) in zip(*epochs, strict=True):
        assert x.is_cuda and x_fetched.is_cuda and torch.equal(x, x_fetched) and torch.equal(y, y_fetched)
