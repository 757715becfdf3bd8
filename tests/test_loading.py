"""--clip-model: every way of naming a model, and every way it can be wrong."""

import argparse
import json
import pickle
import sys
from pathlib import Path

import models
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file

import sac_vlmrm
from sac_vlmrm import CLIPReward

GOAL, BASELINE = ("a humanoid robot kneeling",), ("a humanoid robot",)
PROMPT = ["--prompt", *GOAL]
FRAMES = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def vit_b_32():
    """The whole ViT-B-32, 151M random weights."""
    torch.manual_seed(0)
    return open_clip.create_model("ViT-B-32", load_weights=False)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_full_size_weights_from_a_file(vit_b_32, tmp_path, suffix, printed):
    path, loaded = tmp_path / f"weights.{suffix}", []
    (torch.save if suffix == "pt" else save_file)(vit_b_32.state_dict(), path)

    def load():
        loaded.append(CLIPReward(f"ViT-B-32/{path}", GOAL, BASELINE))

    # the file does not tell: ViT-B-32 was published with both activations
    assert "if with QuickGELU, use ViT-B-32-quickgelu/FILE" in printed(load)
    path.unlink()  # 600 MB
    reward = loaded[0]
    assert reward.image_size == (224, 224)
    frames = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    look = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in look)
    images = (torch.as_tensor(frames).permute(0, 3, 1, 2) / 255 - mean) / std
    tokens = open_clip.get_tokenizer("ViT-B-32")(list(GOAL))
    with torch.no_grad():
        images = F.normalize(vit_b_32.encode_image(images), dim=-1)
        goal = F.normalize(vit_b_32.encode_text(tokens), dim=-1)[0]
    embeddings = reward.embed_images(frames)
    torch.testing.assert_close(reward(embeddings), images @ goal, rtol=0, atol=1e-5)


def test_a_file_under_a_name_that_tells_the_activation_draws_no_warning(tmp_path, printed):
    path = models.hollow_weights("ViT-B-32-quickgelu", tmp_path / "weights.pt")
    assert "warning" not in printed(
        sac_vlmrm.load_clip, f"ViT-B-32-quickgelu/{path}", "cpu", "fp32"
    )


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """ViT-B-16-SigLIP as if it had been downloaded: its weights, and its tokenizer's files in the
    hub's cache."""
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
    """Also from a bare file, where open_clip alone would fall back to OpenAI's mean, deviation and
    cropping."""
    name = f"ViT-B-16-SigLIP/{'webli' if source == 'tag' else siglip}"
    _, preprocess, tokenizer = sac_vlmrm.load_clip(name, "cpu", "fp32")
    frame = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    expected = torch.as_tensor(frame).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(preprocess(Image.fromarray(frame)), expected)
    wide = np.zeros((100, 300, 3), dtype=np.uint8)
    wide[:, :20] = wide[:, -20:] = 255  # cropping would lose the two ends
    seen = preprocess(Image.fromarray(wide))
    assert seen.shape == (3, 224, 224) and seen.max() > 0.9
    assert tokenizer(["a robot"])[0, :3].tolist() == [3, 5, 1]


def test_siglip_file_offline_is_told_to_use_a_folder(tmp_path, error_of, monkeypatch):
    """Its tokenizer is not in the hub's cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    path = models.hollow_weights("ViT-B-16-SigLIP", tmp_path / "weights.pt")
    error = error_of(*PROMPT, "--clip-model", f"ViT-B-16-SigLIP/{path}")
    assert "local-dir:FOLDER" in error and "can't be loaded" in error


@pytest.mark.parametrize("layout", ["plain", "state_dict"])
def test_folder_with_a_config_and_a_pth_file(tmp_path, layout):
    """As a training of one's own leaves it; the same weights as from safetensors."""
    name = models.local_dir(tmp_path / "clip")
    expected = CLIPReward(name, GOAL, BASELINE).embed_images(FRAMES)
    path = tmp_path / "clip" / "open_clip_model.safetensors"
    state = load_file(path)
    path.unlink()
    saved = state if layout == "plain" else {"epoch": 3, "state_dict": state}
    torch.save(saved, tmp_path / "clip" / "epoch_3.pth")
    assert torch.equal(CLIPReward(name, GOAL, BASELINE).embed_images(FRAMES), expected)


