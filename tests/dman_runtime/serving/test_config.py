"""Everything that can keep a server from starting: one line with cause and remedy, and nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, change_golden, running_server, serve_config

from dman_runtime.errors import UsageError
from dman_runtime.model import sessions
from dman_runtime.model.bundle import FILES, MANIFEST
from dman_runtime.serving.config import ServeConfig, free_port
from sdk import CallError, Client


def refusal(bundle: Path, state: Path, *options: str) -> str:
    """The one line with which `serve` refuses to start, with exit status 2."""
    command = [sys.executable, "-m", "dman_runtime", "serve", "--bundle", str(bundle), "--state", str(state)]
    done = subprocess.run(
        [*command, "--port", "0", *options], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and done.stderr.splitlines()[-1] == errors[0]
    rest = [line for line in done.stderr.splitlines()[:-1] if " INFO " not in line]
    assert rest == []  # nothing but the log beside it
    return errors[0]


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_port_in_use_is_refused_with_the_address_and_the_remedy(
    tiny_bundle: Path, tmp_path: Path, workers: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        message = refusal(tiny_bundle, tmp_path / "state", "--port", port, "--workers", workers)
    assert f"cannot listen on 127.0.0.1:{port}" in message
    assert message.endswith("stop the other server or choose another port (--port)")


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("other_workers", ["1", "2"])
def test_port_of_another_dman_server_is_not_shared(
    tiny_bundle: Path, tmp_path: Path, workers: str, other_workers: str
) -> None:
    with running_server(tiny_bundle, tmp_path / "other", "--workers", other_workers) as (address, _):
        port = address.rpartition(":")[2]
        message = refusal(tiny_bundle, tmp_path / "state", "--port", port, "--workers", workers)
    assert f"cannot listen on {address}" in message


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_port_is_free_again_right_after_a_crash(tiny_bundle: Path, tmp_path: Path, workers: str) -> None:
    """Connections that the dead server closed linger in TIME_WAIT for a minute; they do not hold the port."""
    with running_server(tiny_bundle, tmp_path / "state") as (address, process), Client(address, timeout=30) as client:
        client.update("anna", [1])
        process.kill()
        process.wait(30)
        with pytest.raises(CallError):
            client.user("anna", timeout=1)
    options = ("--port", address.rpartition(":")[2], "--workers", workers)
    with running_server(tiny_bundle, tmp_path / "state", *options) as (again, _), Client(again, timeout=30) as client:
        assert again == address
        assert client.user("anna").event_count == 1


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_unusable_state_directory_is_refused(tiny_bundle: Path, tmp_path: Path, workers: str) -> None:
    (tmp_path / "file").write_text("not a directory")
    for state in (tmp_path / "file", tmp_path / "file" / "state", Path("/proc/dman-state")):
        message = refusal(tiny_bundle, state, "--workers", workers)
        assert str(state) in message
        assert message.endswith("(--state)") or "permissions" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_unwritable_state_directory_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o500)
    assert str(state) in refusal(tiny_bundle, state)


@pytest.fixture
def copied_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_bundle_with_a_flipped_bit_is_refused(copied_bundle: Path, tmp_path: Path, name: str) -> None:
    content = bytearray((copied_bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied_bundle / name).write_bytes(content)
    message = refusal(copied_bundle, tmp_path / "state")
    assert str(copied_bundle / name) in message and "damaged" in message
    assert not (tmp_path / "state").exists()


@pytest.mark.slow
def test_bundle_with_an_edited_manifest_is_refused(copied_bundle: Path, tmp_path: Path) -> None:
    manifest = json.loads((copied_bundle / MANIFEST).read_text())
    manifest["state"]["segment_length"] += 1
    (copied_bundle / MANIFEST).write_text(json.dumps(manifest))
    assert "damaged or was edited" in refusal(copied_bundle, tmp_path / "state")


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_bundle_of_another_format_version_is_refused(copied_bundle: Path, tmp_path: Path, workers: str) -> None:
    manifest = json.loads((copied_bundle / MANIFEST).read_text())
    (copied_bundle / MANIFEST).write_text(json.dumps({**manifest, "format_version": 2, "new": 1}))
    message = refusal(copied_bundle, tmp_path / "state", "--workers", workers)
    assert "bundle format 2, this runtime reads format 1" in message and "export it again" in message


@pytest.mark.slow
def test_missing_bundle_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path / 'nowhere'} is not a bundle" in refusal(tmp_path / "nowhere", tmp_path / "state")


@pytest.mark.slow
@pytest.mark.skipif(sessions._has_cuda_device(), reason="there is a CUDA device")
def test_provider_cuda_without_cuda_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    message = refusal(tiny_bundle, tmp_path / "state", "--provider", "cuda")
    assert "CUDA cannot be used: " in message and message.endswith("(--provider)")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--port", "65536"),
        ("--workers", "0"),
        ("--max-in-flight-mib", "0"),
        ("--idle-timeout", "0.5"),
        ("--max-concurrent", "0"),
        ("--map-size-mib", "0"),
        ("--grace", "nan"),
        ("--grace", "-1.0"),
    ],
)
def test_impossible_option_is_refused_with_its_range(
    tiny_bundle: Path, tmp_path: Path, option: str, value: str
) -> None:
    message = refusal(tiny_bundle, tmp_path / "state", option, value)
    assert f"{option.strip('-').replace('-', '_')} is {value}; choose" in message
    assert message.endswith(f" ({option})")


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_bundle_whose_golden_replay_does_not_repeat_is_refused(
    copied_bundle: Path, tmp_path: Path, workers: str
) -> None:
    change_golden(copied_bundle, "memories", 1.01)
    message = refusal(copied_bundle, tmp_path / "state", "--workers", workers)
    assert "the golden replay is off by" in message and message.endswith("(--provider)")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("port", -1), ("port", 65536), ("admin_port", -1), ("admin_port", 65536),
     ("workers", 0), ("max_in_flight_mib", 0), ("idle_timeout", 0.5),
     ("encoder_threads", 0), ("max_concurrent", 0),
     ("map_size_mib", 0), ("grace", float("nan")), ("grace", -1.0), ("grace", 3601.0)],
)  # fmt: skip
def test_config_with_an_impossible_value_names_the_parameter(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} is ") as caught:
        serve_config(tmp_path, tmp_path, **{name: value})
    assert caught.value.parameter == name


@pytest.mark.parametrize(("host", "address"), [("127.0.0.1", "127.0.0.1:7"), ("::1", "[::1]:7"), ("a.b", "a.b:7")])
def test_address_puts_ipv6_into_brackets(tmp_path: Path, host: str, address: str) -> None:
    config: ServeConfig = serve_config(tmp_path, tmp_path, host=host).at_port(7, shared=True)
    assert (config.address, config.share_port) == (address, True)


def test_admin_service_has_one_address_of_its_own(tmp_path: Path) -> None:
    assert not serve_config(tmp_path, tmp_path).has_admin
    by_port = serve_config(tmp_path, tmp_path, port=7, host="0.0.0.0", admin_port=8)
    assert (by_port.has_admin, by_port.admin_address, by_port.address) == (True, "127.0.0.1:8", "0.0.0.0:7")
    by_socket = serve_config(tmp_path, tmp_path, admin_socket=tmp_path / "s")
    assert (by_socket.has_admin, by_socket.admin_address) == (True, f"unix:{tmp_path / 's'}")
    with pytest.raises(UsageError, match="an admin port and an admin socket are both asked for; choose one"):
        serve_config(tmp_path, tmp_path, admin_port=8, admin_socket=tmp_path / "s")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_admin_address_that_cannot_be_had_is_refused(tiny_bundle: Path, tmp_path: Path, workers: str) -> None:
    def refused(*options: str) -> str:
        return refusal(tiny_bundle, tmp_path / "state", "--workers", workers, *options)

    assert "listening on 0.0.0.0 without TLS" in refused("--admin-port", "0", "--admin-host", "0.0.0.0")
    with socket.create_server(("127.0.0.1", 0)) as other:
        message = refused("--admin-port", str(other.getsockname()[1]))
    assert message.endswith("stop the other server or choose another port (--admin-port)")
    (tmp_path / "file").touch()
    assert "there is a file" in refused("--admin-socket", str(tmp_path / "file"))
    assert not (tmp_path / "state").exists()


def test_free_port_is_free_and_a_taken_one_is_refused(tmp_path: Path) -> None:
    config = serve_config(tmp_path, tmp_path)
    with socket.create_server(("127.0.0.1", free_port(config))) as taken:
        port = taken.getsockname()[1]
        assert free_port(config) != port
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{port}"):
            free_port(config.at_port(port))
