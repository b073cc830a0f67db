"""One training step, sslx beside a peer: seconds, examples per second, ratio.

    python tests/benchmarks/step.py [mae|simclr|byol] [--variant S] [--size 224] [--batch 32]
        [--dtype float32] [--device cpu|gpu] [--rounds 5] [--contenders sslx,eager,compiled]
    python tests/benchmarks/step.py bert [--variant base] [--length 128] [--dropout 0.1]

Each contender lives in a process of its own. Rounds alternate: in each, every contender in turn
takes `--steps` steps while the others sleep. Medians over rounds; ratio is the peer's time by
ours, so above 1 sslx is the faster. FLOPs are those of matrix products, three times the forward
pass; their share of peak is printed where the device's peak is known.

A row is an entry of ROWS: contenders by name, each a function of the arguments that returns
`step()`, which runs one whole step and waits for it, and the FLOPs of a step or None.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time

# bf16 TFLOP/s of matrix products, by what jax calls the device
PEAK = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250}


# ---- MAE ----


def sslx_mae(args):
    """The step on float images at their final size: what the peers do."""
    from sslx.views import Chain, Views

    return sslx_step(args, mae_of(args), Ready(args.size), Views(Chain(()), Chain(())))


def sslx_mae_views(args):
    """The real step: random resized crops of uint8 canvases, flipped and normalized, inside."""
    from sslx import views
    from sslx.data.image import Image

    return sslx_step(args, mae_of(args), Image(256), views.mae(args.size))


def mae_of(args):
    import jax.numpy as jnp

    from sslx.models.vit import vit
    from sslx.objectives.mae import MAE, Decoder

    fields = {"dtype": getattr(jnp, args.dtype), "remat": args.remat}
    return MAE(vit(args.variant, args.patch, **fields), Decoder(*sizes(args.decoder), **fields))


def sizes(text):
    """Width, depth, heads."""
    return tuple(map(int, text.split("x")))


def sslx_step(args, objective, decode, views, optimizer=None):
    import functools

    import jax
    import numpy as np

    from sslx.config import Config
    from sslx.data.pipeline import Pipeline
    from sslx.engine import jitted_step
    from sslx.ops.flops import flops
    from sslx.optim import AdamW
    from sslx.schedules import Constant
    from sslx.sharding import batch_sharding
    from sslx.state import fresh_state, new_key

    config = Config(
        objective=objective,
        data=Pipeline("never opened", decode),
        views=views,
        optimizer=optimizer or AdamW(Constant(1.5e-4), b2=0.95, weight_decay=0.05),
        steps=1,
        batch_size=args.batch,
    )
    mesh = config.mesh.build()
    rng = np.random.default_rng(0)
    batch = {}
    whole = {"extent": lambda: decode.size, "segments": lambda: 1}  # canvases, windows
    for name, (shape, dtype) in config.data.shapes(args.batch).items():
        random = np.full if name in whole else rng.integers
        given = (shape, whole[name]()) if name in whole else (5, 256, shape)
        batch[name] = jax.device_put(random(*given).astype(dtype), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        state = fresh_state(config, mesh)
        work = jitted_step(config, mesh)
        loss = functools.partial(objective.loss, key=new_key(config), step=0)
        seen = jax.eval_shape(views.train, new_key(config), batch)
        forward = flops(loss, state.params, state.buffers, seen)

    def step():
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = work(state, batch)
        return float(metrics["loss"])

    return step, 3 * forward


@dataclasses.dataclass(frozen=True)
class Ready:
    """Images that need no views: a decoder for `Pipeline` that only says shapes."""

    size: int

    @property
    def shapes(self):
        return {"image": ((self.size, self.size, 3), "float32")}


def torch_mae(args, compiled=False):
    import torch
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    from sslx.models.vit import VARIANTS

    width, depth, heads = VARIANTS[args.variant]
    decoder_width, decoder_depth, decoder_heads = sizes(args.decoder)
    device = {"gpu": "cuda", "cpu": "cpu"}[args.device]
    config = ViTMAEConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=args.size,
        patch_size=args.patch,
        decoder_hidden_size=decoder_width,
        decoder_num_hidden_layers=decoder_depth,
        decoder_num_attention_heads=decoder_heads,
        decoder_intermediate_size=4 * decoder_width,
        norm_pix_loss=True,
        attn_implementation="sdpa",
    )
    model = ViTMAEForPreTraining(config).to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    image = torch.randn(args.batch, 3, args.size, args.size, device=device)
    forward = torch.compile(model) if compiled else model
    half = args.dtype == "bfloat16"

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            loss = forward(pixel_values=image).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, None


def torch_mae_compiled(args):
    return torch_mae(args, compiled=True)


# ---- SimCLR and BYOL: a step takes uint8 pictures, makes two views of each, trains on them ----


def sslx_views(args, objective, views):
    from sslx.data.image import Image
    from sslx.optim import SGD
    from sslx.schedules import Constant

    optimizer = SGD(Constant(0.03), weight_decay=5e-4, no_decay="")
    return sslx_step(args, objective, Image(canvas(args)), views, optimizer)


def sslx_simclr(args):
    from sslx import views
    from sslx.models.heads import Head
    from sslx.objectives.simclr import SimCLR

    seen = views.cifar(0.5) if args.size <= 32 else views.simclr(args.size)
    return sslx_views(args, SimCLR(siamese(args, Head((512, 128)))), seen)


def sslx_byol(args):
    from sslx import views
    from sslx.models.heads import Head
    from sslx.objectives.byol import BYOL
    from sslx.schedules import Constant

    seen = views.cifar_asymmetric() if args.size <= 32 else views.byol(args.size)
    head = Head((1024, 256))
    return sslx_views(args, BYOL(siamese(args, head, head.clone()), Constant(0.99)), seen)


def siamese(args, *heads):
    import jax.numpy as jnp

    from sslx.models.heads import Siamese
    from sslx.models.resnet import CIFAR_STEM, IMAGENET_STEM, resnet

    dtype = getattr(jnp, args.dtype)
    stem = CIFAR_STEM if args.size <= 32 else IMAGENET_STEM
    heads = (head.clone(dtype=dtype) for head in heads)
    return Siamese(resnet(args.variant, stem=stem, dtype=dtype), *heads)


def canvas(args):
    """Side of the picture that crops are cut from."""
    return args.size if args.size <= 32 else 256


class Augmented:
    """Two views of each picture by Pillow: what torchvision's transforms do, in worker processes.

    Crop, flip, brightness, contrast, saturation (hue is left out: Pillow has none), gray, blur.
    """

    def __init__(self, size, side, blur):
        import numpy as np

        pictures = np.random.default_rng(0).integers(0, 256, (512, side, side, 3))
        self.pictures, self.size, self.blur = pictures.astype("uint8"), size, blur

    def __len__(self):
        return 10**9

    def __getitem__(self, i):
        import PIL.Image
        import torch

        picture = PIL.Image.fromarray(self.pictures[i % len(self.pictures)])
        return torch.stack([self.view(picture) for _ in range(2)])

    def view(self, picture):
        import math
        import random

        import numpy as np
        import PIL.Image
        import torch
        from PIL import ImageEnhance, ImageFilter

        side = picture.size[0]
        area, aspect = random.uniform(0.08, 1) * side**2, math.exp(random.uniform(-0.288, 0.288))
        w, h = (min(side, round(math.sqrt(x))) for x in (area * aspect, area / aspect))
        x, y = random.randint(0, side - w), random.randint(0, side - h)
        picture = picture.crop((x, y, x + w, y + h)).resize((self.size,) * 2, PIL.Image.BICUBIC)
        if random.random() < 0.5:
            picture = picture.transpose(PIL.Image.FLIP_LEFT_RIGHT)
        if random.random() < 0.8:
            changes = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
            random.shuffle(changes)
            for change in changes:
                picture = change(picture).enhance(random.uniform(0.6, 1.4))
        if random.random() < 0.2:
            picture = picture.convert("L").convert("RGB")
        if random.random() < self.blur:
            picture = picture.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))
        array = np.asarray(picture, np.float32).transpose(2, 0, 1) / 255
        return torch.from_numpy((array - 0.45) / 0.25)


def torch_two_views(args, method):
    """transformers' ResNet and the method around it, fed by a DataLoader."""
    import copy

    import torch
    from torch.nn import functional as F
    from transformers import ResNetConfig, ResNetModel

    from sslx.models.resnet import BASIC, VARIANTS

    device = {"gpu": "cuda", "cpu": "cpu"}[args.device]
    kernels, depths = VARIANTS[args.variant]
    kind, wide = ("basic", 1) if kernels == BASIC else ("bottleneck", 4)
    widths = [64 * 2**i * wide for i in range(4)]
    net = ResNetModel(ResNetConfig(layer_type=kind, depths=[*depths], hidden_sizes=widths))
    if args.size <= 32:
        net.embedder.embedder.convolution = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        net.embedder.pooler = torch.nn.Identity()

    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x).pooler_output.flatten(1)

    def head(inputs, hidden, out):
        layers = (torch.nn.Linear(inputs, hidden), torch.nn.BatchNorm1d(hidden), torch.nn.ReLU())
        return torch.nn.Sequential(*layers, torch.nn.Linear(hidden, out))

    sizes = {"simclr": (512, 128), "byol": (1024, 256)}[method]
    online = torch.nn.Sequential(Pooled(), head(widths[-1], *sizes)).to(device).train()
    predictor = head(sizes[1], *sizes).to(device).train()
    slow = copy.deepcopy(online).requires_grad_(False)
    params = [*online.parameters(), *(predictor.parameters() if method == "byol" else ())]
    optimizer = torch.optim.SGD(params, 0.03, momentum=0.9, weight_decay=5e-4)
    data = Augmented(args.size, canvas(args), 0.5 if args.size > 32 else 0.0)
    workers = os.cpu_count() if args.device == "cpu" else max(1, os.cpu_count() - 1)
    loader = torch.utils.data.DataLoader(
        data, args.batch, num_workers=workers, pin_memory=args.device == "gpu", drop_last=True
    )
    batches = iter(loader)

    def simclr(views):
        z = F.normalize(online(views).float(), dim=1)
        logits = (z @ z.T / 0.1).fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, torch.arange(len(z), device=device).roll(len(z) // 2))

    def byol(views):
        one, two = views.chunk(2)
        with torch.no_grad():
            z = [F.normalize(slow(v).float(), dim=1) for v in (two, one)]
        q = [F.normalize(predictor(online(v)).float(), dim=1) for v in (one, two)]
        return sum((2 - 2 * (a * b).sum(1)).mean() for a, b in zip(q, z, strict=True))

    loss_of = {"simclr": simclr, "byol": byol}[method]

    def step():
        views = next(batches).to(device, non_blocking=True).transpose(0, 1).flatten(0, 1)
        views = views.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = loss_of(views)
        loss.backward()
        optimizer.step()
        if method == "byol":
            with torch.no_grad():
                pairs = zip(slow.parameters(), online.parameters(), strict=True)
                for still, moved in pairs:
                    still.lerp_(moved, 0.01)
        return loss.item()

    return step, None


def torch_simclr(args):
    return torch_two_views(args, "simclr")


def torch_byol(args):
    return torch_two_views(args, "byol")


# ---- BERT: 15 % of each window masked; dropout as published ----


def sslx_bert(args):
    """Masks drawn in the step; only masked places are projected to the vocabulary."""
    import math
    from dataclasses import replace

    import jax.numpy as jnp

    from sslx.models.text import BERT_FORM, MaskedLM, bert
    from sslx.objectives.mlm import MLM, Masking
    from sslx.views import Chain, Views

    form = replace(BERT_FORM, gelu="erf", dropout=args.dropout, attention_dropout=args.dropout)
    fields = {"form": form, "dtype": getattr(jnp, args.dtype), "remat": args.remat}
    objective = MLM(
        MaskedLM(bert(args.variant, **fields)), Masking(most=math.ceil(0.15 * args.length))
    )
    return sslx_step(args, objective, Windows(args.length), Views(Chain(()), Chain(())))


@dataclasses.dataclass(frozen=True)
class Windows:
    """Whole windows of one document: a decoder for `Pipeline` that only says shapes."""

    length: int

    @property
    def shapes(self):
        return dict.fromkeys(("tokens", "segments"), ((self.length,), "int32"))


def torch_bert(args, compiled=False):
    """transformers' model, which projects every place; its masks are ready, as a collator's."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    from sslx.models.text import shape

    width, depth, heads = shape(args.variant)
    device = {"gpu": "cuda", "cpu": "cpu"}[args.device]
    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_dropout_prob=args.dropout,
        attention_probs_dropout_prob=args.dropout,
        attn_implementation="sdpa",
    )
    model = BertForMaskedLM(config).to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    tokens = torch.randint(5, 256, (args.batch, args.length), device=device)
    hidden = torch.rand(tokens.shape, device=device) < 0.15
    given = {
        "input_ids": torch.where(hidden, 103, tokens),
        "attention_mask": torch.ones_like(tokens),
        "labels": torch.where(hidden, tokens, -100),
    }
    forward = torch.compile(model) if compiled else model
    half = args.dtype == "bfloat16"

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            loss = forward(**given).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, None


def torch_bert_compiled(args):
    return torch_bert(args, compiled=True)


# ---- all rows ----

ROWS = {
    "bert": {"sslx": sslx_bert, "eager": torch_bert, "compiled": torch_bert_compiled},
    "mae": {
        "sslx": sslx_mae,
        "sslx+views": sslx_mae_views,
        "eager": torch_mae,
        "compiled": torch_mae_compiled,
    },
    "simclr": {"sslx": sslx_simclr, "eager": torch_simclr},
    "byol": {"sslx": sslx_byol, "eager": torch_byol},
}
VARIANT = {"mae": "S", "simclr": "18", "byol": "18", "bert": "base"}
SIZE = {"mae": 224, "simclr": 32, "byol": 32}


# ---- contenders, each in its process ----


def contend(args):
    """Build and warm up, say so, then take steps for every line that arrives."""
    if args.contender.startswith("sslx"):
        os.environ.setdefault("JAX_PLATFORMS", {"cpu": "cpu", "gpu": "cuda"}[args.device])
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    start = time.perf_counter()
    step, flops = ROWS[args.row][args.contender](args)
    losses = [step() for _ in range(2)]
    warm = time.perf_counter() - start
    say({"flops": flops, "losses": losses, "warm": warm, "device": name_of_device(args)})
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(args.steps):
            step()
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        say({"wall": wall / args.steps, "cpu": cpu / args.steps})


def name_of_device(args):
    if args.contender.startswith("sslx"):
        import jax

        return jax.devices()[0].device_kind
    import torch

    return torch.cuda.get_device_name() if args.device == "gpu" else "cpu"


def say(value):
    print(json.dumps(value), flush=True)


def hear(process):
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit(f"{process.args[-1]} ended early; run it alone to see why")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", nargs="?", default="mae", choices=ROWS)
    parser.add_argument("--variant", help="S, B, ... of ViT; 18, 50, ... of ResNet; base, ...")
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--decoder", default="512x8x16", help="width x depth x heads")
    parser.add_argument("--size", type=int, help="of the views, in pixels")
    parser.add_argument("--length", type=int, default=128, help="tokens of BERT's windows")
    parser.add_argument("--dropout", type=float, default=0.1, help="of BERT")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--remat", default="dots")
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="of one contender in a round")
    parser.add_argument("--contenders", help="some of the row's, by commas")
    parser.add_argument("--contender", help="run as this one, told over standard input")
    args = parser.parse_args()
    args.variant, args.size = args.variant or VARIANT[args.row], args.size or SIZE.get(args.row)
    if args.contender:
        return contend(args)
    names = args.contenders.split(",") if args.contenders else list(ROWS[args.row])
    processes, facts = {}, {}
    for name in names:
        command = [sys.executable, __file__, *sys.argv[1:], "--contender", name]
        pipe = subprocess.PIPE
        processes[name] = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        facts[name] = hear(processes[name])
    times = {name: [] for name in names}
    for _ in range(args.rounds):
        for name, process in processes.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            times[name].append(hear(process))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    report(args, facts, times)


def report(args, facts, times):
    flops = next((f["flops"] for f in facts.values() if f["flops"]), None)
    device = next(iter(facts.values()))["device"]
    peak = next((tera for kind, tera in PEAK.items() if kind in device), None)
    peak = peak if args.dtype == "bfloat16" else None
    what = {
        "mae": f"/{args.patch} {args.size} px",
        "bert": f" of {args.length} tokens, dropout {args.dropout}",
    }.get(args.row, f" {args.size} px")
    print(f"{args.row} {args.variant}{what}, batch {args.batch},", end=" ")
    print(f"{args.dtype}, {device}, {args.rounds} rounds of {args.steps} steps", end="")
    print(f", {flops / 1e9:,.0f} GFLOP a step" if flops else "")
    columns = ("", "s/step", "cpu s", "examples/s", "TFLOP/s", "of peak", "peer/sslx", "warm-up s")
    print(("{:12}" + "{:>10}" * 7).format(*columns))
    for name, rounds in times.items():
        wall, cpu = (statistics.median(r[key] for r in rounds) for key in ("wall", "cpu"))
        ours = times.get("sslx", rounds)  # round by round: what slows one slows its neighbor
        ratio = statistics.median(p["wall"] / o["wall"] for p, o in zip(rounds, ours, strict=True))
        speed = flops / wall / 1e12 if flops else 0
        share = f"{speed / peak:.0%}" if peak else "-"
        print(
            f"{name:12}{wall:10.4f}{cpu:10.3f}{args.batch / wall:10.1f}{speed:10.3f}{share:>10}"
            f"{ratio:10.2f}{facts[name]['warm']:10.1f}   {[round(r['wall'], 4) for r in rounds]}"
        )


if __name__ == "__main__":
    main()
