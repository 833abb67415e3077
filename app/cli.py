"""The command `reasonscope`: which commands there are, and how an error reaches the terminal."""

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from reasonscope.app.commands import ablate, analyse, browser, hub, models, probe, record, runs, steer, study
from reasonscope.app.interruption import interruption_line, sigterm_interrupts
from reasonscope.app.terminal import printable
from reasonscope.data.errors import ReasonscopeError
from reasonscope.data.terminal_progress import show_progress


class _CommandLine(TyperGroup):
    """All commands: each shows its progress, and says when it is interrupted what was kept."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # typer's own context
        """Run the command that was asked for."""
        try:
            with sigterm_interrupts(), show_progress():
                return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            typer.echo(interruption_line(interrupt), err=True)
            raise typer.Exit(130) from interrupt


app = typer.Typer(
    cls=_CommandLine,
    help="Look inside reasoning models: capture, probe, steer and analyse what they think before they answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # an unexpected error is a bug: its plain traceback belongs in the report of it
    rich_markup_mode=None,  # else [app] in a help text would be taken for a style
)
app.command()(study.demo)
app.command("study")(study.study_command)
app.command("verify-claims")(study.verify_claims_command)
app.command("study-example", hidden=True)(study.example_command)
app.command("record")(record.record_command)
app.command()(runs.merge)
app.command()(runs.check)
app.command("import")(runs.import_)
app.command()(runs.export)
app.add_typer(probe.probe, name="probe")
app.add_typer(steer.steer, name="steer")
app.command("ablate")(ablate.ablate_command)
app.add_typer(analyse.analyse, name="analyse")
app.command("verify")(models.verify_command)
app.add_typer(models.organism, name="organism")
app.add_typer(hub.hub, name="hub")
app.command("app")(browser.browse)
app.command()(models.doctor)
app.command()(models.version)


def main() -> None:
    """Run the command line. An error of ours or of the operating system is one line on stderr and status 2; an interrupt is status 130.

    The operating system refuses names that are too long, folders without rights, a full disk: its words name the file.
    """
    try:
        app()
    except (ReasonscopeError, OSError) as error:
        # Some causes (of transformers, of the operating system) are several lines long.
        typer.echo(f"reasonscope: {printable(' '.join(str(error).split()))}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
