"""The command: what it imports, how options become a config, how everything that goes wrong ends."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from eagleray.cli.main import VERBS, app
from eagleray.cli.options import Common, Outcome, as_command, fields, table
from eagleray.core.config import Config
from eagleray.core.edge import guarded
from eagleray.core.errors import DataError
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]


class SampleConfig(Config):
    source: str
    kind: str = ""
    top_k: int = 5
    sizes: tuple[int, ...] = ()


def sample(
    source: Annotated[str | None, typer.Argument(metavar="SOURCE", help="What to read.")] = None,
    *,
    top_k: Annotated[int | None, typer.Option("--top-k", help="How many.")] = None,
    sizes: Annotated[list[int] | None, typer.Option("--sizes", help="Pixels.")] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="A field whose name load() has too.")] = None,
    common: Common,
) -> Outcome:
    """Does a sample.

    Example: eagleray sample photos/
    """
    config = common.load(SampleConfig, source=source, top_k=top_k, sizes=sizes, kind=kind)
    if config.source == "broken":
        raise DataError("the source is broken", expected="a whole one", fix="mend it")
    if config.source == "bug":
        raise ZeroDivisionError("by zero")
    if config.source == "ctrl-c":
        raise KeyboardInterrupt
    if config.source == "full":
        raise OSError(28, "No space left on device", "part.parquet")
    return Outcome(config.model_dump(mode="json", exclude_defaults=True), "done", 5 if config.source == "unfit" else 0)


class Ran:
    """A verb's exit code, stdout and stderr."""

    def __init__(self, command: Any, *arguments: str) -> None:
        result = CliRunner().invoke(as_app(command), list(arguments))
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def as_app(command: Any) -> Any:
    """CliRunner wants a Typer app; this one hands out a command as it is."""

    class Group(typer.core.TyperGroup):
        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            return command

    group = typer.Typer(cls=Group, rich_markup_mode=None)
    group.callback()(lambda: None)
    return group


def run_sample(*arguments: str) -> Ran:
    return Ran(as_command("sample", sample), "sample", *arguments)


def eagleray(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "eagleray.cli.main", *arguments],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "platform"), **env}, check=False,
    )  # fmt: skip


def test_help_lists_every_verb_and_imports_none() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom eagleray.cli.main import app, VERBS\n"
        "out = CliRunner().invoke(app, ['--help']).stdout\n"
        "assert all(name in out and verb.help[:20] in out for name, verb in VERBS.items()), out\n"
        "allowed = ('eagleray', 'eagleray.cli', 'eagleray.cli.main')\n"
        "ours = [name for name in sys.modules if name.startswith('eagleray') and name not in allowed]\n"
        "heavy = {'ray', 'torch', 'numpy', 'pydantic', 'rich', 'PIL', 'pyarrow'}.intersection(sys.modules)\n"
        "print(ours, list(heavy))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[] []", "")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb_shows_arguments_options_and_an_example_once(verb: str) -> None:
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0
    for option in ("--recipe", "--set", "--json", "--plain", "--debug"):
        assert result.stdout.count(f"  {option}") == 1
    assert result.stdout.count("rguments:") <= 1


def test_options_win_over_the_recipe_and_set_wins_over_both(tmp_path: Path) -> None:
    recipe = tmp_path / "a.yaml"
    recipe.write_text("source: from-recipe\ntop_k: 1\nsizes: [8]\n")
    plain = ("--json", "--recipe", str(recipe))
    assert run_sample(*plain).json == {"source": "from-recipe", "top_k": 1, "sizes": [8]}
    assert run_sample("given", *plain, "--top-k", "2", "--sizes", "16").json == {
        "source": "given", "top_k": 2, "sizes": [16],
    }  # fmt: skip
    assert run_sample(*plain, "--top-k", "2", "--set", "top_k=3", "--set", "sizes=[1, 2]").json == {
        "source": "from-recipe", "top_k": 3, "sizes": [1, 2],
    }  # fmt: skip


