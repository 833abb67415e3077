"""The command `reasonscope`: which commands there are, and how an error reaches the terminal."""

import sys

import typer

from reasonscope.app.commands import analyse, browser, demo, environment, models, probe, runs, steer
from reasonscope.app.terminal import printable
from reasonscope.data.errors import ReasonscopeError

app = typer.Typer(
    help="Look inside reasoning models: capture, probe, steer and analyse what they think before they answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # an unexpected error is a bug: its plain traceback belongs in the report of it
    rich_markup_mode=None,  # else [app] in a help text would be taken for a style
)
app.command()(demo.demo)
app.command()(runs.record)
app.command()(runs.merge)
app.command()(runs.check)
app.command("import")(runs.import_)
app.command()(runs.export)
app.add_typer(probe.probe, name="probe")
app.add_typer(steer.steer, name="steer")
app.command("ablate")(steer.ablate)
app.add_typer(analyse.analyse, name="analyse")
app.command()(models.verify)
app.add_typer(models.organism, name="organism")
app.command("app")(browser.browse)
app.command()(environment.doctor)
app.command()(environment.version)


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
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
