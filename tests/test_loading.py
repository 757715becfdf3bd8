"""--clip-model: every way of naming a model, and every way it can be wrong."""

import json
import pickle
import sys

import models
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from safetensors.torch import save_file

import sac_vlmrm
from sac_vlmrm import CLIPReward

PROMPT = ["--prompt", "a humanoid robot kneeling"]


@pytest.fixture(scope="module")
def vit_b_32():
    """The whole ViT-B-32, 151M random weights."""
    torch.manual_seed(0)
    return open_clip.create_model("ViT-B-32", load_weights=False)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_full_size_weights_from_a_file(vit_b_32, tmp_path, suffix):
    path = tmp_path / f"weights.{suffix}"
    (torch.save if suffix == "pt" else save_file)(vit_b_32.state_dict(), path)
    reward = CLIPReward(f"ViT-B-32/{path}", ["a humanoid robot kneeling"])
    path.unlink()  # 600 MB
    assert reward.image_size == 224
    frames = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    with torch.no_grad():
        images = F.normalize(vit_b_32.encode_image((torch.as_tensor(frames).permute(0, 3, 1, 2) / 255 - mean) / std), dim=-1)
        goal = F.normalize(vit_b_32.encode_text(open_clip.get_tokenizer("ViT-B-32")(["a humanoid robot kneeling"])), dim=-1)[0]
    torch.testing.assert_close(reward(reward.embed_images(frames)), images @ goal, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """ViT-B-16-SigLIP as if it had been downloaded: its weights, and its tokenizer's files in the hub's cache."""
    cache = tmp_path_factory.mktemp("hub")
    folder = models.hub_cache(cache, "timm/ViT-B-16-SigLIP")
    models.save_tokenizer(folder)
    (folder / "config.json").write_text("{}")
    models.hollow_weights("ViT-B-16-SigLIP", folder / "open_clip_pytorch_model.bin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        yield folder / "open_clip_pytorch_model.bin"


@pytest.mark.parametrize("source", ["tag", "file"])
def test_siglip_sees_its_own_preprocessing(siglip, source):
    """Also from a bare file, where open_clip alone would fall back to OpenAI's mean, deviation and cropping."""
    _, preprocess, tokenizer = sac_vlmrm.load_clip(f"ViT-B-16-SigLIP/{'webli' if source == 'tag' else siglip}", "cpu", "fp32")
    frames = torch.rand(1, 3, 224, 224)
    torch.testing.assert_close(preprocess(frames), 2 * frames - 1)
    wide = torch.zeros(1, 3, 100, 300)
    wide[..., :20] = wide[..., -20:] = 1  # cropping would lose the two ends
    assert preprocess(wide).shape == (1, 3, 224, 224) and preprocess(wide).max() > 0.9
    assert tokenizer(["a robot"])[0, :3].tolist() == [3, 5, 1]


def test_file_whose_normalisation_is_ambiguous_is_refused(tmp_path, error_of):
    """The published weights of ViT-L-14 disagree on mean and deviation, so a file of them does not tell its own."""
    (tmp_path / "weights.pt").write_bytes(b"")
    assert "local-dir" in error_of(*PROMPT, "--clip-model", f"ViT-L-14/{tmp_path}/weights.pt")


@pytest.mark.parametrize("name", ["RN50", "ViT-B-32", "ViT-L-14-336"])
def test_quickgelu_mismatch_names_the_right_model(error_of, name):
    assert f"use {name}-quickgelu/openai" in error_of(*PROMPT, "--clip-model", f"{name}/openai")


@pytest.mark.parametrize(
    "clip_model, says",
    [
        ("ViT-B-33/openai", "ViT-B-33"),
        ("ViT-B-32", "laion2b_s34b_b79k"),  # no tag: the ones there are
        ("ViT-B-32/nonsense", "laion2b_s34b_b79k"),
        ("ViT-B-32/missing.pt", "missing.pt"),
        ("ViT-S-32/whatever", "ViT-S-32"),  # an architecture without published weights
        ("ViT-B-32/laion2b_s34b_b79k", "laion2b_s34b_b79k"),  # not downloaded, and the hub is out of reach
        ("hf-hub:nobody/nothing", "nobody/nothing"),
        ("local-dir:nowhere", "nowhere"),
        ("", "--clip-model"),
    ],
)
def test_model_that_cannot_be_found(error_of, clip_model, says):
    assert says in error_of(*PROMPT, "--clip-model", clip_model)


def test_folder_without_config(tmp_path, error_of):
    (tmp_path / "empty").mkdir()
    assert "open_clip_config.json" in error_of(*PROMPT, "--clip-model", f"local-dir:{tmp_path}/empty")


@pytest.mark.parametrize("content", ["{", "{}", '{"model_cfg": {"embed_dim": 24}}', "[]"])
def test_folder_with_a_broken_config(tmp_path, error_of, content):
    models.local_dir(tmp_path / "clip")
    (tmp_path / "clip" / "open_clip_config.json").write_text(content)
    assert f"local-dir:{tmp_path}/clip" in error_of(*PROMPT, "--clip-model", f"local-dir:{tmp_path}/clip")


def test_folder_without_weights(tmp_path, error_of):
    name = models.local_dir(tmp_path / "clip")
    (tmp_path / "clip" / "open_clip_model.safetensors").unlink()
    assert name in error_of(*PROMPT, "--clip-model", name)


@pytest.mark.parametrize("keep", [0, 7, 0.5, 0.999])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_truncated_weights(tmp_path, error_of, suffix, keep):
    name = models.local_dir(tmp_path / "clip")
    path = tmp_path / "clip" / "open_clip_model.safetensors"
    if suffix == "pt":
        torch.save(open_clip.create_model(name).state_dict(), path.with_suffix(".pth"))
        path.unlink()
        path = path.with_suffix(".pth")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep if keep > 1 else keep * len(whole))])
    assert name in error_of(*PROMPT, "--clip-model", name)