def test_a_config_may_have_a_field_named_kind() -> None:
    assert run_sample("a", "--kind", "zip", "--json").json == {"source": "a", "kind": "zip"}


def test_all_faults_of_a_config_are_said_at_once() -> None:
    ran = run_sample("--set", "topk=3", "--set", "sizes=abc")
    assert ran.code == 2
    for said in ("source: missing", "did you mean top_k?", "sizes:"):
        assert said in ran.err


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("broken", 3, "the source is broken\n  expected: a whole one\n  do: mend it"),
        ("bug", 1, "this is a fault of Eagleray: ZeroDivisionError: by zero\n  do: run the same command with --debug"),
        ("ctrl-c", 130, "stopped by Ctrl-C\n  do: run the same command again: it resumes"),
        ("full", 9, "No space left on device"),
        ("unfit", 5, ""),
    ],
)
def test_every_end_has_its_code_and_no_traceback(source: str, code: int, said: str) -> None:
    ran = run_sample(source)
    assert ran.code == code
    assert said in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(("source", "code"), [("broken", 3), ("bug", 1)])
def test_debug_shows_the_traceback_and_keeps_the_code(source: str, code: int) -> None:
    ran = run_sample(source, "--debug")
    assert ran.code == code
    assert "Traceback" in ran.err


@pytest.mark.parametrize(("source", "code"), [("broken", 3), ("bug", 1), ("ctrl-c", 130), ("full", 9)])
def test_with_json_stdout_holds_one_value_also_on_failure(source: str, code: int) -> None:
    ran = run_sample(source, "--json")
    assert ran.json["error"]["exit_code"] == ran.code == code
    assert ran.json["error"]["seen"]


def test_an_unknown_verb_is_answered_with_the_nearest() -> None:
    done = eagleray("scroe", "x")
    assert done.returncode == 2
    assert "did you mean score?" in done.stderr


def test_an_unknown_option_is_a_usage_error() -> None:
    assert eagleray("doctor", "--nope").returncode == 2


def test_a_verb_without_a_config_refuses_recipe_and_set() -> None:
    done = eagleray("doctor", "--set", "a=1")
    assert done.returncode == 2
    assert "doctor has no config" in done.stderr


def test_a_closed_pipe_is_no_fault(tmp_path: Path) -> None:
    command = f"{sys.executable} -m eagleray.cli.main doctor | true; echo ${{PIPESTATUS[0]}}"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env, check=False)
    assert "fault" not in done.stderr


@pytest.mark.parametrize(("options", "is_live"), [((), True), (("--plain",), False)])
def test_plain_draws_no_live_line_on_a_terminal(options: tuple[str, ...], is_live: bool) -> None:
    code = (
        "import sys\nfrom eagleray.cli.options import Outcome, as_command\n"
        "from eagleray.core.progress import Progress\n"
        "def verb(common):\n    with Progress(total=2, what='score') as progress: progress.update(done=2)\n"
        "    return Outcome(None, '')\n"
        "as_command('verb', verb)(sys.argv[1:])"
    )
    ours, theirs = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    subprocess.run([sys.executable, "-c", code, *options], stderr=theirs, env=env, check=True)
    os.close(theirs)
    seen = os.read(ours, 10_000).decode()
    os.close(ours)
    assert ("\x1b" in seen) == is_live
    assert "2/2" in seen


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.stdout.startswith("eagleray 0.")


def test_numbers_stand_right_and_text_left() -> None:
    said = table([["cat.jpg", 12], ["b.jpg", 1_234]], heads=("image", "count"))
    assert said.splitlines() == ["image    count", "cat.jpg     12", "b.jpg    1,234"]
    assert table([], heads=("a", "b")) == "a  b"


