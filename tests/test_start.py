"""Params of step 0 from a run or a directory: what is taken, resized, missing and left over."""

import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import ROWS
from exports import about
from flax.traverse_util import flatten_dict

import sslx
from sslx import state
from sslx.checkpoint import CheckpointError, Checkpoints
from sslx.data.image import Image
from sslx.export import hf
from sslx.models.vit import ViT
from sslx.objectives.mae import MAE, Decoder
from sslx.ops.positions import antialiased, extended, interpolated, interpolated_by_scale
from sslx.optim import AdamW
from sslx.schedules import Constant
from sslx.start import Start
from sslx.views import mae

OBJECTIVE = MAE(ViT(16, 2, 2, patch=2, remat="none"), Decoder(16, 1, 2, remat="none"))


def config_of(side=8, objective=OBJECTIVE, start=None, steps=3, rate=1e-3):
    return sslx.Config(
        objective=objective,
        data=sslx.Pipeline("digits:train", Image(side, channels=1)),
        views=mae(side, statistics=((0.3,), (0.37,))),
        optimizer=AdamW(Constant(rate), weight_decay=0.0),
        steps=steps,
        batch_size=16,
        start=start,
    )


def params_of(config):
    """Of step 0, on the host, by path."""
    first = state.first_state(config, config.mesh.build())
    return flatten_dict(jax.device_get(first.params), sep="/")


def random_params(seed=0):
    r = np.random.default_rng(seed)
    shapes = params_of(config_of())
    flat = {path: r.normal(0, 0.1, x.shape).astype(np.float32) for path, x in shapes.items()}
    return flat


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return sslx.fit(config_of(), tmp_path_factory.mktemp("start") / "run")


def taken(run):
    return flatten_dict(jax.device_get(run.restore()[3].params), sep="/")


def test_mae_goes_on_from_a_checkpoint_at_another_grid(trained, tmp_path):
    """4 x 4 patches become 8 x 8: positions are computed, and all else is taken. (At a rate of 0,
    so that the last params are the first.)"""
    trained.export(tmp_path / "out")
    run = sslx.fit(config_of(16, start=str(tmp_path / "out"), rate=0.0), tmp_path / "run")
    assert np.isfinite(run.metrics()["loss"]).all() and run.metrics()["step"].max() == 3
    ours = taken(run)
    for path, x in taken(trained).items():
        np.testing.assert_array_equal(ours[path], x, err_msg=path)


def test_a_run_starts_from_another_and_resumes_from_itself(trained, tmp_path):
    start = Start(str(trained.path))
    ours = params_of(config_of(start=start))
    assert all(np.array_equal(ours[path], x) for path, x in taken(trained).items())
    fitted = sslx.fit(config_of(start=start, steps=2), tmp_path / "run")
    text = (tmp_path / "run" / "config.txt").read_text()  # the same in every process
    assert "start.resize = (('(.*/)?position/table', extended),)" in text
    (tmp_path / "gone").mkdir()
    absent = Start(str(tmp_path / "gone" / "x"))  # what a resumed run never reads
    again = sslx.fit(config_of(start=absent, steps=4), tmp_path / "run", accept_changes=True)
    assert fitted.config.steps == 2 and again.restore()[2] == 4
    with pytest.raises(ValueError, match=r"There is no directory .* to start from"):
        params_of(config_of(start=absent))


def test_step_0_of_a_run_with_a_start_is_not_random_init(trained, tmp_path):
    """Both are evaluated, under their names; what does not fit is refused before that."""
    test = sslx.Pipeline("digits:test", Image(8, channels=1), labels=True)
    evals = {"probes": sslx.Probes(test, test, on=(sslx.KNN(5),))}
    config = replace(config_of(start=str(trained.path), steps=1), evals=evals)
    run = sslx.fit(config, tmp_path / "run")
    assert list(run.scores()) == ["random init", "step 0", "step 1"]
    features = trained.features("digits:test")
    expected = dict(sslx.KNN(5)(features, features))["knn/top1"]
    assert run.scores()["step 0"] == {"knn/top1": expected} != run.scores()["random init"]
    assert run.metrics()["knn/top1"][0] == expected and list(run.metrics()["step"]) == [0, 1]
    wide = MAE(ViT(32, 2, 2, patch=2), Decoder(16, 1, 2))
    with pytest.raises(ValueError, match="in this run"):
        sslx.fit(replace(config, objective=wide), tmp_path / "wide")
    assert not (tmp_path / "wide" / "evals.json").exists()


