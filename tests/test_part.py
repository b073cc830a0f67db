"""Parts of a source, and recipes that are given data and no test set."""

import inspect
import pickle

import numpy as np
import pytest

import sslx
from sslx.data.part import Part, train_and_test
from sslx.data.source import warned
from sslx.recipes import Recipe, load, shipped


def numbered(n):
    return sslx.arrays(x=np.arange(n, dtype=np.int32), label=np.arange(n) % 3)


@pytest.mark.parametrize("n", [2, 19, 20, 21, 100])
def test_a_part_and_the_rest_are_the_whole(n):
    whole = numbered(n)
    held, rest = Part(whole, 20), Part(whole, 20, rest=True)
    here, there = ([int(source[i]["x"]) for i in range(len(source))] for source in (held, rest))
    assert here == [*range(0, n, 20)] and sorted(here + there) == [*range(n)] and there[0] == 1
    for source in (held, rest):
        for i in (-1, len(source)):
            with pytest.raises(IndexError):
                source[i]
        order = np.arange(len(source))[::-1]
        got = source.gather(order)["x"].tolist()
        assert got == [r["x"] for r in source.records(order.tolist())] == [*got]
        assert pickle.loads(pickle.dumps(source)) == source and source.leaves == whole.leaves


def test_a_part_is_read_like_any_source():
    pipeline = sslx.Pipeline(Part(numbered(60), 20, rest=True))
    with pipeline.epoch(19) as batches:
        seen = [int(x) for batch in batches for x in batch["x"][batch["valid"]]]
    assert seen == [i for i in range(60) if i % 20]
    assert Part("digits:test", 20).split == "test"  # what the whole says of itself
    assert not hasattr(Part("digits:test", 20), "path")
    with pytest.raises(ValueError, match="every=1"):
        Part(numbered(3), 1)
    with pytest.raises(ValueError, match="holds no records"):
        Part(numbered(1), 2, rest=True).check()


PUBLISHED = ("digits:train", "digits:test")


def test_the_test_set_is_the_given_or_the_published_or_held_out(caplog):
    assert train_and_test("digits:train", "", PUBLISHED) == PUBLISHED
    assert train_and_test("digits:", "digits:test", PUBLISHED) == ("digits:", "digits:test")
    train, test = train_and_test("digits:", "", PUBLISHED)
    assert (len(train), len(test)) == (1707, 90) and not caplog.text
    warned.cache_clear()
    for data in (test, train, train):
        data.check()
    assert caplog.text.count("every 20th record of digits: is held out") == 1


def places(source, index):
    """Where a record is in the source of all."""
    return places(source.source, source.number(index)) if isinstance(source, Part) else index


def takes_both(name):
    parameters = inspect.signature(Recipe(name).module().config).parameters
    return {"data", "test"} <= parameters.keys() and parameters["test"].default == ""


@pytest.mark.parametrize("name", [name for name in shipped() if "digits" not in name])
def test_every_recipe_takes_data_alone(name):
    if not takes_both(name):
        assert name == "mlm_pydocs"  # it takes no data
        return
    config = load(name, data="digits:")
    training = {places(config.data.source, i) for i in range(100)}
    for evaluation in config.evals.values():
        held = getattr(evaluation, "test", None) or evaluation.data
        tested = {places(held.source, i) for i in range(90)}
        assert not tested & training and tested == {*range(0, 1797, 20)}
        if bank := getattr(evaluation, "train", None):
            assert not tested & {places(bank.source, i) for i in range(170)}