def test_fields_count_long_lists_and_indent_mappings() -> None:
    said = fields({"a": {"bb": 1, "c": True}, "list": list(range(9)), "none": None, "rate": 1234.5})
    assert said.splitlines() == [
        "a",
        "  bb  1",
        "  c   yes",
        "list  0, 1, 2, 3, 4, 5, ... (9 in all)",
        "none  -",
        "rate  1,234.5",
    ]


def test_guarded_returns_the_bodys_code() -> None:
    assert (guarded(lambda: None), guarded(lambda: 5)) == (0, 5)


def test_an_image_file_is_looked_at_before_it_is_read(tmp_path: Path) -> None:
    from eagleray.cli import predict
    from eagleray.vision.images import ImageRefused, Reason

    (tmp_path / "a.jpg").write_bytes(b"x")
    assert predict.read_image(tmp_path / "a.jpg") == b"x"
    for path, reason in ((tmp_path / "none.jpg", Reason.UNREADABLE), (tmp_path, Reason.UNREADABLE)):
        with pytest.raises(ImageRefused) as refused:
            predict.read_image(path)
        assert refused.value.reason == reason
    os.truncate(tmp_path / "a.jpg", predict.LIMITS.max_bytes + 1)
    with pytest.raises(ImageRefused) as refused:
        predict.read_image(tmp_path / "a.jpg")
    assert refused.value.reason == Reason.TOO_LARGE


def test_predict_quarantines_what_it_cannot_read_and_fails_only_when_nothing_was_scored(
    tmp_path: Path, tiny_model: Path, make_photo: Any
) -> None:
    good, cut, none = tmp_path / "good.jpg", tmp_path / "cut.jpg", tmp_path / "none.jpg"
    good.write_bytes(make_photo(1))
    cut.write_bytes(make_photo(2)[:300])
    model = ("--model", str(tiny_model), "--json")
    some = CliRunner().invoke(app, ["predict", str(none), str(good), str(cut), *model])
    rows = json.loads(some.stdout)
    assert some.exit_code == 0
    assert [(row["status"], row["reason"]) for row in rows] == [
        ("quarantined", "unreadable"), ("scored", None), ("quarantined", "truncated"),
    ]  # fmt: skip
    assert [row["image"] for row in rows] == [str(none), str(good), str(cut)]
    assert CliRunner().invoke(app, ["predict", str(none), str(cut), *model]).exit_code == 3
    missing = CliRunner().invoke(app, ["predict", *model])
    assert missing.exit_code == 2
    assert "images: missing" in missing.stderr


def test_predict_says_its_rows_as_a_table(tmp_path: Path, tiny_model: Path, make_photo: Any) -> None:
    (tmp_path / "good.jpg").write_bytes(make_photo(1))
    said = (
        CliRunner().invoke(app, ["predict", str(tmp_path / "good.jpg"), "none.jpg", "--model", str(tiny_model)]).stdout
    )
    assert said.splitlines()[0].split() == ["image", "status", "label", "name", "score", "decision"]
    assert said.splitlines()[-1].startswith("none.jpg: unreadable: ")


@pytest.mark.parametrize("verb", ["ingest", "import", "score", "evaluate", "predict", "demo"])
def test_options_are_fields_of_their_config(verb: str) -> None:
    """An option that its Config does not know would be refused on every use."""
    import importlib
    import inspect as python_inspect

    from eagleray.cli import predict
    from eagleray.flows import demo, evaluate, ingest, score
    from eagleray.vision import imports

    kinds: dict[str, Any] = {
        "ingest": ingest.IngestConfig, "import": imports.ImportConfig, "score": score.ScoreConfig,
        "evaluate": evaluate.EvaluateConfig, "predict": predict.PredictConfig, "demo": demo.DemoConfig,
    }  # fmt: skip
    module, name = VERBS[verb].target.split(":")
    function = getattr(importlib.import_module(module), name)
    options = set(python_inspect.signature(function).parameters) - {"common"}
    assert options <= set(kinds[verb].model_fields)
