"""Checkpoints go to Hugging Face and timm and come back, bit for bit; what cannot is said."""

import json
import sys
from dataclasses import dataclass, replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exports import about
from flax import linen as nn
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sslx.export import directory as directories
from sslx.export import hf, keymaps, timm
from sslx.export.architectures import resnet as resnet_tables
from sslx.export.architectures import vit as vit_tables
from sslx.models.encoder import Applied, Encoder, Signature, encoder
from sslx.models.resnet import BASIC, BOTTLENECK, CIFAR_STEM, ResNet, resnet
from sslx.models.vit import ViT, vit
from sslx.objectives.base import Objective
from sslx.objectives.mae import MAE, Decoder
from sslx.views import IMAGENET

SIDE = 24
TINY = MAE(ViT(32, 3, 4, 8), Decoder(16, 2, 2, mlp_ratio=3.0), ratio=0.6)
INFO = {"missing_keys", "unexpected_keys", "mismatched_keys"}


def spread(objective, side=(SIDE, SIDE), channels=3, seed=0):
    """Params with nothing at zero or one."""
    r = np.random.default_rng(seed)
    batch = {"image": jax.ShapeDtypeStruct((1, *side, channels), jnp.float32)}
    shapes, _ = nn.unbox(jax.eval_shape(objective.init, jax.random.key(0), batch))
    return jax.tree.map(lambda x: r.normal(0.1, 0.2, x.shape).astype(np.float32), shapes)


def encoder_of(objective, params, buffers):
    return objective.encoders(params, buffers)["encoder"]


def equal(a, b):
    a, b = flatten_dict(a, sep="/"), flatten_dict(b, sep="/")
    return set(a) == set(b) and all(
        a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a
    )


def rebuilt(checkpoint):
    return MAE(**{path.removeprefix("objective."): x for path, x in checkpoint.parts.items()})


@pytest.fixture
def saved(tmp_path):
    """A directory with TINY's export, and its params."""
    params = spread(TINY)
    hf.save(TINY, params, {}, tmp_path, about(SIDE))
    return tmp_path, params


def edit(directory, config=(), arrays=lambda x: x):
    """Change an export's config and its arrays in place; a field of ... is taken out."""
    path = directory / "config.json"
    edited = json.loads(path.read_text()) | dict(config)
    path.write_text(json.dumps({name: x for name, x in edited.items() if x is not ...}))
    path = directory / "model.safetensors"
    save_file(arrays(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("objective", "channels"),
    [
        (TINY, 3),
        (replace(TINY, normalize=False, encoder=vit("mu", 4, mlp_ratio=1.1)), 1),
        (MAE(ViT(44, 1, 2, 4, mlp_ratio=49.5 / 44), Decoder(8, 1, 2)), 2),  # 44 * (49 / 44) < 49
    ],
)
def test_ours_to_theirs_and_back(objective, channels, tmp_path):
    params = spread(objective, channels=channels)
    hf.save(objective, params, {}, tmp_path, about(SIDE))
    loaded = hf.read(tmp_path)
    assert equal(params, loaded.params)
    again = rebuilt(loaded)
    assert equal(params, spread(again, channels=channels))  # the same shapes, filled the same way
    assert (again.ratio, again.normalize) == (objective.ratio, objective.normalize)
    hf.save(again, loaded.params, {}, tmp_path / "again", about(SIDE))
    for name in ("model.safetensors", "encoder/model.safetensors", "encoder/config.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_an_encoder_alone_comes_back(saved):
    """A ViTModel, with a pooler that is not read."""
    directory, params = saved
    more = {"pooler.dense.weight": np.ones((32, 32), np.float32)}
    edit(directory / "encoder", arrays=lambda arrays: arrays | more)
    loaded = hf.read(directory / "encoder")
    assert loaded.parts == {"objective.encoder": TINY.encoder}
    assert equal(loaded.params, {"encoder": params["encoder"]})


def test_a_bfloat16_model_is_exported_in_float32(saved):
    directory, params = saved
    half = replace(TINY, encoder=TINY.encoder.clone(dtype=jnp.bfloat16))
    hf.save(half, jax.tree.map(jnp.asarray, params), {}, directory / "half", about(SIDE))
    arrays = load_file(directory / "half" / "model.safetensors")
    assert {a.dtype for a in arrays.values()} == {np.dtype(np.float32)}
    assert equal(hf.read(directory / "half").params, params)


def newer_spelling(arrays):
    """What transformers 5 writes."""
    old, new = "decoder.decoder_layers.", "decoder.decoder_encoder.layer."
    return {name.replace(old, new): a for name, a in arrays.items()}


def bare_spelling(arrays):
    return {name.removeprefix("vit."): a for name, a in arrays.items()}


@pytest.mark.parametrize("spelling", [newer_spelling, bare_spelling])
def test_other_spellings(saved, spelling):
    directory, params = saved
    edit(directory, arrays=spelling)
    assert equal(hf.read(directory).params, params)


def test_half_precision_and_shards(saved):
    directory, params = saved
    arrays = load_file(directory / "model.safetensors")
    half = {name: a.astype(jnp.bfloat16) for name, a in arrays.items()}
    where = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(half)}
    for file in set(where.values()):
        save_file({n: a for n, a in half.items() if where[n] == file}, directory / file)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(np.float32), params)
    assert equal(hf.read(directory).params, rounded)


