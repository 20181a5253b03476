"""A network whose answer is known: does the motif stand anywhere in the bases?

One channel of the stem is a filter for the motif: 4 where all its letters match, 0 where all but
one do, below zero else, which its activation takes away. Two large constant channels make the norms
behind it linear. The score, the log odds of `yes`, is about 8 with the motif and -4 without.
"""

import torch

from pipelines.genomics.alphabet import encode
from pipelines.genomics.model import DnaClassifier
from pipelines.genomics.tokenizers import BaseTokenizer, digest
from pipelines.shared.checkpoint import save_model
from pipelines.shared.objective import Classification

MOTIF = "TATAGC"
WITH, WITHOUT = 8.0, -4.0
_SCALE, _CONSTANT = 4.0, 50.0


def build(rc="average"):
    network = DnaClassifier(
        dim=8, depth=0, num_heads=1, pattern="Dense()", num_classes=2, kernel=11, pooling="max",
        rc=rc,
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "norm" not in name and not name.startswith("head.0"):
                weight.zero_()
        convolution, project = network.stem.convolution, network.stem.project[1]
        for place, token in enumerate(encode(MOTIF).tolist()):
            convolution.weight[0, token, place] = _SCALE
        convolution.bias[0] = -_SCALE * (len(MOTIF) - 1)
        project.weight[0, 0] = 1
        project.bias[1], project.bias[2] = _CONSTANT, -_CONSTANT
        # what two norms of eight channels divide by, and take away with the mean
        unit = (2 * _CONSTANT**2 / 8) ** 0.5 * (8 / 7) ** 2
        linear = network.head[2]
        linear.weight[1, 0] = (WITH - WITHOUT) / _SCALE * unit
        linear.bias[1] = WITHOUT
    return network.eval()


def save(path, *, rc="average", context=60):
    metadata = {
        "task": Classification(("no", "yes")).plain(), "context": context, "overlap": 0,
        "tokenizer": BaseTokenizer().config, "tokenizer_digest": digest(BaseTokenizer()),
    }  # fmt: skip
    save_model(path, build(rc), task="genomics", metadata=metadata)
    return path
