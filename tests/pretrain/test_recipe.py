"""Recipes: what is shipped loads; what is wrong is named."""

import pytest

from pretrain.errors import RecipeError
from pretrain.recipe import effective_micro_batch, load_recipe, parse_size


@pytest.mark.parametrize("name", ["demo", "8b-a1b"])
def test_shipped_recipes_load(name):
    recipe = load_recipe(name).recipe
    assert recipe.stages and all(isinstance(stage.context, int) for stage in recipe.stages)


def test_overrides_by_index_and_by_name():
    recipe = load_recipe(
        "demo", ["stages[0].window=16", "stages.long.top_k=full", "optimizer.lr=1e-3", "seed=7"]
    ).recipe
    assert recipe.stages[0].window == 16 and recipe.stages[-1].top_k is None
    assert recipe.optimizer.lr == 1e-3 and recipe.seed == 7


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimiser.lr=1", ["optimiser", "did you mean 'optimizer'"]),
        ("optimizer.lrr=1", ["optimizer.lrr", "'lr'"]),
        ("stages[0].windo=16", ["stages[0].windo", "'window'"]),
        ("stages[0].until.token=16", ["stages[0].until.token", "'tokens'"]),
        ("model.hidden=16", ["model.hidden", "hidden_size"]),
        ("model.preset=dem", ["no preset 'dem'", "'demo'"]),
        ("stages[7].window=16", ["no entry '7'", "warmup"]),
        ("stages[0].window=12", ["stages.warmup.window", "12", "chunk size 8"]),
        ("stages[0].context=100", ["stages.warmup.context", "100"]),
        ("stages[0].context=many", ["stages.warmup.context", "'many'"]),
        ("stages[0].top_k=0", ["stages.warmup.top_k"]),
        ("stages[0].batch=12", ["stages.warmup.batch", "data.lanes 8"]),
        ("stages[0].until.metric=niah@64", ["until.metric", "niah.single"]),
        ("stages[1].until.tokens=null", ["stages.pretrain.until"]),
        ("stages[1].data.mix=web", ["no mix 'web'", "long"]),
        ("optimizer.lr=fast", ["optimizer.lr"]),
        ("optimizer.name=sgd", ["sgd", "muon"]),
        ("precision=fp16", ["precision", "fp16", "fp8"]),
        ("model.swa_kv_heads=3", ["model.swa_kv_heads", "num_heads"]),
        ("model.retrieval_heads=3", ["model.retrieval_heads"]),
        ("checkpoint.keep_last=0", ["checkpoint.keep_last"]),
        ("novalue", ["key=value"]),
    ],
)
def test_a_wrong_override_is_named(override, words):
    with pytest.raises(RecipeError) as error:
        load_recipe("demo", [override])
    for word in words:
        assert word in str(error.value), str(error.value)
    assert error.value.exit_status == 2


def test_no_such_recipe_lists_the_shipped_ones():
    with pytest.raises(RecipeError, match="no recipe 'dmeo'.*demo"):
        load_recipe("dmeo")


def test_broken_yaml_and_wrong_shape(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [")
    with pytest.raises(RecipeError, match=r"broken\.yaml"):
        load_recipe(str(broken))
    broken.write_text("- a list")
    with pytest.raises(RecipeError, match="mapping"):
        load_recipe(str(broken))
    broken.write_text("name: x\nmodel: {preset: demo}\ndata: {tokenizer: t}\n")
    with pytest.raises(RecipeError, match="stages"):
        load_recipe(str(broken))


def test_another_preset_warns_in_plan_and_stops_training():
    loaded = load_recipe("demo", ["model.preset=0.5b"], clashes_are_errors=False)
    assert loaded.recipe.model.vocab_size == 151936
    assert any("chunk size 64" in warning for warning in loaded.warnings)
    with pytest.raises(RecipeError, match="chunk size 64"):
        load_recipe("demo", ["model.preset=0.5b"])


def test_the_frozen_container_gives_the_same_recipe_back():
    from pretrain.recipe import recipe_from_container

    loaded = load_recipe("8b-a1b")
    assert recipe_from_container(loaded.frozen, where="frozen").recipe == loaded.recipe


@pytest.mark.parametrize(
    ("text", "value"), [("16k", 16384), ("4M", 4 << 20), (512, 512), (8e12, 8 * 10**12), ("8e3", 8000)]
)
def test_sizes(text, value):
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "k", "1.5", 0.3, True, None, []])
def test_what_is_no_size(text):
    with pytest.raises((ValueError, TypeError)):
        parse_size(text)


def test_micro_batches_divide_the_share_of_a_rank():
    recipe = load_recipe("demo", ["stages[0].micro_batch=4"]).recipe
    assert effective_micro_batch(recipe, recipe.stages[0], 2) == 4
    assert effective_micro_batch(recipe, recipe.stages[1], 2) == 4
    with pytest.raises(RecipeError, match="3 data-parallel ranks"):
        effective_micro_batch(recipe, recipe.stages[0], 3)
    recipe.stages[0].micro_batch = 5
    with pytest.raises(RecipeError, match="micro_batch: 5"):
        effective_micro_batch(recipe, recipe.stages[0], 2)


def test_async_is_read():
    assert load_recipe("demo", ["checkpoint.async=true"]).recipe.checkpoint.async_save
    assert not load_recipe("demo").recipe.checkpoint.async_save
