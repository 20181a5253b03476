from collections.abc import Callable

import pytest
import torch
from torch import nn

from pipelines.shared.batch import ExampleList
from pipelines.shared.inference import predict
from pipelines.shared.study import probability_table

MakeNetwork = Callable[..., nn.Module]
MakeExamples = Callable[..., ExampleList]


def test_order_and_batches_do_not_matter(
    make_network: MakeNetwork, make_examples: MakeExamples
) -> None:
    examples = make_examples(21)
    backwards = ExampleList([examples[i] for i in reversed(range(21))])
    network = make_network(dropout=0.5)

    together = {p.id: p for p in predict(network, examples, max_tokens=1000)}
    alone = list(predict(network, backwards, max_tokens=1))

    assert [p.id for p in alone] == [f"e{i}" for i in reversed(range(21))]
    for prediction in alone:
        other = together[prediction.id]
        assert other.record == prediction.record
        torch.testing.assert_close(other.logits, prediction.logits)
        torch.testing.assert_close(other.attention, prediction.attention)


def test_attention_and_probabilities_are_of_each_example(
    make_network: MakeNetwork, make_examples: MakeExamples
) -> None:
    examples = make_examples(6)

    for example, prediction in zip(
        examples, predict(make_network(), examples, max_tokens=12), strict=True
    ):
        assert prediction.attention.shape == (len(example.inputs),)
        assert prediction.attention.sum().item() == pytest.approx(1, abs=1e-6)
        assert prediction.probabilities.sum().item() == pytest.approx(1, abs=1e-6)


def test_probabilities_in_tables_are_rounded_so_that_ties_stay_ties() -> None:
    logits = torch.tensor([[0.3, 0.3], [0.3, 0.3 + 1e-7]], dtype=torch.float64)

    table = probability_table(
        ["a", "b"], logits.softmax(1).numpy(), ["x", "y"], id_column="slide_id"
    )

    assert table.columns.tolist() == ["slide_id", "prediction", "probability_x", "probability_y"]
    assert table["probability_y"].tolist() == [0.5, 0.5]
    assert table["prediction"].tolist() == ["x", "x"]
