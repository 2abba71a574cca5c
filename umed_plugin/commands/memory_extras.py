"""What further losses of stage 1 need on a GPU: ``--umed_keep``, ``--umed_tower_lr`` and ``--umed_tower_teacher``.

Bytes of activations were counted like those of the language model (`umed_plugin.commands.memory`). Passes of teachers keep no
activations. That of another LLaVA needs less than the training's own pass, and is over before it. That of an image encoder of
1,024 pixels does not: in its global layers every cell attends to every cell.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageEncoder:
    """A SAM image encoder as the tower's teacher. The defaults are the ViT-B of SAM and of LVM-Med.

    Attributes:
        cells: of its grid.
        channels: of a cell's features.
    """

    weights: int = 89_700_000
    heads: int = 12
    cells: int = 4096
    channels: int = 256


@dataclass(frozen=True)
class Extras:
    """The further losses of a stage.

    Attributes:
        keeps: the KL to a teacher is added.
        teacher: weights of another LLaVA that is the teacher; 0: the start itself.
        tower: the vision tower is trained.
        encoder: the tower's teacher, or None.
    """

    keeps: bool = False
    teacher: int = 0
    tower: bool = False
    encoder: ImageEncoder | None = None


@dataclass(frozen=True)
class Tower:
    """The sizes of a CLIP tower.

    Attributes:
        layers: all of them.
        used: layers that the selected features depend on, which are those that are trained.
        tokens: patches and the class token.
    """

    hidden: int = 1024
    layers: int = 24
    used: int = 23
    heads: int = 16
    ffn: int = 4096
    tokens: int = 577

    @property
    def weights(self) -> int:
        """Of its layers' products."""
        return self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.ffn)

    @property
    def trained(self) -> int:
        """Of the layers that are trained."""
        return self.used * self.weights // self.layers


# Logits of the KL's positions exist four times at once, in float32: both distributions, and the gradients of one of them.
_LOGITS_OF_KL = 4
# (half precision, fused attention) -> bytes per token and channel of `hidden` and of `ffn`, and per head and pair of tokens. Of
# the last, 4 are those of a softmax in float32, which autocast takes on a GPU and not on a CPU.
_SAVED = {(True, False): (25, 6, 6), (True, True): (25, 6, 0), (False, False): (32, 12, 4), (False, True): (32, 12, 0)}
_ENDS = {True: 4, False: 8}  # half precision -> bytes per token and channel that are saved once, before the first layer
# (half precision, fused attention) -> bytes per head and pair of cells that a global layer of an encoder holds at its peak.
_PAIR_OF_CELLS = {(True, False): 10.0, (True, True): 4.0, (False, False): 12.0, (False, True): 8.0}


def kl_bytes(positions: int, vocabulary: int, rows: int) -> float:
    """Bytes of the KL over so many positions, of which ``rows`` have logits at once (0: all)."""
    return 4.0 * _LOGITS_OF_KL * min(rows or positions, positions) * vocabulary


def saved_by_kl(positions: int, vocabulary: int) -> float:
    """Bytes that autograd saves for a KL whose logits exist all at once: the two distributions, in float32."""
    return 2.0 * 4 * positions * vocabulary


def tower_activations(tower: Tower, images: int, *, half: bool, checkpointing: bool, fused: bool) -> float:
    """Bytes that autograd saves in the tower. What it computes behind the selected features is dropped at once."""
    of_hidden, of_ffn, of_pairs = _SAVED[half, fused]
    tokens = images * tower.tokens
    layer = tokens * (of_hidden * tower.hidden + of_ffn * tower.ffn)
    layer += of_pairs * images * tower.heads * tower.tokens**2
    # The hidden states are float32 under autocast too: so are the embeddings, which are trained.
    inputs = 4.0 * tokens * tower.hidden
    ends = _ENDS[half] * tokens * tower.hidden
    return ends + (tower.used * inputs + layer if checkpointing else tower.used * layer)


def feature_loss(tower: Tower, images: int, encoder: ImageEncoder) -> float:
    """Bytes that autograd saves for the cosine of the tower's features, and of the teacher's, in float32."""
    return 4.0 * images * (tower.tokens - 1) * (tower.hidden + 2 * encoder.channels)


def encoder_pass(encoder: ImageEncoder, images: int, *, half: bool, fused: bool) -> float:
    """Bytes at the peak of the encoder's pass without gradient."""
    return _PAIR_OF_CELLS[half, fused] * images * encoder.heads * encoder.cells**2
