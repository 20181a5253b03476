import numpy as np
import pytest
import torch

from pipelines.pathology import data
from pipelines.pathology.data import SlideDataset
from pipelines.pathology.scale import make_bag
from pipelines.pathology.store import SlideFeatures

SIZES = (30, 50, 40)


@pytest.fixture
def store(tmp_path):
    for size in SIZES:
        make_bag(tmp_path, size, num_features=3, seed=0)
    return tmp_path


@pytest.fixture
def reads(monkeypatch):
    """Slides whose features were read, in that order."""
    found = []
    read = SlideFeatures.features

    def features(slide):
        found.append(slide.slide_id)
        return read(slide)

    monkeypatch.setattr(SlideFeatures, "features", features)
    return found


@pytest.mark.parametrize("shuffle", [False, True])
def test_examples_do_not_depend_on_what_is_kept_in_memory(store, reads, shuffle, monkeypatch):
    ids = [f"tissue_{size}" for size in SIZES]
    kept = SlideDataset(store, ids, [0, 1, 0], shuffle_positions=shuffle)
    monkeypatch.setattr(data, "MEMORY_BYTES", 4 * 3 * 60)
    reads.clear()
    read_again = SlideDataset(store, ids, [0, 1, 0], shuffle_positions=shuffle)
    assert reads == ids[:1]  # lengths are known without reading what will not be kept
    assert kept.lengths == read_again.lengths == list(SIZES)
    for _ in range(2):
        for index in range(3):
            one, two = kept[index], read_again[index]
            assert torch.equal(one.inputs, two.inputs)
            assert torch.equal(one.coords, two.coords)
            assert (one.target, one.id) == (two.target, two.id)
    assert reads == [*ids[:1], *ids[1:], *ids[1:]]


def test_coordinates_count_from_the_first_tissue(store):
    example = SlideDataset(store, ["tissue_50"])[0]
    assert example.coords.amin(0).tolist() == [0, 0]
    assert example.inputs.dtype == torch.float16  # as stored
    assert np.unique(example.coords.numpy(), axis=0).shape == (50, 2)