def drop(name):
    return lambda arrays: {n: a for n, a in arrays.items() if n != name}


def learned(name):
    return lambda arrays: arrays | {name: arrays[name][:, :, ::-1].copy()}


LAST = "decoder.decoder_pred.bias"
TABLE = "vit.embeddings.position_embeddings"


@pytest.mark.parametrize(
    ("config", "arrays", "said"),
    [
        ({"model_type": "swin"}, dict, "model_type='swin'.*only vit_mae"),
        ({"hidden_act": "gelu_new"}, dict, "hidden_act='gelu_new'.*computes 'gelu'"),
        ({"qkv_bias": False}, dict, "qkv_bias=False"),
        ({"layer_norm_eps": 1e-5}, dict, "layer_norm_eps=1e-05.*computes 1e-06"),
        ({"image_size": [24, 32]}, dict, r"square images.*\[24, 32\]"),
        ({"patch_size": 7}, dict, "patches of 7"),
        ({"num_hidden_layers": 4}, dict, r"lacks vit\.encoder\.layer\.3\..* and 12 more"),
        ({"num_hidden_layers": 2}, dict, r"has vit\.encoder\.layer\.2\..*unknown"),
        ({"decoder_hidden_size": 8}, dict, "sin-cos"),
        ({"num_attention_heads": 5}, dict, "weight has shape.*h=5.*another model"),
        ({"num_channels": 1}, dict, r"projection.weight has shape \[32, 3, 8, 8\].*c=1"),
        ({"image_size": 32}, dict, r"\[1, 10, 32\] is not MAE's fixed sin-cos table \[1, 17, 32\]"),
        ({}, drop(LAST), f"lacks {LAST}"),
        ({"mask_ratio": ...}, dict, "lacks mask_ratio"),
        ({}, lambda x: x | {"classifier.bias": x[LAST]}, "has classifier.bias"),
        ({}, learned(TABLE), f"{TABLE}.*learned or resized"),
    ],
)
def test_what_cannot_be_imported_is_said(saved, config, arrays, said):
    directory, _ = saved
    edit(directory, config, arrays)
    with pytest.raises(ValueError, match=f"(?s){said}"):
        hf.read(directory)


def test_the_epsilon_of_transformers_conversions_passes(saved):
    directory, params = saved
    edit(directory, {"layer_norm_eps": 1e-12})
    assert equal(hf.read(directory).params, params)


