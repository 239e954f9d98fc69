"""A run is one typed value: how it is put together, how its faults are said, when two are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from eagleray.core.config import Config, digest, digest_json, load, parse_assignments, read_recipe
from eagleray.core.errors import ConfigError
from pydantic import Field, ValidationError, model_validator


class Inner(Config):
    depth: int = 1


class Outer(Config):
    inners: tuple[Inner, ...] = ()
    inner: Inner | None = None

    @model_validator(mode="after")
    def _deep(self) -> Outer:
        if self.inner and self.inner.depth > 3:
            raise ValueError("inner.depth is above 3\ninners are too few")
        return self


class Sample(Config):
    source: str
    top_k: int = Field(5, ge=1)
    mean: tuple[float, float, float] | None = None
    inner: Inner = Inner()


def test_overrides_win_over_the_recipe_which_wins_over_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "a.yaml"
    recipe.write_text("source: a\ntop_k: 3\ninner.depth: 2\n")
    assert load(Sample, recipe=recipe) == Sample(source="a", top_k=3, inner=Inner(depth=2))
    made = load(Sample, recipe=recipe, overrides={"top_k": 7, "inner.depth": 9})
    assert (made.source, made.top_k, made.inner.depth) == ("a", 7, 9)


def test_every_fault_is_said_at_once_with_the_nearest_key() -> None:
    with pytest.raises(ConfigError) as error:
        load(Sample, overrides={"topk": 3, "top_k": 0, "mean": [1, 2]})
    said = str(error.value)
    assert "faults in Sample" in said
    for part in ("source: missing", "did you mean top_k?", "top_k: ", "mean"):
        assert part in said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"inner.dept": 1}, "inner.dept: no such key; did you mean inner.depth?"),
        ({"inners": [{"depth": 1}, {"deph": 2}]}, "inners.1.deph: no such key; did you mean inners.1.depth?"),
        ({"iner": 1}, "iner: no such key; did you mean inner?"),
    ],
)
def test_an_unknown_key_of_a_group_is_said_with_the_nearest_key_of_that_group(
    overrides: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load(Outer, overrides=overrides)
    assert said in str(error.value)


def test_what_is_wrong_between_keys_is_counted_and_not_buried_under_the_whole_config() -> None:
    with pytest.raises(ConfigError) as error:
        load(Outer, overrides={"inner.depth": 4})
    lines = str(error.value).splitlines()
    assert lines[0] == "2 faults in Outer:"
    assert [line.strip() for line in lines[1:3]] == ["config: inner.depth is above 3", "config: inners are too few"]


def test_an_unknown_key_of_a_recipe_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "a.yaml"
    recipe.write_text("source: a\nruntme: onnx\n")
    with pytest.raises(ConfigError, match="runtme: no such key"):
        load(Sample, recipe=recipe)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "3"])
def test_a_recipe_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError):
        read_recipe(tmp_path / "a.yaml")


def test_a_missing_recipe_names_those_beside_it(tmp_path: Path) -> None:
    (tmp_path / "score.yaml").write_text("a: 1\n")
    with pytest.raises(ConfigError) as error:
        read_recipe(tmp_path / "scroe.yaml")
    assert "score.yaml" in error.value.expected


def test_an_empty_recipe_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("")
    assert load(Sample, recipe=tmp_path / "a.yaml", overrides={"source": "a"}) == Sample(source="a")


def test_assignments_are_read_as_yaml() -> None:
    assert parse_assignments(["top-k=3", "mean=[0.5, 0.5, 0.5]", "source=a=b", "x=", "inner.depth=2"]) == {
        "top_k": 3, "mean": [0.5, 0.5, 0.5], "source": "a=b", "x": "", "inner.depth": 2,
    }  # fmt: skip


def test_all_words_that_are_no_assignment_are_named() -> None:
    with pytest.raises(ConfigError, match=r"top_k, =3"):
        parse_assignments(["top_k", "=3", "source=a"])


def test_a_recipe_runs_no_code(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("source: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError):
        load(Sample, recipe=tmp_path / "a.yaml")


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Sample(source="a").top_k = 3  # type: ignore[misc]


def test_equal_configs_have_equal_digests_whatever_the_order() -> None:
    assert digest(Sample(source="a", top_k=2)) == digest(Sample(top_k=2, source="a"))
    assert digest(Sample(source="a")) != digest(Sample(source="b"))
    assert digest(Sample(source="a"), exclude=["source"]) == digest(Sample(source="b"), exclude=["source"])
    assert digest_json({"a": 1, "b": [2.5, "é"]}) == digest_json({"b": [2.5, "é"], "a": 1})


def test_a_digest_is_the_same_for_ever() -> None:
    """Ledgers and bundles on disk carry it: a change of the canonical form would make all of them stale."""
    known = (
        "a2ff3f776ed872e2e8add09ef878cbf8d4588f3d0f6f09a25b6e764b07a53da0"  # sha256sum of {"a":[true,null,"ß"],"b":1}
    )
    assert digest_json({"b": 1, "a": [True, None, "ß"]}) == known


def test_a_digest_has_no_place_for_nan() -> None:
    with pytest.raises(ValueError):
        digest_json(float("nan"))