def test_buffers_and_branches_by_name(tmp_path):
    """BYOL's slow encoder becomes the encoder of a run; what it lacks is named, and left."""
    row, mesh = ROWS["BYOL"], sslx.Mesh().build()
    from contract import config_of as contract_config

    config = contract_config(row)
    with jax.set_mesh(mesh):
        first = state.fresh_state(config, mesh)
    slow = first.buffers["target"]["params"]["encoder"]
    slow = jax.tree.map(lambda x: x + 1, slow)
    target = {**first.buffers["target"]["params"], "encoder": slow}
    buffers = {**first.buffers, "target": {**first.buffers["target"], "params": target}}
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    checkpoints.save(0, first.replace(buffers=buffers))
    checkpoints.close()
    names = (("buffers/target/params/encoder", "params/encoder"),)
    start = Start(str(tmp_path / "run"), names=names)
    with jax.set_mesh(mesh):
        params, untouched = start(first.params, first.buffers)
    jax.tree.map(np.testing.assert_array_equal, params["encoder"], slow)
    jax.tree.map(np.testing.assert_array_equal, params["projector"], first.params["projector"])
    jax.tree.map(np.testing.assert_array_equal, untouched, first.buffers)


def test_what_is_missing_and_left_over_is_said(trained, tmp_path, caplog):
    trained.export(tmp_path / "out")
    with caplog.at_level(logging.WARNING, "sslx"):
        ours = params_of(config_of(start=str(tmp_path / "out" / "encoder")))
    assert "encoder lacks params/decoder/" in caplog.text
    fresh = params_of(config_of())
    theirs = taken(trained)
    for path, x in ours.items():
        assert np.array_equal(x, (fresh if path.startswith("decoder") else theirs)[path]), path
    caplog.clear()
    with caplog.at_level(logging.WARNING, "sslx"):
        params_of(config_of(start=Start(str(trained.path), names=(("params/encoder",) * 2,))))
    assert "has, beside what is used, params/decoder/" in caplog.text


def test_what_does_not_fit_is_refused(trained, tmp_path):
    hf.save(OBJECTIVE, trained.restore()[3].params, {}, tmp_path, about(8))
    wide = MAE(ViT(32, 2, 2, patch=2), Decoder(16, 1, 2))
    with pytest.raises(ValueError, match=r"params/\S+ is \[.*\] in .* and \[.*32.*\] in this run"):
        params_of(config_of(objective=wide, start=str(tmp_path)))
    with pytest.raises(ValueError, match=r"has nothing of params/x for params/y of.* holds params"):
        names = (("params", "params"), ("params/x", "params/y"))
        params_of(config_of(start=Start(str(tmp_path), names=names)))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7, only of \[3\]"):
        params_of(config_of(start=Start(trained.path, step=7)))


class Given(Start):
    """A source whose arrays are at hand."""

    def read(self):
        return {path: np.ones(3, np.float32) for path in ("params/a", "params/ab/c")}


def test_a_branch_is_no_prefix_of_a_name():
    here = jax.sharding.NamedSharding(sslx.Mesh().build(), jax.sharding.PartitionSpec())
    zeros = jax.device_put(
        {"a": np.zeros(3, np.float32), "ab": {"c": np.zeros(3, np.float32)}}, here
    )
    params, _ = Given("x", names=(("params/a", "params/a"),))(zeros, {})
    assert params["a"].all() and not params["ab"]["c"].any()


class GivenKey(Start):
    """A source with a random key, as checkpoints store it."""

    def read(self):
        return {"params/a": np.array([5, 7], np.uint32)}


class GivenHoles(Start):
    """A source with values that are no numbers."""

    def read(self):
        return {"params/a": np.array([1, np.nan, -np.inf], np.float32)}


def test_values_that_are_no_numbers_are_named():
    here = jax.sharding.NamedSharding(sslx.Mesh().build(), jax.sharding.PartitionSpec())
    zeros = jax.device_put({"a": np.zeros(3, np.float32)}, here)
    with pytest.raises(ValueError, match="params/a in x has 2 values of 3 that are NaN or infin"):
        GivenHoles("x")(zeros, {})


def test_a_key_is_taken_too():
    params, _ = GivenKey("x")({"a": jax.random.key(3)}, {})
    assert params["a"].dtype == jax.random.key(3).dtype
    assert jax.random.key_data(params["a"]).tolist() == [5, 7]


def test_the_first_rule_that_matches_resizes():
    here = jax.sharding.NamedSharding(sslx.Mesh().build(), jax.sharding.PartitionSpec())
    zeros = jax.device_put({"a": np.zeros(4, np.float32)}, here)
    double = lambda theirs, ours: ours + 2 * theirs[0]  # noqa: E731
    rules = (("params/b", double), ("params/a", double), (".*", extended))
    params, _ = Given("x", resize=rules)(zeros, {})
    np.testing.assert_array_equal(params["a"], np.full(4, 2.0))
    with pytest.raises(
        ValueError, match=r"resize makes params/a \[3\] of \[3\] in x, but .* \[4\]"
    ):
        Given("x", resize=((".*", lambda theirs, ours: theirs),))(zeros, {})


# ---- tables of positions ----


def test_a_longer_table_keeps_its_rows():
    table, fresh = jnp.ones((3, 2)), jnp.full((5, 2), 2.0)
    np.testing.assert_array_equal(extended(table, fresh)[:, 0], [1, 1, 1, 2, 2])
    np.testing.assert_array_equal(extended(fresh, table)[:, 0], [2, 2, 2])


