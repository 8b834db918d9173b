"""Other people's checkpoints and formats: weights of the released code in, the encoder in other libraries out.

    python convert.py --checkpoint runs/cae-v2-base --to beit --output runs/beit
"""

from engine.errors import (
    BAD_PICKLE,
    RunError,
    UserError,
    command_line,
    first_line,
    printable,
    require,
    temporary_folders,
)
from engine.files import publish
from engine.network import from_hub, hub_problem

import argparse
import copy
import dataclasses
import io
import itertools
import json
import logging
import math
import pickle
import re
import tempfile
import textwrap
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cae import CAE, IMAGENET_MEAN, IMAGENET_STD, LN_EPS, SIZES, CAEConfig, former_name

logger = logging.getLogger("convert")

# ----------------------------------------------------------------------------------------------------------------
# In: checkpoints of the released code, and whatever else holds a CAE.

WHERE_RELEASED = (
    "the authors' own weights of CAE are linked at https://github.com/Atten4Vis/CAE, encoders of CAE v2 are files on "
    "the Hub: xbsu/LW-DETR::pretrain_weights/caev2_base_300e_objects365.pth (tiny and small likewise)"
)

# Our name -> the released one, applied in this order.
_RENAME = [
    (r"^encoder\.patch_embed\.", "encoder.patch_embed.proj."),
    (r"^encoder\.class_token$", "encoder.cls_token"),
    (r"^to_regressor\.0\.", "encoder_to_regresser."),
    (r"^to_regressor\.1\.", "encoder_to_regresser_norm."),
    (r"^regressor\.mask_token$", "mask_token"),
    (r"^regressor\.(.*)\.norm_([qkv])\.", r"regressor.\1.norm1_\2."),
    (r"^regressor\.(.*)\.norm2\.", r"regressor.\1.norm2_cross."),
    (r"^regressor\.(.*)\.attn\.([qv])\.bias$", r"regressor.\1.cross_attn.\2_bias"),
    (r"^regressor\.(.*)\.attn\.", r"regressor.\1.cross_attn."),
    (r"^regressor\.(.*)\.mlp\.", r"regressor.\1.mlp_cross."),
    (r"^regressor\.(.*)\.scale([12])$", r"regressor.\1.gamma_\2_cross"),
    (r"^regressor\.blocks\.", "regressor.regressor_blocks."),
    (r"^regressor\.", "regresser."),
    (r"^decoder\.blocks\.", "decoder.decoder_blocks."),
    (r"^head\.norm\.", "decoder.norm."),
    (r"^head\.linear\.", "decoder.head."),
    (r"\.scale([12])$", r".gamma_\1"),
]


def released_name(name):
    """The name of a parameter here -> its name in the released code."""
    for pattern, replacement in _RENAME:
        name = re.sub(pattern, replacement, name)
    return name


