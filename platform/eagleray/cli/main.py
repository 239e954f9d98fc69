"""The ``eagleray`` command: a lazy table from verb to function, so that ``eagleray --help`` imports no verb.

Example:
    $ eagleray --help
"""

from __future__ import annotations

import importlib
from typing import Annotated, Any, NamedTuple

import typer
import typer.core


class Verb(NamedTuple):
    """One row of the table: where the verb's function is, and what it does in one line."""

    target: str
    help: str


VERBS: dict[str, Verb] = {
    "doctor": Verb("eagleray.cli.archive:doctor", "Check this machine; each fault with its fix."),
    "ingest": Verb("eagleray.cli.archive:ingest", "Make a corpus of images: each validated once, or set aside."),
    "import": Verb("eagleray.cli.archive:import_model", "Make a bundle of a timm model, a state dict or an ONNX file."),
    "inspect": Verb("eagleray.cli.archive:inspect", "Say what a corpus, bundle, scores folder or record is."),
    "score": Verb("eagleray.cli.archive:score", "Score an archive: every image once, or set aside with a reason."),
    "pretrain": Verb("eagleray.cli.learning:pretrain", "Learn a backbone from images alone."),
    "finetune": Verb(
        "eagleray.cli.learning:finetune", "Learn a classifier from labels, from a bundle or a timm model."
    ),
    "evaluate": Verb("eagleray.cli.learning:evaluate", "Judge a model against labels: every figure with its interval."),
    "certify": Verb("eagleray.cli.releasing:certify", "Prove a KPI on held-out images; a bundle that decides by it."),
    "release": Verb("eagleray.cli.releasing:release", "Make it smaller and faster; a gate after each step."),
    "export": Verb("eagleray.cli.releasing:export", "Write a bundle for an engine, once it answers as the model did."),
    "serve": Verb("eagleray.cli.serving:serve", "Serve models over HTTP on this machine, until Ctrl-C."),
    "rollout": Verb("eagleray.cli.serving:rollout", "Replace a model of a running service; no request fails."),
    "apikeys": Verb("eagleray.cli.access:apikeys", "Make, list and end the API keys of a service."),
    "predict": Verb("eagleray.cli.archive:predict", "Score a few images here and now, without Ray."),
    "report": Verb("eagleray.cli.archive:report", "Build the HTML page of a finished run again."),
    "demo": Verb("eagleray.cli.archive:demo", "Score a real archive with a real model, to see all of it work."),
}


class LazyVerbs(typer.core.TyperGroup):
    """A group whose commands are imported on use. Their help lines stand in the table."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The verbs in the table's order: the order in which a person needs them."""
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Imports one verb."""
        if cmd_name not in VERBS:
            return None
        from eagleray.cli.options import as_command

        module, function = VERBS[cmd_name].target.split(":")
        return as_command(cmd_name, getattr(importlib.import_module(module), function))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes the list of verbs from the table."""
        with formatter.section("Verbs"):
            formatter.write_dl([(name, verb.help) for name, verb in VERBS.items()])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Finds a verb; an unknown one is answered with the nearest names."""
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], VERBS, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the verbs are {', '.join(VERBS)}"
            ctx.fail(f"no such verb: {args[0]}; {hint}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="eagleray",
    cls=LazyVerbs,
    rich_markup_mode=None,  # rich's help costs 0.2 s of imports, and plain text reads the same everywhere
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    no_args_is_help=True,
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from eagleray import __version__

        typer.echo(f"eagleray {__version__}")
        raise typer.Exit


@app.callback()
def eagleray(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Image recognition on Ray: every image of an archive is scored exactly once, or set aside with a reason."""


def main() -> None:
    """The entry point of the ``eagleray`` command."""
    app()


if __name__ == "__main__":
    main()