def training_checkpoint(model, path):
    """With the optimiser's state and the flags of the training, which is no plain type."""
    optimizer = torch.optim.AdamW(model.parameters())
    flags = argparse.Namespace(lr=1e-4, path=Path("data"))
    saved = {"epoch": 3, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved | {"args": flags}, path)


def torchscript_archive(model, path):
    torch.jit.save(torch.jit.trace(model.visual, torch.zeros(1, 3, 48, 48)), path)


@pytest.mark.parametrize("where", ["folder", "file"])
@pytest.mark.parametrize("kind", [training_checkpoint, torchscript_archive])
@pytest.mark.filterwarnings("ignore")  # of torch.jit
def test_file_of_more_than_weights_is_refused_with_the_way_to_plain_ones(
    tmp_path, error_of, kind, where
):
    name, path = models.local_dir(tmp_path / "clip"), tmp_path / "clip" / "weights.pth"
    kind(open_clip.create_model(name), path)
    (tmp_path / "clip" / "open_clip_model.safetensors").unlink()
    error = error_of(*PROMPT, "--clip-model", name if where == "folder" else f"ViT-B-32/{path}")
    assert "can't be loaded" in error and "torch.save(" in error and "state_dict" in error


def test_the_way_to_plain_weights_works(tmp_path):
    """What the line of the test above says to do."""
    name, path = models.local_dir(tmp_path / "clip"), tmp_path / "checkpoint"
    expected = CLIPReward(name, GOAL, BASELINE).embed_images(FRAMES)
    training_checkpoint(open_clip.create_model(name), path)
    (tmp_path / "clip" / "open_clip_model.safetensors").unlink()
    state = torch.load(path, weights_only=False)["state_dict"]
    torch.save(state, tmp_path / "clip" / "weights.pth")
    assert torch.equal(CLIPReward(name, GOAL, BASELINE).embed_images(FRAMES), expected)


def test_file_whose_normalisation_is_ambiguous_is_refused(tmp_path, error_of):
    """The published weights of ViT-L-14 disagree on mean and deviation, so a file of them does not
    tell its own."""
    (tmp_path / "weights.pt").write_bytes(b"")
    assert "local-dir" in error_of(*PROMPT, "--clip-model", f"ViT-L-14/{tmp_path}/weights.pt")


