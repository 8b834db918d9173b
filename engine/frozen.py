"""Other people's vision models: loaded, checked, and seen as (class token, patch tokens). Nothing in them changes."""

from engine.errors import HubAwayError, UserError, first_line, require, speaks_for_others
from engine.images import normalize
from engine.network import from_hub, hub_file, hub_problem

import copy
import json
import pickle
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HUB_ID = r"[\w.-]+/[\w.-]+"


# ----------------------------------------------------------------------------------------------------------------
# Kinds of models: normalised pixels (B, 3, H, W) -> all tokens after the last norm. The class token is the first, the
# patches are the last, row by row; registers may stand between. `resized`: the images are not of the model's own size.


def clip_tokens(model, x, resized):
    """Before the projection; transformers itself applies post_layernorm to the class token alone."""
    tower = getattr(model, "vision_model", model)
    return tower.post_layernorm(tower(x, interpolate_pos_encoding=resized).last_hidden_state)


def vit_tokens(model, x, resized):
    return model(x, interpolate_pos_encoding=resized).last_hidden_state


def beit_tokens(model, x, resized):
    """A BEiT that pools by the mean has its last norm in its pooler."""
    x = vit_tokens(model, x, resized)
    return model.pooler.layernorm(x) if model.config.use_mean_pooling else x


def dino_tokens(model, x, resized):
    """It resizes its positions, or needs none, by itself."""
    return model(x).last_hidden_state


def eager_attention(model, x, resized, block):
    """Attention weights of one block, (B, heads, n, n): a model of transformers gives them where it writes the softmax
    out."""
    tower, before = getattr(model, "vision_model", model), model.config._attn_implementation
    model.set_attn_implementation("eager")
    options = {} if model.config.model_type.startswith("dino") else {"interpolate_pos_encoding": resized}
    try:
        return tower(x, output_attentions=True, **options).attentions[block]
    finally:
        model.set_attn_implementation(before)


@dataclass(frozen=True)
class Kind:
    """A family of vision models."""

    name: str
    tokens: Callable
    mean: tuple = IMAGENET_MEAN
    """Of the input, where no image processor beside the model says so."""
    std: tuple = IMAGENET_STD
    attention: Callable = eager_attention


CLIP = Kind("clip", clip_tokens, CLIP_MEAN, CLIP_STD)
BEIT = Kind("beit", beit_tokens)
DINOV2 = Kind("dinov2", dino_tokens)
KINDS = {  # by model_type of transformers
    "clip": CLIP,
    "clip_vision_model": CLIP,
    "beit": BEIT,
    "data2vec-vision": BEIT,
    "vit": Kind("vit", vit_tokens),
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2,
    "dinov3_vit": Kind("dinov3", dino_tokens),
}


