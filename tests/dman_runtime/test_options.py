"""Options and the variables behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from dman_runtime import cli
from dman_runtime.errors import UsageError
from dman_runtime.options import Parser, overridden, run_command

LINKS = {  # what Kubernetes sets for a service called "dman"
    "DMAN_PORT": "tcp://10.0.0.1:50051",
    "DMAN_SERVICE_HOST": "10.0.0.1",
    "DMAN_SERVICE_PORT": "50051",
    "DMAN_PORT_50051_TCP": "tcp://10.0.0.1:50051",
    "DMAN_PORT_50051_TCP_PROTO": "tcp",
    "DMAN_PORT_50051_TCP_PORT": "50051",
    "DMAN_PORT_50051_TCP_ADDR": "10.0.0.1",
}


@dataclass(frozen=True)
class Config:
    lanes: int = field(default=1, metadata={"help": "lanes"})
    rate: float = field(default=0.5, metadata={"help": "rate"})
    fast: bool = field(default=True, metadata={"help": "fast"})
    loss: Literal["full", "sampled"] = field(default="full", metadata={"help": "loss"})


def parser() -> Parser:
    p = Parser(prog="prog")
    p.flag("--port", type=int, default=50051, help="port")
    p.flag("--grace", type=float, default=1.0)
    p.flag("--state", type=Path, default=Path("state"))
    p.flag("--host", default="127.0.0.1")
    p.flag("--split", choices=["valid", "test"], default="test")
    p.config_flags(Config, title="config")
    return p


def set_variables(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_variables_of_a_service_link_are_ignored_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_variables(monkeypatch, LINKS | {"DMAN_HOST": "0.0.0.0", "DMAN_STATE": "/var/dman"})
    found = cli.parser().parse_args(["serve"])
    assert (found.port, found.host, found.state) == (50051, "0.0.0.0", Path("/var/dman"))
    assert capsys.readouterr().err == (
        "warning: DMAN_PORT is 'tcp://10.0.0.1:50051', the link of a service; it is ignored (--port)\n"
    )
    assert cli.parser().parse_args(["serve", "--port", "7"]).port == 7
    capsys.readouterr()
    cli.parser().parse_args(["status"])  # has no --port
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("value", ["udp://10.0.0.1:53", "TCP://[::1]:1", "sctp://h:1"])
@pytest.mark.parametrize("variable", ["DMAN_PORT", "DMAN_STATE", "DMAN_SPLIT", "DMAN_LANES", "DMAN_FAST", "DMAN_LOSS"])
def test_a_service_link_is_ignored_for_every_kind_of_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, value: str
) -> None:
    expected = parser().parse_args([])
    monkeypatch.setenv(variable, value)
    assert parser().parse_args([]) == expected
    assert capsys.readouterr().err.count(variable) == 1


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("DMAN_PORT", "high", "not of type int"),
        ("DMAN_PORT", "", "not of type int"),
        ("DMAN_GRACE", "long", "not of type float"),
        ("DMAN_SPLIT", "train", "choose one of valid, test"),
        ("DMAN_LANES", "1.5", "not of type int"),
        ("DMAN_RATE", "fast", "not of type float"),
        ("DMAN_FAST", "perhaps", "use true or false"),
        ("DMAN_LOSS", "hinge", "choose one of full, sampled"),
    ],
)
def test_a_value_that_does_not_fit_names_its_variable_unless_the_option_is_given(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, remedy: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError) as caught:
        parser().parse_args([])
    assert str(caught.value).startswith(f"{variable} is {value!r}") and remedy in str(caught.value)
    given: dict[str, Any] = {"PORT": "1", "GRACE": "2", "SPLIT": "valid", "LANES": "3", "RATE": ".5", "LOSS": "full"}
    name = variable.removeprefix("DMAN_")
    parser().parse_args([f"--{name.lower()}", *([given[name]] if name in given else [])])


def test_values_from_variables_have_the_types_of_their_options(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, {"DMAN_PORT": "7", "DMAN_STATE": "7", "DMAN_HOST": "7", "DMAN_FAST": "false"})
    found = parser().parse_args([])
    assert (found.port, found.state, found.host) == (7, Path("7"), "7")
    assert overridden(Config(), found) == Config(fast=False)
    assert "port (default: 7)" in parser().format_help()


def test_a_value_that_a_command_refuses_later_names_option_and_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(_: object) -> int:
        raise UsageError("grace is -1", "give 0 or more", parameter="grace")

    assert run_command(command, []) == 2
    assert capsys.readouterr().err == "error: grace is -1; give 0 or more (--grace)\n"
    monkeypatch.setenv("DMAN_GRACE", "-1")
    assert run_command(command, []) == 2
    assert capsys.readouterr().err == "error: grace is -1; give 0 or more (--grace or DMAN_GRACE)\n"
