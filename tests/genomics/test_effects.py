"""The verb variants, on a network whose motif is known and on real files."""

import gzip

import numpy as np
import pandas as pd
import pysam
import pytest
import torch

from pipelines.genomics.__main__ import main
from pipelines.genomics.alphabet import decode, encode, reverse_complement
from pipelines.genomics.effects import AlleleViews, anchored_windows, describe_effects
from pipelines.genomics.model import DnaClassifier
from pipelines.genomics.tokenizers import BaseTokenizer, digest
from pipelines.genomics.variants import PlacedVariant, Variant
from pipelines.shared.batch import Example, pack
from pipelines.shared.checkpoint import save_model
from pipelines.shared.objective import Classification
from tests.genomics.known_motif import MOTIF, WITH, WITHOUT, save

LEFT, RIGHT = "GGCCTGCAGGCCTCCGGACC" * 4, "GGCCTCGAGGCCAGGCCTCC" * 4
TEXT = LEFT + MOTIF + RIGHT
AT = len(LEFT) + 1  # of the motif's first base, from 1


def run(*arguments):
    return main([str(argument) for argument in arguments])


def placed(position, ref, alt):
    variant = Variant("chr1", position, ref, alt, "x", "file: line 1")
    return PlacedVariant(variant, variant, 0, True)


@pytest.fixture
def given(tmp_path):
    (tmp_path / "g.fa").write_text(f">chr1\n{TEXT}\n")
    return tmp_path


def write_vcf(path, rows, header=True):
    lines = ["##fileformat=VCFv4.3", "##contig=<ID=chr1>"] if header else ["##fileformat=VCFv4.3"]
    lines += ["#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\tS1"] if header else []
    path.write_text("\n".join(lines + rows) + "\n")
    return path


@pytest.mark.parametrize("anchor", ["left", "right"])
@pytest.mark.parametrize(
    ("position", "ref", "alt"),
    [(AT, "T", "TGGG"), (AT, "TATA", "T"), (3, "CCTG", "C"), (3, "C", "CAAAA"),
     (len(TEXT) - 4, "CCTC", "C"), (AT, "T", "T" + "A" * 50), (AT + 1, "A", "G")],
)  # fmt: skip
@pytest.mark.parametrize("width", [20, 31, 400])
def test_windows_are_held_at_one_end_and_equally_long(
    memory_store, anchor, position, ref, alt, width
):
    store, item = memory_store({"chr1": TEXT}), placed(position, ref, alt)
    assert TEXT[position - 1 :].startswith(ref)
    one, two = anchored_windows(store, item, width, policy="error", anchor=anchor)
    changed = TEXT[: position - 1] + alt + TEXT[position - 1 + len(ref) :]
    assert one.size == two.size <= width
    assert decode(one) in TEXT
    assert decode(two) in changed
    if width < 100 and 60 < position < 100:
        assert one.size == width
    held = slice(None, 5) if anchor == "left" else slice(-5, None)
    if len(alt) < 20 and 60 < position < 100:
        assert np.array_equal(one[held], two[held])


def test_indels_are_seen_from_both_ends_and_all_from_both_strands(memory_store):
    store = memory_store({"chr1": TEXT})
    items = [placed(AT, "T", "C"), placed(AT, "T", "TGG")]
    views = AlleleViews(store, items, 30, policy="error", strands="+-")
    assert [sum(view.variant == number for view in views.views) for number in (0, 1)] == [4, 8]
    for index, view in enumerate(views.views):
        bases = views.read(index, 0, int(views.lengths[index]))
        one = anchored_windows(store, items[view.variant], 30, policy="error", anchor=view.anchor)
        expected = one[view.allele]
        expected = reverse_complement(expected) if view.strand == "-" else expected
        assert np.array_equal(bases, expected)