class Frozen(nn.Module):
    """A frozen vision model: pixels in [0, 1] (B, 3, H, W) -> tokens (B, 1 + N, D), class token first.

    In evaluation mode and without gradients. `kind` is a row of KINDS, or the script's own; `own_size` is the side in
    pixels that its positions are for, `image_size` the one that it is used at (DINOv2: 224 of its 518).
    """

    def __init__(self, model, kind, own_size, patch_size, dim, heads, mean=None, std=None, image_size=None):
        super().__init__()
        self.model, self.kind = model.eval().requires_grad_(False), kind.name
        self.tokens, self.own_size, self.image_size = kind.tokens, own_size, image_size or own_size
        self.attention_of = kind.attention
        self.patch_size, self.dim, self.heads = patch_size, dim, heads
        self.mean, self.std = tuple(mean or kind.mean), tuple(std or kind.std)
        self.eval()

    def train(self, mode=True):
        return super().train(False)  # there is no other mode

    @torch.no_grad()
    def forward(self, pixels):
        x = self.tokens(self.model, *self.seen(pixels))
        return torch.cat([x[:, :1], x[:, -self.num_patches(pixels) :]], dim=1)           # (B, 1 + N, D)

    @torch.no_grad()
    def attention(self, pixels, block=-1):
        """How much the class token attends to each patch in one of the blocks: (B, heads, N). What is left of the sum
        of 1 goes to the class token itself, and to registers. Raises IndexError for a block that is not there."""
        weights = self.attention_of(self.model, *self.seen(pixels), block)               # (B, heads, n, n)
        return weights[:, :, 0, -self.num_patches(pixels) :].float()

    def seen(self, pixels):
        """Pixels (B, 3, H, W) as the model takes them, and whether they are not of its own size."""
        x = normalize(pixels, self.mean, self.std).to(next(self.parameters()).dtype)     # (B, 3, H, W)
        return x, tuple(pixels.shape[-2:]) != (self.own_size, self.own_size)

    def num_patches(self, pixels):
        height, width = pixels.shape[-2:]
        return (height // self.patch_size) * (width // self.patch_size)


@torch.no_grad()
def compiled_if_possible(teacher, shape, device):
    """A teacher with its network compiled, tried on pixels of this shape (B, 3, H, W); where that fails (no C compiler,
    no Triton, an odd GPU) it is as it was, and a line says why."""
    try:
        compiled = copy.deepcopy(teacher)  # what was compiled cannot be undone
        compiled.compile_network()
        compiled(torch.rand(shape, device=device))
        return compiled
    except Exception as error:  # each backend has its own
        if speaks_for_others():
            print(f"note: the teacher cannot be compiled ({first_line(error)[:200]}) and runs as it is, some percent "
                  "slower; --no-compile-teacher does not try", file=sys.stderr, flush=True)  # fmt: skip
        return teacher


# ----------------------------------------------------------------------------------------------------------------
# Loading.


def load_frozen(name, flag, kinds=tuple(KINDS), projection=False, config=None):
    """Frozen of a transformers folder or Hub id, of one of these `kinds` (model_types); with CLIP's `projection`, if
    that is needed; `config` is its config.json, if that has been read. Mean, standard deviation and image size are
    those of its own image processor. Raises UserError, naming the flag."""
    import transformers

    config = config or config_of(name, flag)
    kind = KINDS.get(config.get("model_type"), CLIP if projection else None)
    known = ", ".join(KINDS)
    require(kind, f"{flag} {name} is a {config.get('model_type')}: no encoder that is known here ({known})")
    model_class, description = transformers.AutoModel, f"a {kind.name} encoder"
    if kind is CLIP or projection:
        bare = config.get("architectures") == ["CLIPVisionModel"] and not projection
        model_class = transformers.CLIPVisionModel if bare else transformers.CLIPVisionModelWithProjection
        description = "a CLIP vision model with projection" if projection else description
    model = load_pretrained(name, model_class, kinds, description, flag, config).float()
    processor, config = image_processor_of(name, flag), model.config
    size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    crop = processor.get("crop_size")
    crop = crop.get("height") if isinstance(crop, dict) else None
    return Frozen(model, kind, size, config.patch_size, config.hidden_size, config.num_attention_heads,
                  processor.get("image_mean"), processor.get("image_std"), crop)  # fmt: skip


def load_pretrained(name, model_class, kinds, description, flag, config=None):
    """A transformers model of one of these `kinds` (model_types) from a folder or the Hub, with all of its weights;
    `config` is its config.json, if that has been read. Raises UserError, naming the flag."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    kind = (config or config_of(name, flag)).get("model_type")
    require(kind is None or kind in kinds, f"{flag} {name} is a {kind}: {description} is needed")
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report on heads that are not used; what is missing is ours to say
    try:
        model, info = from_hub(lambda: model_class.from_pretrained(name, output_loading_info=True), name, flag)
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"{flag} {name} cannot be loaded: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    # nobody uses a pooler, but for BEiT's norm after mean pooling, which its own fine-tuning also starts anew
    missing = [weight for weight in sorted(info["missing_keys"]) if not weight.startswith("pooler.")]
    require(not missing, f"{flag} {name} lacks weights of {description}: {', '.join(missing[:3])}, ...")
    return model


def config_of(name, flag):
    """The config.json of a transformers folder or Hub id. Raises UserError, naming the flag."""
    from transformers import PretrainedConfig

    local = Path(name).exists()
    if not local and not re.fullmatch(HUB_ID, name):
        raise UserError(f"{flag} {name} does not exist: no such folder, and not an id of the Hub")
    problem = None if local else hub_problem()  # its cache may do
    try:
        return from_hub(lambda: PretrainedConfig.get_config_dict(name)[0], name, flag)
    except (OSError, ValueError, RuntimeError) as error:
        if problem:
            raise HubAwayError(f"{flag} {name} is no local folder and not in the Hub's cache, and the Hub cannot be "
                               f"reached ({problem}): pass a folder") from error  # fmt: skip
        raise UserError(f"{flag} {name} cannot be loaded: {first_line(error)}") from error


def image_processor_of(name, flag):
    """What preprocessor_config.json beside a model says, {} where there is none. Raises UserError, naming the flag."""
    from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError

    file = "preprocessor_config.json"
    try:
        return json.loads((Path(name) / file if Path(name).is_dir() else Path(hub_file(name, file))).read_text())
    except LocalEntryNotFoundError as error:  # not known whether there is one
        raise UserError(f"{flag} {name} cannot be loaded: {first_line(error)}") from error
    except (FileNotFoundError, EntryNotFoundError):
        return {}
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(f"{flag} {name} cannot be loaded: its {file}: {first_line(error)}") from error


def transformers_config(checkpoint):
    """(folder or Hub id, its config.json) if a checkpoint is a model of transformers, else (checkpoint, None), which
    may still be a CAE. A run folder stands for its model/."""
    from huggingface_hub.errors import HfHubHTTPError

    path = Path(checkpoint).expanduser()
    folder = path / "model" if (path / "model").is_dir() else path
    if folder.is_dir():
        file, name = folder / "config.json", str(folder)
        if not file.is_file():
            return checkpoint, None
    elif path.exists() or not re.fullmatch(HUB_ID, checkpoint):
        return checkpoint, None
    else:
        hub_problem()  # without it the cache is looked into, at once
        try:
            file, name = hub_file(checkpoint, "config.json"), checkpoint
        except (HfHubHTTPError, OSError, ValueError):
            return checkpoint, None  # load_model says why
    config = json.loads(Path(file).read_text())
    return (name, config) if isinstance(config, dict) and "model_type" in config else (checkpoint, None)
