"""Files from strangers: nothing in a run folder, a cache or a model folder runs code."""

import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import run_command, run_here, small_run, write_imdb

from preflab.training.optimizer_state import load_optimizer, save_optimizer
from utils import ConfigError


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def plant_torch(path, hostile):
    torch.save({"state": hostile}, path)


def plant_pickle(path, hostile):
    path.write_bytes(pickle.dumps(hostile))


def plant_array(path, hostile):
    np.save(path, np.array([hostile], dtype=object), allow_pickle=True)


@pytest.fixture(scope="module")
def stopped_run(llama_folder, tmp_path_factory):
    """The overrides of a run that can go on, with its folder and its cache."""
    folder = tmp_path_factory.mktemp("untrusted")
    imdb_dir = write_imdb(folder / "data")
    more = (f"cache_dir={folder / 'cache'}", "n_examples=16", "sample_during_eval=false")
    run_here(*small_run(llama_folder, imdb_dir, folder / "run", *more))
    return folder, small_run(llama_folder, imdb_dir, folder / "run", *more, "n_examples=24")


@pytest.mark.parametrize(
    "place, plant",
    [
        ("run/LATEST/optimizer/.metadata", plant_pickle),
        ("run/LATEST/optimizer/__0_0.distcp", plant_pickle),
        ("run/LATEST/optimizer/__0_0.distcp", plant_torch),
        ("run/LATEST/hf/model.safetensors", plant_torch),
        ("run/LATEST/training_state.pt", plant_torch),
        ("cache/tokens/*/pairs.npy", plant_array),
    ],
)
def test_a_planted_pickle_is_not_executed(stopped_run, tmp_path, place, plant):
    original, command = stopped_run
    shutil.copytree(original, tmp_path / "copy", symlinks=True)
    command = [str(word).replace(str(original), str(tmp_path / "copy")) for word in command]
    [*files] = (tmp_path / "copy").glob(place)
    assert files
    for file in files:
        plant(file, Hostile(tmp_path / "executed"))
    result = run_command("train.py", *command, check=False)
    assert not (tmp_path / "executed").exists(), result.stderr
    assert "Traceback" not in result.stderr, result.stderr


def test_the_hostile_file_of_these_tests_would_run(tmp_path):
    """The control: an unpickler that allows everything executes it."""
    plant_pickle(tmp_path / "file", Hostile(tmp_path / "executed"))
    pickle.loads((tmp_path / "file").read_bytes())
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("optimizer", [torch.optim.RMSprop, torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_optimizer_states_of_any_class_and_dtype_are_read(tmp_path, optimizer, dtype):
    weights = [torch.nn.Parameter(torch.ones(3, 2, dtype=dtype))]
    saved, loaded = optimizer(weights, lr=0.1), optimizer(weights, lr=0.1)
    weights[0].grad = torch.full((3, 2), 0.5, dtype=dtype)
    saved.step()
    state, write = save_optimizer(saved, ["w"], tmp_path / "optimizer")
    write()
    load_optimizer(loaded, ["w"], tmp_path / "optimizer", state, alone=True)
    for key, value in saved.state[weights[0]].items():
        assert value is None or torch.equal(loaded.state[weights[0]][key], value)


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    weights = [torch.nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.AdamW(weights)
    weights[0].grad = torch.ones(3)
    optimizer.step()
    state, write = save_optimizer(optimizer, ["w"], tmp_path / "optimizer")
    write()
    index = tmp_path / "optimizer" / ".metadata"
    content = pickle.loads(index.read_bytes())
    for info in content.storage_data.values():
        info.relative_path = "../elsewhere"
    index.write_bytes(pickle.dumps(content))
    with pytest.raises(ConfigError, match=r"names \.\./elsewhere, which is not a file beside it"):
        load_optimizer(optimizer, ["w"], tmp_path / "optimizer", state, alone=True)