def test_effects_are_those_of_the_motif(given):
    rows = [
        f"chr1\t{AT}\tbreaks\tT\tC\t50\tPASS\tDP=3\tGT\t0/1",
        f"chr1\t{AT}\t.\tT\tTG,CCT,*\t.\t.\t.\tGT\t1/2",
        f"chr1\t{AT + 30}\tfar\t{TEXT[AT + 29]}\t{'A' if TEXT[AT + 29] != 'A' else 'C'}\t.\t.\tX",
        "chr1\t10\tgone\tG\t<DEL>\t.\t.\tSVTYPE=DEL",
    ]
    vcf = write_vcf(given / "v.vcf", rows)
    out = given / "out"
    code = run("variants", f"sequences={given / 'g.fa'}", f"variants={vcf}",
               f"ckpt={save(given / 'm.ckpt')}", f"out={out}")  # fmt: skip
    assert code == 3
    assert pd.read_csv(out / "failures.csv")["status"].tolist() == ["no_sequence"] * 2
    table = pd.read_csv(out / "variants.tsv", sep="\t")
    names = ["breaks", f"chr1:{AT}:T:TG", f"chr1:{AT}:T:CCT", "far"]
    assert table["id"].tolist() == names
    # rc=average: the motif on one strand counts half
    loss = (WITHOUT - WITH) / 2
    assert table["log_odds_yes"].tolist() == pytest.approx([loss, loss, 0, 0], abs=0.2)
    assert table["log_odds_no"].tolist() == pytest.approx((-table["log_odds_yes"]).tolist())
    assert table["delta_yes"].tolist() == pytest.approx(
        (table["alt_yes"] - table["ref_yes"]).tolist(), abs=2e-6
    )
    assert table["ref_match"].all()
    assert table["num_windows"].tolist() == [4, 8, 8, 4]
    with pysam.VariantFile(str(out / "variants.vcf")) as file:
        written = list(file)
    assert [record.info.get("REF_MATCH") for record in written] == [1, 1, 1, None]
    assert "\tDP=3;REF_MATCH=1;" in (out / "variants.vcf").read_text()
    found = [value for record in written[:3] for value in record.info["LOGODDS_yes"]]
    assert [value for value in found if value is not None] == pytest.approx(
        table["log_odds_yes"].tolist(), abs=1e-3
    )
    assert len(written[1].info["DELTA_yes"]) == 3
    assert written[1].info["DELTA_yes"][2] is None


def test_a_vcf_without_header_line_gets_one(given):
    vcf = write_vcf(given / "v.vcf", [f"chr1\t{AT}\tx\tT\tC"], header=False)
    code = run("variants", f"sequences={given / 'g.fa'}", f"variants={vcf}",
               f"ckpt={save(given / 'm.ckpt')}", f"out={given / 'o'}")  # fmt: skip
    assert code == 0
    lines = (given / "o" / "variants.vcf").read_text().splitlines()
    assert "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO" in lines
    assert lines[-1].startswith(f"chr1\t{AT}\tx\tT\tC\t.\t.\tREF_MATCH=1;DELTA_no=")


def test_swapped_alleles_have_the_opposite_effect(given):
    insertion = write_vcf(given / "a.vcf", [f"chr1\t{AT}\tx\tT\tTG"])
    (given / "b.fa").write_text(f">chr1\n{TEXT[: AT - 1]}TG{TEXT[AT:]}\n")
    deletion = write_vcf(given / "b.vcf", [f"chr1\t{AT}\tx\tTG\tT"])
    network(given / "n.ckpt")
    found = []
    for genome, vcf in (("g.fa", insertion), ("b.fa", deletion)):
        out = given / vcf.stem
        assert run("variants", f"sequences={given / genome}", f"variants={vcf}",
                   f"ckpt={given / 'n.ckpt'}", f"out={out}") == 0  # fmt: skip
        found.append(pd.read_csv(out / "variants.tsv", sep="\t")["log_odds_yes"][0])
    assert abs(found[0]) > 5e-4
    assert found[0] == pytest.approx(-found[1], abs=1e-5)


def network(path):
    torch.manual_seed(4)
    made = DnaClassifier(dim=16, depth=1, num_heads=2, pattern="SlidingWindow(radius=4)",
                         num_classes=2, rc="none").eval()  # fmt: skip
    metadata = {"task": Classification(("no", "yes")).plain(), "context": 40, "overlap": 0,
                "tokenizer": BaseTokenizer().config,
                "tokenizer_digest": digest(BaseTokenizer())}  # fmt: skip
    save_model(path, made, task="genomics", metadata=metadata)
    return made