def load_official(path_or_state_dict, **overrides):
    """A CAE from a checkpoint of the released code, v1 or v2.

    Args: path_or_state_dict, a .pth or .safetensors file, `owner/name::path/in/repo` on the Hub, or the dict itself,
    bare or as {"model": ...}; overrides, CAEConfig fields that the tensors cannot tell (heads, regressor_heads,
    align_weight, ...). Method, widths and depths are read from the tensors; heads default by SIZES.
    A file with nothing but the encoder, or without class token and final LayerNorm, gives a model whose other parts
    are freshly initialised; so are regressor and decoder whose attention is not as wide as they are, which is what the
    flags of v1's large script make (1,020 of 1,024) and no model here. What was assumed or freshly initialised is
    logged as a warning.
    Pickles are read with weights_only=True: nothing in them is executed.
    Raises: ValueError naming the missing, surplus or ill-shaped tensors of a damaged or unrelated file;
    FileNotFoundError.
    """
    source = path_or_state_dict if isinstance(path_or_state_dict, (str, Path)) else "the state dict"
    released = {name.removeprefix("module."): tensor for name, tensor in _read_official(path_or_state_dict).items()}
    config, assumed = _config_of(released, source, overrides)
    narrow = _narrow_attention(released)
    if narrow:
        released = {name: tensor for name, tensor in released.items() if name.startswith("encoder.")}
    model = CAE(config)
    state = model.state_dict()
    names = {released_name(name): name for name in state}
    # A part may be absent as a whole, never in pieces.
    rest = "regressor and decoder" if config.method == "cae" else "regressor and head"
    fresh = {
        "class token and final LayerNorm": ("encoder.cls_token", "encoder.norm."),
        rest: ("encoder_to_regresser", "mask_token", "regresser.", "decoder."),
    }
    fresh = {part: start for part, start in fresh.items() if not any(name.startswith(start) for name in released)}
    expected = [name for name in names if not name.startswith(tuple(itertools.chain(*fresh.values())))]
    # In released files, but nothing to load: the encoder's aliased copy, the fixed positions, and in v2 a LayerNorm
    # that is never applied.
    unused = r"alignment_encoder\..*|encoder\.pos_embed|rd_pos_embed"
    unused += r"|regresser\.norm\..*" if config.method == "cae-v2" else ""
    shapes = {name: state[names[name]].shape for name in expected}
    shapes["encoder.patch_embed.proj.weight"] = (config.dim, 3, config.patch_size, config.patch_size)
    problems = {
        "missing": [name for name in expected if name not in released],
        "surplus": [name for name in released if name not in names and not re.fullmatch(unused, name)],
        "of another shape": [
            f"{name} {tuple(released[name].shape)} instead of {tuple(shape)}"
            for name, shape in shapes.items()
            if name in released and released[name].shape != shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {', '.join(sorted(found))}" for kind, found in problems.items() if found)
        raise ValueError(f"{source} is not a whole checkpoint of {config.method}: {listed}")
    loaded = {names[name]: released[name].reshape(state[names[name]].shape) for name in expected}
    model.load_state_dict({**state, **loaded})
    if assumed:
        said = ", ".join(assumed)
        logger.warning("%s: assumed %s; pass them as keywords if they are others", printable(source), said)
    if narrow:
        fresh.pop(rest)
        logger.warning("%s: attention %d wide in a regressor of %d, which is no CAE of the paper: only its encoder is "
                       "taken, %s are freshly initialised", printable(source), *narrow, rest)  # fmt: skip
    if fresh:
        logger.warning("%s has no %s: freshly initialised", printable(source), " and no ".join(fresh))
    return model.eval()


def _narrow_attention(released):
    """(width of the regressor's attention, of its input) where the number of heads does not divide the second: of 1024,
    12 heads make 12 * 85 = 1020. Else None."""
    shapes = {tuple(w.shape) for name, w in released.items() if re.search(r"\.cross_attn\.[qkv]\.weight$", name)}
    if len(shapes) == 1 and len(*shapes) == 2:
        ((inner, width),) = shapes
        heads = {row["cae"]["regressor_heads"] for row in SIZES.values()}
        if inner != width and inner in [n * (width // n) for n in heads]:
            return inner, width
    return None


def _read_official(source):
    """Path, Hub path or dict -> {released name: tensor}. Raises ValueError or FileNotFoundError."""
    state, path = source, str(source)
    if isinstance(source, (str, Path)):
        if "::" in path:
            problem = hub_problem()
            try:
                path = from_hub(lambda: hf_hub_download(*str(source).split("::", 1)), source)
            except (HfHubHTTPError, OSError, ValueError) as error:
                raise FileNotFoundError(f"{source} cannot be had from the Hub: {problem or error}") from error
        if not Path(path).is_file():
            raise FileNotFoundError(f"checkpoint {path} does not exist; {WHERE_RELEASED}")
        try:
            if path.endswith(".safetensors"):
                state = load_file(path)
            else:  # released training checkpoints also pickle their argparse.Namespace, which is plain data
                with torch.serialization.safe_globals([argparse.Namespace]):
                    state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can fail in any way, down to struct.error and IndexError
            raise ValueError(f"{path} cannot be read as a checkpoint: {BAD_PICKLE}") from error
    state = state.get("model", state) if isinstance(state, dict) else state
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{path if state is not source else 'the argument'} holds no state dict of tensors")
    return state


def _config_of(released, source, overrides):
    """CAEConfig read from the shapes of the released tensors, and the list of what had to be assumed."""
    ranks = {"encoder.patch_embed.proj.weight": 4, "encoder.pos_embed": 3, "mask_token": 3, "decoder.head.weight": 2}
    for name, rank in ranks.items():
        if name in released and released[name].ndim != rank:
            raise ValueError(f"{source}: {name} is {tuple(released[name].shape)}, it must have {rank} dimensions")
    if "encoder.patch_embed.proj.weight" not in released:
        raise ValueError(
            f"{source} is not a checkpoint of CAE or CAE v2: encoder.patch_embed.proj.weight is missing; "
            f"it holds {', '.join(list(released)[:5]) or 'nothing'}{', ...' if len(released) > 5 else ''}"
        )

    def depth(prefix):
        numbers = [name[len(prefix) :].split(".")[0] for name in released if name.startswith(prefix)]
        return max((int(n) for n in numbers if n.isdigit()), default=-1) + 1

    dim, _, patch_size, _ = released["encoder.patch_embed.proj.weight"].shape
    head, decoder_depth = released.get("decoder.head.weight"), depth("decoder.decoder_blocks.")
    # Without decoder blocks (the ablation of the paper), v1 is known by its alignment encoder or its 8192 codes.
    aliased = any(name.startswith("alignment_encoder.") for name in released)
    is_v1 = decoder_depth > 0 or aliased or (head is not None and len(head) == 8192)
    read = {"method": "cae" if is_v1 else "cae-v2"}
    # The table's row of this width gives what shapes cannot.
    size = next((name for name in SIZES if SIZES[name]["encoder"]["dim"] == dim), None)
    table = dataclasses.asdict(CAEConfig.from_size(size, overrides.get("method", read["method"]))) if size else {}
    read |= {"dim": dim, "patch_size": patch_size, "depth": depth("encoder.blocks.")}
    guessed = {"heads": table.get("heads", max(dim // 64, 1))}
    if table and table["depth"] != read["depth"]:  # LW-DETR's encoders are cut short, a damaged file may be too
        logger.warning("%s has %d encoder blocks, %s has %d", printable(source), read["depth"], size, table["depth"])
    if "encoder.pos_embed" in released:
        read["image_size"] = math.isqrt(max(released["encoder.pos_embed"].shape[1] - 1, 0)) * patch_size
    else:
        guessed["image_size"] = 14 * patch_size
    if "mask_token" in released:
        width = released["mask_token"].shape[-1]
        read |= {"regressor_dim": width, "decoder_depth": decoder_depth}
        read["regressor_depth"] = depth("regresser.regressor_blocks.")
        same = table.get("regressor_dim") == width
        guessed["regressor_heads"] = table["regressor_heads"] if same else max(width // 64, 1)
        if head is not None:
            read["target_dim"] = len(head)
    else:  # nothing of the pretraining side is in the file: the table's, or as wide as the encoder
        guessed |= {"method": read.pop("method")}
        read |= {"regressor_dim": dim, "regressor_heads": overrides.get("heads", guessed["heads"])}
        names = ("regressor_dim", "regressor_depth", "regressor_heads", "decoder_depth", "target_dim")
        read |= {name: table[name] for name in names if name in table}
    if "layer_scale" in table:
        read["layer_scale"] = table["layer_scale"]
    assumed = [f"{name}={value}" for name, value in guessed.items() if name not in overrides]
    return CAEConfig(**{**read, **guessed, **overrides}), assumed


def load_model(checkpoint):
    """A CAE in eval mode from whatever holds one.

    Args: checkpoint, a run folder, its model/ folder, an id on the Hub, or for `load_official` a file of the released
    code, also as `owner/name::path/in/repo`.
    Raises: FileNotFoundError for what does not exist, ValueError for what is damaged or no CAE.
    """
    name, path = str(checkpoint), Path(checkpoint).expanduser()
    if "::" in name or path.is_file():
        return load_official(name if "::" in name else path)
    accepted = "a run folder, a model/ folder, an id on the Hub or a released .pth"
    if path.is_dir():
        path = path / "model" if (path / "model").is_dir() else path
        config = path / "config.json"
        if not config.is_file():
            raise FileNotFoundError(f"{path} holds no config.json: it is no model; give {accepted}")
    else:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise FileNotFoundError(f"{name} does not exist: give {accepted}; {WHERE_RELEASED}")
        problem = hub_problem()  # its cache may do
        try:
            path, config = name, from_hub(lambda: hf_hub_download(name, "config.json"), name)
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = problem or textwrap.shorten(str(error), 200)
            raise FileNotFoundError(f"{name} is no file or folder, nor to be had from the Hub: {reason}") from error
    try:
        fields = json.loads(Path(config).read_text())
    except ValueError as error:
        raise ValueError(f"{name} is damaged: its config.json is not JSON") from error
    fields = fields if isinstance(fields, dict) else {}
    if "args" in fields:
        raise ValueError(f"{name} is a run folder without a model/ yet: it appears with the run's first checkpoint")
    if "method" not in fields:
        raise ValueError(f"{name} is no CAE: its config.json names no method; give {accepted}")
    try:
        with redirect_stdout(io.StringIO()):  # huggingface_hub prints
            return from_hub(lambda: CAE.from_pretrained(path), name)  # in eval mode
    except (pickle.UnpicklingError, EOFError) as error:  # of the Hub, where no model.safetensors is
        raise ValueError(f"{name} cannot be loaded: {BAD_PICKLE}") from error
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError, HfHubHTTPError) as error:
        reason = textwrap.shorten(str(error), 400)
        raise ValueError(f"{name} cannot be loaded: it is damaged or incomplete ({reason})") from error


def open_encoder(origin, seed, of_cae, of_transformers):
    """What load_encoder and finetune.py start from: of_cae(model) of a CAE, trained or at random, or
    of_transformers(folder or Hub id, its config.json). `origin` is the group of --checkpoint and --random-init. Raises
    UserError."""
    from engine.frozen import transformers_config

    name, size = origin.checkpoint, origin.random_init
    if name is None:
        if size in SIZES:
            config = CAEConfig.from_size(size)
        else:
            require(Path(size).is_dir(), f"--random-init {size} does not exist: {', '.join(SIZES)}, or a run folder")
            config = load_model(size).config
        torch.manual_seed(seed)
        return of_cae(CAE(config))
    if name.startswith("runs/") and not Path(name).exists():  # no id of the Hub
        runs = sorted(path.name for path in Path("runs").glob("*") if path.is_dir())
        raise UserError(f"--checkpoint {name} does not exist; in runs/ there is {', '.join(runs) or 'nothing'}")
    try:
        folder, config = transformers_config(name)
        return of_transformers(folder, config) if config else of_cae(load_model(name))
    except (OSError, ValueError, RuntimeError, SafetensorError, HfHubHTTPError) as error:
        raise UserError(f"--checkpoint {name} cannot be loaded: {first_line(error)}") from error


def frozen_cae(model):
    """engine.frozen.Frozen of a CAE, whose encode() takes any size."""
    from engine.frozen import Frozen, Kind

    def tokens(model, images, resized):
        return model.encode(images)

    def attention(model, images, resized, block):
        return model.encoder.attention(images, block)

    config = model.config
    kind = Kind(config.method, tokens, IMAGENET_MEAN, IMAGENET_STD, attention)
    return Frozen(model, kind, config.image_size, config.patch_size, config.dim, config.heads)


def load_encoder(origin, seed=0):
    """engine.frozen.Frozen of a checkpoint of any kind, or of random weights: what probe.py and pictures.py look at.
    Raises UserError."""
    from engine.frozen import load_frozen

    def of_transformers(name, config):
        return load_frozen(name, "--checkpoint", config=config)

    return open_encoder(origin, seed, frozen_cae, of_transformers)


def weights_of(encoder):
    """A short name of the weights of a Frozen. (For a CAE the one that run folders have always had.)"""
    from engine.checkpoints import fingerprint

    state = encoder.model.state_dict()
    return fingerprint({former_name(name) if isinstance(encoder.model, CAE) else name: w for name, w in state.items()})


# ----------------------------------------------------------------------------------------------------------------
# Out: the encoder in other libraries. BEiT, timm and LW-DETR keep positions as a table, hence for one square size.
# What a changed encoder has more than ours they would drop in silence; here it is an error.


@contextmanager
def whole_state(encoder, library):
    """take(name), which takes a tensor out of the encoder's state dict: each of them once.

    Raises: ValueError naming a tensor that is not there, and those that nobody took.
    """
    state = encoder.state_dict()

    def take(name):
        if name not in state:
            raise ValueError(f"the encoder has no {name}, which {library} needs: it cannot be exported there")
        return state.pop(name)

    yield take
    if state:
        raise ValueError(f"{library} has no room for the encoder's {', '.join(state)}: it cannot be exported there")


def load_state(network, state):
    """network.load_state_dict, in eval mode. Raises ValueError where they do not fit."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 200)
        raise ValueError(f"the encoder does not fit {type(network).__name__}: {reason}") from error
    return network.eval()


def to_beit(model, image_size=None):
    """The encoder as a transformers.BeitModel, in eval mode, with identical outputs at this image size.

    The encoder is exactly a BEiT with absolute positions, no relative bias, LayerScale, no mean pooling and a
    LayerNorm eps of 1e-6. Square sizes only: BEiT's configuration knows no other.
    Args: image_size, in pixels (None: the model's own). Raises: ValueError for a size that the patch does not divide,
    and for an encoder that is no BEiT.
    """
    from transformers import BeitConfig, BeitModel

    config, encoder = model.config, model.encoder
    size = square_size(model, image_size)
    with whole_state(encoder, "BEiT") as take:
        state = {
            "embeddings.cls_token": take("class_token"),
            "embeddings.position_embeddings": position_table(encoder, size),
            "embeddings.patch_embeddings.projection.weight": patch_kernel(take("patch_embed.weight")),
            "embeddings.patch_embeddings.projection.bias": take("patch_embed.bias"),
            "layernorm.weight": take("norm.weight"),
            "layernorm.bias": take("norm.bias"),
        }
        for i in range(config.depth):
            block = block_state(take, f"blocks.{i}", "lambda", "mlp")
            state.update({f"layers.{i}.{name}": tensor for name, tensor in block.items()})
    beit = BeitModel(
        BeitConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.dim,
            hidden_act="gelu",
            layer_norm_eps=LN_EPS,
            image_size=size,
            patch_size=config.patch_size,
            use_absolute_position_embeddings=True,
            use_relative_position_bias=False,
            use_shared_relative_position_bias=False,
            use_mask_token=False,
            use_mean_pooling=False,
            layer_scale_init_value=config.layer_scale or 1.0,  # with 0, BEiT has none
            drop_path_rate=config.drop_path,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    )
    return load_state(beit, state)


def to_timm(model, image_size=None):
    """The encoder as a state dict for timm's `Beit`, built with `timm_arguments` of the same size.

    Its `forward_features` is then `encode`; qkv and its two biases lie there as they do here. Arguments and errors as
    `to_beit`'s.
    """
    size = square_size(model, image_size)
    with whole_state(model.encoder, "timm's Beit") as take:
        state = {
            "cls_token": take("class_token"),
            "pos_embed": position_table(model.encoder, size),
            "patch_embed.proj.weight": patch_kernel(take("patch_embed.weight")),
            "patch_embed.proj.bias": take("patch_embed.bias"),
            "norm.weight": take("norm.weight"),
            "norm.bias": take("norm.bias"),
        }
        for block in (f"blocks.{i}" for i in range(model.config.depth)):
            for name in ("attn.qkv.weight", "attn.q_bias", "attn.v_bias"):
                state[f"{block}.{name}"] = take(f"{block}.{name}")
            for layer in ("attn.proj", "norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                for name in (f"{block}.{layer}.weight", f"{block}.{layer}.bias"):
                    state[name] = take(name)
            state[f"{block}.gamma_1"], state[f"{block}.gamma_2"] = take(f"{block}.scale1"), take(f"{block}.scale2")
    return {name: tensor.clone() for name, tensor in state.items()}


def timm_arguments(model, image_size=None):
    """Keywords of `timm.models.beit.Beit` that `to_timm` needs; all others are timm's defaults."""
    config = model.config
    return {
        "img_size": square_size(model, image_size),
        "patch_size": config.patch_size,
        "embed_dim": config.dim,
        "depth": config.depth,
        "num_heads": config.heads,
        "qkv_bias": True,
        "mlp_ratio": 4.0,
        "init_values": config.layer_scale or 1.0,  # with 0, timm has no LayerScale
        "use_abs_pos_emb": True,
        "use_rel_pos_bias": False,
        "num_classes": 0,
        "global_pool": "token",  # with "avg" the final LayerNorm would move behind the pooling
    }


def to_onnx(model, path):
    """Write the encoder as an ONNX graph: "images" (B, 3, H, W), float32 -> "tokens" (B, 1 + N, D), as `encode`.

    B, H and W are free, but for H and W being multiples of the patch: positions are computed in the graph. It is one
    file up to 2 GB; larger weights lie beside it. Raises: ImportError without the packages onnx and onnxscript.
    """
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise ImportError(f"{package} is not installed, and ONNX needs it: pip install onnx onnxscript")

    encoder = copy.deepcopy(model.encoder).cpu().eval()
    encoder.positions.grid = None  # no grid has a table, or tracing would exclude the one that has
    patch = model.config.patch_size
    rows, columns = torch.export.Dim("rows"), torch.export.Dim("columns")
    program = torch.onnx.export(
        encoder,
        (torch.zeros(2, 3, 3 * patch, 5 * patch),),  # any numbers but 1, which would be taken as fixed
        dynamic_shapes=({0: torch.export.Dim("batch"), 2: patch * rows, 3: patch * columns},),
        input_names=["images"],
        output_names=["tokens"],
        dynamo=True,
        verbose=False,
    )
    program.save(path)


def to_lw_detr(model, image_size=None):
    """The encoder as the backbone of LW-DETR, a transformers.LwDetrViTBackbone in eval mode.

    LW-DETR has no class token and no final LayerNorm; its feature map (B, D, H / P, W / P) is the last block's output
    with the patches alone as input. Attention is global: one window. (Windows are for who loads it, with the keywords
    num_windows=16, num_windows_side=4, window_block_indices=[...].) At other sizes than this one it interpolates its
    table of positions, where `encode` computes them anew. Arguments and errors as `to_beit`'s.
    """
    from transformers import LwDetrViTBackbone, LwDetrViTConfig

    config, encoder = model.config, model.encoder
    size = square_size(model, image_size)
    with whole_state(encoder, "LW-DETR") as take:
        state = {
            "embeddings.position_embeddings": position_table(encoder, size),
            "embeddings.projection.weight": patch_kernel(take("patch_embed.weight")),
            "embeddings.projection.bias": take("patch_embed.bias"),
        }
        for i in range(config.depth):
            block = block_state(take, f"blocks.{i}", "gamma", "intermediate")
            state.update({f"encoder.layer.{i}.{name}": tensor for name, tensor in block.items()})
        for dropped in ("class_token", "norm.weight", "norm.bias"):
            take(dropped)
    backbone = LwDetrViTBackbone(
        LwDetrViTConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            mlp_ratio=4,
            hidden_act="gelu",
            layer_norm_eps=LN_EPS,
            image_size=size,
            pretrain_image_size=size,  # the table's
            patch_size=config.patch_size,
            qkv_bias=True,  # of q and v: its keys never have one
            use_absolute_position_embeddings=True,
            cae_init_values=config.layer_scale,
            dropout_prob=0.0,
            num_windows=1,
        )
    )
    return load_state(backbone, state)


def square_size(model, image_size=None):
    """Side of a square image in pixels (None: the model's own). Raises ValueError unless the patch divides it."""
    patch, size = model.config.patch_size, model.config.image_size if image_size is None else image_size
    if not isinstance(size, int) or size <= 0 or size % patch:
        raise ValueError(f"image_size is {size}: it must be one number, a side that the patch of {patch} divides")
    return size


def position_table(encoder, size):
    """Positions of a square image of `size` pixels, (1, 1 + N, D), zero for the class token."""
    return F.pad(encoder.positions((size // encoder.patch_size,) * 2), (0, 0, 1, 0))[None]


def patch_kernel(weight):
    """The patch embedding (D, 3 P^2) as the kernel of a convolution, (D, 3, P, P)."""
    patch = math.isqrt(weight.shape[1] // 3)
    return rearrange(weight, "d (c p q) -> d c p q", c=3, p=patch).contiguous()


def block_state(take, block, scale, mlp):
    """A block's state dict by transformers' names; `scale` and `mlp`: what the model there calls LayerScale and MLP."""
    q, k, v = take(f"{block}.attn.qkv.weight").chunk(3)
    state = {
        "attention.q_proj.weight": q,
        "attention.q_proj.bias": take(f"{block}.attn.q_bias"),
        "attention.k_proj.weight": k,
        "attention.v_proj.weight": v,
        "attention.v_proj.bias": take(f"{block}.attn.v_bias"),
        f"{scale}_1": take(f"{block}.scale1"),
        f"{scale}_2": take(f"{block}.scale2"),
    }
    for theirs, ours in {
        "attention.o_proj": "attn.proj",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        f"{mlp}.fc1": "mlp.fc1",
        f"{mlp}.fc2": "mlp.fc2",
    }.items():
        state[f"{theirs}.weight"] = take(f"{block}.{ours}.weight")
        state[f"{theirs}.bias"] = take(f"{block}.{ours}.bias")
    return state


# ----------------------------------------------------------------------------------------------------------------
# The command. Each function that writes a folder reads it back and returns pairs of what it computes and what the
# encoder's own forward computes from the same random images: none where the library to read it is not installed.


@dataclass
class Export:
    """Write the encoder of a checkpoint in the form of another library, and measure how exact it is.

    examples:
      python convert.py --checkpoint runs/mine --to beit --output runs/mine-beit
      python convert.py --checkpoint cae_base.pth --to onnx --output runs/cae-onnx
    """

    checkpoint: str
    """Run folder; model/ folder; Hub id; released .pth, also owner/name::path."""
    to: Literal["beit", "timm", "onnx", "lw-detr"]
    """transformers' BEiT; timm's Beit; an ONNX graph for any image size; the backbone of transformers' LW-DETR."""
    output: str
    """Folder to write: a new one, or an empty one."""
    image_size: int | None = None
    """Side of the square images that the positions are for, in pixels; an ONNX graph is only measured at it. Left out:
    the checkpoint's own."""


def write_beit(model, folder, size):
    from transformers import BeitImageProcessor

    beit = save_and_read_back(to_beit(model, size), folder)
    side = {"height": size, "width": size}
    BeitImageProcessor(
        size=side, crop_size=side, resample=3, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD  # 3: bicubic
    ).save_pretrained(folder)
    images = random_images(2, size, size)
    return [(beit(images).last_hidden_state, model.encode(images))]


def write_timm(model, folder, size):
    save_file(to_timm(model, size), folder / "model.safetensors")
    config = {
        "architecture": "beit_base_patch16_224",  # timm's name for the class: model_args has the last word
        "num_classes": 0,
        "model_args": timm_arguments(model, size),
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": (3, size, size),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    try:
        import timm
    except ImportError:
        return []
    try:
        network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except RuntimeError as error:
        raise RunError(f"timm cannot load what was written: {textwrap.shorten(str(error), 200)}") from error
    images = random_images(2, size, size)
    return [(network.forward_features(images), model.encode(images))]


def write_onnx(model, folder, size):
    to_onnx(model, folder / "model.onnx")
    try:
        import onnxruntime
    except ImportError:
        return []
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    pairs = []
    for images in (random_images(2, size, size), random_images(1, size, size + model.config.patch_size)):
        (tokens,) = session.run(["tokens"], {"images": images.numpy()})
        pairs.append((torch.from_numpy(tokens), model.encode(images)))
    return pairs


def write_lw_detr(model, folder, size):
    backbone = save_and_read_back(to_lw_detr(model, size), folder)
    encoder = copy.deepcopy(model.encoder)  # without class token and final LayerNorm
    encoder.blocks[0].register_forward_pre_hook(lambda block, args: (args[0][:, 1:], *args[1:]))
    encoder.norm = nn.Identity()
    images = random_images(2, size, size)
    (features,) = backbone(images).feature_maps                                          # (B, D, rows, columns)
    return [(features.flatten(2).mT, encoder(images))]                                   # (B, N, D) twice


def save_and_read_back(network, folder):
    """save_pretrained, then from_pretrained, without progress bars."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    network.save_pretrained(folder)
    return type(network).from_pretrained(folder).eval()


def random_images(batch, height, width):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def compare(pairs, what):
    """The largest difference of theirs and ours, and ours' largest value. Raises RunError where they are not the same
    but for rounding."""
    for theirs, ours in pairs:
        if theirs.shape != ours.shape:
            raise RunError(f"read back, {what} gives {tuple(theirs.shape)}, not {tuple(ours.shape)}: not written")
    difference = max((theirs - ours).abs().max().item() for theirs, ours in pairs)
    largest = max(ours.abs().max().item() for _, ours in pairs)
    if not difference <= 1e-3 * max(largest, 1.0):  # rounding is a thousandth of this
        raise RunError(f"read back, {what} is {difference:.1e} off: not written")
    return difference, largest


@torch.no_grad()
def export(args):
    """Write the folder that `args`, an Export, asks for, and print one line about it.

    The folder gets its name when it is complete and measured, or never.
    Raises: ValueError, OSError, ImportError, with one line, for what `args` ask for; RunError if the folder, read
    back, computes something else than the checkpoint.
    """
    output = Path(args.output).expanduser().resolve()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"--output {args.output} exists and is no empty folder: name another, or remove it")
    model = load_model(args.checkpoint)
    size = square_size(model, args.image_size)
    if not model.encode(random_images(1, size, size)).isfinite().all():
        raise ValueError(f"--checkpoint {args.checkpoint} is damaged: what it computes is not finite")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside = tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent)
    except OSError as error:
        raise OSError(f"--output {args.output} cannot be written: {error.strerror}") from error
    temporary_folders.add(aside.name)
    with aside:
        folder = Path(aside.name) / output.name
        folder.mkdir()
        write = {"beit": write_beit, "timm": write_timm, "onnx": write_onnx, "lw-detr": write_lw_detr}[args.to]
        pairs = write(model, folder, size)
        if pairs:
            difference, largest = compare(pairs, f"the {args.to} of {args.checkpoint}")
        publish(folder, output)
    wrote = {"beit": "a transformers BeitModel", "timm": "weights and arguments of timm's Beit",
             "onnx": "an ONNX graph, model.onnx", "lw-detr": "a transformers LwDetrViTBackbone"}[args.to]  # fmt: skip
    if pairs:
        message = (f"read back, it differs from the checkpoint by {difference:.1e} at most (random images of "
                   f"{size} x {size} pixels, outputs up to {largest:.1f})")  # fmt: skip
    else:
        message = f"not read back, which needs pip install {'timm' if args.to == 'timm' else 'onnxruntime'}"
    if args.to == "timm":
        message += f'; load it with timm.create_model("local-dir:{args.output}", pretrained=True)'
    print(printable(f"wrote {args.output}, {wrote}: {message}"))


def main():
    from engine.arguments import require_possible

    import tyro

    args = tyro.cli(Export)

    def work():
        require_possible(vars(args))
        try:
            export(args)
        except (ValueError, OSError, ImportError) as error:
            raise UserError(" ".join(str(error).split())) from error  # one line, also of a library's error

    command_line(work)


if __name__ == "__main__":
    main()