def test_files_that_are_not_a_checkpoint(saved):
    directory, _ = saved
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"not whole.*download"):
        hf.read(directory)
    weights.rename(directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*pickle.*safe_serialization"):
        hf.read(directory)
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        hf.read(directory)
    with pytest.raises(ValueError, match="missing: give the directory"):
        hf.read(directory / "nowhere")


@dataclass(frozen=True)
class Other(Objective):
    """A method of another lab (arXiv:1234.56789)."""

    encoder: nn.Module

    def init(self, key, batch):
        return {"encoder": self.encoder.init(key, batch["image"])["params"]}, {}

    def loss(self, params, buffers, batch, key, step):
        raise NotImplementedError

    def encoders(self, params, buffers):
        variables, reads = {"params": params["encoder"]}, Signature(("image",), prefix=1)
        return {"encoder": Encoder(variables, Applied(self.encoder), reads)}


def test_models_that_the_formats_do_not_express(tmp_path):
    params = spread(TINY)
    with pytest.raises(ValueError, match=r"square.*\(24, 32\).*--format timm"):
        hf.save(TINY, params, {}, tmp_path, about((24, 32)))
    with pytest.raises(ValueError, match=r"Only ViT, .*this encoder is Dense"):
        hf.save(Other(nn.Dense(4)), {"encoder": {}}, {}, tmp_path, about(SIDE))
    with pytest.raises(ValueError, match="images of 3 channels"):
        hf.save(TINY, params, {}, tmp_path, about(SIDE, ((0.5,), (0.5,))))
    with pytest.raises(ValueError, match=r"registers stand in"):
        more = params | {"encoder": params["encoder"] | {"registers": np.zeros(3)}}
        hf.save(TINY, more, {}, tmp_path, about(SIDE))
    with pytest.raises(ValueError, match="do not divide"):
        timm.save(TINY, params, {}, tmp_path / "x.safetensors", about(23))
    assert not list(tmp_path.iterdir())


def test_another_method_exports_its_encoder_alone(tmp_path):
    objective = Other(TINY.encoder)
    hf.save(objective, spread(objective), {}, tmp_path, about(SIDE))
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]
    assert "[arXiv:1234.56789](https://" in (tmp_path / "encoder" / "README.md").read_text()


def test_what_stands_beside_the_weights(tmp_path):
    told = {"step": 1200, "recipe": "objective = MAE(...)", "numbers": {"knn/top1": 0.9123456}}
    hf.save(TINY, spread(TINY), {}, tmp_path, about(SIDE, IMAGENET, **told))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["mask_ratio"] == 0.6 and config["norm_pix_loss"] is True
    assert config["layer_norm_eps"] == 1e-6 and config["decoder_intermediate_size"] == 48
    text = (tmp_path / "README.md").read_text()
    for words in ("MAE", "arxiv.org/abs/2111.06377", "step 1200", "| knn/top1 | 0.912346 |"):
        assert words in text
    assert text.rstrip().endswith("objective = MAE(...)\n```")
    for directory in (tmp_path, tmp_path / "encoder"):
        seen = json.loads((directory / "preprocessor_config.json").read_text())
        assert seen["image_mean"] == list(IMAGENET[0]) and seen["size"]["height"] == SIDE


RECIPE = """\
data.source = 'folder:/srv/me/My Data/train'
test.source = 'text:/a/b/*.txt?tokenizer=~me/R&D/words'
start.source = "/srv/me/it's"
far.source = 'gs://bucket/x'
near.source = 'windows/train'
no_decay = '.*/(bias|scale)'
resize = (('(.*/)?position/table', extended),)
path = PosixPath('/srv/me')
"""


def test_a_card_leaves_out_local_paths(tmp_path):
    hf.save(TINY, spread(TINY), {}, tmp_path, about(SIDE, recipe=RECIPE))
    for name in ("README.md", "encoder/README.md"):
        card = (tmp_path / name).read_text()
        assert not [x for x in ("srv", "/b/", "R&D", "me/", "it's", "My Data") if x in card]
        kept = ("'folder:(a local path)'", "'text:(a local path)?tokenizer=(a local path)'")
        kept += ("gs://bucket/x", "windows/train", ".*/(bias|scale)", "(.*/)?position/table")
        assert all(x in card for x in kept), card


def test_a_card_says_that_pictures_are_gray(tmp_path):
    for channels in (1, 3):
        about_it = replace(about(SIDE), shapes={"image": (1, SIDE, SIDE, channels)})
        hf.save(TINY, spread(TINY, channels=channels), {}, tmp_path, about_it)
        assert ('picture.convert("L")' in (tmp_path / "README.md").read_text()) == (channels == 1)


# ---- whole or not at all ----


def failing(write, at):
    """`write`, whose call number `at` leaves half of a file and fails as on a full disk."""
    calls = []

    def half(arrays, path, **options):
        calls.append(path)
        if len(calls) == at:
            path.write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        write(arrays, path, **options)

    return half


