"""The command line: errors are one line and status 2, help is quick, doctor says what is missing and what to do."""

import json
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from reasonscope.app import cli
from reasonscope.data.errors import InputError, MissingExtraError, StoreError
from reasonscope.probes.checks import doctor
from reasonscope.probes.models.loading import SHIPPED

ROOT = Path(__file__).parents[3]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([Path(sys.executable).with_name("reasonscope"), *args], capture_output=True, text=True)


def failing_main(monkeypatch, error: BaseException) -> int:
    """Run `main` with a command that raises `error`; return the exit status."""

    def fail() -> None:
        raise error

    monkeypatch.setattr(cli.app, "registered_commands", [])
    cli.app.command()(fail)
    cli.app.command("other")(lambda: None)
    monkeypatch.setattr(sys, "argv", ["reasonscope", "fail"])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    return exited.value.code


@pytest.mark.parametrize("kind", [InputError, StoreError, MissingExtraError])
def test_our_error_is_one_line_and_status_2(kind, monkeypatch, capsys):
    assert failing_main(monkeypatch, kind("line 3 is broken:\n  'x'\nwrite JSON")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "reasonscope: line 3 is broken: 'x' write JSON\n"


def test_an_error_does_nothing_to_the_terminal(monkeypatch, capsys):
    assert failing_main(monkeypatch, InputError("é: \x1b]0;x\x07\x1b[2J\u202e\udc80")) == 2
    assert capsys.readouterr().err == "reasonscope: é: \\x1b]0;x\\x07\\x1b[2J\\u202e\\udc80\n"


def test_an_interrupt_is_one_line_and_status_130(monkeypatch, capsys):
    assert failing_main(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "Interrupted: no result was kept; run the same command again to start over.\n"


def test_an_interrupt_says_what_was_kept(monkeypatch, capsys):
    interrupt = KeyboardInterrupt()
    interrupt.add_note("3 of 4 traces are kept in runs/mine; run the same command again to go on.")
    assert failing_main(monkeypatch, interrupt) == 130
    err = capsys.readouterr().err
    assert err == "Interrupted: 3 of 4 traces are kept in runs/mine; run the same command again to go on.\n"


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        failing_main(monkeypatch, ZeroDivisionError())


def test_the_installed_command_writes_the_version():
    done = command("version")
    assert (done.returncode, done.stdout) == (0, f"{version('reasonscope')}\n")


def test_help_lists_every_command():
    done = command("--help")
    assert done.returncode == 0
    assert {"app", "doctor", "version"} <= set(done.stdout.split())


def test_an_unknown_command_is_status_2():
    done = command("nonsense")
    assert done.returncode == 2
    assert "nonsense" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_command_with_a_device_can_be_deterministic_and_compute_in_float32():
    with_device = {name: options for name, options in options_of(get_command(cli.app)).items() if "--device" in options}
    assert {"record", "verify", "ablate", "steer sweep", "probe forecast", "analyse mi"} <= with_device.keys()
    assert [
        name for name, options in with_device.items() if not {"--deterministic", "--float32-compute"} <= options
    ] == []


def options_of(command, name=""):
    """The options of every command below `command`, by its name."""
    if hasattr(command, "commands"):
        below = [options_of(one, f"{name} {called}".strip()) for called, one in command.commands.items()]
        return {called: options for one in below for called, options in one.items()}
    return {name: {option for parameter in command.params for option in parameter.opts}}


@pytest.mark.parametrize(
    "words",
    [
        ("verify", "organism"),
        ("record", "--n", "2", "--out", "new"),
        ("steer", "extract", "seal", "--run", "run"),
        ("steer", "sweep", "seal", "--run", "run"),
        ("ablate", "plan.yaml", "--run", "run"),
        ("probe", "forecast", "run/probes/length.safetensors", "Why?"),
        ("analyse", "alternatives", "--run", "run"),
        ("analyse", "receivers", "--run", "run"),
        ("analyse", "mi-compare", "--run", "run"),
    ],
    ids=" ".join,
)
def test_what_says_how_to_compute_reaches_the_model(words, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("reasonscope.probes.models.model.make_deterministic", lambda: asked.append(True))
    shutil.copytree(ROOT / "app" / "example", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"the weights are torch\.float32"):
        CliRunner().invoke(cli.app, [*words, "--deterministic", "--float32-compute"], catch_exceptions=False)
    assert asked == [True]


def test_no_gradients_through_float32_over_16_bit_weights(tmp_path):
    shutil.copytree(ROOT / "app" / "example", tmp_path / "run")
    with pytest.raises(InputError, match="needs gradients"):
        CliRunner().invoke(
            cli.app,
            ["analyse", "emergent-heads", "--run", str(tmp_path / "run"), "--float32-compute"],
            catch_exceptions=False,
        )


def test_doctor_reports_everything_as_json():
    result = CliRunner().invoke(cli.app, ["doctor", "--json"])
    report = json.loads(result.stdout)
    assert report["version"] == version("reasonscope")
    assert {"torch", "transformers", "numpy"} <= {package["name"] for package in report["core"]["packages"]}
    assert report["core"]["remedy"] is None
    assert report["devices"][0]["name"] == "cpu"
    assert report["devices"][0]["memory"] > 0
    assert {extra["name"] for extra in report["extras"]} == set(EXTRAS) - {"all"}
    assert [model["name"] for model in report["models"]] == list(SHIPPED)
    assert result.exit_code == (0 if report["sound"] else 1)


def test_doctor_finds_a_shipped_model_only_with_config_and_weights(monkeypatch, tmp_path):
    for name, contents in {"organism": ("config.json", "model.safetensors"), "organism-base": ("config.json",)}.items():
        (tmp_path / name).mkdir()
        for content in contents:
            (tmp_path / name / content).touch()
    monkeypatch.setattr(doctor, "files", lambda package: tmp_path)
    examination = doctor.examine()
    whole, broken = examination.models
    assert (whole.path, whole.remedy) == (str(tmp_path / "organism"), None)
    assert broken.path is None
    assert "reinstall" in broken.remedy
    assert not examination.sound


def test_doctor_names_the_remedy_for_a_missing_extra(monkeypatch):
    def without_streamlit(name: str) -> str:
        if name == "streamlit":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", without_streamlit)
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert "pip install 'reasonscope[app]'" in result.stdout
    assert "pip install 'reasonscope[nnsight]'" not in result.stdout
    assert doctor.examine().core.remedy is None


def test_doctor_finds_a_version_too_old(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "0.0.1" if name == "torch" else version(name))
    examination = doctor.examine()
    assert examination.core.remedy == "pip install --upgrade reasonscope"
    assert not examination.sound
    assert [package.name for package in examination.core.packages if not package.satisfied] == ["torch"]
    assert CliRunner().invoke(cli.app, ["doctor"]).exit_code == 1


@pytest.mark.parametrize("command", [["record"], ["study", "demo-quick"]], ids=["record", "study"])
def test_an_engine_without_its_address_is_refused_alike(command, tmp_path):
    args = [*command, "--out", str(tmp_path / "out"), "--backend", "vllm"]
    with pytest.raises(InputError, match="--backend vllm needs --server, the address"):
        CliRunner().invoke(cli.app, args, catch_exceptions=False, standalone_mode=False)
    assert not (tmp_path / "out").exists()
