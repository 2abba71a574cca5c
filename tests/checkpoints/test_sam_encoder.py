"""Files of SAM image encoders: both forms, their sizes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from support.canaries import hostile
from support.sam_files import sam_encoder, write_sam_file

from umed_plugin.checkpoints.sam_encoder import load_sam_encoder, read_sam_file
from umed_plugin.errors import UmedError


@pytest.mark.parametrize(
    ("prefix", "kind"),
    [("model.", "LVM-Med's"), ("image_encoder.", "Segment Anything's own file"), ("", "a SAM encoder")],
)
def test_the_weights_are_the_files_under_either_name(prefix, kind, tmp_path):
    known = sam_encoder()
    more = {"mask_decoder.iou_token.weight": torch.zeros(1, 4), "prompt_encoder.x": torch.zeros(2)}
    file = read_sam_file(write_sam_file(tmp_path / "vit.pth", prefix, known, **more))
    assert file.kind == kind
    assert (file.settings["image_size"], file.settings["window_size"], file.settings["num_attention_heads"]) == (
        64,
        3,
        2,
    )
    assert file.settings["global_attn_indexes"] == [1]
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loaded = load_sam_encoder(file)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with torch.no_grad():
        found, expected = loaded(pixels).last_hidden_state, known(pixels).last_hidden_state
    assert found.shape == (2, 12, 8, 8)
    torch.testing.assert_close(found, expected)


def test_other_files_are_refused_with_what_they_are(tmp_path):
    resnet = {"model.conv1.weight": torch.zeros(1), "model.layer1.0.conv1.weight": torch.zeros(1)}
    torch.save(resnet, tmp_path / "resnet.pth")
    with pytest.raises(UmedError, match="holds a ResNet.*lvmmed_vit.pth"):
        read_sam_file(tmp_path / "resnet.pth")
    torch.save({"encoder.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UmedError, match=r"has no patch_embed.proj.weight, but encoder.weight"):
        read_sam_file(tmp_path / "other.pth")
    with pytest.raises(UmedError, match="there is no such file"):
        read_sam_file(tmp_path / "none.pth")
    whole = torch.load(write_sam_file(tmp_path / "vit.pth", "model."), weights_only=True)
    torch.save({name: t for name, t in whole.items() if "neck.0" not in name}, tmp_path / "cut.pth")
    with pytest.raises(UmedError, match="lacks a part"):
        read_sam_file(tmp_path / "cut.pth")
    torch.save({name: t for name, t in whole.items() if "blocks.1.norm1" not in name}, tmp_path / "missing.pth")
    with pytest.raises(UmedError, match="2 tensors are missing"):
        load_sam_encoder(read_sam_file(tmp_path / "missing.pth"))


def test_no_code_in_a_file_runs(tmp_path):
    canary = tmp_path / "canary"
    file = hostile("reduce", tmp_path / "lvmmed_vit.pth", canary, torch.load(write_sam_file(tmp_path / "v", "model.")))
    with pytest.raises(UmedError, match="more than plain tensors"):
        read_sam_file(file)
    assert not canary.exists()