def files_in(directory):
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@pytest.mark.parametrize(("format", "at"), [("hf", 1), ("hf", 2), ("timm", 1)])
def test_what_fails_half_way_leaves_nothing(format, at, tmp_path, monkeypatch):
    """Neither a new directory nor a change in one that is there."""
    params, save = spread(TINY), {"hf": hf, "timm": timm}[format].save
    save(TINY, params, {}, tmp_path / "old", about(SIDE))
    (tmp_path / "old" / "mine.txt").touch()
    before = files_in(tmp_path)
    for out in ("old", "new/deep"):
        monkeypatch.setattr(directories, "save_file", failing(save_file, at))
        with pytest.raises(OSError, match=rf"{out} could not be written \(.*No space.*make room"):
            save(TINY, jax.tree.map(lambda x: x + 1, params), {}, tmp_path / out, about(SIDE))
        assert files_in(tmp_path) == before and len(list(tmp_path.iterdir())) == 1


def test_a_directory_that_is_there_is_written_over(tmp_path):
    params, other = spread(TINY), spread(TINY, seed=1)
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "mine.txt").touch()
    for arrays in (params, other):
        hf.save(TINY, arrays, {}, tmp_path, about(SIDE))
    assert equal(hf.read(tmp_path).params, other)
    assert equal(hf.read(tmp_path / "encoder").params, {"encoder": other["encoder"]})
    assert {path.name for path in tmp_path.iterdir()} == {
        *("README.md", "config.json", "encoder", "model.safetensors")
    }
    assert (tmp_path / "encoder" / "mine.txt").exists()


def test_out_is_a_file(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(OSError, match="x could not be written"):
        hf.save(TINY, spread(TINY), {}, tmp_path / "x", about(SIDE))
    assert files_in(tmp_path) == {"x": b"mine"}


def test_timm_file_holds_the_encoder_alone(tmp_path):
    timm.save(TINY, spread(TINY), {}, tmp_path / "deep" / "vit.safetensors", about((SIDE, 40)))
    arrays = load_file(tmp_path / "deep" / "vit.safetensors")
    assert not [name for name in arrays if "mask" in name or "decoder" in name]
    assert arrays["pos_embed"].shape == (1, 1 + 3 * 5, 32) and not arrays["pos_embed"][0, 0].any()


@pytest.mark.parametrize("table", [*vit_tables.HF_MAE.values(), vit_tables.TIMM_VIT])
def test_tables_name_every_array_once(table):
    of = vit_tables.sizes(TINY.encoder, 8, 3, 32)
    paths = [path for path, _, _ in table]
    names = [n for _, name, _ in table for n in keymaps.names(name, of)]
    assert len(set(paths)) == len(paths) and len(set(names)) == len(names)


def features(objective, params, image):
    """Our tokens, in float32 at full precision."""
    with jax.default_matmul_precision("highest"):
        return tokens_of(objective, params, {}, image)


def seen_by_torch(image):
    import torch

    return torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))


@pytest.fixture
def transformers():
    reason = "NOT CHECKED: that transformers opens what sslx exports (pip install sslx[hf])"
    pytest.importorskip("torch", reason=reason)
    return pytest.importorskip("transformers", reason=reason)


def test_transformers_opens_both(transformers, saved):
    import torch

    directory, params = saved
    image = np.random.default_rng(1).normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)
    whole, info = transformers.ViTMAEForPreTraining.from_pretrained(
        directory, output_loading_info=True
    )
    assert set(info) >= INFO and not any(info.values())
    tables = whole.vit.embeddings.position_embeddings, whole.decoder.decoder_pos_embed
    for table, width in zip(tables, (32, 16), strict=True):
        assert np.array_equal(table.detach().numpy(), vit_tables.positions(3, 3, width))
    model, info = transformers.ViTModel.from_pretrained(
        directory / "encoder", add_pooling_layer=False, output_loading_info=True
    )
    assert set(info) >= INFO and not any(info.values())
    with torch.no_grad():
        tokens = model.eval()(seen_by_torch(image)).last_hidden_state.numpy()
    np.testing.assert_allclose(features(TINY, params, image), tokens, rtol=0, atol=1e-4)


def test_transformers_saves_and_we_load(transformers, saved):
    directory, params = saved
    model = transformers.ViTMAEForPreTraining.from_pretrained(directory)
    model.save_pretrained(directory / "theirs")
    theirs = hf.read(directory / "theirs")
    assert equal(theirs.params, params) and rebuilt(theirs) == TINY
    model.save_pretrained(directory / "sharded", max_shard_size="20KB")
    assert (directory / "sharded" / "model.safetensors.index.json").is_file()
    assert equal(hf.read(directory / "sharded").params, params)


