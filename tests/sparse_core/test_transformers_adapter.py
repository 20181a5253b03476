import pytest
import torch
from torch import Tensor

from sparse_core.patterns import Causal, Dense, GlobalTokens, Pattern, SlidingWindow

transformers = pytest.importorskip("transformers")
from sparse_core.transformers_adapter import register  # noqa: E402

TOKENS = 40
PATTERN = SlidingWindow(5) | GlobalTokens(1)
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": 30, "max_position_embeddings": 64,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def registered() -> None:
    register("ours", PATTERN)
    register("ours_dense", Dense())


def bert(**changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, **NO_DROPOUT | changes)
    return transformers.BertModel(config, add_pooling_layer=False)


def llama(**changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES | {"num_key_value_heads": 2} | changes)
    return transformers.LlamaModel(config)


def outputs_and_gradients(
    model: torch.nn.Module, ids: Tensor, mask: Tensor | None, real: Tensor
) -> tuple[Tensor, list[Tensor]]:
    found = model(input_ids=ids, attention_mask=mask).last_hidden_state[real]
    weights = torch.linspace(-1, 1, found.numel()).view_as(found)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad((found * weights).sum(), parameters, allow_unused=True)
    return found, [grad for grad in grads if grad is not None]


def additive(pattern: Pattern, real: Tensor) -> Tensor:
    """The pattern of each row's real tokens as a 4-D mask that Hugging Face adds to scores."""
    allowed = torch.zeros(len(real), 1, TOKENS, TOKENS, dtype=torch.bool)
    for row, kept in enumerate(real):
        places = kept.nonzero()[:, 0]
        allowed[row, 0, places[:, None], places[None]] = pattern.mask(len(places))
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("make", [bert, llama], ids=["encoder", "decoder"])
def test_equals_the_models_own_attention_under_the_same_mask(make, padding: str) -> None:  # type: ignore[no-untyped-def]
    ids = torch.randint(0, 30, (3, TOKENS), generator=torch.Generator().manual_seed(1))
    real = torch.ones(3, TOKENS, dtype=torch.bool)
    if padding != "none":
        real[1, 25:] = real[2, 3:] = False
    real = real.flip(1) if padding == "left" else real
    pattern = PATTERN if make is bert else PATTERN & Causal()
    model = make(attn_implementation="eager")
    expected, gradients = outputs_and_gradients(model, ids, additive(pattern, real), real)
    model.set_attn_implementation("ours")
    mask = None if padding == "none" else real.long()
    found, our_gradients = outputs_and_gradients(model, ids, mask, real)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(our_gradients, gradients, rtol=1e-3, atol=1e-4)


def test_a_dense_pattern_is_the_models_own_attention() -> None:
    ids = torch.arange(TOKENS)[None] % 30
    model = bert(attn_implementation="sdpa")
    expected = model(ids).last_hidden_state
    model.set_attn_implementation("ours_dense")
    torch.testing.assert_close(model(ids).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


def test_models_without_masks_are_served() -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        **{key: SIZES[key] for key in list(SIZES)[:4]}, image_size=16, patch_size=4,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    image = torch.randn(2, 3, 16, 16)
    expected = model(image).last_hidden_state
    model.set_attn_implementation("ours_dense")
    torch.testing.assert_close(model(image).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (lambda: bert(attention_probs_dropout_prob=0.1), {}, "attention dropout to 0"),
        (bert, {"attention_mask": torch.ones(1, 1, TOKENS, TOKENS)}, "no prepared 4-D mask"),
        (
            llama,
            {"position_ids": torch.arange(TOKENS)[None] % 20, "use_cache": False},
            "a mask of its own",
        ),
    ],
    ids=["dropout", "4-D mask", "packing by position ids"],
)
def test_what_would_be_lost_is_refused(model, given, message: str) -> None:  # type: ignore[no-untyped-def]
    built = model()
    built.set_attn_implementation("ours")
    with pytest.raises(ValueError, match=message):
        built.train()(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), **given)


def test_generating_with_a_cache_is_refused() -> None:
    model = llama(attn_implementation="ours").eval()
    first = model(torch.zeros(1, TOKENS, dtype=torch.long), use_cache=True)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(torch.zeros(1, 1, dtype=torch.long), past_key_values=first.past_key_values)