def test_scores_are_means_over_strands_and_ends(given):
    made = network(given / "n.ckpt")
    vcf = write_vcf(given / "v.vcf", [f"chr1\t{AT}\tx\tT\tTGG"])
    assert run("variants", f"sequences={given / 'g.fa'}", f"variants={vcf}",
               f"ckpt={given / 'n.ckpt'}", f"out={given / 'o'}") == 0  # fmt: skip

    def logits(text):
        bases = torch.from_numpy(encode(text))
        batch = pack([Example(bases, torch.arange(len(text))[:, None], None, "", "", 0)])
        with torch.no_grad():
            return made(batch).logits[0].double()

    changed = TEXT[: AT - 1] + "TGG" + TEXT[AT:]
    first, last = AT - 1 - 20, AT - 1 + 20
    windows = [
        [TEXT[first:last], TEXT[first:last]],
        [changed[first:last], changed[first + 2 : last + 2]],
    ]
    mean = [
        torch.stack([
            logits(one) for text in both
            for one in (text, decode(reverse_complement(encode(text))))
        ]).mean(0) for both in windows
    ]  # fmt: skip
    expected = float((mean[1][1] - mean[1][0]) - (mean[0][1] - mean[0][0]))
    table = pd.read_csv(given / "o" / "variants.tsv", sep="\t")
    assert table["log_odds_yes"][0] == pytest.approx(expected, abs=1e-5)


def test_log_odds_of_several_classes():
    logits = np.log(np.array([[[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]]))
    table = describe_effects(logits, Classification(("a", "b", "c")))
    assert table["delta_a"][0] == pytest.approx(0.4)
    assert table["log_odds_a"][0] == pytest.approx(np.log(0.6 / 0.4) - np.log(0.2 / 0.8), abs=1e-6)
    assert table["log_odds_b"][0] == pytest.approx(0, abs=1e-6)


def test_another_assembly_is_an_error_unless_allowed(given, capsys):
    vcf = write_vcf(given / "v.vcf", [f"chr1\t{AT}\tx\tC\tT"])
    command = ["variants", f"sequences={given / 'g.fa'}", f"variants={vcf}",
               f"ckpt={save(given / 'm.ckpt')}", f"out={given / 'o'}"]  # fmt: skip
    assert run(*command) == 2
    assert "ALT stands there" in capsys.readouterr().err
    assert run(*command, "check_ref=warn", "out=" + str(given / "w")) == 0
    table = pd.read_csv(given / "w" / "variants.tsv", sep="\t")
    assert not table["ref_match"].any()


@pytest.mark.real_data
def test_real_variants_are_scored_and_their_flips_oppositely(real_data, tmp_path):
    genomes = real_data / "genomes"
    network(tmp_path / "n.ckpt")
    found = {}
    for name, policy in (("eqtl", "error"), ("eqtl_flip", "use_vcf")):
        out = tmp_path / name
        code = run("variants", f"sequences={genomes / 'human_hg38_1m.fa.gz'}",
                   f"variants={genomes / f'baskerville_{name}.vcf'}", f"check_ref={policy}",
                   f"ckpt={tmp_path / 'n.ckpt'}", f"out={out}")  # fmt: skip
        assert code == 0
        table = pd.read_csv(out / "variants.tsv", sep="\t")
        assert table["ref_match"].tolist() == [name == "eqtl"] * 8
        found[name] = table["log_odds_yes"].to_numpy()
    assert found["eqtl"] == pytest.approx(-found["eqtl_flip"], abs=1e-4)
    assert np.abs(found["eqtl"]).min() > 0


@pytest.mark.real_data
def test_a_real_vcf_comes_out_readable(real_data, tmp_path):
    genomes = real_data / "genomes"
    with gzip.open(genomes / "nucleus_test_nist.b37_chr20_100kbp_at_10mb.vcf.gz", "rt") as file:
        lines = file.readlines()
    head = [line for line in lines if line.startswith("#")]
    (tmp_path / "v.vcf").write_text("".join(head + [x for x in lines if x[0] != "#"][:60]))
    network(tmp_path / "n.ckpt")
    code = run("variants", f"sequences={genomes / 'nucleus_ucsc.hg19.chr20.unittest.fasta.gz'}",
               f"variants={tmp_path / 'v.vcf'}", f"ckpt={tmp_path / 'n.ckpt'}",
               f"out={tmp_path / 'o'}")  # fmt: skip
    assert code == 0
    places = (tmp_path / "v.vcf", tmp_path / "o" / "variants.vcf")
    with pysam.VariantFile(str(places[0])) as before, pysam.VariantFile(str(places[1])) as after:
        for one, two in zip(before, after, strict=True):
            assert (one.chrom, one.pos, one.alleles) == (two.chrom, two.pos, two.alleles)
            assert two.info["REF_MATCH"] == 1
            assert len(two.info["DELTA_yes"]) == len(one.alts)
            called = [[sample.alleles for sample in x.samples.values()] for x in (one, two)]
            assert called[0] == called[1]