def test_transformers_prepares_images_as_we_do(transformers, tmp_path):
    hf.save(TINY, spread(TINY), {}, tmp_path, about(SIDE, IMAGENET))
    image = np.random.default_rng(2).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    seen = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    mean, std = (np.asarray(s) for s in IMAGENET)
    np.testing.assert_allclose(seen, (image / 255 - mean) / std, atol=1e-5)


# timm needs torchvision to import, for its data loading, and torchvision has no wheel for every
# torch: where it is absent it is imitated while timm is imported, and left absent afterwards.
TORCHVISION = [
    *("torchvision", "torchvision.datasets", "torchvision.models", "torchvision.ops"),
    *("torchvision.models.feature_extraction", "torchvision.ops.misc", "torchvision.transforms"),
    "torchvision.transforms.functional",
]


@pytest.fixture
def pytorch_image_models(monkeypatch):
    reason = "NOT CHECKED: that timm opens what sslx exports (pip install sslx[hf])"
    pytest.importorskip("torch", reason=reason)
    with monkeypatch.context() as patch:
        try:
            import torchvision  # noqa: F401
        except (ImportError, RuntimeError):
            for name in TORCHVISION:
                patch.setitem(sys.modules, name, mock.MagicMock())
        return pytest.importorskip("timm", reason=reason)


def test_transformers_prepares_gray_images_as_the_card_says(transformers, tmp_path):
    import PIL.Image

    about_it = replace(about(SIDE, ((0.3,), (0.37,))), shapes={"image": (1, SIDE, SIDE, 1)})
    hf.save(TINY, spread(TINY, channels=1), {}, tmp_path, about_it)
    color = np.random.default_rng(2).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    gray = PIL.Image.fromarray(color).convert("L")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    seen = processor(gray, return_tensors="np")["pixel_values"]
    expected = (np.asarray(gray)[None, None] / 255 - 0.3) / 0.37
    np.testing.assert_allclose(seen, expected, atol=1e-5)


def test_timm_opens_a_named_model(pytorch_image_models, tmp_path):
    import torch

    objective = Other(vit("Ti", 16))
    params = jax.tree.map(lambda x: x / 4, spread(objective, (224, 224)))
    timm.save(objective, params, {}, tmp_path / "ti.safetensors", about(224))
    model = pytorch_image_models.create_model(
        "vit_tiny_patch16_224", num_classes=0, checkpoint_path=str(tmp_path / "ti.safetensors")
    )
    image = np.random.default_rng(3).normal(size=(1, 224, 224, 3)).astype(np.float32)
    with torch.no_grad():
        tokens = model.eval().forward_features(seen_by_torch(image)).numpy()
    np.testing.assert_allclose(features(objective, params, image), tokens, rtol=0, atol=1e-4)


def test_timm_opens_any_size_strictly(pytorch_image_models, tmp_path):
    import torch

    side, params = (SIDE, 40), spread(TINY)
    timm.save(TINY, params, {}, tmp_path / "tiny.safetensors", about(side))
    model = pytorch_image_models.models.VisionTransformer(
        side, 8, 3, num_classes=0, embed_dim=32, depth=3, num_heads=4
    )
    arrays = load_file(tmp_path / "tiny.safetensors")
    model.load_state_dict({n: torch.from_numpy(a) for n, a in arrays.items()}, strict=True)
    image = np.random.default_rng(4).normal(size=(2, *side, 3)).astype(np.float32)
    with torch.no_grad():
        tokens = model.eval().forward_features(seen_by_torch(image)).numpy()
    np.testing.assert_allclose(features(TINY, params, image), tokens, rtol=0, atol=1e-4)


# ---- ResNet: params and batch statistics ----

SMALL = [ResNet(BASIC, (1, 2), 8), ResNet(BOTTLENECK, (2, 1), 8)]


@dataclass(frozen=True)
class Stateful(Objective):
    """A method whose encoder has batch statistics (arXiv:1234.56789)."""

    encoder: nn.Module

    def init(self, key, batch):
        variables = self.encoder.init(key, batch["image"])
        return {"encoder": variables["params"]}, {"stats": variables["batch_stats"]}

    def loss(self, params, buffers, batch, key, step):
        raise NotImplementedError

    def encoders(self, params, buffers):
        variables = {"params": params["encoder"], "batch_stats": buffers["stats"]}
        return {"encoder": encoder(self.encoder, variables)}


