"""Small and full-size CLIPs with random weights, saved on the spot in the layouts of open_clip and
of the hub."""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["<pad>", "</s>", "<unk>", *"a humanoid robot kneeling standing up sitting".split()]
CLIP_CFG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 48, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
# a tower of 64 x 32 pixels
WIDE_CFG = CLIP_CFG | {"vision_cfg": CLIP_CFG["vision_cfg"] | {"image_size": [64, 32]}}
COCA_CFG = {
    "embed_dim": 24,
    "custom_text": True,
    "vision_cfg": CLIP_CFG["vision_cfg"]
    | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": CLIP_CFG["text_cfg"] | {"embed_cls": True, "output_tokens": True},
    "multimodal_cfg": CLIP_CFG["text_cfg"] | {"attn_pooler_heads": 2},
}
SIGLIP_CFG = {
    "embed_dim": 192,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 224,
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {
        "context_length": 12,
        "vocab_size": len(WORDS),
        "hf_tokenizer_name": "somewhere/else",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "width": 192,
        "heads": 3,
        "layers": 1,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
    },
}
CLIP_LOOK = {
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 0.25],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
SIGLIP_LOOK = CLIP_LOOK | {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}


def save_tokenizer(folder):
    """A word-level tokenizer of nine words in the files that transformers reads; like SigLIP's it
    ends a text with </s>."""
    # here, because it takes seconds and most tests don't need it
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def local_dir(folder, model_cfg=CLIP_CFG, look=CLIP_LOOK):
    """Save a small CLIP in `folder` and return its name for --clip-model."""
    folder.mkdir(parents=True, exist_ok=True)
    size = model_cfg["vision_cfg"]["image_size"]
    config = {"model_cfg": model_cfg, "preprocess_cfg": {"size": size, **look}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    if "hf_tokenizer_name" in model_cfg["text_cfg"]:
        save_tokenizer(folder)
    return f"local-dir:{folder}"


def hub_cache(folder, repo):
    """A repository of the hub as the local cache holds it after a download; returns the folder
    for its files."""
    commit = "0" * 40
    base = Path(folder) / f"models--{repo.replace('/', '--')}"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text(commit)
    snapshot = base / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


def hollow_weights(name, path):
    """Weights of a published architecture that take no space: a row per tensor, repeated by its
    strides."""
    with torch.device("meta"):
        model = open_clip.create_model(name, load_weights=False, device="meta")
    generator, state = torch.Generator().manual_seed(0), {}
    for key, value in model.state_dict().items():
        row = 0.02 * torch.randn(value.shape[-1:], generator=generator)
        state[key] = row.expand(value.shape)
    torch.save(state, path)
    return path
