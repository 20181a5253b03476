import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from pipelines.shared import fit as fit_module
from pipelines.shared.batch import ExampleList, PackedBatch
from pipelines.shared.errors import InputError
from pipelines.shared.fit import FitReport, FitSettings, build_logger, fit
from pipelines.shared.network import FeatureStem, SequenceClassifier
from pipelines.shared.objective import Classification, balanced_weights
from pipelines.shared.optim import OptimSettings
from pipelines.shared.preemption import EXIT_CODE
from sparse_core.nn import encoder
from sparse_core.nn.encoder import EncoderLayer

MakeNetwork = Callable[..., nn.Module]
MakeExamples = Callable[..., ExampleList]

CLASSES = Classification(("a", "b"))
SETTINGS = FitSettings(
    epochs=4, max_tokens=60, optim=OptimSettings(lr=0.01), save_seconds=0.0, progress=False
)


@pytest.fixture(autouse=True)
def _always_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_module, "_SAVE_SHARE", float("inf"))


def _weights(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def _assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_training_learns_and_reports(
    tmp_path: Path, make_network: MakeNetwork, make_examples: MakeExamples
) -> None:
    network = make_network()
    train, val = make_examples(120), make_examples(60, seed=1)

    trained, report = fit(
        network,
        train,
        val,
        objective=CLASSES,
        out=tmp_path,
        settings=replace(SETTINGS, epochs=12, select="auroc"),
    )

    assert trained is network
    assert report.scores["val_auroc"] > 0.85
    assert report.epochs == 12
    assert report.seconds > 0
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_compiled_layers_train_the_same_and_are_plain_afterwards(
    tmp_path: Path, make_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, val, weights = make_examples(20), make_examples(10, seed=1), []
    calls = 0

    def counted(layer: EncoderLayer, *given: Tensor) -> object:
        nonlocal calls
        calls += 1
        return EncoderLayer.before(layer, *given)

    monkeypatch.setattr(encoder, "_compiled", lambda: (counted, EncoderLayer.after))
    for compiled in (False, True):
        assert not calls
        torch.manual_seed(0)
        network: nn.Module = SequenceClassifier(
            FeatureStem(3, 16), dim=16, depth=1, num_heads=1, pattern="SlidingWindow(radius=2)",
            coord_dims=1, num_classes=2,
        )  # fmt: skip
        settings = replace(SETTINGS, epochs=2, compiled=compiled)
        out = tmp_path / str(compiled)
        fit(network, train, val, objective=CLASSES, out=out, settings=settings)
        weights.append(_weights(network))
    assert calls
    assert not any(layer.compiled for layer in network.modules() if isinstance(layer, EncoderLayer))
    _assert_equal(*weights)


def test_a_seed_repeats_the_weights(
    tmp_path: Path, make_network: MakeNetwork, make_examples: MakeExamples
) -> None:
    results = [
        fit(
            make_network(dropout=0.3),
            make_examples(30),
            make_examples(10, seed=1),
            objective=CLASSES,
            out=tmp_path / name,
            settings=replace(SETTINGS, seed=seed, save_last=False),
        )[0]
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    ]

    _assert_equal(_weights(results[0]), _weights(results[1]))
    assert not torch.equal(results[0].head.weight, results[2].head.weight)  # type: ignore[union-attr, arg-type]
    assert not list(tmp_path.iterdir())


class _Interrupting(nn.Module):
    """Raise in the middle of a chosen training epoch."""

    def __init__(self, network: nn.Module, steps: int, error: BaseException) -> None:
        super().__init__()
        self.network = network
        self.left = steps
        self.error = error

    def forward(self, batch: PackedBatch) -> object:
        if self.training:
            self.left -= 1
            if self.left < 0:
                raise self.error
        return self.network(batch)


@pytest.mark.parametrize("steps", [1, 2, 5, 7])
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    tmp_path: Path, make_network: MakeNetwork, make_examples: MakeExamples, steps: int
) -> None:
    train, val = make_examples(24), make_examples(10, seed=1)
    settings = replace(SETTINGS, accumulate=2, select="last")

    whole, report = fit(
        _Interrupting(make_network(dropout=0.3), 10**9, RuntimeError()),
        train,
        val,
        objective=CLASSES,
        out=tmp_path / "whole",
        settings=settings,
    )
    with pytest.raises(RuntimeError, match="power"):
        fit(
            _Interrupting(make_network(dropout=0.3), steps, RuntimeError("power")),
            train,
            val,
            objective=CLASSES,
            out=tmp_path / "cut",
            settings=settings,
        )
    resumed, again = fit(
        _Interrupting(
            make_network(dropout=0.3),
            10**9,
            RuntimeError(),
        ),
        train,
        val,
        objective=CLASSES,
        out=tmp_path / "cut",
        settings=settings,
    )

    _assert_equal(_weights(whole), _weights(resumed))
    assert (again.epochs, again.steps) == (report.epochs, report.steps)
    assert again.scores["val_loss"] == report.scores["val_loss"]


def test_a_resumed_run_goes_on_in_the_middle_of_an_epoch(
    tmp_path: Path, make_network: MakeNetwork, make_examples: MakeExamples
) -> None:
    train, val = make_examples(24), make_examples(10, seed=1)
    settings = replace(SETTINGS, epochs=1, max_tokens=20)
    counting = _Interrupting(make_network(), 10**9, RuntimeError())
    _, report = fit(
        counting, train, val, objective=CLASSES, out=tmp_path / "whole", settings=settings
    )
    with pytest.raises(RuntimeError, match="power"):
        fit(
            _Interrupting(make_network(), report.steps - 2, RuntimeError("power")),
            train,
            val,
            objective=CLASSES,
            out=tmp_path / "cut",
            settings=settings,
        )
    resumed = _Interrupting(make_network(), 2, RuntimeError("more than the two steps left"))
    _, again = fit(resumed, train, val, objective=CLASSES, out=tmp_path / "cut", settings=settings)
    assert report.steps > 4
    assert resumed.left == 0
    assert again.scores["train_loss"] == report.scores["train_loss"]
    _assert_equal(_weights(counting), _weights(resumed))


class _Signalling(Callback):
    """Send this process SIGUSR1, as a cluster does, in the middle of an epoch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGUSR1)


def test_sigusr1_stops_a_run_that_then_goes_on_as_if_nothing_had_been(
    tmp_path: Path, make_network: MakeNetwork, make_examples: MakeExamples
) -> None:
    given = (make_examples(24), make_examples(10, seed=1))
    settings = replace(SETTINGS, select="last")
    before = signal.getsignal(signal.SIGUSR1)
    network, report = fit(
        make_network(dropout=0.3), *given, objective=CLASSES, out=tmp_path / "whole",
        settings=settings,
    )  # fmt: skip
    steps = report.steps
    for step in (steps // 3, 2 * steps // 3):
        with pytest.raises(SystemExit) as stopped:
            fit(
                make_network(dropout=0.3), *given, objective=CLASSES, out=tmp_path / "cut",
                settings=settings, callbacks=[_Signalling(step)],
            )  # fmt: skip
        assert stopped.value.code == EXIT_CODE
        assert signal.getsignal(signal.SIGUSR1) == before
    resumed, again = fit(
        make_network(dropout=0.3), *given, objective=CLASSES, out=tmp_path / "cut",
        settings=settings,
    )  # fmt: skip
    _assert_equal(_weights(network), _weights(resumed))
    assert again.scores["val_loss"] == report.scores["val_loss"]


def test_a_finished_network_is_taken_up_without_training(
    tmp_path: Path, make_network: MakeNetwork, make_examples: MakeExamples
) -> None:
    train, val = make_examples(24), make_examples(10, seed=1)
    first, report = fit(
        make_network(), train, val, objective=CLASSES, out=tmp_path, settings=SETTINGS
    )

    second, again = fit(
        _Interrupting(make_network(seed=3), 0, AssertionError("trains")).network,
        train,
        val,
        objective=CLASSES,
        out=tmp_path,
        settings=SETTINGS,
    )

    _assert_equal(_weights(first), _weights(second))
    assert again == report


def test_a_keyboard_interrupt_stays_one(
    tmp_path: Path, make_network: MakeNetwork, make_examples: MakeExamples
) -> None:
    network = _Interrupting(make_network(), 1, KeyboardInterrupt())

    with pytest.raises(KeyboardInterrupt):
        fit(
            network,
            make_examples(24),
            make_examples(4),
            objective=CLASSES,
            out=tmp_path,
            settings=SETTINGS,
        )


def test_a_damaged_state_is_refused(
    tmp_path: Path, make_network: MakeNetwork, make_examples: MakeExamples
) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"cut")

    with pytest.raises(InputError, match="delete it"):
        fit(
            make_network(),
            make_examples(8),
            make_examples(4),
            objective=CLASSES,
            out=tmp_path,
            settings=SETTINGS,
        )


def test_the_best_epoch_on_validation_is_kept(
    tmp_path: Path, make_network: MakeNetwork, make_examples: MakeExamples
) -> None:
    # labels of the validation set are swapped: the longer the training the worse
    train, val = make_examples(60), make_examples(30, seed=1, shift=-0.7)
    kept: dict[str, FitReport] = {}
    for select in ("loss", "last"):
        settings = replace(SETTINGS, select=select, epochs=8)  # type: ignore[arg-type]
        _, kept[select] = fit(
            make_network(), train, val, objective=CLASSES, out=tmp_path / select, settings=settings
        )

    assert kept["loss"].best_epoch < 4
    assert kept["last"].best_epoch == 7
    assert kept["loss"].scores["val_loss"] < kept["last"].scores["val_loss"]


def test_patience_ends_a_run_and_stays_ended(
    tmp_path: Path, make_network: MakeNetwork, make_examples: MakeExamples
) -> None:
    train, val = make_examples(60), make_examples(30, seed=1, shift=-0.7)
    settings = replace(SETTINGS, patience=2, epochs=50)

    _, report = fit(make_network(), train, val, objective=CLASSES, out=tmp_path, settings=settings)
    _, again = fit(make_network(), train, val, objective=CLASSES, out=tmp_path, settings=settings)

    assert report.epochs == report.best_epoch + 3 < 50
    assert again.epochs == report.epochs


def test_steps_are_filled_up_to_whole_epochs(
    tmp_path: Path, make_network: MakeNetwork, make_examples: MakeExamples
) -> None:
    settings = replace(SETTINGS, max_tokens=10, steps=50, accumulate=3)

    _, report = fit(
        make_network(),
        make_examples(30),
        make_examples(4),
        objective=CLASSES,
        out=tmp_path,
        settings=settings,
    )

    assert 50 <= report.steps < 50 + report.steps / report.epochs + 1


def test_a_line_is_printed_per_tenth_of_the_epochs_and_nothing_else(
    tmp_path: Path,
    make_network: MakeNetwork,
    make_examples: MakeExamples,
    capfd: pytest.CaptureFixture[str],
) -> None:
    settings = replace(SETTINGS, epochs=20, progress=True)

    fit(
        make_network(),
        make_examples(8),
        make_examples(8),
        objective=CLASSES,
        out=tmp_path,
        settings=settings,
        name="ours",
    )

    captured = capfd.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == ""
    assert len(lines) == 10
    assert lines[0].startswith("ours  epoch  2/20  train loss ")
    assert "val AUROC" in lines[-1]
    assert lines[-1].split()[2] == "20/20"


def test_lightnings_loggers_speak_again_after_a_fit(
    tmp_path: Path, make_network: MakeNetwork, make_examples: MakeExamples
) -> None:
    level = logging.getLogger("lightning.pytorch").level

    fit(
        make_network(),
        make_examples(8),
        make_examples(8),
        objective=CLASSES,
        out=tmp_path,
        settings=SETTINGS,
    )

    assert logging.getLogger("lightning.pytorch").level == level


def test_a_second_fit_starts_at_once(
    tmp_path: Path, make_network: MakeNetwork, make_examples: MakeExamples
) -> None:
    train, val = make_examples(8), make_examples(8)
    settings = replace(SETTINGS, epochs=1)
    fit(make_network(), train, val, objective=CLASSES, out=tmp_path / "first", settings=settings)

    start = time.perf_counter()
    fit(make_network(), train, val, objective=CLASSES, out=tmp_path / "second", settings=settings)

    assert time.perf_counter() - start < 2


def test_csv_logger_writes_a_row_per_epoch(
    tmp_path: Path, make_network: MakeNetwork, make_examples: MakeExamples
) -> None:
    out = tmp_path / "TCGA (2)" / "[old] a&b's ü"

    fit(
        make_network(),
        make_examples(8),
        make_examples(8),
        objective=CLASSES,
        out=out,
        settings=replace(SETTINGS, logger="csv"),
    )

    rows = next(out.glob("logs/*/metrics.csv")).read_text().splitlines()
    assert len(rows) == 5
    assert {"train_loss", "val_loss", "val_auroc", "lr"} <= set(rows[0].split(","))


def test_tensorboard_logger_writes_events(
    tmp_path: Path, make_network: MakeNetwork, make_examples: MakeExamples
) -> None:
    fit(
        make_network(),
        make_examples(8),
        make_examples(8),
        objective=CLASSES,
        out=tmp_path,
        settings=replace(SETTINGS, logger="tensorboard"),
    )

    assert list(tmp_path.glob("logs/*/events.*"))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_logger_names_its_extra(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)

    with pytest.raises(InputError, match=rf"pip install 'gigasparse\[{name}\]'"):
        build_logger(name, tmp_path)


def test_mlflow_without_a_server_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI"):
        build_logger("mlflow", tmp_path)


def test_class_weights_balance_the_classes(
    tmp_path: Path, make_network: MakeNetwork, make_examples: MakeExamples
) -> None:
    weights = balanced_weights([0, 0, 0, 1], num_classes=2)

    _, report = fit(
        make_network(),
        make_examples(8),
        make_examples(8),
        objective=Classification(("a", "b"), tuple(weights)),
        out=tmp_path,
        settings=SETTINGS,
    )

    assert weights == [pytest.approx(2 / 3), 2.0]
    assert report.epochs == 4


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"max_tokens": -1}, "max_tokens must be at least 1"),
        ({"save_seconds": -1.0}, "save_seconds must not be negative"),
        ({"select": "best"}, "callbacks.select must be one"),
        ({"precision": "fp8"}, "trainer.precision is one of 32-true, bf16-mixed"),
        ({"seed": -1}, "seed must not be negative; got -1"),
        ({"logger": "paper"}, "logger must be one of"),
    ],
)
def test_settings_without_sense_are_refused(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        FitSettings(**({"epochs": 1, "max_tokens": 1} | wrong))  # type: ignore[arg-type]


def test_an_empty_split_is_refused(
    tmp_path: Path, make_network: MakeNetwork, make_examples: MakeExamples
) -> None:
    with pytest.raises(InputError, match="no validation example"):
        fit(
            make_network(),
            make_examples(8),
            ExampleList([]),
            objective=CLASSES,
            out=tmp_path,
            settings=SETTINGS,
        )


DISTRIBUTED = """
import importlib.util, sys
from dataclasses import replace
from pathlib import Path

from pipelines.pathology.__main__ import VERBS
from pipelines.shared.cli import main
from pipelines.shared.fit import FitSettings, fit, seed_everything
from pipelines.shared.objective import Classification

spec = importlib.util.spec_from_file_location("parts", PARTS)
parts = importlib.util.module_from_spec(spec)
sys.modules["parts"] = parts
spec.loader.exec_module(parts)

def run(config):
    train, val = parts.draw_examples(30), parts.draw_examples(10, seed=1)
    for name in ("ours", "baseline"):
        seed_everything(0)
        settings = FitSettings.from_config(config)
        out = Path(config["out"]) / name
        objective = Classification(("a", "b"))
        network, report = fit(
            parts.MeanNetwork(), train, val, objective=objective, out=out, settings=settings
        )
        print(name, report.steps, network.head.weight.sum().item())
    return 0

if __name__ == "__main__":
    verbs = {"train": replace(VERBS["train"], function="__main__:run")}
    raise SystemExit(main("pathology", verbs))
"""


# as in `srun --ntasks=1`: one task is not all the processes there are, the run starts those itself
SLURM = {
    "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1",
}  # fmt: skip


def test_several_tasks_of_slurm_are_refused_where_devices_are_several(
    tmp_path: Path,
    make_network: MakeNetwork,
    make_examples: MakeExamples,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {**SLURM, "SLURM_NTASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    given = (make_network(), make_examples(8), make_examples(8))
    several = replace(SETTINGS, devices=2, strategy="ddp")
    with pytest.raises(InputError, match="--ntasks=1"):
        fit(*given, objective=CLASSES, out=tmp_path, settings=several)
    # one device each: tasks that have nothing to do with each other, folds of an array
    _, report = fit(*given, objective=CLASSES, out=tmp_path, settings=replace(SETTINGS, epochs=1))
    assert report.epochs == 1


def test_two_processes_train_one_network_after_another_in_shared_batches(tmp_path: Path) -> None:
    script = tmp_path / "distributed.py"
    parts = Path(__file__).with_name("conftest.py")
    script.write_text(DISTRIBUTED.replace("PARTS", repr(str(parts))))
    settings = [
        "epochs=2",
        "batch_size=10",
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "trainer.precision=32-true",
        "trainer.progress=false",
        "logger=none",
        "out=a b=(c), ${d}",
    ]

    done = subprocess.run(
        [sys.executable, str(script), "train", *settings],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | SLURM | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )

    assert done.returncode == 0, done.stderr
    ours, baseline = (line.split()[1:] for line in done.stdout.splitlines())
    assert ours == baseline
    assert ours[0] == "6"  # as on one device: both share batches of ten
    assert (tmp_path / "a b=(c), ${d}" / "ours" / "last.ckpt").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(
    tmp_path: Path, make_network: MakeNetwork, make_examples: MakeExamples
) -> None:
    settings = replace(SETTINGS, accelerator="gpu")

    with pytest.raises(InputError, match="use trainer=cpu"):
        fit(
            make_network(),
            make_examples(8),
            make_examples(8),
            objective=CLASSES,
            out=tmp_path,
            settings=settings,
        )