def filled(objective, channels=3, seed=0):
    """Params and buffers with nothing at zero or one, and activations of moderate size."""
    r = np.random.default_rng(seed)
    batch = {"image": jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)}
    shapes = nn.unbox(jax.eval_shape(objective.init, jax.random.key(0), batch))

    def drawn(x):
        if len(x.shape) == 4:
            return r.normal(0, np.sqrt(2 / np.prod(x.shape[:3])), x.shape).astype(np.float32)
        return r.uniform(0.5, 1.5, x.shape).astype(np.float32)

    return jax.tree.map(drawn, shapes)


def tokens_of(objective, params, buffers, image):
    return np.asarray(
        jax.jit(Encoder.__call__)(encoder_of(objective, params, buffers), {"image": image})[0]
    )


def variables_of(checkpoint):
    """A ResNet's, as Linen has them."""
    stats = checkpoint.buffers["stats"]["batch_stats"]["encoder"]
    return {"params": checkpoint.params["encoder"], "batch_stats": stats}


def flat_tokens(output):
    """[B, C, H, W] -> [B, N, D]."""
    return output.flatten(2).transpose(1, 2).numpy()


@pytest.mark.parametrize("encoder", SMALL)
def test_a_resnet_goes_out_and_comes_back(encoder, tmp_path):
    objective = Stateful(encoder)
    params, buffers = filled(objective, channels=4)
    hf.save(objective, params, buffers, tmp_path, about((SIDE, 40)))
    loaded = hf.read(tmp_path / "encoder")
    assert loaded.parts == {"objective.net.encoder": encoder}
    assert equal(
        variables_of(loaded), {"params": params["encoder"], "batch_stats": buffers["stats"]}
    )
    stats = loaded.buffers["stats"]["batch_stats"]["encoder"]
    hf.save(objective, loaded.params, {"stats": stats}, tmp_path / "again", about((SIDE, 40)))
    for name in ("model.safetensors", "config.json"):
        file = tmp_path / "encoder" / name
        assert file.read_bytes() == (tmp_path / "again" / "encoder" / name).read_bytes()


@pytest.mark.parametrize("table", [resnet_tables.hf_resnet, resnet_tables.timm_resnet])
@pytest.mark.parametrize("depth", [18, 50])
def test_resnet_tables_name_every_array_once(table, depth):
    objective = Stateful(resnet(depth))
    params, buffers = filled(objective)
    variables = encoder_of(objective, params, buffers).variables
    rows = table(objective.encoder)
    assert {path for path, _, _ in rows} == set(flatten_dict(variables, sep="/"))
    assert len({name for _, name, _ in rows}) == len(rows)


def test_what_a_resnet_s_export_says(tmp_path):
    cifar = Stateful(resnet("mu", stem=CIFAR_STEM))
    params, buffers = filled(cifar)
    with pytest.raises(ValueError, match=r"ImageNet's stem only, not Stem\(.*--format timm"):
        hf.save(cifar, params, buffers, tmp_path, about(SIDE))
    with pytest.raises(ValueError, match="images of 3 channels"):
        objective = Stateful(resnet("mu"))
        hf.save(objective, *filled(objective), tmp_path, about(SIDE, ((0.5,), (0.5,))))
    assert not list(tmp_path.iterdir())
    objective = Stateful(SMALL[1])
    params, buffers = filled(objective)
    hf.save(objective, params, buffers, tmp_path, about((SIDE, 40), IMAGENET))
    text = (tmp_path / "encoder" / "README.md").read_text()
    for words in ("# ResNet pretrained with Stateful", "[2, 1] blocks (bottleneck)", "resnet]"):
        assert words in text
    seen = json.loads((tmp_path / "encoder" / "preprocessor_config.json").read_text())
    assert seen["size"] == {"height": SIDE, "width": 40}


FIRST = "embedder.embedder.convolution.weight"
VARIANCE = "embedder.embedder.normalization.running_var"


