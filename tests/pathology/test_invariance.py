"""What must not matter: the order of tiles, their place on the glass, the scan's resolution."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from pipelines.pathology.data import SLIDE_GAP, Augmentation, SlideDataset
from pipelines.pathology.encoding import StatsEncoder
from pipelines.pathology.features import extract_features
from pipelines.pathology.model import SlideClassifier
from pipelines.pathology.scale import draw_tissue
from pipelines.pathology.slides import find_slides
from pipelines.pathology.tiling import TilePlan
from pipelines.shared.batch import pack
from pipelines.shared.errors import InputError
from pipelines.shared.fit import FitSettings, fit
from pipelines.shared.objective import Classification
from pipelines.shared.optim import OptimSettings
from sparse_core.patterns import Pattern

PATTERN = "SlidingWindow(radius=3) | GlobalTokens(first=4)"


def build(num_features: int = 6, pattern: str = PATTERN, **settings: object) -> SlideClassifier:
    torch.manual_seed(0)
    settings = {"num_classes": 2, **settings}
    network = SlideClassifier(
        num_features=num_features, dim=32, depth=2, num_heads=4, pattern=pattern, **settings
    )
    return network.eval()


def outputs(network: SlideClassifier, data: SlideDataset) -> torch.Tensor:
    with torch.inference_mode():
        return torch.stack([network(pack([data[index]])).logits[0] for index in range(len(data))])


def test_order_of_tiles_and_place_on_the_glass_do_not_matter(store_slide, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grid = draw_tissue(300)
    features = rng.normal(size=(300, 6))
    order = rng.permutation(300)
    store_slide(tmp_path, "as_it_is", grid, features)
    store_slide(tmp_path, "shuffled", grid[order], features[order])
    store_slide(tmp_path, "moved", grid + np.array([117, 58]), features)
    data = SlideDataset(tmp_path, ["as_it_is", "shuffled", "moved"])
    found = outputs(build(), data)
    assert (found - found[0]).abs().max() < 1e-4
    mixed = SlideDataset(tmp_path, ["as_it_is"], shuffle_positions=True)
    assert (outputs(build(), mixed)[0] - found[0]).abs().max() > 1e-3


def test_slides_of_a_patient_meet_in_the_registers_alone(draw_slides, tmp_path: Path) -> None:
    names = draw_slides(tmp_path, [0.1, 0.5, 0.9], names=["a", "b", "c"])
    data = SlideDataset(tmp_path, [("a", "b"), ("a", "c")])
    first, second = data[0], data[1]
    length = SlideDataset(tmp_path, ["a"]).lengths[0]
    assert first.id == "a;b"
    assert set(first.coords[:length, 2].tolist()) == {0}
    assert set(first.coords[length:, 2].tolist()) == {SLIDE_GAP}
    allowed = Pattern.parse("SlidingWindow(radius=3)").mask(first.coords)
    assert not allowed[:length, length:].any()
    assert not allowed[length:, :length].any()

    def tokens(pattern: str) -> tuple[torch.Tensor, torch.Tensor]:
        """What comes out at the tiles of slide a, beside slide b and beside slide c."""
        network = build(pattern=pattern, coord_dims=3)
        assert network.encoder.rotary.coord_dims == 2
        kept = []
        network.encoder.register_forward_hook(lambda *parts: kept.append(parts[2][0]))
        with torch.inference_mode():
            for example in (first, second):
                network(pack([example]))
        registers = network.num_registers
        return kept[0][registers : registers + length], kept[1][registers : registers + length]

    alone = tokens("SlidingWindow(radius=3)")
    torch.testing.assert_close(*alone)
    together = tokens(PATTERN)
    assert (together[0] - together[1]).abs().max() > 1e-3
    assert names == ["a", "b", "c"]


def test_augmentation_keeps_neighbours_and_repeats(draw_slides, tmp_path: Path) -> None:
    draw_slides(tmp_path, [0.2], names=["a"])
    plain = SlideDataset(tmp_path, ["a"])[0]
    data = SlideDataset(tmp_path, ["a"], augment=Augmentation(True, 5, 0.25), seed=3)
    seen = set()
    for epoch in range(12):
        data.set_epoch(epoch)
        one, again = data[0], data[0]
        assert torch.equal(one.coords, again.coords)
        assert one.coords.min() >= 0
        rows = {tuple(row): number for number, row in enumerate(plain.inputs.tolist())}
        index = torch.tensor([rows[tuple(row)] for row in one.inputs.tolist()])
        assert len(index) < len(plain.inputs)
        before = torch.cdist(plain.coords[index].double(), plain.coords[index].double())
        after = torch.cdist(one.coords.double(), one.coords.double())
        torch.testing.assert_close(before, after)
        seen.add(tuple(one.coords[:3].flatten().tolist()))
    assert len(seen) > 8
    for wrong in ({"drop_tiles": 1.0}, {"translate": -1}):
        with pytest.raises(InputError, match="augment"):
            Augmentation(**wrong)


def test_all_eight_ways_come_up() -> None:
    grid = np.array([[0, 0], [3, 1], [1, 2]])
    augment, rng = Augmentation(dihedral=True), np.random.default_rng(0)
    ways = {tuple(augment.move(grid, rng).flatten()) for _ in range(200)}
    assert len(ways) == 8


def write_scan(path: Path, image: np.ndarray, mpp: float, quality: int | None) -> None:
    """Write a pyramid as scanners do, JPEG with colours at half the resolution; None: lossless."""
    value = round(1e7 / mpp)
    jpeg = {"compressionargs": {"level": quality}, "subsampling": (2, 2)}
    kept = {"compression": "deflate"} if quality is None else {"compression": "jpeg", **jpeg}
    with tifffile.TiffWriter(path) as tiff:
        for level in (1, 4):
            tiff.write(
                np.asarray(Image.fromarray(image).reduce(level)), photometric="rgb",
                tile=(256, 256), metadata=None, subfiletype=int(level > 1),
                resolution=((value // level, 1000),) * 2, resolutionunit="CENTIMETER", **kept,
            )  # fmt: skip


def scan_twice(files: list[Path], folder: Path, quality: int | None) -> tuple[list[str], Path]:
    """Embed slides as scanned at 0.5 and at 1 um/px: names fineN, halfN, and their store."""
    (folder / "slides").mkdir(parents=True)
    for number, file in enumerate(files):
        image = Image.fromarray(tifffile.imread(file, level=0))
        write_scan(folder / "slides" / f"fine{number}.tiff", np.asarray(image), 0.5, quality)
        half = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
        write_scan(folder / "slides" / f"half{number}.tiff", np.asarray(half), 1.0, quality)
    report = extract_features(
        find_slides(folder / "slides"), store=folder / "store", plan=TilePlan(128, 1.0),
        encoder=StatsEncoder(), workers=1, progress=False,
    )  # fmt: skip
    assert not report.failures
    return [f"{kind}{number}" for kind in ("fine", "half") for number in range(len(files))], (
        folder / "store"
    )


def apart(embeddings: torch.Tensor) -> torch.Tensor:
    """Distance of the two scans of each slide over the median distance of different slides."""
    fine, half = embeddings.chunk(2)
    return (fine - half).norm(dim=1) / torch.pdist(fine).median()


@pytest.mark.real_data
@pytest.mark.parametrize("quality", [None, 70])
def test_two_resolutions_of_a_slide_are_one_slide(
    real_data: Path, tmp_path: Path, quality: int | None
) -> None:
    """Mean features and the embeddings of a model that was trained on other slides."""
    given = sorted((real_data / "slides" / "colorectal").glob("*.tiff"))
    classes = sorted({file.name.split("_")[1] for file in given})
    by_class = [[f for f in given if f.name.split("_")[1] == name] for name in classes]
    held = [files[0] for files in by_class]
    names, store = scan_twice(held, tmp_path / "held", quality)
    learned = [file for files in by_class for file in files[1:4]]
    (tmp_path / "learned").mkdir()
    for file in learned:
        (tmp_path / "learned" / file.name).symlink_to(file)
    extract_features(
        find_slides(tmp_path / "learned"), store=tmp_path / "store", plan=TilePlan(128, 1.0),
        encoder=StatsEncoder(), workers=1, progress=False,
    )  # fmt: skip
    targets = [classes.index(file.name.split("_")[1]) for file in learned]
    train = SlideDataset(tmp_path / "store", [file.stem for file in learned], targets)
    data = SlideDataset(store, names)
    network = build(train[0].inputs.shape[1], num_classes=len(classes))
    network.stem.standardise(torch.cat([train[index].inputs for index in range(len(train))]))
    settings = FitSettings(
        epochs=15, max_tokens=2048, batch_size=5, select="last", save_last=False, progress=False,
        optim=OptimSettings(lr=2e-3),
    )  # fmt: skip
    network, report = fit(
        network.train(), train, train, objective=Classification(tuple(classes)), out=tmp_path,
        settings=settings,
    )  # fmt: skip
    assert report.scores["val_auroc"] > 0.95
    network.eval()
    stem = network.stem
    with torch.inference_mode():
        found = torch.stack([network(pack([data[i]])).embedding[0] for i in range(len(data))])
        means = [((data[i].inputs - stem.mean) / stem.spread).mean(0) for i in range(len(data))]
    assert apart(found).max() <= 0.1
    assert apart(torch.stack(means)).max() <= 0.1