# ---- tables of words ----


def words(size, value):
    """A table of `size` words, padded to 128 rows."""
    here = jax.sharding.NamedSharding(sslx.Mesh().build(), jax.sharding.PartitionSpec())
    table = np.zeros((128, 8), np.float32)
    table[:size] = value
    return jax.device_put({"word": {"table": table}}, here)


class GivenWords(Start):
    """A source with a vocabulary of 90 words, of a run before padding; its types are zeros."""

    def read(self):
        return {"params/word/table": np.ones((90, 8), np.float32), "params/type/table": TYPES}


TYPES = np.zeros((1, 8), np.float32)


def test_words_are_padded_and_other_vocabularies_said(caplog):
    given = words(90, 2.0)
    given["type"] = {"table": given["word"]["table"][:1]}
    taken, _ = GivenWords("x")(given, {})
    table = taken["word"]["table"]
    assert (table[:90] == 1).all() and table.shape == (128, 8) and not table[90:].any()
    assert np.array_equal(taken["type"]["table"], TYPES) and "tokenizer" not in caplog.text
    GivenWords("x")(words(93, 2.0), {})
    assert "x: params/word/table has 90 words and this run 93: are they of one" in caplog.text
    with pytest.raises(
        ValueError, match=r"word/table is \[90, 8\] in x and \[256, 8\] in this run"
    ):
        GivenWords("x")({"word": {"table": jnp.ones((256, 8))}}, {})


def test_words_that_are_zeros_count_where_the_size_is_ours(monkeypatch):
    """284 rows of zeros at the end are more than padding appends."""
    table = np.zeros((384, 8), np.float32)
    table[:100] = 1
    monkeypatch.setattr(GivenWords, "read", lambda self: {"params/word/table": table})
    here = jax.sharding.NamedSharding(sslx.Mesh().build(), jax.sharding.PartitionSpec())
    given = jax.device_put({"word": {"table": np.full((384, 8), 2, np.float32)}}, here)
    taken, _ = GivenWords("x")(given, {})
    np.testing.assert_array_equal(taken["word"]["table"], table)


def test_a_vocabulary_grows_by_a_rule(monkeypatch):
    """From 90 words to 130, padded to 128 and 256."""
    table, bias = np.asarray(words(90, 1.0)["word"]["table"]), np.ones(128, np.float32)
    monkeypatch.setattr(
        GivenWords, "read", lambda self: {"params/word/table": table, "params/head/bias": bias}
    )
    fresh = {
        "word": {"table": jnp.pad(jnp.full((130, 8), 2.0), ((0, 126), (0, 0)))},
        "head": {"bias": jnp.zeros(256)},
    }
    here = jax.sharding.NamedSharding(sslx.Mesh().build(), jax.sharding.PartitionSpec())
    rule = ((r".*(word/table|head/bias)", extended),)
    grown, _ = GivenWords("x", resize=rule)(jax.device_put(fresh, here), {})
    expected = np.repeat([1.0, 2, 0], (90, 40, 126))
    np.testing.assert_array_equal(grown["word"]["table"][:, 0], expected)
    np.testing.assert_array_equal(grown["head"]["bias"], np.repeat([1.0, 0], (128, 128)))


@pytest.mark.parametrize(("before", "after"), [(37, 16), (16, 37), (5, 5), (3, 8)])
@pytest.mark.parametrize("rule", [interpolated, interpolated_by_scale, antialiased])
def test_tables_of_a_grid_are_resized_as_torch_does(rule, before, after):
    """Trap 18: 518 to 224 pixels is 37 to 16 patches, three ways that differ."""
    torch = pytest.importorskip("torch", reason="NOT CHECKED: position tables are torch's")
    r = np.random.default_rng(0)
    table = r.normal(size=(1 + before**2, 4)).astype(np.float32)
    fresh = jnp.zeros((1 + after**2, 4))
    grid = table[1:].reshape(before, before, 4).transpose(2, 0, 1)[None].astype(np.float64)
    how = {"size": (after, after), "antialias": rule is antialiased}
    if rule is interpolated_by_scale:
        how = {"scale_factor": ((after + 0.1) / before,) * 2}
    resized = torch.nn.functional.interpolate(
        torch.tensor(grid), mode="bicubic", align_corners=False, **how
    )
    expected = resized[0].numpy().transpose(1, 2, 0).reshape(after**2, 4)
    ours = np.asarray(rule(jnp.asarray(table), fresh))
    np.testing.assert_allclose(ours[1:], expected, atol=2e-6)
    np.testing.assert_array_equal(ours[0], table[0])


def test_tables_that_are_no_grids_are_refused():
    with pytest.raises(ValueError, match="of 17 and 16 rows are not square grids behind as many"):
        interpolated(jnp.zeros((17, 2)), jnp.zeros((16, 2)))