def test_a_tag_brings_the_activation_it_was_trained_with(tmp_path, monkeypatch):
    """OpenAI's with QuickGELU, whether the name says so or not; LAION's with GELU."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for tag, quick in (("openai", True), ("laion2b_s34b_b79k", False)):
        repo = open_clip.get_pretrained_cfg("ViT-B-32", tag)["hf_hub"].strip("/")
        folder = models.hub_cache(tmp_path, repo)
        models.hollow_weights("ViT-B-32", folder / "open_clip_pytorch_model.bin")
        model, _, _ = sac_vlmrm.load_clip(f"ViT-B-32/{tag}", "cpu", "fp32")
        kinds = {type(module) for module in model.modules()}
        assert (open_clip.transformer.QuickGELU in kinds) == quick


@pytest.mark.parametrize(
    "clip_model, says",
    [
        ("ViT-B-33/openai", "ViT-B-33"),
        ("ViT-B-32", "laion2b_s34b_b79k"),  # no tag: the ones there are
        ("ViT-B-32/nonsense", "laion2b_s34b_b79k"),
        ("ViT-B-32/missing.pt", "missing.pt"),
        ("ViT-S-32/whatever", "ViT-S-32"),  # an architecture without published weights
        # not downloaded, and the hub is out of reach
        ("ViT-B-32/laion2b_s34b_b79k", "laion2b_s34b_b79k"),
        ("hf-hub:nobody/nothing", "nobody/nothing"),
        ("local-dir:nowhere", "nowhere"),
        ("", "--clip-model"),
    ],
)
def test_model_that_cannot_be_found(error_of, clip_model, says):
    assert says in error_of(*PROMPT, "--clip-model", clip_model)


def test_folder_without_config(tmp_path, error_of):
    (tmp_path / "empty").mkdir()
    name = f"local-dir:{tmp_path}/empty"
    assert "open_clip_config.json" in error_of(*PROMPT, "--clip-model", name)


@pytest.mark.parametrize("content", ["{", "{}", '{"model_cfg": {"embed_dim": 24}}', "[]"])
def test_folder_with_a_broken_config(tmp_path, error_of, content):
    name = models.local_dir(tmp_path / "clip")
    (tmp_path / "clip" / "open_clip_config.json").write_text(content)
    assert name in error_of(*PROMPT, "--clip-model", name)


def test_folder_without_weights(tmp_path, error_of):
    name = models.local_dir(tmp_path / "clip")
    (tmp_path / "clip" / "open_clip_model.safetensors").unlink()
    assert name in error_of(*PROMPT, "--clip-model", name)


@pytest.mark.parametrize("keep", [0, 7, 0.5, 0.999])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_truncated_weights(tmp_path, error_of, suffix, keep):
    name = models.local_dir(tmp_path / "clip")
    path = tmp_path / "clip" / "open_clip_model.safetensors"
    if suffix != "safetensors":
        torch.save(open_clip.create_model(name).state_dict(), path.with_suffix(f".{suffix}"))
        path.unlink()
        path = path.with_suffix(f".{suffix}")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep if keep > 1 else keep * len(whole))])
    assert name in error_of(*PROMPT, "--clip-model", name)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_of_another_architecture(tmp_path, error_of, suffix):
    name = models.local_dir(tmp_path / "clip")
    path = tmp_path / "clip" / "open_clip_model.safetensors"
    if suffix == "pth":
        torch.save(load_file(path), path.with_suffix(".pth"))
        path.unlink()
    config = json.loads((tmp_path / "clip" / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 32
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(config))
    assert "can't be loaded" in error_of(*PROMPT, "--clip-model", name)


class Booby:
    def __reduce__(self):
        return open, ("trap.txt", "w")


@pytest.mark.parametrize("saved_by", ["pickle", "torch"])
@pytest.mark.parametrize("where", ["file", "folder"])
def test_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, error_of, saved_by, where):
    path = tmp_path / "clip" / "model.pth"
    name = models.local_dir(tmp_path / "clip")
    (tmp_path / "clip" / "open_clip_model.safetensors").unlink()
    if saved_by == "torch":
        torch.save({"state_dict": Booby()}, path)
    else:
        path.write_bytes(pickle.dumps(Booby()))
    error = error_of(*PROMPT, "--clip-model", f"ViT-B-32/{path}" if where == "file" else name)
    assert "can't be loaded" in error
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
    folder = Path(sac_vlmrm.__file__).resolve().parent / "tiny_clip"
    monkeypatch.chdir(tmp_path)
    assert sac_vlmrm.local_folder("local-dir:tiny_clip") == folder
    (tmp_path / "tiny_clip").mkdir()  # but one in the working directory comes first
    assert sac_vlmrm.local_folder("local-dir:tiny_clip").resolve() == tmp_path / "tiny_clip"


def test_prompt_beyond_the_context_is_reported(clip_folder, printed):
    """CLIP_CFG reads 16 tokens, start and end among them."""
    words = "one two three four five six seven eight nine ten eleven twelve thirteen".split()
    fits, beyond = " ".join(words), " ".join([*words, "fourteen", "fifteen", "sixteen"])
    assert "warning" not in printed(CLIPReward, clip_folder, (fits,), BASELINE)
    assert "fills or exceeds the 16 tokens" in printed(CLIPReward, clip_folder, (beyond,), BASELINE)
    # the baseline is read only with an alpha above 0
    assert "warning" not in printed(CLIPReward, clip_folder, (fits,), (beyond,))
    output = printed(CLIPReward, clip_folder, (fits,), (beyond,), 0.5)
    assert f'"{beyond}" fills or exceeds the 16 tokens' in output
