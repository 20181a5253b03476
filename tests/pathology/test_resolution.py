import pytest

from pipelines.pathology.resolution import SlideError, find_resolution


def properties(vendor="aperio", **values):
    names = {"x": "openslide.mpp-x", "y": "openslide.mpp-y", "power": "openslide.objective-power"}
    found = {names.get(key, key): str(value) for key, value in values.items()}
    return {"openslide.vendor": vendor} | found


FOUND = {
    "OpenSlide": (properties(x=0.25, y=0.25), 0.25, "openslide"),
    "vendor key": (properties(**{"aperio.MPP": "0.4990"}), 0.499, "aperio.MPP"),
    "comment": (properties(**{"openslide.comment": "Aperio |MPP = 0.2527|x"}), 0.2527,
                "description"),
    "OME": (properties("generic-tiff", **{"tiff.ImageDescription":
            '<Pixels PhysicalSizeX="250" PhysicalSizeXUnit="nm" PhysicalSizeY="250" '
            'PhysicalSizeYUnit="nm">'}), 0.25, "description"),
    "TIFF": (properties("generic-tiff", x=0.5, y=0.5), 0.5, "tiff_resolution"),
    "description before a printer's resolution": (
        properties("generic-tiff", x=352.8, y=352.8, **{"openslide.comment": "MPP: 0.25"}), 0.25,
        "description"),
    "little anisotropy": (properties(x=0.25, y=0.252), 0.251, "openslide"),
    "halved scan": (properties(x=0.5, y=0.5, power=40), 0.5, "openslide"),
    "MIRAX with an adapter": (properties("mirax", x=0.2325, y=0.2325, power=20), 0.2325,
                              "openslide"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_the_most_trusted_source_is_taken_and_named(case):
    given, mpp, source = FOUND[case]
    found = find_resolution(given, given=None)
    assert (found.mpp, found.source) == (pytest.approx(mpp), source)
    assert found.in_file == found.mpp


REFUSED = {
    "nothing": (properties(), "missing_mpp", "does not say"),
    "words": (properties(x="unknown", y="0.5"), "missing_mpp", "does not say"),
    "zero": (properties(x=0, y=0), "missing_mpp", "does not say"),
    "72 dpi": (properties("generic-tiff", x=352.8, y=352.8), "mpp_suspect", "72 dpi"),
    "96 dpi": (properties("generic-tiff", x=264.58, y=264.58), "mpp_suspect", "96 dpi"),
    "300 dpi": (properties("generic-tiff", x=84.67, y=84.67), "mpp_suspect", "300 dpi"),
    "too fine": (properties(x=0.00499, y=0.00499), "mpp_suspect", "0.00499"),
    "not square": (properties(x=0.25, y=0.26), "mpp_suspect", "0.25 x 0.26"),
    "objective": (properties(x=1.0, y=1.0, power=40), "mpp_suspect", "objective of 40x"),
    "contradiction": (properties(x=0.5, y=0.5, **{"aperio.MPP": "0.25"}), "mpp_suspect",
                      "openslide says 0.5 um per pixel, aperio.MPP says 0.25"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_and_a_given_value_mends_it(case):
    given, status, words = REFUSED[case]
    with pytest.raises(SlideError) as caught:
        find_resolution(given, given=None)
    assert caught.value.status == status
    assert words in caught.value.reason
    assert "column `mpp`" in caught.value.remedy
    mended = find_resolution(given, given=0.5)
    assert (mended.mpp, mended.source, mended.in_file) == (0.5, "given", None)


def test_what_the_file_says_is_kept_beside_the_given_value():
    found = find_resolution(properties(x=0.25, y=0.25), given=0.5)
    assert (found.mpp, found.in_file) == (0.5, 0.25)