@pytest.mark.parametrize(
    ("config", "arrays", "said"),
    [
        ({"model_type": "regnet"}, dict, "model_type='regnet'.*only .*resnet"),
        ({"hidden_act": "gelu"}, dict, "hidden_act='gelu'.*computes 'relu'"),
        ({"downsample_in_bottleneck": True}, dict, "downsample_in_bottleneck=True"),
        ({"hidden_sizes": [32, 48]}, dict, r"hidden_sizes=\[32, 48\].*double.*\[32, 64\]"),
        ({"depths": [2, 2]}, dict, r"lacks encoder\.stages\.1\.layers\.1.* more"),
        ({"num_channels": 1}, dict, r"params/conv/kernel \[7, 7, 3, 8\] and not \[7, 7, 1, 8\]"),
        ({}, drop(VARIANCE), f"lacks {VARIANCE}"),
        ({}, lambda x: x | {"head.bias": x[FIRST]}, "has head.bias, unknown to a ResNet"),
    ],
)
def test_what_resnet_cannot_be_imported_is_said(config, arrays, said, tmp_path):
    objective = Stateful(SMALL[1])
    params, buffers = filled(objective)
    hf.save(objective, params, buffers, tmp_path, about(SIDE))
    edit(tmp_path / "encoder", config, arrays)
    with pytest.raises(ValueError, match=f"(?s){said}"):
        hf.read(tmp_path / "encoder")


@pytest.mark.parametrize("encoder", SMALL)
def test_transformers_opens_a_resnet(transformers, encoder, tmp_path):
    import torch

    objective = Stateful(encoder)
    params, buffers = filled(objective)
    hf.save(objective, params, buffers, tmp_path, about(SIDE))
    model, info = transformers.ResNetModel.from_pretrained(
        tmp_path / "encoder", output_loading_info=True
    )
    assert set(info) >= INFO and not any(info.values())
    image = np.random.default_rng(1).normal(size=(2, 33, 47, 3)).astype(np.float32)
    with torch.no_grad():
        expected = flat_tokens(model.eval()(seen_by_torch(image)).last_hidden_state)
    ours = tokens_of(objective, params, buffers, image)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * expected.max())
    classifier = transformers.ResNetForImageClassification(model.config)
    classifier.resnet = model
    classifier.save_pretrained(tmp_path / "theirs")
    loaded = variables_of(hf.read(tmp_path / "theirs"))
    assert equal(loaded, encoder_of(objective, params, buffers).variables)


@pytest.mark.parametrize(
    ("name", "objective"),
    [("resnet18", Stateful(resnet(18))), ("resnet50", Stateful(resnet(50)))],
)
def test_timm_opens_a_named_resnet(pytorch_image_models, name, objective, tmp_path):
    import torch

    params, buffers = filled(objective)
    timm.save(objective, params, buffers, tmp_path / "x.safetensors", about(65))
    arrays = load_file(tmp_path / "x.safetensors")
    model = pytorch_image_models.create_model(name, num_classes=0)
    tensors = {n: torch.from_numpy(a) for n, a in arrays.items()}
    assert set(tensors) == set(model.state_dict())  # num_batches_tracked too
    assert arrays["bn1.num_batches_tracked"].dtype == np.int64
    model.load_state_dict(tensors, strict=True)
    image = np.random.default_rng(3).normal(size=(1, 65, 47, 3)).astype(np.float32)
    with torch.no_grad():
        expected = flat_tokens(model.eval().forward_features(seen_by_torch(image)))
    ours = tokens_of(objective, params, buffers, image)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * expected.max())


def test_timm_opens_cifar_s_stem_in_place_of_its_own(pytorch_image_models, tmp_path):
    import torch

    objective = Stateful(resnet(18, stem=CIFAR_STEM))
    params, buffers = filled(objective)
    timm.save(objective, params, buffers, tmp_path / "x.safetensors", about(32))
    model = pytorch_image_models.create_model("resnet18", num_classes=0)
    model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = torch.nn.Identity()
    arrays = load_file(tmp_path / "x.safetensors")
    model.load_state_dict({n: torch.from_numpy(a) for n, a in arrays.items()}, strict=True)
    image = np.random.default_rng(3).normal(size=(1, 17, 13, 3)).astype(np.float32)
    with torch.no_grad():
        expected = flat_tokens(model.eval().forward_features(seen_by_torch(image)))
    ours = tokens_of(objective, params, buffers, image)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * expected.max())