def test_weights_of_another_architecture(tmp_path, error_of):
    models.local_dir(tmp_path / "clip")
    config = json.loads((tmp_path / "clip" / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 32
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(config))
    assert "can't be loaded" in error_of(*PROMPT, "--clip-model", f"local-dir:{tmp_path}/clip")


class Booby:
    def __reduce__(self):
        return open, ("trap.txt", "w")


@pytest.mark.parametrize("saved_by", ["pickle", "torch"])
@pytest.mark.parametrize("where", ["file", "folder"])
def test_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, error_of, saved_by, where):
    name, path = models.local_dir(tmp_path / "clip"), tmp_path / "clip" / "model.pth"
    (tmp_path / "clip" / "open_clip_model.safetensors").unlink()
    if saved_by == "torch":
        torch.save({"state_dict": Booby()}, path)
    else:
        path.write_bytes(pickle.dumps(Booby()))
    assert "can't be loaded" in error_of(*PROMPT, "--clip-model", name if where == "folder" else f"ViT-B-32/{path}")
    assert not (tmp_path / "trap.txt").exists()


def test_tokenizer_that_needs_another_package_says_which(tmp_path, error_of, monkeypatch):
    name = models.local_dir(tmp_path / "clip", models.SIGLIP_CFG, models.SIGLIP_LOOK)
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    assert "pip install transformers" in error_of(*PROMPT, "--clip-model", name)


def test_tokenizer_without_its_vocabulary(tmp_path, error_of):
    name = models.local_dir(tmp_path / "clip", models.SIGLIP_CFG, models.SIGLIP_LOOK)
    for file in (tmp_path / "clip").glob("*token*"):
        file.unlink()
    assert name in error_of(*PROMPT, "--clip-model", name)


def test_folder_is_found_beside_the_script_from_anywhere(tmp_path, monkeypatch):
    folder = sac_vlmrm.HERE / "tiny_clip"
    monkeypatch.chdir(tmp_path)
    assert sac_vlmrm.local_folder("local-dir:tiny_clip") == folder
    (tmp_path / "tiny_clip").mkdir()  # but one in the working directory comes first
    assert sac_vlmrm.local_folder("local-dir:tiny_clip").resolve() == tmp_path / "tiny_clip"


def test_prompt_beyond_the_context_is_reported(clip_folder, capsys):
    """CLIP_CFG reads 16 tokens, start and end among them."""
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen".split()
    CLIPReward(clip_folder, [" ".join(words)])
    assert "warning" not in capsys.readouterr().out
    CLIPReward(clip_folder, [" ".join([*words, "fifteen", "sixteen"])])
    assert 'does not see "fifteen sixteen"' in capsys.readouterr().out
