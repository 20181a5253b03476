from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.genomics.alphabet import decode, encode, reverse_complement
from pipelines.genomics.data import (
    WindowDataset,
    average_windows,
    cut_windows,
    match_labels,
    read_label_table,
)
from pipelines.genomics.ingest import ingest
from pipelines.shared.batch import TokenBudgetBatches, pack
from pipelines.shared.errors import InputError

SEQUENCES = {"a": "ACGTACGTAC", "b": "GATTACA", "c": "N", "d": "TTTTGGGGCCCCAAAATTCCGG"}


@pytest.fixture
def store(tmp_path):
    fasta = tmp_path / "x.fa"
    fasta.write_text("".join(f">{k}\n{v}\n" for k, v in SEQUENCES.items()))
    return ingest(fasta, tmp_path / "store")


@given(st.integers(1, 5000), st.integers(1, 700), st.data())
def test_windows_cover_the_record_and_are_full(length, context, data):
    overlap = data.draw(st.integers(0, context - 1).filter(lambda o: length < 40 * (context - o)))
    places, starts, ends = cut_windows(np.array([length]), context, overlap)
    windows = list(zip(starts.tolist(), ends.tolist(), strict=True))
    assert set(places.tolist()) == {0}
    assert windows[0][0] == 0
    assert windows[-1][1] == length
    assert all(end - start == min(context, length) for start, end in windows)
    for (start, end), (next_start, next_end) in pairwise(windows):
        assert start < next_start <= end - overlap
        assert end < next_end
    assert len(windows) == max(1, -(-(length - overlap) // (context - overlap)))


@pytest.mark.parametrize(("context", "overlap"), [(0, 0), (10, 10), (10, -1)])
def test_windows_that_cannot_move_are_refused(context, overlap):
    with pytest.raises(ValueError, match="overlap"):
        cut_windows(np.array([100]), context, overlap)


def test_windows_become_examples(store):
    dataset = WindowDataset(store, [3, 1], [1, 0], context=8, overlap=2)
    assert dataset.lengths == [8, 8, 8, 8, 7]
    examples = [dataset[i] for i in range(len(dataset))]
    assert [decode(e.inputs.numpy()) for e in examples] == [
        "TTTTGGGG",
        "GGCCCCAA",
        SEQUENCES["d"][12:20],
        SEQUENCES["d"][14:22],
        "GATTACA",
    ]
    assert [e.target for e in examples] == [1, 1, 1, 1, 0]
    assert [(e.id, e.group, e.record) for e in examples] == [("d", "d", 3)] * 4 + [("b", "b", 1)]
    assert examples[1].inputs.dtype == torch.uint8
    assert examples[1].coords.dtype == torch.int64
    assert examples[1].coords.tolist() == [[i] for i in range(8)]


def test_examples_fill_batches_of_their_own_length(store):
    dataset = WindowDataset(store, range(4), [0, 1, 0, 1], context=8)
    batches = [
        pack([dataset[i] for i in indices])
        for indices in TokenBudgetBatches(dataset.lengths, 16, shuffle=True)
    ]
    assert sum(len(batch.ids) for batch in batches) == len(dataset)
    assert all(len(batch.inputs) == batch.lengths.sum() <= 16 for batch in batches)


def test_examples_to_predict_have_no_target(store):
    assert WindowDataset(store, range(4), context=99)[2].target is None
    with pytest.raises(ValueError, match="one target a record"):
        WindowDataset(store, range(4), [0, 1], context=99)


def read_epoch(dataset, epoch):
    dataset.set_epoch(epoch)
    return [decode(dataset[i].inputs.numpy()) for i in range(len(dataset))]


def test_reverse_complement_depends_on_seed_epoch_and_index_alone(store):
    records = [1] * 400

    def make(seed):
        return WindowDataset(store, records, context=99, reverse_complement=True, seed=seed)

    forward, backward = "GATTACA", decode(reverse_complement(encode("GATTACA")))
    first = read_epoch(make(0), 0)
    assert set(first) == {forward, backward}
    assert 0.4 < np.mean([text == forward for text in first]) < 0.6
    dataset = make(0)
    assert read_epoch(dataset, 1) != first
    assert read_epoch(dataset, 0) == first
    assert read_epoch(make(1), 0) != first


def test_shuffled_positions_are_a_seeded_permutation(store):
    dataset = WindowDataset(store, [3], context=99, shuffle_positions=True)
    example = dataset[0]
    assert decode(example.inputs.numpy()) == SEQUENCES["d"]
    assert sorted(example.coords[:, 0].tolist()) == list(range(22))
    assert example.coords[:, 0].tolist() != list(range(22))
    assert torch.equal(dataset[0].coords, example.coords)
    dataset.set_epoch(1)
    assert not torch.equal(dataset[0].coords, example.coords)


def test_windows_of_a_record_are_averaged():
    logits = torch.tensor([[1.0, 2.0], [10.0, 20.0], [3.0, 4.0], [5.0, 9.0]])
    records, averaged = average_windows(logits, torch.tensor([7, 2, 7, 7]))
    assert records.tolist() == [2, 7]
    assert averaged.tolist() == [[10.0, 20.0], [3.0, 5.0]]
    assert averaged.dtype == torch.float32


def test_average_does_not_depend_on_the_order_of_windows():
    logits = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    records = torch.arange(50) % 7
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        average_windows(logits, records)[1],
        average_windows(logits[order], records[order])[1],
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_label_table_is_read_as_strings(tmp_path, name):
    path = tmp_path / name
    text = "label,id,split,note\n1, 007 ,train,x\n0,NA,test,y\n"
    path.write_text(text.replace(",", "\t") if name == "t.tsv" else text)
    table = read_label_table(path)
    assert list(table.columns) == ["id", "label", "group", "split"]
    assert table["id"].tolist() == table["group"].tolist() == ["007", "NA"]
    assert table["split"].tolist() == ["train", "test"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,class\na,1\n", "no column 'label'"),
        ("id\tlabel\na\t1\n", "no column"),
        ("id,label\na,1\nb,0\na,1\n", "id 'a' stands in rows 2, 4"),
        ("id,label\na,1\nb,\n", "row 3: label is empty"),
        ("id,label\n", "only a header"),
        ("", "nothing"),
    ],
)
def test_unusable_label_tables_are_refused(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_label_table(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_columns_have_the_names_that_are_given(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("task\tclass\trecord\tgroup\nT\tx\ta\tg1\nT\ty\tb\tg2\nU\tz\ta\tg3\n")
    table = read_label_table(path, columns={"id": "record", "label": "class"}, where={"task": "T"})
    assert table.to_dict("list") == {"id": ["a", "b"], "label": ["x", "y"], "group": ["g1", "g2"]}


def test_a_column_with_another_meaning_is_no_group(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("id,group,split\na,x,p\nb,y,q\n")
    table = read_label_table(path, columns={"label": "group", "group": "split"})
    assert table.to_dict("list") == {"id": ["a", "b"], "label": ["x", "y"], "group": ["p", "q"]}
    alone = read_label_table(path, columns={"label": "group", "split": "group"})
    assert alone["group"].tolist() == ["a", "b"]


def test_columns_that_are_not_there_are_named_with_the_remedy(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("name,label\na,x\nb,y\n")
    with pytest.raises(InputError, match=r"no column 'id'; it has 'name', 'label'; .*columns\.id="):
        read_label_table(path)
    with pytest.raises(InputError, match="no column 'patient'"):
        read_label_table(path, columns={"id": "name", "group": "patient"})


def test_records_that_a_filter_leaves_out_are_only_counted(store):
    match = match_labels(store.ids, pd.DataFrame({"id": ["a", "b"], "label": ["0", "1"]}))
    assert match.notes(filtered=True) == ["2 records are not asked for"]


def test_labels_are_matched_by_id_in_the_order_of_the_store(store):
    table = pd.DataFrame({"id": ["d", "x", "b", "y"], "label": list("1001")}, index=[2, 3, 4, 5])
    match = match_labels(store.ids, table)
    assert match.records.tolist() == [1, 3]
    assert table["id"].iloc[match.rows].tolist() == ["b", "d"]
    assert match.unlabelled == ("a", "c")
    assert match.unknown == ("x", "y")
    assert match.notes() == [
        "2 records without a label: 'a', 'c'",
        "2 labels without a record: 'x', 'y'",
    ]


def test_a_full_match_needs_no_notes(store):
    assert (
        match_labels(store.ids, pd.DataFrame({"id": list("dcba"), "label": list("0101")})).notes()
        == []
    )


def test_labels_of_other_records_are_refused(store):
    with pytest.raises(InputError, match=r"'a', 'b', 'c', 'd'.*'A'.*first word after '>'"):
        match_labels(store.ids, pd.DataFrame({"id": ["A"], "label": ["1"]}))
